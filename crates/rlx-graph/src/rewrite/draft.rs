//! A graph under change: nodes with use lists, values that can be replaced everywhere.

use crate::graph::{Graph, GraphError, Source};
use crate::ids::{NodeId, ValueId};
use crate::op::{InferCx, InferError, OpDef};
use crate::ops::Op;
use rlx_tensor::{DimOrder, Shape, Tensor};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::panic::Location;

/// A value of a draft.
#[derive(Debug, Clone)]
struct DraftValue {
    shape: Shape,
    source: Source,
    name: Option<String>,
    users: Vec<NodeId>,
    named_outputs: usize,
    dropped: bool,
}

/// A node of a draft.
#[derive(Debug, Clone)]
pub struct DraftNode {
    op: Op,
    inputs: Vec<ValueId>,
    outputs: Vec<ValueId>,
    location: Location<'static>,
    order: usize,
    live: bool,
}

impl DraftNode {
    /// What it computes.
    pub fn op(&self) -> &Op {
        &self.op
    }

    /// Operands.
    pub fn inputs(&self) -> &[ValueId] {
        &self.inputs
    }

    /// Results.
    pub fn outputs(&self) -> &[ValueId] {
        &self.outputs
    }

    /// Where the caller added it, or what it replaces.
    pub fn location(&self) -> Location<'static> {
        self.location
    }
}

/// A graph that rules read and the driver changes. Ids are those of the graph it was made of; new ones follow.
#[derive(Debug, Clone)]
pub struct Draft {
    name: String,
    values: Vec<DraftValue>,
    nodes: Vec<DraftNode>,
    outputs: Vec<(String, ValueId)>,
    live: usize,
}

impl Draft {
    /// A draft of a graph.
    pub fn new(graph: &Graph) -> Self {
        let values = graph.values().map(|(_, v)| DraftValue {
            shape: v.shape.clone(),
            source: v.source.clone(),
            name: v.name.clone(),
            users: Vec::new(),
            named_outputs: 0,
            dropped: false,
        });
        let nodes = graph.nodes().map(|(id, n)| DraftNode {
            op: n.op.clone(),
            inputs: n.inputs.clone(),
            outputs: n.outputs.clone(),
            location: n.location,
            order: id.index(),
            live: true,
        });
        let mut draft = Self {
            name: graph.name().to_owned(),
            values: values.collect(),
            nodes: nodes.collect(),
            outputs: graph.outputs().to_vec(),
            live: graph.nodes().len(),
        };
        for (id, node) in graph.nodes() {
            node.inputs.iter().for_each(|v| draft.values[v.index()].users.push(id));
        }
        graph.outputs().iter().for_each(|(_, v)| draft.values[v.index()].named_outputs += 1);
        draft
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.live
    }

    /// True if there is no node.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// A node's record.
    pub fn node(&self, id: NodeId) -> &DraftNode {
        &self.nodes[id.index()]
    }

    /// True unless the node has been dropped.
    pub fn is_live(&self, id: NodeId) -> bool {
        self.nodes[id.index()].live
    }

    /// The nodes there are: those of the graph in execution order, then those added.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = (NodeId, &DraftNode)> {
        let ids = self.nodes.iter().enumerate().map(|(i, n)| (NodeId::from_index(i), n));
        ids.filter(|(_, n)| n.live)
    }

    /// Values with a name from outside (inputs, params and states) that are still in the interface.
    pub fn interface(&self) -> impl Iterator<Item = ValueId> {
        let ids = self.values.iter().enumerate().map(|(i, v)| (ValueId::from_index(i), v));
        ids.filter(|(_, v)| !v.dropped && matches!(v.source, Source::Input | Source::Param | Source::State))
            .map(|(id, _)| id)
    }

    /// Named outputs, in order.
    pub fn outputs(&self) -> &[(String, ValueId)] {
        &self.outputs
    }

    /// A value's shape.
    pub fn shape(&self, value: ValueId) -> &Shape {
        &self.values[value.index()].shape
    }

    /// Where a value comes from.
    pub fn source(&self, value: ValueId) -> &Source {
        &self.values[value.index()].source
    }

    /// A value's name, if it has one.
    pub fn value_name(&self, value: ValueId) -> Option<&str> {
        self.values[value.index()].name.as_deref()
    }

    /// The node that makes a value, if one does.
    pub fn producer(&self, value: ValueId) -> Option<NodeId> {
        match self.source(value) {
            Source::Node { node, .. } => Some(*node),
            _ => None,
        }
    }

    /// The producer's op, where it is a `T` and the value is its first result.
    pub fn made_by<T: OpDef>(&self, value: ValueId) -> Option<(&T, &DraftNode)> {
        match self.source(value) {
            Source::Node { node, index: 0 } => {
                let node = self.node(*node);
                Some((node.op.downcast()?, node))
            }
            _ => None,
        }
    }

    /// The nodes that use a value, once per use.
    pub fn users(&self, value: ValueId) -> &[NodeId] {
        &self.values[value.index()].users
    }

    /// How many operands and named outputs use a value.
    pub fn use_count(&self, value: ValueId) -> usize {
        let value = &self.values[value.index()];
        value.users.len() + value.named_outputs
    }

    /// The constant a value is, if it is one.
    pub fn as_const(&self, value: ValueId) -> Option<&Tensor> {
        match self.source(value) {
            Source::Const(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// The number a constant of one element holds, if the value is one and its dtype can be read.
    pub fn as_scalar(&self, value: ValueId) -> Option<f64> {
        let tensor = self.as_const(value).filter(|t| t.len() == 1)?;
        crate::eval::to_f64(tensor).ok()?.first().copied()
    }

    /// True for a param, for a constant, and for a cast of either: weights, whose value does not depend on the run.
    pub fn is_weight(&self, value: ValueId) -> bool {
        match self.source(value) {
            Source::Param | Source::Const(_) => true,
            _ => self
                .made_by::<crate::ops::cast::Cast>(value)
                .is_some_and(|(_, n)| matches!(self.source(n.inputs[0]), Source::Param | Source::Const(_))),
        }
    }

    /// True if two values have equal dims, by form, and one dtype.
    pub fn same_shape(&self, a: ValueId, b: ValueId) -> bool {
        shapes_equal(self.shape(a), self.shape(b))
    }

    /// A sort key for nodes that says which stood first in the source graph.
    pub fn order(&self, id: NodeId) -> usize {
        self.nodes[id.index()].order
    }

    pub(crate) fn node_count(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn add_const(&mut self, tensor: Tensor) -> ValueId {
        let shape = Shape::new(tensor.dims(), tensor.dtype());
        self.push_value(shape, Source::Const(tensor))
    }

    fn push_value(&mut self, shape: Shape, source: Source) -> ValueId {
        let id = ValueId::from_index(self.values.len());
        let (name, users) = (None, Vec::new());
        self.values.push(DraftValue { shape, source, name, users, named_outputs: 0, dropped: false });
        id
    }

    pub(crate) fn add_node(
        &mut self,
        op: Op,
        inputs: Vec<ValueId>,
        location: Location<'static>,
        order: usize,
    ) -> Result<NodeId, InferError> {
        let shapes: Vec<&Shape> = inputs.iter().map(|&v| self.shape(v)).collect();
        let results = op.def().infer(&mut InferCx::default(), &shapes)?;
        let id = NodeId::from_index(self.nodes.len());
        let mut outputs = Vec::with_capacity(results.len());
        for (index, shape) in results.into_iter().enumerate() {
            outputs.push(self.push_value(shape, Source::Node { node: id, index }));
        }
        inputs.iter().for_each(|v| self.values[v.index()].users.push(id));
        self.nodes.push(DraftNode { op, inputs, outputs, location, order, live: true });
        self.live += 1;
        Ok(id)
    }

    /// Uses of `from` become uses of `to`, which takes over its label.
    pub(crate) fn redirect(&mut self, from: ValueId, to: ValueId) {
        let users = std::mem::take(&mut self.values[from.index()].users);
        for &user in &users {
            let inputs = &mut self.nodes[user.index()].inputs;
            inputs.iter_mut().filter(|v| **v == from).for_each(|v| *v = to);
        }
        self.values[to.index()].users.extend(users);
        let named = std::mem::take(&mut self.values[from.index()].named_outputs);
        if named > 0 {
            self.outputs.iter_mut().filter(|(_, v)| *v == from).for_each(|(_, v)| *v = to);
            self.values[to.index()].named_outputs += named;
        }
        if matches!(self.source(to), Source::Node { .. }) && self.values[to.index()].name.is_none() {
            self.values[to.index()].name = self.values[from.index()].name.take();
        }
    }

    /// True if nothing uses the node's results and dropping it changes nothing.
    pub(crate) fn is_dead(&self, id: NodeId) -> bool {
        let node = self.node(id);
        if !node.live || node.outputs.iter().any(|&v| self.use_count(v) > 0) {
            return false;
        }
        let props = node.op.def().props();
        props.writes.is_empty() && !props.impure
    }

    /// Drops a node and what only it used; gives the values that lost a use.
    pub(crate) fn drop_node(&mut self, id: NodeId, dropped: &mut Vec<NodeId>) -> Vec<ValueId> {
        let mut touched = Vec::new();
        let mut pending = vec![id];
        while let Some(id) = pending.pop() {
            if !self.is_live(id) {
                continue;
            }
            self.nodes[id.index()].live = false;
            self.live -= 1;
            dropped.push(id);
            for value in self.nodes[id.index()].inputs.clone() {
                let users = &mut self.values[value.index()].users;
                if let Some(at) = users.iter().rposition(|&u| u == id) {
                    users.swap_remove(at);
                }
                touched.push(value);
                pending.extend(self.producer(value).filter(|&p| self.is_dead(p)));
            }
        }
        touched
    }

    /// Takes a param that nothing uses out of the interface.
    pub(crate) fn drop_param(&mut self, value: ValueId) {
        self.values[value.index()].dropped = true;
    }

    /// The graph. Nodes stand in order of what they replaced, as far as operands and states allow.
    pub fn build(&self) -> Result<Graph, BuildError> {
        let order = self.schedule()?;
        let mut graph = Graph::new(self.name.clone());
        let mut at: Vec<Option<ValueId>> = vec![None; self.values.len()];
        for id in self.interface() {
            let value = &self.values[id.index()];
            let (name, shape) = (value.name.as_deref().unwrap_or_default(), value.shape.clone());
            at[id.index()] = Some(match value.source {
                Source::Param => graph.param(name, shape)?,
                Source::State => graph.state(name, shape)?,
                _ => graph.input(name, shape)?,
            });
        }
        for id in order {
            let node = self.node(id);
            let inputs = self.place(&mut graph, &mut at, &node.inputs)?;
            let outputs = graph.add_at(node.op.clone(), &inputs, node.location)?;
            for (&old, &new) in node.outputs.iter().zip(&outputs) {
                at[old.index()] = Some(new);
                if let Some(name) = &self.values[old.index()].name {
                    graph.label(new, name);
                }
            }
        }
        let values: Vec<ValueId> = self.outputs.iter().map(|&(_, v)| v).collect();
        let values = self.place(&mut graph, &mut at, &values)?;
        let outputs: Vec<(&str, ValueId)> =
            self.outputs.iter().map(|(name, _)| name.as_str()).zip(values).collect();
        graph.set_outputs(&outputs)?;
        Ok(graph)
    }

    fn place(
        &self,
        graph: &mut Graph,
        at: &mut [Option<ValueId>],
        values: &[ValueId],
    ) -> Result<Vec<ValueId>, BuildError> {
        let mut placed = Vec::with_capacity(values.len());
        for &value in values {
            let id = match (at[value.index()], self.source(value)) {
                (Some(id), _) => id,
                (None, Source::Const(tensor)) => {
                    let id = graph.constant(tensor.clone());
                    if let Some(name) = &self.values[value.index()].name {
                        graph.label(id, name);
                    }
                    at[value.index()] = Some(id);
                    id
                }
                (None, _) => return Err(BuildError::Lost { value }),
            };
            placed.push(id);
        }
        Ok(placed)
    }

    /// Live nodes sorted so that operands come first, accesses to a state keep their order, and ties go to the older key.
    pub(crate) fn schedule(&self) -> Result<Vec<NodeId>, BuildError> {
        let (mut waits, mut after) = (vec![0usize; self.nodes.len()], BTreeMap::<NodeId, Vec<NodeId>>::new());
        for (id, node) in self.nodes() {
            waits[id.index()] += node.inputs.iter().filter(|&&v| self.producer(v).is_some()).count();
        }
        for (first, second) in self.effect_order() {
            waits[second.index()] += 1;
            after.entry(first).or_default().push(second);
        }
        let key = |id: NodeId| Reverse((self.order(id), id));
        let mut ready: BinaryHeap<_> =
            self.nodes().filter(|(id, _)| waits[id.index()] == 0).map(|(id, _)| key(id)).collect();
        let mut order = Vec::with_capacity(self.live);
        while let Some(Reverse((_, id))) = ready.pop() {
            order.push(id);
            let users = self.node(id).outputs.iter().flat_map(|&v| self.users(v));
            for &next in users.chain(after.get(&id).into_iter().flatten()) {
                waits[next.index()] -= 1;
                if waits[next.index()] == 0 {
                    ready.push(key(next));
                }
            }
        }
        match order.len() == self.live {
            true => Ok(order),
            false => {
                let stuck = self.nodes().find(|(id, _)| waits[id.index()] > 0);
                let at = stuck.map(|(_, n)| format!("{} at {}", n.op.def().name(), n.location));
                Err(BuildError::Cycle { at: at.unwrap_or_default() })
            }
        }
    }

    /// Pairs of nodes that must stay in order: accesses to one state of which one writes, and impure nodes.
    fn effect_order(&self) -> Vec<(NodeId, NodeId)> {
        let mut sorted: Vec<(usize, NodeId)> = Vec::new();
        let touches = |n: &DraftNode| n.inputs.iter().any(|&v| matches!(self.source(v), Source::State));
        sorted.extend(
            self.nodes()
                .filter(|(_, n)| touches(n) || n.op.def().props().impure)
                .map(|(id, n)| (n.order, id)),
        );
        sorted.sort_unstable();
        let mut pairs = Vec::new();
        let mut impure: Option<NodeId> = None;
        let mut states: BTreeMap<ValueId, (Option<NodeId>, Vec<NodeId>)> = BTreeMap::new();
        for (_, id) in sorted {
            let node = self.node(id);
            let props = node.op.def().props();
            if props.impure {
                pairs.extend(impure.replace(id).map(|before| (before, id)));
            }
            for (operand, &value) in node.inputs.iter().enumerate() {
                if !matches!(self.source(value), Source::State) {
                    continue;
                }
                let (writer, readers) = states.entry(value).or_default();
                pairs.extend(writer.filter(|&w| w != id).map(|w| (w, id)));
                if props.writes.contains(&operand) {
                    pairs.extend(readers.drain(..).filter(|&r| r != id).map(|r| (r, id)));
                    *writer = Some(id);
                } else {
                    readers.push(id);
                }
            }
        }
        pairs
    }
}

/// True if dims are equal by form and the dtype is one.
pub(crate) fn shapes_equal(a: &Shape, b: &Shape) -> bool {
    a == b
        || (a.dtype() == b.dtype()
            && a.rank() == b.rank()
            && a.dims().iter().zip(b.dims()).all(|(x, y)| x.compare(y) == DimOrder::Equal))
}

/// Why a draft is no graph.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A node does not fit its operands.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// Nodes wait for each other.
    #[error("nodes depend on each other, {at} among them")]
    Cycle {
        /// A node of the cycle.
        at: String,
    },
    /// A used value has no producer left.
    #[error("value {value} is used but nothing makes it")]
    Lost {
        /// The value.
        value: ValueId,
    },
}
