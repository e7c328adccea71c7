//! Elementwise functions of one operand.

use super::{CpuOp, elementwise};
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::unary::Unary;
use rlx_kernels::schedule::Step;
use rlx_tensor::Shape;

/// `unary`.
pub(in super::super) struct CpuUnary;

impl CpuOp for CpuUnary {
    fn name(&self) -> &'static str {
        Unary::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn writes_strided(&self, _op: &Op) -> bool {
        true
    }

    fn accepts_in_place(&self, op: &Op, _operand: usize, result: &Shape) -> bool {
        op.downcast::<Unary>()
            .is_some_and(|op| elementwise::in_place(&elementwise::of_unary(op.kind), result))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Unary>() else { return Ok(None) };
        Ok(elementwise::lower(cx, &elementwise::of_unary(op.kind), step))
    }
}
