//! Activation functions.

use super::{CpuOp, elementwise};
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::activation::Activation;
use rlx_graph::{Op, OpDef};
use rlx_kernels::schedule::Step;
use rlx_tensor::Shape;

/// `activation`.
pub(in super::super) struct CpuActivation;

impl CpuOp for CpuActivation {
    fn name(&self) -> &'static str {
        Activation::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let op = op.as_any().downcast_ref::<Activation>();
        op.is_some_and(|op| elementwise::supported(&elementwise::of_activation(op.kind), inputs, outputs))
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn writes_strided(&self, _op: &Op) -> bool {
        true
    }

    fn accepts_in_place(&self, op: &Op, _operand: usize, result: &Shape) -> bool {
        op.downcast::<Activation>()
            .is_some_and(|op| elementwise::in_place(&elementwise::of_activation(op.kind), result))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Activation>() else { return Ok(None) };
        Ok(elementwise::lower(cx, &elementwise::of_activation(op.kind), step))
    }
}
