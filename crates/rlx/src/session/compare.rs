//! Looking at values inside a graph, and comparing devices step by step.

use super::compiled::{CompiledGraph, State};
use super::error::SessionError;
use super::value::TensorArg;
use super::{CompileOptions, Session};
use crate::backend::{Backend, StateBuffer};
use rlx_graph::eval::to_f64;
use rlx_graph::passes::{PASSES, PassOptions};
use rlx_graph::{Graph, Node, NodeId, Source, ValueId};
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::{DType, Dim, DimBinding, Shape, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// How two devices' results of one node compare.
#[derive(Debug, Clone)]
pub struct StepDifference {
    /// The node of the optimised graph.
    pub node: NodeId,
    /// The op.
    pub op: String,
    /// Where the graph's author wrote it.
    pub location: String,
    /// Position among the node's results.
    pub result: usize,
    /// The largest difference between two elements; infinite where one of them alone is no number.
    pub difference: f64,
    /// What rounding explains: unit roundoff of the dtype, times operations per element, times the largest magnitude.
    pub tolerance: f64,
}

impl StepDifference {
    /// Whether rounding explains the difference.
    pub fn agrees(&self) -> bool {
        self.difference <= self.tolerance
    }
}

/// A device compared with another, node by node, each node on the first device's operands.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// Every result compared, in execution order.
    pub results: Vec<StepDifference>,
    /// Nodes that could not be compared, with the reason.
    pub skipped: Vec<(NodeId, String)>,
}

impl Comparison {
    /// The first result that rounding does not explain.
    pub fn first_disagreement(&self) -> Option<&StepDifference> {
        self.results.iter().find(|r| !r.agrees())
    }
}

/// Options that take a graph as it is; what the device does not run is still decomposed.
fn as_it_is() -> CompileOptions {
    let skip = PASSES.iter().map(|p| p.name.to_owned()).filter(|name| name != "legalise").collect();
    CompileOptions { passes: PassOptions { skip, ..PassOptions::default() }, ..CompileOptions::default() }
}

/// The name under which [`CompiledGraph::tap`] gives a value.
pub fn tap_name(value: ValueId) -> String {
    format!("tap {value}")
}

impl CompiledGraph {
    /// The same graph, device and weights with more outputs: values of [`CompiledGraph::graph`], named as [`tap_name`] says.
    ///
    /// # Errors
    /// [`SessionError::Graph`] for a value of another graph.
    pub fn tap(&self, values: &[ValueId]) -> Result<CompiledGraph, SessionError> {
        let mut graph = self.kept_graph()?.clone();
        let taps: Vec<(String, ValueId)> = values.iter().map(|&v| (tap_name(v), v)).collect();
        let outputs = self.graph().outputs().iter().chain(&taps);
        let outputs: Vec<(&str, ValueId)> = outputs.map(|(name, v)| (name.as_str(), *v)).collect();
        graph.set_outputs(&outputs)?;
        let session =
            Session::with_backend(Arc::clone(self.backend())).with_weights(Arc::clone(self.weights()));
        session.compile_with(&graph, &as_it_is())
    }

    /// Runs this executable with every value tapped, then each node alone on `other`, with the operands this device gave it.
    ///
    /// `state` is read, not changed; `None` stands for fresh state. A node that reads a state which another node writes is skipped.
    ///
    /// # Errors
    /// As [`CompiledGraph::run`], on either device.
    pub fn compare(
        &self,
        other: &Arc<dyn Backend>,
        state: Option<&mut State>,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Result<Comparison, SessionError> {
        let graph = self.kept_graph()?;
        let values: Vec<ValueId> = graph.nodes().flat_map(|(_, node)| node.outputs.clone()).collect();
        let mut before = state.map_or_else(|| Ok(State::default()), copy_state)?;
        let binding = self.bind_inputs(&before, inputs)?;
        if before.buffers.is_empty() && !self.template().states().is_empty() {
            before = self.new_state(&binding)?;
        }
        let tapped = self.tap(&values)?;
        let found = tapped.run_with(&mut copy_state(&mut before)?, inputs)?;
        let taps: HashMap<String, Tensor> = found.into_iter().collect();
        let mut known: HashMap<ValueId, Tensor> = HashMap::new();
        for value in values {
            if let Some(tensor) = taps.get(&tap_name(value)) {
                known.insert(value, tensor.clone());
            }
        }
        for (value, record) in graph.inputs() {
            let given = inputs.iter().find(|(name, _)| Some(*name) == record.name.as_deref());
            if let Some((_, given)) = given {
                let dims = record.shape.eval(&binding)?;
                let tensor = Tensor::from_bytes(&dims, given.dtype, given.bytes);
                let tensor = tensor.map_err(|e| SessionError::Shape {
                    name: record.name.clone().unwrap_or_default(),
                    expected: record.shape.to_string(),
                    found: e.to_string(),
                })?;
                known.insert(value, tensor);
            }
        }
        let session = Session::with_backend(Arc::clone(other)).with_weights(Arc::clone(self.weights()));
        let mut comparison = Comparison::default();
        let states: Vec<AlignedBytes> = before
            .buffers
            .iter_mut()
            .map(|b| Ok(AlignedBytes::copied_from(b.bytes()?)))
            .collect::<Result<_, SessionError>>()?;
        let one = OneNode {
            graph,
            known: &known,
            binding: &binding,
            state: &states,
            dims: &before.dims,
            session: &session,
        };
        for (id, node) in graph.nodes() {
            match one.writer_of_a_state(id, node) {
                Some(writer) => {
                    let reason = format!("it shares a state with node {writer}");
                    comparison.skipped.push((id, reason));
                }
                None => comparison.results.extend(one.compare(id, node)?),
            }
        }
        Ok(comparison)
    }
}

/// What running one node alone needs.
struct OneNode<'c> {
    graph: &'c Graph,
    known: &'c HashMap<ValueId, Tensor>,
    binding: &'c DimBinding,
    state: &'c [AlignedBytes],
    dims: &'c [Vec<usize>],
    session: &'c Session,
}

impl OneNode<'_> {
    /// Another node that writes a state this node uses.
    fn writer_of_a_state(&self, id: NodeId, node: &Node) -> Option<NodeId> {
        let states: Vec<ValueId> = node.inputs.iter().copied().filter(|&v| self.is_state(v)).collect();
        let writes = |other: &Node| {
            let written = other.op.def().props().writes;
            written.iter().filter_map(|&i| other.inputs.get(i)).any(|v| states.contains(v))
        };
        let mut others = self.graph.nodes().filter(|(other, node)| *other != id && writes(node));
        others.next().map(|(other, _)| other)
    }

    fn is_state(&self, value: ValueId) -> bool {
        matches!(self.graph.value(value).source, Source::State)
    }

    fn compare(&self, id: NodeId, node: &Node) -> Result<Vec<StepDifference>, SessionError> {
        let expected = self.run(node)?;
        let shape = |&v: &ValueId| {
            let declared = self.graph.shape(v);
            let dims = match self.graph.states().position(|(state, _)| state == v) {
                Some(position) => self.dims[position].clone(),
                None => declared.eval(self.binding)?,
            };
            Ok(Shape::new(&dims, declared.dtype()))
        };
        let inputs: Vec<Shape> = node.inputs.iter().map(shape).collect::<Result<_, SessionError>>()?;
        let outputs: Vec<Shape> = node.outputs.iter().map(shape).collect::<Result<_, SessionError>>()?;
        let op = node.op.bind_dims(&|symbol| self.binding.value(symbol).map(Dim::Known));
        let cost = op.def().cost(&inputs.iter().collect::<Vec<_>>(), &outputs.iter().collect::<Vec<_>>());
        let flops = cost.flops.known().unwrap_or(0) as f64;
        let mut differences = Vec::with_capacity(expected.len());
        for (result, (value, (_, expected))) in node.outputs.iter().zip(&expected).enumerate() {
            let Some(found) = self.known.get(value) else { continue };
            let work = flops / expected.len().max(1) as f64;
            let (difference, tolerance) = difference(found, expected, work)?;
            let (op, location) = (node.op.def().name().to_owned(), node.location.to_string());
            differences.push(StepDifference { node: id, op, location, result, difference, tolerance });
        }
        Ok(differences)
    }

    /// Runs the node alone, with sizes as numbers.
    fn run(&self, node: &Node) -> Result<Vec<(String, Tensor)>, SessionError> {
        let mut graph = Graph::new(node.op.def().name());
        let mut state = State::default();
        let mut given: Vec<(String, &Tensor)> = Vec::new();
        let mut placed: HashMap<ValueId, ValueId> = HashMap::new();
        for &value in &node.inputs {
            if placed.contains_key(&value) {
                continue;
            }
            let record = self.graph.value(value);
            let name = record.name.clone().unwrap_or_default();
            let here = match &record.source {
                Source::Const(tensor) => graph.constant(tensor.clone()),
                Source::Param => graph.param(&name, record.shape.clone())?,
                Source::State => {
                    let position = self.graph.states().position(|(v, _)| v == value).unwrap_or(0);
                    let dims = &self.dims[position];
                    state.dims.push(dims.clone());
                    state.buffers.push(AlignedBytes::copied_from(self.state[position].as_slice()).into());
                    graph.state(&name, Shape::new(dims, record.shape.dtype()))?
                }
                _ => {
                    let Some(tensor) = self.known.get(&value) else {
                        return Err(SessionError::Missing { kind: "input", name });
                    };
                    let name = format!("operand {value}");
                    let shape = Shape::new(tensor.dims(), tensor.dtype());
                    given.push((name.clone(), tensor));
                    graph.input(&name, shape)?
                }
            };
            placed.insert(value, here);
        }
        let operands: Vec<ValueId> = node.inputs.iter().map(|v| placed[v]).collect();
        let op = node.op.bind_dims(&|symbol| self.binding.value(symbol).map(Dim::Known));
        let results = graph.add_at(op, &operands, node.location)?;
        let names: Vec<String> = (0..results.len()).map(|i| format!("result {i}")).collect();
        let outputs: Vec<(&str, ValueId)> = names.iter().map(String::as_str).zip(results).collect();
        graph.set_outputs(&outputs)?;
        let compiled = self.session.compile_with(&graph, &as_it_is())?;
        let given: Vec<(&str, TensorArg<'_>)> =
            given.iter().map(|(n, t)| (n.as_str(), (*t).into())).collect();
        compiled.run_with(&mut state, &given)
    }
}

fn copy_state(state: &mut State) -> Result<State, SessionError> {
    let copy = |buffer: &mut StateBuffer| Ok(AlignedBytes::copied_from(buffer.bytes()?).into());
    let buffers = state.buffers.iter_mut().map(copy).collect::<Result<_, SessionError>>()?;
    Ok(State { buffers, dims: state.dims.clone() })
}

/// The unit roundoff that results of a dtype are held to: f64 results are made of f32 arithmetic at worst.
pub(crate) fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F64 | DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => 2f64.powi(-10),
        DType::BF16 => 2f64.powi(-7),
        _ => 0.0,
    }
}

/// The largest difference of two tensors, and what rounding explains after `work` operations an element.
fn difference(found: &Tensor, expected: &Tensor, work: f64) -> Result<(f64, f64), SessionError> {
    let unit = rounding(expected.dtype());
    let eval = |t: &Tensor| {
        to_f64(t).map_err(|cause| crate::backend::BackendError::Eval { op: "comparing".to_owned(), cause })
    };
    let (found, expected) = (eval(found)?, eval(expected)?);
    let (mut worst, mut scale) = (0.0f64, 0.0f64);
    for (a, b) in found.iter().zip(&expected) {
        if a == b || (a.is_nan() && b.is_nan()) {
            scale = scale.max(if a.is_finite() { a.abs() } else { 0.0 });
            continue;
        }
        let apart = (a - b).abs();
        worst = worst.max(if apart.is_nan() { f64::INFINITY } else { apart });
        scale = scale.max(if b.is_finite() { b.abs() } else { 0.0 });
    }
    Ok((worst, unit * (16.0 + work) * scale.max(f64::from(f32::MIN_POSITIVE))))
}
