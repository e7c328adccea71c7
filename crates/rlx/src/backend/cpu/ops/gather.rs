//! Slices of a value picked by index.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::gather::Gather;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::gather::GatherStep;

/// `gather`.
pub(in super::super) struct CpuGather;

impl CpuOp for CpuGather {
    fn name(&self) -> &'static str {
        Gather::NAME
    }

    fn accepts_strided(&self, _op: &Op, operand: usize) -> bool {
        operand == 0
    }

    fn writes_strided(&self, _op: &Op) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Gather>() else { return Ok(None) };
        let (x, ids) = (cx.operand(&step.inputs[0]), cx.operand(&step.inputs[1]));
        let step = GatherStep::new(cx.isa(), op.axis, x, ids, cx.operand(&step.outputs[0]));
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
