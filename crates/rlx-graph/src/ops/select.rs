//! One of two values by a condition.

use crate::attrs::op_struct;
use crate::eval::{broadcast_dims, broadcast_indices};
use crate::op::{EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use rlx_tensor::{DType, Shape, Tensor};

op_struct! {
    /// `condition ? a : b`, elementwise with NumPy broadcasting; nothing of the value not taken reaches the result.
    ///
    /// Operands: `condition` Bool; `a` and `b` of one dtype.
    pub struct Select = "select" {}
}

impl OpDef for Select {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(3, inputs)?;
        InferError::dtype(inputs, 0, DType::Bool)?;
        InferError::dtype(inputs, 2, inputs[1].dtype())?;
        if inputs[1].dtype().element_bytes().is_none() {
            let (expected, found) = ("a dtype of whole bytes".into(), inputs[1].dtype());
            return Err(InferError::DType { operand: 1, expected, found });
        }
        let values = cx.broadcast(inputs[1].dims(), inputs[2].dims())?;
        let dims = cx.broadcast(&values, inputs[0].dims())?;
        Ok(vec![Shape::from_dims(dims, inputs[1].dtype())])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let misfit = || EvalError::Value { operand: 2, reason: "does not broadcast".into() };
        let values = broadcast_dims(inputs[1].dims(), inputs[2].dims()).ok_or_else(misfit)?;
        let dims = broadcast_dims(&values, inputs[0].dims()).ok_or_else(misfit)?;
        let condition = crate::eval::to_i64(inputs[0])?;
        let indices = [0, 1, 2].map(|i: usize| broadcast_indices(&dims, inputs[i].dims()));
        let element = inputs[1].dtype().element_bytes().unwrap_or(0);
        let mut bytes = Vec::new();
        for (i, &at) in indices[0].iter().enumerate() {
            let (from, index) = match condition[at] != 0 {
                true => (inputs[1], indices[1][i]),
                false => (inputs[2], indices[2][i]),
            };
            bytes.extend_from_slice(&from.bytes()[index * element..][..element]);
        }
        Ok(vec![Tensor::from_bytes(&dims, inputs[1].dtype(), &bytes)?])
    }

    fn props(&self) -> Props {
        Props { elementwise: true, in_place: vec![1, 2], ..Props::default() }
    }
}
