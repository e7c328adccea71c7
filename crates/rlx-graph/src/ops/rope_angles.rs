//! Cosines and sines of rotary position embedding (Su et al., 2021).

use crate::attrs::op_struct;
use crate::eval::{from_f64, to_f64, to_i64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::binary::BinaryOp;
use crate::ops::concat::Concat;
use crate::ops::unary::UnaryOp;
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// For each position, `cos(position * inv_freq) * scale`, then `sin(position * inv_freq) * scale`.
    ///
    /// Operands: `positions [rows]` I32; `inv_freq [half]` F32. Result `[rows, 2 half]` F32. The product is rounded to F32 before
    /// the cosine, as models are trained with. Frequency scaling (linear, llama3, yarn, dynamic) is a matter of `inv_freq`.
    pub struct RopeAngles = "rope_angles" {
        /// Factor of cosine and sine (yarn's attention factor; 1 elsewhere).
        scale: f64,
    }
}

impl OpDef for RopeAngles {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2, inputs)?;
        InferError::dtype(inputs, 0, DType::I32)?;
        InferError::dtype(inputs, 1, DType::F32)?;
        InferError::rank(inputs, 0, 1)?;
        InferError::rank(inputs, 1, 1)?;
        let dims = vec![inputs[0].dims()[0].clone(), inputs[1].dims()[0].clone() * Dim::Known(2)];
        Ok(vec![Shape::from_dims(dims, DType::F32)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (positions, frequencies) = (to_i64(inputs[0])?, to_f64(inputs[1])?);
        let mut result = Vec::with_capacity(positions.len() * frequencies.len() * 2);
        for &position in &positions {
            let angle = |f: &f64| f64::from(position as f32 * *f as f32);
            result.extend(frequencies.iter().map(|f| angle(f).cos() * self.scale));
            result.extend(frequencies.iter().map(|f| angle(f).sin() * self.scale));
        }
        Ok(vec![from_f64(&[positions.len(), frequencies.len() * 2], DType::F32, &result)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(outputs[0].elements() * Dim::Known(2), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs).map(|y| vec![y]))
    }
}

impl RopeAngles {
    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let rows = to.graph.shape(inputs[0]).dims()[0].clone();
        let positions = to.float(inputs[0])?;
        let column = to.reshape(positions, &[rows, Dim::Known(1)])?;
        let angles = to.binary(BinaryOp::Mul, column, inputs[1])?;
        let (cos, sin) = (to.unary(UnaryOp::Cos, angles)?, to.unary(UnaryOp::Sin, angles)?);
        let both = to.graph.add_one(Concat { axis: 1 }, &[cos, sin])?;
        to.scalar(BinaryOp::Mul, both, self.scale)
    }
}
