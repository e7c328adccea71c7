//! Vectors scaled to length one.

use crate::attrs::op_struct;
use crate::eval::{from_f64, to_f64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::binary::BinaryOp;
use crate::ops::reduce::ReduceOp;
use crate::ops::unary::UnaryOp;
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// `x / max(sqrt(sum x^2), eps)` over the last dim; floats.
    pub struct L2Normalize = "l2_normalize" {
        /// Smallest length divided by.
        eps: f64,
    }
}

impl OpDef for L2Normalize {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        InferError::float(inputs, 0)?;
        InferError::last(inputs, 0)?;
        Ok(vec![inputs[0].clone()])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = to_f64(inputs[0])?;
        let width = inputs[0].dims().last().copied().unwrap_or(1);
        let mut result = Vec::with_capacity(x.len());
        for row in x.chunks(width.max(1)) {
            let length = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            let divisor = BinaryOp::Max.eval(length, self.eps);
            result.extend(row.iter().map(|v| v / divisor));
        }
        Ok(vec![from_f64(inputs[0].dims(), inputs[0].dtype(), &result)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, in_place: vec![0], ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(inputs[0].elements() * Dim::Known(3), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs[0]).map(|y| vec![y]))
    }
}

impl L2Normalize {
    fn expand(&self, mut to: Expand<'_>, x: ValueId) -> Result<ValueId, GraphError> {
        let axis = to.graph.shape(x).rank().saturating_sub(1);
        let square = to.binary(BinaryOp::Mul, x, x)?;
        let sum = to.reduce(ReduceOp::Sum, square, axis)?;
        let length = to.unary(UnaryOp::Sqrt, sum)?;
        let divisor = to.scalar(BinaryOp::Max, length, self.eps)?;
        to.binary(BinaryOp::Div, x, divisor)
    }
}
