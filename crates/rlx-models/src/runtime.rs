//! What runs a model's graph: an executable with its context, and for decoders the caches.

use crate::arch::{Decoder, DecoderInfo, Encoder, EncoderInfo};
use crate::embed::{EncoderInputs, EncoderLimits, EncoderRuntime};
use crate::error::{ModelError, Result};
use crate::generate::{CancelToken, DecoderLimits, DecoderRuntime, RunError, StepInputs};
use crate::kv::{WindowLimits, blocks_for};
use crate::largest::{LARGEST, Largest};
use crate::lora::{ADAPTER_SLOTS, AdaptedGraph, Adapter};
use crate::model::Model;
use rlx::aot::AotCache;
use rlx::backend::Backend;
use rlx::pipeline::{LeasedContext, ModelCompilePipeline, PipelineError, Specialised, TemplateId};
use rlx::plan::Lir;
use rlx::session::{CompileOptions, StepTimes};
use rlx::weights::{RegistryError, WeightHandle, WeightKind, WeightLoader, WeightRegistry};
use rlx::{CompiledGraph, Session, State, TensorArg};
use rlx_graph::Graph;
use rlx_graph::adapters::{SCALES, factors_input, rank_symbol, slots_input};
use rlx_graph::passes::PassOptions;
use rlx_kernels::schedule::RunControl;
use rlx_tensor::DimBinding;
use rlx_tensor::time::Instant;
use std::sync::Arc;

/// Another model's registry, for the weights of a model that runs beside it: a storage that both use is there once, and counted once.
#[derive(Clone)]
pub struct Beside {
    registry: Arc<WeightRegistry>,
    namespace: String,
}

impl Beside {
    /// Beside this model, with names that begin with `namespace`. They stay registered as long as that model's registry lives.
    pub fn of(model: &Model, namespace: &str) -> Self {
        Beside { registry: Arc::clone(model.compiled().weights()), namespace: format!("{namespace}/") }
    }

    /// What stands before the names of weights.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }
}

impl std::fmt::Debug for Beside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Beside({})", self.namespace)
    }
}

/// A pipeline for a model's graphs: its checkpoint's weights are registered under their own names, in a registry of their own or beside
/// those of another model, and read when needed. Plans are kept in the cache on disk where there is one.
///
/// # Errors
/// [`ModelError::Session`] for weights that cannot be registered.
pub fn pipeline(
    graph: &Graph,
    weights: &dyn WeightLoader,
    backend: &Arc<dyn Backend>,
    cache: Option<AotCache>,
    beside: Option<&Beside>,
) -> Result<ModelCompilePipeline> {
    let registry = beside.map_or_else(|| Arc::new(WeightRegistry::new()), |b| Arc::clone(&b.registry));
    let namespace = beside.map_or("", Beside::namespace);
    for name in graph.params().filter_map(|(_, param)| param.name.as_ref()) {
        let stored = name.strip_prefix(namespace).unwrap_or(name);
        register(&registry, name, weights, stored).map_err(rlx::SessionError::from)?;
    }
    let pipeline = of_registry(backend, registry)?;
    Ok(match cache {
        Some(cache) => pipeline.with_aot(cache),
        None => pipeline,
    })
}

/// Registers the tensor that a checkpoint has as `stored`.
fn register(
    registry: &WeightRegistry,
    name: &str,
    weights: &dyn WeightLoader,
    stored: &str,
) -> std::result::Result<WeightHandle, RegistryError> {
    match (weights.shape(stored)?, weights.storage(stored)?) {
        (Some(shape), Some(bytes)) => registry.register(name, shape, bytes, WeightKind::Base),
        _ => Err(RegistryError::Absent { name: stored.to_owned() }),
    }
}

/// Executables that a model keeps: a context that nobody uses holds memory which no plan counts.
const EXECUTABLES: usize = 2;

/// A pipeline on weights that are registered already.
pub(crate) fn of_registry(
    backend: &Arc<dyn Backend>,
    registry: Arc<WeightRegistry>,
) -> Result<ModelCompilePipeline> {
    let session = Session::with_backend(Arc::clone(backend)).with_weights(registry);
    Ok(ModelCompilePipeline::of_session(session).with_capacity(EXECUTABLES)?)
}

/// Every param must be in the registry.
pub(crate) fn with_weights(passes: PassOptions) -> CompileOptions {
    CompileOptions { passes, weights_required: true }
}

/// Where executables come from: a pipeline, which keeps them for the next runner of these capacities, or a compiled graph alone.
#[derive(Clone)]
pub struct Executables {
    compiled: Arc<CompiledGraph>,
    kept: Option<(Arc<ModelCompilePipeline>, TemplateId)>,
}

impl From<Arc<CompiledGraph>> for Executables {
    fn from(compiled: Arc<CompiledGraph>) -> Self {
        Executables { compiled, kept: None }
    }
}

impl Executables {
    /// Those of a pipeline's template.
    ///
    /// # Errors
    /// [`ModelError::Pipeline`] for a template of another pipeline.
    pub fn of(pipeline: Arc<ModelCompilePipeline>, template: TemplateId) -> Result<Self> {
        let compiled = pipeline.compiled(Some(template))?;
        Ok(Executables { compiled, kept: Some((pipeline, template)) })
    }

    /// The executable of all capacities.
    pub fn compiled(&self) -> &Arc<CompiledGraph> {
        &self.compiled
    }

    /// The pipeline; `None` for a compiled graph alone.
    pub fn pipeline(&self) -> Option<&Arc<ModelCompilePipeline>> {
        self.kept.as_ref().map(|(pipeline, _)| pipeline)
    }

    /// The executable under these capacities.
    fn executable(&self, label: &str, binding: &DimBinding) -> Result<Arc<Specialised>> {
        let alone = || Ok::<_, ModelError>(Arc::new(Specialised::of(Arc::clone(&self.compiled), binding)?));
        match &self.kept {
            None => alone(),
            Some((pipeline, template)) => match pipeline.get_or_compile(label, Some(*template), binding) {
                // Too large to be kept is not too large to run: whether there is memory for it was decided before.
                Err(PipelineError::TooLarge { .. }) => alone(),
                found => Ok(found?),
            },
        }
    }

    /// A context under these capacities, and its executable.
    pub(crate) fn lease(&self, label: &str, binding: &DimBinding) -> Result<LeasedContext> {
        Ok(self.executable(label, binding)?.lease()?)
    }
}

/// Rows of a run of an encoder, unless a sequence needs more.
pub const ENCODER_ROWS: usize = 1024;

/// Rows of a prefill step.
pub const PREFILL_ROWS: usize = 512;

/// Runs an encoder.
pub struct EncoderRunner {
    info: EncoderInfo,
    context: LeasedContext,
    limits: EncoderLimits,
    hidden: Vec<f32>,
    state: State,
    times: Option<Arc<StepTimes>>,
}

impl EncoderRunner {
    /// Capacities for runs of up to `max_rows` rows (at least the model's longest sequence).
    pub fn binding(info: &EncoderInfo, max_rows: usize) -> (DimBinding, EncoderLimits) {
        let max_rows = max_rows.max(info.max_tokens);
        let limits = EncoderLimits { max_rows, max_batch: max_rows };
        (DimBinding::new().with("rows", max_rows).with("batch", max_rows), limits)
    }

    /// A runner for runs of up to `max_rows` rows.
    ///
    /// # Errors
    /// [`crate::ModelError::Session`].
    pub fn new(model: &Encoder, executables: impl Into<Executables>, max_rows: usize) -> Result<Self> {
        let (binding, limits) = Self::binding(&model.info, max_rows);
        let context = executables.into().lease("encoder", &binding)?;
        let state = context.executable().new_state()?;
        let hidden = vec![0.0; max_rows.max(limits.max_rows) * model.info.width];
        Ok(Self { info: model.info.clone(), context, limits, hidden, state, times: None })
    }

    /// The executable's plan.
    pub fn lir(&self) -> &Lir {
        self.context.executable().lir()
    }

    /// The compiled graph.
    pub fn compiled(&self) -> &Arc<CompiledGraph> {
        self.context.executable().compiled()
    }

    /// Sizes and limits of the model.
    pub fn info(&self) -> &EncoderInfo {
        &self.info
    }

    /// Makes every later run add each step's wall time to the counters that are given back.
    ///
    /// # Errors
    /// [`crate::ModelError::Session`].
    pub fn time_steps(&mut self) -> Result<Arc<StepTimes>> {
        let times = Arc::new(StepTimes::new(self.compiled())?);
        self.times = Some(Arc::clone(&times));
        Ok(times)
    }

    /// The hidden states of the last run: `rows * width` values.
    pub fn hidden(&self, rows: usize) -> &[f32] {
        &self.hidden[..rows * self.info.width]
    }
}

impl EncoderRuntime for EncoderRunner {
    fn limits(&self) -> EncoderLimits {
        self.limits
    }

    fn run(&mut self, inputs: &EncoderInputs, embeddings: &mut [f32]) -> std::result::Result<(), RunError> {
        let (rows, batch) = ([inputs.input_ids.len()], [inputs.seq_starts.len()]);
        let given = [
            ("input_ids", TensorArg::typed(&rows, &inputs.input_ids)),
            ("positions", TensorArg::typed(&rows, &inputs.positions)),
            ("seq_starts", TensorArg::typed(&batch, &inputs.seq_starts)),
        ];
        let mut outputs = [
            ("last_hidden_state", bytemuck::cast_slice_mut(&mut self.hidden)),
            ("embedding", bytemuck::cast_slice_mut(embeddings)),
        ];
        let control = self.times.as_deref().map_or_else(RunControl::default, StepTimes::control);
        self.context.run_into(&mut self.state, &given, &mut outputs, control)?;
        Ok(())
    }
}

/// Runs a decoder; holds its caches.
pub struct DecoderRunner {
    info: DecoderInfo,
    executable: Arc<Specialised>,
    /// Memory for runs that give all logits; `None` until one is asked for.
    context: Option<LeasedContext>,
    /// For runs that give so many of the largest.
    largest: Option<(usize, LeasedContext)>,
    state: State,
    limits: DecoderLimits,
    adapted: Option<Adapted>,
    interrupt: (CancelToken, Option<Instant>),
    times: Option<Arc<StepTimes>>,
}

/// What runs with adapters need besides.
struct Adapted {
    graph: AdaptedGraph,
    context: Option<LeasedContext>,
    /// The highest rank that the context was made for.
    rank: usize,
    slots: [Option<Arc<Adapter>>; ADAPTER_SLOTS],
    scales: Vec<f32>,
    /// Names of the inputs: of slots with the symbol of the rows, and of factors.
    slot_names: Vec<(bool, String)>,
    factor_names: Vec<String>,
}

impl Adapted {
    fn new(graph: AdaptedGraph) -> Self {
        let sites = graph.layout.sites().len();
        let slot_names = graph.layout.rows().iter().map(|rows| (rows.name() == "outs", slots_input(rows)));
        Self {
            slot_names: slot_names.collect(),
            factor_names: (0..ADAPTER_SLOTS).map(factors_input).collect(),
            scales: vec![0.0; ADAPTER_SLOTS * sites],
            slots: Default::default(),
            context: None,
            rank: 0,
            graph,
        }
    }

    fn set(&mut self, slot: usize, adapter: Option<Arc<Adapter>>) {
        let sites = self.graph.layout.sites().len();
        let scales = &mut self.scales[slot * sites..(slot + 1) * sites];
        match &adapter {
            Some(adapter) => scales.copy_from_slice(adapter.scales()),
            None => scales.fill(0.0),
        }
        self.slots[slot] = adapter;
    }

    /// Extents of the scales and of each slot's factors.
    fn dims(&self) -> ([usize; 2], [[usize; 2]; ADAPTER_SLOTS]) {
        let layout = &self.graph.layout;
        let factors = |slot: &Option<Arc<Adapter>>| slot.as_ref().map_or([0, layout.width()], |a| a.dims());
        ([ADAPTER_SLOTS, layout.sites().len()], self.slots.each_ref().map(factors))
    }

    /// The context for the ranks of these adapters; made anew where a higher one comes.
    fn prepare(&mut self, plain: &DimBinding) -> Result<()> {
        let rank = self.slots.iter().flatten().map(|adapter| adapter.rank()).max().unwrap_or(0);
        if self.context.is_some() && rank <= self.rank {
            return Ok(());
        }
        let mut binding = plain.clone();
        for slot in 0..ADAPTER_SLOTS {
            binding = binding.with(rank_symbol(slot).name(), rank);
        }
        (self.context, self.rank) =
            (Some(self.graph.executables.lease("decoder with adapters", &binding)?), rank);
        Ok(())
    }
}

/// The factors of an empty slot: no bytes, at an address that fits their dtype.
const NO_FACTORS: &[f32] = &[];

/// Inputs of one run.
type Given<'a> = smallvec::SmallVec<[(&'a str, TensorArg<'a>); 24]>;

impl DecoderRunner {
    /// Capacities for one sequence of up to `context` positions, prefilled in steps of up to `max_rows` rows.
    pub fn binding(info: &DecoderInfo, context: usize, max_rows: usize) -> (DimBinding, DecoderLimits) {
        Self::batch_binding(info, context, max_rows, 1)
    }

    /// Capacities for `batch` sequences of up to `context` positions each.
    pub fn batch_binding(
        info: &DecoderInfo,
        context: usize,
        max_rows: usize,
        batch: usize,
    ) -> (DimBinding, DecoderLimits) {
        let table = blocks_for(context.min(info.max_positions).max(1));
        let blocks = table.saturating_mul(batch);
        let max_rows = max_rows.min(context.saturating_mul(batch)).max(batch);
        let window = info.window.map(|positions| WindowLimits::new(positions, batch, table, max_rows));
        let limits = DecoderLimits { max_rows, blocks, table, outs: batch, window };
        let mut binding = DimBinding::new().with("rows", max_rows).with("batch", batch).with("outs", batch);
        if info.full_layers > 0 {
            binding = binding.with("blocks", blocks);
        }
        if let Some(window) = window {
            binding = binding.with("window_blocks", window.blocks);
        }
        (binding.with("table", table), limits)
    }

    /// A runner for one sequence of up to `context` positions.
    ///
    /// # Errors
    /// [`crate::ModelError::Session`].
    pub fn new(
        model: &Decoder,
        executables: impl Into<Executables>,
        context: usize,
        max_rows: usize,
    ) -> Result<Self> {
        Self::with_batch(model, executables, context, max_rows, 1)
    }

    /// A runner for `batch` sequences, at least 1, of up to `context` positions each.
    ///
    /// # Errors
    /// [`crate::ModelError::Session`].
    pub fn with_batch(
        model: &Decoder,
        executables: impl Into<Executables>,
        context: usize,
        max_rows: usize,
        batch: usize,
    ) -> Result<Self> {
        let (binding, limits) = Self::batch_binding(&model.info, context, max_rows, batch.max(1));
        Self::bound(model, &executables.into(), &binding, limits)
    }

    /// A runner for one sequence whose steps give the logits of up to `outs` rows: of a token, and of guesses after it.
    ///
    /// # Errors
    /// [`crate::ModelError::Session`].
    pub fn with_outs(
        model: &Decoder,
        executables: impl Into<Executables>,
        context: usize,
        max_rows: usize,
        outs: usize,
    ) -> Result<Self> {
        let (binding, limits) = Self::batch_binding(&model.info, context, max_rows, 1);
        let outs = outs.clamp(1, limits.max_rows);
        let binding = binding.with("outs", outs);
        Self::bound(model, &executables.into(), &binding, DecoderLimits { outs, ..limits })
    }

    /// As [`DecoderRunner::with_outs`], with memory for runs that give all logits, or for those that give the largest.
    pub(crate) fn of_text(
        model: &Decoder,
        executables: &Executables,
        (context, outs): (usize, usize),
        largest: Option<Largest>,
    ) -> Result<Self> {
        let (binding, limits) = Self::batch_binding(&model.info, context, PREFILL_ROWS, 1);
        let outs = outs.clamp(1, limits.max_rows);
        let binding = binding.with("outs", outs);
        let mut runner = Self::unleased(model, executables, &binding, DecoderLimits { outs, ..limits })?;
        runner.choose_from(largest)?;
        Ok(runner)
    }

    /// What later steps give: the largest logits, or all.
    pub(crate) fn choose_from(&mut self, largest: Option<Largest>) -> Result<()> {
        match largest {
            Some(Largest { count, .. }) if self.largest() == count => {}
            Some(Largest { count, executables }) => {
                let binding = self.executable.lir().binding();
                self.largest = Some((count, executables.lease("decoder of the largest logits", binding)?));
            }
            None => {
                self.largest = None;
                self.whole()?;
            }
        }
        Ok(())
    }

    /// The context of runs that give all logits.
    fn whole(&mut self) -> std::result::Result<&mut LeasedContext, rlx::SessionError> {
        Ok(match &mut self.context {
            Some(context) => context,
            none => none.insert(self.executable.lease()?),
        })
    }

    fn unleased(
        model: &Decoder,
        executables: &Executables,
        binding: &DimBinding,
        limits: DecoderLimits,
    ) -> Result<Self> {
        let executable = executables.executable("decoder", binding)?;
        let state = executable.new_state()?;
        let (interrupt, info) = ((CancelToken::new(), None), model.info.clone());
        let (context, largest, adapted, times) = (None, None, None, None);
        Ok(Self { info, executable, context, largest, state, limits, adapted, interrupt, times })
    }

    fn bound(
        model: &Decoder,
        executables: &Executables,
        binding: &DimBinding,
        limits: DecoderLimits,
    ) -> Result<Self> {
        let mut runner = Self::unleased(model, executables, binding, limits)?;
        runner.whole()?;
        Ok(runner)
    }

    /// Lets runs use adapters: rows that name a slot run with what [`DecoderRunner::set_adapter`] put there. A step in which no
    /// row does runs the plain executable.
    #[must_use]
    pub fn with_adapters(mut self, graph: AdaptedGraph) -> Self {
        self.adapted = Some(Adapted::new(graph));
        self
    }

    /// As [`DecoderRunner::with_adapters`], once.
    ///
    /// # Errors
    /// Of `graph`.
    pub fn use_adapters(&mut self, graph: impl FnOnce() -> Result<AdaptedGraph>) -> Result<()> {
        if self.adapted.is_none() {
            self.adapted = Some(Adapted::new(graph()?));
        }
        Ok(())
    }

    /// Puts an adapter into a slot, or empties it.
    ///
    /// # Errors
    /// [`crate::ModelError::Session`] if memory for its rank is refused; [`crate::ModelError::Setting`] for a slot that is not there, or
    /// a runner without adapters.
    pub fn set_adapter(&mut self, slot: usize, adapter: Option<Arc<Adapter>>) -> Result<()> {
        let Some(adapted) = self.adapted.as_mut().filter(|_| slot < ADAPTER_SLOTS) else {
            let expected = "a slot of a runner with adapters";
            return Err(ModelError::Setting { setting: "slot", expected, found: slot.to_string() });
        };
        adapted.set(slot, adapter);
        adapted.prepare(self.executable.lir().binding())
    }

    /// The executable's plan.
    pub fn lir(&self) -> &Lir {
        self.executable.lir()
    }

    /// The compiled graph.
    pub fn compiled(&self) -> &Arc<CompiledGraph> {
        self.executable.compiled()
    }

    /// Sizes and limits of the model.
    pub fn info(&self) -> &DecoderInfo {
        &self.info
    }

    /// Makes every later run without adapters add each step's wall time to the counters that are given back.
    ///
    /// # Errors
    /// [`crate::ModelError::Session`].
    pub fn time_steps(&mut self) -> Result<Arc<StepTimes>> {
        let times = Arc::new(StepTimes::new(self.compiled())?);
        self.times = Some(Arc::clone(&times));
        Ok(times)
    }

    /// Bytes of the caches.
    pub fn state_bytes(&self) -> usize {
        self.state.bytes()
    }

    /// One step: of the graph that gives the largest logits, or all.
    fn run(
        &mut self,
        inputs: &StepInputs,
        largest: bool,
        outputs: &mut [(&str, &mut [u8])],
    ) -> std::result::Result<(), RunError> {
        let rows = [inputs.input_ids.len()];
        let (starts, batch, outs) =
            ([inputs.seq_starts.len()], [inputs.past.len()], [inputs.logit_rows.len()]);
        let table = [inputs.past.len(), inputs.table];
        let width = inputs.angles.len().checked_div(rows[0]).unwrap_or(0);
        let angles = [rows[0], width];
        let (scale_dims, factor_dims) = self.adapted.as_ref().map_or_else(Default::default, Adapted::dims);
        let mut given = Given::from_slice(&[
            ("input_ids", TensorArg::typed(&rows, &inputs.input_ids)),
            ("positions", TensorArg::typed(&rows, &inputs.positions)),
            ("seq_starts", TensorArg::typed(&starts, &inputs.seq_starts)),
            ("past", TensorArg::typed(&batch, &inputs.past)),
            ("logit_rows", TensorArg::typed(&outs, &inputs.logit_rows)),
        ]);
        if self.info.full_layers > 0 {
            given.push(("block_table", TensorArg::typed(&table, &inputs.block_table)));
        }
        if self.info.window.is_some() {
            given.push(("window_table", TensorArg::typed(&table, &inputs.window_table)));
        }
        if self.info.rope.is_some() {
            given.push(("angles", TensorArg::typed(&angles, &inputs.angles)));
        }
        let control = self.interrupt.0.control(self.interrupt.1);
        if !inputs.is_adapted() {
            let times = self.times.as_ref().filter(|_| !largest).and_then(|times| times.control().times);
            let control = RunControl { times, ..control };
            let context = match &mut self.largest {
                Some((_, context)) if largest => context,
                _ => match &mut self.context {
                    Some(context) => context,
                    none => none.insert(self.executable.lease()?),
                },
            };
            context.run_into(&mut self.state, &given, outputs, control)?;
            return Ok(());
        }
        let Some(Adapted { graph, context: Some(context), slots, scales, slot_names, factor_names, .. }) =
            &mut self.adapted
        else {
            return Err("the step names an adapter, but the runner has none".into());
        };
        let layout = &graph.layout;
        for (of_outs, name) in slot_names.iter() {
            let (dims, list) = if *of_outs { (&outs, &inputs.logit_slots) } else { (&rows, &inputs.slots) };
            given.push((name.as_str(), TensorArg::typed(dims, list)));
        }
        given.push((SCALES, TensorArg::typed(&scale_dims, scales)));
        for ((name, adapter), dims) in factor_names.iter().zip(slots.iter()).zip(&factor_dims) {
            let bytes =
                adapter.as_ref().map_or(bytemuck::cast_slice(NO_FACTORS), |adapter| adapter.factors());
            given.push((name.as_str(), TensorArg::new(dims, layout.dtype, bytes)));
        }
        context.run_into(&mut self.state, &given, outputs, control)?;
        Ok(())
    }
}

impl DecoderRuntime for DecoderRunner {
    fn limits(&self) -> DecoderLimits {
        self.limits
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut [f32]) -> std::result::Result<(), RunError> {
        self.run(inputs, false, &mut [("logits", bytemuck::cast_slice_mut(logits))])
    }

    fn largest(&self) -> usize {
        self.largest.as_ref().map_or(0, |(count, _)| *count)
    }

    fn step_largest(
        &mut self,
        inputs: &StepInputs,
        logits: &mut [f32],
        tokens: &mut [i32],
    ) -> std::result::Result<(), RunError> {
        let [values, ids] = LARGEST;
        let mut outputs =
            [(values, bytemuck::cast_slice_mut(logits)), (ids, bytemuck::cast_slice_mut(tokens))];
        self.run(inputs, true, &mut outputs)
    }

    fn interrupt(&mut self, cancel: &CancelToken, deadline: Option<Instant>) {
        self.interrupt = (cancel.clone(), deadline);
    }
}
