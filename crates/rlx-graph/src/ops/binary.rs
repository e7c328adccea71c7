//! Elementwise functions of two operands, with NumPy broadcasting.

use crate::attrs::{attr_enum, op_struct};
use crate::eval::{broadcast_dims, broadcast_indices, from_f64, from_i64, to_f64, to_i64};
use crate::op::{EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use rlx_tensor::{DType, Shape, Tensor};

attr_enum! {
    /// The function applied.
    pub enum BinaryOp {
        /// `a + b`
        Add = "add",
        /// `a - b`
        Sub = "sub",
        /// `a * b`
        Mul = "mul",
        /// `a / b`; integers truncate toward zero, and division by zero gives zero.
        Div = "div",
        /// `a ^ b`
        Pow = "pow",
        /// The smaller; NaN if either is NaN.
        Min = "min",
        /// The larger; NaN if either is NaN.
        Max = "max",
        /// Remainder with the sign of the dividend.
        Rem = "rem",
        /// Logical and, of Bool.
        And = "and",
        /// Logical or, of Bool.
        Or = "or",
        /// Exclusive or, of Bool.
        Xor = "xor",
        /// `a == b`, to Bool.
        Equal = "equal",
        /// `a < b`, to Bool.
        Less = "less",
        /// `a <= b`, to Bool.
        LessEqual = "less_equal",
        /// `a > b`, to Bool.
        Greater = "greater",
        /// `a >= b`, to Bool.
        GreaterEqual = "greater_equal",
    }
}

op_struct! {
    /// `f(a, b)`, elementwise over operands of one dtype; comparisons give Bool.
    pub struct Binary = "binary" {
        /// The function.
        kind: BinaryOp,
    }
}

impl BinaryOp {
    /// True for the functions whose result is Bool whatever the operands.
    pub fn is_comparison(self) -> bool {
        self >= BinaryOp::Equal
    }

    /// True for the functions of Bool operands.
    pub fn is_logical(self) -> bool {
        matches!(self, BinaryOp::And | BinaryOp::Or | BinaryOp::Xor)
    }

    fn is_commutative(self) -> bool {
        use BinaryOp::*;
        matches!(self, Add | Mul | Min | Max | And | Or | Xor | Equal)
    }

    /// The function on f64; comparisons give 0 or 1.
    pub fn eval(self, a: f64, b: f64) -> f64 {
        let truth = |v: bool| f64::from(u8::from(v));
        match self {
            BinaryOp::Add => a + b,
            BinaryOp::Sub => a - b,
            BinaryOp::Mul => a * b,
            BinaryOp::Div => a / b,
            BinaryOp::Pow => a.powf(b),
            BinaryOp::Min | BinaryOp::Max if a.is_nan() || b.is_nan() => f64::NAN,
            BinaryOp::Min => a.min(b),
            BinaryOp::Max => a.max(b),
            BinaryOp::Rem => a % b,
            BinaryOp::And => truth(a != 0.0 && b != 0.0),
            BinaryOp::Or => truth(a != 0.0 || b != 0.0),
            BinaryOp::Xor => truth((a != 0.0) != (b != 0.0)),
            BinaryOp::Equal => truth(a == b),
            BinaryOp::Less => truth(a < b),
            BinaryOp::LessEqual => truth(a <= b),
            BinaryOp::Greater => truth(a > b),
            BinaryOp::GreaterEqual => truth(a >= b),
        }
    }

    fn eval_int(self, a: i64, b: i64) -> i64 {
        let truth = i64::from;
        match self {
            BinaryOp::Add => a.wrapping_add(b),
            BinaryOp::Sub => a.wrapping_sub(b),
            BinaryOp::Mul => a.wrapping_mul(b),
            BinaryOp::Div => a.checked_div(b).unwrap_or(0),
            BinaryOp::Pow => u32::try_from(b).map_or(0, |b| a.wrapping_pow(b)),
            BinaryOp::Min => a.min(b),
            BinaryOp::Max => a.max(b),
            BinaryOp::Rem => a.checked_rem(b).unwrap_or(0),
            BinaryOp::And => truth(a != 0 && b != 0),
            BinaryOp::Or => truth(a != 0 || b != 0),
            BinaryOp::Xor => truth((a != 0) != (b != 0)),
            BinaryOp::Equal => truth(a == b),
            BinaryOp::Less => truth(a < b),
            BinaryOp::LessEqual => truth(a <= b),
            BinaryOp::Greater => truth(a > b),
            BinaryOp::GreaterEqual => truth(a >= b),
        }
    }
}

impl OpDef for Binary {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2, inputs)?;
        let dtype = inputs[0].dtype();
        InferError::dtype(inputs, 1, dtype)?;
        let accepted = match self.kind {
            kind if kind.is_logical() => dtype == DType::Bool,
            BinaryOp::Equal => dtype == DType::Bool || dtype.is_float() || dtype.is_int(),
            _ => dtype.is_float() || dtype.is_int(),
        };
        if !accepted {
            let expected = format!("a dtype that {} is defined for", self.kind.name());
            return Err(InferError::DType { operand: 0, expected, found: dtype });
        }
        let dims = cx.broadcast(inputs[0].dims(), inputs[1].dims())?;
        let result = if self.kind.is_comparison() { DType::Bool } else { dtype };
        Ok(vec![Shape::from_dims(dims, result)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (a, b) = (inputs[0], inputs[1]);
        let dims = broadcast_dims(a.dims(), b.dims())
            .ok_or_else(|| EvalError::Value { operand: 1, reason: "does not broadcast".into() })?;
        let pairs = broadcast_indices(&dims, a.dims()).into_iter().zip(broadcast_indices(&dims, b.dims()));
        let dtype = if self.kind.is_comparison() { DType::Bool } else { a.dtype() };
        let result = if a.dtype().is_float() {
            let (x, y) = (to_f64(a)?, to_f64(b)?);
            from_f64(&dims, dtype, &pairs.map(|(i, j)| self.kind.eval(x[i], y[j])).collect::<Vec<_>>())
        } else {
            let (x, y) = (to_i64(a)?, to_i64(b)?);
            from_i64(&dims, dtype, &pairs.map(|(i, j)| self.kind.eval_int(x[i], y[j])).collect::<Vec<_>>())
        };
        Ok(vec![result?])
    }

    fn props(&self) -> Props {
        Props {
            elementwise: true,
            commutative: self.kind.is_commutative(),
            in_place: if self.kind.is_comparison() { vec![] } else { vec![0, 1] },
            ..Props::default()
        }
    }
}
