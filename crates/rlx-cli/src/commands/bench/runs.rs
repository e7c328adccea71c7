//! Forward passes to time.

use crate::engine::Engine;
use crate::failure::{Failure, Result};
use rlx::session::StepTimes;
use rlx_models::arch::DecoderInfo;
use rlx_models::embed::{EncoderInputs, EncoderRuntime as _};
use rlx_models::generate::{DecoderRuntime as _, SequenceStep, StepInputs};
use rlx_models::kv::{BlockPool, BlockTable};
use rlx_models::runtime::{DecoderRunner, ENCODER_ROWS, EncoderRunner};
use rlx_models::{Built, ModelError};
use std::sync::Arc;

/// The token ids that every worker of the peer comparison takes, within the vocabulary.
pub fn token(index: usize, vocab: usize) -> u32 {
    ((index * 131) % vocab.min(30_000)) as u32
}

/// One forward pass over a batch of equal sequences, in runs of [`ENCODER_ROWS`] rows at most.
pub struct EmbedRun {
    runner: EncoderRunner,
    parts: Vec<EncoderInputs>,
    embeddings: Vec<f32>,
    dim: usize,
    width: usize,
}

impl EmbedRun {
    pub fn new(engine: &Engine, batch: usize, seq: usize) -> Result<EmbedRun> {
        let runner = engine.model().encoder_runner(ENCODER_ROWS.min(batch * seq))?;
        let info = runner.info().clone();
        let in_run = (ENCODER_ROWS / seq.max(1)).max(1);
        let mut parts = Vec::new();
        for first in (0..batch).step_by(in_run) {
            let mut inputs = EncoderInputs::default();
            inputs.clear();
            for sequence in first..(first + in_run).min(batch) {
                let ids: Vec<u32> = (0..seq).map(|i| token(sequence * seq + i, info.vocab)).collect();
                inputs.push(&info, &ids);
            }
            parts.push(inputs);
        }
        let embeddings = vec![0.0; batch.min(in_run) * info.embedding_dim];
        Ok(EmbedRun { runner, parts, embeddings, dim: info.embedding_dim, width: info.width })
    }

    /// Counters that every later run adds its steps' times to.
    pub fn time_steps(&mut self) -> Result<Arc<StepTimes>> {
        Ok(self.runner.time_steps()?)
    }

    pub fn run(&mut self) -> Result<()> {
        self.run_with(|_| ())
    }

    /// As [`EmbedRun::run`]; `see` gets the hidden states of each run, in order.
    pub fn run_with(&mut self, mut see: impl FnMut(&[f32])) -> Result<()> {
        for inputs in &self.parts {
            let embeddings = &mut self.embeddings[..inputs.batch() * self.dim];
            self.runner.run(inputs, embeddings).map_err(ModelError::Run)?;
            see(&self.runner.hidden(inputs.rows())[..inputs.rows() * self.width]);
        }
        Ok(())
    }
}

/// One sequence and its cache.
pub struct DecodeRun {
    runner: DecoderRunner,
    info: DecoderInfo,
    pool: BlockPool,
    table: BlockTable,
    inputs: StepInputs,
    logits: Vec<f32>,
}

impl DecodeRun {
    /// A run with room for `positions` tokens.
    pub fn new(engine: &Engine, positions: usize) -> Result<DecodeRun> {
        let runner = engine.model().decoder_runner(positions)?;
        let Built::Decoder(model) = engine.model().built() else {
            return Err(ModelError::NotADecoder { path: engine.model().folder().root().to_path_buf() }.into());
        };
        let (mut pool, mut table) = (BlockPool::of(&runner.limits()), BlockTable::new());
        pool.reserve(&mut table, positions)?;
        let (info, inputs) = (model.info.clone(), StepInputs::default());
        let logits = vec![0.0; info.vocab];
        Ok(DecodeRun { runner, info, pool, table, inputs, logits })
    }

    /// Counters that every later run adds its steps' times to.
    pub fn time_steps(&mut self) -> Result<Arc<StepTimes>> {
        Ok(self.runner.time_steps()?)
    }

    /// The first tokens of the input that every worker takes.
    pub fn prompt(&self, count: usize) -> Vec<u32> {
        (0..count).map(|i| token(i, self.info.vocab)).collect()
    }

    /// Runs `tokens` after the first `past` positions of the cache, which later ones leave; gives the last one's logits.
    pub fn read(&mut self, past: usize, tokens: &[u32]) -> Result<&[f32]> {
        let (limits, length) = (self.runner.limits(), past + tokens.len());
        let mut at = self.pool.resume(&mut self.table, past);
        if at < past {
            return Err(Failure::new(
                "a layer's window has left what the next token sees",
                "rlx bench",
                "measure from the start of the text",
            ));
        }
        while at < length {
            let end = length.min(at + limits.max_rows);
            self.pool.advance(&mut self.table, at, end)?;
            self.inputs.clear(limits.table);
            let tokens = &tokens[at - past..end - past];
            let (table, wants_logits) = (&self.table, end == length);
            self.inputs.push(&self.info, SequenceStep { tokens, past: at, length, table, wants_logits });
            let wanted = self.inputs.logit_rows.len() * self.info.vocab;
            self.runner.step(&self.inputs, &mut self.logits[..wanted]).map_err(ModelError::Run)?;
            at = end;
        }
        Ok(&self.logits)
    }
}
