//! Layer norm.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::{Place, StepSpec};
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::layer_norm::LayerNorm;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::norm::{NormForm, NormKind, NormStep, NormVector};
use rlx_tensor::Shape;

/// `layer_norm`.
pub(in super::super) struct CpuLayerNorm;

/// A param or constant as numbers, another value as it is.
fn vector(cx: &mut LowerCx<'_>, place: &Place) -> Result<NormVector, BackendError> {
    let known = cx.vector(place)?.map(NormVector::Known);
    Ok(known.unwrap_or_else(|| NormVector::Run(cx.operand(place))))
}

impl CpuOp for CpuLayerNorm {
    fn name(&self) -> &'static str {
        LayerNorm::NAME
    }

    fn accepts_strided(&self, op: &Op, operand: usize) -> bool {
        op.downcast::<LayerNorm>().is_some_and(|n| operand == 0 || n.residual_at() == Some(operand))
    }

    fn accepts_in_place(&self, op: &Op, operand: usize, _result: &Shape) -> bool {
        op.downcast::<LayerNorm>().is_some_and(|n| operand == 0 && !n.residual)
    }

    fn vectors<'s>(&self, step: &'s StepSpec) -> Vec<&'s Place> {
        let bias = step.op.downcast::<LayerNorm>().is_some_and(|op| op.bias);
        step.inputs[1..if bias { 3 } else { 2 }].iter().collect()
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<LayerNorm>() else { return Ok(None) };
        let weight = vector(cx, &step.inputs[1])?;
        let bias = if op.bias { Some(vector(cx, &step.inputs[2])?) } else { None };
        let form = NormForm {
            kind: NormKind::Layer,
            eps: op.eps as f32,
            groups: 1,
            weight: Some(weight),
            weight_offset: 0.0,
            bias,
        };
        let residual =
            op.residual_at().map(|at| (cx.operand(&step.inputs[at]), cx.operand(&step.outputs[1])));
        let (x, y) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        Ok(NormStep::new(cx.isa(), form, x, residual, y).map(|s| Box::new(s) as Box<dyn Step>))
    }
}
