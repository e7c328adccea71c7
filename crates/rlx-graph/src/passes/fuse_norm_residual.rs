//! A sum that feeds a norm is made by the norm.
//!
//! Needs: norms, and linear layers that have taken the residuals they can. Does: `norm(a + b)` as one op with two results, the second
//! being the sum for whoever else uses it. Leaves: sums that broadcast.

use crate::ops::Op;
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::layer_norm::LayerNorm;
use crate::ops::rms_norm::RmsNorm;
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::op;
use crate::rewrite::{Draft, Match, Operand, Patch, Rule};

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    cx.rewrite(draft, &rules())
}

/// The rules of this pass.
pub fn rules() -> Vec<Rule> {
    vec![
        Rule::new(
            "layer_norm_residual",
            "norm(a + b), and a + b",
            op::<LayerNorm>().attr(|n: &LayerNorm| !n.residual),
            |draft, m| {
                let norm = m.node(draft).op().downcast::<LayerNorm>()?;
                with_sum(draft, m, LayerNorm { residual: true, ..norm.clone() }.into())
            },
        ),
        Rule::new(
            "rms_norm_residual",
            "norm(a + b), and a + b",
            op::<RmsNorm>().attr(|n: &RmsNorm| !n.residual),
            |draft, m| {
                let norm = m.node(draft).op().downcast::<RmsNorm>()?;
                with_sum(draft, m, RmsNorm { residual: true, ..norm.clone() }.into())
            },
        ),
    ]
}

fn with_sum(draft: &Draft, m: &Match, norm: Op) -> Option<Patch> {
    let node = m.node(draft);
    let sum = node.inputs()[0];
    let (add, terms) = draft.made_by::<Binary>(sum)?;
    let &[a, b] = terms.inputs() else { return None };
    if add.kind != BinaryOp::Add || !draft.same_shape(a, b) || !draft.same_shape(a, sum) {
        return None;
    }
    let mut inputs: Vec<Operand> = vec![a.into()];
    inputs.extend(node.inputs()[1..].iter().map(|&v| Operand::from(v)));
    inputs.push(b.into());
    let mut patch = Patch::new();
    let normed = patch.add(norm, &inputs);
    patch.replace(node.outputs()[0], normed);
    patch.replace(sum, normed.result(1));
    Some(patch)
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn sums_before_norms() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  input @r : f32[rows, 4]
  param @w : f32[4]
  param @b : f32[4]
  %4 : f32[rows, 4] = binary(@x, @r) {kind=add}
  %5 : f32[rows, 4] = layer_norm(%4, @w, @b) {eps=0.01, bias=true, residual=false}
  %6 : f32[rows, 4] = binary(%4, %5) {kind=add}
  %7 : f32[rows, 4] = rms_norm(%6, @w) {eps=0.01, unit_offset=false, groups=1, residual=false}
  %8 : f32[rows, 4] = binary(%6, %7) {kind=mul}
  return "y": %8
}"#;
        insta::assert_snapshot!(after(&["fuse_norm_residual"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          input @r : f32[rows, 4]
          param @w : f32[4]
          param @b : f32[4]
          %4 : f32[rows, 4], %5 : f32[rows, 4] = layer_norm(@x, @w, @b, @r) {eps=0.01, bias=true, residual=true}
          %6 : f32[rows, 4], %7 : f32[rows, 4] = rms_norm(%5, @w, %4) {eps=0.01, unit_offset=false, groups=1, residual=true}
          %8 : f32[rows, 4] = binary(%7, %6) {kind=mul}
          return "y": %8
        }
        "#);
    }

    #[test]
    fn a_row_is_no_residual() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  input @r : f32[4]
  param @w : f32[4]
  %3 : f32[rows, 4] = binary(@x, @r) {kind=add}
  %4 : f32[rows, 4] = rms_norm(%3, @w) {eps=0.01, unit_offset=false, groups=1, residual=false}
  return "y": %4
}"#;
        assert!(fired("fuse_norm_residual", before).is_empty());
    }
}
