//! The passes, one file each, and the list in which they run.

use crate::GraphError;
use crate::adapters::AdapterLayout;
use crate::ids::NodeId;
use crate::rewrite::{BuildError, Draft, FusionReport, RewriteError, Rule, rewrite};
use std::sync::Arc;

pub mod attach_adapters;
pub mod canonicalise;
mod channels_last;
mod cse;
mod dce;
mod fold_constants;
pub mod fuse_activation;
mod fuse_attention;
pub mod fuse_conv;
mod fuse_elementwise;
pub mod fuse_gated;
pub mod fuse_integer;
pub mod fuse_linear;
pub mod fuse_norm;
pub mod fuse_norm_residual;
pub mod fuse_shared_input;
pub mod hoist_slices;
mod legalise;
mod pipeline;

pub use legalise::{Decomposed, Dispatch, OpSet, Target};
pub use pipeline::{PASSES, Pass, PassReport, PassStat, compile_passes, run_pass};

/// What a caller may choose about passes.
#[derive(Debug, Clone, PartialEq)]
pub struct PassOptions {
    /// Names of passes to leave out; `legalise` cannot be.
    pub skip: Vec<String>,
    /// Largest operand or result, in bytes, that constant folding touches.
    pub fold_limit_bytes: usize,
    /// Build and verify the graph after each pass.
    pub verify: bool,
    /// Adapters that linear layers make room for; the graph gains the inputs of [`AdapterLayout::with_inputs`].
    pub adapters: Option<Arc<AdapterLayout>>,
}

impl Default for PassOptions {
    /// Nothing left out, folding up to 1 MiB, verification in builds with debug assertions.
    fn default() -> Self {
        Self { skip: Vec::new(), fold_limit_bytes: 1 << 20, verify: cfg!(debug_assertions), adapters: None }
    }
}

/// What a pass works with.
pub(crate) struct PassCx<'a> {
    pub(crate) target: &'a dyn Target,
    pub(crate) options: &'a PassOptions,
    pub(crate) trace: &'a mut FusionReport,
    pub(crate) dispatch: &'a mut Dispatch,
}

impl PassCx<'_> {
    pub(crate) fn rewrite(&mut self, draft: &mut Draft, rules: &[Rule]) -> Result<(), PassError> {
        rewrite(draft, rules, self.trace)?;
        Ok(())
    }
}

/// Why the passes stopped.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PassError {
    /// The target does not run an op, and the op is no composite of others.
    #[error("{target} does not run {op} (node {node}, added at {location}): {reason}")]
    NotRunnable {
        /// The op.
        op: &'static str,
        /// The node.
        node: NodeId,
        /// The caller's source line.
        location: String,
        /// The target's name.
        target: String,
        /// Why it could not be decomposed.
        reason: String,
    },
    /// Rewriting did not end.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
    /// The rewritten nodes are no graph.
    #[error("the rewritten graph cannot be built: {0}")]
    Build(#[from] BuildError),
    /// A pass left a broken graph.
    #[error("after pass {pass}: {reason}")]
    Verify {
        /// The pass.
        pass: &'static str,
        /// What is broken.
        reason: String,
    },
    /// There is no pass of this name.
    #[error("no pass is called {name:?}; passes are {known}")]
    UnknownPass {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
}

impl From<GraphError> for PassError {
    fn from(error: GraphError) -> Self {
        PassError::Build(BuildError::Graph(error))
    }
}
