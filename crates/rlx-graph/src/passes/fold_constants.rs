//! Nodes of constants become constants.
//!
//! Needs: nothing. Does: evaluates by reference. Leaves: params alone, and everything of more bytes than the limit.

use crate::ids::{NodeId, ValueId};
use crate::op::shape_bytes;
use crate::passes::{PassCx, PassError};
use crate::rewrite::driver::apply;
use crate::rewrite::{Draft, Patch};
use rlx_tensor::Tensor;

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    for id in draft.schedule()? {
        if let Some(patch) = fold(draft, id, cx.options.fold_limit_bytes) {
            apply(draft, "fold_constants", id, &patch, cx.trace);
        }
    }
    Ok(())
}

fn fold(draft: &Draft, id: NodeId, limit: usize) -> Option<Patch> {
    let node = draft.node(id);
    let inputs: Option<Vec<&Tensor>> = node.inputs().iter().map(|&v| draft.as_const(v)).collect();
    let inputs = inputs?;
    let def = node.op().def();
    let props = def.props();
    let fits = |&v: &ValueId| shape_bytes(draft.shape(v)).known().is_some_and(|bytes| bytes <= limit);
    let small = node.outputs().iter().chain(node.inputs()).all(fits);
    if props.impure || !props.writes.is_empty() || !small {
        return None;
    }
    let results = def.reference(&inputs).ok()?;
    let mut patch = Patch::new();
    for (&old, result) in node.outputs().iter().zip(results) {
        let constant = patch.constant(result);
        patch.replace(old, constant);
    }
    Some(patch)
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn constants_meet() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[4] = [1.0, 2.0, 3.0, 4.0]
  const %2 : f32[] = [2.0]
  %3 : f32[4] = binary(%1, %2) {kind=mul}
  %4 : f32[4] = binary(%3, %1) {kind=add}
  %5 : f32[rows, 4] = binary(@x, %4) {kind=mul}
  return "y": %5
}"#;
        insta::assert_snapshot!(after(&["fold_constants"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          const %1 : f32[4] = [3.0, 6.0, 9.0, 12.0]
          %2 : f32[rows, 4] = binary(@x, %1) {kind=mul}
          return "y": %2
        }
        "#);
    }

    #[test]
    fn params_are_never_folded() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  param @w : f32[4]
  const %2 : f32[] = [2.0]
  %3 : f32[4] = binary(@w, %2) {kind=mul}
  %4 : f32[rows, 4] = binary(@x, %3) {kind=mul}
  return "y": %4
}"#;
        assert!(fired("fold_constants", before).is_empty());
    }
}
