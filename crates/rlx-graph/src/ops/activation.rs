//! Activation functions of neural networks.

use crate::attrs::{attr_enum, op_struct};
use crate::eval::map_float;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::unary::{Unary, UnaryOp};
use rlx_tensor::{Shape, Tensor};

attr_enum! {
    /// The function applied.
    pub enum ActivationKind {
        /// `x`
        Identity = "identity",
        /// `max(x, 0)`
        Relu = "relu",
        /// `x / 2 * (1 + erf(x / sqrt 2))`
        Gelu = "gelu",
        /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`
        GeluTanh = "gelu_tanh",
        /// `x * sigmoid(1.702 x)`
        QuickGelu = "quick_gelu",
        /// `x * sigmoid(x)`
        Silu = "silu",
        /// `tanh(x)`
        Tanh = "tanh",
        /// `1 / (1 + e^-x)`
        Sigmoid = "sigmoid",
        /// `min(max(x, 0), 6)`
        Relu6 = "relu6",
    }
}

op_struct! {
    /// `f(x)`, elementwise over floats.
    pub struct Activation = "activation" {
        /// The function.
        kind: ActivationKind,
    }
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;

impl ActivationKind {
    /// The function on f64.
    pub fn eval(self, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self {
            ActivationKind::Identity => x,
            ActivationKind::Relu if x.is_nan() => x,
            ActivationKind::Relu6 if x.is_nan() => x,
            ActivationKind::Relu => x.max(0.0),
            ActivationKind::Relu6 => x.clamp(0.0, 6.0),
            ActivationKind::Gelu => 0.5 * x * (1.0 + crate::eval::erf(x * std::f64::consts::FRAC_1_SQRT_2)),
            ActivationKind::GeluTanh => {
                0.5 * x * (1.0 + (SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)).tanh())
            }
            ActivationKind::QuickGelu => x * sigmoid(1.702 * x),
            ActivationKind::Silu => x * sigmoid(x),
            ActivationKind::Tanh => x.tanh(),
            ActivationKind::Sigmoid => sigmoid(x),
        }
    }
}

impl Activation {
    /// The activated value; the value itself for the identity.
    pub fn apply(graph: &mut Graph, kind: ActivationKind, x: ValueId) -> Result<ValueId, GraphError> {
        if kind == ActivationKind::Identity { Ok(x) } else { graph.add_one(Activation { kind }, &[x]) }
    }

    fn expand(&self, graph: &mut Graph, x: ValueId) -> Result<ValueId, GraphError> {
        let mut chain = Chain { graph };
        match self.kind {
            ActivationKind::Identity => Ok(x),
            ActivationKind::Relu => chain.scalar(BinaryOp::Max, x, 0.0),
            ActivationKind::Relu6 => {
                let above = chain.scalar(BinaryOp::Max, x, 0.0)?;
                chain.scalar(BinaryOp::Min, above, 6.0)
            }
            ActivationKind::Gelu => {
                let inner = chain.scalar(BinaryOp::Mul, x, std::f64::consts::FRAC_1_SQRT_2)?;
                let erf = chain.unary(UnaryOp::Erf, inner)?;
                chain.half_times_one_plus(x, erf)
            }
            ActivationKind::GeluTanh => {
                let square = chain.binary(BinaryOp::Mul, x, x)?;
                let cube = chain.binary(BinaryOp::Mul, square, x)?;
                let bent = chain.scalar(BinaryOp::Mul, cube, 0.044715)?;
                let sum = chain.binary(BinaryOp::Add, x, bent)?;
                let inner = chain.scalar(BinaryOp::Mul, sum, SQRT_2_OVER_PI)?;
                let tanh = chain.unary(UnaryOp::Tanh, inner)?;
                chain.half_times_one_plus(x, tanh)
            }
            ActivationKind::QuickGelu => {
                let inner = chain.scalar(BinaryOp::Mul, x, 1.702)?;
                let gate = chain.unary(UnaryOp::Sigmoid, inner)?;
                chain.binary(BinaryOp::Mul, x, gate)
            }
            ActivationKind::Silu => {
                let gate = chain.unary(UnaryOp::Sigmoid, x)?;
                chain.binary(BinaryOp::Mul, x, gate)
            }
            ActivationKind::Tanh => chain.unary(UnaryOp::Tanh, x),
            ActivationKind::Sigmoid => chain.unary(UnaryOp::Sigmoid, x),
        }
    }
}

struct Chain<'g> {
    graph: &'g mut Graph,
}

impl Chain<'_> {
    fn unary(&mut self, kind: UnaryOp, x: ValueId) -> Result<ValueId, GraphError> {
        self.graph.add_one(Unary { kind }, &[x])
    }

    fn binary(&mut self, kind: BinaryOp, a: ValueId, b: ValueId) -> Result<ValueId, GraphError> {
        self.graph.add_one(Binary { kind }, &[a, b])
    }

    fn scalar(&mut self, kind: BinaryOp, a: ValueId, b: f64) -> Result<ValueId, GraphError> {
        let constant = self.graph.constant(Tensor::scalar(b as f32));
        let constant = crate::ops::cast::to_dtype(self.graph, constant, self.graph.shape(a).dtype())?;
        self.binary(kind, a, constant)
    }

    fn half_times_one_plus(&mut self, x: ValueId, y: ValueId) -> Result<ValueId, GraphError> {
        let sum = self.scalar(BinaryOp::Add, y, 1.0)?;
        let product = self.binary(BinaryOp::Mul, x, sum)?;
        self.scalar(BinaryOp::Mul, product, 0.5)
    }
}

impl OpDef for Activation {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        match inputs[0].dtype() {
            dtype if dtype.is_float() => Ok(vec![inputs[0].clone()]),
            found => Err(InferError::DType { operand: 0, expected: "a float".into(), found }),
        }
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        Ok(vec![map_float(inputs[0], |v| self.kind.eval(v))?])
    }

    fn props(&self) -> Props {
        Props { composite: true, elementwise: true, in_place: vec![0], ..Props::default() }
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(graph, inputs[0]).map(|y| vec![y]))
    }
}
