//! The loop of text generation: prefill in chunks, then one token after another, over whatever runs a decoder.

use crate::arch::DecoderInfo;
use crate::error::{ModelError, Result};
use crate::kv::{BLOCK_POSITIONS, BlockPool, BlockTable, blocks_for};
use crate::sampling::{Sampler, SamplingOptions};
use rlx::SessionError;
use rlx::backend::BackendError;
pub use rlx::session::CancelToken;
use rlx_kernels::schedule::StepError;
use std::time::Instant;

/// What a runtime may fail with.
pub type RunError = Box<dyn std::error::Error + Send + Sync>;

/// Something that runs a decoder's graph and holds its caches.
pub trait DecoderRuntime {
    /// Capacities it was made for.
    fn limits(&self) -> DecoderLimits;

    /// Runs the graph on `inputs` and writes the logits of `inputs.logit_rows`, row after row, to `logits`
    /// (`logit_rows.len() * vocab`). A failed step leaves the caches as they were.
    ///
    /// # Errors
    /// Whatever went wrong; the generation ends.
    fn step(&mut self, inputs: &StepInputs, logits: &mut [f32]) -> std::result::Result<(), RunError>;

    /// From now on a step that is running ends, as an error, when `cancel` is cancelled or `deadline` passes. A runtime that
    /// cannot be stopped inside a step ignores it.
    fn interrupt(&mut self, cancel: &CancelToken, deadline: Option<Instant>) {
        let _ = (cancel, deadline);
    }
}

impl<R: DecoderRuntime + ?Sized> DecoderRuntime for &mut R {
    fn limits(&self) -> DecoderLimits {
        (**self).limits()
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut [f32]) -> std::result::Result<(), RunError> {
        (**self).step(inputs, logits)
    }

    fn interrupt(&mut self, cancel: &CancelToken, deadline: Option<Instant>) {
        (**self).interrupt(cancel, deadline);
    }
}

/// What a failed step means: that it was stopped as asked, or that it went wrong.
fn step_error(error: RunError) -> ModelError {
    match error.downcast_ref::<SessionError>() {
        Some(SessionError::Backend(BackendError::Step(StepError::Cancelled))) => ModelError::Cancelled,
        Some(SessionError::Backend(BackendError::Step(StepError::DeadlinePassed))) => ModelError::Deadline,
        _ => ModelError::Run(error),
    }
}

/// Capacities of a runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderLimits {
    /// Most rows of a step.
    pub max_rows: usize,
    /// Blocks of each cache.
    pub blocks: usize,
    /// Columns of `block_table`.
    pub table: usize,
}

/// The inputs of a decoder's graph for one step, row-major; reused from step to step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepInputs {
    /// `[rows]`
    pub input_ids: Vec<i32>,
    /// `[rows]`
    pub positions: Vec<i32>,
    /// `[batch + 1]`
    pub seq_starts: Vec<i32>,
    /// `[batch]`
    pub past: Vec<i32>,
    /// `[batch, table]`
    pub block_table: Vec<i32>,
    /// Columns of `block_table`.
    pub table: usize,
    /// `[outs]`
    pub logit_rows: Vec<i32>,
    /// `[rows, rotary_dim]` where [`DecoderInfo::rope`] is there, else empty.
    pub angles: Vec<f32>,
    /// `[rows]`: the adapter slot of each row, -1 for none.
    pub slots: Vec<i32>,
    /// `[outs]`: as `slots`, of the rows in `logit_rows`.
    pub logit_slots: Vec<i32>,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy)]
pub struct SequenceStep<'a> {
    /// Tokens to run.
    pub tokens: &'a [u32],
    /// Positions already in the cache.
    pub past: usize,
    /// Length that length-dependent frequencies are for: of the whole prompt while it is read, of the text so far after.
    pub length: usize,
    /// The sequence's blocks.
    pub table: &'a BlockTable,
    /// The logits of the last token are wanted.
    pub wants_logits: bool,
}

impl StepInputs {
    /// Empties the inputs for a step whose `block_table` has `table` columns.
    pub fn clear(&mut self, table: usize) {
        for list in [&mut self.input_ids, &mut self.positions, &mut self.past, &mut self.block_table] {
            list.clear();
        }
        self.slots.clear();
        self.logit_slots.clear();
        self.logit_rows.clear();
        self.angles.clear();
        self.seq_starts.clear();
        self.seq_starts.push(0);
        self.table = table;
    }

    /// Adds a sequence without an adapter.
    pub fn push(&mut self, info: &DecoderInfo, sequence: SequenceStep<'_>) {
        self.push_adapted(info, sequence, None);
    }

    /// Adds a sequence that runs with the adapter in a slot of the runtime.
    pub fn push_adapted(&mut self, info: &DecoderInfo, sequence: SequenceStep<'_>, slot: Option<usize>) {
        let slot = slot.map_or(-1, |slot| slot as i32);
        self.slots.extend(sequence.tokens.iter().map(|_| slot));
        for (i, &token) in sequence.tokens.iter().enumerate() {
            let position = sequence.past + i;
            self.input_ids.push(token as i32);
            self.positions.push(position as i32);
            if let Some(rope) = &info.rope {
                rope.push_angles(position, sequence.length, &mut self.angles);
            }
        }
        self.seq_starts.push(self.input_ids.len() as i32);
        self.past.push(sequence.past as i32);
        sequence.table.push_row(self.table, &mut self.block_table);
        if sequence.wants_logits {
            self.logit_rows.push(self.input_ids.len() as i32 - 1);
            self.logit_slots.push(slot);
        }
    }

    /// True if some row has an adapter.
    pub fn is_adapted(&self) -> bool {
        self.slots.iter().any(|&slot| slot >= 0)
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.input_ids.len()
    }
}

/// What to generate.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Tokens that end the text.
    pub stop: Vec<u32>,
    /// Most positions; the model's and the runtime's limits count besides.
    pub context: Option<usize>,
    /// Ends the generation from outside.
    pub cancel: CancelToken,
    /// Ends the generation at this time.
    pub deadline: Option<Instant>,
    /// The slot of the runtime whose adapter the text runs with.
    pub adapter_slot: Option<usize>,
}

impl GenerateOptions {
    /// Greedy, up to `max_new_tokens`.
    pub fn greedy(max_new_tokens: usize, stop: Vec<u32>) -> Self {
        Self {
            max_new_tokens,
            sampling: SamplingOptions::greedy(),
            stop,
            context: None,
            cancel: CancelToken::new(),
            deadline: None,
            adapter_slot: None,
        }
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// As many tokens as asked for.
    Length,
    /// A token that ends the text.
    Stop,
}

impl FinishReason {
    /// The word in JSON output.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Length => "length",
            FinishReason::Stop => "stop",
        }
    }
}

/// A text being generated: an iterator of token ids. A token that ends the text is not among them.
#[derive(Debug)]
pub struct Generation<R> {
    runtime: R,
    info: DecoderInfo,
    options: GenerateOptions,
    sampler: Sampler,
    pool: BlockPool,
    table: BlockTable,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    past: usize,
    inputs: StepInputs,
    logits: Vec<f32>,
    finish: Option<FinishReason>,
    failed: bool,
}

/// The most positions that model, runtime and caller allow.
pub fn context_limit(info: &DecoderInfo, limits: DecoderLimits, asked: Option<usize>) -> usize {
    let cache = limits.blocks.min(limits.table).saturating_mul(BLOCK_POSITIONS);
    info.max_positions.min(cache).min(asked.unwrap_or(usize::MAX))
}

/// Starts a generation. Nothing runs before the first token is asked for.
///
/// # Errors
/// [`ModelError::EmptyPrompt`], [`ModelError::TokenId`], [`ModelError::Setting`]; [`ModelError::Context`] if the prompt and the new
/// tokens do not fit: up front, not in the middle.
pub fn generate<R: DecoderRuntime>(
    mut runtime: R,
    info: &DecoderInfo,
    prompt: &[u32],
    options: GenerateOptions,
) -> Result<Generation<R>> {
    if prompt.is_empty() {
        return Err(ModelError::EmptyPrompt);
    }
    if let Some(&id) = prompt.iter().find(|&&id| id as usize >= info.vocab) {
        return Err(ModelError::TokenId { id, vocab: info.vocab });
    }
    let limits = runtime.limits();
    if limits.max_rows == 0 {
        return Err(ModelError::Setting { setting: "max_rows", expected: "at least 1", found: "0".into() });
    }
    let limit = context_limit(info, limits, options.context);
    let (prompt_tokens, new_tokens) = (prompt.len(), options.max_new_tokens);
    if prompt_tokens.saturating_add(new_tokens) > limit {
        let advice = match prompt_tokens < limit {
            true => "ask for fewer new tokens, or for a larger context if the model has one",
            false => "shorten the prompt, or ask for a larger context if the model has one",
        };
        return Err(ModelError::Context { prompt_tokens, new_tokens, limit, advice });
    }
    let mut sampler = Sampler::new(options.sampling.clone())?;
    prompt.iter().for_each(|&token| sampler.observe(token));
    let (mut pool, mut table) = (BlockPool::new(limits.blocks), BlockTable::new());
    pool.reserve(&mut table, prompt_tokens + new_tokens)?;
    runtime.interrupt(&options.cancel, options.deadline);
    let mut tokens = Vec::with_capacity(prompt_tokens + new_tokens);
    tokens.extend_from_slice(prompt);
    Ok(Generation {
        runtime,
        info: info.clone(),
        options,
        sampler,
        pool,
        table,
        tokens,
        prompt_tokens,
        past: 0,
        inputs: StepInputs::default(),
        logits: vec![0.0; info.vocab],
        finish: None,
        failed: false,
    })
}

impl<R: DecoderRuntime> Generation<R> {
    /// The next token; `None` when the text has ended.
    ///
    /// # Errors
    /// [`ModelError::Cancelled`], [`ModelError::Deadline`], [`ModelError::Run`], [`ModelError::Logits`].
    pub fn next_token(&mut self) -> Result<Option<u32>> {
        if self.finish.is_some() {
            return Ok(None);
        }
        if self.tokens.len() - self.prompt_tokens >= self.options.max_new_tokens {
            self.finish = Some(FinishReason::Length);
            return Ok(None);
        }
        self.advance()?;
        let token = self.sampler.sample(&self.logits)?;
        if self.options.stop.contains(&token) {
            self.finish = Some(FinishReason::Stop);
            return Ok(None);
        }
        self.sampler.observe(token);
        self.tokens.push(token);
        Ok(Some(token))
    }

    /// Runs every token that is not in the cache yet; the logits of the last one stand in `self.logits`.
    fn advance(&mut self) -> Result<()> {
        let length = self.tokens.len();
        let beyond = self.info.rope.as_ref().and_then(|rope| rope.recompute_beyond());
        if beyond.is_some_and(|limit| self.past <= limit && length > limit) {
            self.past = 0;
        }
        let limits = self.runtime.limits();
        let columns = limits.table.min(blocks_for(self.table.capacity()));
        while self.past < length {
            self.check_interrupts()?;
            let end = length.min(self.past.saturating_add(limits.max_rows));
            self.inputs.clear(columns);
            let sequence = SequenceStep {
                tokens: &self.tokens[self.past..end],
                past: self.past,
                length,
                table: &self.table,
                wants_logits: end == length,
            };
            self.inputs.push_adapted(&self.info, sequence, self.options.adapter_slot);
            let wanted = self.inputs.logit_rows.len() * self.info.vocab;
            self.runtime.step(&self.inputs, &mut self.logits[..wanted]).map_err(step_error)?;
            self.past = end;
        }
        Ok(())
    }

    fn check_interrupts(&self) -> Result<()> {
        if self.options.cancel.is_cancelled() {
            return Err(ModelError::Cancelled);
        }
        if self.options.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(ModelError::Deadline);
        }
        Ok(())
    }

    /// Why the text ended, once it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    /// The prompt's tokens and those generated so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens generated so far.
    pub fn new_tokens(&self) -> &[u32] {
        &self.tokens[self.prompt_tokens..]
    }

    /// Cache blocks that are free for other sequences.
    pub fn free_blocks(&self) -> usize {
        self.pool.free()
    }
}

impl<R: DecoderRuntime> Iterator for Generation<R> {
    type Item = Result<u32>;

    /// The next token; after an error, nothing.
    fn next(&mut self) -> Option<Result<u32>> {
        if self.failed {
            return None;
        }
        let item = self.next_token().transpose();
        self.failed = matches!(item, Some(Err(_)));
        item
    }
}
