//! Attention.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::{LowerCx, ShapeCx};
use crate::plan::StepSpec;
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::attention::Attention;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::attention::{AttentionForm, AttentionStep, CacheOperands, attention_scratch};

/// `attention`.
pub(in super::super) struct CpuAttention;

fn form(op: &Attention) -> AttentionForm {
    AttentionForm {
        heads: op.heads,
        kv_heads: op.kv_heads,
        head_dim: op.head_dim,
        scale: op.scale as f32,
        causal: op.causal,
        window: op.window,
        softcap: op.softcap.map(|cap| cap as f32),
    }
}

/// Position of the first cache operand.
fn cache_at(op: &Attention) -> usize {
    4 + usize::from(op.mask)
}

impl CpuOp for CpuAttention {
    fn name(&self) -> &'static str {
        Attention::NAME
    }

    fn accepts_strided(&self, _op: &Op, operand: usize) -> bool {
        operand < 3
    }

    fn scratch(
        &self,
        _cx: &ShapeCx<'_>,
        step: &StepSpec,
        sizes: &[usize],
        _workers: usize,
    ) -> Result<(usize, usize), BackendError> {
        let Some(op) = step.op.downcast::<Attention>() else { return Ok((0, 0)) };
        let extent = |operand: usize, axis: usize| sizes[step.inputs[operand].dims[axis].index()];
        let at = cache_at(op);
        let cache = op.cache.then(|| (extent(at + 2, 0), extent(at + 1, 1)));
        Ok(attention_scratch(&form(op), extent(0, 0), cache))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Attention>() else { return Ok(None) };
        let operand = |i: usize| cx.operand(&step.inputs[i]);
        let at = cache_at(op);
        let cache = op.cache.then(|| CacheOperands {
            past: operand(at),
            block_table: operand(at + 1),
            k_cache: operand(at + 2),
            v_cache: operand(at + 3),
        });
        let mask = op.mask.then(|| operand(4));
        let (q, k, v, starts) = (operand(0), operand(1), operand(2), operand(3));
        let out = cx.operand(&step.outputs[0]);
        let step = AttentionStep::new(cx.isa(), form(op), q, k, v, starts, mask, cache, out);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
