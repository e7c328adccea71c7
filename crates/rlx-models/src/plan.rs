//! A model's memory at given capacities, from headers only.

use crate::arch::{Built, DecoderInfo, EncoderInfo};
use crate::error::{ModelError, Result};
use crate::kv::blocks_for;
use crate::model::Model;
use crate::runtime::{ENCODER_ROWS, PREFILL_ROWS};
use rlx::memory::{MemoryEstimate, estimate_with};
use rlx::plan::Lir;
use rlx_tensor::DimBinding;

/// Capacities to plan for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlanRequest {
    /// Most tokens of a sequence; the model's own limit if not given.
    pub context: Option<usize>,
    /// Sequences at once; 1 if not given.
    pub batch: Option<usize>,
}

/// A model's plan at some capacities.
#[derive(Debug, Clone)]
pub struct ModelPlan {
    /// Most tokens of a sequence.
    pub context: usize,
    /// Sequences at once.
    pub batch: usize,
    /// The specialised template.
    pub lir: Lir,
    /// Its memory, with packed weights, workspace and host.
    pub estimate: MemoryEstimate,
}

/// Memory of a loaded tokenizer for each byte of its file: every token stands in a map in both directions.
const TOKENIZER_FACTOR: u64 = 8;
/// Stack that a worker touches, and its queue.
const WORKER_BYTES: u64 = 64 << 10;
/// Graph, plan and schedule, and what the allocator holds back.
const SLACK_BYTES: u64 = 8 << 20;

impl Model {
    /// Plans for capacities and adds up the memory. No weight is read.
    ///
    /// # Errors
    /// [`ModelError::Setting`] for a capacity of 0 or a context beyond the model's limit; sizes that overflow.
    pub fn plan(&self, request: PlanRequest, threads: usize) -> Result<ModelPlan> {
        let (limit, batch) = (self.context_limit(), request.batch.unwrap_or(1));
        let context = request.context.unwrap_or(limit);
        if context == 0 || context > limit {
            let expected = "at least 1 token, at most the model's limit";
            let found = format!("{context} (the model's limit is {limit})");
            return Err(ModelError::Setting { setting: "context", expected, found });
        }
        if batch == 0 {
            let expected = "at least 1 sequence";
            return Err(ModelError::Setting { setting: "batch", expected, found: batch.to_string() });
        }
        let binding = match self.built() {
            Built::Encoder(model) => encoder_binding(&model.info, context, batch),
            Built::Decoder(model) => decoder_binding(&model.info, context, batch),
        };
        let lir = self.compiled().specialize(&binding)?;
        let mut estimate = estimate_with(&lir, self.backend().as_ref(), self.compiled().weights())?;
        let tokenizer = self.tokenizer_bytes().saturating_mul(TOKENIZER_FACTOR);
        estimate.host_bytes = tokenizer.saturating_add(threads as u64 * WORKER_BYTES + SLACK_BYTES);
        Ok(ModelPlan { context, batch, lir, estimate })
    }

    /// Most tokens of a sequence that the model was made for.
    pub fn context_limit(&self) -> usize {
        match self.built() {
            Built::Encoder(model) => model.info.max_tokens,
            Built::Decoder(model) => model.info.max_positions,
        }
    }

    fn tokenizer_bytes(&self) -> u64 {
        let embedded = self.folder().content("tokenizer.json").map(|bytes| bytes.len() as u64);
        let on_disk =
            || std::fs::metadata(self.folder().root().join("tokenizer.json")).map(|file| file.len());
        embedded.or_else(|| on_disk().ok()).unwrap_or(self.header_bytes())
    }
}

/// Runs of several sequences take [`ENCODER_ROWS`] rows at most, unless one sequence is longer.
fn encoder_binding(info: &EncoderInfo, context: usize, batch: usize) -> DimBinding {
    let rows = context.saturating_mul(batch).min(ENCODER_ROWS).max(context.min(info.max_tokens));
    DimBinding::new().with("rows", rows).with("batch", batch.min(rows))
}

fn decoder_binding(info: &DecoderInfo, context: usize, batch: usize) -> DimBinding {
    let table = blocks_for(context.min(info.max_positions));
    let rows = context.min(PREFILL_ROWS).max(batch);
    let binding = DimBinding::new().with("rows", rows).with("batch", batch).with("outs", batch);
    binding.with("blocks", table.saturating_mul(batch)).with("table", table)
}
