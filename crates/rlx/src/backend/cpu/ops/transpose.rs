//! Axes in another order.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::transpose::Transpose;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::view::{View, ViewStep};

/// `transpose`.
pub(in super::super) struct CpuTranspose;

impl CpuOp for CpuTranspose {
    fn name(&self) -> &'static str {
        Transpose::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Transpose>() else { return Ok(None) };
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let step = ViewStep::new(cx.isa(), View::Transpose { perm: op.perm.clone() }, from, to);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
