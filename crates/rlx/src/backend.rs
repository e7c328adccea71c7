//! Devices that run templates: one trait for all, a folder each.

mod contain;
pub mod cpu;
#[cfg(test)]
pub(crate) mod fake;
pub mod reference;
mod registry;
mod state;

pub(crate) use contain::contain;
pub use registry::{
    BackendProvider, BackendRegistry, CpuProvider, DeviceProbe, ReferenceProvider, register_backend,
};
pub use state::{ResidentState, StateBuffer};

use crate::plan::{Lir, PlanTarget, Template};
use crate::weights::{Packed, PackedKey, RegistryError, WeightRegistry};
use rlx_graph::EvalError;
use rlx_graph::passes::Target;
use rlx_kernels::schedule::{FrameError, RunControl, StepError};
use rlx_tensor::storage::mapped::MappedRange;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

/// A device family that can run templates.
pub trait Backend: Send + Sync {
    /// The name in reports.
    fn name(&self) -> &str;

    /// What of it decides results and speed, besides the machine: settings, kernels, version of a driver. Part of keys.
    fn fingerprint(&self) -> String {
        self.name().to_owned()
    }

    /// The precision of products of weights; `None` of a backend that has none to choose from, and computes in f32 or wider.
    fn precision(&self) -> Option<cpu::Precision> {
        None
    }

    /// What it can do, in words of reports.
    fn capabilities(&self) -> Vec<String> {
        Vec::new()
    }

    /// What it has chosen by itself, a line each, for those who ask for more.
    fn details(&self) -> Vec<String> {
        Vec::new()
    }

    /// Free memory of the device in bytes; `None` if unknown, which never means enough.
    fn free_bytes(&self) -> Option<u64> {
        None
    }

    /// Whether it reads weights where the registry holds them; else they need room on the device too.
    fn reads_host_memory(&self) -> bool {
        false
    }

    /// What its runs have moved so far to and from the memory of the device; `None` if it computes in the caller's memory.
    fn traffic(&self) -> Option<Traffic> {
        None
    }

    /// What legalisation may leave in a graph for this backend.
    fn target(&self) -> &dyn Target;

    /// What the planner must know.
    fn plan_target(&self) -> &dyn PlanTarget;

    /// Bytes of the copies of weights this backend makes for a template, from shapes alone.
    fn packed_bytes(&self, template: &Template) -> Result<usize, BackendError>;

    /// Bytes of what a program makes for itself alone: packed constants of the graph, vectors in the form kernels read. Told from shapes,
    /// and equal to [`Program::own_bytes`] of the program once it is loaded.
    fn own_bytes(&self, template: &Template) -> usize {
        let _ = template;
        0
    }

    /// Params that a template's steps read as they are stored; `None` if all may be.
    fn raw_params(&self, template: &Template) -> Option<BTreeSet<String>> {
        let _ = template;
        None
    }

    /// How many of [`Backend::packed_bytes`] will be pages of mapped files: an artefact's, or the cache's. Reads no weight.
    fn packed_mapped_bytes(
        &self,
        template: &Template,
        weights: &WeightRegistry,
    ) -> Result<u64, BackendError> {
        let _ = (template, weights);
        Ok(0)
    }

    /// Scratch bytes of a run of a specialised template.
    fn workspace_bytes(&self, lir: &Lir) -> Result<usize, BackendError>;

    /// How this backend's packed weights are stored in files; `None` if they are not.
    fn storage(&self) -> Option<&dyn PackedStorage> {
        None
    }

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

/// Bytes that runs moved between the caller's memory and a device's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// To the device: inputs, arguments of kernels, states that come to stay; not weights.
    pub up: u64,
    /// From it: outputs, the words of checks, states that are asked for.
    pub down: u64,
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

    /// Bytes of what it holds besides weights of the registry: packed constants of the graph, vectors in the form kernels read.
    fn own_bytes(&self) -> usize {
        0
    }

    /// The forms in which it reads weights; `None` if it does not tell.
    fn weight_uses(&self) -> Option<&WeightUses> {
        None
    }
}

/// The forms in which a program reads weights.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WeightUses {
    /// Params read as they are stored, sorted.
    pub raw: BTreeSet<String>,
    /// Packed copies.
    pub packed: Vec<PackedUse>,
}

/// A packed copy that a program reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedUse {
    /// The param whose storage holds the copy: the first of those packed together.
    pub param: String,
    /// The key of the copy.
    pub key: PackedKey,
}

/// How a backend's packed weights are stored in files and come back.
pub trait PackedStorage: Send + Sync {
    /// The instruction set they are packed for.
    fn isa(&self) -> String;

    /// The precision they are read in.
    fn precision(&self) -> &'static str;

    /// A digest of how bytes are arranged: it differs wherever the same weights would be packed into other bytes.
    fn packing(&self) -> [u8; 32];

    /// Shape and layout of a packed copy as bytes, and its content; `None` for a copy that is not this backend's.
    fn store<'p>(&self, packed: &'p Packed) -> Option<(Vec<u8>, &'p [u8])>;

    /// The packed copy that [`PackedStorage::store`] described, over its content in a file.
    ///
    /// # Errors
    /// What does not fit, in words.
    fn restore(&self, layout: &[u8], content: MappedRange) -> Result<Packed, String>;
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
    pub states: &'i mut [StateBuffer],
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
    /// The device does not answer any more.
    #[error("the device is lost: {reason}")]
    Lost {
        /// What it said last.
        reason: String,
    },
    /// The device has too little memory.
    #[error("the device has no {bytes} bytes for {what}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
        /// What for.
        what: String,
    },
    /// The backend panicked; the executable is discarded.
    #[error("the backend panicked: {message}")]
    Panicked {
        /// The panic's message.
        message: String,
    },
    /// The executable was discarded, for the backend panicked in an earlier run.
    #[error("this executable was discarded, for its backend panicked ({message}); compile it again")]
    Discarded {
        /// The panic's message.
        message: String,
    },
}

impl BackendError {
    /// Whether another device may do better: the fault is the device's or the backend's, not the caller's.
    pub fn is_device_fault(&self) -> bool {
        match self {
            BackendError::Weights(_) | BackendError::Unset { .. } | BackendError::Plan(_) => false,
            BackendError::Step(_) => false,
            BackendError::Frame(frame) => !matches!(frame, FrameError::AboveCapacity { .. }),
            BackendError::Eval { cause, .. } => !matches!(cause, EvalError::Value { .. }),
            BackendError::Unsupported { .. }
            | BackendError::Lost { .. }
            | BackendError::OutOfMemory { .. }
            | BackendError::Panicked { .. }
            | BackendError::Discarded { .. } => true,
        }
    }
}

impl From<FrameError> for BackendError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Step(step) => BackendError::Step(step),
            other => BackendError::Frame(other),
        }
    }
}
