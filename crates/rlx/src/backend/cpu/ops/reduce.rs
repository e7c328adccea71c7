//! Reductions over neighbouring axes.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;

use rlx_graph::op::OpAttrs;
use rlx_graph::ops::reduce::{Reduce, ReduceOp};
use rlx_kernels::reduce::ReduceOp as Kernel;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::reduce::ReduceStep;

/// `reduce`.
pub(in super::super) struct CpuReduce;

impl CpuOp for CpuReduce {
    fn name(&self) -> &'static str {
        Reduce::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Reduce>() else { return Ok(None) };
        let (Some(&first), Some(&last)) = (op.axes.first(), op.axes.last()) else { return Ok(None) };
        if last - first + 1 != op.axes.len() {
            return Ok(None);
        }
        let kind = match op.kind {
            ReduceOp::Sum => Kernel::Sum,
            ReduceOp::Mean => Kernel::Mean,
            ReduceOp::Max => Kernel::Max,
            ReduceOp::Min => Kernel::Min,
            ReduceOp::Prod => Kernel::Prod,
            _ => return Ok(None),
        };
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let step = ReduceStep::new(cx.isa(), kind, first..last + 1, from, to);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
