//! A window onto one axis, copied where it is no view.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::slice::Slice;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::view::{View, ViewStep};

/// `slice`.
pub(in super::super) struct CpuSlice;

impl CpuOp for CpuSlice {
    fn name(&self) -> &'static str {
        Slice::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Slice>() else { return Ok(None) };
        let Some(start) = op.start.known() else { return Ok(None) };
        let axis = op.axis.unwrap_or(step.inputs[0].dims.len().saturating_sub(1));
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let step = ViewStep::new(cx.isa(), View::Slice { axis, start, step: op.step }, from, to);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
