//! A target's own ops only.
//!
//! Needs: nothing. Does: asks the target for each node; decomposes what it does not run, and what comes out of that, and so on. Leaves:
//! only nodes the target runs, or an error that names the op and its source line.

use crate::ids::NodeId;
use crate::op::OpDef;
use crate::passes::{PassCx, PassError};
use crate::rewrite::driver::apply;
use crate::rewrite::{Draft, Patch};
use rlx_tensor::Shape;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::Location;

/// What a target runs as it stands.
pub trait Target {
    /// The name in reports.
    fn name(&self) -> &str;

    /// Whether it runs this op on operands and results of these shapes.
    fn runs(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool;
}

type Limit = Box<dyn Fn(&dyn OpDef, &[&Shape], &[&Shape]) -> bool + Send + Sync>;

/// A target given by the names of the ops it runs, with a limit if it does not run them in every form.
pub struct OpSet {
    name: String,
    ops: Option<BTreeSet<String>>,
    limit: Option<Limit>,
}

impl OpSet {
    /// A target that runs the ops of these names.
    pub fn new(name: &str, ops: &[&str]) -> Self {
        let ops = ops.iter().map(|op| (*op).to_owned()).collect();
        Self { name: name.to_owned(), ops: Some(ops), limit: None }
    }

    /// A target that runs every op, as the reference evaluator does.
    pub fn every_op(name: &str) -> Self {
        Self { name: name.to_owned(), ops: None, limit: None }
    }

    /// The same target without these ops; for one that runs every op this lists the built-in ones that stay.
    #[must_use]
    pub fn without(mut self, ops: &[&str]) -> Self {
        let kept =
            self.ops.get_or_insert_with(|| crate::ops::Op::NAMES.iter().map(|n| (*n).to_owned()).collect());
        kept.retain(|name| !ops.contains(&name.as_str()));
        self
    }

    /// The same target, running an op only where `limit` says so.
    #[must_use]
    pub fn only_if(
        mut self,
        limit: impl Fn(&dyn OpDef, &[&Shape], &[&Shape]) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.limit = Some(Box::new(limit));
        self
    }
}

impl Target for OpSet {
    fn name(&self) -> &str {
        &self.name
    }

    fn runs(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        self.ops.as_ref().is_none_or(|ops| ops.contains(op.name()))
            && self.limit.as_ref().is_none_or(|limit| limit(op, inputs, outputs))
    }
}

/// A node that the target does not run, and what came in its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Decomposed {
    /// The op.
    pub op: &'static str,
    /// Source line of the node.
    pub location: Location<'static>,
    /// Ops of the nodes that came in its place (which may have been decomposed in turn).
    pub into: Vec<&'static str>,
}

/// What legalisation did: ops that run as they stand, with their number, and ops that were decomposed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Dispatch {
    /// Number of nodes of each op in the resulting graph.
    pub native: BTreeMap<&'static str, usize>,
    /// Nodes that were decomposed, in order.
    pub decomposed: Vec<Decomposed>,
}

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    let mut queue: VecDeque<NodeId> = draft.schedule()?.into();
    let mut budget = 1024 + 256 * queue.len();
    while let Some(id) = queue.pop_front() {
        if !draft.is_live(id) {
            continue;
        }
        let node = draft.node(id);
        let (op, location) = (node.op().clone(), node.location());
        let def = op.def();
        let shapes = |values: &[crate::ValueId]| values.iter().map(|&v| draft.shape(v)).collect::<Vec<_>>();
        if cx.target.runs(def, &shapes(node.inputs()), &shapes(node.outputs())) {
            continue;
        }
        let refuse = |reason: String| PassError::NotRunnable {
            op: def.name(),
            node: id,
            location: location.to_string(),
            target: cx.target.name().to_owned(),
            reason,
        };
        let patch = match Patch::decomposition(draft, def, node.inputs(), node.outputs()) {
            Some(Ok(patch)) => patch,
            Some(Err(error)) => return Err(refuse(format!("its decomposition fails: {error}"))),
            None => return Err(refuse("it has no decomposition".into())),
        };
        let into = patch.nodes.iter().map(|(op, _)| op.def().name()).collect();
        budget = match budget.checked_sub(patch.nodes.len() + 1) {
            Some(rest) => rest,
            None => return Err(refuse("its decomposition does not end".into())),
        };
        let first_new = draft.node_count();
        if apply(draft, "decompose", id, &patch, cx.trace).is_none() || draft.is_live(id) {
            let refused = cx.trace.refused.last().map_or_else(String::new, |r| r.reason.clone());
            return Err(refuse(format!("its decomposition does not fit: {refused}")));
        }
        cx.dispatch.decomposed.push(Decomposed { op: def.name(), location, into });
        (first_new..draft.node_count()).rev().for_each(|i| queue.push_front(NodeId::from_index(i)));
    }
    Ok(())
}
