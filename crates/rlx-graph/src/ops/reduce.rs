//! Reductions over axes.

use crate::attrs::{attr_enum, op_struct};
use crate::eval::{from_f64, from_i64, strides, to_f64, to_i64};
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, op_boilerplate};
use rlx_tensor::{Dim, Shape, Tensor};

attr_enum! {
    /// How elements are combined.
    pub enum ReduceOp {
        /// Sum; 0 for none.
        Sum = "sum",
        /// Arithmetic mean; floats only.
        Mean = "mean",
        /// Largest; NaN if any is NaN.
        Max = "max",
        /// Smallest; NaN if any is NaN.
        Min = "min",
        /// Product; 1 for none.
        Prod = "prod",
    }
}

op_struct! {
    /// Elements along `axes` combined into one.
    pub struct Reduce = "reduce" {
        /// How.
        kind: ReduceOp,
        /// Axes that are reduced, ascending.
        axes: Vec<usize>,
        /// Reduced axes stay, with extent 1.
        keep_dims: bool,
    }
}

impl Reduce {
    fn result<T: Clone>(&self, dims: &[T], one: T) -> Vec<T> {
        let kept = dims.iter().enumerate().filter_map(|(axis, dim)| match self.axes.contains(&axis) {
            false => Some(dim.clone()),
            true if self.keep_dims => Some(one.clone()),
            true => None,
        });
        kept.collect()
    }

    /// For each result element, the linear indices of its elements in order.
    fn groups(&self, dims: &[usize]) -> Vec<Vec<usize>> {
        let own = strides(dims);
        let kept: Vec<usize> = (0..dims.len()).filter(|a| !self.axes.contains(a)).collect();
        let kept_dims: Vec<usize> = kept.iter().map(|&a| dims[a]).collect();
        let kept_strides = strides(&kept_dims);
        let mut groups = vec![Vec::new(); kept_dims.iter().product()];
        for linear in 0..dims.iter().product::<usize>() {
            let at =
                kept.iter().zip(&kept_strides).map(|(&a, s)| linear / own[a] % dims[a] * s).sum::<usize>();
            groups[at].push(linear);
        }
        groups
    }
}

impl OpDef for Reduce {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let sorted = self.axes.windows(2).all(|w| w[0] < w[1]);
        if !sorted || self.axes.iter().any(|&a| a >= inputs[0].rank()) {
            let reason = format!("{:?} are no ascending axes of rank {}", self.axes, inputs[0].rank());
            return Err(InferError::Attribute { name: "axes", reason });
        }
        let found = inputs[0].dtype();
        if !found.is_float() && (!found.is_int() || self.kind == ReduceOp::Mean) {
            return Err(InferError::DType { operand: 0, expected: "a float (or integer)".into(), found });
        }
        Ok(vec![Shape::from_dims(self.result(inputs[0].dims(), Dim::Known(1)), found)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = inputs[0];
        let dims = self.result(x.dims(), 1);
        let groups = self.groups(x.dims());
        if x.dtype().is_int() {
            let values = to_i64(x)?;
            let combine = |group: &Vec<usize>| {
                let items = group.iter().map(|&i| values[i]);
                match self.kind {
                    ReduceOp::Sum | ReduceOp::Mean => items.fold(0, i64::wrapping_add),
                    ReduceOp::Prod => items.fold(1, i64::wrapping_mul),
                    ReduceOp::Max => items.fold(i64::MIN, i64::max),
                    ReduceOp::Min => items.fold(i64::MAX, i64::min),
                }
            };
            return Ok(vec![from_i64(&dims, x.dtype(), &groups.iter().map(combine).collect::<Vec<_>>())?]);
        }
        let values = to_f64(x)?;
        let keep_nan = |a: f64, b: f64, pick: fn(f64, f64) -> f64| {
            if a.is_nan() || b.is_nan() { f64::NAN } else { pick(a, b) }
        };
        let combine = |group: &Vec<usize>| {
            let items = group.iter().map(|&i| values[i]);
            match self.kind {
                ReduceOp::Sum => items.sum(),
                ReduceOp::Mean => items.sum::<f64>() / group.len() as f64,
                ReduceOp::Prod => items.product(),
                ReduceOp::Max => items.fold(f64::NEG_INFINITY, |a, b| keep_nan(a, b, f64::max)),
                ReduceOp::Min => items.fold(f64::INFINITY, |a, b| keep_nan(a, b, f64::min)),
            }
        };
        Ok(vec![from_f64(&dims, x.dtype(), &groups.iter().map(combine).collect::<Vec<_>>())?])
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(inputs[0].elements(), inputs, outputs)
    }
}
