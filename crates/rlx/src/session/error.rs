//! What can go wrong between a graph and its results.

use crate::backend::BackendError;
use crate::config::ConfigError;
use crate::devices::{DeviceError, DeviceFallbackError};
use crate::plan::PlanError;
use crate::weights::RegistryError;
use rlx_graph::passes::PassError;
use rlx_kernels::isa::Isa;
use rlx_tensor::{DType, DimError};

/// Why a graph cannot be compiled or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// A graph cannot be built.
    #[error(transparent)]
    Graph(#[from] rlx_graph::GraphError),
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No device of a chain ran the graph.
    #[error(transparent)]
    Fallback(#[from] DeviceFallbackError),
    /// The executable keeps no graph to look into.
    #[error("{name} was compiled from a plan, which keeps no graph: compile the graph itself for this")]
    NoGraph {
        /// The executable.
        name: String,
    },
    /// A plan that its verifier refuses.
    #[error("the plan is broken: {reason}")]
    BrokenPlan {
        /// What is broken.
        reason: String,
    },
    /// A name given twice where one value is wanted.
    #[error("{kind} {name:?} was given twice")]
    Twice {
        /// Input or output.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// The machine lacks the instruction set that the settings ask for.
    #[error("this machine has no {isa}; see `rlx doctor` for what it has")]
    Isa {
        /// The instruction set.
        isa: Isa,
    },
    /// A setting does not parse.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A pass failed.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The graph cannot be planned, or not for these sizes.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The device cannot load or run it.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A compiled file cannot be used.
    #[error(transparent)]
    Aot(#[from] crate::aot::AotCacheError),
    /// The registry refused.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Params that have no value, or one of another shape or dtype: all of them.
    #[error("{} of the graph's params cannot be bound:{}", .problems.len(), lines(.problems))]
    Weights {
        /// One line a param.
        problems: Vec<String>,
    },
    /// A name that is no input, output or param of the graph.
    #[error("the graph has no {kind} {name:?}{}", hint(.nearest))]
    UnknownName {
        /// Input, output or param.
        kind: &'static str,
        /// The name.
        name: String,
        /// The most similar valid name.
        nearest: Option<String>,
    },
    /// An input or output that the run needs was not given.
    #[error("{kind} {name:?} was not given")]
    Missing {
        /// Input or output.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// A tensor of another dtype.
    #[error("{name:?} must be {expected}, found {found}")]
    DType {
        /// The input, output or param.
        name: String,
        /// The graph's dtype.
        expected: DType,
        /// The dtype given.
        found: DType,
    },
    /// A tensor of another shape or length.
    #[error("{name:?} must be {expected}, found {found}")]
    Shape {
        /// The input, output or param.
        name: String,
        /// The graph's shape, or the bytes it needs.
        expected: String,
        /// What was given.
        found: String,
    },
    /// The extents of the inputs contradict each other, or leave a symbol without a value.
    #[error(transparent)]
    Dim(#[from] DimError),
    /// The state is of another graph, or smaller than the run needs.
    #[error("state: {reason}")]
    State {
        /// What does not fit.
        reason: String,
    },
}

impl SessionError {
    /// Whether another device may do better: the device is lost, absent, too small, cannot run an op, or its backend failed. False
    /// for what the caller has to change, such as inputs, and for a run that was cancelled.
    pub fn is_device_fault(&self) -> bool {
        match self {
            SessionError::Backend(error) => error.is_device_fault(),
            SessionError::Pass(error) => matches!(error, PassError::NotRunnable { .. }),
            SessionError::Device(_) | SessionError::Fallback(_) | SessionError::Isa { .. } => true,
            _ => false,
        }
    }
}

fn lines(problems: &[String]) -> String {
    problems.iter().map(|p| format!("\n  {p}")).collect()
}

fn hint(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or(String::new(), |name| format!("; did you mean {name:?}?"))
}
