//! A model's memory at given capacities, from headers only.

use crate::arch::{Built, DecoderInfo, EncoderInfo};
use crate::artefact::{REST, TABLES};
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::runtime::{DecoderRunner, ENCODER_ROWS, EncoderRunner, PREFILL_ROWS};
use rlx::config::Config;
use rlx::import::hf::{HfFolder, TOKENIZER_FILE};
use rlx::memory::experts::{MoeOffloadEstimate, estimate_moe_offload};
use rlx::memory::{MemoryEstimate, MemoryRefusal, MemoryView, SystemProbe, estimate_together, estimate_with};
use rlx::plan::Lir;
use rlx_tensor::DimBinding;
use std::sync::Arc;

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

/// Memory of a loaded tokenizer for each byte of its file: every token stands in a map in both directions. 3.4 to 4.0 measured for
/// byte-level vocabularies of 49,152 and 151,936 entries.
const TOKENIZER_FACTOR: u64 = 5;
/// Memory that building a tokenizer takes for a moment, for each byte of its file: the parsed text is there beside the maps. 12.2 to
/// 12.9 measured for the same vocabularies.
const TOKENIZER_BUILDING_FACTOR: u64 = 14;
/// Stack that a worker touches, and its queue.
const WORKER_BYTES: u64 = 64 << 10;
/// Graph, plan and schedule, what the allocator holds back, and the pages of the program that running touches (6 to 9 MiB measured).
const SLACK_BYTES: u64 = 18 << 20;

impl Model {
    /// Plans for capacities and adds up the memory. No weight is read. Where opening the model takes more for a moment than running it,
    /// because its tokenizer is built then, the host's share has the difference.
    ///
    /// # Errors
    /// [`ModelError::Setting`] for a capacity of 0 or a context beyond the model's limit; sizes that overflow.
    pub fn plan(&self, request: PlanRequest, threads: usize) -> Result<ModelPlan> {
        let mut plan = self.plan_opened(request, threads)?;
        let opening = building_bytes(self.folder()).map_or(0, |bytes| bytes.saturating_add(SLACK_BYTES));
        plan.estimate.host_bytes += opening.saturating_sub(plan.estimate.peak_bytes());
        Ok(plan)
    }

    /// As [`Model::plan`], now that the model is open.
    fn plan_opened(&self, request: PlanRequest, threads: usize) -> Result<ModelPlan> {
        let binding = self.plan_binding(request)?;
        let (context, batch) =
            (request.context.unwrap_or_else(|| self.context_limit()), request.batch.unwrap_or(1));
        let lir = self.compiled().specialize(&binding)?;
        let mut estimate = estimate_with(&lir, self.backend().as_ref(), self.compiled().weights())?;
        estimate.adapter_bytes = estimate.adapter_bytes.saturating_add(self.adapter_bytes() as u64);
        estimate.host_bytes =
            self.tokenizer_bytes().saturating_add(threads as u64 * WORKER_BYTES + SLACK_BYTES);
        Ok(ModelPlan { context, batch, lir, estimate })
    }

    /// The same with a model that guesses tokens for this one, run beside it: its own weights, caches and scratch. What both read as it is
    /// stored counts once where they share a registry ([`crate::Beside`]).
    ///
    /// # Errors
    /// As [`Model::plan`], of both.
    pub fn plan_with_draft(&self, draft: &Model, request: PlanRequest, threads: usize) -> Result<ModelPlan> {
        let plan = self.plan(request, threads)?;
        let context = Some(plan.context.min(draft.context_limit()));
        let other = draft.plan(PlanRequest { context, batch: None }, threads)?;
        Ok(ModelPlan { estimate: self.together(&plan, draft, &other)?, ..plan })
    }

    /// The memory of two plans in one process.
    fn together(&self, plan: &ModelPlan, draft: &Model, other: &ModelPlan) -> Result<MemoryEstimate> {
        let (own, theirs) = (self.compiled().weights(), draft.compiled().weights());
        let mut estimate = plan.estimate.plus(&other.estimate);
        if Arc::ptr_eq(own, theirs) {
            let plans = [(&plan.lir, self.backend().as_ref()), (&other.lir, draft.backend().as_ref())];
            let together = estimate_together(&plans, own)?;
            let (adapter_bytes, host_bytes) = (estimate.adapter_bytes, estimate.host_bytes);
            estimate = MemoryEstimate { adapter_bytes, host_bytes, ..together };
        }
        estimate.host_bytes = estimate.host_bytes.saturating_sub(SLACK_BYTES);
        Ok(estimate)
    }

    /// The longest context below `most` at which a peak fits in `budget_bytes`.
    ///
    /// # Errors
    /// As [`Model::plan`].
    pub fn largest_context(
        &self,
        most: usize,
        batch: usize,
        budget_bytes: u64,
        threads: usize,
    ) -> Result<Option<usize>> {
        longest(most, |tokens| {
            let request = PlanRequest { context: Some(tokens), batch: Some(batch) };
            Ok(self.plan(request, threads)?.estimate.fits_in(budget_bytes).is_ok())
        })
    }

    /// Refuses, before anything is allocated, capacities whose peak exceeds what may be used or what is there.
    pub(crate) fn admit(&self, context: usize) -> Result<()> {
        self.admit_run(context, 1, None)
    }

    /// As [`Model::admit`], for several sequences at once.
    pub(crate) fn admit_batch(&self, context: usize, batch: usize) -> Result<()> {
        self.admit_run(context, batch, None)
    }

    /// Asks for the memory of a run with a model that guesses tokens for this one, of both at once, before either takes any.
    ///
    /// # Errors
    /// [`ModelError::Memory`] if both together exceed what may be used or what is there.
    pub fn admit_with_draft(&self, context: usize, draft: &Model) -> Result<()> {
        self.admit_run(context, 1, Some(draft))
    }

    fn admit_run(&self, context: usize, batch: usize, draft: Option<&Model>) -> Result<()> {
        self.use_tokenizer_writer();
        draft.inspect(|draft| draft.use_tokenizer_writer());
        let view = MemoryView::new(&SystemProbe, Config::global().map_err(rlx::SessionError::from)?);
        let (estimate, held) = self.run_estimate(context, batch, draft)?;
        if view.admit(&estimate, held).is_ok() {
            return Ok(());
        }
        // What is kept for later runs must not stand in the way of this one.
        self.pipeline().clear();
        draft.inspect(|draft| draft.pipeline().clear());
        let Err(deficit) = view.admit(&estimate, held) else { return Ok(()) };
        let shorter = longest(context, |tokens| {
            Ok(self.run_estimate(tokens, batch, draft)?.0.fits_in(deficit.budget_bytes).is_ok())
        })?;
        let remedy = match (shorter, draft) {
            (Some(tokens), _) => format!("a context of {tokens} tokens would fit"),
            (None, None) => {
                "no context would fit: a smaller or a quantised model, or more memory, is needed".to_owned()
            }
            (None, Some(_)) => {
                "no context would fit: no draft model, smaller or quantised models, or more memory, is needed"
                    .to_owned()
            }
        };
        Err(ModelError::Memory(Box::new(MemoryRefusal { deficit, remedy: Some(remedy) })))
    }

    /// The memory of a run, and how much of it is taken already.
    fn run_estimate(
        &self,
        context: usize,
        batch: usize,
        draft: Option<&Model>,
    ) -> Result<(MemoryEstimate, u64)> {
        let threads = self.threads();
        let request = PlanRequest { context: Some(context), batch: Some(batch) };
        let plan = self.plan_opened(request, threads)?;
        let Some(draft) = draft else { return Ok((plan.estimate, self.held_of(&plan.estimate))) };
        let request = PlanRequest { context: Some(context.min(draft.context_limit())), batch: None };
        let other = draft.plan_opened(request, threads)?;
        let both = self.together(&plan, draft, &other)?;
        let held = self.held_of(&plan.estimate).saturating_add(draft.held_of(&other.estimate));
        Ok((both, held.saturating_sub(SLACK_BYTES).min(lasting_bytes(&both))))
    }

    /// How much of an estimate of this model is taken already.
    fn held_of(&self, estimate: &MemoryEstimate) -> u64 {
        if self.compiled().is_loaded() { lasting_bytes(estimate) } else { estimate.host_bytes }
    }

    /// The capacities a request asks for, checked.
    pub(crate) fn plan_binding(&self, request: PlanRequest) -> Result<DimBinding> {
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
        Ok(match self.built() {
            Built::Encoder(model) => encoder_binding(&model.info, context, batch),
            Built::Decoder(model) => decoder_binding(&model.info, context, batch),
        })
    }

    /// The mixture of experts of this model with all of its experts, each of the size it has in memory; `None` if it has none, or layers
    /// of several kinds.
    pub fn experts_in_all(&self) -> Option<MoeOffloadEstimate> {
        let layers = self.backend().expert_layers(self.compiled().template());
        let first = layers.first().filter(|first| layers.iter().all(|layer| layer == *first))?;
        let (bytes, experts) = (first.expert_bytes, first.experts);
        let all = estimate_moe_offload(bytes, layers.len(), experts, experts, 0, 0.0).ok()?;
        Some(all.with_budget(experts))
    }

    /// Most tokens of a sequence that the model was made for.
    pub fn context_limit(&self) -> usize {
        match self.built() {
            Built::Encoder(model) => model.info.max_tokens,
            Built::Decoder(model) => model.info.max_positions,
        }
    }

    /// Memory of the tokenizer: maps built from its file, or the tables of a compiled file, which are read in place.
    fn tokenizer_bytes(&self) -> u64 {
        if let Some(artefact) = self.artefact() {
            let len = |name| artefact.file(name).map_or(0, |file| file.len() as u64);
            let (tables, rest) = (len(TABLES), len(REST));
            return if tables > 0 { tables + rest } else { rest.saturating_mul(TOKENIZER_FACTOR) };
        }
        let embedded = self.folder().content(TOKENIZER_FILE).map(|bytes| bytes.len() as u64);
        let on_disk = || std::fs::metadata(self.folder().root().join(TOKENIZER_FILE)).map(|file| file.len());
        let bytes = embedded.or_else(|| on_disk().ok()).unwrap_or(self.header_bytes());
        bytes.saturating_mul(TOKENIZER_FACTOR)
    }
}

/// What stays between runs.
fn lasting_bytes(estimate: &MemoryEstimate) -> u64 {
    estimate.peak_bytes().saturating_sub(estimate.activation_bytes + estimate.state_bytes)
}

/// The longest context below `most` that fits, if any does.
fn longest(most: usize, fits_at: impl Fn(usize) -> Result<bool>) -> Result<Option<usize>> {
    let (mut fits, mut too_long) = (0, most);
    while too_long - fits > 1 {
        let middle = fits + (too_long - fits) / 2;
        if fits_at(middle)? { fits = middle } else { too_long = middle }
    }
    Ok((fits > 0).then_some(fits))
}

/// What building the tokenizer of a folder takes for a moment; `None` of what is built from other files, or read in place.
fn building_bytes(folder: &HfFolder) -> Option<u64> {
    let bytes = match folder.content(TOKENIZER_FILE) {
        Some(bytes) => bytes.len() as u64,
        None => std::fs::metadata(folder.root().join(TOKENIZER_FILE)).ok()?.len(),
    };
    Some(bytes.saturating_mul(TOKENIZER_BUILDING_FACTOR))
}

/// Refuses to open a folder whose tokenizer takes more than may be used while it is built, which is before the model's plan is known.
pub(crate) fn admit_tokenizer(folder: &HfFolder) -> Result<()> {
    let Some(host_bytes) = building_bytes(folder) else { return Ok(()) };
    let view = MemoryView::new(&SystemProbe, Config::global().map_err(rlx::SessionError::from)?);
    let estimate = MemoryEstimate { host_bytes, ..MemoryEstimate::default() };
    view.admit(&estimate, 0).map_err(|deficit| {
        let remedy = Some("building the tokenizer alone takes that much; more memory is needed".to_owned());
        ModelError::Memory(Box::new(MemoryRefusal { deficit, remedy }))
    })
}

/// What [`EncoderRunner`] takes for these sequences: [`ENCODER_ROWS`] rows at most, unless one sequence is longer.
fn encoder_binding(info: &EncoderInfo, context: usize, batch: usize) -> DimBinding {
    EncoderRunner::binding(info, context.saturating_mul(batch).min(ENCODER_ROWS)).0
}

/// What [`DecoderRunner`] takes for these sequences.
fn decoder_binding(info: &DecoderInfo, context: usize, batch: usize) -> DimBinding {
    DecoderRunner::batch_binding(info, context, PREFILL_ROWS.max(batch), batch).0
}
