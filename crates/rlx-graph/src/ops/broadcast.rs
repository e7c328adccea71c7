//! A value repeated along axes.

use crate::attrs::op_struct;
use crate::eval::{broadcast_strides, gather_elements};
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// The operand expanded to `dims` as NumPy broadcasts: missing leading axes and axes of extent 1 are repeated.
    pub struct Broadcast = "broadcast" {
        /// The dims of the result.
        dims: Vec<Dim>,
    }
}

impl OpDef for Broadcast {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let rank = inputs[0].rank();
        let Some(lead) = self.dims.len().checked_sub(rank) else {
            let expected = format!("at most {}", self.dims.len());
            return Err(InferError::Rank { operand: 0, expected, found: rank });
        };
        for (own, wanted) in inputs[0].dims().iter().zip(&self.dims[lead..]) {
            if *own != 1 {
                cx.require_equal("broadcast dims", own, wanted)?;
            }
        }
        Ok(vec![Shape::from_dims(self.dims.clone(), inputs[0].dtype())])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let dims = crate::eval::known_dims(&self.dims)?;
        let steps = broadcast_strides(&dims, inputs[0].dims());
        Ok(vec![gather_elements(inputs[0], &dims, |at| at.iter().zip(&steps).map(|(c, s)| c * s).sum())?])
    }

    fn props(&self) -> Props {
        Props { strided_view: true, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(Dim::Known(0), inputs, outputs)
    }
}
