//! Counting.

use crate::attrs::op_struct;
use crate::eval::{from_i64, strides};
use crate::op::{EvalError, InferCx, InferError, OpDef, op_boilerplate};
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// Each element is its index along `axis`: 0, 1, 2, .. No operands.
    pub struct Iota = "iota" {
        /// Dims of the result; symbols refer to the graph's symbols.
        dims: Vec<Dim>,
        /// The axis that is counted.
        axis: usize,
        /// An integer dtype or F32.
        dtype: DType,
    }
}

impl OpDef for Iota {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(0, inputs)?;
        InferError::axis(self.axis, self.dims.len())?;
        if self.dtype.element_bytes().is_none() || !(self.dtype.is_int() || self.dtype == DType::F32) {
            let reason = format!("{} is no integer type and not f32", self.dtype);
            return Err(InferError::Attribute { name: "dtype", reason });
        }
        Ok(vec![Shape::from_dims(self.dims.clone(), self.dtype)])
    }

    fn reference(&self, _inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let dims = crate::eval::known_dims(&self.dims)?;
        let stride = strides(&dims)[self.axis];
        let count = rlx_tensor::element_count(&dims)
            .ok_or(rlx_tensor::TensorError::Size { dims: dims.clone(), dtype: self.dtype })?;
        let values: Vec<i64> = (0..count).map(|i| (i / stride % dims[self.axis]) as i64).collect();
        Ok(vec![match self.dtype {
            DType::F32 => {
                let floats: Vec<f64> = values.iter().map(|&v| v as f64).collect();
                crate::eval::from_f64(&dims, self.dtype, &floats)?
            }
            _ => from_i64(&dims, self.dtype, &values)?,
        }])
    }
}
