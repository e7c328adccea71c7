//! The graph: values, nodes, named interface. Nodes stand in execution order, which is also topological order.

use crate::ids::{NodeId, ValueId};
use crate::op::{InferCx, InferError};
use crate::ops::Op;
use rlx_tensor::{Dim, Shape, Symbol, Tensor};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::panic::Location;

/// Where a value comes from.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Source {
    /// Given by the caller at each run.
    Input,
    /// A weight, bound by name.
    Param,
    /// Part of the graph.
    Const(Tensor),
    /// Owned by the caller, updated in place, survives runs.
    State,
    /// Output `index` of a node.
    Node {
        /// The node.
        node: NodeId,
        /// Which output.
        index: usize,
    },
}

/// A value: its shape, where it comes from, and its name if it has one.
#[derive(Debug, Clone)]
pub struct Value {
    /// Dims and dtype.
    pub shape: Shape,
    /// Where it comes from.
    pub source: Source,
    /// Name: always present for inputs, params and states.
    pub name: Option<String>,
}

/// One application of an op.
#[derive(Debug, Clone)]
pub struct Node {
    /// What it computes.
    pub op: Op,
    /// Operands.
    pub inputs: Vec<ValueId>,
    /// Results.
    pub outputs: Vec<ValueId>,
    /// Where the caller added it.
    pub location: Location<'static>,
}

/// A run-time check: two dims that a node relies on being equal.
#[derive(Debug, Clone, PartialEq)]
pub struct DimCheck {
    /// The node that relies on it.
    pub node: NodeId,
    /// One dim.
    pub left: Dim,
    /// The other.
    pub right: Dim,
}

/// Values and nodes with a named interface.
#[derive(Debug, Clone)]
pub struct Graph {
    name: String,
    values: Vec<Value>,
    nodes: Vec<Node>,
    outputs: Vec<(String, ValueId)>,
    names: HashMap<String, ValueId>,
    checks: Vec<DimCheck>,
}

/// Why a graph cannot be built or changed as asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GraphError {
    /// Operand shapes do not fit the op.
    #[error("{op}({operands}) at {location}: {cause}")]
    Infer {
        /// The op's name.
        op: String,
        /// Operand shapes.
        operands: String,
        /// The caller's source line.
        location: String,
        /// What is wrong.
        cause: InferError,
    },
    /// An interface name is used twice.
    #[error("{kind} name {name:?} is already taken (at {location})")]
    DuplicateName {
        /// Input, param, state or output.
        kind: &'static str,
        /// The name.
        name: String,
        /// The caller's source line.
        location: String,
    },
    /// A value id that is not of this graph.
    #[error("{op} at {location}: operand {value} is not a value of graph {graph:?}")]
    UnknownValue {
        /// The op's name.
        op: String,
        /// The value.
        value: ValueId,
        /// The graph.
        graph: String,
        /// The caller's source line.
        location: String,
    },
    /// An op that updates a state was given something else.
    #[error("{op} at {location}: operand {operand} must be a state")]
    NotAState {
        /// The op's name.
        op: String,
        /// Position of the operand.
        operand: usize,
        /// The caller's source line.
        location: String,
    },
    /// An op returned another number of results than expected.
    #[error("{op} at {location}: {reason}")]
    Shape {
        /// The op's name.
        op: String,
        /// What is wrong.
        reason: String,
        /// The caller's source line.
        location: String,
    },
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            values: Vec::new(),
            nodes: Vec::new(),
            outputs: Vec::new(),
            names: HashMap::new(),
            checks: Vec::new(),
        }
    }

    /// The graph's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Declares an input. Symbols in its dims take their run-time value from the tensor given.
    #[track_caller]
    pub fn input(&mut self, name: &str, shape: Shape) -> Result<ValueId, GraphError> {
        self.declare("input", name, shape, Source::Input)
    }

    /// Declares a weight, bound by name when the graph is compiled.
    #[track_caller]
    pub fn param(&mut self, name: &str, shape: Shape) -> Result<ValueId, GraphError> {
        self.declare("param", name, shape, Source::Param)
    }

    /// Declares a buffer that the caller owns and ops update in place.
    #[track_caller]
    pub fn state(&mut self, name: &str, shape: Shape) -> Result<ValueId, GraphError> {
        self.declare("state", name, shape, Source::State)
    }

    /// A constant.
    pub fn constant(&mut self, tensor: Tensor) -> ValueId {
        let shape = Shape::new(tensor.dims(), tensor.dtype());
        self.push_value(Value { shape, source: Source::Const(tensor), name: None })
    }

    #[track_caller]
    fn declare(
        &mut self,
        kind: &'static str,
        name: &str,
        shape: Shape,
        source: Source,
    ) -> Result<ValueId, GraphError> {
        if self.names.contains_key(name) {
            let location = Location::caller().to_string();
            return Err(GraphError::DuplicateName { kind, name: name.to_owned(), location });
        }
        let id = self.push_value(Value { shape, source, name: Some(name.to_owned()) });
        self.names.insert(name.to_owned(), id);
        Ok(id)
    }

    fn push_value(&mut self, value: Value) -> ValueId {
        let id = ValueId::from_index(self.values.len());
        self.values.push(value);
        id
    }

    /// Adds a node at the end and returns its results.
    #[track_caller]
    pub fn add(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> Result<Vec<ValueId>, GraphError> {
        self.add_at(op.into(), inputs, *Location::caller())
    }

    /// Adds a node with a single result at the end and returns that result.
    #[track_caller]
    pub fn add_one(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let op = op.into();
        let location = *Location::caller();
        let name = op.def().name();
        match self.add_at(op, inputs, location)?.as_slice() {
            [only] => Ok(*only),
            more => Err(GraphError::Shape {
                op: name.to_owned(),
                reason: format!("has {} results, one was expected", more.len()),
                location: location.to_string(),
            }),
        }
    }

    /// Adds a node with a given source location (a pass keeps the location of the node it replaces).
    pub fn add_at(
        &mut self,
        op: Op,
        inputs: &[ValueId],
        location: Location<'static>,
    ) -> Result<Vec<ValueId>, GraphError> {
        let name = op.def().name();
        let at = || location.to_string();
        if let Some(&value) = inputs.iter().find(|v| v.index() >= self.values.len()) {
            let graph = self.name.clone();
            return Err(GraphError::UnknownValue { op: name.to_owned(), value, graph, location: at() });
        }
        let shapes: Vec<&Shape> = inputs.iter().map(|&v| self.shape(v)).collect();
        let mut cx = InferCx::default();
        let results = op.def().infer(&mut cx, &shapes).map_err(|cause| {
            let operands: Vec<String> = shapes.iter().map(|s| s.to_string()).collect();
            GraphError::Infer { op: name.to_owned(), operands: operands.join(", "), location: at(), cause }
        })?;
        for operand in op.def().props().writes {
            if !inputs.get(operand).is_some_and(|&v| matches!(self.value(v).source, Source::State)) {
                return Err(GraphError::NotAState { op: name.to_owned(), operand, location: at() });
            }
        }
        let node = NodeId::from_index(self.nodes.len());
        let mut outputs = Vec::with_capacity(results.len());
        for (index, shape) in results.into_iter().enumerate() {
            outputs.push(self.push_value(Value { shape, source: Source::Node { node, index }, name: None }));
        }
        let checks = cx.into_checks().into_iter().map(|(left, right)| DimCheck { node, left, right });
        self.checks.extend(checks);
        self.nodes.push(Node { op, inputs: inputs.to_vec(), outputs: outputs.clone(), location });
        Ok(outputs)
    }

    /// Names the outputs, in order.
    #[track_caller]
    pub fn set_outputs(&mut self, outputs: &[(&str, ValueId)]) -> Result<(), GraphError> {
        let location = Location::caller().to_string();
        let mut seen = BTreeSet::new();
        for &(name, value) in outputs {
            if !seen.insert(name) {
                return Err(GraphError::DuplicateName { kind: "output", name: name.to_owned(), location });
            }
            if value.index() >= self.values.len() {
                let (op, graph) = ("set_outputs".to_owned(), self.name.clone());
                return Err(GraphError::UnknownValue { op, value, graph, location });
            }
        }
        self.outputs = outputs.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
        Ok(())
    }

    /// Gives a value a name for text forms and messages; ignored for inputs, params and states, which have theirs.
    pub fn label(&mut self, value: ValueId, name: &str) {
        if let Some(v) = self.values.get_mut(value.index()) {
            v.name.get_or_insert_with(|| name.to_owned());
        }
    }

    /// A value's record.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// A value's shape.
    pub fn shape(&self, id: ValueId) -> &Shape {
        &self.values[id.index()].shape
    }

    /// The constant a value is, if it is one.
    pub fn as_const(&self, id: ValueId) -> Option<&Tensor> {
        match &self.value(id).source {
            Source::Const(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// The node that makes a value, if one does.
    pub fn producer(&self, id: ValueId) -> Option<NodeId> {
        match self.value(id).source {
            Source::Node { node, .. } => Some(node),
            _ => None,
        }
    }

    /// A node's record.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// Nodes in execution order.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = (NodeId, &Node)> + DoubleEndedIterator {
        self.nodes.iter().enumerate().map(|(i, n)| (NodeId::from_index(i), n))
    }

    /// Values in the order they were made.
    pub fn values(&self) -> impl ExactSizeIterator<Item = (ValueId, &Value)> {
        self.values.iter().enumerate().map(|(i, v)| (ValueId::from_index(i), v))
    }

    /// Named outputs, in order.
    pub fn outputs(&self) -> &[(String, ValueId)] {
        &self.outputs
    }

    /// Equalities to check at run time.
    pub fn checks(&self) -> &[DimCheck] {
        &self.checks
    }

    /// Inputs in declaration order.
    pub fn inputs(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values().filter(|(_, v)| matches!(v.source, Source::Input))
    }

    /// Params in declaration order.
    pub fn params(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values().filter(|(_, v)| matches!(v.source, Source::Param))
    }

    /// States in declaration order.
    pub fn states(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values().filter(|(_, v)| matches!(v.source, Source::State))
    }

    /// The value of an interface name (input, param or state).
    pub fn by_name(&self, name: &str) -> Option<ValueId> {
        self.names.get(name).copied()
    }

    /// Every symbol in the interface and in results, sorted.
    pub fn symbols(&self) -> BTreeSet<Symbol> {
        let mut symbols = BTreeSet::new();
        self.values.iter().for_each(|v| v.shape.collect_symbols(&mut symbols));
        symbols
    }

    /// How many operands and outputs use each value, indexed by value.
    pub fn use_counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.values.len()];
        let operands = self.nodes.iter().flat_map(|n| &n.inputs);
        for value in operands.chain(self.outputs.iter().map(|(_, v)| v)) {
            counts[value.index()] += 1;
        }
        counts
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.op.def().name(), self.inputs)
    }
}

/// Ways to break a graph that the builder does not allow, for the verifier's tests.
#[cfg(test)]
impl Graph {
    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    pub(crate) fn value_mut(&mut self, id: ValueId) -> &mut Value {
        &mut self.values[id.index()]
    }

    pub(crate) fn outputs_mut(&mut self) -> &mut Vec<(String, ValueId)> {
        &mut self.outputs
    }

    pub(crate) fn checks_mut(&mut self) -> &mut Vec<DimCheck> {
        &mut self.checks
    }

    pub(crate) fn swap_nodes(&mut self, a: NodeId, b: NodeId) {
        self.nodes.swap(a.index(), b.index());
        for id in [a, b] {
            for (index, value) in self.nodes[id.index()].outputs.clone().into_iter().enumerate() {
                self.values[value.index()].source = Source::Node { node: id, index };
            }
        }
    }
}
