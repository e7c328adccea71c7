//! Windows onto one axis are taken before values are turned or split, where they are windows onto rows.
//!
//! Needs: nothing. Does: slices go before transpositions and before reshapes that split their source's last axis; axes of extent 1 go
//! before transpositions. So queries, keys and values that are cut out of one linear layer, however its result was split and turned
//! first, become slices of its last axis. Leaves: slices with steps before reshapes, and slices of anything else.

use crate::ops::reshape::Reshape;
use crate::ops::slice::Slice;
use crate::ops::transpose::Transpose;
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::{bind, op};
use crate::rewrite::{Draft, Match, Patch, Rule};
use rlx_tensor::Dim;

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    cx.rewrite(draft, &rules())
}

/// The rules of this pass.
pub fn rules() -> Vec<Rule> {
    vec![
        Rule::new(
            "slice_of_transpose",
            "part i of axis a of x turned by p = part i of axis p[a] of x, turned",
            op::<Slice>().with([op::<Transpose>().with([bind("x")]).named("turned")]),
            slice_of_transpose,
        ),
        Rule::new(
            "slice_of_reshape",
            "part i of n of an axis split off the last one = elements i * size .. of that one",
            op::<Slice>()
                .attr(|s: &Slice| s.step == 1)
                .with([op::<Reshape>().with([bind("x")]).named("split")]),
            slice_of_reshape,
        ),
        Rule::new(
            "squeeze_of_transpose",
            "an axis of extent 1 stands anywhere",
            op::<Reshape>().with([op::<Transpose>().with([bind("x")]).named("turned")]),
            squeeze_of_transpose,
        ),
    ]
}

fn slice_of_transpose(draft: &Draft, m: &Match) -> Option<Patch> {
    let slice = m.node(draft).op().downcast::<Slice>()?;
    let (transpose, _) = draft.made_by::<Transpose>(m.value("turned")?)?;
    let rank = transpose.perm.len();
    let axis = transpose.perm[slice.axis.unwrap_or(rank - 1)];
    let axis = (axis + 1 != rank).then_some(axis);
    let mut patch = Patch::new();
    let part = patch.add(Slice { axis, ..slice.clone() }, &[m.value("x")?.into()]);
    let turned = patch.add(transpose.clone(), &[part]);
    patch.replace(m.result(draft)?, turned);
    Some(patch)
}

fn slice_of_reshape(draft: &Draft, m: &Match) -> Option<Patch> {
    let slice = m.node(draft).op().downcast::<Slice>()?;
    let x = m.value("x")?;
    let (whole, split) = (draft.shape(x).dims(), draft.shape(m.value("split")?).dims());
    let axis = slice.axis.unwrap_or(split.len() - 1);
    let last = whole.len().checked_sub(1)?;
    if axis != last || axis + 1 == split.len() || whole[..axis] != split[..axis] {
        return None;
    }
    let size = split[axis + 1..].iter().fold(Dim::Known(1), |product, dim| &product * dim);
    let mut patch = Patch::new();
    let window = Slice::range(last, whole.len(), &slice.start * &size, &slice.len * &size);
    let part = patch.add(window, &[x.into()]);
    let dims = draft.shape(m.result(draft)?).dims().to_vec();
    let part = patch.add(Reshape { dims }, &[part]);
    patch.replace(m.result(draft)?, part);
    Some(patch)
}

fn squeeze_of_transpose(draft: &Draft, m: &Match) -> Option<Patch> {
    let (transpose, _) = draft.made_by::<Transpose>(m.value("turned")?)?;
    let x = m.value("x")?;
    let dims = draft.shape(x).dims();
    let mut wanted = draft.shape(m.result(draft)?).dims().iter().peekable();
    let keep = |axis: &usize| wanted.next_if(|&dim| *dim == dims[*axis]).is_some();
    let kept: Vec<usize> = transpose.perm.iter().copied().filter(keep).collect();
    let whole = dims.iter().enumerate().all(|(axis, dim)| *dim == 1 || kept.contains(&axis));
    if kept.len() == dims.len() || !whole || wanted.next().is_some() {
        return None;
    }
    let mut order = kept.clone();
    order.sort_unstable();
    let perm = kept.iter().map(|axis| order.iter().position(|other| other == axis)).collect::<Option<_>>()?;
    let mut patch = Patch::new();
    let dims = order.iter().map(|&axis| dims[axis].clone()).collect();
    let narrow = patch.add(Reshape { dims }, &[x.into()]);
    let turned = patch.add(Transpose { perm }, &[narrow]);
    patch.replace(m.result(draft)?, turned);
    Some(patch)
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn queries_cut_out_of_one_layer_as_exported() {
        let before = r#"graph "g" {
  input @x : f32[batch, seq, 24]
  %1 : f32[batch, seq, 3, 2, 4] = reshape(@x) {dims=dims[batch, seq, 3, 2, 4]}
  %2 : f32[3, batch, 2, seq, 4] = transpose(%1) {perm=[2, 0, 3, 1, 4]}
  %3 : f32[1, batch, 2, seq, 4] = slice(%2) {axis=0, start=dims[1], len=dims[1], step=1}
  %4 : f32[batch, 2, seq, 4] = reshape(%3) {dims=dims[batch, 2, seq, 4]}
  return "k": %4
}"#;
        insta::assert_snapshot!(after(&["hoist_slices", "canonicalise"], before), @r#"
        graph "g" {
          input @x : f32[batch, seq, 24]
          %1 : f32[batch, seq, 8] = slice(@x) {axis=none, start=dims[8], len=dims[8], step=1}
          %2 : f32[batch, seq, 2, 4] = reshape(%1) {dims=dims[batch, seq, 2, 4]}
          %3 : f32[batch, 2, seq, 4] = transpose(%2) {perm=[0, 2, 1, 3]}
          return "k": %3
        }
        "#);
    }

    #[test]
    fn queries_of_one_text() {
        let before = r#"graph "g" {
  input @x : f32[1, 5, 24]
  %1 : f32[1, 5, 3, 2, 4] = reshape(@x) {dims=dims[1, 5, 3, 2, 4]}
  %2 : f32[3, 1, 2, 5, 4] = transpose(%1) {perm=[2, 0, 3, 1, 4]}
  %3 : f32[1, 1, 2, 5, 4] = slice(%2) {axis=0, start=dims[1], len=dims[1], step=1}
  %4 : f32[1, 2, 5, 4] = reshape(%3) {dims=dims[1, 2, 5, 4]}
  %5 : f32[1, 5, 2, 4] = transpose(%4) {perm=[0, 2, 1, 3]}
  return "k": %5
}"#;
        insta::assert_snapshot!(after(&["hoist_slices", "canonicalise"], before), @r#"
        graph "g" {
          input @x : f32[1, 5, 24]
          %1 : f32[1, 5, 8] = slice(@x) {axis=none, start=dims[8], len=dims[8], step=1}
          %2 : f32[1, 5, 2, 4] = reshape(%1) {dims=dims[1, 5, 2, 4]}
          return "k": %2
        }
        "#);
    }

    #[test]
    fn a_slice_of_another_axis_than_the_split_one_stays() {
        let before = r#"graph "g" {
  input @x : f32[rows, 24]
  %1 : f32[rows, 6, 4] = reshape(@x) {dims=dims[rows, 6, 4]}
  %2 : f32[rows, 6, 2] = slice(%1) {axis=none, start=dims[1], len=dims[2], step=1}
  %3 : f32[rows, 3, 4] = slice(%1) {axis=1, start=dims[0], len=dims[3], step=2}
  return "a": %2, "b": %3
}"#;
        assert!(fired("hoist_slices", before).is_empty());
    }
}
