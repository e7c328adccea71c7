//! A reshape that is a copy: a value that is also an output, or whose rows are not adjacent.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::reshape::Reshape;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::copy::CopyStep;

/// `reshape`.
pub(in super::super) struct CpuReshape;

impl CpuOp for CpuReshape {
    fn name(&self) -> &'static str {
        Reshape::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        Ok(Some(Box::new(CopyStep { from, to })))
    }
}
