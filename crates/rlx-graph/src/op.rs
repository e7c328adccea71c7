//! What an op is: one trait, implemented in the op's own file, and the facts passes ask for.

use crate::attrs::{AttrError, AttrValue, Attrs};
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use rlx_tensor::{DType, DTypeClass, Dim, DimOrder, Shape, Symbol, Tensor, TensorError};
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// Attributes and text name of an op, derived by `op_struct!`.
pub trait OpAttrs: Sized {
    /// The name in text forms.
    const NAME: &'static str;
    /// The attributes, in declaration order.
    fn to_attrs(&self) -> Attrs;
    /// An op from attributes read from text.
    fn from_attrs(attrs: &[(String, AttrValue)]) -> Result<Self, AttrError>;
}

/// What an op means. Everything the compiler knows of an op it learns here.
pub trait OpDef: fmt::Debug + Send + Sync + 'static {
    /// The name in text forms.
    fn name(&self) -> &'static str;

    /// The attributes, in declaration order.
    fn attrs(&self) -> Attrs;

    /// Result shapes from operand shapes. `inputs.len()` is not checked before the call.
    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError>;

    /// The slow, obvious evaluation; sums accumulate in f64. Results are the outputs, then, for each operand in
    /// [`Props::writes`], the updated state.
    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError>;

    /// Facts for passes.
    fn props(&self) -> Props {
        Props::default()
    }

    /// Work for these shapes.
    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::memory_bound(inputs, outputs)
    }

    /// The same meaning in simpler ops, for a composite: adds nodes to `graph`, returns the outputs. `None` for a primitive.
    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        let _ = (graph, inputs);
        None
    }

    /// The op with the symbols in its attributes replaced, for an op from outside whose attributes hold dims.
    fn with_dims(&self, replace: &dyn Fn(&Symbol) -> Option<Dim>) -> Option<Arc<dyn OpDef>> {
        let _ = replace;
        None
    }

    /// For downcasting.
    fn as_any(&self) -> &dyn Any;
}

/// Facts about an op that passes and planners use.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Props {
    /// Has a decomposition.
    pub composite: bool,
    /// Output element i depends on element i of each operand (after broadcasting) only.
    pub elementwise: bool,
    /// The two operands may change places.
    pub commutative: bool,
    /// Operands that are states updated in place.
    pub writes: Vec<usize>,
    /// What `writes` names is only written beyond what other operands say is in use, and read there only after it was written: a run
    /// that fails half-way has changed nothing that a later run sees.
    pub appends: bool,
    /// The output is operand 0's bytes under another shape.
    pub view: bool,
    /// The output is operand 0's elements seen through other strides or another offset: no arithmetic, a copy at most.
    pub strided_view: bool,
    /// The output is operand 0's columns from this one on: its rows are rows of operand 0, cut.
    pub columns: Option<usize>,
    /// The output is the operands one behind the other along this axis.
    pub joins: Option<usize>,
    /// Operands whose buffer output 0 may take over when they die here and have the same size.
    pub in_place: Vec<usize>,
    /// The result is not a function of the operands alone; never folded, merged or dropped.
    pub impure: bool,
}

/// Work of one node as expressions over the graph's symbols.
#[derive(Debug, Clone, PartialEq)]
pub struct Cost {
    /// Floating-point operations (a fused multiply-add counts two).
    pub flops: Dim,
    /// Bytes read and written, each operand once.
    pub bytes: Dim,
}

impl Cost {
    /// One operation per output element; every operand read and every output written once.
    pub fn memory_bound(inputs: &[&Shape], outputs: &[&Shape]) -> Self {
        let flops = outputs.iter().fold(Dim::Known(0), |sum, s| sum + s.elements());
        Self::with_flops(flops, inputs, outputs)
    }

    /// This many operations; every operand read and every output written once.
    pub fn with_flops(flops: Dim, inputs: &[&Shape], outputs: &[&Shape]) -> Self {
        let bytes = inputs.iter().chain(outputs).fold(Dim::Known(0), |sum, s| sum + shape_bytes(s));
        Self { flops, bytes }
    }
}

/// Bytes of a shape as an expression (partial blocks round up).
pub fn shape_bytes(shape: &Shape) -> Dim {
    let (per_block, bytes) = shape.dtype().block();
    shape.elements().ceil_div(per_block) * bytes
}

/// Collects the dim equalities that inference relies on but cannot decide: they become run-time checks.
#[derive(Debug, Default)]
pub struct InferCx {
    checks: Vec<(Dim, Dim)>,
}

impl InferCx {
    /// Requires two dims to be equal: an error where they never are, a run-time check where it depends on the binding.
    pub fn require_equal(&mut self, what: &'static str, a: &Dim, b: &Dim) -> Result<(), InferError> {
        match a.compare(b) {
            DimOrder::Equal => Ok(()),
            DimOrder::Different => Err(InferError::Dims { what, left: a.clone(), right: b.clone() }),
            DimOrder::Unknown => {
                self.checks.push((a.clone(), b.clone()));
                Ok(())
            }
        }
    }

    /// Requires two lists of dims to be equal, rank included.
    pub fn require_same(
        &mut self,
        what: &'static str,
        operand: usize,
        found: &[Dim],
        expected: &[Dim],
    ) -> Result<(), InferError> {
        if found.len() != expected.len() {
            let expected = expected.len().to_string();
            return Err(InferError::Rank { operand, expected, found: found.len() });
        }
        found.iter().zip(expected).try_for_each(|(a, b)| self.require_equal(what, a, b))
    }

    /// The equalities to check at run time.
    pub fn into_checks(self) -> Vec<(Dim, Dim)> {
        self.checks
    }

    /// NumPy broadcasting of two lists of dims.
    pub fn broadcast(&mut self, a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, InferError> {
        let rank = a.len().max(b.len());
        let at = |dims: &[Dim], i: usize| {
            (i + dims.len()).checked_sub(rank).map_or(Dim::Known(1), |j| dims[j].clone())
        };
        (0..rank)
            .map(|i| {
                let (x, y) = (at(a, i), at(b, i));
                if x == 1 {
                    return Ok(y);
                }
                if y != 1 {
                    self.require_equal("broadcast dims", &x, &y)?;
                }
                Ok(if x.known().is_some() || y == 1 { x } else { y })
            })
            .collect()
    }
}

/// Why result shapes cannot be inferred.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// Wrong number of operands.
    #[error("takes {expected} operands, found {found}")]
    Arity {
        /// How many it takes, in words or digits.
        expected: String,
        /// How many were given.
        found: usize,
    },
    /// An operand has the wrong rank.
    #[error("operand {operand} must have rank {expected}, found {found}")]
    Rank {
        /// Position of the operand.
        operand: usize,
        /// Expected, in words or digits.
        expected: String,
        /// Rank found.
        found: usize,
    },
    /// An operand has the wrong dtype.
    #[error("operand {operand} must be {expected}, found {found}")]
    DType {
        /// Position of the operand.
        operand: usize,
        /// Expected, in words.
        expected: String,
        /// Dtype found.
        found: DType,
    },
    /// Two dims that must agree never do.
    #[error("{what}: {left} and {right} differ")]
    Dims {
        /// What the dims are.
        what: &'static str,
        /// One.
        left: Dim,
        /// The other.
        right: Dim,
    },
    /// An attribute does not fit the operands.
    #[error("attribute {name}: {reason}")]
    Attribute {
        /// The attribute.
        name: &'static str,
        /// Why.
        reason: String,
    },
}

impl InferError {
    /// Checks the number of operands.
    pub fn arity(expected: usize, inputs: &[&Shape]) -> Result<(), InferError> {
        match inputs.len() {
            found if found == expected => Ok(()),
            found => Err(InferError::Arity { expected: expected.to_string(), found }),
        }
    }

    /// Checks the rank of an operand.
    pub fn rank(inputs: &[&Shape], operand: usize, expected: usize) -> Result<(), InferError> {
        match inputs[operand].rank() {
            found if found == expected => Ok(()),
            found => Err(InferError::Rank { operand, expected: expected.to_string(), found }),
        }
    }

    /// The last dim of an operand, which must have one.
    pub fn last<'s>(inputs: &[&'s Shape], operand: usize) -> Result<&'s Dim, InferError> {
        inputs[operand].last().ok_or(InferError::Rank { operand, expected: "at least 1".into(), found: 0 })
    }

    /// Checks that an operand is of a floating-point dtype.
    pub fn float(inputs: &[&Shape], operand: usize) -> Result<(), InferError> {
        match inputs[operand].dtype() {
            found if found.is_float() => Ok(()),
            found => Err(InferError::DType { operand, expected: "a float".into(), found }),
        }
    }

    /// Checks that an operand is a weight: a float, or blocks that stand for floats.
    pub fn weight(inputs: &[&Shape], operand: usize) -> Result<(), InferError> {
        match inputs[operand].dtype() {
            found if found.is_float() || found.class() == DTypeClass::Quant => Ok(()),
            found => {
                Err(InferError::DType { operand, expected: "a float or quantised blocks".into(), found })
            }
        }
    }

    /// Checks that an operand holds indices.
    pub fn index(inputs: &[&Shape], operand: usize) -> Result<(), InferError> {
        match inputs[operand].dtype() {
            DType::I32 | DType::I64 => Ok(()),
            found => Err(InferError::DType { operand, expected: "i32 or i64".into(), found }),
        }
    }

    /// Checks that an attribute names an axis of a rank.
    pub fn axis(axis: usize, rank: usize) -> Result<(), InferError> {
        if axis < rank {
            return Ok(());
        }
        Err(InferError::Attribute { name: "axis", reason: format!("{axis} is outside rank {rank}") })
    }

    /// Checks that an attribute that counts something is not zero.
    pub fn positive(name: &'static str, value: usize) -> Result<(), InferError> {
        if value > 0 {
            return Ok(());
        }
        Err(InferError::Attribute { name, reason: "must be at least 1".into() })
    }

    /// Checks the dtype of an operand.
    pub fn dtype(inputs: &[&Shape], operand: usize, expected: DType) -> Result<(), InferError> {
        match inputs[operand].dtype() {
            found if found == expected => Ok(()),
            found => Err(InferError::DType { operand, expected: expected.to_string(), found }),
        }
    }
}

/// Why the reference evaluation failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// An operand's tensor is not what inference promised.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A value in an operand is out of range: an index past the end, say.
    #[error("operand {operand}: {reason}")]
    Value {
        /// Position of the operand.
        operand: usize,
        /// What is wrong.
        reason: String,
    },
    /// The dtype is not supported by the evaluation.
    #[error("{op} is not defined for {dtype}")]
    Unsupported {
        /// The op.
        op: &'static str,
        /// The dtype.
        dtype: DType,
    },
}

/// Implements the parts of [`OpDef`] that are the same for every op declared with `op_struct!`.
macro_rules! op_boilerplate {
    () => {
        fn name(&self) -> &'static str {
            <Self as $crate::op::OpAttrs>::NAME
        }
        fn attrs(&self) -> $crate::attrs::Attrs {
            $crate::op::OpAttrs::to_attrs(self)
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    };
}
pub(crate) use op_boilerplate;
