//! Several texts at once, each with an adapter of its own or none: requests join and leave between steps.

use crate::error::{ModelError, Result};
use crate::generate::{DecoderRuntime, FinishReason, SequenceStep, StepInputs, length_dependent};
use crate::kv::{BLOCK_POSITIONS, BlockKey, BlockPool, BlockTable};
use crate::largest::RowLogits;
use crate::lora::{ADAPTER_SLOTS, Adapter, Generation, LoraScheduler};
use crate::model::Model;
use crate::runtime::{DecoderRunner, PREFILL_ROWS};
use crate::sampling::{Sampler, SamplingOptions};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Limits of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchOptions {
    /// Texts at once.
    pub sequences: usize,
    /// Most positions of a text.
    pub context: usize,
    /// Adapters at once, at most [`ADAPTER_SLOTS`].
    pub adapters: usize,
    /// How often a waiting request may be passed by: see [`LoraScheduler`].
    pub max_age: usize,
}

impl Default for BatchOptions {
    /// 8 texts of up to 1,024 positions with as many adapters.
    fn default() -> Self {
        Self { sequences: 8, context: 1024, adapters: ADAPTER_SLOTS, max_age: 16 }
    }
}

/// A text to continue.
#[derive(Debug, Clone)]
pub struct BatchRequest {
    /// The prompt's token ids.
    pub prompt: Vec<u32>,
    /// Most new tokens.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// The adapter, by name.
    pub adapter: Option<String>,
}

/// A request of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

impl RequestId {
    /// How many requests the batch had before.
    pub fn index(self) -> u64 {
        self.0
    }
}

/// What a step brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchEvent {
    /// The next token of a text.
    Token(RequestId, u32),
    /// A text has ended.
    Finished(RequestId, FinishReason),
}

struct Sequence {
    id: RequestId,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    max_tokens: usize,
    past: usize,
    sampler: Sampler,
    adapter: Option<Arc<Adapter>>,
    table: BlockTable,
    /// The key of the blocks remembered, and how many they are.
    key: BlockKey,
    remembered: usize,
}

impl Sequence {
    fn new_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }
}

/// Texts that run together on one model.
pub struct Batch<'m> {
    model: &'m Model,
    options: BatchOptions,
    runner: DecoderRunner,
    pool: BlockPool,
    scheduler: LoraScheduler<Sequence>,
    running: Vec<Sequence>,
    slots: [Option<Arc<Adapter>>; ADAPTER_SLOTS],
    inputs: StepInputs,
    logits: RowLogits,
    next_id: u64,
    reused: usize,
}

impl<'m> Batch<'m> {
    /// An empty batch.
    ///
    /// # Errors
    /// [`ModelError::Setting`] for a limit of 0 or more adapters than [`ADAPTER_SLOTS`]; [`ModelError::NotADecoder`]; [`ModelError::Memory`].
    pub fn new(model: &'m Model, options: BatchOptions) -> Result<Self> {
        let wrong =
            |setting, expected| Err(ModelError::Setting { setting, expected, found: format!("{options:?}") });
        if options.context == 0 {
            return wrong("context", "at least 1 position");
        }
        if options.adapters > ADAPTER_SLOTS {
            return wrong("adapters", "at most 8");
        }
        let scheduler = LoraScheduler::new(options.sequences, options.adapters, options.max_age)?;
        let decoder = model.decoder()?;
        let (rows, batch) = (PREFILL_ROWS.max(options.sequences), options.sequences);
        model.admit_batch(options.context.min(decoder.info.max_positions), batch)?;
        let runner =
            DecoderRunner::with_batch(decoder, model.executables().clone(), options.context, rows, batch)?;
        let pool = BlockPool::of(&runner.limits());
        Ok(Self {
            model,
            options,
            runner,
            pool,
            scheduler,
            running: Vec::new(),
            slots: Default::default(),
            inputs: StepInputs::default(),
            logits: RowLogits::new(decoder.info.vocab, 0, 0),
            next_id: 0,
            reused: 0,
        })
    }

    /// Adds a request. It runs with its adapter as it is now, whatever happens to the name later.
    ///
    /// # Errors
    /// [`ModelError::EmptyPrompt`], [`ModelError::TokenId`], [`ModelError::Context`], [`ModelError::UnknownAdapter`].
    pub fn submit(&mut self, request: BatchRequest) -> Result<RequestId> {
        let info = &self.model.decoder()?.info;
        let (prompt_tokens, new_tokens) = (request.prompt.len(), request.max_tokens);
        if prompt_tokens == 0 {
            return Err(ModelError::EmptyPrompt);
        }
        if let Some(&id) = request.prompt.iter().find(|&&id| id as usize >= info.vocab) {
            return Err(ModelError::TokenId { id, vocab: info.vocab });
        }
        let limit = self.options.context.min(info.max_positions);
        if prompt_tokens.saturating_add(new_tokens) > limit {
            let advice =
                "shorten the prompt, ask for fewer new tokens, or make the batch with a larger context";
            return Err(ModelError::Context { prompt_tokens, new_tokens, limit, advice });
        }
        let adapter = request.adapter.as_deref().map(|name| self.model.adapter(name)).transpose()?;
        let mut sampler = Sampler::new(request.sampling)?;
        request.prompt.iter().for_each(|&token| sampler.observe(token));
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let generation = adapter.as_ref().map(|adapter| adapter.generation());
        let sequence = Sequence {
            id,
            tokens: request.prompt,
            prompt_tokens,
            max_tokens: new_tokens,
            past: 0,
            sampler,
            adapter,
            table: BlockTable::new(),
            key: BlockKey::start(generation.map_or(0, |generation| generation + 1)),
            remembered: 0,
        };
        self.scheduler.push(generation, sequence);
        Ok(id)
    }

    /// True if nothing runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.scheduler.is_empty()
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.scheduler.len()
    }

    /// Tokens of prompts that were not run, for the blocks of another text held their keys and values.
    pub fn reused(&self) -> usize {
        self.reused
    }

    /// Lets requests join, runs every text one step and tells what came of it.
    ///
    /// # Errors
    /// [`ModelError::Run`], [`ModelError::Logits`]: the batch cannot go on.
    pub fn step(&mut self) -> Result<Vec<BatchEvent>> {
        self.admit()?;
        let mut events = Vec::new();
        self.retire(&mut events, |s| (s.new_tokens() >= s.max_tokens).then_some(FinishReason::Length));
        if self.running.is_empty() {
            return Ok(events);
        }
        let ready = self.run_rows()?;
        let mut stopped = BTreeSet::new();
        for (at, index) in ready.into_iter().enumerate() {
            let sequence = &mut self.running[index];
            let (sampler, runner) = (&mut sequence.sampler, &mut self.runner);
            let token = self.logits.sample(at, sampler, None, runner, &self.inputs)?;
            if self.model.stop_tokens().contains(&token) {
                stopped.insert(sequence.id);
                continue;
            }
            sequence.sampler.observe(token);
            sequence.tokens.push(token);
            events.push(BatchEvent::Token(sequence.id, token));
        }
        self.retire(&mut events, |s| match stopped.contains(&s.id) {
            true => Some(FinishReason::Stop),
            false => (s.new_tokens() >= s.max_tokens).then_some(FinishReason::Length),
        });
        Ok(events)
    }

    /// Runs the next rows of every text; gives the texts whose logits came, in their order.
    fn run_rows(&mut self) -> Result<Vec<usize>> {
        let info = &self.model.decoder()?.info;
        let columns = self.running.iter().map(|s| s.table.blocks().len()).max().unwrap_or(0);
        let mut room = self.runner.limits().max_rows;
        let (mut ready, mut behind) = (Vec::new(), self.running.len());
        self.inputs.clear(columns);
        for (index, sequence) in self.running.iter_mut().enumerate() {
            let length = sequence.tokens.len();
            let beyond = info.rope.as_ref().and_then(|rope| rope.recompute_beyond());
            if beyond.is_some_and(|limit| sequence.past <= limit && length > limit) {
                sequence.past = self.pool.resume(&mut sequence.table, 0);
            }
            behind -= 1;
            // Every text after this one gets a row at least.
            let end = length.min(sequence.past + (room - behind));
            self.pool.advance(&mut sequence.table, sequence.past, end)?;
            let step = SequenceStep {
                tokens: &sequence.tokens[sequence.past..end],
                past: sequence.past,
                length,
                table: &sequence.table,
                wants_logits: end == length,
            };
            let slot = sequence.adapter.as_ref().and_then(|adapter| position(&self.slots, adapter));
            self.inputs.push_adapted(info, step, slot);
            room -= end - sequence.past;
            sequence.past = end;
            if end == length {
                ready.push(index);
            }
        }
        self.choose_from()?;
        self.logits.run(&mut self.runner, &self.inputs)?;
        if !length_dependent(info) {
            for sequence in &mut self.running {
                while (sequence.remembered + 1) * BLOCK_POSITIONS <= sequence.past {
                    let start = sequence.remembered * BLOCK_POSITIONS;
                    sequence.key = sequence.key.then(&sequence.tokens[start..start + BLOCK_POSITIONS]);
                    self.pool.remember(&sequence.table, sequence.remembered, sequence.key);
                    sequence.remembered += 1;
                }
            }
        }
        for sequence in &mut self.running {
            self.pool.give_back_unseen(&mut sequence.table, sequence.past);
        }
        Ok(ready)
    }

    /// The next step gives the likeliest tokens alone where that is all that any text asks for.
    fn choose_from(&mut self) -> Result<()> {
        let likeliest = |s: &Sequence| s.sampler.decisive() == Some(1) && s.adapter.is_none();
        let wanted = self.running.iter().all(likeliest).then_some(1);
        self.runner.choose_from(self.model.largest_graph(wanted)?)?;
        let (now, vocab) = (self.runner.largest(), self.model.decoder()?.info.vocab);
        if self.logits.largest().unwrap_or(0) != now {
            self.logits = RowLogits::new(vocab, now, self.options.sequences);
        }
        Ok(())
    }

    fn admit(&mut self) -> Result<()> {
        loop {
            let in_use: BTreeSet<Generation> =
                self.slots.iter().flatten().map(|adapter| adapter.generation()).collect();
            let Some(mut sequence) = self.scheduler.next(self.running.len(), &in_use) else { return Ok(()) };
            if !length_dependent(&self.model.decoder()?.info) {
                self.reuse(&mut sequence);
            }
            self.pool.reserve(&mut sequence.table, sequence.tokens.len() + sequence.max_tokens)?;
            if let Some(adapter) = &sequence.adapter
                && position(&self.slots, adapter).is_none()
                && let Some(slot) = self.slots.iter().position(Option::is_none)
            {
                self.runner.use_adapters(|| self.model.adapted_graph())?;
                self.runner.set_adapter(slot, Some(Arc::clone(adapter)))?;
                self.slots[slot] = Some(Arc::clone(adapter));
            }
            self.running.push(sequence);
        }
    }

    /// Gives a text that begins the full blocks of others that begin alike. Its last token is run in any case, for its logits.
    fn reuse(&mut self, sequence: &mut Sequence) {
        let blocks = sequence.tokens[..sequence.tokens.len() - 1].chunks_exact(BLOCK_POSITIONS);
        let keys: Vec<BlockKey> = blocks
            .scan(sequence.key, |key, tokens| {
                *key = key.then(tokens);
                Some(*key)
            })
            .collect();
        let adopted = self.pool.adopt(&mut sequence.table, &keys);
        if let Some(last) = adopted.checked_sub(1) {
            (sequence.key, sequence.remembered) = (keys[last], adopted);
            sequence.past = adopted * BLOCK_POSITIONS;
            self.reused += sequence.past;
        }
    }

    /// Takes out the texts that have ended, and adapters that no text has any more.
    fn retire(&mut self, events: &mut Vec<BatchEvent>, ended: impl Fn(&Sequence) -> Option<FinishReason>) {
        let (pool, mut kept) = (&mut self.pool, Vec::with_capacity(self.running.len()));
        for mut sequence in self.running.drain(..) {
            match ended(&sequence) {
                Some(reason) => {
                    pool.truncate(&mut sequence.table, 0);
                    events.push(BatchEvent::Finished(sequence.id, reason));
                }
                None => kept.push(sequence),
            }
        }
        self.running = kept;
        for (slot, adapter) in self.slots.iter_mut().enumerate() {
            let used = |adapter: &Arc<Adapter>| {
                self.running
                    .iter()
                    .filter_map(|s| s.adapter.as_ref())
                    .any(|other| Arc::ptr_eq(other, adapter))
            };
            if adapter.as_ref().is_some_and(|adapter| !used(adapter)) {
                *adapter = None;
                // Emptying a slot needs no memory, so it cannot fail.
                drop(self.runner.set_adapter(slot, None));
            }
        }
    }
}

fn position(slots: &[Option<Arc<Adapter>>], adapter: &Arc<Adapter>) -> Option<usize> {
    slots.iter().position(|slot| slot.as_ref().is_some_and(|held| Arc::ptr_eq(held, adapter)))
}
