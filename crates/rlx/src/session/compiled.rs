//! A compiled graph: its template, weights, specialisations and reports.

use super::context::{RunContext, check_inputs};
use super::error::SessionError;
use super::report::{CompileReport, StepReport};
use super::value::TensorArg;
use crate::backend::{Backend, BackendError, Program, StateBuffer, contain};
use crate::memory::{MemoryEstimate, estimate_with};
use crate::plan::{InterfaceEntry, Lir, Template};
use crate::weights::{WeightHandle, WeightKind, WeightRegistry};
use rlx_graph::Graph;
use rlx_graph::interpret::nearest_name;
use rlx_graph::passes::{PassOptions, PassReport, compile_passes};
use rlx_kernels::schedule::RunControl;
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::{DType, DimBinding, Shape, Tensor, byte_count};
use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Specialisations kept by [`CompiledGraph::run`].
const SPECIALISATIONS: usize = 8;

/// A graph compiled for one device. Cheap to share: `&self` everywhere.
pub struct CompiledGraph {
    backend: Arc<dyn Backend>,
    weights: Arc<WeightRegistry>,
    template: Arc<Template>,
    compilation: OnceLock<(Graph, PassReport)>,
    source: Option<(Graph, PassOptions)>,
    from_plan: bool,
    compile_micros: u64,
    health: Arc<Health>,
    program: Mutex<Option<Loaded>>,
    recent: Mutex<VecDeque<RunContext>>,
    verify: Option<Box<VerifyWeights>>,
    specialisations: AtomicU64,
}

impl std::fmt::Debug for CompiledGraph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CompiledGraph({} on {})", self.template.name(), self.backend.name())
    }
}

/// Whether an executable may still be used: not after its backend has panicked. Shared with its contexts.
#[derive(Debug, Default)]
pub(super) struct Health(OnceLock<String>);

impl Health {
    /// An error once the executable is discarded.
    pub(super) fn check(&self) -> Result<(), BackendError> {
        match self.0.get() {
            None => Ok(()),
            Some(message) => Err(BackendError::Discarded { message: message.clone() }),
        }
    }

    /// Calls into the backend; a panic discards the executable.
    pub(super) fn contain<T>(
        &self,
        call: impl FnOnce() -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        self.check()?;
        let result = contain(call);
        if let Err(BackendError::Panicked { message }) = &result {
            // A second panic of a run beside this one changes nothing: the executable is discarded already.
            let _ = self.0.set(message.clone());
        }
        result
    }
}

/// A program with the weights it was loaded from.
struct Loaded {
    program: Arc<dyn Program>,
    revision: u64,
    versions: Vec<(WeightHandle, u64)>,
}

/// Is asked before a program reads weights.
type VerifyWeights = dyn Fn() -> Result<(), SessionError> + Send + Sync;

/// Buffers that survive runs: KV caches. Owned by the caller, usable by every specialisation of one template.
///
/// A run that fails leaves them as they were: buffers that ops overwrite are put back from a copy, and what an op appended beyond the
/// positions in use (a KV cache) stays there unseen, for the next run writes those positions before it reads them.
#[derive(Debug, Default)]
pub struct State {
    pub(super) buffers: Vec<StateBuffer>,
    pub(super) dims: Vec<Vec<usize>>,
}

impl State {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        self.buffers.iter().map(StateBuffer::len).sum()
    }

    fn at(&mut self, index: usize) -> Result<&mut StateBuffer, SessionError> {
        let count = self.buffers.len();
        let missing =
            || SessionError::State { reason: format!("there are {count} buffers, none at {index}") };
        self.buffers.get_mut(index).ok_or_else(missing)
    }

    /// A buffer's bytes, by position in declaration order. Brings them back if a device keeps them.
    ///
    /// # Errors
    /// [`SessionError::State`] for a position without a buffer; a device that is lost took its content along.
    pub fn buffer(&mut self, index: usize) -> Result<&[u8], SessionError> {
        Ok(self.at(index)?.bytes()?)
    }

    /// As [`State::buffer`], to be written: the content of a cache saved earlier.
    ///
    /// # Errors
    /// As [`State::buffer`].
    pub fn buffer_mut(&mut self, index: usize) -> Result<&mut [u8], SessionError> {
        Ok(self.at(index)?.bytes_mut()?)
    }

    /// Whether a device keeps a buffer's content.
    pub fn is_resident(&self, index: usize) -> bool {
        self.buffers.get(index).is_some_and(StateBuffer::is_resident)
    }

    /// Extents of each buffer, in declaration order.
    pub fn dims(&self) -> &[Vec<usize>] {
        &self.dims
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CompiledGraph {
    pub(super) fn new(
        backend: Arc<dyn Backend>,
        weights: Arc<WeightRegistry>,
        template: Arc<Template>,
        graph: Option<Graph>,
        passes: PassReport,
        compile_micros: u64,
    ) -> Self {
        let from_plan = graph.is_none();
        let compilation = graph.map_or_else(OnceLock::new, |graph| OnceLock::from((graph, passes)));
        Self {
            backend,
            weights,
            template,
            compilation,
            source: None,
            from_plan,
            compile_micros,
            health: Arc::default(),
            program: Mutex::new(None),
            recent: Mutex::new(VecDeque::new()),
            specialisations: AtomicU64::new(0),
            verify: None,
        }
    }

    /// The same executable, whose plan was made of this graph with these options.
    #[must_use]
    pub(super) fn planned_from(mut self, graph: Graph, options: PassOptions, compile_micros: u64) -> Self {
        (self.source, self.from_plan, self.compile_micros) = (Some((graph, options)), false, compile_micros);
        self
    }

    /// The optimised graph and what the passes did to it; for a plan of a known graph they run now.
    fn compilation(&self) -> &(Graph, PassReport) {
        self.compilation.get_or_init(|| {
            let unknown = || (Graph::new(self.template.name()), PassReport::default());
            let Some((graph, options)) = &self.source else { return unknown() };
            compile_passes(graph, self.backend.target(), options).unwrap_or_else(|error| {
                tracing::warn!(
                    "{:?} cannot be compiled as it was when it was planned: {error}",
                    graph.name()
                );
                unknown()
            })
        })
    }

    /// The same graph, whose weights are to be verified before a program is loaded.
    #[must_use]
    pub(crate) fn verified_by(
        mut self,
        verify: impl Fn() -> Result<(), SessionError> + Send + Sync + 'static,
    ) -> Self {
        self.verify = Some(Box::new(verify));
        self
    }

    /// The template.
    pub fn template(&self) -> &Arc<Template> {
        &self.template
    }

    /// The optimised, legal graph; an empty one for an executable that was compiled from a plan.
    pub fn graph(&self) -> &Graph {
        &self.compilation().0
    }

    /// As [`CompiledGraph::graph`], for work that needs its nodes.
    pub(super) fn kept_graph(&self) -> Result<&Graph, SessionError> {
        match self.from_plan {
            false => Ok(self.graph()),
            true => Err(SessionError::NoGraph { name: self.template.name().to_owned() }),
        }
    }

    /// What the passes did to the graph.
    pub fn pass_report(&self) -> &PassReport {
        &self.compilation().1
    }

    /// Whether weights have been loaded to the device.
    pub fn is_loaded(&self) -> bool {
        lock(&self.program).is_some()
    }

    /// How many times [`CompiledGraph::specialize`] has bound capacities.
    pub fn specialisations(&self) -> u64 {
        self.specialisations.load(Ordering::Relaxed)
    }

    /// The device.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The registry that params bind from.
    pub fn weights(&self) -> &Arc<WeightRegistry> {
        &self.weights
    }

    /// Inputs: name, shape, place.
    pub fn inputs(&self) -> &[InterfaceEntry] {
        self.template.inputs()
    }

    /// Params: name, shape, place.
    pub fn params(&self) -> &[InterfaceEntry] {
        self.template.params()
    }

    /// States: name, shape, place.
    pub fn states(&self) -> &[InterfaceEntry] {
        self.template.states()
    }

    /// Outputs: name, shape, place.
    pub fn outputs(&self) -> &[InterfaceEntry] {
        self.template.outputs()
    }

    /// Compares every param with the registry; lists all that are missing (if `required`) or different.
    pub(crate) fn check_weights(&self, required: bool) -> Result<(), SessionError> {
        let mut problems = Vec::new();
        for param in self.template.params() {
            let Some(handle) = self.weights.lookup(&param.name) else {
                if required {
                    problems.push(format!("{}: missing, expected {}", param.name, param.shape));
                }
                continue;
            };
            let entry = self.weights.get(handle)?;
            if *entry.shape() != param.shape {
                problems.push(format!("{}: expected {}, found {}", param.name, param.shape, entry.shape()));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(SessionError::Weights { problems }) }
    }

    /// Gives a param its value, or a new one: runs in flight finish on the old one.
    pub fn set_param<'t>(&self, name: &str, value: impl Into<TensorArg<'t>>) -> Result<(), SessionError> {
        let value = value.into();
        self.set_param_typed(name, value.bytes, value.dtype)
    }

    /// As [`CompiledGraph::set_param`], from bytes.
    pub fn set_param_typed(&self, name: &str, bytes: &[u8], dtype: DType) -> Result<(), SessionError> {
        let params = self.template.params().iter().map(|p| (p.name.as_str(), &p.shape));
        let shape = check_param(params, name, bytes.len(), dtype)?;
        set_weight(&self.weights, name, shape, bytes)?;
        lock(&self.recent).clear();
        Ok(())
    }

    /// The program: steps bound to kernels and weights, made at first use and again when a weight has a new version.
    pub fn program(&self) -> Result<Arc<dyn Program>, SessionError> {
        self.health.check()?;
        let mut loaded = lock(&self.program);
        let revision = self.weights.revision();
        if let Some(loaded) = &mut *loaded
            && (loaded.revision == revision || self.weight_versions()? == loaded.versions)
        {
            loaded.revision = revision;
            return Ok(Arc::clone(&loaded.program));
        }
        self.check_weights(true)?;
        if let Some(verify) = &self.verify {
            verify()?;
        }
        let versions = self.weight_versions()?;
        let program = self.health.contain(|| self.backend.load(&self.template, &self.weights))?;
        *loaded = Some(Loaded { program: Arc::clone(&program), revision, versions });
        Ok(program)
    }

    fn weight_versions(&self) -> Result<Vec<(WeightHandle, u64)>, SessionError> {
        let handles = self.template.params().iter().filter_map(|p| self.weights.lookup(&p.name));
        handles.map(|handle| Ok((handle, self.weights.get(handle)?.version()))).collect()
    }

    /// Binds capacities and places memory.
    pub fn specialize(&self, binding: &DimBinding) -> Result<Lir, SessionError> {
        self.specialisations.fetch_add(1, Ordering::Relaxed);
        Ok(self.template.specialize(binding)?)
    }

    /// Memory for runs under a specialisation's capacities: reusable, one run at a time. It keeps the weights of now.
    pub fn context(&self, lir: &Lir) -> Result<RunContext, SessionError> {
        self.context_of(self.program()?, lir)
    }

    fn context_of(&self, program: Arc<dyn Program>, lir: &Lir) -> Result<RunContext, SessionError> {
        RunContext::new(program, Arc::clone(&self.health), lir)
    }

    /// Zeroed state buffers for these capacities. Symbols that no state uses need no value.
    pub fn new_state(&self, binding: &DimBinding) -> Result<State, SessionError> {
        let mut state = State::default();
        for entry in self.template.states() {
            let dims = entry.shape.eval(binding)?;
            let bytes = byte_count(&dims, entry.shape.dtype()).filter(|&b| isize::try_from(b).is_ok());
            let bytes = bytes.ok_or_else(|| SessionError::State {
                reason: format!("{} of {dims:?} takes more bytes than can be addressed", entry.name),
            })?;
            let buffer = AlignedBytes::try_zeroed(bytes).ok_or_else(|| SessionError::State {
                reason: format!("the system refuses {bytes} bytes for {} of {dims:?}", entry.name),
            })?;
            state.buffers.push(buffer.into());
            state.dims.push(dims);
        }
        Ok(state)
    }

    /// Runs once on fresh state and returns the outputs. Specialises to the inputs' extents as needed, and keeps the last few.
    pub fn run(&self, inputs: &[(&str, TensorArg<'_>)]) -> Result<Vec<(String, Tensor)>, SessionError> {
        self.run_with(&mut State::default(), inputs)
    }

    /// Runs once on the caller's state. An empty state is filled with fresh buffers if the inputs determine their size.
    pub fn run_with(
        &self,
        state: &mut State,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Vec<(String, Tensor)>, SessionError> {
        self.run_controlled(state, inputs, RunControl::default())
    }

    /// As [`CompiledGraph::run_with`], ended early by a cancel token or a deadline, see [`super::CancelToken::control`].
    ///
    /// # Errors
    /// As [`CompiledGraph::run_with`]; `StepError::Cancelled` and `StepError::DeadlinePassed` as [`SessionError::Backend`].
    pub fn run_controlled(
        &self,
        state: &mut State,
        inputs: &[(&str, TensorArg<'_>)],
        control: RunControl<'_>,
    ) -> Result<Vec<(String, Tensor)>, SessionError> {
        let symbols = self.bind_inputs(state, inputs)?;
        let fresh = state.buffers.is_empty() && !self.template.states().is_empty();
        if fresh {
            *state = self.new_state(&symbols)?;
        }
        let outputs = self.run_bound(state, &symbols, inputs, control);
        if outputs.is_err() && fresh {
            *state = State::default();
        }
        outputs
    }

    fn run_bound(
        &self,
        state: &mut State,
        symbols: &DimBinding,
        inputs: &[(&str, TensorArg<'_>)],
        control: RunControl<'_>,
    ) -> Result<Vec<(String, Tensor)>, SessionError> {
        let mut context = self.take_context(symbols)?;
        let outputs = context.run_controlled(state, inputs, control);
        if outputs.as_ref().err().is_some_and(SessionError::is_device_fault) {
            return outputs;
        }
        let mut recent = lock(&self.recent);
        recent.push_back(context);
        if recent.len() > SPECIALISATIONS {
            recent.pop_front();
        }
        outputs
    }

    /// A kept context of the newest weights whose capacities cover these sizes, or a new one for exactly them.
    fn take_context(&self, symbols: &DimBinding) -> Result<RunContext, SessionError> {
        let program = self.program()?;
        let mut recent = lock(&self.recent);
        recent.retain(|context| Arc::ptr_eq(context.program(), &program));
        let kept = recent.iter().position(|c| c.covers(symbols)).and_then(|at| recent.remove(at));
        drop(recent);
        kept.map_or_else(|| self.context_of(program, &self.specialize(symbols)?), Ok)
    }

    pub(super) fn bind_inputs(
        &self,
        state: &State,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<DimBinding, SessionError> {
        check_inputs(&self.template, inputs)?;
        let mut binding = DimBinding::new();
        for (entry, dims) in self.template.states().iter().zip(&state.dims) {
            bind(&mut binding, &entry.shape, dims)?;
        }
        for (name, value) in inputs {
            let Some(entry) = self.template.inputs().iter().find(|e| e.name == *name) else {
                return Err(unknown("input", name, self.template.inputs()));
            };
            if let Some(dims) = value.dims {
                bind(&mut binding, &entry.shape, dims)?;
            } else if let [dim] = entry.shape.dims() {
                let elements = value.bytes.len() / value.dtype.element_bytes().unwrap_or(1);
                if let Some((symbol, offset)) = dim.as_symbol_plus() {
                    binding.bind(symbol, elements.saturating_sub(offset))?;
                }
            }
        }
        Ok(binding)
    }

    /// What became of the graph: fusions and kernels.
    pub fn report(&self) -> Result<CompileReport, SessionError> {
        let kernels = self.program()?.kernels();
        let template = &self.template;
        let steps = template.steps().iter().zip(kernels).map(|(step, choice)| {
            let inputs: Vec<Shape> = step.inputs.iter().map(|p| template.shape(p)).collect();
            let outputs: Vec<Shape> = step.outputs.iter().map(|p| template.shape(p)).collect();
            let cost =
                step.op.def().cost(&inputs.iter().collect::<Vec<_>>(), &outputs.iter().collect::<Vec<_>>());
            StepReport {
                op: step.op.def().name().to_owned(),
                kernel: choice.kernel,
                native: choice.native,
                location: step.location.clone(),
                flops: cost.flops,
                bytes: cost.bytes,
            }
        });
        Ok(CompileReport {
            name: template.name().to_owned(),
            backend: self.backend.name().to_owned(),
            fusions: self.pass_report().trace.tally(),
            decomposed: self.pass_report().dispatch.decomposed.clone(),
            checks: template.checks().map(|(l, r, node)| format!("{l} = {r} for {node}")).collect(),
            steps: steps.collect(),
            unused_weights: self.unused_weights(),
            passes: self.pass_report().clone(),
            compile_micros: self.compile_micros,
        })
    }

    /// Names of the registry that no param of the graph has, nor an alias or adapter of one.
    fn unused_weights(&self) -> Vec<String> {
        let params: HashSet<&str> = self.template.params().iter().map(|p| p.name.as_str()).collect();
        let mut bound = HashSet::new();
        for name in &params {
            let entry = self.weights.lookup(name).and_then(|handle| self.weights.get(handle).ok());
            bound.extend(entry.map(|entry| entry.name().to_owned()));
        }
        let is_base = |name: &String| {
            let described = self.weights.lookup(name).and_then(|handle| self.weights.describe(handle).ok());
            matches!(described, Some((_, WeightKind::Base)))
        };
        let mut unused = self.weights.names();
        unused.retain(|name| !params.contains(name.as_str()) && !bound.contains(name) && is_base(name));
        unused.sort();
        unused
    }

    /// The peak of memory of runs under these capacities, weights included. No weight is read.
    ///
    /// # Errors
    /// As [`CompiledGraph::specialize`].
    pub fn estimate(&self, binding: &DimBinding) -> Result<MemoryEstimate, SessionError> {
        estimate_with(&self.specialize(binding)?, &*self.backend, &self.weights)
    }
}

/// The shape of a param that may take `bytes` bytes of `dtype`.
///
/// # Errors
/// [`SessionError::UnknownName`], [`SessionError::DType`], [`SessionError::Shape`].
pub(crate) fn check_param<'p>(
    params: impl Iterator<Item = (&'p str, &'p Shape)> + Clone,
    name: &str,
    bytes: usize,
    dtype: DType,
) -> Result<&'p Shape, SessionError> {
    let Some((_, shape)) = params.clone().find(|(known, _)| *known == name) else {
        let nearest = nearest_name(name, params.map(|(known, _)| known)).map(str::to_owned);
        return Err(SessionError::UnknownName { kind: "param", name: name.to_owned(), nearest });
    };
    if dtype != shape.dtype() {
        let (name, expected) = (name.to_owned(), shape.dtype());
        return Err(SessionError::DType { name, expected, found: dtype });
    }
    let need = shape.known_dims().and_then(|dims| byte_count(&dims, dtype));
    if need != Some(bytes) {
        let (expected, found) = (shape.to_string(), format!("{bytes} bytes"));
        return Err(SessionError::Shape { name: name.to_owned(), expected, found });
    }
    Ok(shape)
}

/// Gives a weight its value, or a new version of it.
pub(crate) fn set_weight(
    weights: &WeightRegistry,
    name: &str,
    shape: &Shape,
    bytes: &[u8],
) -> Result<(), SessionError> {
    let shared: Arc<[u8]> = Arc::from(bytes);
    match weights.lookup(name) {
        Some(handle) => weights.replace(handle, shape.clone(), shared)?,
        None => drop(weights.register(name, shape.clone(), shared, WeightKind::Base)?),
    }
    Ok(())
}

/// Binds symbols that stand alone in a shape to the extents given.
fn bind(binding: &mut DimBinding, shape: &Shape, dims: &[usize]) -> Result<(), SessionError> {
    for (dim, &extent) in shape.dims().iter().zip(dims) {
        if let Some((symbol, offset)) = dim.as_symbol_plus().filter(|(_, offset)| *offset <= extent) {
            binding.bind(symbol, extent - offset)?;
        }
    }
    Ok(())
}

pub(super) fn unknown(kind: &'static str, name: &str, entries: &[InterfaceEntry]) -> SessionError {
    let nearest = nearest_name(name, entries.iter().map(|e| e.name.as_str())).map(str::to_owned);
    SessionError::UnknownName { kind, name: name.to_owned(), nearest }
}
