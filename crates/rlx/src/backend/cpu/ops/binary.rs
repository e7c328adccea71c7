//! Elementwise functions of two operands: floats and truth values by programs, integers by kernels of their own.

use super::{CpuOp, elementwise};
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::binary::{Binary, BinaryOp};
use rlx_kernels::elementwise::IntegerOp;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::elementwise::{IntegerStep, integer_type_of};
use rlx_tensor::Shape;

/// `binary`.
pub(in super::super) struct CpuBinary;

impl CpuOp for CpuBinary {
    fn name(&self) -> &'static str {
        Binary::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn writes_strided(&self, _op: &Op) -> bool {
        true
    }

    fn accepts_in_place(&self, op: &Op, _operand: usize, result: &Shape) -> bool {
        op.downcast::<Binary>()
            .is_some_and(|op| elementwise::in_place(&elementwise::of_binary(op.kind), result))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Binary>() else { return Ok(None) };
        if integer_type_of(step.inputs[0].dtype).is_none() {
            return Ok(elementwise::lower(cx, &elementwise::of_binary(op.kind), step));
        }
        let Some((kind, swapped)) = integer(op.kind) else { return Ok(None) };
        let (first, second) = if swapped { (1, 0) } else { (0, 1) };
        let (a, b) = (cx.operand(&step.inputs[first]), cx.operand(&step.inputs[second]));
        let step = IntegerStep::new(cx.isa(), kind, a, b, cx.operand(&step.outputs[0]));
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}

/// The kernels' operation on integers, and whether its operands change places.
fn integer(kind: BinaryOp) -> Option<(IntegerOp, bool)> {
    Some(match kind {
        BinaryOp::Add => (IntegerOp::Add, false),
        BinaryOp::Sub => (IntegerOp::Sub, false),
        BinaryOp::Mul => (IntegerOp::Mul, false),
        BinaryOp::Div => (IntegerOp::Div, false),
        BinaryOp::Rem => (IntegerOp::Rem, false),
        BinaryOp::Min => (IntegerOp::Min, false),
        BinaryOp::Max => (IntegerOp::Max, false),
        BinaryOp::Equal => (IntegerOp::Equal, false),
        BinaryOp::Less => (IntegerOp::Less, false),
        BinaryOp::LessEqual => (IntegerOp::LessEqual, false),
        BinaryOp::Greater => (IntegerOp::Less, true),
        BinaryOp::GreaterEqual => (IntegerOp::LessEqual, true),
        _ => return None,
    })
}
