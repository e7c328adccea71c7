//! Losses over classes.

use super::{Row, reduction};
use crate::error::{Refusal, invalid};
use crate::lower::Lowering;
use rlx_graph::ValueId;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::gather::Gather;
use rlx_graph::ops::iota::Iota;
use rlx_graph::ops::reduce::{Reduce, ReduceOp};
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::{DType, Dim, Tensor};

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("NegativeLogLikelihoodLoss", |l| {
        let x = l.value(0)?;
        Ok(vec![picked_loss(l, x)?])
    }),
    Row::lower("SoftmaxCrossEntropyLoss", |l| {
        let x = l.value(0)?;
        let log = reduction::log_softmax_of(l, x, 1)?;
        Ok(vec![picked_loss(l, log)?, log])
    }),
];

/// `-log[class]` of every sample, weighted and reduced as the node says. The class is picked by comparison, so that a class outside
/// the range (the ignored one) picks nothing.
fn picked_loss(l: &mut Lowering<'_>, log: ValueId) -> Result<ValueId, Refusal> {
    let dims = l.dims(0)?;
    if dims.len() < 2 {
        return invalid("scores must have rank 2 at least");
    }
    let dtype = l.dtype(0)?;
    let target = l.value(1)?;
    let target = l.cast(target, DType::I64)?;
    let (classes, own) = (dims[1], l.dims(1)?);
    let mut wide = own.clone();
    wide.insert(1, 1);
    let column = l.reshape(target, &wide)?;
    let mut count = vec![1; dims.len()];
    count[1] = classes;
    let iota_dims = count.iter().map(|&d| Dim::Known(d)).collect();
    let class = l.add(Iota { dims: iota_dims, axis: 1, dtype: DType::I64 }, &[])?;
    let hit = l.expand().binary(BinaryOp::Equal, column, class)?;
    let zero = l.expand().number(0.0, dtype)?;
    let hits = l.expand().select(hit, log, zero)?;
    let sum = l.add(Reduce { kind: ReduceOp::Sum, axes: vec![1], keep_dims: false }, &[hits])?;
    let mut loss = l.expand().unary(UnaryOp::Neg, sum)?;
    let weights = sample_weights(l, target, classes, dtype)?;
    if let Some(weights) = weights {
        loss = l.expand().binary(BinaryOp::Mul, loss, weights)?;
    }
    let axes: Vec<usize> = (0..own.len()).collect();
    let total = |l: &mut Lowering<'_>, kind: ReduceOp, x: ValueId| {
        l.add(Reduce { kind, axes: axes.clone(), keep_dims: false }, &[x])
    };
    match l.node.text("reduction", "mean")? {
        "none" => Ok(loss),
        "sum" => total(l, ReduceOp::Sum, loss),
        "mean" => match weights {
            None => total(l, ReduceOp::Mean, loss),
            Some(weights) => {
                let (sum, weight) = (total(l, ReduceOp::Sum, loss)?, total(l, ReduceOp::Sum, weights)?);
                Ok(l.expand().binary(BinaryOp::Div, sum, weight)?)
            }
        },
        other => invalid(format!("reduction {other:?} is unknown")),
    }
}

/// The weight of each sample's class, 0 for the ignored class; nothing if all count the same.
fn sample_weights(
    l: &mut Lowering<'_>,
    target: ValueId,
    classes: usize,
    dtype: DType,
) -> Result<Option<ValueId>, Refusal> {
    let ignored = l.node.int_opt("ignore_index")?;
    let given = l.optional(2)?;
    if ignored.is_none() && given.is_none() {
        return Ok(None);
    }
    let mut weights = match given {
        Some(given) => {
            let mut e = l.expand();
            let raised = e.scalar(BinaryOp::Max, target, 0.0)?;
            let inside = e.scalar(BinaryOp::Min, raised, classes as f64 - 1.0)?;
            l.add(Gather { axis: 0 }, &[given, inside])?
        }
        None => l.expand().number(1.0, dtype)?,
    };
    if let Some(ignored) = ignored {
        let ignored = l.tensor(Tensor::scalar(ignored));
        let mut e = l.expand();
        let skip = e.binary(BinaryOp::Equal, target, ignored)?;
        let zero = e.number(0.0, dtype)?;
        weights = e.select(skip, zero, weights)?;
    }
    Ok(Some(weights))
}
