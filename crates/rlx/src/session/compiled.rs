//! A compiled graph: its template, weights, specialisations and reports.

use super::context::RunContext;
use super::error::SessionError;
use super::report::{CompileReport, StepReport};
use super::value::TensorArg;
use crate::backend::{Backend, Program};
use crate::memory::{MemoryEstimate, estimate_with};
use crate::plan::{InterfaceEntry, Lir, Template};
use crate::weights::{WeightKind, WeightRegistry};
use rlx_graph::Graph;
use rlx_graph::interpret::nearest_name;
use rlx_graph::passes::PassReport;
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::{DType, DimBinding, Shape, Tensor, byte_count};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Specialisations kept by [`CompiledGraph::run`].
const SPECIALISATIONS: usize = 8;

/// A graph compiled for one device. Cheap to share: `&self` everywhere.
pub struct CompiledGraph {
    backend: Arc<dyn Backend>,
    weights: Arc<WeightRegistry>,
    template: Arc<Template>,
    graph: Graph,
    passes: PassReport,
    compile_micros: u64,
    program: Mutex<Option<Arc<dyn Program>>>,
    recent: Mutex<VecDeque<RunContext>>,
    verify: Option<Box<VerifyWeights>>,
}

/// Is asked before a program reads weights.
type VerifyWeights = dyn Fn() -> Result<(), SessionError> + Send + Sync;

/// Buffers that survive runs: KV caches. Owned by the caller, usable by every specialisation of one template.
#[derive(Debug)]
pub struct State {
    pub(super) buffers: Vec<AlignedBytes>,
    pub(super) dims: Vec<Vec<usize>>,
}

impl State {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        self.buffers.iter().map(AlignedBytes::len).sum()
    }

    /// A buffer's bytes, by position in declaration order.
    pub fn buffer(&self, index: usize) -> Option<&[u8]> {
        self.buffers.get(index).map(AlignedBytes::as_slice)
    }

    /// As [`State::buffer`], to be written: the content of a cache saved earlier.
    pub fn buffer_mut(&mut self, index: usize) -> Option<&mut [u8]> {
        self.buffers.get_mut(index).map(AlignedBytes::as_mut_slice)
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
        graph: Graph,
        passes: PassReport,
        compile_micros: u64,
    ) -> Self {
        let (program, recent) = (Mutex::new(None), Mutex::new(VecDeque::new()));
        Self { backend, weights, template, graph, passes, compile_micros, program, recent, verify: None }
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

    /// The optimised, legal graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
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
    pub(super) fn check_weights(&self, required: bool) -> Result<(), SessionError> {
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
        let Some(param) = self.template.params().iter().find(|p| p.name == name) else {
            return Err(unknown("param", name, self.template.params()));
        };
        let expected = param.shape.dtype();
        if dtype != expected {
            return Err(SessionError::DType { name: name.to_owned(), expected, found: dtype });
        }
        let need = param.shape.known_dims().and_then(|dims| byte_count(&dims, dtype));
        if need != Some(bytes.len()) {
            let (expected, found) = (param.shape.to_string(), format!("{} bytes", bytes.len()));
            return Err(SessionError::Shape { name: name.to_owned(), expected, found });
        }
        let shared: Arc<[u8]> = Arc::from(bytes);
        match self.weights.lookup(name) {
            Some(handle) => {
                self.weights.replace(handle, param.shape.clone(), shared)?;
            }
            None => {
                self.weights.register(name, param.shape.clone(), shared, WeightKind::Base)?;
            }
        }
        *lock(&self.program) = None;
        lock(&self.recent).clear();
        Ok(())
    }

    /// The program: steps bound to kernels and weights, made at first use.
    pub fn program(&self) -> Result<Arc<dyn Program>, SessionError> {
        let mut program = lock(&self.program);
        if let Some(program) = &*program {
            return Ok(Arc::clone(program));
        }
        self.check_weights(true)?;
        if let Some(verify) = &self.verify {
            verify()?;
        }
        let loaded = self.backend.load(&self.template, &self.weights)?;
        *program = Some(Arc::clone(&loaded));
        Ok(loaded)
    }

    /// Whether the program is made, so that the weights are in memory.
    pub fn is_loaded(&self) -> bool {
        lock(&self.program).is_some()
    }

    /// Binds capacities and places memory.
    pub fn specialize(&self, binding: &DimBinding) -> Result<Lir, SessionError> {
        Ok(self.template.specialize(binding)?)
    }

    /// Memory for runs under a specialisation's capacities: reusable, one run at a time.
    pub fn context(&self, lir: &Lir) -> Result<RunContext, SessionError> {
        RunContext::new(self.program()?, lir)
    }

    /// Zeroed state buffers for these capacities. Symbols that no state uses need no value.
    pub fn new_state(&self, binding: &DimBinding) -> Result<State, SessionError> {
        let mut state = State { buffers: Vec::new(), dims: Vec::new() };
        for entry in self.template.states() {
            let dims = entry.shape.eval(binding)?;
            let bytes = byte_count(&dims, entry.shape.dtype()).filter(|&b| isize::try_from(b).is_ok());
            let bytes = bytes.ok_or_else(|| SessionError::State {
                reason: format!("{} of {dims:?} takes more bytes than can be addressed", entry.name),
            })?;
            let buffer = AlignedBytes::try_zeroed(bytes).ok_or_else(|| SessionError::State {
                reason: format!("the system refuses {bytes} bytes for {} of {dims:?}", entry.name),
            })?;
            state.buffers.push(buffer);
            state.dims.push(dims);
        }
        Ok(state)
    }

    /// Runs once on fresh state and returns the outputs. Specialises to the inputs' extents as needed, and keeps the last few.
    pub fn run(&self, inputs: &[(&str, TensorArg<'_>)]) -> Result<Vec<(String, Tensor)>, SessionError> {
        self.run_with(&mut State { buffers: Vec::new(), dims: Vec::new() }, inputs)
    }

    /// Runs once on the caller's state. An empty state is filled with fresh buffers if the inputs determine their size.
    pub fn run_with(
        &self,
        state: &mut State,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Vec<(String, Tensor)>, SessionError> {
        let symbols = self.bind_inputs(state, inputs)?;
        if state.buffers.is_empty() && !self.template.states().is_empty() {
            *state = self.new_state(&symbols)?;
        }
        let mut context = self.take_context(&symbols)?;
        let outputs = context.run(state, inputs)?;
        let mut recent = lock(&self.recent);
        recent.push_back(context);
        if recent.len() > SPECIALISATIONS {
            recent.pop_front();
        }
        Ok(outputs)
    }

    /// A kept context whose capacities cover these sizes, or a new one for exactly them.
    fn take_context(&self, symbols: &DimBinding) -> Result<RunContext, SessionError> {
        let mut recent = lock(&self.recent);
        if let Some(at) = recent.iter().position(|c| c.covers(symbols)) {
            return recent.remove(at).map_or_else(|| self.context(&self.specialize(symbols)?), Ok);
        }
        drop(recent);
        self.context(&self.specialize(symbols)?)
    }

    pub(super) fn bind_inputs(
        &self,
        state: &State,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<DimBinding, SessionError> {
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
            fusions: self.passes.trace.tally(),
            decomposed: self.passes.dispatch.decomposed.clone(),
            checks: template.checks().map(|(l, r, node)| format!("{l} = {r} for {node}")).collect(),
            steps: steps.collect(),
            passes: self.passes.clone(),
            compile_micros: self.compile_micros,
        })
    }

    /// The peak of memory of runs under these capacities, weights included. No weight is read.
    ///
    /// # Errors
    /// As [`CompiledGraph::specialize`].
    pub fn estimate(&self, binding: &DimBinding) -> Result<MemoryEstimate, SessionError> {
        estimate_with(&self.specialize(binding)?, &*self.backend, &self.weights)
    }
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
