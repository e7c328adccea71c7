//! Rotary position embedding (Su et al., 2021).

use crate::attrs::{attr_enum, op_struct};
use crate::eval::{from_f64, to_f64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::binary::BinaryOp;
use crate::ops::concat::Concat;
use rlx_tensor::{DType, Dim, Shape, Tensor};

attr_enum! {
    /// Which elements of a head are rotated together.
    pub enum RopeStyle {
        /// Element i with element i + half.
        Neox = "neox",
        /// Element 2 i with element 2 i + 1.
        GptJ = "gptj",
    }
}

op_struct! {
    /// Rotates the first `rotary_dim` elements of each head by the row's angles: `(a, b) -> (a cos - b sin, b cos + a sin)`.
    ///
    /// Operands: `x [rows, heads * head_dim]` F32; `angles [rows, rotary_dim]` F32, cosines then sines. Result as x.
    pub struct Rope = "rope" {
        /// Heads in a row.
        heads: usize,
        /// Elements of a head.
        head_dim: usize,
        /// Elements of a head that are rotated; even.
        rotary_dim: usize,
        /// Pairing.
        style: RopeStyle,
    }
}

impl Rope {
    fn pair(&self, i: usize) -> (usize, usize) {
        match self.style {
            RopeStyle::Neox => (i, i + self.rotary_dim / 2),
            RopeStyle::GptJ => (2 * i, 2 * i + 1),
        }
    }
}

impl OpDef for Rope {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2, inputs)?;
        InferError::positive("heads", self.heads)?;
        if !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > self.head_dim || self.rotary_dim == 0 {
            let reason = format!("{} must be even, positive and at most {}", self.rotary_dim, self.head_dim);
            return Err(InferError::Attribute { name: "rotary_dim", reason });
        }
        for operand in 0..2 {
            InferError::dtype(inputs, operand, DType::F32)?;
            InferError::rank(inputs, operand, 2)?;
        }
        let width = Dim::Known(self.heads) * self.head_dim;
        cx.require_equal("width and heads * head_dim", &inputs[0].dims()[1], &width)?;
        cx.require_equal("rows of value and angles", &inputs[0].dims()[0], &inputs[1].dims()[0])?;
        cx.require_equal("angles and rotary_dim", &inputs[1].dims()[1], &Dim::Known(self.rotary_dim))?;
        Ok(vec![inputs[0].clone()])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (mut x, angles) = (to_f64(inputs[0])?, to_f64(inputs[1])?);
        let half = self.rotary_dim / 2;
        let rows = x.chunks_mut(self.heads * self.head_dim).zip(angles.chunks(self.rotary_dim));
        for (row, angles) in rows {
            let (cos, sin) = angles.split_at(half);
            for head in row.chunks_mut(self.head_dim) {
                for i in 0..half {
                    let (at_a, at_b) = self.pair(i);
                    let (a, b) = (head[at_a], head[at_b]);
                    head[at_a] = a * cos[i] - b * sin[i];
                    head[at_b] = b * cos[i] + a * sin[i];
                }
            }
        }
        Ok(vec![from_f64(inputs[0].dims(), DType::F32, &x)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, in_place: vec![0], ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(inputs[0].elements() * Dim::Known(3), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs).map(|y| vec![y]))
    }
}

impl Rope {
    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let whole = to.graph.shape(inputs[0]).dims().to_vec();
        let rows = whole[0].clone();
        let half = self.rotary_dim / 2;
        let known = |dims: &[usize]| -> Vec<Dim> {
            std::iter::once(rows.clone()).chain(dims.iter().map(|&d| Dim::Known(d))).collect()
        };
        let heads = to.reshape(inputs[0], &known(&[self.heads, self.head_dim]))?;
        let rotated = to.slice(heads, 2, 0, self.rotary_dim)?;
        let (a, b) = match self.style {
            RopeStyle::Neox => (to.slice(rotated, 2, 0, half)?, to.slice(rotated, 2, half, half)?),
            RopeStyle::GptJ => {
                let pairs = to.reshape(rotated, &known(&[self.heads, half, 2]))?;
                let (a, b) = (to.slice(pairs, 3, 0, 1)?, to.slice(pairs, 3, 1, 1)?);
                let dims = known(&[self.heads, half]);
                (to.reshape(a, &dims)?, to.reshape(b, &dims)?)
            }
        };
        let (cos, sin) = (to.slice(inputs[1], 1, 0, half)?, to.slice(inputs[1], 1, half, half)?);
        let (cos, sin) = (to.reshape(cos, &known(&[1, half]))?, to.reshape(sin, &known(&[1, half]))?);
        let (a_cos, b_sin) = (to.binary(BinaryOp::Mul, a, cos)?, to.binary(BinaryOp::Mul, b, sin)?);
        let (b_cos, a_sin) = (to.binary(BinaryOp::Mul, b, cos)?, to.binary(BinaryOp::Mul, a, sin)?);
        let new_a = to.binary(BinaryOp::Sub, a_cos, b_sin)?;
        let new_b = to.binary(BinaryOp::Add, b_cos, a_sin)?;
        let mut joined = match self.style {
            RopeStyle::Neox => to.graph.add_one(Concat { axis: 2 }, &[new_a, new_b])?,
            RopeStyle::GptJ => {
                let column = known(&[self.heads, half, 1]);
                let (a, b) = (to.reshape(new_a, &column)?, to.reshape(new_b, &column)?);
                let pairs = to.graph.add_one(Concat { axis: 3 }, &[a, b])?;
                to.reshape(pairs, &known(&[self.heads, self.rotary_dim]))?
            }
        };
        if self.rotary_dim < self.head_dim {
            let rest = to.slice(heads, 2, self.rotary_dim, self.head_dim - self.rotary_dim)?;
            joined = to.graph.add_one(Concat { axis: 2 }, &[joined, rest])?;
        }
        to.reshape(joined, &whole)
    }
}
