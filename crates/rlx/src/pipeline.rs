//! A model's graphs compiled once, specialised to many sizes, and kept.
//!
//! A *template* is a graph compiled for a device with its symbols open; it is built once for each graph, options and device. A
//! *specialisation* binds the symbols to capacities. All specialisations of a template run one program, so weights are packed once.
//!
//! ```
//! use rlx::pipeline::ModelCompilePipeline;
//! use rlx::devices::Device;
//! use rlx::CompileOptions;
//! use rlx_graph::{Graph, ops::activation::{Activation, ActivationKind}};
//! use rlx_tensor::{DType, Dim, DimBinding, Shape};
//!
//! let mut graph = Graph::new("relu");
//! let x = graph.input("x", Shape::from_dims(vec![Dim::symbol("rows")], DType::F32))?;
//! let y = graph.add_one(Activation { kind: ActivationKind::Relu }, &[x])?;
//! graph.set_outputs(&[("y", y)])?;
//!
//! let pipeline = ModelCompilePipeline::new(Device::Cpu)?;
//! let template = pipeline.ensure_template(&graph, &CompileOptions::default())?;
//! for rows in [16, 256, 16] {
//!     let binding = DimBinding::new().with("rows", rows);
//!     let executable = pipeline.get_or_compile("relu", Some(template), &binding)?;
//!     assert_eq!(executable.manifest().inputs[0].shape, [rows]);
//! }
//! assert_eq!((pipeline.len(), pipeline.specialisations()), (2, 2));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod aot;
mod cache;
mod key;
mod variant;

pub use key::{CacheKey, KeyFields};
pub use variant::{ModelComponent, ModelVariant, Phase};

use crate::backend::Backend;
use crate::config::ByteSize;
use crate::devices::DeviceId;
use crate::plan::{BindingManifest, InterfaceEntry, Lir, PlanError, Template};
use crate::session::{CompileOptions, CompiledGraph, RunContext, Session, SessionError, State, TensorArg};
use cache::{KeyedCache, TooLarge};
use rlx_graph::Graph;
use rlx_graph::passes::PassReport;
use rlx_tensor::{DimBinding, Shape, Tensor};
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Specialisations kept unless a caller says otherwise.
pub const DEFAULT_CAPACITY: usize = 8;
/// Arena and scratch bytes of the specialisations kept, unless a caller says otherwise.
pub const DEFAULT_BUDGET_BYTES: u64 = 4 << 30;
/// Version of what keys stand for: another layout of plans is another key.
const FORMAT: u64 = 1;

/// Why a pipeline cannot do as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// A template, an executable or a run failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Sizes do not fit the template: a symbol without a value, a value without a symbol, two values for one.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A variant of a model has no value for symbols of its graph.
    #[error("the variant has no value for {}; bind them by name", .symbols.join(", "))]
    Unbound {
        /// The symbols.
        symbols: Vec<String>,
    },
    /// No template was built yet.
    #[error("no template was built yet: call ensure_template first")]
    NoTemplate,
    /// The template is of another pipeline.
    #[error("template {id} is not of this pipeline")]
    UnknownTemplate {
        /// The template.
        id: TemplateId,
    },
    /// A cache that would hold nothing.
    #[error("a cache of 0 entries keeps nothing: give at least 1")]
    ZeroCapacity,
    /// One specialisation needs more than the budget for all.
    #[error("a specialisation of {} does not fit the budget of {}", ByteSize(*needed_bytes), ByteSize(*budget_bytes))]
    TooLarge {
        /// Arena and scratch of the specialisation.
        needed_bytes: u64,
        /// The budget.
        budget_bytes: u64,
    },
}

impl From<TooLarge> for PipelineError {
    fn from(error: TooLarge) -> Self {
        let TooLarge { needed_bytes, budget_bytes } = error;
        PipelineError::TooLarge { needed_bytes, budget_bytes }
    }
}

/// When a specialisation takes memory and binds weights. It is no part of keys: the result is the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CompilationMode {
    /// When it first runs.
    #[default]
    Lazy,
    /// When it is compiled.
    Eager,
    /// When it first runs; plans come from the cache on disk, or are left there: see [`ModelCompilePipeline::with_aot`].
    Aot,
}

/// Names a template of a pipeline: the digest of graph, options and device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TemplateId([u8; 32]);

impl fmt::Display for TemplateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What compiling a graph gave: the plan with its symbols open, and what the passes did.
#[derive(Debug, Clone)]
pub struct CompileResult {
    /// The plan.
    pub template: Arc<Template>,
    /// Fusions and decompositions.
    pub passes: PassReport,
}

/// Names and shapes of a template's interface, with symbols open.
#[derive(Debug, Clone, PartialEq)]
pub struct TemplateManifest {
    /// Inputs in declaration order.
    pub inputs: Vec<(String, Shape)>,
    /// Params in declaration order.
    pub params: Vec<(String, Shape)>,
    /// States in declaration order.
    pub states: Vec<(String, Shape)>,
    /// Outputs in order.
    pub outputs: Vec<(String, Shape)>,
}

/// An executable under capacities: a template's program with a layout of its arena.
#[derive(Debug)]
pub struct Specialised {
    label: String,
    compiled: Arc<CompiledGraph>,
    lir: Lir,
    bytes: u64,
    idle: Mutex<Option<RunContext>>,
}

impl Specialised {
    fn new(label: &str, compiled: Arc<CompiledGraph>, lir: Lir, bytes: u64) -> Self {
        Self { label: label.to_owned(), compiled, lir, bytes, idle: Mutex::new(None) }
    }

    /// An executable under capacities, outside any pipeline.
    ///
    /// # Errors
    /// As [`CompiledGraph::specialize`].
    pub fn of(compiled: Arc<CompiledGraph>, binding: &DimBinding) -> Result<Self, SessionError> {
        let lir = compiled.specialize(binding)?;
        let bytes = context_bytes(&**compiled.backend(), &lir)?;
        Ok(Self::new(compiled.template().name(), Arc::clone(&compiled), lir, bytes))
    }

    /// A context that comes back here when it is dropped.
    ///
    /// # Errors
    /// As [`CompiledGraph::context`].
    pub fn lease(self: &Arc<Self>) -> Result<LeasedContext, SessionError> {
        Ok(LeasedContext { context: Some(self.context()?), executable: Arc::clone(self) })
    }

    /// What the caller who made it called it.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The executable of all capacities.
    pub fn compiled(&self) -> &Arc<CompiledGraph> {
        &self.compiled
    }

    /// The layout.
    pub fn lir(&self) -> &Lir {
        &self.lir
    }

    /// Arena and scratch of one context.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The layout by names.
    pub fn manifest(&self) -> BindingManifest {
        BindingManifest::from_lir(&self.lir)
    }

    /// A context for runs: the idle one of the newest weights if there is one, else a new one.
    ///
    /// # Errors
    /// As [`CompiledGraph::context`].
    pub fn context(&self) -> Result<RunContext, SessionError> {
        let program = self.compiled.program()?;
        let idle = lock(&self.idle).take().filter(|context| Arc::ptr_eq(context.program(), &program));
        idle.map_or_else(|| self.compiled.context(&self.lir), Ok)
    }

    /// Keeps a context for the next who asks, unless one is kept already or it is of another layout.
    pub fn keep(&self, context: RunContext) {
        if context.binding() == self.lir.binding() {
            lock(&self.idle).get_or_insert(context);
        }
    }

    /// Zeroed state at these capacities.
    ///
    /// # Errors
    /// As [`CompiledGraph::new_state`].
    pub fn new_state(&self) -> Result<State, SessionError> {
        self.compiled.new_state(self.lir.binding())
    }

    /// Runs once on the caller's state.
    ///
    /// # Errors
    /// As [`RunContext::run`].
    pub fn run(
        &self,
        state: &mut State,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Vec<(String, Tensor)>, SessionError> {
        let mut context = self.context()?;
        let outputs = context.run(state, inputs);
        self.keep(context);
        outputs
    }
}

/// A context lent by an executable, given back when it is dropped.
#[derive(Debug)]
pub struct LeasedContext {
    executable: Arc<Specialised>,
    context: Option<RunContext>,
}

const HELD: &str = "a lease holds its context until it is dropped";

impl LeasedContext {
    /// The executable it belongs to.
    pub fn executable(&self) -> &Arc<Specialised> {
        &self.executable
    }
}

impl std::ops::Deref for LeasedContext {
    type Target = RunContext;

    fn deref(&self) -> &RunContext {
        self.context.as_ref().expect(HELD)
    }
}

impl std::ops::DerefMut for LeasedContext {
    fn deref_mut(&mut self) -> &mut RunContext {
        self.context.as_mut().expect(HELD)
    }
}

impl Drop for LeasedContext {
    fn drop(&mut self) {
        if let Some(context) = self.context.take() {
            self.executable.keep(context);
        }
    }
}

struct Templates {
    by_key: HashMap<CacheKey, TemplateId>,
    by_id: HashMap<TemplateId, (CacheKey, Arc<CompiledGraph>)>,
    latest: Option<TemplateId>,
}

impl Templates {
    fn put(&mut self, key: CacheKey, compiled: Arc<CompiledGraph>) -> TemplateId {
        let id = TemplateId(*blake3::hash(key.bytes()).as_bytes());
        self.by_id.insert(id, (key.clone(), compiled));
        self.by_key.insert(key, id);
        self.latest = Some(id);
        id
    }
}

/// Arena and scratch of one context.
fn context_bytes(backend: &dyn Backend, lir: &Lir) -> Result<u64, SessionError> {
    Ok((lir.arena_bytes() as u64).saturating_add(backend.workspace_bytes(lir)? as u64))
}

/// Builds templates once, specialises them once for each binding, and keeps the executables used last. `&self` everywhere.
pub struct ModelCompilePipeline {
    session: Session,
    device: Option<DeviceId>,
    mode: CompilationMode,
    templates: Mutex<Templates>,
    cache: KeyedCache<Specialised>,
    specialisations: AtomicU64,
    plans: Option<aot::PlanStore>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ModelCompilePipeline {
    /// A pipeline for a device of this process.
    ///
    /// # Errors
    /// As [`Session::new`].
    pub fn new(device: impl Into<DeviceId>) -> Result<Self, SessionError> {
        let device = device.into();
        Ok(Self { device: Some(device), ..Self::of_session(Session::new(device)?) })
    }

    /// A pipeline on a session's device and weights.
    pub fn of_session(session: Session) -> Self {
        let templates = Templates { by_key: HashMap::new(), by_id: HashMap::new(), latest: None };
        Self {
            session,
            device: None,
            mode: CompilationMode::default(),
            templates: Mutex::new(templates),
            cache: KeyedCache::new(DEFAULT_CAPACITY, DEFAULT_BUDGET_BYTES),
            specialisations: AtomicU64::new(0),
            plans: None,
        }
    }

    /// The same pipeline, empty, that keeps this many executables.
    ///
    /// # Errors
    /// [`PipelineError::ZeroCapacity`].
    pub fn with_capacity(mut self, entries: usize) -> Result<Self, PipelineError> {
        if entries == 0 {
            return Err(PipelineError::ZeroCapacity);
        }
        self.cache = KeyedCache::new(entries, self.cache.budget_bytes());
        Ok(self)
    }

    /// The same pipeline, empty, whose executables hold at most this many bytes of arena and scratch.
    #[must_use]
    pub fn with_budget(mut self, bytes: u64) -> Self {
        self.cache = KeyedCache::new(self.cache.capacity(), bytes);
        self
    }

    /// The same pipeline, compiling in this mode.
    #[must_use]
    pub fn with_mode(mut self, mode: CompilationMode) -> Self {
        self.mode = mode;
        self
    }

    /// The device it was made for; `None` for one made of a session.
    pub fn device(&self) -> Option<DeviceId> {
        self.device
    }

    /// The session: backend and weights.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Whether a template was built.
    pub fn has_template(&self) -> bool {
        lock(&self.templates).latest.is_some()
    }

    /// Executables kept.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Whether no executable is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of arena and scratch that the executables kept may hold.
    pub fn bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Drops every executable that is kept; those in use live on there. Templates stay.
    pub fn clear(&self) {
        self.cache.clear();
    }

    /// How often a template was specialised for an executable: once a miss, never for a hit.
    pub fn specialisations(&self) -> u64 {
        self.specialisations.load(Ordering::Relaxed)
    }

    /// What decides a template: graph, options, device, version.
    fn template_key(&self, hir: &Graph, options: &CompileOptions) -> CacheKey {
        let mut skip = options.passes.skip.clone();
        skip.sort();
        skip.dedup();
        let passes = format!("skip {skip:?} fold {}", options.passes.fold_limit_bytes);
        let backend: &dyn Backend = &**self.session.backend();
        KeyFields::new()
            .with("hir", blake3::hash(hir.to_string().as_bytes()).as_bytes())
            .with("options", passes)
            .with("adapters", format!("{:?}", options.passes.adapters))
            .with("backend", backend.name())
            .with("fingerprint", backend.fingerprint())
            .with("format", FORMAT.to_le_bytes())
            .with("version", env!("CARGO_PKG_VERSION"))
            .key()
    }

    /// Compiles a graph, or finds it compiled: once for each graph, options and device. It is the latest template from then on.
    ///
    /// # Errors
    /// As [`Session::compile_with`].
    pub fn ensure_template(
        &self,
        hir: &Graph,
        options: &CompileOptions,
    ) -> Result<TemplateId, PipelineError> {
        let key = self.template_key(hir, options);
        let mut templates = lock(&self.templates);
        if let Some(&id) = templates.by_key.get(&key) {
            templates.latest = Some(id);
            if let Some((_, compiled)) = templates.by_id.get(&id).filter(|_| options.weights_required) {
                compiled.check_weights(true)?;
            }
            return Ok(id);
        }
        let compiled = Arc::new(self.session.compile_with(hir, options)?);
        Ok(templates.put(key, compiled))
    }

    /// Takes in a graph that was compiled elsewhere for this pipeline's device, a compiled file's say, under an identity of its own.
    pub fn adopt(&self, compiled: Arc<CompiledGraph>, identity: &[u8]) -> TemplateId {
        let backend: &dyn Backend = &**compiled.backend();
        let fields = KeyFields::new().with("adopted", identity).with("backend", backend.name());
        lock(&self.templates).put(fields.with("fingerprint", backend.fingerprint()).key(), compiled)
    }

    /// As [`ModelCompilePipeline::ensure_template`].
    ///
    /// # Errors
    /// As [`ModelCompilePipeline::ensure_template`].
    pub fn build_template(&self, hir: &Graph, options: &CompileOptions) -> Result<TemplateId, PipelineError> {
        self.ensure_template(hir, options)
    }

    fn template(&self, id: Option<TemplateId>) -> Result<(CacheKey, Arc<CompiledGraph>), PipelineError> {
        let templates = lock(&self.templates);
        let id = id.or(templates.latest).ok_or(PipelineError::NoTemplate)?;
        templates.by_id.get(&id).cloned().ok_or(PipelineError::UnknownTemplate { id })
    }

    /// A template's executable of all capacities; the latest template's if none is named.
    ///
    /// # Errors
    /// [`PipelineError::NoTemplate`], [`PipelineError::UnknownTemplate`].
    pub fn compiled(&self, id: Option<TemplateId>) -> Result<Arc<CompiledGraph>, PipelineError> {
        Ok(self.template(id)?.1)
    }

    /// The template that an executable is of; `None` for one of another pipeline.
    pub fn template_of(&self, compiled: &Arc<CompiledGraph>) -> Option<TemplateId> {
        let templates = lock(&self.templates);
        templates.by_id.iter().find(|(_, (_, known))| Arc::ptr_eq(known, compiled)).map(|(id, _)| *id)
    }

    /// What compiling a template gave.
    ///
    /// # Errors
    /// As [`ModelCompilePipeline::compiled`].
    pub fn template_result(&self, id: Option<TemplateId>) -> Result<CompileResult, PipelineError> {
        let compiled = self.compiled(id)?;
        let passes = compiled.pass_report().clone();
        Ok(CompileResult { template: Arc::clone(compiled.template()), passes })
    }

    /// A template's interface with its symbols open.
    ///
    /// # Errors
    /// As [`ModelCompilePipeline::compiled`].
    pub fn template_binding_manifest(
        &self,
        id: Option<TemplateId>,
    ) -> Result<TemplateManifest, PipelineError> {
        let compiled = self.compiled(id)?;
        let list =
            |entries: &[InterfaceEntry]| entries.iter().map(|e| (e.name.clone(), e.shape.clone())).collect();
        Ok(TemplateManifest {
            inputs: list(compiled.inputs()),
            params: list(compiled.params()),
            states: list(compiled.states()),
            outputs: list(compiled.outputs()),
        })
    }

    /// Binds a template's symbols and places its memory.
    ///
    /// # Errors
    /// [`PlanError`] for symbols unbound, unknown or in conflict.
    pub fn specialize_template(
        &self,
        id: Option<TemplateId>,
        binding: &DimBinding,
    ) -> Result<Lir, PipelineError> {
        let compiled = self.compiled(id)?;
        self.specialize(&compiled, binding)
    }

    fn specialize(&self, compiled: &CompiledGraph, binding: &DimBinding) -> Result<Lir, PipelineError> {
        self.specialisations.fetch_add(1, Ordering::Relaxed);
        Ok(compiled.template().specialize(binding)?)
    }

    /// The layout of a template under a binding. Nothing is kept.
    ///
    /// # Errors
    /// As [`ModelCompilePipeline::specialize_template`].
    pub fn binding_manifest_for_binding(
        &self,
        id: Option<TemplateId>,
        binding: &DimBinding,
    ) -> Result<BindingManifest, PipelineError> {
        Ok(BindingManifest::from_lir(&self.specialize_template(id, binding)?))
    }

    /// The layout of a template under a component's capacities. Nothing is kept.
    ///
    /// # Errors
    /// As [`ModelCompilePipeline::specialize_template`]; [`PipelineError::Unbound`].
    pub fn binding_manifest_for_component(
        &self,
        id: Option<TemplateId>,
        component: &ModelComponent,
    ) -> Result<BindingManifest, PipelineError> {
        let compiled = self.compiled(id)?;
        let binding = component.dim_binding(compiled.template().sizes().symbols())?;
        Ok(BindingManifest::from_lir(&self.specialize(&compiled, &binding)?))
    }

    /// An executable of a specialised plan: of the pipeline's own program if the plan is of one of its templates, else of a program of
    /// its own. Nothing is kept.
    ///
    /// # Errors
    /// As [`Session::compile_lir`].
    pub fn compile_lir(&self, lir: &Lir, options: &CompileOptions) -> Result<Specialised, PipelineError> {
        let own = |compiled: &Arc<CompiledGraph>| Arc::ptr_eq(compiled.template(), lir.template());
        let known =
            lock(&self.templates).by_id.values().map(|(_, compiled)| compiled).find(|c| own(c)).cloned();
        let compiled = match known {
            Some(compiled) => compiled,
            None => Arc::new(self.session.compile_lir(lir, options)?),
        };
        let bytes = context_bytes(&**self.session.backend(), lir)?;
        self.bind("a plan", compiled, lir.clone(), bytes)
    }

    fn bind(
        &self,
        label: &str,
        compiled: Arc<CompiledGraph>,
        lir: Lir,
        bytes: u64,
    ) -> Result<Specialised, PipelineError> {
        let specialised = Specialised::new(label, compiled, lir, bytes);
        if self.mode == CompilationMode::Eager {
            specialised.keep(specialised.context()?);
        }
        Ok(specialised)
    }

    /// What decides an executable: its template and the binding. The label is for people.
    fn executable_key(&self, template: &CacheKey, name: &str, binding: &DimBinding) -> CacheKey {
        let sizes = binding.iter().fold(KeyFields::new(), |fields, (symbol, value)| {
            fields.with(symbol.name(), (value as u64).to_le_bytes())
        });
        let fields = KeyFields::new().with("template", template.bytes()).with("binding", sizes.key().bytes());
        fields.with("name", name).key()
    }

    /// Whether the executable of a template under a binding is kept.
    pub fn contains(&self, id: Option<TemplateId>, binding: &DimBinding) -> bool {
        let template = self.template(id);
        template.is_ok_and(|(key, compiled)| {
            self.cache.contains(&self.executable_key(&key, compiled.template().name(), binding))
        })
    }

    /// The key of the executable of a template under a binding: the same on every machine with the same device and version.
    ///
    /// # Errors
    /// As [`ModelCompilePipeline::compiled`].
    pub fn key(&self, id: Option<TemplateId>, binding: &DimBinding) -> Result<CacheKey, PipelineError> {
        let (key, compiled) = self.template(id)?;
        Ok(self.executable_key(&key, compiled.template().name(), binding))
    }

    /// The executable of a template (the latest if none is named) under a binding: kept from earlier, else specialised and compiled now,
    /// once however many threads ask. Entries are evicted before it takes memory.
    ///
    /// # Errors
    /// As [`ModelCompilePipeline::specialize_template`]; [`PipelineError::TooLarge`].
    pub fn get_or_compile(
        &self,
        label: &str,
        id: Option<TemplateId>,
        binding: &DimBinding,
    ) -> Result<Arc<Specialised>, PipelineError> {
        let (key, compiled) = self.template(id)?;
        let key = self.executable_key(&key, compiled.template().name(), binding);
        let plan = || -> Result<_, PipelineError> {
            let lir = self.specialize(&compiled, binding)?;
            let bytes = context_bytes(&**self.session.backend(), &lir)?;
            Ok(((lir, bytes), bytes))
        };
        let build = |(lir, bytes): (Lir, u64)| self.bind(label, Arc::clone(&compiled), lir, bytes);
        self.cache.get_or_build(&key, plan, build)
    }

    /// The executable of a component: its template if it is not there yet, its binding from its variant.
    ///
    /// # Errors
    /// As [`ModelCompilePipeline::ensure_template`] and [`ModelCompilePipeline::get_or_compile`]; [`PipelineError::Unbound`].
    pub fn get_or_compile_component(
        &self,
        component: &ModelComponent,
        hir: &Graph,
        options: &CompileOptions,
    ) -> Result<Arc<Specialised>, PipelineError> {
        if self.mode == CompilationMode::Aot {
            // A graph's symbols are those of its shapes; passes add none.
            let symbols = hir.symbols();
            let binding = component.dim_binding(&symbols)?;
            return self.get_or_specialize_aot(&component.name, hir, options, &binding);
        }
        let id = self.ensure_template(hir, options)?;
        let compiled = self.compiled(Some(id))?;
        let binding = component.dim_binding(compiled.template().sizes().symbols())?;
        self.get_or_compile(&component.name, Some(id), &binding)
    }
}

#[cfg(test)]
mod tests;
