//! Values joined along one axis.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::concat::Concat;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::view::ConcatStep;

/// `concat`.
pub(in super::super) struct CpuConcat;

impl CpuOp for CpuConcat {
    fn name(&self) -> &'static str {
        Concat::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Concat>() else { return Ok(None) };
        let inputs = step.inputs.iter().map(|p| cx.operand(p)).collect();
        let step = ConcatStep::new(cx.isa(), op.axis, inputs, cx.operand(&step.outputs[0]));
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
