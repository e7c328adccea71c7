//! Values joined along one axis.

use crate::attrs::op_struct;
use crate::op::{EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use rlx_tensor::{Shape, Tensor};

op_struct! {
    /// Operands of one dtype joined along `axis`; their other dims agree.
    pub struct Concat = "concat" {
        /// The axis that grows.
        axis: usize,
    }
}

impl OpDef for Concat {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        let Some((first, rest)) = inputs.split_first() else {
            return Err(InferError::Arity { expected: "at least 1".into(), found: 0 });
        };
        if self.axis >= first.rank() {
            let reason = format!("{} is outside rank {}", self.axis, first.rank());
            return Err(InferError::Attribute { name: "axis", reason });
        }
        let mut dims = first.dims().to_vec();
        for (i, shape) in rest.iter().enumerate() {
            InferError::rank(inputs, i + 1, first.rank())?;
            InferError::dtype(inputs, i + 1, first.dtype())?;
            for (axis, dim) in shape.dims().iter().enumerate() {
                if axis == self.axis {
                    dims[axis] = &dims[axis] + dim;
                } else {
                    cx.require_equal("joined values", &first.dims()[axis], dim)?;
                }
            }
        }
        Ok(vec![Shape::from_dims(dims, first.dtype())])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let mut dims = inputs[0].dims().to_vec();
        dims[self.axis] = inputs.iter().map(|t| t.dims()[self.axis]).sum();
        let outer: usize = dims[..self.axis].iter().product();
        let mut bytes = Vec::new();
        for i in 0..outer {
            for tensor in inputs {
                let run = tensor.bytes().len() / outer.max(1);
                bytes.extend_from_slice(&tensor.bytes()[i * run..(i + 1) * run]);
            }
        }
        Ok(vec![Tensor::from_bytes(&dims, inputs[0].dtype(), &bytes)?])
    }

    fn props(&self) -> Props {
        Props { joins: Some(self.axis), ..Props::default() }
    }
}
