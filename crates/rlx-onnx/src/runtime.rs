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
    /// Steps of regions by the device that runs them.
    pub devices: BTreeMap<String, usize>,
    /// Regions that a device could not run and that went to the next of those allowed.
    pub moved: Vec<Moved>,
}

/// A region that went to another device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Moved {
    /// Its nodes in a few words.
    pub nodes: String,
    /// The device that could not run it.
    pub from: String,
    /// The device that was tried next.
    pub to: String,
    /// Why.
    pub reason: String,
}

/// Devices with the registry of one model.
pub struct Runtime {
    session: Session,
    /// Devices for regions that those before them cannot run.
    rest: Vec<Session>,
    options: CompileOptions,
    report: Mutex<OnnxReport>,
}

impl Runtime {
    /// Weights go to a registry of their own.
    pub fn on(session: &Session) -> Self {
        Self::with_registry(session, Arc::new(WeightRegistry::new()))
    }

    /// Over weights that are there.
    pub(crate) fn with_registry(session: &Session, weights: Arc<WeightRegistry>) -> Self {
        let session = session.clone().with_weights(weights);
        Self { session, rest: Vec::new(), options: CompileOptions::default(), report: Mutex::default() }
    }

    /// The same, with devices to try in turn for regions that the first cannot run.
    pub fn or_on(mut self, rest: &[Session]) -> Self {
        let weights = Arc::clone(self.session.weights());
        self.rest = rest.iter().map(|other| other.clone().with_weights(Arc::clone(&weights))).collect();
        self
    }

    /// The same, with what may be chosen when a region is compiled.
    pub fn with_options(self, options: CompileOptions) -> Self {
        Self { options, ..self }
    }

    /// Compiles a region for the device of this position or the first after it that takes it; the graph and that device's position.
    pub(crate) fn compile(
        &self,
        nodes: &str,
        graph: &Graph,
        mut at: usize,
    ) -> Result<(CompiledGraph, usize), SessionError> {
        loop {
            match self.device(at).compile_with(graph, &self.options) {
                Ok(compiled) => return Ok((compiled, at)),
                Err(error) => at = self.after(nodes, at, error)?,
            }
        }
    }

    /// The position of the device to try after one that could not run a region; the error if there is none, or if the fault is the
    /// caller's.
    pub(crate) fn after(&self, nodes: &str, at: usize, error: SessionError) -> Result<usize, SessionError> {
        if !error.is_device_fault() || at >= self.rest.len() {
            return Err(error);
        }
        let name = |at: usize| self.device(at).backend().name().to_owned();
        let (from, to) = (name(at), name(at + 1));
        self.note(|r| {
            r.moved.push(Moved { nodes: nodes.to_owned(), from, to, reason: error.to_string() });
        });
        Ok(at + 1)
    }

    /// The first device.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The device of a position.
    pub(crate) fn device(&self, at: usize) -> &Session {
        at.checked_sub(1).and_then(|at| self.rest.get(at)).unwrap_or(&self.session)
    }

    /// What has happened so far.
    pub fn report(&self) -> OnnxReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn note(&self, change: impl FnOnce(&mut OnnxReport)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
