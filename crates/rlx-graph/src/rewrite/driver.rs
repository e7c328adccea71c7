//! The driver: finds rules by the op at their root, applies their patches to a fixed point, keeps the trace.

use crate::graph::Source;
use crate::ids::{NodeId, ValueId};
use crate::rewrite::draft::shapes_equal;
use crate::rewrite::{Draft, Match, Operand, Patch, Pattern};
use std::collections::{HashMap, VecDeque};
use std::panic::Location;

type Build = Box<dyn Fn(&Draft, &Match) -> Option<Patch> + Send + Sync>;

/// A named rewrite: where it applies and what it puts there.
pub struct Rule {
    name: &'static str,
    maths: &'static str,
    pattern: Pattern,
    build: Build,
}

impl Rule {
    /// A rule. `maths` says in one line why both sides mean the same. `build` may still decline a match.
    pub fn new(
        name: &'static str,
        maths: &'static str,
        pattern: Pattern,
        build: impl Fn(&Draft, &Match) -> Option<Patch> + Send + Sync + 'static,
    ) -> Self {
        Self { name, maths, pattern, build: Box::new(build) }
    }

    /// The name in traces.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Why both sides mean the same.
    pub fn maths(&self) -> &'static str {
        self.maths
    }
}

/// One application of a rule.
#[derive(Debug, Clone, PartialEq)]
pub struct Fired {
    /// The rule.
    pub rule: &'static str,
    /// Source line of the node at the root.
    pub location: Location<'static>,
    /// The name of the value replaced, if it had one.
    pub label: Option<String>,
    /// Ops of the nodes that are gone.
    pub removed: Vec<&'static str>,
    /// Ops of the nodes that came.
    pub added: Vec<&'static str>,
}

/// A patch that was not applied because it would have changed a shape or does not fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    /// The rule.
    pub rule: &'static str,
    /// Source line of the node at the root.
    pub location: Location<'static>,
    /// Why.
    pub reason: String,
}

/// How often a rule fired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// The rule.
    pub rule: &'static str,
    /// How often.
    pub times: usize,
}

/// The trace of rewriting: what fired, where, and what it did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FusionReport {
    /// Every application, in order.
    pub fired: Vec<Fired>,
    /// Patches that were not applied.
    pub refused: Vec<Refused>,
    /// How often a rule's pattern was tried on a node: the measure of the work done.
    pub tried: usize,
}

impl FusionReport {
    /// How often each rule fired, in order of first application.
    pub fn tally(&self) -> Vec<Tally> {
        let mut tally: Vec<Tally> = Vec::new();
        for fired in &self.fired {
            match tally.iter_mut().find(|t| t.rule == fired.rule) {
                Some(entry) => entry.times += 1,
                None => tally.push(Tally { rule: fired.rule, times: 1 }),
            }
        }
        tally
    }

    /// How often one rule fired.
    pub fn count(&self, rule: &str) -> usize {
        self.fired.iter().filter(|f| f.rule == rule).count()
    }
}

/// Why rewriting stopped.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RewriteError {
    /// The bound on applications was reached.
    #[error("no fixed point after {applied} applications; the last was {rule} at {location}")]
    NoFixedPoint {
        /// The last rule.
        rule: &'static str,
        /// Where it was applied.
        location: String,
        /// How often any rule was applied.
        applied: usize,
    },
}

const APPLICATIONS_PER_NODE: usize = 16;

/// Applies rules until none applies; earlier rules go first where several fit a node. Gives the number of applications.
pub fn rewrite(draft: &mut Draft, rules: &[Rule], report: &mut FusionReport) -> Result<usize, RewriteError> {
    let mut by_root: HashMap<&'static str, Vec<usize>> = HashMap::new();
    for (index, rule) in rules.iter().enumerate() {
        let mut roots = rule.pattern.roots();
        roots.sort_unstable();
        roots.dedup();
        roots.into_iter().for_each(|root| by_root.entry(root).or_default().push(index));
    }
    let bound = APPLICATIONS_PER_NODE * (draft.len() + 4);
    let mut queue: VecDeque<NodeId> = draft.nodes().map(|(id, _)| id).collect();
    let mut queued = vec![true; draft.node_count()];
    let mut applied = 0;
    while let Some(id) = queue.pop_front() {
        queued[id.index()] = false;
        if !draft.is_live(id) {
            continue;
        }
        let Some(candidates) = by_root.get(draft.node(id).op().def().name()) else { continue };
        for rule in candidates.iter().map(|&i| &rules[i]) {
            report.tried += 1;
            let Some(found) = rule.pattern.matches(draft, id) else { continue };
            let Some(patch) = (rule.build)(draft, &found) else { continue };
            let Some(touched) = apply(draft, rule.name, id, &patch, report) else { continue };
            applied += 1;
            if applied >= bound {
                let location = draft.node(id).location().to_string();
                return Err(RewriteError::NoFixedPoint { rule: rule.name, location, applied });
            }
            queued.resize(draft.node_count(), false);
            for next in touched {
                if draft.is_live(next) && !std::mem::replace(&mut queued[next.index()], true) {
                    queue.push_back(next);
                }
            }
            break;
        }
    }
    Ok(applied)
}

/// Applies one patch at a node, or refuses it. Gives the nodes whose surroundings changed.
pub(crate) fn apply(
    draft: &mut Draft,
    rule: &'static str,
    root: NodeId,
    patch: &Patch,
    report: &mut FusionReport,
) -> Option<Vec<NodeId>> {
    let (location, order) = (draft.node(root).location(), draft.order(root));
    let mut dropped = Vec::new();
    let made = match make(draft, patch, location, order) {
        Ok(made) => made,
        Err((made, reason)) => {
            made.into_iter().rev().for_each(|id| drop(draft.drop_node(id, &mut dropped)));
            report.refused.push(Refused { rule, location, reason });
            return None;
        }
    };
    let writes = |draft: &Draft, id: NodeId| !draft.node(id).op().def().props().writes.is_empty();
    let replaces_writer = writes(draft, root) && made.nodes.iter().any(|&id| writes(draft, id));
    let label = patch.replace.iter().find_map(|(old, _)| draft.value_name(*old).map(str::to_owned));
    let mut touched: Vec<NodeId> = made.nodes.clone();
    for (&(old, _), &new) in patch.replace.iter().zip(&made.replacements) {
        draft.redirect(old, new);
        touched.extend(draft.users(new));
    }
    let mut freed = Vec::new();
    let producers = patch.replace.iter().filter_map(|&(old, _)| draft.producer(old));
    for id in producers.chain([root]).collect::<Vec<_>>() {
        let forced = id == root && replaces_writer;
        if draft.is_live(id) && (forced || draft.is_dead(id)) {
            freed.extend(draft.drop_node(id, &mut dropped));
        }
    }
    for value in freed {
        touched.extend(draft.producer(value));
        touched.extend(draft.users(value));
    }
    let names =
        |draft: &Draft, ids: &[NodeId]| ids.iter().map(|&id| draft.node(id).op().def().name()).collect();
    let (removed, added) = (names(draft, &dropped), names(draft, &made.nodes));
    report.fired.push(Fired { rule, location, label, removed, added });
    Some(touched)
}

struct Made {
    nodes: Vec<NodeId>,
    replacements: Vec<ValueId>,
}

/// Adds a patch's nodes and checks that what replaces a value has its shape.
fn make(
    draft: &mut Draft,
    patch: &Patch,
    location: Location<'static>,
    order: usize,
) -> Result<Made, (Vec<NodeId>, String)> {
    let consts: Vec<ValueId> = patch.consts.iter().map(|t| draft.add_const(t.clone())).collect();
    let mut nodes: Vec<NodeId> = Vec::with_capacity(patch.nodes.len());
    let resolve = |draft: &Draft, nodes: &[NodeId], operand: Operand| match operand {
        Operand::Value(value) => Some(value),
        Operand::Const(index) => consts.get(index).copied(),
        Operand::New { node, index } => {
            nodes.get(node).and_then(|&id| draft.node(id).outputs().get(index)).copied()
        }
    };
    for (op, operands) in &patch.nodes {
        let inputs: Option<Vec<ValueId>> = operands.iter().map(|&o| resolve(draft, &nodes, o)).collect();
        let Some(inputs) = inputs else {
            return Err((nodes, format!("{} refers to a result that is not there", op.def().name())));
        };
        match draft.add_node(op.clone(), inputs, location, order) {
            Ok(id) => nodes.push(id),
            Err(cause) => return Err((nodes, format!("{}: {cause}", op.def().name()))),
        }
    }
    let mut replacements = Vec::with_capacity(patch.replace.len());
    for &(old, new) in &patch.replace {
        let Some(new) = resolve(draft, &nodes, new) else {
            return Err((nodes, "a replacement is not there".to_owned()));
        };
        let reason = match draft.source(new) {
            _ if new == old => Some("a value cannot replace itself".to_owned()),
            Source::State => Some("a state cannot stand for a value read at one moment".to_owned()),
            _ if shapes_equal(draft.shape(old), draft.shape(new)) => None,
            _ => Some(format!("{} would become {}", draft.shape(old), draft.shape(new))),
        };
        if let Some(reason) = reason {
            return Err((nodes, reason));
        }
        replacements.push(new);
    }
    Ok(Made { nodes, replacements })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Graph;
    use crate::ops::unary::{Unary, UnaryOp};
    use crate::rewrite::pat;
    use rlx_tensor::{DType, Shape};

    fn swap(name: &'static str, from: UnaryOp, to: UnaryOp) -> Rule {
        let pattern = pat::op::<Unary>().attr(move |u: &Unary| u.kind == from).with([pat::bind("x")]);
        Rule::new(name, "not equal; for this test only", pattern, move |draft, m| {
            Some(Patch::with_op(m.result(draft)?, Unary { kind: to }, &[m.value("x")?]))
        })
    }

    fn sines(count: usize) -> (Graph, u32) {
        let mut graph = Graph::new("sines");
        let mut value = graph.input("x", Shape::new(&["rows"], DType::F32)).unwrap();
        let line = line!() + 2;
        for _ in 0..count {
            value = graph.add_one(Unary { kind: UnaryOp::Sin }, &[value]).unwrap();
        }
        graph.label(value, "last");
        graph.set_outputs(&[("y", value)]).unwrap();
        (graph, line)
    }

    #[test]
    fn a_patch_keeps_line_and_label_and_is_traced() {
        let (graph, line) = sines(2);
        let (mut draft, mut report) = (Draft::new(&graph), FusionReport::default());
        let rules = [swap("to_cosine", UnaryOp::Sin, UnaryOp::Cos)];
        assert_eq!(rewrite(&mut draft, &rules, &mut report), Ok(2));
        let after = draft.build().unwrap();
        let (_, last) = after.nodes().next_back().unwrap();
        assert_eq!(last.op, Unary { kind: UnaryOp::Cos }.into());
        assert_eq!(last.location.line(), line);
        assert_eq!(after.value(last.outputs[0]).name.as_deref(), Some("last"));
        let fired = &report.fired[1];
        assert_eq!((fired.rule, fired.label.as_deref()), ("to_cosine", Some("last")));
        assert_eq!((fired.removed.as_slice(), fired.added.as_slice()), (&["unary"][..], &["unary"][..]));
        assert_eq!(report.tally(), [Tally { rule: "to_cosine", times: 2 }]);
    }

    #[test]
    fn rules_that_undo_each_other_are_stopped_and_named() {
        let (graph, _) = sines(1);
        let (mut draft, mut report) = (Draft::new(&graph), FusionReport::default());
        let rules = [swap("there", UnaryOp::Sin, UnaryOp::Cos), swap("back", UnaryOp::Cos, UnaryOp::Sin)];
        let error = rewrite(&mut draft, &rules, &mut report).unwrap_err();
        assert!(matches!(error, RewriteError::NoFixedPoint { rule: "there" | "back", .. }), "{error}");
    }

    #[test]
    fn a_patch_that_changes_a_shape_is_refused_and_leaves_nothing_behind() {
        let (graph, _) = sines(1);
        let (mut draft, mut report) = (Draft::new(&graph), FusionReport::default());
        let pattern = pat::op::<Unary>().with([pat::bind("x")]);
        let wrong = Rule::new("wrong", "not equal; for this test only", pattern, |draft, m| {
            let to = crate::ops::cast::Cast { to: DType::F16 };
            Some(Patch::with_op(m.result(draft)?, to, &[m.value("x")?]))
        });
        assert_eq!(rewrite(&mut draft, &[wrong], &mut report), Ok(0));
        assert_eq!(report.refused[0].reason, "f32[rows] would become f16[rows]");
        assert_eq!(draft.build().unwrap().to_string(), graph.to_string());
    }
}
