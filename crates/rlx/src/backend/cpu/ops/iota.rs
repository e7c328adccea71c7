//! Counting.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;

use rlx_graph::op::OpAttrs;
use rlx_graph::ops::iota::Iota;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::reduce::IotaStep;

/// `iota`.
pub(in super::super) struct CpuIota;

impl CpuOp for CpuIota {
    fn name(&self) -> &'static str {
        Iota::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Iota>() else { return Ok(None) };
        let step = IotaStep::new(op.axis, cx.operand(&step.outputs[0]));
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
