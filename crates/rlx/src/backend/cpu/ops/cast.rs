//! Conversion between dtypes.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;

use rlx_graph::op::OpAttrs;
use rlx_graph::ops::cast::Cast;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::elementwise::CastStep;

/// `cast`.
pub(in super::super) struct CpuCast;

impl CpuOp for CpuCast {
    fn name(&self) -> &'static str {
        Cast::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let step = CastStep::new(cx.isa(), from, to);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
