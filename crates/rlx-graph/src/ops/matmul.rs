//! Batched matrix product of two values.

use crate::attrs::op_struct;
use crate::eval::{broadcast_dims, broadcast_indices, from_f64, to_f64};
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, op_boilerplate};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// `a [.., m, k] x b [.., k, n] -> [.., m, n]` with broadcast leading dims; either operand may be given transposed.
    pub struct MatMul = "matmul" {
        /// `a` is `[.., k, m]`.
        transpose_a: bool,
        /// `b` is `[.., n, k]`.
        transpose_b: bool,
    }
}

impl MatMul {
    /// `a x b` as they stand.
    pub fn plain() -> Self {
        Self { transpose_a: false, transpose_b: false }
    }
}

fn rows_columns<T>(dims: &[T], transposed: bool) -> (&T, &T) {
    let (x, y) = (&dims[dims.len() - 2], &dims[dims.len() - 1]);
    if transposed { (y, x) } else { (x, y) }
}

impl OpDef for MatMul {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2, inputs)?;
        for (operand, shape) in inputs.iter().enumerate() {
            if shape.rank() < 2 {
                return Err(InferError::Rank { operand, expected: "at least 2".into(), found: shape.rank() });
            }
            if !shape.dtype().is_float() {
                let found = shape.dtype();
                return Err(InferError::DType { operand, expected: "a float".into(), found });
            }
        }
        InferError::dtype(inputs, 1, inputs[0].dtype())?;
        let (a, b) = (inputs[0].dims(), inputs[1].dims());
        let (m, k) = rows_columns(a, self.transpose_a);
        let (k2, n) = rows_columns(b, self.transpose_b);
        cx.require_equal("reduced dims", k, k2)?;
        let mut dims = cx.broadcast(&a[..a.len() - 2], &b[..b.len() - 2])?;
        dims.extend([m.clone(), n.clone()]);
        Ok(vec![Shape::from_dims(dims, inputs[0].dtype())])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (a, b) = (inputs[0], inputs[1]);
        let (&m, &k) = rows_columns(a.dims(), self.transpose_a);
        let (_, &n) = rows_columns(b.dims(), self.transpose_b);
        let (lead_a, lead_b) = (&a.dims()[..a.dims().len() - 2], &b.dims()[..b.dims().len() - 2]);
        let lead = broadcast_dims(lead_a, lead_b)
            .ok_or_else(|| EvalError::Value { operand: 1, reason: "does not broadcast".into() })?;
        let (x, y) = (to_f64(a)?, to_f64(b)?);
        let mut result = Vec::new();
        for (i, j) in broadcast_indices(&lead, lead_a).into_iter().zip(broadcast_indices(&lead, lead_b)) {
            for row in 0..m {
                for column in 0..n {
                    let at = |p: usize| {
                        let left = if self.transpose_a { p * m + row } else { row * k + p };
                        let right = if self.transpose_b { column * k + p } else { p * n + column };
                        x[i * m * k + left] * y[j * k * n + right]
                    };
                    result.push((0..k).map(at).sum::<f64>());
                }
            }
        }
        let dims = [lead, vec![m, n]].concat();
        Ok(vec![from_f64(&dims, a.dtype(), &result)?])
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let (_, k) = rows_columns(inputs[0].dims(), self.transpose_a);
        let flops = outputs[0].elements() * k * Dim::Known(2);
        Cost::with_flops(flops, inputs, outputs)
    }
}
