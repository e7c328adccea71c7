//! Division of rows by their Euclidean length.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::l2_normalize::L2Normalize;
use rlx_graph::{Op, OpDef};
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::norm::{NormForm, NormKind, NormStep};
use rlx_tensor::{DType, Shape};

/// `l2_normalize`.
pub(in super::super) struct CpuL2Normalize;

impl CpuOp for CpuL2Normalize {
    fn name(&self) -> &'static str {
        L2Normalize::NAME
    }

    fn supports(&self, _op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        inputs.first().is_some_and(|x| x.dtype() == DType::F32)
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn accepts_in_place(&self, _op: &Op, operand: usize, _result: &Shape) -> bool {
        operand == 0
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<L2Normalize>() else { return Ok(None) };
        let form = NormForm {
            kind: NormKind::L2,
            eps: op.eps as f32,
            groups: 1,
            weight: None,
            weight_offset: 0.0,
            bias: None,
        };
        let (x, y) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        Ok(NormStep::new(cx.isa(), form, x, None, y).map(|s| Box::new(s) as Box<dyn Step>))
    }
}
