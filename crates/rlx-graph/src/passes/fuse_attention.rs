//! Attention written out becomes the op, which never stores the score matrix (Rabe and Staats, 2021; Dao et al., 2022).
//!
//! Needs: `canonicalise`. Does: `softmax(scale * q k^T + mask) v` over `[batch, heads, seq, head_dim]` with queries and keys of one length, as
//! attention over rows with `seq_starts = 0, seq, 2 seq, ..`; the transpositions and reshapes it puts around meet those that split the
//! heads, and `canonicalise` joins them. Leaves: attention between sequences of different length, and what the target does not run.

use crate::graph::Source;
use crate::ids::{NodeId, ValueId};
use crate::ops::Op;
use crate::ops::attention::Attention;
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::broadcast::Broadcast;
use crate::ops::iota::Iota;
use crate::ops::matmul::MatMul;
use crate::ops::reduce::{Reduce, ReduceOp};
use crate::ops::reshape::Reshape;
use crate::ops::softmax::Softmax;
use crate::ops::transpose::Transpose;
use crate::passes::{PassCx, PassError};
use crate::rewrite::driver::apply;
use crate::rewrite::pat::{bind, constant, one_of, op};
use crate::rewrite::words::{binary, is_f32};
use crate::rewrite::{Draft, Match, Operand, Patch, Pattern};
use rlx_tensor::{DType, Dim, Shape, Tensor};

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    let pattern = pattern();
    for id in draft.schedule()? {
        if !draft.is_live(id) {
            continue;
        }
        let found = pattern.matches(draft, id).and_then(|m| Found::read(draft, &m));
        let Some(found) = found.filter(|f| f.runs_on(draft, cx)) else { continue };
        apply(draft, "fuse_attention", id, &found.patch(draft, id), cx.trace);
    }
    Ok(())
}

/// `softmax(scale * q k^T + mask) v`
fn pattern() -> Pattern {
    let product = || {
        let forward = op::<MatMul>().attr(|m: &MatMul| !m.transpose_a).with([bind("q"), bind("k")]);
        forward.named("product").single_use()
    };
    let scaled = || {
        one_of([
            binary(BinaryOp::Mul, product(), constant().named("factor")).single_use(),
            binary(BinaryOp::Div, product(), constant().named("divisor")).single_use(),
            product(),
        ])
    };
    let masked = binary(BinaryOp::Add, scaled(), bind("mask")).single_use();
    let scores = one_of([masked, scaled()]);
    let weights = op::<Softmax>().attr(|s: &Softmax| s.axis == 3).with([scores]).single_use();
    op::<MatMul>().attr(|m: &MatMul| *m == MatMul::plain()).with([weights, bind("v")])
}

/// Written-out attention that the op can take over.
struct Found {
    q: Unscaled,
    k: Unscaled,
    v: ValueId,
    mask: Option<ValueId>,
    keys_transposed: bool,
    op: Attention,
    batch: Dim,
    seq: Dim,
}

impl Found {
    fn read(draft: &Draft, m: &Match) -> Option<Self> {
        let number = |name: &str| m.value(name).map(|v| draft.as_scalar(v));
        let mut scale = 1.0;
        if let Some(factor) = number("factor") {
            scale *= factor?;
        }
        if let Some(divisor) = number("divisor") {
            scale /= divisor?;
        }
        let (product, _) = draft.made_by::<MatMul>(m.value("product")?)?;
        let (q_at, k_at, v) = (m.value("q")?, m.value("k")?, m.value("v")?);
        let (q, k) = (Unscaled::of(draft, q_at), Unscaled::of(draft, k_at));
        let [batch, heads, seq, head_dim] = draft.shape(q_at).dims() else { return None };
        let keys = match product.transpose_b {
            true => [batch, heads, seq, head_dim],
            false => [batch, heads, head_dim, seq],
        };
        let agree =
            draft.shape(k_at).dims().iter().eq(keys) && draft.shape(v).dims() == draft.shape(q_at).dims();
        let float = [q_at, k_at, v].into_iter().all(|value| is_f32(draft, value));
        let mask = m.value("mask");
        let masks = mask.is_none_or(|mask| mask_fits(draft, mask, [batch, heads, seq]));
        if !(agree && float && masks) {
            return None;
        }
        let (heads, head_dim) = (heads.known()?, head_dim.known()?);
        let op = Attention {
            heads,
            kv_heads: heads,
            head_dim,
            scale: scale * q.factor * k.factor,
            causal: false,
            window: None,
            softcap: None,
            mask: mask.is_some(),
            cache: false,
        };
        let (batch, seq) = (batch.clone(), seq.clone());
        Some(Self { q, k, v, mask, keys_transposed: product.transpose_b, op, batch, seq })
    }

    fn rows(&self) -> Dim {
        &self.batch * &self.seq
    }

    fn width(&self) -> Dim {
        Dim::Known(self.op.heads) * self.op.head_dim
    }

    fn mask_dims(&self, draft: &Draft, mask: ValueId) -> Vec<Dim> {
        let dims = draft.shape(mask).dims();
        let mut full = vec![Dim::Known(1); 4 - dims.len()];
        full.extend_from_slice(dims);
        full[2] = self.seq.clone();
        full
    }

    fn runs_on(&self, draft: &Draft, cx: &PassCx<'_>) -> bool {
        let rows = Shape::from_dims(vec![self.rows(), self.width()], DType::F32);
        let starts = Shape::from_dims(vec![&self.batch + &Dim::Known(1)], DType::I32);
        let mask = self.mask.map(|mask| Shape::from_dims(self.mask_dims(draft, mask), DType::F32));
        let operands = [Some(&rows), Some(&rows), Some(&rows), Some(&starts), mask.as_ref()];
        let operands: Vec<&Shape> = operands.into_iter().flatten().collect();
        cx.target.runs(&self.op, &operands, &[&rows])
    }

    fn patch(&self, draft: &Draft, id: NodeId) -> Patch {
        let mut patch = Patch::new();
        let rows = vec![self.rows(), self.width()];
        let (q, k) = (self.q.rebuilt(&mut patch), self.k.rebuilt(&mut patch));
        let mut flat = |value: Operand, perm: [usize; 4]| {
            let turned = patch.add(Transpose { perm: perm.to_vec() }, &[value]);
            patch.add(Reshape { dims: rows.clone() }, &[turned])
        };
        let q = flat(q, [0, 2, 1, 3]);
        let k = flat(k, if self.keys_transposed { [0, 2, 1, 3] } else { [0, 3, 1, 2] });
        let v = flat(self.v.into(), [0, 2, 1, 3]);
        let starts = self.starts(&mut patch);
        let mut operands = vec![q, k, v, starts];
        if let Some(mask) = self.mask {
            let full = self.mask_dims(draft, mask);
            let whole = full.as_slice() == draft.shape(mask).dims();
            operands.push(match whole {
                true => mask.into(),
                false => patch.add(Broadcast { dims: full }, &[mask.into()]),
            });
        }
        let y = patch.add(self.op.clone(), &operands);
        let (heads, head_dim) = (Dim::Known(self.op.heads), Dim::Known(self.op.head_dim));
        let split = Reshape { dims: vec![self.batch.clone(), self.seq.clone(), heads, head_dim] };
        let y = patch.add(split, &[y]);
        let y = patch.add(Transpose { perm: vec![0, 2, 1, 3] }, &[y]);
        patch.replace(draft.node(id).outputs()[0], y);
        patch
    }

    fn known_starts(&self) -> Option<Tensor> {
        let (batch, seq) = (self.batch.known()?, self.seq.known()?);
        let starts = (0..=batch).map(|b| i32::try_from(b * seq).ok()).collect::<Option<Vec<i32>>>()?;
        Tensor::from_slice(&[batch + 1], &starts).ok()
    }

    /// `0, seq, 2 seq, ..`: index b added up `seq` times, so that `seq` may be a symbol.
    fn starts(&self, patch: &mut Patch) -> Operand {
        if let Some(known) = self.known_starts() {
            return patch.constant(known);
        }
        let dims = vec![&self.batch + &Dim::Known(1), self.seq.clone()];
        let counted = patch.add(Iota { dims, axis: 0, dtype: DType::I32 }, &[]);
        patch.add(Reduce { kind: ReduceOp::Sum, axes: vec![1], keep_dims: false }, &[counted])
    }
}

/// A value before it was multiplied with a number, and the views that were taken of the product.
struct Unscaled {
    value: ValueId,
    views: Vec<Op>,
    factor: f64,
}

impl Unscaled {
    fn of(draft: &Draft, whole: ValueId) -> Self {
        let (mut value, mut views) = (whole, Vec::new());
        while let Some(id) = draft.producer(value) {
            let node = draft.node(id);
            if let Some((x, factor)) = scaled(draft, value) {
                views.reverse();
                return Self { value: x, views, factor };
            }
            let op = node.op();
            let view = op.downcast::<Reshape>().is_some() || op.downcast::<Transpose>().is_some();
            if !view || draft.use_count(value) > 1 {
                break;
            }
            views.push(op.clone());
            value = node.inputs()[0];
        }
        Self { value: whole, views: Vec::new(), factor: 1.0 }
    }

    /// The views of the value itself.
    fn rebuilt(&self, patch: &mut Patch) -> Operand {
        self.views.iter().fold(self.value.into(), |value, view| patch.add(view.clone(), &[value]))
    }
}

/// What a value is a number times of, with the number.
fn scaled(draft: &Draft, value: ValueId) -> Option<(ValueId, f64)> {
    let (op, node) = draft.made_by::<Binary>(value)?;
    let &[x, factor] = node.inputs() else { return None };
    let factor = draft.as_scalar(factor).filter(|_| draft.same_shape(x, value))?;
    match op.kind {
        BinaryOp::Mul => Some((x, factor)),
        BinaryOp::Div => Some((x, 1.0 / factor)),
        _ => None,
    }
}

/// True for a mask `[1 or batch, 1 or heads, 1 or seq, seq]`, leading dims of 1 left out or not.
fn mask_fits(draft: &Draft, mask: ValueId, [batch, heads, seq]: [&Dim; 3]) -> bool {
    let dims = draft.shape(mask).dims();
    let lead = [batch, heads, seq];
    let (Some((last, rest)), false) = (dims.split_last(), matches!(draft.source(mask), Source::State)) else {
        return false;
    };
    rest.len() <= 3
        && last == seq
        && is_f32(draft, mask)
        && rest.iter().rev().zip(lead.into_iter().rev()).all(|(dim, whole)| *dim == 1 || dim == whole)
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn attention_as_exported() {
        let before = r#"graph "g" {
  input @q : f32[batch, seq, 8]
  input @k : f32[batch, seq, 8]
  input @v : f32[batch, seq, 8]
  input @m : f32[batch, 1, 1, seq]
  const %4 : f32[] = [0.5]
  %5 : f32[batch, seq, 2, 4] = reshape(@q) {dims=dims[batch, seq, 2, 4]}
  %6 : f32[batch, 2, seq, 4] = transpose(%5) {perm=[0, 2, 1, 3]}
  %7 : f32[batch, seq, 2, 4] = reshape(@k) {dims=dims[batch, seq, 2, 4]}
  %8 : f32[batch, 2, 4, seq] = transpose(%7) {perm=[0, 2, 3, 1]}
  %9 : f32[batch, seq, 2, 4] = reshape(@v) {dims=dims[batch, seq, 2, 4]}
  %10 : f32[batch, 2, seq, 4] = transpose(%9) {perm=[0, 2, 1, 3]}
  %11 : f32[batch, 2, seq, seq] = matmul(%6, %8) {transpose_a=false, transpose_b=false}
  %12 : f32[batch, 2, seq, seq] = binary(%11, %4) {kind=mul}
  %13 : f32[batch, 2, seq, seq] = binary(%12, @m) {kind=add}
  %14 : f32[batch, 2, seq, seq] = softmax(%13) {axis=3}
  %15 : f32[batch, 2, seq, 4] = matmul(%14, %10) {transpose_a=false, transpose_b=false}
  %16 : f32[batch, seq, 2, 4] = transpose(%15) {perm=[0, 2, 1, 3]}
  %17 : f32[batch, seq, 8] = reshape(%16) {dims=dims[batch, seq, 8]}
  return "y": %17
}"#;
        insta::assert_snapshot!(after(&["canonicalise", "fuse_attention", "canonicalise"], before), @r#"
        graph "g" {
          input @q : f32[batch, seq, 8]
          input @k : f32[batch, seq, 8]
          input @v : f32[batch, seq, 8]
          input @m : f32[batch, 1, 1, seq]
          %4 : f32[batch*seq, 8] = reshape(@q) {dims=dims[batch*seq, 8]}
          %5 : f32[batch*seq, 8] = reshape(@k) {dims=dims[batch*seq, 8]}
          %6 : f32[batch*seq, 8] = reshape(@v) {dims=dims[batch*seq, 8]}
          %7 : i32[1 + batch, seq] = iota() {dims=dims[1 + batch, seq], axis=0, dtype=i32}
          %8 : i32[1 + batch] = reduce(%7) {kind=sum, axes=[1], keep_dims=false}
          %9 : f32[batch, 1, seq, seq] = broadcast(@m) {dims=dims[batch, 1, seq, seq]}
          %10 : f32[batch*seq, 8] = attention(%4, %5, %6, %8, %9) {heads=2, kv_heads=2, head_dim=4, scale=0.5, causal=false, window=none, softcap=none, mask=true, cache=false}
          %11 : f32[batch, seq, 8] = reshape(%10) {dims=dims[batch, seq, 8]}
          return "y": %11
        }
        "#);
    }

    #[test]
    fn queries_scaled_before_their_heads_are_split() {
        let before = r#"graph "g" {
  input @q : f32[1, 3, 8]
  input @k : f32[1, 2, 3, 4]
  const %2 : f32[] = [0.5]
  %3 : f32[1, 3, 8] = binary(@q, %2) {kind=mul}
  %4 : f32[1, 3, 2, 4] = reshape(%3) {dims=dims[1, 3, 2, 4]}
  %5 : f32[1, 2, 3, 4] = transpose(%4) {perm=[0, 2, 1, 3]}
  %6 : f32[1, 2, 3, 3] = matmul(%5, @k) {transpose_a=false, transpose_b=true}
  %7 : f32[1, 2, 3, 3] = softmax(%6) {axis=3}
  %8 : f32[1, 2, 3, 4] = matmul(%7, @k) {transpose_a=false, transpose_b=false}
  return "y": %8
}"#;
        let text = after(&["fuse_attention", "canonicalise", "dce"], before);
        assert!(text.contains("scale=0.5") && !text.contains("kind=mul"), "{text}");
    }

    #[test]
    fn keys_of_another_length_stay() {
        let before = r#"graph "g" {
  input @q : f32[batch, 2, seq, 4]
  input @k : f32[batch, 2, other, 4]
  input @v : f32[batch, 2, other, 4]
  %3 : f32[batch, 2, seq, other] = matmul(@q, @k) {transpose_a=false, transpose_b=true}
  %4 : f32[batch, 2, seq, other] = softmax(%3) {axis=3}
  %5 : f32[batch, 2, seq, 4] = matmul(%4, @v) {transpose_a=false, transpose_b=false}
  return "y": %5
}"#;
        assert!(fired("fuse_attention", before).is_empty());
    }

    #[test]
    fn another_axis_is_no_attention() {
        let before = r#"graph "g" {
  input @q : f32[batch, 2, seq, 4]
  input @k : f32[batch, 2, seq, 4]
  input @v : f32[batch, 2, seq, 4]
  %3 : f32[batch, 2, seq, seq] = matmul(@q, @k) {transpose_a=false, transpose_b=true}
  %4 : f32[batch, 2, seq, seq] = softmax(%3) {axis=2}
  %5 : f32[batch, 2, seq, 4] = matmul(%4, @v) {transpose_a=false, transpose_b=false}
  return "y": %5
}"#;
        assert!(fired("fuse_attention", before).is_empty());
    }
}
