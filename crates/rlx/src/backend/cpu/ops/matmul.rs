//! Products of two values.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::matmul::MatMul;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::matmul::MatMulStep;

/// `matmul`.
pub(in super::super) struct CpuMatMul;

impl CpuOp for CpuMatMul {
    fn name(&self) -> &'static str {
        MatMul::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<MatMul>() else { return Ok(None) };
        let (a, b) = (cx.operand(&step.inputs[0]), cx.operand(&step.inputs[1]));
        let transposed = (op.transpose_a, op.transpose_b);
        let step = MatMulStep::new(cx.isa(), transposed, a, b, cx.operand(&step.outputs[0]));
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
