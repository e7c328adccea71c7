//! Chains of elementwise functions as one pass over their operands.

use super::{CpuOp, elementwise};
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::fused_elementwise::FusedElementwise;
use rlx_graph::{Op, OpDef};
use rlx_kernels::schedule::Step;
use rlx_tensor::Shape;

/// `fused_elementwise`.
pub(in super::super) struct CpuFusedElementwise;

impl CpuOp for CpuFusedElementwise {
    fn name(&self) -> &'static str {
        FusedElementwise::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let op = op.as_any().downcast_ref::<FusedElementwise>();
        op.is_some_and(|op| elementwise::supported(&elementwise::of_text(op), inputs, outputs))
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn writes_strided(&self, _op: &Op) -> bool {
        true
    }

    fn accepts_in_place(&self, op: &Op, _operand: usize, result: &Shape) -> bool {
        op.downcast::<FusedElementwise>()
            .is_some_and(|op| elementwise::in_place(&elementwise::of_text(op), result))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<FusedElementwise>() else { return Ok(None) };
        Ok(elementwise::lower(cx, &elementwise::of_text(op), step))
    }
}
