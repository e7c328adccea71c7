//! The loop of text generation: prefill in chunks, then one token after another, over whatever runs a decoder.

use crate::arch::DecoderInfo;
use crate::draft::{DraftStats, Drafter, shared_start};
use crate::error::{ModelError, Result};
use crate::kv::{BLOCK_POSITIONS, BlockPool, BlockTable, WindowLimits, blocks_for};
use crate::largest::RowLogits;
use crate::sampling::{Sampler, SamplingOptions};
use rlx::SessionError;
use rlx::backend::BackendError;
pub use rlx::session::CancelToken;
use rlx_kernels::schedule::StepError;
use rlx_tensor::time::Instant;
use std::ops::Range;

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

    /// How many of the largest logits of a row [`DecoderRuntime::step_largest`] gives; 0 where it gives none.
    fn largest(&self) -> usize {
        0
    }

    /// As [`DecoderRuntime::step`], but gives only the largest logits of each row, in descending order, the lower of equal ones' tokens
    /// first, and their tokens: `logit_rows.len() * largest()` of each.
    ///
    /// # Errors
    /// As [`DecoderRuntime::step`].
    fn step_largest(
        &mut self,
        inputs: &StepInputs,
        logits: &mut [f32],
        tokens: &mut [i32],
    ) -> std::result::Result<(), RunError> {
        let _ = (inputs, logits, tokens);
        Err("the runtime gives all logits only".into())
    }

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

    fn largest(&self) -> usize {
        (**self).largest()
    }

    fn step_largest(
        &mut self,
        inputs: &StepInputs,
        logits: &mut [f32],
        tokens: &mut [i32],
    ) -> std::result::Result<(), RunError> {
        (**self).step_largest(inputs, logits, tokens)
    }

    fn interrupt(&mut self, cancel: &CancelToken, deadline: Option<Instant>) {
        (**self).interrupt(cancel, deadline);
    }
}

/// What a text has to obey, token by token.
pub trait Constraint: Send {
    /// Makes the logits of tokens that may not follow minus infinity.
    ///
    /// # Errors
    /// If no token may follow, or that cannot be told; the generation ends.
    fn mask(&mut self, logits: &mut [f32]) -> Result<()>;

    /// Takes the next token.
    ///
    /// # Errors
    /// If it may not follow.
    fn accept(&mut self, token: u32) -> Result<()>;

    /// Nothing may follow any more: the text ends by itself.
    fn is_over(&self) -> bool;
}

impl std::fmt::Debug for dyn Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a constraint")
    }
}

/// What a failed step means: that it was stopped as asked, or that it went wrong.
pub(crate) fn step_error(error: RunError) -> ModelError {
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
    /// Most rows of a step whose logits are given.
    pub outs: usize,
    /// Blocks of the caches of layers with a window; `None` for models without.
    pub window: Option<WindowLimits>,
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
    /// `[batch, table]`; of layers without a window.
    pub block_table: Vec<i32>,
    /// `[batch, table]`; of layers with a window, where [`DecoderInfo::window`] is there, else empty.
    pub window_table: Vec<i32>,
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
        self.window_table.clear();
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
        if info.window.is_some() {
            sequence.table.push_window_row(self.table, &mut self.window_table);
        }
        if sequence.wants_logits {
            self.logit_rows.push(self.input_ids.len() as i32 - 1);
            self.logit_slots.push(slot);
        }
    }

    /// Adds rows of the step to those whose logits are wanted, in ascending order.
    pub fn want(&mut self, rows: Range<usize>) {
        for row in rows {
            self.logit_rows.push(row as i32);
            self.logit_slots.push(self.slots.get(row).copied().unwrap_or(-1));
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
    /// Tokens whose keys and values the runtime holds: what the prompt shares with their start is not run again, unless a layer with a
    /// window has given back what the next token sees. As [`Generation::into_held`] gives them.
    pub held: Option<Held>,
    /// Where the text reaches the context: keep this many of its first tokens, forget half of those after them and go on, as a new
    /// text of the tokens that are left would, bit for bit. A text that may reach it is refused if not given.
    pub context_shift: Option<usize>,
}

/// Tokens whose keys and values a runtime holds, and where.
#[derive(Debug, Clone)]
pub struct Held {
    tokens: Vec<u32>,
    pool: BlockPool,
    table: BlockTable,
}

impl Held {
    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

/// What a text that reached the context has forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shift {
    /// Tokens kept at the start.
    pub kept: usize,
    /// Tokens after them that were forgotten.
    pub forgotten: usize,
    /// Tokens that are run again at their new positions.
    pub run_again: usize,
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
            held: None,
            context_shift: None,
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
    /// The prompt, what was generated, and what was generated but not given out yet.
    tokens: Vec<u32>,
    /// Of these, what the model sees: all but what was forgotten.
    seen: Vec<u32>,
    prompt_tokens: usize,
    /// Most positions.
    limit: usize,
    shift: Option<Shift>,
    given: usize,
    past: usize,
    /// Tokens at the start of `seen` that were run for one length of the text; each one after them was run for its own.
    together: usize,
    reused: usize,
    drafter: Option<Box<dyn Drafter>>,
    constraint: Option<Box<dyn Constraint>>,
    draft: Vec<u32>,
    drafts: DraftStats,
    run: Vec<u32>,
    inputs: StepInputs,
    logits: RowLogits,
    finish: Option<FinishReason>,
    failed: bool,
}

/// The most positions that model, runtime and caller allow.
pub fn context_limit(info: &DecoderInfo, limits: DecoderLimits, asked: Option<usize>) -> usize {
    let cache = limits.blocks.min(limits.table).saturating_mul(BLOCK_POSITIONS);
    info.max_positions.min(cache).min(asked.unwrap_or(usize::MAX))
}

/// True if keys in the cache depend on how long the text is.
pub(crate) fn length_dependent(info: &DecoderInfo) -> bool {
    info.rope.is_some()
}

/// How many of the largest logits a step of this runtime gives, if they are enough to choose from; else 0.
fn largest_of(runtime: &impl DecoderRuntime, sampling: &SamplingOptions, vocab: usize) -> usize {
    let enough = sampling.decisive().is_some_and(|count| runtime.largest() >= count.min(vocab));
    if enough { runtime.largest() } else { 0 }
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
    mut options: GenerateOptions,
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
        let advice = match (prompt_tokens < limit, options.context_shift) {
            (true, Some(_)) => None,
            (true, None) => Some(
                "ask for fewer new tokens, for a larger context if the model has one, or for a context shift",
            ),
            (false, _) => Some("shorten the prompt, or ask for a larger context if the model has one"),
        };
        if let Some(advice) = advice {
            return Err(ModelError::Context { prompt_tokens, new_tokens, limit, advice });
        }
    }
    if let Some(kept) = options.context_shift.filter(|kept| kept.saturating_add(2) > limit) {
        let (setting, expected) = ("context_shift", "to keep at least 2 tokens fewer than the context has");
        let found = format!("{kept} tokens of {limit}");
        return Err(ModelError::Setting { setting, expected, found });
    }
    let mut sampler = Sampler::new(options.sampling.clone())?;
    prompt.iter().for_each(|&token| sampler.observe(token));
    let held = options.held.take().filter(|held| held.pool.total() == limits.blocks);
    let (mut pool, mut table, held) = match held {
        Some(Held { tokens, pool, table }) => (pool, table, tokens),
        None => (BlockPool::of(&limits), BlockTable::new(), Vec::new()),
    };
    let room = prompt_tokens.saturating_add(new_tokens).min(limit);
    pool.reserve(&mut table, room)?;
    runtime.interrupt(&options.cancel, options.deadline);
    let (mut tokens, mut seen) = (Vec::with_capacity(room), Vec::with_capacity(room));
    tokens.extend_from_slice(prompt);
    seen.extend_from_slice(prompt);
    // The last token of the prompt is run for its logits; keys rotated for another length are of no use.
    let past = match length_dependent(info) {
        true => 0,
        false => shared_start(&held, prompt).min(prompt_tokens - 1),
    };
    let past = pool.resume(&mut table, past);
    let largest = largest_of(&runtime, &options.sampling, info.vocab);
    let logits = RowLogits::new(info.vocab, largest, limits.outs);
    Ok(Generation {
        runtime,
        info: info.clone(),
        options,
        sampler,
        pool,
        table,
        tokens,
        seen,
        prompt_tokens,
        limit,
        shift: None,
        given: prompt_tokens,
        past,
        together: prompt_tokens,
        reused: past,
        drafter: None,
        constraint: None,
        draft: Vec::new(),
        drafts: DraftStats::default(),
        run: Vec::new(),
        inputs: StepInputs::default(),
        logits,
        finish: None,
        failed: false,
    })
}

impl<R: DecoderRuntime> Generation<R> {
    /// Lets a drafter guess tokens, as many at a time as the runtime gives logits for beyond the first. The text stays the same, bit for
    /// bit. Models whose rotation depends on the text's length run without.
    #[must_use]
    pub fn with_drafter(mut self, drafter: Box<dyn Drafter>) -> Self {
        self.drafter = Some(drafter).filter(|_| !length_dependent(&self.info));
        self
    }

    /// Lets only tokens follow that a constraint allows.
    #[must_use]
    pub fn with_constraint(mut self, constraint: Box<dyn Constraint>) -> Self {
        self.constraint = Some(constraint);
        self.logits = RowLogits::new(self.info.vocab, 0, self.runtime.limits().outs);
        self
    }

    /// Goes on by another runtime of the same model, on another device say, whose caches are empty: the next token's step runs all tokens so
    /// far. The random stream, what penalties remember and a constraint stay where they are.
    ///
    /// # Errors
    /// [`ModelError::CacheFull`] if the runtime is too small for the text; the generation is as before.
    pub fn move_to(&mut self, mut runtime: R) -> Result<()> {
        let limits = runtime.limits();
        let room = self.prompt_tokens.saturating_add(self.options.max_new_tokens).min(self.limit);
        if limits.max_rows == 0 || limits.table < blocks_for(room) {
            return Err(ModelError::CacheFull { needed: blocks_for(room), free: limits.table });
        }
        let (mut pool, mut table) = (BlockPool::of(&limits), BlockTable::new());
        pool.reserve(&mut table, room)?;
        runtime.interrupt(&self.options.cancel, self.options.deadline);
        let largest = match self.constraint {
            None => largest_of(&runtime, &self.options.sampling, self.info.vocab),
            Some(_) => 0,
        };
        self.logits = self.logits.anew(largest, limits.outs);
        (self.runtime, self.pool, self.table, self.past) = (runtime, pool, table, 0);
        self.draft.clear();
        if self.tokens.len() == self.prompt_tokens {
            self.reused = 0;
        }
        Ok(())
    }

    /// What runs the model.
    pub fn runtime(&self) -> &R {
        &self.runtime
    }

    /// How many of the largest logits of a step are enough to choose from; `None` where all are needed.
    pub(crate) fn decisive(&self) -> Option<usize> {
        self.options.sampling.decisive().filter(|_| self.constraint.is_none())
    }

    /// Goes on without guesses.
    pub(crate) fn without_drafter(&mut self) {
        self.drafter = None;
    }

    /// Tokens of the prompt that were not run, for an earlier text had left their keys and values.
    pub fn reused(&self) -> usize {
        self.reused
    }

    /// What the text has forgotten since this was last asked, where it reached the context.
    pub fn take_shift(&mut self) -> Option<Shift> {
        self.shift.take()
    }

    /// What became of guesses.
    pub fn drafts(&self) -> DraftStats {
        self.drafts
    }

    /// How many of the largest logits of a step come back from the device to choose a token from; `None` if all do.
    pub fn largest(&self) -> Option<usize> {
        self.logits.largest()
    }

    /// Steps that ran a second time because the largest logits did not decide.
    pub fn ran_again(&self) -> usize {
        self.logits.ran_again()
    }

    /// The next token; `None` when the text has ended.
    ///
    /// # Errors
    /// [`ModelError::Cancelled`], [`ModelError::Deadline`], [`ModelError::Run`], [`ModelError::Logits`].
    pub fn next_token(&mut self) -> Result<Option<u32>> {
        if let Some(&token) = self.tokens.get(self.given) {
            self.given += 1;
            return Ok(Some(token));
        }
        if self.finish.is_some() {
            return Ok(None);
        }
        if self.tokens.len() - self.prompt_tokens >= self.options.max_new_tokens {
            self.finish = Some(FinishReason::Length);
            return Ok(None);
        }
        self.advance()?;
        self.choose()?;
        let token = self.tokens.get(self.given).copied();
        self.given = self.tokens.len().min(self.given + 1);
        Ok(token)
    }

    /// Draws a token from the logits of the last token, and one more for each guess that it equals.
    fn choose(&mut self) -> Result<()> {
        for at in 0..=self.draft.len() {
            let Self { logits, sampler, constraint, runtime, inputs, .. } = self;
            let token = match logits.sample(at, sampler, constraint.as_deref_mut(), runtime, inputs) {
                Ok(token) => token,
                // The next step comes upon it again, after the tokens before it were given out.
                Err(_) if at > 0 => break,
                Err(error) => return Err(error),
            };
            if self.options.stop.contains(&token) {
                self.finish = Some(FinishReason::Stop);
                break;
            }
            self.sampler.observe(token);
            self.tokens.push(token);
            self.seen.push(token);
            if let Some(constraint) = &mut self.constraint {
                constraint.accept(token)?;
                if constraint.is_over() {
                    self.finish = Some(FinishReason::Stop);
                    break;
                }
            }
            if self.draft.get(at) != Some(&token) {
                break;
            }
            self.past += 1;
            self.drafts.accepted += 1;
        }
        Ok(())
    }

    /// Runs every token that is not in the cache yet, and guesses after it; their logits stand in `self.logits`.
    fn advance(&mut self) -> Result<()> {
        if self.seen.len() > self.limit {
            self.forget();
        }
        let length = self.seen.len();
        let beyond = self.info.rope.as_ref().and_then(|rope| rope.recompute_beyond());
        if beyond.is_some_and(|limit| self.together.max(self.past) <= limit && length > limit) {
            self.past = self.pool.resume(&mut self.table, 0);
            self.together = length;
        }
        let limits = self.runtime.limits();
        let columns = limits.table.min(blocks_for(self.table.capacity()));
        self.draft.clear();
        while self.past < length {
            self.check_interrupts()?;
            let until = self.run_for(length);
            let end = until.min(self.past.saturating_add(limits.max_rows));
            let rows = end - self.past;
            self.run.clear();
            self.run.extend_from_slice(&self.seen[self.past..end]);
            if end == length {
                self.propose(limits, rows)?;
                self.run.extend_from_slice(&self.draft);
            }
            self.pool.advance(&mut self.table, self.past, self.past + self.run.len())?;
            self.inputs.clear(columns);
            let (tokens, past, table) = (&self.run[..], self.past, &self.table);
            let sequence = SequenceStep { tokens, past, length: until, table, wants_logits: false };
            self.inputs.push_adapted(&self.info, sequence, self.options.adapter_slot);
            if end == length {
                self.inputs.want(rows - 1..self.run.len());
            }
            self.logits.run(&mut self.runtime, &self.inputs)?;
            self.past = end;
        }
        Ok(())
    }

    /// The length of the text that the next token to run is run for, `length` being that of the text now: where frequencies depend on
    /// it, a token that is run again is run as it was the first time.
    fn run_for(&self, length: usize) -> usize {
        match length_dependent(&self.info) {
            true if self.past < self.together => self.together.min(length),
            true => self.past + 1,
            false => length,
        }
    }

    /// Makes room where the text has reached the context.
    fn forget(&mut self) {
        let Some(kept) = self.options.context_shift else { return };
        let forgotten = self.seen.len().saturating_sub(kept) / 2;
        self.seen.drain(kept..kept + forgotten);
        // What is kept has its old positions. The others are run at their new ones: they never saw what was forgotten.
        let past = if length_dependent(&self.info) { 0 } else { kept.min(self.past) };
        self.past = self.pool.resume(&mut self.table, past);
        self.together = self.seen.len();
        self.shift = Some(Shift { kept, forgotten, run_again: self.seen.len() - self.past });
    }

    /// Asks for guesses that may follow all tokens, in a step with `rows` rows already.
    fn propose(&mut self, limits: DecoderLimits, rows: usize) -> Result<()> {
        let Some(drafter) = &mut self.drafter else { return Ok(()) };
        let left = self.options.max_new_tokens - (self.tokens.len() - self.prompt_tokens);
        let room = self.limit.saturating_sub(self.seen.len()).min(limits.max_rows - rows);
        let most = limits.outs.min(left).saturating_sub(1).min(room);
        if most > 0 {
            drafter.propose(&self.seen, most, &mut self.draft).map_err(ModelError::of_draft)?;
            let vocab = self.info.vocab;
            let known = self.draft.iter().take(most).take_while(|&&token| (token as usize) < vocab).count();
            self.draft.truncate(known);
            self.drafts.proposed += known;
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
        self.finish.filter(|_| self.given == self.tokens.len())
    }

    /// The prompt's tokens and those generated so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens[..self.given]
    }

    /// The tokens generated so far.
    pub fn new_tokens(&self) -> &[u32] {
        &self.tokens[self.prompt_tokens..self.given]
    }

    /// The runtime, and the tokens whose keys and values it holds: for [`GenerateOptions::held`] of the next text.
    pub fn into_held(self) -> (R, Held) {
        let Self { runtime, seen: mut tokens, past, pool, table, .. } = self;
        tokens.truncate(past);
        (runtime, Held { tokens, pool, table })
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
