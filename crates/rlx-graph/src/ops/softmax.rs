//! Softmax along one axis.

use crate::attrs::op_struct;
use crate::eval::{from_f64, strides, to_f64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::binary::BinaryOp;
use crate::ops::reduce::ReduceOp;
use crate::ops::unary::UnaryOp;
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// `e^(x - max) / sum e^(x - max)` along `axis`; floats. A slice of nothing but -inf gives NaN.
    pub struct Softmax = "softmax" {
        /// The axis that sums to one.
        axis: usize,
    }
}

/// Softmax of one slice.
pub(crate) fn softmax_of(values: &[f64]) -> Vec<f64> {
    let max = values.iter().fold(f64::NEG_INFINITY, |a, &b| BinaryOp::Max.eval(a, b));
    let powers: Vec<f64> = values.iter().map(|v| (v - max).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

impl OpDef for Softmax {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        InferError::float(inputs, 0)?;
        InferError::axis(self.axis, inputs[0].rank())?;
        Ok(vec![inputs[0].clone()])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = to_f64(inputs[0])?;
        let dims = inputs[0].dims();
        let (extent, stride) = (dims[self.axis], strides(dims)[self.axis]);
        let mut result = vec![0.0; x.len()];
        for start in (0..x.len()).filter(|i| i / stride % extent == 0) {
            let slice: Vec<f64> = (0..extent).map(|j| x[start + j * stride]).collect();
            for (j, value) in softmax_of(&slice).into_iter().enumerate() {
                result[start + j * stride] = value;
            }
        }
        Ok(vec![from_f64(dims, inputs[0].dtype(), &result)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, in_place: vec![0], ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(inputs[0].elements() * Dim::Known(5), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs[0]).map(|y| vec![y]))
    }
}

impl Softmax {
    fn expand(&self, mut to: Expand<'_>, x: ValueId) -> Result<ValueId, GraphError> {
        let max = to.reduce(ReduceOp::Max, x, self.axis)?;
        let shifted = to.binary(BinaryOp::Sub, x, max)?;
        let powers = to.unary(UnaryOp::Exp, shifted)?;
        let sum = to.reduce(ReduceOp::Sum, powers, self.axis)?;
        to.binary(BinaryOp::Div, powers, sum)
    }
}
