//! Compile a graph for a device and run it.

mod compare;
mod compiled;
mod context;
mod error;
mod report;
mod trace;
mod value;

pub use compare::{Comparison, StepDifference, tap_name};
pub use compiled::{CompiledGraph, State};
pub use context::RunContext;
pub use error::SessionError;
pub use report::{CompileReport, ReportTable, StepReport, StepWork};
pub use trace::StepTimes;
pub use value::TensorArg;

use crate::aot::AotCache;
use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::config::Config;
use crate::devices::DeviceId;
use crate::plan::Template;
use crate::weights::WeightRegistry;
use rlx_graph::Graph;
use rlx_graph::passes::{PassOptions, PassReport, compile_passes};
use rlx_kernels::isa::Isa;
use rlx_kernels::pool::default_threads;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

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
    let config = Config::global()?;
    let isa = isa.or(config.isa).unwrap_or_else(Isa::detect);
    if !isa.is_available() {
        return Err(SessionError::Isa { isa });
    }
    let threads = threads.or(config.threads.map(NonZeroUsize::get));
    let backend = CpuBackend::new(isa, threads.unwrap_or_else(|| default_threads(Path::new("/"))));
    Ok(match AotCache::from_config(config) {
        Some(cache) => backend.with_cache(cache),
        None => backend,
    })
}

impl Session {
    /// A session on a device, set up as the process's settings say (threads, instruction set), with a registry of its own.
    ///
    /// ```
    /// use rlx::devices::Device;
    /// let session = rlx::Session::new(Device::Cpu)?;
    /// # Ok::<(), rlx::SessionError>(())
    /// ```
    ///
    /// # Errors
    /// [`SessionError::NoBackend`] for a device this build has no backend for, [`SessionError::Isa`] for an instruction set the
    /// machine lacks, [`SessionError::Config`] for a setting that does not parse.
    pub fn new(device: impl Into<DeviceId>) -> Result<Self, SessionError> {
        let device = device.into();
        if device != DeviceId::CPU {
            return Err(SessionError::NoBackend { device });
        }
        Ok(Self::with_backend(Arc::new(cpu_backend(None, None)?)))
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
        let compiled = CompiledGraph::new(
            Arc::clone(&self.backend),
            Arc::clone(&self.weights),
            template,
            legal,
            passes,
            compile_micros,
        );
        compiled.check_weights(options.weights_required)?;
        Ok(compiled)
    }

    /// A graph that was compiled before: its template and what it was made of. All params must be in the registry.
    ///
    /// # Errors
    /// [`SessionError::Weights`].
    pub fn adopt(&self, template: Arc<Template>, graph: Graph) -> Result<CompiledGraph, SessionError> {
        let (backend, weights) = (Arc::clone(&self.backend), Arc::clone(&self.weights));
        let compiled = CompiledGraph::new(backend, weights, template, graph, PassReport::default(), 0);
        compiled.check_weights(true)?;
        Ok(compiled)
    }
}

#[cfg(test)]
mod tests;
