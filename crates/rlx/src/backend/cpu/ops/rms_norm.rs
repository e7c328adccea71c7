//! RMS norm.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::{Place, StepSpec};
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::rms_norm::RmsNorm;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::norm::{NormForm, NormKind, NormStep, NormVector};
use rlx_tensor::Shape;

/// `rms_norm`.
pub(in super::super) struct CpuRmsNorm;

impl CpuOp for CpuRmsNorm {
    fn name(&self) -> &'static str {
        RmsNorm::NAME
    }

    fn accepts_strided(&self, _op: &Op, operand: usize) -> bool {
        operand == 0 || operand == 2
    }

    fn accepts_in_place(&self, op: &Op, operand: usize, _result: &Shape) -> bool {
        op.downcast::<RmsNorm>().is_some_and(|n| operand == 0 && !n.residual)
    }

    fn vectors<'s>(&self, step: &'s StepSpec) -> Vec<&'s Place> {
        vec![&step.inputs[1]]
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<RmsNorm>() else { return Ok(None) };
        let Some(weight) = cx.vector(&step.inputs[1])? else { return Ok(None) };
        let form = NormForm {
            kind: NormKind::Rms,
            eps: op.eps as f32,
            groups: op.groups,
            weight: Some(NormVector::Known(weight)),
            weight_offset: if op.unit_offset { 1.0 } else { 0.0 },
            bias: None,
        };
        let residual = op.residual.then(|| (cx.operand(&step.inputs[2]), cx.operand(&step.outputs[1])));
        let (x, y) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        Ok(NormStep::new(cx.isa(), form, x, residual, y).map(|s| Box::new(s) as Box<dyn Step>))
    }
}
