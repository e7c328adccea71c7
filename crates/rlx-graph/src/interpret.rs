//! The oracle: a graph evaluated node by node with each op's reference. Slow, obvious, and what every backend is compared with.

use crate::graph::{Graph, Source, Value};
use crate::ids::{NodeId, ValueId};
use crate::op::EvalError;
use rlx_tensor::{DType, Dim, DimBinding, DimError, Shape, Symbol, Tensor, byte_count};
use std::collections::{BTreeMap, BTreeSet};

/// Why a graph cannot be evaluated on what it was given.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InterpretError {
    /// An input that the graph does not have.
    #[error("graph has no input {name:?}{}", nearest_hint(.nearest))]
    Unknown {
        /// The name given.
        name: String,
        /// The valid name nearest to it.
        nearest: Option<String>,
    },
    /// An input is given twice.
    #[error("input {name:?} is given twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// An input, param or state is not given.
    #[error("{kind} {name:?} ({shape}) is missing")]
    Missing {
        /// Input, param or state.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What it should be.
        shape: Shape,
    },
    /// A tensor of another dtype.
    #[error("{kind} {name:?} must be {expected}, found {found}")]
    DType {
        /// Input, param or state.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Declared.
        expected: DType,
        /// Given.
        found: DType,
    },
    /// A tensor of another rank.
    #[error("{kind} {name:?} must have rank {expected}, found {found}")]
    Rank {
        /// Input, param or state.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Declared.
        expected: usize,
        /// Given.
        found: usize,
    },
    /// A tensor whose extent disagrees with the declaration or with another tensor.
    #[error("{kind} {name:?}, axis {axis}: {dim} = {expected}, found {found}")]
    Extent {
        /// Input, param or state.
        kind: &'static str,
        /// Its name.
        name: String,
        /// The axis.
        axis: usize,
        /// The declared dim.
        dim: Dim,
        /// Its value under the sizes seen so far.
        expected: usize,
        /// The extent given.
        found: usize,
    },
    /// No value of a symbol gives a dim the extent found, or several symbols are left open.
    #[error("{kind} {name:?}, axis {axis}: cannot solve {dim} = {found}")]
    Unsolved {
        /// Input, param or state.
        kind: &'static str,
        /// Its name.
        name: String,
        /// The axis.
        axis: usize,
        /// The declared dim.
        dim: Dim,
        /// The extent given.
        found: usize,
    },
    /// A dim of a result has no valid value.
    #[error("{op} ({node}): {cause}")]
    Dim {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// Why.
        cause: DimError,
    },
    /// Two dims that a node relies on differ in this run.
    #[error("{op} ({node}, {location}): {left} = {left_value} and {right} = {right_value} must be equal")]
    Check {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// Where the node was added.
        location: String,
        /// One dim.
        left: Dim,
        /// Its value.
        left_value: usize,
        /// The other dim.
        right: Dim,
        /// Its value.
        right_value: usize,
    },
    /// A result too large to address.
    #[error("{op} ({node}): a result of {dims:?} {dtype} is too large")]
    TooLarge {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// Its extents.
        dims: Vec<usize>,
        /// Its dtype.
        dtype: DType,
    },
    /// An op's reference evaluation failed.
    #[error("{op} ({node}, {location}): {cause}")]
    Eval {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// Where the node was added.
        location: String,
        /// Why.
        cause: EvalError,
    },
    /// An op's reference returned something else than its inference promised.
    #[error("{op} ({node}): result {index} should be {expected}, the reference gave {found}")]
    Result {
        /// The op.
        op: String,
        /// The node.
        node: NodeId,
        /// Which result.
        index: usize,
        /// Inferred.
        expected: String,
        /// Evaluated.
        found: String,
    },
}

fn nearest_hint(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or_else(String::new, |name| format!("; the nearest name is {name:?}"))
}

/// The candidate with the fewest single-letter changes from `name`; the first of equals.
pub fn nearest_name<'n>(name: &str, candidates: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    candidates.min_by_key(|candidate| edit_distance(name, candidate))
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// One declared axis and the extent a tensor gives it.
struct Axis<'g> {
    kind: &'static str,
    name: &'g str,
    axis: usize,
    dim: &'g Dim,
    found: usize,
}

/// Values of symbols from the extents of tensors, where every declared dim is matched with the extent found.
#[derive(Default)]
pub struct Unifier<'g> {
    open: Vec<Axis<'g>>,
}

impl<'g> Unifier<'g> {
    /// Checks dtype and rank of a tensor against a declaration and adds its axes.
    pub fn declare(&mut self, value: &'g Value, dims: &[usize], dtype: DType) -> Result<(), InterpretError> {
        let (kind, name) = (kind_of(value), value.name.as_deref().unwrap_or_default());
        if value.shape.dtype() != dtype {
            let expected = value.shape.dtype();
            return Err(InterpretError::DType { kind, name: name.to_owned(), expected, found: dtype });
        }
        if value.shape.rank() != dims.len() {
            let (expected, found) = (value.shape.rank(), dims.len());
            return Err(InterpretError::Rank { kind, name: name.to_owned(), expected, found });
        }
        let axes = value.shape.dims().iter().zip(dims).enumerate();
        self.open.extend(axes.map(|(axis, (dim, &found))| Axis { kind, name, axis, dim, found }));
        Ok(())
    }

    /// Values of all symbols: dims of one open symbol are solved for it, the others checked.
    pub fn solve(mut self) -> Result<DimBinding, InterpretError> {
        let mut binding = DimBinding::new();
        while !self.open.is_empty() {
            let before = self.open.len();
            let mut open = Vec::new();
            for axis in self.open {
                if !axis.settle(&mut binding)? {
                    open.push(axis);
                }
            }
            if open.len() == before {
                return Err(open[0].unsolved());
            }
            self.open = open;
        }
        Ok(binding)
    }
}

impl Axis<'_> {
    /// True when the axis needs no further look.
    fn settle(&self, binding: &mut DimBinding) -> Result<bool, InterpretError> {
        let mut symbols = BTreeSet::new();
        self.dim.collect_symbols(&mut symbols);
        let open: Vec<Symbol> = symbols.into_iter().filter(|s| binding.value(s).is_none()).collect();
        let symbol = match open.as_slice() {
            [] => {
                let expected = self.dim.eval(binding).map_err(|_| self.unsolved())?;
                return match expected == self.found {
                    true => Ok(true),
                    false => Err(self.disagrees(expected)),
                };
            }
            [only] => only,
            _ => return Ok(false),
        };
        let value = self.solve_for(symbol, binding).ok_or_else(|| self.unsolved())?;
        binding.bind(symbol, value).map_err(|_| self.unsolved())?;
        Ok(true)
    }

    /// The value of the only open symbol, for a dim that is linear in it.
    fn solve_for(&self, symbol: &Symbol, binding: &DimBinding) -> Option<usize> {
        const PROBE: usize = 1 << 20;
        let at = |value: usize| {
            let lookup = |s: &Symbol| if s == symbol { Some(value) } else { binding.value(s) };
            self.dim.eval_with(&lookup).ok().and_then(|v| i64::try_from(v).ok())
        };
        let (base, next) = (at(PROBE)?, at(PROBE + 1)?);
        let distance = i64::try_from(self.found).ok()?.checked_sub(base)?;
        let steps = distance.checked_div(next - base)?;
        let value = usize::try_from(steps.checked_add(PROBE as i64)?).ok()?;
        (at(value) == i64::try_from(self.found).ok()).then_some(value)
    }

    fn disagrees(&self, expected: usize) -> InterpretError {
        InterpretError::Extent {
            kind: self.kind,
            name: self.name.to_owned(),
            axis: self.axis,
            dim: self.dim.clone(),
            expected,
            found: self.found,
        }
    }

    fn unsolved(&self) -> InterpretError {
        InterpretError::Unsolved {
            kind: self.kind,
            name: self.name.to_owned(),
            axis: self.axis,
            dim: self.dim.clone(),
            found: self.found,
        }
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value.source {
        Source::Input => "input",
        Source::Param => "param",
        Source::State => "state",
        Source::Const(_) => "constant",
        Source::Node { .. } => "result",
    }
}

/// Evaluates a graph: named outputs in order. Symbols take their values from the extents of inputs, params and states. Ops that
/// update states change `states` only if the whole run succeeds.
pub fn interpret(
    graph: &Graph,
    inputs: &[(&str, Tensor)],
    params: &dyn Fn(&str) -> Option<Tensor>,
    states: &mut BTreeMap<String, Tensor>,
) -> Result<Vec<(String, Tensor)>, InterpretError> {
    let mut slots = bind_interface(graph, inputs, params, states)?;
    let mut unifier = Unifier::default();
    for (id, value) in graph.values() {
        if let Some(tensor) = &slots[id.index()] {
            unifier.declare(value, tensor.dims(), tensor.dtype())?;
        }
    }
    let binding = unifier.solve()?;
    run_checks(graph, &binding)?;
    let mut uses = graph.use_counts();
    for (id, _) in graph.nodes() {
        let results = evaluate(graph, id, &binding, &slots)?;
        let node = graph.node(id);
        for (&value, tensor) in node.outputs.iter().zip(&results) {
            slots[value.index()] = Some(tensor.clone());
        }
        for (operand, tensor) in node.op.def().props().writes.iter().zip(&results[node.outputs.len()..]) {
            slots[node.inputs[*operand].index()] = Some(tensor.clone());
        }
        for &value in &node.inputs {
            uses[value.index()] -= 1;
            if uses[value.index()] == 0 && !matches!(graph.value(value).source, Source::State) {
                slots[value.index()] = None;
            }
        }
    }
    let mut outputs = Vec::with_capacity(graph.outputs().len());
    for (name, value) in graph.outputs() {
        let missing = || InterpretError::Missing {
            kind: "output",
            name: name.clone(),
            shape: graph.shape(*value).clone(),
        };
        outputs.push((name.clone(), slots[value.index()].clone().ok_or_else(missing)?));
    }
    for (id, value) in graph.states() {
        if let (Some(name), Some(tensor)) = (&value.name, slots[id.index()].take()) {
            states.insert(name.clone(), tensor);
        }
    }
    Ok(outputs)
}

fn bind_interface(
    graph: &Graph,
    inputs: &[(&str, Tensor)],
    params: &dyn Fn(&str) -> Option<Tensor>,
    states: &BTreeMap<String, Tensor>,
) -> Result<Vec<Option<Tensor>>, InterpretError> {
    let mut given: BTreeMap<&str, &Tensor> = BTreeMap::new();
    for (name, tensor) in inputs {
        let known = graph.by_name(name).is_some_and(|id| matches!(graph.value(id).source, Source::Input));
        if !known {
            let names = graph.inputs().filter_map(|(_, v)| v.name.as_deref());
            let nearest = nearest_name(name, names).map(str::to_owned);
            return Err(InterpretError::Unknown { name: (*name).to_owned(), nearest });
        }
        if given.insert(name, tensor).is_some() {
            return Err(InterpretError::Twice { name: (*name).to_owned() });
        }
    }
    let mut slots = vec![None; graph.values().len()];
    for (id, value) in graph.values() {
        let name = value.name.as_deref().unwrap_or_default();
        let tensor = match &value.source {
            Source::Input => given.get(name).map(|&t| t.clone()),
            Source::Param => params(name),
            Source::State => states.get(name).cloned(),
            Source::Const(tensor) => Some(tensor.clone()),
            Source::Node { .. } => continue,
        };
        let missing = || InterpretError::Missing {
            kind: kind_of(value),
            name: name.to_owned(),
            shape: value.shape.clone(),
        };
        slots[id.index()] = Some(tensor.ok_or_else(missing)?);
    }
    Ok(slots)
}

fn op_name(graph: &Graph, node: NodeId) -> String {
    graph.node(node).op.def().name().to_owned()
}

fn run_checks(graph: &Graph, binding: &DimBinding) -> Result<(), InterpretError> {
    for check in graph.checks() {
        let node = check.node;
        let eval = |dim: &Dim| {
            dim.eval(binding).map_err(|cause| InterpretError::Dim { op: op_name(graph, node), node, cause })
        };
        let (left_value, right_value) = (eval(&check.left)?, eval(&check.right)?);
        if left_value != right_value {
            return Err(InterpretError::Check {
                op: op_name(graph, node),
                node,
                location: graph.node(node).location.to_string(),
                left: check.left.clone(),
                left_value,
                right: check.right.clone(),
                right_value,
            });
        }
    }
    Ok(())
}

fn evaluate(
    graph: &Graph,
    id: NodeId,
    binding: &DimBinding,
    slots: &[Option<Tensor>],
) -> Result<Vec<Tensor>, InterpretError> {
    let node = graph.node(id);
    let name = || op_name(graph, id);
    let location = || node.location.to_string();
    let mut expected = Vec::with_capacity(node.outputs.len());
    for &value in &node.outputs {
        let shape = graph.shape(value);
        let dims =
            shape.eval(binding).map_err(|cause| InterpretError::Dim { op: name(), node: id, cause })?;
        if byte_count(&dims, shape.dtype()).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(InterpretError::TooLarge { op: name(), node: id, dims, dtype: shape.dtype() });
        }
        expected.push((dims, shape.dtype()));
    }
    let operand = |value: &ValueId| {
        slots[value.index()].as_ref().ok_or_else(|| InterpretError::Missing {
            kind: kind_of(graph.value(*value)),
            name: value.to_string(),
            shape: graph.shape(*value).clone(),
        })
    };
    let operands = node.inputs.iter().map(operand).collect::<Result<Vec<_>, _>>()?;
    let op = node.op.bind_dims(&|symbol| binding.value(symbol).map(Dim::Known));
    let results = op.def().reference(&operands).map_err(|cause| InterpretError::Eval {
        op: name(),
        node: id,
        location: location(),
        cause,
    })?;
    expected
        .extend(op.def().props().writes.iter().map(|&i| (operands[i].dims().to_vec(), operands[i].dtype())));
    for (index, (dims, dtype)) in expected.iter().enumerate() {
        let found = results.get(index);
        if found.is_none_or(|t| t.dims() != dims || t.dtype() != *dtype) {
            let found = found.map_or("nothing".to_owned(), |t| format!("{}{:?}", t.dtype(), t.dims()));
            let expected = format!("{dtype}{dims:?}");
            return Err(InterpretError::Result { op: name(), node: id, index, expected, found });
        }
    }
    Ok(results)
}

#[cfg(test)]
mod tests;
