//! A gate times a value: gate and up are often columns of one buffer.

use super::{CpuOp, elementwise};
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::gated::Gated;
use rlx_graph::{Op, OpDef};
use rlx_kernels::schedule::Step;
use rlx_tensor::Shape;

/// `gated`.
pub(in super::super) struct CpuGated;

impl CpuOp for CpuGated {
    fn name(&self) -> &'static str {
        Gated::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let op = op.as_any().downcast_ref::<Gated>();
        op.is_some_and(|op| elementwise::supported(&elementwise::of_gated(op.activation), inputs, outputs))
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn accepts_in_place(&self, op: &Op, _operand: usize, result: &Shape) -> bool {
        op.downcast::<Gated>()
            .is_some_and(|op| elementwise::in_place(&elementwise::of_gated(op.activation), result))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Gated>() else { return Ok(None) };
        Ok(elementwise::lower(cx, &elementwise::of_gated(op.activation), step))
    }
}
