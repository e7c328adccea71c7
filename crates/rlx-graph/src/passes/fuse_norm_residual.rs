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
