//! Root-mean-square normalisation (Zhang and Sennrich, 2019).

use crate::attrs::op_struct;
use crate::eval::{from_f64, to_f64};
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::reduce::{Reduce, ReduceOp};
use crate::ops::reshape::Reshape;
use crate::ops::unary::{Unary, UnaryOp};
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// `x / sqrt(mean(x^2) + eps) * weight` over each of `groups` equal slices of the last dim.
    ///
    /// Operands: `x [.., groups * d]` F32; `weight [d]`; if `residual`, a value of x's shape, added to x first. Results: the
    /// normalised value; if `residual`, also the sum.
    pub struct RmsNorm = "rms_norm" {
        /// Added to the mean square.
        eps: f64,
        /// The factor is `1 + weight` (Gemma).
        unit_offset: bool,
        /// Number of slices normalised on their own (heads, for a norm of queries and keys).
        groups: usize,
        /// There is a residual operand, and a second result.
        residual: bool,
    }
}

impl OpDef for RmsNorm {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2 + usize::from(self.residual), inputs)?;
        InferError::dtype(inputs, 0, DType::F32)?;
        InferError::rank(inputs, 1, 1)?;
        let last = inputs[0].last().ok_or(InferError::Rank {
            operand: 0,
            expected: "at least 1".into(),
            found: 0,
        })?;
        cx.require_equal("normalised dim and weight", last, &(inputs[1].dims()[0].clone() * self.groups))?;
        if self.residual {
            InferError::dtype(inputs, 2, DType::F32)?;
            InferError::rank(inputs, 2, inputs[0].rank())?;
            for (a, b) in inputs[0].dims().iter().zip(inputs[2].dims()) {
                cx.require_equal("value and residual", a, b)?;
            }
        }
        Ok(vec![inputs[0].clone(); 1 + usize::from(self.residual)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (mut x, weight) = (to_f64(inputs[0])?, to_f64(inputs[1])?);
        if self.residual {
            x.iter_mut().zip(to_f64(inputs[2])?).for_each(|(v, r)| *v += r);
        }
        let mut normed = Vec::with_capacity(x.len());
        for group in x.chunks(weight.len().max(1)) {
            let mean_square = group.iter().map(|v| v * v).sum::<f64>() / group.len() as f64;
            let scale = 1.0 / (mean_square + self.eps).sqrt();
            let offset = if self.unit_offset { 1.0 } else { 0.0 };
            normed.extend(group.iter().zip(&weight).map(|(v, w)| v * scale * (offset + w)));
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

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(graph, inputs))
    }
}

impl RmsNorm {
    fn expand(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Vec<ValueId>, GraphError> {
        let binary = |kind| Binary { kind };
        let mut x = inputs[0];
        if self.residual {
            x = graph.add_one(binary(BinaryOp::Add), &[x, inputs[2]])?;
        }
        let sum = x;
        let whole = graph.shape(x).dims().to_vec();
        let width = graph.shape(inputs[1]).dims()[0].clone();
        let mut grouped = whole.clone();
        grouped.pop();
        grouped.extend([Dim::Known(self.groups), width]);
        let x = graph.add_one(Reshape { dims: grouped.clone() }, &[x])?;
        let square = graph.add_one(binary(BinaryOp::Mul), &[x, x])?;
        let axes = vec![grouped.len() - 1];
        let mean = graph.add_one(Reduce { kind: ReduceOp::Mean, axes, keep_dims: true }, &[square])?;
        let eps = graph.constant(Tensor::scalar(self.eps as f32));
        let shifted = graph.add_one(binary(BinaryOp::Add), &[mean, eps])?;
        let scale = graph.add_one(Unary { kind: UnaryOp::Rsqrt }, &[shifted])?;
        let scaled = graph.add_one(binary(BinaryOp::Mul), &[x, scale])?;
        let mut weight = crate::ops::cast::to_dtype(graph, inputs[1], DType::F32)?;
        if self.unit_offset {
            let one = graph.constant(Tensor::scalar(1f32));
            weight = graph.add_one(binary(BinaryOp::Add), &[weight, one])?;
        }
        let y = graph.add_one(binary(BinaryOp::Mul), &[scaled, weight])?;
        let y = graph.add_one(Reshape { dims: whole }, &[y])?;
        Ok(if self.residual { vec![y, sum] } else { vec![y] })
    }
}
