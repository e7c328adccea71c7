//! The largest elements of each slice.

use crate::attrs::op_struct;
use crate::eval::{from_f64, from_i64, to_f64, to_i64};
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, op_boilerplate};
use rlx_tensor::{DType, Dim, Shape, Tensor};
use std::cmp::Ordering;

op_struct! {
    /// The `k` largest elements along the last dim, largest first, and their indices (I32). Of equal elements the one with the
    /// lower index comes first; NaN counts as larger than every number.
    pub struct TopK = "topk" {
        /// How many.
        k: usize,
    }
}

/// Indices of the `k` largest values, largest first, ties to the lower index, NaN above all.
pub(crate) fn top_indices(values: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let descending = |&a: &usize, &b: &usize| {
        let (x, y) = (values[a], values[b]);
        y.partial_cmp(&x).unwrap_or_else(|| match (x.is_nan(), y.is_nan()) {
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
            _ => Ordering::Equal,
        })
    };
    order.sort_by(descending);
    order.truncate(k);
    order
}

impl OpDef for TopK {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let found = inputs[0].dtype();
        if !found.is_float() && !found.is_int() {
            return Err(InferError::DType { operand: 0, expected: "a float or integer".into(), found });
        }
        let extent = InferError::last(inputs, 0)?;
        cx.require_equal("k and extent", &Dim::Known(self.k).maximum(extent), extent)?;
        let mut dims = inputs[0].dims().to_vec();
        dims.pop();
        dims.push(Dim::Known(self.k));
        Ok(vec![Shape::from_dims(dims.clone(), found), Shape::from_dims(dims, DType::I32)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = inputs[0];
        let mut dims = x.dims().to_vec();
        let extent = dims.pop().unwrap_or(1);
        let rows: usize = dims.iter().product();
        dims.push(self.k);
        let order: Vec<usize> = if x.dtype().is_int() {
            let values = to_i64(x)?;
            let sign = if x.dtype() == DType::U64 { i64::MIN } else { 0 };
            let top = |row: usize| {
                let mut order: Vec<usize> = (row * extent..(row + 1) * extent).collect();
                order.sort_by_key(|&i| std::cmp::Reverse(values[i] ^ sign));
                order.truncate(self.k);
                order
            };
            (0..rows).flat_map(top).collect()
        } else {
            let values = to_f64(x)?;
            let row_of = |row: usize| &values[row * extent..(row + 1) * extent];
            let top =
                |row: usize| top_indices(row_of(row), self.k).into_iter().map(move |i| row * extent + i);
            (0..rows).flat_map(top).collect()
        };
        let indices: Vec<i64> = order.iter().map(|i| (i % extent) as i64).collect();
        let values = match x.dtype().is_int() {
            true => {
                let all = to_i64(x)?;
                from_i64(&dims, x.dtype(), &order.iter().map(|&i| all[i]).collect::<Vec<_>>())?
            }
            false => {
                let all = to_f64(x)?;
                from_f64(&dims, x.dtype(), &order.iter().map(|&i| all[i]).collect::<Vec<_>>())?
            }
        };
        Ok(vec![values, from_i64(&dims, DType::I32, &indices)?])
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(inputs[0].elements(), inputs, outputs)
    }
}
