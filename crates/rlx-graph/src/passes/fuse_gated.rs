//! An activated value times another becomes one op.
//!
//! Needs: activations. Does: `act(a) * b` of one shape. Leaves: activations that something else uses, and factors that broadcast.

use crate::ops::activation::Activation;
use crate::ops::binary::BinaryOp;
use crate::ops::gated::Gated;
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::{bind, op};
use crate::rewrite::words::binary;
use crate::rewrite::{Draft, Patch, Rule};

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    cx.rewrite(draft, &rules())
}

/// The rules of this pass.
pub fn rules() -> Vec<Rule> {
    let gate = op::<Activation>().with([bind("gate")]).single_use().named("activated");
    vec![Rule::new("gated", "act(a) * b", binary(BinaryOp::Mul, gate, bind("up")), |draft, m| {
        let (gate, up) = (m.value("gate")?, m.value("up")?);
        let (activation, _) = draft.made_by::<Activation>(m.value("activated")?)?;
        let op = Gated { activation: activation.kind };
        let result = m.result(draft)?;
        draft.same_shape(gate, up).then(|| Patch::with_op(result, op, &[gate, up]))
    })]
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn activated_times_value() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  input @z : f32[rows, 4]
  %2 : f32[rows, 4] = activation(@x) {kind=silu}
  %3 : f32[rows, 4] = binary(@z, %2) {kind=mul}
  return "y": %3
}"#;
        insta::assert_snapshot!(after(&["fuse_gated"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          input @z : f32[rows, 4]
          %2 : f32[rows, 4] = gated(@x, @z) {activation=silu}
          return "y": %2
        }
        "#);
    }

    #[test]
    fn a_row_is_no_gate() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  param @w : f32[4]
  %2 : f32[rows, 4] = activation(@x) {kind=silu}
  %3 : f32[rows, 4] = binary(%2, @w) {kind=mul}
  return "y": %3
}"#;
        assert!(fired("fuse_gated", before).is_empty());
    }
}
