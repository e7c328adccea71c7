//! What a device offers, and the backend over it: plans of launches, one arena for each run in flight, weights uploaded once.

#![forbid(unsafe_code)]

mod layout;
mod words;

use crate::ir::{Binding, Kernel, Placement};
use crate::lower::{Extents, Guard, Launch, LowerCx, find, is_weight};
use layout::Layout;
pub(crate) use layout::buffer_dtypes;
use rlx::backend::{Backend, BackendError, Context, Io, KernelChoice, Program};
use rlx::plan::{BufferId, BufferKind, InterfaceEntry, Lir, PlanError, PlanTarget, Template};
use rlx::weights::{WeightHandle, WeightRegistry};
use rlx_graph::passes::Target;
use rlx_graph::{Op, OpDef};
use rlx_kernels::schedule::{FrameError, RunControl, StepError};
use rlx_tensor::time::Instant;
use rlx_tensor::{DType, Shape, Symbol};
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A kernel to be run: which of the prepared ones, on which weights, with which arguments.
#[derive(Debug)]
pub(crate) struct Dispatch<'r, W> {
    pub kernel: usize,
    pub arguments: Vec<i32>,
    pub weights: Vec<&'r W>,
    pub programs: usize,
}

/// One run: words to write, kernels in order, ranges to read.
#[derive(Debug)]
pub(crate) struct Job<'r, W> {
    pub uploads: Vec<(usize, Vec<u32>)>,
    pub dispatches: Vec<Dispatch<'r, W>>,
    /// Offset and count of words, in the order of what comes back.
    pub downloads: Vec<(usize, usize)>,
}

/// A device, or what stands for one.
pub(crate) trait Driver: Send + Sync + 'static {
    /// Words that stay on the device.
    type Weight: Send + Sync;
    /// Kernels ready to run.
    type Kernels: Send + Sync;
    /// The arena of a run.
    type Memory: Send;

    /// The name in reports.
    fn name(&self) -> String;
    /// What it can do, in words.
    fn capabilities(&self) -> Vec<String>;
    /// What decides results and speed.
    fn fingerprint(&self) -> String;
    /// Words that one binding may have.
    fn binding_words(&self) -> usize;
    /// Uploads a weight.
    fn weight(&self, name: &str, words: &[u32]) -> Result<Self::Weight, BackendError>;
    /// Compiles kernels.
    fn prepare(&self, kernels: &[Arc<Kernel>]) -> Result<Self::Kernels, BackendError>;
    /// An arena of so many words.
    fn memory(&self, words: usize) -> Result<Self::Memory, BackendError>;
    /// Runs a job; the words read, range by range.
    fn run(
        &self,
        kernels: &Self::Kernels,
        memory: &mut Self::Memory,
        job: &Job<'_, Self::Weight>,
    ) -> Result<Vec<Vec<u32>>, BackendError>;
}

type Uploaded<W> = HashMap<(WeightHandle, u64), Weak<W>>;

/// The backend over a device.
pub(crate) struct DeviceBackend<D: Driver> {
    driver: Arc<D>,
    name: String,
    uploaded: Mutex<Uploaded<D::Weight>>,
}

impl<D: Driver> DeviceBackend<D> {
    pub fn new(driver: D) -> Self {
        let name = driver.name();
        Self { driver: Arc::new(driver), name, uploaded: Mutex::new(HashMap::new()) }
    }
}

struct DeviceTarget;

impl Target for DeviceTarget {
    fn name(&self) -> &str {
        "gpu"
    }

    fn runs(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        find(op.name()).is_some_and(|entry| entry.supports(op, inputs, outputs))
    }
}

impl PlanTarget for DeviceTarget {
    fn accepts_strided(&self, op: &Op, _operand: usize) -> bool {
        find(op.def().name()).is_some()
    }

    /// Elements of narrow dtypes are wider on a device, so a buffer of as many bytes need not hold as many elements.
    fn accepts_in_place(&self, _op: &Op, _operand: Option<usize>, _result: &Shape) -> bool {
        false
    }
}

/// A template's launches.
struct Plan {
    launches: Vec<Launch>,
    guards: Vec<Guard>,
    /// For each launch its kernel's position among the kernels.
    kernel_of: Vec<usize>,
    kernels: Vec<Arc<Kernel>>,
    dtypes: Vec<Option<DType>>,
}

impl Plan {
    fn new(template: &Template) -> Result<Self, BackendError> {
        let mut cx = LowerCx::new(template);
        for (at, step) in template.steps().iter().enumerate() {
            cx.lower(at, step)?;
        }
        let kernels = cx.kernels();
        let position =
            |l: &Launch| kernels.iter().position(|k| Arc::ptr_eq(k, &l.kernel)).unwrap_or_default();
        let kernel_of = cx.launches.iter().map(position).collect();
        let dtypes = buffer_dtypes(template)?;
        Ok(Plan { kernel_of, kernels, dtypes, launches: cx.launches, guards: cx.guards })
    }
}

impl<D: Driver> Backend for DeviceBackend<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn fingerprint(&self) -> String {
        self.driver.fingerprint()
    }

    fn capabilities(&self) -> Vec<String> {
        self.driver.capabilities()
    }

    fn target(&self) -> &dyn Target {
        &DeviceTarget
    }

    fn plan_target(&self) -> &dyn PlanTarget {
        &DeviceTarget
    }

    /// None: a weight keeps its size on the device.
    fn packed_bytes(&self, _template: &Template) -> Result<usize, BackendError> {
        Ok(0)
    }

    fn workspace_bytes(&self, lir: &Lir) -> Result<usize, BackendError> {
        let plan = Plan::new(lir.template())?;
        let layout = Layout::new(lir, &plan.dtypes, plan.guards.len());
        Ok((layout.words * 4).saturating_sub(lir.arena_bytes()))
    }

    fn load(
        &self,
        template: &Arc<Template>,
        weights: &WeightRegistry,
    ) -> Result<Arc<dyn Program>, BackendError> {
        let plan = Plan::new(template)?;
        let mut bound: Vec<Option<Arc<D::Weight>>> = vec![None; template.buffers().len()];
        for launch in &plan.launches {
            for &buffer in &launch.weights {
                if bound[buffer.index()].is_none() {
                    bound[buffer.index()] = Some(self.weight(template, buffer, weights)?);
                }
            }
        }
        let prepared = self.driver.prepare(&plan.kernels)?;
        let (driver, template) = (Arc::clone(&self.driver), Arc::clone(template));
        Ok(Arc::new(DeviceProgram(Arc::new(Loaded { driver, template, plan, prepared, weights: bound }))))
    }
}

impl<D: Driver> DeviceBackend<D> {
    /// A param or large constant on the device; uploaded if no program holds this version of it.
    fn weight(
        &self,
        template: &Template,
        buffer: BufferId,
        weights: &WeightRegistry,
    ) -> Result<Arc<D::Weight>, BackendError> {
        let at = match &template.buffers()[buffer.index()].kind {
            BufferKind::Param(at) => *at,
            BufferKind::Const(tensor) => {
                let words = words::packed("a constant", tensor.dtype(), tensor.bytes())?;
                return Ok(Arc::new(self.upload("a constant", &words)?));
            }
            _ => return Err(BackendError::Unset { name: buffer.to_string() }),
        };
        let param = &template.params()[at];
        let name = &param.name;
        let handle = weights.lookup(name).ok_or_else(|| BackendError::Unset { name: name.clone() })?;
        let guard = weights.guard(handle)?;
        let key = (handle, guard.entry().version());
        let known = |uploaded: &Uploaded<D::Weight>| uploaded.get(&key).and_then(Weak::upgrade);
        let lock = || self.uploaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(weight) = known(&lock()) {
            return Ok(weight);
        }
        let words = words::packed(name, param.shape.dtype(), guard.bytes())?;
        let weight = Arc::new(self.upload(name, &words)?);
        let mut uploaded = lock();
        uploaded.retain(|_, weight| weight.strong_count() > 0);
        uploaded.insert(key, Arc::downgrade(&weight));
        Ok(weight)
    }

    fn upload(&self, name: &str, words: &[u32]) -> Result<D::Weight, BackendError> {
        check_binding(&*self.driver, words.len(), name)?;
        self.driver.weight(name, words)
    }
}

fn check_binding<D: Driver>(driver: &D, words: usize, what: &str) -> Result<(), BackendError> {
    let limit = driver.binding_words();
    if words <= limit {
        return Ok(());
    }
    let what =
        format!("{what} in one binding, of at most {} bytes on {}", limit.saturating_mul(4), driver.name());
    Err(BackendError::OutOfMemory { bytes: words as u64 * 4, what })
}

/// What every context of a program shares.
struct Loaded<D: Driver> {
    driver: Arc<D>,
    template: Arc<Template>,
    plan: Plan,
    prepared: D::Kernels,
    weights: Vec<Option<Arc<D::Weight>>>,
}

struct DeviceProgram<D: Driver>(Arc<Loaded<D>>);

impl<D: Driver> fmt::Debug for DeviceProgram<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceProgram({} on {})", self.0.template.name(), self.0.driver.name())
    }
}

impl<D: Driver> Program for DeviceProgram<D> {
    fn context(&self, lir: &Lir) -> Result<Box<dyn Context>, BackendError> {
        let loaded = Arc::clone(&self.0);
        let layout = Layout::new(lir, &loaded.plan.dtypes, loaded.plan.guards.len());
        check_binding(&*loaded.driver, layout.words, "the arena of a run")?;
        let memory = loaded.driver.memory(layout.words)?;
        let (capacities, sizes) = (lir.capacities().to_vec(), Vec::new());
        let arena = lir.arena_bytes();
        Ok(Box::new(DeviceContext { loaded, layout, memory, capacities, sizes, arena }))
    }

    fn kernels(&self) -> Vec<KernelChoice> {
        let of = |step: usize| {
            let own = self.0.plan.launches.iter().filter(move |l| l.step == step);
            own.map(|l| l.kernel.name.clone()).collect::<Vec<_>>()
        };
        let steps = 0..self.0.template.steps().len();
        steps.map(|step| KernelChoice { kernel: of(step).join(" + "), native: true }).collect()
    }
}

struct DeviceContext<D: Driver> {
    loaded: Arc<Loaded<D>>,
    layout: Layout,
    memory: D::Memory,
    capacities: Vec<usize>,
    sizes: Vec<usize>,
    arena: usize,
}

impl<D: Driver> fmt::Debug for DeviceContext<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceContext({} words)", self.layout.words)
    }
}

fn stop(control: &RunControl<'_>) -> Result<(), BackendError> {
    if control.cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
        return Err(BackendError::Step(StepError::Cancelled));
    }
    match control.deadline.is_some_and(|d| Instant::now() >= d) {
        true => Err(BackendError::Step(StepError::DeadlinePassed)),
        false => Ok(()),
    }
}

impl<D: Driver> DeviceContext<D> {
    /// Every launch with what its arguments are in this run, checked against the buffers it reaches into.
    fn dispatches<'l>(
        &self,
        loaded: &'l Loaded<D>,
        symbols: &[usize],
    ) -> Result<Vec<Dispatch<'l, D::Weight>>, BackendError> {
        let table = loaded.template.sizes();
        let symbol = |s: &Symbol| table.symbol_index(s).map(|i| symbols[i]);
        let run = Extents { sizes: &self.sizes, symbol: &symbol };
        let mut dispatches = Vec::with_capacity(loaded.plan.launches.len());
        for (launch, &kernel) in loaded.plan.launches.iter().zip(&loaded.plan.kernel_of) {
            let step = &loaded.template.steps()[launch.step];
            let refuse = |reason: &str| BackendError::Unsupported {
                op: step.op.def().name().to_owned(),
                location: step.location.clone(),
                reason: format!("{}: {reason}", launch.kernel.name),
            };
            let too_large = || refuse("a size exceeds what a device's integers hold");
            let programs = launch.programs.eval(&run).ok_or_else(too_large)?;
            if programs == 0 {
                continue;
            }
            let sizes: Option<Vec<usize>> = launch.sizes.iter().map(|a| a.eval(&run)).collect();
            let mut places = Vec::with_capacity(launch.views.len());
            for source in &launch.views {
                let own = self.layout.offset(source.buffer);
                let base = source.base.eval(&run).and_then(|b| b.checked_add(own)).ok_or_else(too_large)?;
                let strides: Option<Vec<usize>> = source.strides.iter().map(|s| s.eval(&run)).collect();
                places.push(Placement { base, strides: strides.ok_or_else(too_large)? });
            }
            let arguments = launch.kernel.arguments(&sizes.ok_or_else(too_large)?, &places);
            let arguments = arguments.ok_or_else(too_large)?;
            for (view, source) in launch.kernel.views.iter().zip(&launch.views) {
                let end = match view.binding {
                    Binding::Arena => self.layout.end(source.buffer),
                    Binding::Weight(_) => self.layout.elements(source.buffer),
                };
                if launch.kernel.reach(view, &arguments) > end as u64 {
                    return Err(refuse("a view reaches beyond its buffer"));
                }
            }
            let weights =
                launch.weights.iter().filter_map(|b| loaded.weights[b.index()].as_deref()).collect();
            dispatches.push(Dispatch { kernel, arguments, weights, programs });
        }
        Ok(dispatches)
    }

    /// What a run writes before its first kernel.
    fn uploads(&self, io: &Io<'_, '_>) -> Result<Vec<(usize, Vec<u32>)>, BackendError> {
        let template = &self.loaded.template;
        let mut uploads = vec![(0, vec![0; self.layout.guards])];
        for (id, buffer) in template.buffer_ids() {
            let (Some(dtype), Some(at)) = (self.loaded.plan.dtypes[id.index()], self.layout.placed(id))
            else {
                continue;
            };
            let words = match &buffer.kind {
                BufferKind::Input(i) => words::widened(&template.inputs()[*i].name, dtype, io.inputs[*i])?,
                BufferKind::State(i) => {
                    words::widened(&template.states()[*i].name, dtype, io.states[*i].as_slice())?
                }
                BufferKind::Const(tensor) if !is_weight(template, id) => {
                    words::widened("a constant", dtype, tensor.bytes())?
                }
                _ => continue,
            };
            uploads.push((at, words));
        }
        Ok(uploads)
    }
}

impl<D: Driver> Context for DeviceContext<D> {
    fn run(&mut self, io: Io<'_, '_>) -> Result<(), BackendError> {
        stop(&io.control)?;
        let loaded = Arc::clone(&self.loaded);
        let template = &loaded.template;
        template.sizes().eval(io.symbols, &mut self.sizes).map_err(PlanError::from)?;
        for (index, (&value, &capacity)) in self.sizes.iter().zip(&self.capacities).enumerate() {
            if value > capacity {
                return Err(FrameError::AboveCapacity { index, value, capacity }.into());
            }
        }
        let uploads = self.uploads(&io)?;
        let dispatches = self.dispatches(&loaded, io.symbols)?;
        let mut downloads = vec![(0, self.layout.guards)];
        let range = |entry: &InterfaceEntry, bytes: usize| {
            let (dtype, buffer) = (entry.place.dtype, entry.place.buffer);
            (self.layout.offset(buffer), bytes / dtype.element_bytes().unwrap_or(1))
        };
        let outputs = template.outputs().iter().zip(io.outputs.iter());
        downloads.extend(outputs.map(|(entry, bytes)| range(entry, bytes.len())));
        let states = template.states().iter().zip(io.states.iter());
        let states = states.filter(|(entry, _)| self.layout.placed(entry.place.buffer).is_some());
        downloads.extend(states.map(|(entry, bytes)| range(entry, bytes.as_slice().len())));
        let job = Job { uploads, dispatches, downloads };
        let read = loaded.driver.run(&loaded.prepared, &mut self.memory, &job)?;
        let mut read = read.into_iter();
        let failed = read.next().unwrap_or_default();
        if let Some((guard, _)) = loaded.plan.guards.iter().zip(failed).find(|(_, word)| *word != 0) {
            let step = &template.steps()[guard.step];
            let step = format!("{} at {}", step.op.def().name(), step.location);
            return Err(BackendError::Step(StepError::Value { step, reason: guard.reason.to_owned() }));
        }
        stop(&io.control)?;
        for (entry, bytes) in template.outputs().iter().zip(io.outputs.iter_mut()) {
            words::narrowed(entry.place.dtype, &read.next().unwrap_or_default(), bytes);
        }
        for (entry, state) in template.states().iter().zip(io.states.iter_mut()) {
            if self.layout.placed(entry.place.buffer).is_some() {
                words::narrowed(entry.place.dtype, &read.next().unwrap_or_default(), state.as_mut_slice());
            }
        }
        Ok(())
    }

    fn bytes(&self) -> (usize, usize) {
        (self.arena, (self.layout.words * 4).saturating_sub(self.arena))
    }
}
