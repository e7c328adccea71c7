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
            None => {
                let dtypes = |values: &[crate::ValueId]| {
                    let all: Vec<String> =
                        values.iter().map(|&v| draft.shape(v).dtype().to_string()).collect();
                    all.join(", ")
                };
                let (from, to) = (dtypes(node.inputs()), dtypes(node.outputs()));
                return Err(refuse(format!(
                    "it has no decomposition, and does not run there from {from} to {to}"
                )));
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Graph;
    use crate::passes::{PassOptions, run_pass};
    use crate::rewrite::testing::assert_same_numbers;

    const NORM: &str = r#"graph "g" {
  input @x : f32[rows, 4]
  param @w : f32[4]
  %2 : f32[rows, 4] = rms_norm(@x, @w) {eps=0.5, unit_offset=false, groups=1, residual=false}
  %3 : f32[rows, 4] = gated(%2, @x) {activation=silu}
  return "y": %3
}"#;

    #[test]
    fn composites_are_decomposed_until_the_target_runs_them() {
        let before: Graph = NORM.parse().unwrap();
        let target = OpSet::new("small", &["binary", "unary", "reduce", "reshape"]);
        let (graph, report) = run_pass("legalise", &before, &target, &PassOptions::default()).unwrap();
        assert_same_numbers(&before, &graph);
        insta::assert_snapshot!(graph, @r#"
        graph "g" {
          input @x : f32[rows, 4]
          param @w : f32[4]
          %2 : f32[rows, 1, 4] = reshape(@x) {dims=dims[rows, 1, 4]}
          %3 : f32[rows, 1, 4] = binary(%2, %2) {kind=mul}
          %4 : f32[rows, 1, 1] = reduce(%3) {kind=mean, axes=[2], keep_dims=true}
          const %5 : f32[] = [0.5]
          %6 : f32[rows, 1, 1] = binary(%4, %5) {kind=add}
          %7 : f32[rows, 1, 1] = unary(%6) {kind=rsqrt}
          %8 : f32[rows, 1, 4] = binary(%2, %7) {kind=mul}
          %9 : f32[rows, 1, 4] = binary(%8, @w) {kind=mul}
          %10 : f32[rows, 4] = reshape(%9) {dims=dims[rows, 4]}
          %11 : f32[rows, 4] = unary(%10) {kind=sigmoid}
          %12 : f32[rows, 4] = binary(%10, %11) {kind=mul}
          %13 : f32[rows, 4] = binary(%12, @x) {kind=mul}
          return "y": %13
        }
        "#);
        let decomposed: Vec<&str> = report.dispatch.decomposed.iter().map(|d| d.op).collect();
        assert_eq!(decomposed, ["rms_norm", "gated", "activation"]);
        assert_eq!(
            report.dispatch.native.keys().copied().collect::<Vec<_>>(),
            ["binary", "reduce", "reshape", "unary"]
        );
    }

    #[test]
    fn a_limit_decides_form_by_form() {
        let before: Graph = NORM.parse().unwrap();
        let narrow = |op: &dyn OpDef, inputs: &[&Shape], _: &[&Shape]| {
            op.name() != "gated" || *inputs[0].last().unwrap() == 8
        };
        let target = OpSet::every_op("narrow").only_if(narrow);
        let (graph, _) = run_pass("legalise", &before, &target, &PassOptions::default()).unwrap();
        assert_same_numbers(&before, &graph);
        let ops: Vec<&str> = graph.nodes().map(|(_, n)| n.op.def().name()).collect();
        assert_eq!(ops, ["rms_norm", "activation", "binary"]);
    }

    #[test]
    fn an_op_that_is_neither_native_nor_composite_is_an_error_with_op_and_line() {
        let before: Graph = NORM.parse().unwrap();
        let target = OpSet::new("tiny", &["binary", "unary", "reshape"]);
        let error = run_pass("legalise", &before, &target, &PassOptions::default()).unwrap_err();
        let PassError::NotRunnable { op, target, location, .. } = &error else { panic!("{error}") };
        assert_eq!((*op, target.as_str()), ("reduce", "tiny"));
        assert!(location.contains(".rs:"), "{location}");
    }
}
