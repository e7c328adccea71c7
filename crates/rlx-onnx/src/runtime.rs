//! What runs of a model share: the device, its weights, and what has happened so far.

use rlx::weights::WeightRegistry;
use rlx::{CompileOptions, CompiledGraph, Session, SessionError};
use rlx_graph::Graph;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What became of a model's nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OnnxReport {
    /// Nothing for a model without symbolic dims; empty if the last run was one graph over its symbols, compiled once; else why it was
    /// specialised for its extents.
    pub template: Option<String>,
    /// Regions compiled.
    pub regions: usize,
    /// Nodes that became part of a region, by op.
    pub compiled: BTreeMap<String, usize>,
    /// Nodes evaluated between regions, by op.
    pub host: BTreeMap<String, usize>,
    /// Time of these evaluations, by op, in microseconds.
    pub host_micros: BTreeMap<String, u64>,
    /// Nodes folded while a region was built, by op.
    pub folded: BTreeMap<String, usize>,
    /// Steps of regions after fusion, by op.
    pub steps: BTreeMap<String, usize>,
    /// Steps of regions that run by their op's reference evaluation, by op.
    pub reference: BTreeMap<String, usize>,
}

/// A device with the registry of one model.
pub struct Runtime {
    session: Session,
    options: CompileOptions,
    report: Mutex<OnnxReport>,
}

impl Runtime {
    /// Weights go to a registry of their own.
    pub fn on(session: &Session) -> Self {
        let session = session.clone().with_weights(Arc::new(WeightRegistry::new()));
        Self { session, options: CompileOptions::default(), report: Mutex::default() }
    }

    /// The same, with what may be chosen when a region is compiled.
    pub fn with_options(self, options: CompileOptions) -> Self {
        Self { options, ..self }
    }

    /// Compiles a region.
    pub(crate) fn compile(&self, graph: &Graph) -> Result<CompiledGraph, SessionError> {
        self.session.compile_with(graph, &self.options)
    }

    /// The device.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// What has happened so far.
    pub fn report(&self) -> OnnxReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn note(&self, change: impl FnOnce(&mut OnnxReport)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
