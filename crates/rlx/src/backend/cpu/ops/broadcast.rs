//! A value repeated along axes.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::broadcast::Broadcast;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::view::{View, ViewStep};

/// `broadcast`.
pub(in super::super) struct CpuBroadcast;

impl CpuOp for CpuBroadcast {
    fn name(&self) -> &'static str {
        Broadcast::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let step = ViewStep::new(cx.isa(), View::Broadcast, from, to);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
