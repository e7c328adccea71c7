//! What a row of the op table writes graphs with: a node's operands as values of the region's graph, or as known numbers.

use crate::error::{Refusal, invalid};
use crate::model::{NodeDef, Slot};
use crate::symbolic::Dims;
use crate::value::{ElementType, Value};
use rlx::weights::{WeightBytes, WeightKind, WeightRegistry};
use rlx_graph::expand::Expand;
use rlx_graph::ops::cast::to_dtype;
use rlx_graph::{Graph, Op, ValueId};
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::{DType, Dim, Shape, Tensor};
use std::collections::{BTreeSet, HashMap, HashSet};

/// Constants of more bytes than this are weights of the registry rather than part of the graph.
pub(crate) const INLINE_BYTES: usize = 1024;

/// What is known of a slot while a region is built.
#[derive(Debug, Clone)]
pub enum Bound {
    /// The same in every run.
    Const(Value),
    /// Given or computed before the region runs.
    Runtime(Value),
    /// A value of the region's graph.
    Traced(ValueId),
    /// Dims that depend on symbols.
    Dims(Dims),
}

/// A graph under construction with the slots it takes in.
#[derive(Debug)]
pub struct Region {
    /// The graph.
    pub graph: Graph,
    /// Slots as values of the graph: inputs, params, constants.
    pub memo: HashMap<Slot, ValueId>,
    /// Slots that are inputs.
    pub inputs: Vec<Slot>,
    /// Constants stay constants, whatever their size: the graph is evaluated once and thrown away.
    pub folding: bool,
    /// Weights that are codes made numbers within the graph; only what multiplies with codes reads them so.
    pub(crate) coded: HashMap<ValueId, CodedWeight>,
    /// Values of a run that are codes made numbers, with one scale.
    pub(crate) dequantized: HashSet<ValueId>,
}

/// A weight whose numbers are made of known codes.
#[derive(Debug, Clone)]
pub(crate) struct CodedWeight {
    /// Codes, scales, zero points.
    pub slots: Vec<Slot>,
    /// Where the numbers go.
    pub result: Slot,
    pub dims: Vec<usize>,
    pub axis: i64,
}

impl Region {
    /// An empty region.
    pub fn named(name: &str, folding: bool) -> Self {
        let (memo, inputs) = (HashMap::new(), Vec::new());
        let (coded, dequantized) = (HashMap::new(), HashSet::new());
        Self { graph: Graph::new(name), memo, inputs, folding, coded, dequantized }
    }
}

/// A node being lowered.
pub struct Lowering<'a> {
    /// The node.
    pub node: &'a NodeDef,
    pub(crate) region: &'a mut Region,
    pub(crate) bound: &'a [Option<Bound>],
    pub(crate) read: &'a mut BTreeSet<Slot>,
    pub(crate) weights: &'a WeightRegistry,
    pub(crate) prefix: &'a str,
    /// Slots that the file gives values for: the same for every extent, so that they may be weights.
    pub(crate) initial: &'a HashSet<Slot>,
    /// Values that change from run to run are not to be built into the graph.
    pub(crate) avoid_values: bool,
}

impl Lowering<'_> {
    /// Number of operands, those left out included.
    pub fn count(&self) -> usize {
        self.node.inputs.len()
    }

    /// Version of the op's domain.
    pub fn opset(&self) -> i64 {
        self.node.opset
    }

    /// Whether an operand is given.
    pub fn has(&self, operand: usize) -> bool {
        self.node.inputs.get(operand).is_some_and(Option::is_some)
    }

    fn slot(&self, operand: usize) -> Result<Slot, Refusal> {
        match self.node.inputs.get(operand).copied().flatten() {
            Some(slot) => Ok(slot),
            None => invalid(format!("operand {operand} is missing")),
        }
    }

    fn bound(&self, operand: usize) -> Result<&Bound, Refusal> {
        let slot = self.slot(operand)?;
        self.bound[slot].as_ref().ok_or(Refusal::NeedsValue(operand))
    }

    /// The graph being built.
    pub fn graph(&mut self) -> &mut Graph {
        &mut self.region.graph
    }

    /// An operand as a value of the graph. What graphs do not compute on (text, narrow codes, sequences) is left to the host.
    pub fn value(&mut self, operand: usize) -> Result<ValueId, Refusal> {
        let slot = self.slot(operand)?;
        if let Some(&known) = self.region.memo.get(&slot) {
            return Ok(known);
        }
        let (tensor, constant) = match self.bound(operand)? {
            Bound::Traced(value) => {
                let value = *value;
                return match self.region.coded.get(&value).cloned() {
                    Some(weight) => self.numbers_of(&weight),
                    None => Ok(value),
                };
            }
            Bound::Const(Value::Tensor(tensor)) => (tensor.clone(), true),
            Bound::Runtime(Value::Tensor(tensor)) => (tensor.clone(), false),
            Bound::Const(Value::Stored(stored)) if !self.region.folding => {
                let stored = stored.clone();
                return self.weight(slot, &stored.dims, stored.dtype, stored.weight());
            }
            Bound::Const(Value::Stored(stored)) => (stored.loaded()?, true),
            Bound::Runtime(Value::Stored(stored)) => (stored.loaded()?, false),
            Bound::Dims(_) => return Err(Refusal::Unsupported("symbolic dims as numbers".to_owned())),
            _ => return Err(Refusal::Host),
        };
        let shape = Shape::new(tensor.dims(), tensor.dtype());
        let value = if !constant && !self.region.folding {
            self.region.inputs.push(slot);
            self.region.graph.input(&format!("v{slot}"), shape)?
        } else if tensor.bytes().len() > INLINE_BYTES && self.initial.contains(&slot) {
            let bytes = AlignedBytes::copied_from(tensor.bytes());
            return self.weight(slot, tensor.dims(), tensor.dtype(), bytes.into());
        } else {
            self.region.graph.constant(tensor)
        };
        self.region.memo.insert(slot, value);
        Ok(value)
    }

    /// An operand that multiplies with another: codes made numbers stay so if those of both are.
    pub fn value_beside(&mut self, operand: usize, other: usize) -> Result<ValueId, Refusal> {
        let traced = |operand: usize| match self.bound(operand) {
            Ok(Bound::Traced(value)) => Some(*value),
            _ => None,
        };
        let coded = traced(operand).filter(|value| self.region.coded.contains_key(value));
        let beside = traced(other).is_some_and(|value| self.region.dequantized.contains(&value));
        match coded.filter(|_| beside) {
            Some(value) => Ok(value),
            None => self.value(operand),
        }
    }

    /// The numbers of a weight of codes, as a weight of F32: what multiplies with it packs it once.
    fn numbers_of(&mut self, weight: &CodedWeight) -> Result<ValueId, Refusal> {
        let known = |&slot: &Slot| match &self.bound[slot] {
            Some(Bound::Const(value)) => Ok(value.clone()),
            _ => invalid("a weight's codes are not known"),
        };
        let known = weight.slots.iter().map(known).collect::<Result<Vec<Value>, _>>()?;
        let name = format!("{}{}.{}.numbers", self.prefix, weight.slots[0], weight.result);
        let shape = Shape::new(&weight.dims, DType::F32);
        self.named_weight(&name, shape, || {
            let known = known.iter().map(Value::loaded).collect::<Result<Vec<Value>, _>>()?;
            crate::ops::quant::numbers(&known, &weight.dims, weight.axis, 0)
        })
    }

    /// Whether an operand is known without a run.
    pub fn is_known(&self, operand: usize) -> bool {
        match self.bound(operand) {
            Ok(Bound::Const(_)) => true,
            Ok(Bound::Traced(value)) => self.region.graph.as_const(*value).is_some(),
            _ => false,
        }
    }

    /// The slots of the operands given, and that of the first result.
    pub(crate) fn own_slots(&self) -> (Vec<Slot>, Slot) {
        let given = self.node.inputs.iter().flatten().copied().collect();
        (given, self.node.outputs.iter().flatten().next().copied().unwrap_or_default())
    }

    /// An initialiser as a param of the graph, which the registry holds.
    fn weight(
        &mut self,
        slot: Slot,
        dims: &[usize],
        dtype: DType,
        content: WeightBytes,
    ) -> Result<ValueId, Refusal> {
        let (name, shape) = (format!("{}{slot}", self.prefix), Shape::new(dims, dtype));
        if self.weights.lookup(&name).is_none() {
            let registered = self.weights.register(&name, shape.clone(), content, WeightKind::Base);
            registered.map_err(|e| Refusal::Invalid(e.to_string()))?;
        }
        let value = self.region.graph.param(&name, shape)?;
        self.region.memo.insert(slot, value);
        Ok(value)
    }

    /// Numbers that this node makes of a known operand, as F32: a weight of the registry where the operand is one, else a constant. They are
    /// made once, whatever extents the node is lowered for; `what` tells them apart from others of the same operand.
    pub fn derived(
        &mut self,
        operand: usize,
        what: &str,
        dims: &[usize],
        make: impl FnOnce() -> Result<Tensor, Refusal>,
    ) -> Result<ValueId, Refusal> {
        let large = dims.iter().product::<usize>() * size_of::<f32>() > INLINE_BYTES;
        match large && self.is_weight(operand) {
            true => self.derived_weight(operand, what, Shape::new(dims, DType::F32), make),
            false => Ok(self.region.graph.constant(make()?)),
        }
    }

    /// Whether an operand is the same for every extent, so that what is made of it may be a weight.
    pub fn is_weight(&self, operand: usize) -> bool {
        !self.region.folding && self.slot(operand).is_ok_and(|slot| self.initial.contains(&slot))
    }

    /// What this node makes of a weight, as a weight of any dtype.
    pub fn derived_weight(
        &mut self,
        operand: usize,
        what: &str,
        shape: Shape,
        make: impl FnOnce() -> Result<Tensor, Refusal>,
    ) -> Result<ValueId, Refusal> {
        let slot = self.slot(operand)?;
        let (_, result) = self.own_slots();
        let name = format!("{}{slot}.{result}.{what}", self.prefix);
        self.named_weight(&name, shape, make)
    }

    fn named_weight(
        &mut self,
        name: &str,
        shape: Shape,
        make: impl FnOnce() -> Result<Tensor, Refusal>,
    ) -> Result<ValueId, Refusal> {
        if self.weights.lookup(name).is_none() {
            let bytes = AlignedBytes::copied_from(make()?.bytes());
            let registered = self.weights.register(name, shape.clone(), bytes, WeightKind::Base);
            registered.map_err(|e| Refusal::Invalid(e.to_string()))?;
        }
        match self.region.graph.by_name(name) {
            Some(known) => Ok(known),
            None => Ok(self.region.graph.param(name, shape)?),
        }
    }

    /// An operand that may be left out.
    pub fn optional(&mut self, operand: usize) -> Result<Option<ValueId>, Refusal> {
        if self.has(operand) { self.value(operand).map(Some) } else { Ok(None) }
    }

    /// All operands.
    pub fn values(&mut self) -> Result<Vec<ValueId>, Refusal> {
        (0..self.count()).map(|i| self.value(i)).collect()
    }

    /// Dims and dtype of an operand.
    pub fn shape(&self, operand: usize) -> Result<Shape, Refusal> {
        match self.bound(operand)? {
            Bound::Traced(value) => Ok(self.region.graph.shape(*value).clone()),
            Bound::Const(Value::Tensor(t)) | Bound::Runtime(Value::Tensor(t)) => {
                Ok(Shape::new(t.dims(), t.dtype()))
            }
            Bound::Const(Value::Stored(t)) | Bound::Runtime(Value::Stored(t)) => {
                Ok(Shape::new(&t.dims, t.dtype))
            }
            Bound::Dims(dims) if dims.scalar => Ok(Shape::scalar(DType::I64)),
            Bound::Dims(dims) => Ok(Shape::new(&[dims.dims.len()], DType::I64)),
            _ => Err(Refusal::Host),
        }
    }

    /// Dims of an operand as numbers.
    pub fn dims(&self, operand: usize) -> Result<Vec<usize>, Refusal> {
        known(&self.shape(operand)?)
    }

    /// Dtype of an operand.
    pub fn dtype(&self, operand: usize) -> Result<DType, Refusal> {
        Ok(self.shape(operand)?.dtype())
    }

    /// Rank of an operand.
    pub fn rank(&self, operand: usize) -> Result<usize, Refusal> {
        Ok(self.shape(operand)?.rank())
    }

    /// The known value of an operand; the region ends before the node if it is computed in it.
    pub fn known(&mut self, operand: usize) -> Result<Value, Refusal> {
        let slot = self.slot(operand)?;
        match self.bound(operand)? {
            Bound::Const(value) => value.loaded(),
            Bound::Runtime(_) if self.avoid_values => Err(Refusal::Host),
            Bound::Runtime(value) => {
                let value = value.loaded()?;
                self.read.insert(slot);
                Ok(value)
            }
            Bound::Traced(value) => match self.region.graph.as_const(*value) {
                Some(tensor) => Ok(Value::Tensor(tensor.clone())),
                None => Err(Refusal::NeedsValue(operand)),
            },
            Bound::Dims(_) => Err(Refusal::NeedsValue(operand)),
        }
    }

    /// The dims that an operand holds where they depend on symbols.
    pub fn symbolic(&self, operand: usize) -> Option<&Dims> {
        match self.bound(operand) {
            Ok(Bound::Dims(dims)) => Some(dims),
            _ => None,
        }
    }

    /// The constant an operand is, if it is known without a run.
    pub fn constant(&self, operand: usize) -> Option<Value> {
        match self.bound(operand).ok()? {
            Bound::Const(value) => value.loaded().ok(),
            Bound::Traced(value) => self.region.graph.as_const(*value).cloned().map(Value::Tensor),
            Bound::Runtime(_) | Bound::Dims(_) => None,
        }
    }

    /// The known integers of an operand.
    pub fn ints(&mut self, operand: usize) -> Result<Vec<i64>, Refusal> {
        self.known(operand)?.ints()
    }

    /// The known integers of an operand that may be left out.
    pub fn ints_opt(&mut self, operand: usize) -> Result<Option<Vec<i64>>, Refusal> {
        if self.has(operand) { self.ints(operand).map(Some) } else { Ok(None) }
    }

    /// The known single number of an operand.
    pub fn float(&mut self, operand: usize) -> Result<f64, Refusal> {
        match self.known(operand)?.floats()?.as_slice() {
            [only] => Ok(*only),
            more => invalid(format!("operand {operand} must be one number, found {}", more.len())),
        }
    }

    /// Integers that older versions have as attribute and newer ones as operand.
    pub fn attr_or_ints(&mut self, name: &str, operand: usize) -> Result<Option<Vec<i64>>, Refusal> {
        match self.node.ints_opt(name)? {
            Some(values) => Ok(Some(values)),
            None => self.ints_opt(operand),
        }
    }

    /// Short calls for primitives.
    pub fn expand(&mut self) -> Expand<'_> {
        Expand { graph: &mut self.region.graph }
    }

    /// A node with a single result.
    pub fn add(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> Result<ValueId, Refusal> {
        Ok(self.region.graph.add_one(op, inputs)?)
    }

    /// A node with several results.
    pub fn add_all(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> Result<Vec<ValueId>, Refusal> {
        Ok(self.region.graph.add(op, inputs)?)
    }

    /// A constant.
    pub fn tensor(&mut self, tensor: Tensor) -> ValueId {
        self.region.graph.constant(tensor)
    }

    /// A vector of I64.
    pub fn int_vector(&mut self, values: &[i64]) -> Result<ValueId, Refusal> {
        Ok(self.region.graph.constant(Tensor::from_slice(&[values.len()], values)?))
    }

    /// A value as another dtype.
    pub fn cast(&mut self, value: ValueId, to: DType) -> Result<ValueId, Refusal> {
        Ok(to_dtype(&mut self.region.graph, value, to)?)
    }

    /// Dims of a value as numbers.
    pub fn dims_of(&self, value: ValueId) -> Result<Vec<usize>, Refusal> {
        known(self.region.graph.shape(value))
    }

    /// The shape of a value.
    pub fn shape_of(&self, value: ValueId) -> Shape {
        self.region.graph.shape(value).clone()
    }

    /// The same elements under other extents.
    pub fn reshape(&mut self, value: ValueId, dims: &[usize]) -> Result<ValueId, Refusal> {
        let dims: Vec<Dim> = dims.iter().map(|&d| Dim::Known(d)).collect();
        Ok(self.expand().reshape(value, &dims)?)
    }

    /// The same elements under other dims.
    pub fn reshape_to(&mut self, value: ValueId, dims: &[Dim]) -> Result<ValueId, Refusal> {
        if self.shape_of(value).dims() == dims {
            return Ok(value);
        }
        Ok(self.expand().reshape(value, dims)?)
    }

    /// Expanded to extents.
    pub fn broadcast(&mut self, value: ValueId, dims: &[usize]) -> Result<ValueId, Refusal> {
        if self.dims_of(value)? == dims {
            return Ok(value);
        }
        let dims: Vec<Dim> = dims.iter().map(|&d| Dim::Known(d)).collect();
        Ok(self.expand().broadcast(value, &dims)?)
    }

    /// Whether result `index` is wanted.
    pub fn wants(&self, index: usize) -> bool {
        self.node.outputs.get(index).is_some_and(Option::is_some)
    }
}

fn known(shape: &Shape) -> Result<Vec<usize>, Refusal> {
    shape.known_dims().ok_or_else(|| Refusal::Unsupported(format!("symbolic dims {shape}")))
}

/// A node being evaluated between regions.
pub struct Host<'a> {
    /// The node.
    pub node: &'a NodeDef,
    /// Operands; nothing where one is left out.
    pub inputs: Vec<Option<Value>>,
    /// Values that its graphs take from around them.
    pub captured: Vec<Value>,
    pub(crate) runtime: &'a crate::runtime::Runtime,
}

impl Host<'_> {
    /// An operand.
    pub fn value(&self, operand: usize) -> Result<&Value, Refusal> {
        match self.inputs.get(operand) {
            Some(Some(value)) => Ok(value),
            _ => invalid(format!("operand {operand} is missing")),
        }
    }

    /// An operand that may be left out.
    pub fn optional(&self, operand: usize) -> Option<&Value> {
        self.inputs.get(operand).and_then(Option::as_ref)
    }

    /// An operand as tensor of numbers.
    pub fn tensor(&self, operand: usize) -> Result<&Tensor, Refusal> {
        self.value(operand)?.tensor()
    }

    /// Extents of an operand.
    pub fn dims(&self, operand: usize) -> Result<&[usize], Refusal> {
        match self.value(operand)?.dims() {
            Some(dims) => Ok(dims),
            None => invalid(format!("operand {operand} must be a tensor")),
        }
    }

    /// Element type of an operand.
    pub fn element(&self, operand: usize) -> Result<ElementType, Refusal> {
        match self.value(operand)?.element() {
            Some(element) => Ok(element),
            None => invalid(format!("operand {operand} must be a tensor")),
        }
    }

    /// Integers of an operand.
    pub fn ints(&self, operand: usize) -> Result<Vec<i64>, Refusal> {
        self.value(operand)?.ints()
    }

    /// Numbers of an operand.
    pub fn floats(&self, operand: usize) -> Result<Vec<f64>, Refusal> {
        self.value(operand)?.floats()
    }
}
