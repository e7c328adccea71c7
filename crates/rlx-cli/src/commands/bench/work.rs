//! How much a pass must compute and read, counted from the compiled graph.

use crate::failure::Result;
use rlx::plan::{BufferKind, Place, Template};
use rlx::{CompiledGraph, SessionError};
use rlx_graph::ops::attention::Attention;
use rlx_kernels::gemm::Precision;
use rlx_models::ModelError;
use rlx_tensor::DimBinding;

/// One sequence of a pass.
#[derive(Debug, Clone, Copy)]
pub struct Sequence {
    /// Positions in the cache before it.
    pub past: usize,
    /// Tokens of the pass.
    pub rows: usize,
}

/// Operations of a pass over `rows` tokens, without attention, whose work depends on the sequences' lengths.
pub fn weight_flops(compiled: &CompiledGraph, rows: usize) -> Result<f64> {
    let mut binding = DimBinding::new();
    for symbol in compiled.template().sizes().symbols() {
        binding = binding.with(symbol.name(), if symbol.name() == "rows" { rows } else { 1 });
    }
    let report = compiled.report().map_err(ModelError::from)?;
    let work = report.work(&binding).map_err(SessionError::from).map_err(ModelError::from)?;
    let steps = report.steps.iter().zip(work).filter(|(step, _)| step.op != "attention");
    Ok(steps.map(|(_, work)| work.flops as f64).sum())
}

/// Operations of attention: two products, a multiply-add counts two, over the keys that each row sees.
pub fn attention_flops(template: &Template, sequences: &[Sequence]) -> f64 {
    let attentions = template.steps().iter().filter_map(|step| step.op.downcast::<Attention>());
    let seen = |op: &Attention| {
        let keys = |s: &Sequence| {
            (s.past..s.past + s.rows)
                .map(|position| op.visible(position, s.past + s.rows).len())
                .sum::<usize>()
        };
        sequences.iter().map(keys).sum::<usize>() * op.heads * op.head_dim * 4
    };
    attentions.map(|op| seen(op) as f64).sum()
}

/// Bytes of keys and values that one more token reads when `past` are cached.
pub fn cache_bytes(template: &Template, past: usize) -> usize {
    let steps = template.steps().iter();
    let read = steps.filter_map(|step| {
        let op = step.op.downcast::<Attention>()?;
        let cache = step.inputs.get(op.past_at()? + 2)?;
        cache.dtype.bytes_for(2 * op.visible(past, past + 1).len() * op.kv_heads * op.head_dim)
    });
    read.sum()
}

/// Bytes of the matrices that every token is multiplied with; `None` where a router chooses among them, and if there are none.
pub fn weight_bytes(template: &Template, precision: Precision) -> Option<usize> {
    let is_param =
        |place: &&Place| matches!(template.buffers()[place.buffer.index()].kind, BufferKind::Param(_));
    let steps = template.steps().iter().filter(|step| step.op.def().name().contains("linear"));
    let mut bytes = 0;
    for place in steps.flat_map(|step| step.inputs.iter().filter(is_param)) {
        let dims: Option<Vec<usize>> = place.dims.iter().map(|&dim| template.sizes().known(dim)).collect();
        if let Some(&[n, k]) = dims.as_deref() {
            bytes += match precision {
                Precision::F32 => place.dtype.bytes_for(n * k)?,
                Precision::Bf16 => n * k * 2,
            };
        }
    }
    let routed = template.steps().iter().any(|step| step.op.def().name().contains("moe"));
    (bytes > 0 && !routed).then_some(bytes)
}
