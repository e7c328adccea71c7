//! The verifier: what must hold of a graph after import and after every pass.

use crate::graph::{Graph, Source};
use crate::ids::{NodeId, ValueId};
use crate::op::{InferCx, InferError};
use crate::ops::Op;
use rlx_tensor::{Shape, Symbol};
use std::collections::BTreeSet;

/// How far a graph has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// As imported or built.
    Hir,
    /// Canonicalised and fused: there is something to compute, and sizes depend only on the interface.
    Mir,
}

/// What is wrong with a graph.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// An operand or result is not a value of the graph.
    #[error("{op} ({node}): {value} is not a value of the graph")]
    UnknownValue {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// The value.
        value: ValueId,
    },
    /// A node uses a value that a later node makes.
    #[error("{op} ({node}): operand {value} is made by {producer}, which comes later")]
    Order {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// The operand.
        value: ValueId,
        /// The node that makes it.
        producer: NodeId,
    },
    /// A value and the node that makes it disagree.
    #[error("{value} is said to be result {index} of {node}, which does not list it there")]
    Producer {
        /// The value.
        value: ValueId,
        /// The node.
        node: NodeId,
        /// Which result.
        index: usize,
    },
    /// A node's result belongs to something else.
    #[error("{op} ({node}): result {index} is {value}, which is not made by it")]
    Result {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// Which result.
        index: usize,
        /// The value.
        value: ValueId,
    },
    /// The operands do not fit the op.
    #[error("{op} ({node}, {location}): {cause}")]
    Infer {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// Where the node was added.
        location: String,
        /// Why.
        cause: InferError,
    },
    /// A result's shape is not what the op infers.
    #[error("{op} ({node}): result {index} is {found}, inference gives {expected}")]
    Shape {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// Which result.
        index: usize,
        /// The inferred shape, or its absence.
        expected: String,
        /// The recorded shape, or its absence.
        found: String,
    },
    /// A size that the op relies on is not in the graph's checks.
    #[error("{op} ({node}) relies on {left} = {right}, which no check covers")]
    MissingCheck {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// One dim.
        left: String,
        /// The other.
        right: String,
    },
    /// An op updates an operand that is no state.
    #[error("{op} ({node}) updates operand {operand}, which is no state")]
    NotAState {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// Position of the operand.
        operand: usize,
    },
    /// A constant's record and its tensor disagree.
    #[error("constant {value} is recorded as {expected}, its tensor is {found}")]
    Constant {
        /// The value.
        value: ValueId,
        /// Recorded.
        expected: Shape,
        /// The tensor's.
        found: Shape,
    },
    /// An input, param or state without a name, or a name used twice.
    #[error("{value}: {reason}")]
    Name {
        /// The value.
        value: ValueId,
        /// What is wrong.
        reason: String,
    },
    /// An output that is not a value, or a name used twice.
    #[error("output {name:?}: {reason}")]
    Output {
        /// The output.
        name: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// Nothing is returned and no state is updated.
    #[error("the graph has no outputs and updates no state")]
    NothingComputed,
    /// A size that no input, param or state determines.
    #[error("{value}: symbol {symbol} appears in no input, param or state")]
    FreeSymbol {
        /// The value.
        value: ValueId,
        /// The symbol.
        symbol: Symbol,
    },
    /// An op that the target does not run.
    #[error("{op} ({node}) is not supported by the target")]
    Unsupported {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
    },
}

/// Checks everything that must hold at a stage; the first fault found is returned.
pub fn verify(graph: &Graph, stage: Stage) -> Result<(), VerifyError> {
    verify_values(graph)?;
    let checks: BTreeSet<(NodeId, String, String)> =
        graph.checks().iter().map(|c| (c.node, c.left.to_string(), c.right.to_string())).collect();
    for (id, _) in graph.nodes() {
        verify_links(graph, id)?;
        verify_meaning(graph, id, &checks)?;
    }
    verify_outputs(graph)?;
    match stage {
        Stage::Hir => Ok(()),
        Stage::Mir => verify_sizes(graph),
    }
}

/// Checks a graph that was made legal for a target: all of [`Stage::Mir`], and every op supported.
pub fn verify_for(graph: &Graph, supported: &dyn Fn(&Op) -> bool) -> Result<(), VerifyError> {
    verify(graph, Stage::Mir)?;
    match graph.nodes().find(|(_, n)| !supported(&n.op)) {
        Some((node, n)) => Err(VerifyError::Unsupported { op: n.op.def().name().to_owned(), node }),
        None => Ok(()),
    }
}

fn verify_values(graph: &Graph) -> Result<(), VerifyError> {
    let mut names = BTreeSet::new();
    for (id, value) in graph.values() {
        match &value.source {
            Source::Input | Source::Param | Source::State => {
                let Some(name) = &value.name else {
                    return Err(VerifyError::Name { value: id, reason: "has no name".into() });
                };
                if !names.insert(name) {
                    return Err(VerifyError::Name { value: id, reason: format!("name {name:?} is taken") });
                }
                if graph.by_name(name) != Some(id) {
                    let reason = format!("name {name:?} does not lead back to it");
                    return Err(VerifyError::Name { value: id, reason });
                }
            }
            Source::Const(tensor) => {
                let found = Shape::new(tensor.dims(), tensor.dtype());
                if found != value.shape {
                    return Err(VerifyError::Constant { value: id, expected: value.shape.clone(), found });
                }
            }
            &Source::Node { node, index } => {
                let known = node.index() < graph.nodes().len();
                let listed = known.then(|| graph.node(node).outputs.get(index).copied()).flatten();
                if listed != Some(id) {
                    return Err(VerifyError::Producer { value: id, node, index });
                }
            }
        }
    }
    Ok(())
}

fn verify_links(graph: &Graph, id: NodeId) -> Result<(), VerifyError> {
    let node = graph.node(id);
    let op = || node.op.def().name().to_owned();
    let count = graph.values().len();
    if let Some(&value) = node.inputs.iter().chain(&node.outputs).find(|v| v.index() >= count) {
        return Err(VerifyError::UnknownValue { op: op(), node: id, value });
    }
    for &value in &node.inputs {
        if let Some(producer) = graph.producer(value).filter(|&p| p >= id) {
            return Err(VerifyError::Order { op: op(), node: id, value, producer });
        }
    }
    for (index, &value) in node.outputs.iter().enumerate() {
        match graph.value(value).source {
            Source::Node { node, index: at } if node == id && at == index => {}
            _ => return Err(VerifyError::Result { op: op(), node: id, index, value }),
        }
    }
    Ok(())
}

fn verify_meaning(
    graph: &Graph,
    id: NodeId,
    checks: &BTreeSet<(NodeId, String, String)>,
) -> Result<(), VerifyError> {
    let node = graph.node(id);
    let op = || node.op.def().name().to_owned();
    let shapes: Vec<&Shape> = node.inputs.iter().map(|&v| graph.shape(v)).collect();
    let mut cx = InferCx::default();
    let inferred = node.op.def().infer(&mut cx, &shapes).map_err(|cause| VerifyError::Infer {
        op: op(),
        node: id,
        location: node.location.to_string(),
        cause,
    })?;
    for index in 0..inferred.len().max(node.outputs.len()) {
        let (expected, found) = (inferred.get(index), node.outputs.get(index).map(|&v| graph.shape(v)));
        if expected != found {
            let text = |s: Option<&Shape>| s.map_or("absent".to_owned(), Shape::to_string);
            let (expected, found) = (text(expected), text(found));
            return Err(VerifyError::Shape { op: op(), node: id, index, expected, found });
        }
    }
    for (left, right) in cx.into_checks() {
        let (left, right) = (left.to_string(), right.to_string());
        if !checks.contains(&(id, left.clone(), right.clone())) {
            return Err(VerifyError::MissingCheck { op: op(), node: id, left, right });
        }
    }
    for operand in node.op.def().props().writes {
        let state = node.inputs.get(operand).map(|&v| matches!(graph.value(v).source, Source::State));
        if state != Some(true) {
            return Err(VerifyError::NotAState { op: op(), node: id, operand });
        }
    }
    Ok(())
}

fn verify_outputs(graph: &Graph) -> Result<(), VerifyError> {
    let mut names = BTreeSet::new();
    for (name, value) in graph.outputs() {
        let reason = match () {
            () if value.index() >= graph.values().len() => "is not a value of the graph",
            () if name.is_empty() => "has an empty name",
            () if !names.insert(name) => "the name is taken",
            () => continue,
        };
        return Err(VerifyError::Output { name: name.clone(), reason });
    }
    Ok(())
}

fn verify_sizes(graph: &Graph) -> Result<(), VerifyError> {
    let writes = graph.nodes().any(|(_, n)| !n.op.def().props().writes.is_empty());
    if graph.outputs().is_empty() && !writes {
        return Err(VerifyError::NothingComputed);
    }
    let mut bound = BTreeSet::new();
    let interface = graph.inputs().chain(graph.params()).chain(graph.states());
    interface.for_each(|(_, v)| v.shape.collect_symbols(&mut bound));
    for (value, record) in graph.values() {
        let mut symbols = BTreeSet::new();
        record.shape.collect_symbols(&mut symbols);
        if let Some(symbol) = symbols.into_iter().find(|s| !bound.contains(s)) {
            return Err(VerifyError::FreeSymbol { value, symbol });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
