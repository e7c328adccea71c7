//! Running sums.

use crate::attrs::op_struct;
use crate::eval::{from_f64, from_i64, strides, to_f64, to_i64};
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use rlx_tensor::{Shape, Tensor};

op_struct! {
    /// The sum of the elements up to each one along `axis`; floats and integers.
    pub struct CumSum = "cumsum" {
        /// The axis.
        axis: usize,
        /// An element's own value is left out of its sum.
        exclusive: bool,
        /// Sums run from the end.
        reverse: bool,
    }
}

impl CumSum {
    fn scan<T: Copy>(&self, dims: &[usize], values: &[T], zero: T, add: fn(T, T) -> T) -> Vec<T> {
        let (extent, stride) = (dims[self.axis], strides(dims)[self.axis]);
        let mut result = values.to_vec();
        for start in (0..values.len()).filter(|i| i / stride % extent == 0) {
            let mut sum = zero;
            for j in 0..extent {
                let at = start + stride * if self.reverse { extent - 1 - j } else { j };
                let before = sum;
                sum = add(sum, values[at]);
                result[at] = if self.exclusive { before } else { sum };
            }
        }
        result
    }
}

impl OpDef for CumSum {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        InferError::axis(self.axis, inputs[0].rank())?;
        let found = inputs[0].dtype();
        if !found.is_float() && !found.is_int() {
            return Err(InferError::DType { operand: 0, expected: "a float or integer".into(), found });
        }
        Ok(vec![inputs[0].clone()])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = inputs[0];
        Ok(vec![match x.dtype().is_int() {
            true => {
                let sums = self.scan(x.dims(), &to_i64(x)?, 0, i64::wrapping_add);
                from_i64(x.dims(), x.dtype(), &sums)?
            }
            false => {
                let sums = self.scan(x.dims(), &to_f64(x)?, 0.0, |a, b| a + b);
                from_f64(x.dims(), x.dtype(), &sums)?
            }
        }])
    }

    fn props(&self) -> Props {
        Props { in_place: vec![0], ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(inputs[0].elements(), inputs, outputs)
    }
}
