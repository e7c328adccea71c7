//! Layer normalisation (Ba, Kiros and Hinton, 2016).

use crate::attrs::op_struct;
use crate::eval::{from_f64, to_f64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::binary::BinaryOp;
use crate::ops::reduce::ReduceOp;
use crate::ops::unary::UnaryOp;
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last dim; the variance is the mean squared deviation.
    ///
    /// Operands: `x [.., d]` F32; `weight [d]`; if `bias`, `bias [d]`; if `residual`, a value of x's shape, added to x first.
    /// Results: the normalised value; if `residual`, also the sum.
    pub struct LayerNorm = "layer_norm" {
        /// Added to the variance.
        eps: f64,
        /// There is a bias operand.
        bias: bool,
        /// There is a residual operand, and a second result.
        residual: bool,
    }
}

impl LayerNorm {
    /// Position of the residual operand, if there is one.
    pub fn residual_at(&self) -> Option<usize> {
        self.residual.then(|| 2 + usize::from(self.bias))
    }
}

impl OpDef for LayerNorm {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2 + usize::from(self.bias) + usize::from(self.residual), inputs)?;
        InferError::dtype(inputs, 0, DType::F32)?;
        let last = InferError::last(inputs, 0)?;
        for operand in 1..2 + usize::from(self.bias) {
            InferError::rank(inputs, operand, 1)?;
            InferError::float(inputs, operand)?;
            cx.require_equal("normalised dim and weight", last, &inputs[operand].dims()[0])?;
        }
        if let Some(operand) = self.residual_at() {
            InferError::dtype(inputs, operand, DType::F32)?;
            cx.require_same("value and residual", operand, inputs[operand].dims(), inputs[0].dims())?;
        }
        Ok(vec![inputs[0].clone(); 1 + usize::from(self.residual)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (mut x, weight) = (to_f64(inputs[0])?, to_f64(inputs[1])?);
        if let Some(operand) = self.residual_at() {
            x.iter_mut().zip(to_f64(inputs[operand])?).for_each(|(v, r)| *v += r);
        }
        let bias = if self.bias { to_f64(inputs[2])? } else { vec![0.0; weight.len()] };
        let mut normed = Vec::with_capacity(x.len());
        for row in x.chunks(weight.len().max(1)) {
            let mean = row.iter().sum::<f64>() / row.len() as f64;
            let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (variance + self.eps).sqrt();
            normed.extend(row.iter().zip(&weight).zip(&bias).map(|((v, w), b)| (v - mean) * scale * w + b));
        }
        let mut results = vec![from_f64(inputs[0].dims(), DType::F32, &normed)?];
        if self.residual {
            results.push(from_f64(inputs[0].dims(), DType::F32, &x)?);
        }
        Ok(results)
    }

    fn props(&self) -> Props {
        Props { composite: true, in_place: if self.residual { vec![] } else { vec![0] }, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(inputs[0].elements() * Dim::Known(8), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs))
    }
}

impl LayerNorm {
    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<Vec<ValueId>, GraphError> {
        let mut x = inputs[0];
        if let Some(operand) = self.residual_at() {
            x = to.binary(BinaryOp::Add, x, inputs[operand])?;
        }
        let axis = to.graph.shape(x).rank().saturating_sub(1);
        let mean = to.reduce(ReduceOp::Mean, x, axis)?;
        let centred = to.binary(BinaryOp::Sub, x, mean)?;
        let square = to.binary(BinaryOp::Mul, centred, centred)?;
        let variance = to.reduce(ReduceOp::Mean, square, axis)?;
        let shifted = to.scalar(BinaryOp::Add, variance, self.eps)?;
        let scale = to.unary(UnaryOp::Rsqrt, shifted)?;
        let scaled = to.binary(BinaryOp::Mul, centred, scale)?;
        let weight = to.float(inputs[1])?;
        let mut y = to.binary(BinaryOp::Mul, scaled, weight)?;
        if self.bias {
            let bias = to.float(inputs[2])?;
            y = to.binary(BinaryOp::Add, y, bias)?;
        }
        Ok(if self.residual { vec![y, x] } else { vec![y] })
    }
}
