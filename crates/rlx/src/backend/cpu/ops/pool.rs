//! One row for each sequence.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::pool::{Pool, PoolKind};
use rlx_kernels::pooling::Pooling;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::reduce::PoolStep;

/// `pool`.
pub(in super::super) struct CpuPool;

impl CpuOp for CpuPool {
    fn name(&self) -> &'static str {
        Pool::NAME
    }

    fn accepts_strided(&self, _op: &Op, operand: usize) -> bool {
        operand == 0
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Pool>() else { return Ok(None) };
        let pooling = match op.kind {
            PoolKind::Mean => Pooling::Mean,
            PoolKind::Cls => Pooling::First,
            PoolKind::Last => Pooling::Last,
            PoolKind::Max => Pooling::Max,
            _ => return Ok(None),
        };
        let (x, starts) = (cx.operand(&step.inputs[0]), cx.operand(&step.inputs[1]));
        let step = PoolStep::new(cx.isa(), pooling, x, starts, cx.operand(&step.outputs[0]));
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
