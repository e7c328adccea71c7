//! The largest elements of each row.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::topk::TopK;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::reduce::TopKStep;

/// `topk`.
pub(in super::super) struct CpuTopK;

impl CpuOp for CpuTopK {
    fn name(&self) -> &'static str {
        TopK::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<TopK>() else { return Ok(None) };
        let x = cx.operand(&step.inputs[0]);
        let (values, indices) = (cx.operand(&step.outputs[0]), cx.operand(&step.outputs[1]));
        let step = TopKStep::new(cx.isa(), op.k, x, values, indices);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
