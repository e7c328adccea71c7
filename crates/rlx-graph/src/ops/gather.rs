//! Slices of a value picked by index.

use crate::attrs::op_struct;
use crate::eval::to_i64;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, op_boilerplate, shape_bytes};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// `x` at `indices` along `axis`: the dims of `indices` stand in place of that axis.
    ///
    /// Operands: `x`; `indices [..]` I32 or I64, each in `0 .. extent`. An index outside is an error.
    pub struct Gather = "gather" {
        /// The axis that is indexed.
        axis: usize,
    }
}

/// Indices as positions below `extent`; the operand is named in the error.
pub fn checked_indices(indices: &[i64], extent: usize, operand: usize) -> Result<Vec<usize>, EvalError> {
    let check = |&index: &i64| match usize::try_from(index) {
        Ok(at) if at < extent => Ok(at),
        _ => {
            let reason = format!("index {index} is outside 0..{extent}");
            Err(EvalError::Value { operand, reason })
        }
    };
    indices.iter().map(check).collect()
}

impl OpDef for Gather {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2, inputs)?;
        InferError::axis(self.axis, inputs[0].rank())?;
        InferError::index(inputs, 1)?;
        if inputs[0].dtype().element_bytes().is_none() {
            let (expected, found) = ("a dtype of whole bytes".into(), inputs[0].dtype());
            return Err(InferError::DType { operand: 0, expected, found });
        }
        let (before, after) = inputs[0].dims().split_at(self.axis);
        let dims = [before, inputs[1].dims(), &after[1..]].concat();
        Ok(vec![Shape::from_dims(dims, inputs[0].dtype())])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = inputs[0];
        let (before, after) = x.dims().split_at(self.axis);
        let indices = checked_indices(&to_i64(inputs[1])?, after[0], 1)?;
        let element = x.dtype().element_bytes().unwrap_or(0);
        let run = after[1..].iter().product::<usize>() * element;
        let mut bytes = Vec::new();
        for outer in 0..before.iter().product::<usize>() {
            for at in &indices {
                let from = (outer * after[0] + at) * run;
                bytes.extend_from_slice(&x.bytes()[from..from + run]);
            }
        }
        let dims = [before, inputs[1].dims(), &after[1..]].concat();
        Ok(vec![Tensor::from_bytes(&dims, x.dtype(), &bytes)?])
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost { flops: Dim::Known(0), bytes: shape_bytes(inputs[1]) + shape_bytes(outputs[0]) * 2 }
    }
}
