//! Running sums along the last dim.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::cumsum::CumSum;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::reduce::CumsumStep;

/// `cumsum`.
pub(in super::super) struct CpuCumSum;

impl CpuOp for CpuCumSum {
    fn name(&self) -> &'static str {
        CumSum::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<CumSum>() else { return Ok(None) };
        if op.axis + 1 != step.inputs[0].dims.len() {
            return Ok(None);
        }
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let step = CumsumStep::new(cx.isa(), op.exclusive, op.reverse, from, to);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
