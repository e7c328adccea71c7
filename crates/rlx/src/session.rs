//! Compile a graph for a device and run it.

mod compare;
mod compiled;
mod context;
mod control;
mod error;
mod report;
mod trace;
mod value;

pub(crate) use compare::rounding;
pub use compare::{Comparison, StepDifference, tap_name};
pub use compiled::{CompiledGraph, State};
pub(crate) use compiled::{check_param, set_weight};
pub use context::RunContext;
pub use control::CancelToken;
pub use error::SessionError;
pub use report::{CompileReport, ReportTable, StepReport, StepWork};
pub use trace::StepTimes;
pub use value::TensorArg;

use crate::aot::AotCache;
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, BackendError, BackendRegistry};
use crate::config::Config;
use crate::devices::DeviceId;
use crate::plan::{InterfaceEntry, Lir, Template};
use crate::weights::WeightRegistry;
use rlx_graph::passes::{PassOptions, PassReport, compile_passes};
use rlx_graph::{Graph, HirModule, ValueId};
use rlx_kernels::isa::Isa;
use rlx_kernels::pool::default_threads;
use rlx_tensor::Shape;
use rlx_tensor::time::Instant;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

/// A device with the weights its executables share.
#[derive(Clone)]
pub struct Session {
    backend: Arc<dyn Backend>,
    weights: Arc<WeightRegistry>,
}

/// What may be chosen when a graph is compiled.
#[derive(Debug, Clone, Default)]
pub struct CompileOptions {
    /// Passes to skip, folding limit, verification.
    pub passes: PassOptions,
    /// Every param must be in the session's registry when the graph is compiled; else it may be set later.
    pub weights_required: bool,
}

/// The CPU with these choices; what is not chosen is as the process's settings say, else the best of this machine.
///
/// # Errors
/// [`SessionError::Isa`] for an instruction set the machine lacks, [`SessionError::Config`] for a setting that does not parse.
pub fn cpu_backend(isa: Option<Isa>, threads: Option<usize>) -> Result<CpuBackend, SessionError> {
    let mut config = Config::global()?.clone();
    config.isa = isa.or(config.isa);
    config.threads = threads.and_then(NonZeroUsize::new).or(config.threads);
    cpu_backend_of(&config)
}

/// The CPU as a config says.
pub(crate) fn cpu_backend_of(config: &Config) -> Result<CpuBackend, SessionError> {
    let isa = config.isa.unwrap_or_else(Isa::detect);
    if !isa.is_available() {
        return Err(SessionError::Isa { isa });
    }
    let threads = config.threads.map(NonZeroUsize::get);
    let backend = CpuBackend::new(isa, threads.unwrap_or_else(|| default_threads(Path::new("/"))));
    let backend = backend.with_precision(config.precision.unwrap_or_default());
    Ok(match AotCache::from_config(config) {
        Some(cache) => backend.with_cache(cache),
        None => backend,
    })
}

impl Session {
    /// A session on a device, set up as the process's settings say (threads, instruction set), with a registry of its own. The
    /// device's backend is one of this crate or one that [`crate::backend::register_backend`] added.
    ///
    /// ```
    /// use rlx::devices::Device;
    /// let session = rlx::Session::new(Device::Cpu)?;
    /// # Ok::<(), rlx::SessionError>(())
    /// ```
    ///
    /// # Errors
    /// [`SessionError::Device`] for a device this build has no backend for or the machine lacks, [`SessionError::Isa`] for an
    /// instruction set the machine lacks, [`SessionError::Config`] for a setting that does not parse.
    pub fn new(device: impl Into<DeviceId>) -> Result<Self, SessionError> {
        Self::open(device, BackendRegistry::global(), Config::global()?)
    }

    /// As [`Session::new`], with the backends and the settings given.
    ///
    /// # Errors
    /// As [`Session::new`].
    pub fn open(
        device: impl Into<DeviceId>,
        backends: &BackendRegistry,
        config: &Config,
    ) -> Result<Self, SessionError> {
        Ok(Self::with_backend(backends.open(device.into(), config)?))
    }

    /// A session on a backend, with a registry of its own.
    pub fn with_backend(backend: Arc<dyn Backend>) -> Self {
        Self { backend, weights: Arc::new(WeightRegistry::new()) }
    }

    /// The same device with another registry; params bind from it by name.
    #[must_use]
    pub fn with_weights(mut self, weights: Arc<WeightRegistry>) -> Self {
        self.weights = weights;
        self
    }

    /// The device.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The registry that params bind from.
    pub fn weights(&self) -> &Arc<WeightRegistry> {
        &self.weights
    }

    /// Compiles a graph with default options.
    pub fn compile(&self, graph: &Graph) -> Result<CompiledGraph, SessionError> {
        self.compile_with(graph, &CompileOptions::default())
    }

    /// Optimises the graph, makes it legal for the device, plans it and checks its params against the registry.
    ///
    /// # Errors
    /// [`SessionError::Weights`] lists every param whose value is missing (if required) or of another shape or dtype.
    pub fn compile_with(
        &self,
        graph: &Graph,
        options: &CompileOptions,
    ) -> Result<CompiledGraph, SessionError> {
        let started = Instant::now();
        let (legal, passes) = compile_passes(graph, self.backend.target(), &options.passes)?;
        let template = Arc::new(Template::build(&legal, self.backend.plan_target())?);
        let compile_micros = started.elapsed().as_micros() as u64;
        self.bind(template, Some(legal), passes, compile_micros, options)
    }

    /// Compiles what a builder of blocks holds.
    ///
    /// # Errors
    /// As [`Session::compile_with`]; [`SessionError::Graph`] for outputs that are no values of the module.
    pub fn compile_hir(
        &self,
        module: HirModule,
        outputs: &[(&str, ValueId)],
        options: &CompileOptions,
    ) -> Result<CompiledGraph, SessionError> {
        self.compile_with(&module.finish(outputs)?, options)
    }

    /// An executable of a plan that was made before, for a device like this one: no pass runs. The plan goes through the verifier, and
    /// the device is asked for every step. It keeps no graph, so it cannot be tapped or compared.
    ///
    /// # Errors
    /// [`SessionError::BrokenPlan`], [`SessionError::Backend`] for a step that the device does not run, [`SessionError::Weights`].
    pub fn compile_lir(&self, lir: &Lir, options: &CompileOptions) -> Result<CompiledGraph, SessionError> {
        lir.verify().map_err(|broken| SessionError::BrokenPlan { reason: broken.to_string() })?;
        let template = lir.template();
        for step in template.steps() {
            let shapes = |places: &[crate::plan::Place]| places.iter().map(|p| template.shape(p)).collect();
            let (inputs, outputs): (Vec<_>, Vec<_>) = (shapes(&step.inputs), shapes(&step.outputs));
            let (inputs, outputs): (Vec<_>, Vec<_>) = (inputs.iter().collect(), outputs.iter().collect());
            if !self.backend.target().runs(step.op.def(), &inputs, &outputs) {
                return Err(BackendError::Unsupported {
                    op: step.op.def().name().to_owned(),
                    location: step.location.clone(),
                    reason: format!("{} does not run it in this form", self.backend.name()),
                }
                .into());
            }
        }
        self.bind(Arc::clone(template), None, PassReport::default(), 0, options)
    }

    /// The executable of a plan that was made of this graph with these options, and kept: no pass runs until somebody asks for what the
    /// passes did.
    ///
    /// # Errors
    /// As [`Session::compile_lir`]; [`SessionError::BrokenPlan`] for a plan of another interface.
    pub(crate) fn compile_plan(
        &self,
        lir: &Lir,
        graph: &Graph,
        options: &CompileOptions,
    ) -> Result<CompiledGraph, SessionError> {
        let started = Instant::now();
        let template = lir.template();
        let has = |entries: &[InterfaceEntry], name: Option<&str>, shape: &Shape| {
            entries.iter().any(|entry| Some(entry.name.as_str()) == name && entry.shape == *shape)
        };
        let inputs =
            graph.inputs().map(|(_, value)| (template.inputs(), value.name.as_deref(), &value.shape));
        let states =
            graph.states().map(|(_, value)| (template.states(), value.name.as_deref(), &value.shape));
        let outputs = graph.outputs();
        let outputs =
            outputs.iter().map(|(name, id)| (template.outputs(), Some(name.as_str()), graph.shape(*id)));
        if let Some((_, name, shape)) =
            inputs.chain(states).chain(outputs).find(|(entries, name, shape)| !has(entries, *name, shape))
        {
            let reason = format!("it has no {:?} of {shape}", name.unwrap_or_default());
            return Err(SessionError::BrokenPlan { reason });
        }
        let compiled = self.compile_lir(lir, options)?;
        let compile_micros = started.elapsed().as_micros() as u64;
        Ok(compiled.planned_from(graph.clone(), options.passes.clone(), compile_micros))
    }

    /// The one way in to an executable: what every entry point ends in.
    fn bind(
        &self,
        template: Arc<Template>,
        graph: Option<Graph>,
        passes: PassReport,
        compile_micros: u64,
        options: &CompileOptions,
    ) -> Result<CompiledGraph, SessionError> {
        let (backend, weights) = (Arc::clone(&self.backend), Arc::clone(&self.weights));
        let compiled = CompiledGraph::new(backend, weights, template, graph, passes, compile_micros);
        compiled.check_weights(options.weights_required)?;
        Ok(compiled)
    }

    /// A graph that was compiled before: its template and what it was made of. All params must be in the registry.
    ///
    /// # Errors
    /// [`SessionError::Weights`].
    pub fn adopt(&self, template: Arc<Template>, graph: Graph) -> Result<CompiledGraph, SessionError> {
        let (backend, weights) = (Arc::clone(&self.backend), Arc::clone(&self.weights));
        let compiled = CompiledGraph::new(backend, weights, template, Some(graph), PassReport::default(), 0);
        compiled.check_weights(true)?;
        Ok(compiled)
    }
}

#[cfg(test)]
pub(crate) mod contract;
#[cfg(test)]
mod tests;
