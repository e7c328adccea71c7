//! Softmax.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::softmax::Softmax;
use rlx_graph::{Op, OpDef};
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::softmax::SoftmaxStep;
use rlx_tensor::{DType, Shape};

/// `softmax` over the last dim.
pub(in super::super) struct CpuSoftmax;

impl CpuOp for CpuSoftmax {
    fn name(&self) -> &'static str {
        Softmax::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<Softmax>() else { return false };
        inputs.first().is_some_and(|x| x.dtype() == DType::F32 && op.axis + 1 == x.rank())
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn accepts_in_place(&self, _op: &Op, operand: usize, _result: &Shape) -> bool {
        operand == 0
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let (x, y) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        Ok(SoftmaxStep::new(cx.isa(), x, y).map(|s| Box::new(s) as Box<dyn Step>))
    }
}
