//! What a rule returns: nodes to add, values to replace.

use crate::graph::{Graph, GraphError, Source};
use crate::ids::ValueId;
use crate::op::OpDef;
use crate::ops::Op;
use crate::rewrite::Draft;
use rlx_tensor::Tensor;
use std::collections::HashMap;

/// An operand of a node that a patch adds, or what replaces a value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operand {
    /// A value that is already there.
    Value(ValueId),
    /// Result `index` of the patch's node `node`.
    New {
        /// Position in the patch.
        node: usize,
        /// Which result.
        index: usize,
    },
    /// The patch's constant at this position.
    Const(usize),
}

impl From<ValueId> for Operand {
    fn from(value: ValueId) -> Self {
        Operand::Value(value)
    }
}

impl Operand {
    /// Another result of the same new node; for anything else the operand itself.
    #[must_use]
    pub fn result(self, index: usize) -> Self {
        match self {
            Operand::New { node, .. } => Operand::New { node, index },
            other => other,
        }
    }
}

/// A change to a draft: nodes to add, in order, and values to replace everywhere.
#[derive(Debug, Clone, Default)]
pub struct Patch {
    pub(crate) consts: Vec<Tensor>,
    pub(crate) nodes: Vec<(Op, Vec<Operand>)>,
    pub(crate) replace: Vec<(ValueId, Operand)>,
}

impl Patch {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces one value by another that is already there.
    pub fn redirect(from: ValueId, to: ValueId) -> Self {
        let mut patch = Self::new();
        patch.replace(from, to);
        patch
    }

    /// Replaces `value` by the single result of one new node.
    pub fn with_op(value: ValueId, op: impl Into<Op>, inputs: &[ValueId]) -> Self {
        let mut patch = Self::new();
        let inputs: Vec<Operand> = inputs.iter().map(|&v| v.into()).collect();
        let result = patch.add(op, &inputs);
        patch.replace(value, result);
        patch
    }

    /// Adds a constant.
    pub fn constant(&mut self, tensor: Tensor) -> Operand {
        self.consts.push(tensor);
        Operand::Const(self.consts.len() - 1)
    }

    /// Adds a node; gives its first result.
    pub fn add(&mut self, op: impl Into<Op>, inputs: &[Operand]) -> Operand {
        self.nodes.push((op.into(), inputs.to_vec()));
        Operand::New { node: self.nodes.len() - 1, index: 0 }
    }

    /// Replaces a value wherever it is used.
    pub fn replace(&mut self, value: ValueId, with: impl Into<Operand>) {
        self.replace.push((value, with.into()));
    }

    /// The decomposition of an op on these operands, its results replacing `outputs`. `None` for a primitive.
    pub(crate) fn decomposition(
        draft: &Draft,
        op: &dyn OpDef,
        inputs: &[ValueId],
        outputs: &[ValueId],
    ) -> Option<Result<Self, GraphError>> {
        let (graph, known) = match scratch(draft, inputs) {
            Ok(made) => made,
            Err(error) => return Some(Err(error)),
        };
        let mut graph = graph;
        let operands: Vec<ValueId> = inputs.iter().map(|v| known[v]).collect();
        let results = match op.decompose(&mut graph, &operands)? {
            Ok(results) => results,
            Err(error) => return Some(Err(error)),
        };
        let mut patch = Self::new();
        let mut at: HashMap<ValueId, Operand> = known.iter().map(|(&old, &new)| (new, old.into())).collect();
        for (value, record) in graph.values() {
            match &record.source {
                Source::Const(tensor) if !at.contains_key(&value) => {
                    at.insert(value, patch.constant(tensor.clone()));
                }
                Source::Node { node, index } => {
                    at.insert(value, Operand::New { node: node.index(), index: *index });
                }
                _ => {}
            }
        }
        for (_, node) in graph.nodes() {
            let inputs = node.inputs.iter().map(|v| at[v]).collect();
            patch.nodes.push((node.op.clone(), inputs));
        }
        patch.replace.extend(outputs.iter().copied().zip(results.iter().map(|v| at[v])));
        Some(Ok(patch))
    }
}

/// A graph that holds values of the same kinds and shapes as these, and where each of them stands in it.
fn scratch(draft: &Draft, values: &[ValueId]) -> Result<(Graph, HashMap<ValueId, ValueId>), GraphError> {
    let mut graph = Graph::new("decomposition");
    let mut known = HashMap::new();
    for &value in values {
        if known.contains_key(&value) {
            continue;
        }
        let name = format!("v{}", value.index());
        let shape = draft.shape(value).clone();
        let stand_in = match draft.source(value) {
            Source::Const(tensor) => graph.constant(tensor.clone()),
            Source::State => graph.state(&name, shape)?,
            Source::Param => graph.param(&name, shape)?,
            _ => graph.input(&name, shape)?,
        };
        known.insert(value, stand_in);
    }
    Ok((graph, known))
}
