//! Elementwise functions of one operand.

use crate::attrs::{attr_enum, op_struct};
use crate::eval::{map_float, map_int};
use crate::op::{EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use rlx_tensor::{DType, Shape, Tensor};

attr_enum! {
    /// The function applied.
    pub enum UnaryOp {
        /// `-x`
        Neg = "neg",
        /// `|x|`
        Abs = "abs",
        /// `e^x`
        Exp = "exp",
        /// Natural logarithm.
        Log = "log",
        /// Square root.
        Sqrt = "sqrt",
        /// `1 / sqrt(x)`
        Rsqrt = "rsqrt",
        /// `1 / x`
        Reciprocal = "reciprocal",
        /// Hyperbolic tangent.
        Tanh = "tanh",
        /// Error function.
        Erf = "erf",
        /// `1 / (1 + e^-x)`
        Sigmoid = "sigmoid",
        /// Sine.
        Sin = "sin",
        /// Cosine.
        Cos = "cos",
        /// Largest integer not above.
        Floor = "floor",
        /// Smallest integer not below.
        Ceil = "ceil",
        /// Nearest integer, ties to even.
        Round = "round",
        /// -1, 0 or 1; NaN stays.
        Sign = "sign",
        /// Logical negation of Bool.
        Not = "not",
    }
}

op_struct! {
    /// `f(x)`, elementwise; floats for every function, integers for neg, abs and sign, Bool for not.
    pub struct Unary = "unary" {
        /// The function.
        kind: UnaryOp,
    }
}

impl UnaryOp {
    /// The function on f64.
    pub fn eval(self, x: f64) -> f64 {
        match self {
            UnaryOp::Neg => -x,
            UnaryOp::Abs => x.abs(),
            UnaryOp::Exp => x.exp(),
            UnaryOp::Log => x.ln(),
            UnaryOp::Sqrt => x.sqrt(),
            UnaryOp::Rsqrt => 1.0 / x.sqrt(),
            UnaryOp::Reciprocal => 1.0 / x,
            UnaryOp::Tanh => x.tanh(),
            UnaryOp::Erf => crate::eval::erf(x),
            UnaryOp::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            UnaryOp::Sin => x.sin(),
            UnaryOp::Cos => x.cos(),
            UnaryOp::Floor => x.floor(),
            UnaryOp::Ceil => x.ceil(),
            UnaryOp::Round => x.round_ties_even(),
            UnaryOp::Sign if x == 0.0 || x.is_nan() => x,
            UnaryOp::Sign => x.signum(),
            UnaryOp::Not => f64::from(u8::from(x == 0.0)),
        }
    }

    fn eval_int(self, x: i64) -> Option<i64> {
        match self {
            UnaryOp::Neg => Some(x.wrapping_neg()),
            UnaryOp::Abs => Some(x.wrapping_abs()),
            UnaryOp::Sign => Some(x.signum()),
            _ => None,
        }
    }

    fn accepts(self, dtype: DType) -> bool {
        match self {
            UnaryOp::Not => dtype == DType::Bool,
            UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sign => dtype.is_float() || dtype.is_int(),
            _ => dtype.is_float(),
        }
    }
}

impl OpDef for Unary {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let found = inputs[0].dtype();
        if !self.kind.accepts(found) {
            let expected = format!("a dtype that {} is defined for", self.kind.name());
            return Err(InferError::DType { operand: 0, expected, found });
        }
        Ok(vec![inputs[0].clone()])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = inputs[0];
        let result = match x.dtype().is_int() {
            true => map_int(x, |v| self.kind.eval_int(v).unwrap_or(v)),
            false => map_float(x, |v| self.kind.eval(v)),
        };
        Ok(vec![result?])
    }

    fn props(&self) -> Props {
        Props { elementwise: true, in_place: vec![0], ..Props::default() }
    }
}
