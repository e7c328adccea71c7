//! Axes in another order.

use crate::attrs::op_struct;
use crate::eval::{gather_elements, strides};
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// Axis i of the result is axis `perm[i]` of the operand.
    pub struct Transpose = "transpose" {
        /// A permutation of the axes.
        perm: Vec<usize>,
    }
}

impl OpDef for Transpose {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let rank = inputs[0].rank();
        if self.perm.len() != rank || (0..rank).any(|axis| !self.perm.contains(&axis)) {
            let reason = format!("{:?} is no permutation of the axes of rank {rank}", self.perm);
            return Err(InferError::Attribute { name: "perm", reason });
        }
        let dims = self.perm.iter().map(|&axis| inputs[0].dims()[axis].clone()).collect();
        Ok(vec![Shape::from_dims(dims, inputs[0].dtype())])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let own = strides(inputs[0].dims());
        let dims: Vec<usize> = self.perm.iter().map(|&axis| inputs[0].dims()[axis]).collect();
        let steps: Vec<usize> = self.perm.iter().map(|&axis| own[axis]).collect();
        Ok(vec![gather_elements(inputs[0], &dims, |at| at.iter().zip(&steps).map(|(c, s)| c * s).sum())?])
    }

    fn props(&self) -> Props {
        Props { strided_view: true, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(Dim::Known(0), inputs, outputs)
    }
}
