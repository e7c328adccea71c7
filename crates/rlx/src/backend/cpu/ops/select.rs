//! One of two values by a condition.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::select::Select;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::elementwise::SelectStep;

/// `select`.
pub(in super::super) struct CpuSelect;

impl CpuOp for CpuSelect {
    fn name(&self) -> &'static str {
        Select::NAME
    }

    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let operand = |i: usize| cx.operand(&step.inputs[i]);
        let out = cx.operand(&step.outputs[0]);
        let step = SelectStep::new(cx.isa(), operand(0), operand(1), operand(2), out);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
