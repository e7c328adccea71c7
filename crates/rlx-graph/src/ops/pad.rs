//! A value surrounded by a constant.

use crate::attrs::op_struct;
use crate::eval::{from_f64, strides, to_f64};
use crate::op::{EvalError, InferCx, InferError, OpDef, op_boilerplate};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// The operand with `before[i]` elements of `value` in front of axis i and `after[i]` behind it; floats and integers.
    pub struct Pad = "pad" {
        /// Elements in front of each axis.
        before: Vec<Dim>,
        /// Elements behind each axis.
        after: Vec<Dim>,
        /// What the new elements are; an integer dtype takes the integer part.
        value: f64,
    }
}

impl OpDef for Pad {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let rank = inputs[0].rank();
        for (name, given) in [("before", self.before.len()), ("after", self.after.len())] {
            if given != rank {
                let reason = format!("has {given} entries for rank {rank}");
                return Err(InferError::Attribute { name, reason });
            }
        }
        let found = inputs[0].dtype();
        if !found.is_float() && !found.is_int() {
            return Err(InferError::DType { operand: 0, expected: "a float or integer".into(), found });
        }
        let sides = self.before.iter().zip(&self.after);
        let dims = inputs[0].dims().iter().zip(sides).map(|(d, (a, b))| &(d + a) + b).collect();
        Ok(vec![Shape::from_dims(dims, found)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = inputs[0];
        let (before, after) = (crate::eval::known_dims(&self.before)?, crate::eval::known_dims(&self.after)?);
        let dims: Vec<usize> = (0..before.len()).map(|i| x.dims()[i] + before[i] + after[i]).collect();
        let fill = from_f64(&[], x.dtype(), &[self.value])?;
        to_f64(x)?;
        let own = strides(x.dims());
        let element = fill.bytes().len();
        let mut bytes = fill.bytes().repeat(dims.iter().product());
        let to = strides(&dims);
        for linear in 0..x.len() {
            let target: usize =
                (0..dims.len()).map(|i| (linear / own[i] % x.dims()[i] + before[i]) * to[i]).sum();
            bytes[target * element..][..element].copy_from_slice(&x.bytes()[linear * element..][..element]);
        }
        Ok(vec![Tensor::from_bytes(&dims, x.dtype(), &bytes)?])
    }
}
