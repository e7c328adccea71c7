//! Devices that run templates: one trait for all, a folder each.

pub mod cpu;
pub mod reference;

use crate::plan::{Lir, PlanTarget, Template};
use crate::weights::{RegistryError, WeightRegistry};
use rlx_graph::EvalError;
use rlx_graph::passes::Target;
use rlx_kernels::schedule::{FrameError, RunControl, StepError};
use rlx_tensor::storage::AlignedBytes;
use std::fmt;
use std::sync::Arc;

/// A device family that can run templates.
pub trait Backend: Send + Sync {
    /// The name in reports.
    fn name(&self) -> &str;

    /// What legalisation may leave in a graph for this backend.
    fn target(&self) -> &dyn Target;

    /// What the planner must know.
    fn plan_target(&self) -> &dyn PlanTarget;

    /// Bytes of the copies of weights this backend makes for a template, from shapes alone.
    fn packed_bytes(&self, template: &Template) -> Result<usize, BackendError>;

    /// Scratch bytes of a run of a specialised template.
    fn workspace_bytes(&self, lir: &Lir) -> Result<usize, BackendError>;

    /// The layers of a template that have experts: how many, and the bytes of one in memory.
    fn expert_layers(&self, template: &Template) -> Vec<ExpertLayer> {
        let _ = template;
        Vec::new()
    }

    /// Binds a template's steps to kernels and weights.
    fn load(
        &self,
        template: &Arc<Template>,
        weights: &WeightRegistry,
    ) -> Result<Arc<dyn Program>, BackendError>;
}

/// A layer with experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertLayer {
    /// Number of experts.
    pub experts: usize,
    /// Bytes of one in memory, in the layout of the kernels.
    pub expert_bytes: u64,
}

/// A template bound to kernels and weights: immutable, shared by every specialisation and every run.
pub trait Program: Send + Sync + fmt::Debug {
    /// The memory of one run in flight under a specialisation's capacities.
    fn context(&self, lir: &Lir) -> Result<Box<dyn Context>, BackendError>;

    /// The kernel of each step, in order.
    fn kernels(&self) -> Vec<KernelChoice>;
}

/// How a step is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelChoice {
    /// The kernel's name, as its family's table spells it.
    pub kernel: String,
    /// False if the step runs by the reference evaluation, for want of a kernel.
    pub native: bool,
}

/// The memory of one run in flight.
pub trait Context: Send + fmt::Debug {
    /// Executes the program once.
    fn run(&mut self, io: Io<'_, '_>) -> Result<(), BackendError>;

    /// `(arena, scratch)` bytes it holds.
    fn bytes(&self) -> (usize, usize);
}

/// What a run reads and writes, by position in the template's interface.
pub struct Io<'i, 'b> {
    /// A value for each of the size table's symbols.
    pub symbols: &'i [usize],
    /// Each input's bytes.
    pub inputs: &'i [&'i [u8]],
    /// Each output's bytes.
    pub outputs: &'i mut [&'b mut [u8]],
    /// Each state's buffer.
    pub states: &'i mut [AlignedBytes],
    /// Limits and observers.
    pub control: RunControl<'i>,
}

/// Why a backend cannot load or run a template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// A weight cannot be had.
    #[error(transparent)]
    Weights(#[from] RegistryError),
    /// A weight the template needs is not in the registry.
    #[error("param {name:?} has no value")]
    Unset {
        /// The param.
        name: String,
    },
    /// The backend cannot run a step.
    #[error("{op} at {location}: {reason}")]
    Unsupported {
        /// The op.
        op: String,
        /// Where the graph's author wrote it.
        location: String,
        /// Why.
        reason: String,
    },
    /// The frame of a run cannot be made or launched.
    #[error(transparent)]
    Frame(FrameError),
    /// A step stopped the run: the caller's values are wrong, or the run was cancelled.
    #[error(transparent)]
    Step(StepError),
    /// The reference evaluation of a step failed.
    #[error("{op}: {cause}")]
    Eval {
        /// The op.
        op: String,
        /// Why.
        cause: EvalError,
    },
    /// A size cannot be evaluated.
    #[error(transparent)]
    Plan(#[from] crate::plan::PlanError),
}

impl From<FrameError> for BackendError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Step(step) => BackendError::Step(step),
            other => BackendError::Frame(other),
        }
    }
}
