//! A value surrounded by a constant.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::eval::from_f64;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::pad::Pad;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::view::PadStep;

/// `pad`.
pub(in super::super) struct CpuPad;

impl CpuOp for CpuPad {
    fn name(&self) -> &'static str {
        Pad::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Pad>() else { return Ok(None) };
        let before: Option<Vec<usize>> = op.before.iter().map(|d| d.known()).collect();
        let element = from_f64(&[], step.inputs[0].dtype, &[op.value]).ok();
        let (Some(before), Some(element)) = (before, element) else { return Ok(None) };
        let mut fill = [0; 8];
        fill.iter_mut().zip(element.bytes()).for_each(|(to, from)| *to = *from);
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let step = PadStep::new(cx.isa(), before, fill, from, to);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
