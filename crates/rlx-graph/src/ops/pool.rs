//! One vector for each sequence of a ragged batch.

use crate::attrs::{attr_enum, op_struct};
use crate::eval::{from_f64, sequence_ranges, to_f64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::binary::BinaryOp;
use crate::ops::reduce::{Reduce, ReduceOp};
use rlx_tensor::{DType, Dim, Shape, Tensor};

attr_enum! {
    /// What stands for a sequence.
    pub enum PoolKind {
        /// The mean of its rows.
        Mean = "mean",
        /// Its first row.
        Cls = "cls",
        /// Its last row.
        Last = "last",
        /// The largest of each element over its rows; NaN if any is NaN.
        Max = "max",
    }
}

op_struct! {
    /// The rows of each sequence combined into one; a sequence without rows gives zeros.
    ///
    /// Operands: `x [rows, width]` F32; `seq_starts [batch + 1]` I32. Result `[batch, width]` F32.
    pub struct Pool = "pool" {
        /// How.
        kind: PoolKind,
    }
}

impl OpDef for Pool {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2, inputs)?;
        InferError::dtype(inputs, 0, DType::F32)?;
        InferError::rank(inputs, 0, 2)?;
        let batch = sequence_count(inputs, 1)?;
        Ok(vec![Shape::from_dims(vec![batch, inputs[0].dims()[1].clone()], DType::F32)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (x, width) = (to_f64(inputs[0])?, inputs[0].dims()[1]);
        let ranges = sequence_ranges(inputs[1], inputs[0].dims()[0], 1)?;
        let mut result = Vec::with_capacity(ranges.len() * width);
        for range in &ranges {
            let column = |j: usize| range.clone().map(move |row| (row, j));
            let at = |(row, j): (usize, usize)| x[row * width + j];
            for j in 0..width {
                let mut values = column(j).map(at);
                result.push(match self.kind {
                    _ if range.is_empty() => 0.0,
                    PoolKind::Mean => values.sum::<f64>() / range.len() as f64,
                    PoolKind::Cls => values.next().unwrap_or(0.0),
                    PoolKind::Last => values.next_back().unwrap_or(0.0),
                    PoolKind::Max => values.fold(f64::NEG_INFINITY, |a, b| BinaryOp::Max.eval(a, b)),
                });
            }
        }
        Ok(vec![from_f64(&[ranges.len(), width], DType::F32, &result)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(inputs[0].elements(), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs).map(|y| vec![y]))
    }
}

/// The number of sequences that an operand of sequence starts delimits.
pub(crate) fn sequence_count(inputs: &[&Shape], operand: usize) -> Result<Dim, InferError> {
    InferError::rank(inputs, operand, 1)?;
    InferError::dtype(inputs, operand, DType::I32)?;
    let starts = &inputs[operand].dims()[0];
    if *starts == 0 {
        let expected = Dim::Known(1);
        return Err(InferError::Dims { what: "sequence starts", left: starts.clone(), right: expected });
    }
    Ok(starts - &Dim::Known(1))
}

impl Pool {
    /// Over `[batch, rows, width]`: rows of other sequences are masked away, so this costs batch times as much as the op itself.
    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let dims = to.graph.shape(inputs[0]).dims().to_vec();
        let batch = &to.graph.shape(inputs[1]).dims()[0].clone() - &Dim::Known(1);
        let one = Dim::Known(1);
        let starts = to.slice(inputs[1], 0, 0, batch.clone())?;
        let ends = to.slice(inputs[1], 0, 1, batch.clone())?;
        let column = [batch.clone(), one.clone()];
        let (starts, ends) = (to.reshape(starts, &column)?, to.reshape(ends, &column)?);
        let row = to.count_up(&dims[0])?;
        let before = to.binary(BinaryOp::Less, row, ends)?;
        let after = to.binary(BinaryOp::GreaterEqual, row, starts)?;
        let mut member = to.binary(BinaryOp::And, before, after)?;
        let chosen = match self.kind {
            PoolKind::Cls => Some(starts),
            PoolKind::Last => Some(to.scalar(BinaryOp::Sub, ends, 1.0)?),
            PoolKind::Mean | PoolKind::Max => None,
        };
        if let Some(chosen) = chosen {
            let only = to.binary(BinaryOp::Equal, row, chosen)?;
            member = to.binary(BinaryOp::And, member, only)?;
        }
        let member = to.reshape(member, &[batch.clone(), dims[0].clone(), one.clone()])?;
        let (kind, fill) = match self.kind {
            PoolKind::Max => (ReduceOp::Max, f64::NEG_INFINITY),
            _ => (ReduceOp::Sum, 0.0),
        };
        let fill = to.number(fill, DType::F32)?;
        let masked = to.select(member, inputs[0], fill)?;
        let mut y = to.graph.add_one(Reduce { kind, axes: vec![1], keep_dims: false }, &[masked])?;
        let count = to.binary(BinaryOp::Sub, ends, starts)?;
        match self.kind {
            PoolKind::Mean => {
                let count = to.scalar(BinaryOp::Max, count, 1.0)?;
                let count = to.float(count)?;
                y = to.binary(BinaryOp::Div, y, count)?;
            }
            PoolKind::Max => {
                let some = to.scalar(BinaryOp::Greater, count, 0.0)?;
                let zero = to.number(0.0, DType::F32)?;
                y = to.select(some, y, zero)?;
            }
            PoolKind::Cls | PoolKind::Last => {}
        }
        Ok(y)
    }
}
