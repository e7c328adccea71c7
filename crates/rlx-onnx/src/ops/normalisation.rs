//! Normalising over batches, images, groups and neighbouring channels.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Lowering;
use rlx_graph::ValueId;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::pad::Pad;
use rlx_graph::ops::reduce::{Reduce, ReduceOp};
use rlx_graph::ops::slice::Slice;
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::{DType, Dim, Tensor};

type Lowered = Result<Vec<ValueId>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("BatchNormalization", batch_norm),
    Row::lower("InstanceNormalization", instance_norm),
    Row::lower("GroupNormalization", group_norm),
    Row::lower("LRN", local_response),
];

/// One number for each channel, as it is broadcast over images of this rank.
fn per_channel(l: &mut Lowering<'_>, value: ValueId, rank: usize) -> Result<ValueId, Refusal> {
    let count: usize = l.dims_of(value)?.iter().product();
    let mut dims = vec![1; rank.saturating_sub(1)];
    dims[0] = count;
    l.reshape(value, &dims)
}

/// Mean and variance over axes, kept with extent 1.
fn moments(l: &mut Lowering<'_>, x: ValueId, axes: &[usize]) -> Result<(ValueId, ValueId), Refusal> {
    let mean_of = |axes: &[usize]| Reduce { kind: ReduceOp::Mean, axes: axes.to_vec(), keep_dims: true };
    let mean = l.add(mean_of(axes), &[x])?;
    let mut e = l.expand();
    let centred = e.binary(BinaryOp::Sub, x, mean)?;
    let square = e.binary(BinaryOp::Mul, centred, centred)?;
    Ok((mean, l.add(mean_of(axes), &[square])?))
}

/// `(x - mean) / sqrt(variance + eps)`
fn standardised(
    l: &mut Lowering<'_>,
    x: ValueId,
    mean: ValueId,
    variance: ValueId,
    eps: f64,
) -> Result<ValueId, Refusal> {
    let mut e = l.expand();
    let centred = e.binary(BinaryOp::Sub, x, mean)?;
    let shifted = e.scalar(BinaryOp::Add, variance, eps)?;
    let deviation = e.unary(UnaryOp::Sqrt, shifted)?;
    Ok(e.binary(BinaryOp::Div, centred, deviation)?)
}

fn scaled(l: &mut Lowering<'_>, x: ValueId, scale: ValueId, shift: ValueId) -> Result<ValueId, Refusal> {
    let rank = l.dims_of(x)?.len();
    let (scale, shift) = (per_channel(l, scale, rank)?, per_channel(l, shift, rank)?);
    let product = l.expand().binary(BinaryOp::Mul, x, scale)?;
    Ok(l.expand().binary(BinaryOp::Add, product, shift)?)
}

/// The numbers `a x + b` that a batch norm of known moments is, for each channel.
fn known_affine(l: &Lowering<'_>, eps: f64) -> Option<(Vec<f32>, Vec<f32>)> {
    let numbers = |operand: usize| l.constant(operand)?.floats().ok();
    let (scale, shift, mean, variance) = (numbers(1)?, numbers(2)?, numbers(3)?, numbers(4)?);
    let factor = |c: usize| scale[c] / (variance[c] + eps).sqrt();
    let channels = [shift.len(), mean.len(), variance.len()];
    if channels.iter().any(|&n| n != scale.len()) {
        return None;
    }
    let a = (0..scale.len()).map(|c| factor(c) as f32).collect();
    let b = (0..scale.len()).map(|c| (shift[c] - mean[c] * factor(c)) as f32).collect();
    Some((a, b))
}

fn batch_norm(l: &mut Lowering<'_>) -> Lowered {
    let (eps, momentum) = (l.node.float("epsilon", 1e-5)?, l.node.float("momentum", 0.9)?);
    let x = l.value(0)?;
    let rank = l.rank(0)?;
    if rank < 2 {
        return invalid("values must have a batch and channels");
    }
    let dtype = l.dtype(0)?;
    if !l.node.flag("training_mode", false)? {
        if let Some((a, b)) = known_affine(l, eps).filter(|_| dtype == DType::F32) {
            let (a, b) = (Tensor::from_slice(&[a.len()], &a)?, Tensor::from_slice(&[b.len()], &b)?);
            let (a, b) = (l.tensor(a), l.tensor(b));
            return Ok(vec![scaled(l, x, a, b)?]);
        }
        let operands: Vec<ValueId> = (1..5)
            .map(|i| {
                let value = l.value(i)?;
                l.cast(value, dtype)
            })
            .collect::<Result<_, _>>()?;
        let mean = per_channel(l, operands[2], rank)?;
        let variance = per_channel(l, operands[3], rank)?;
        let y = standardised(l, x, mean, variance, eps)?;
        return Ok(vec![scaled(l, y, operands[0], operands[1])?]);
    }
    let axes: Vec<usize> = (0..rank).filter(|&axis| axis != 1).collect();
    let (mean, variance) = moments(l, x, &axes)?;
    let y = standardised(l, x, mean, variance, eps)?;
    let (scale, shift) = (l.value(1)?, l.value(2)?);
    let (scale, shift) = (l.cast(scale, dtype)?, l.cast(shift, dtype)?);
    let mut results = vec![scaled(l, y, scale, shift)?];
    for (now, before) in [(mean, 3), (variance, 4)] {
        let before = l.value(before)?;
        let (dims, kind) = (l.dims_of(before)?, l.shape_of(before).dtype());
        let now = l.cast(now, kind)?;
        let now = l.reshape(now, &dims)?;
        let mut e = l.expand();
        let old = e.scalar(BinaryOp::Mul, before, momentum)?;
        let new = e.scalar(BinaryOp::Mul, now, 1.0 - momentum)?;
        results.push(e.binary(BinaryOp::Add, old, new)?);
    }
    Ok(results)
}

fn instance_norm(l: &mut Lowering<'_>) -> Lowered {
    let eps = l.node.float("epsilon", 1e-5)?;
    let x = l.value(0)?;
    let axes: Vec<usize> = (2..l.rank(0)?).collect();
    if axes.is_empty() {
        return invalid("values must be images");
    }
    let (mean, variance) = moments(l, x, &axes)?;
    let y = standardised(l, x, mean, variance, eps)?;
    let (scale, shift) = (l.value(1)?, l.value(2)?);
    Ok(vec![scaled(l, y, scale, shift)?])
}

fn group_norm(l: &mut Lowering<'_>) -> Lowered {
    let eps = l.node.float("epsilon", 1e-5)?;
    let dims = l.dims(0)?;
    let groups = usize::try_from(l.node.int("num_groups", 0)?).unwrap_or(0);
    if dims.len() < 2 || groups == 0 || !dims[1].is_multiple_of(groups) {
        return invalid(format!("{groups} groups of {dims:?}"));
    }
    let x = l.value(0)?;
    let rest: usize = dims[1..].iter().product::<usize>() / groups;
    let grouped = l.reshape(x, &[dims[0], groups, rest])?;
    let (mean, variance) = moments(l, grouped, &[2])?;
    let y = standardised(l, grouped, mean, variance, eps)?;
    let (scale, shift) = (l.value(1)?, l.value(2)?);
    if l.dims_of(scale)? == [groups] && groups != dims[1] {
        let y = scaled(l, y, scale, shift)?;
        return Ok(vec![l.reshape(y, &dims)?]);
    }
    let y = l.reshape(y, &dims)?;
    Ok(vec![scaled(l, y, scale, shift)?])
}

/// `x / (bias + alpha / size * sum of squares of neighbouring channels)^beta`
fn local_response(l: &mut Lowering<'_>) -> Lowered {
    let (alpha, beta) = (l.node.float("alpha", 1e-4)?, l.node.float("beta", 0.75)?);
    let bias = l.node.float("bias", 1.0)?;
    let size = usize::try_from(l.node.int("size", 0)?).unwrap_or(0);
    let dims = l.dims(0)?;
    if size == 0 || dims.len() < 2 {
        return invalid(format!("a size of {size} over {dims:?}"));
    }
    let x = l.value(0)?;
    let square = l.expand().binary(BinaryOp::Mul, x, x)?;
    let mut before = vec![Dim::Known(0); dims.len()];
    let mut after = before.clone();
    before[1] = Dim::Known((size - 1) / 2);
    after[1] = Dim::Known(size / 2);
    let padded = l.add(Pad { before, after, value: 0.0 }, &[square])?;
    let mut sum = None;
    for start in 0..size {
        let part = l.add(Slice::range(1, dims.len(), start, dims[1]), &[padded])?;
        sum = Some(match sum {
            None => part,
            Some(sum) => l.expand().binary(BinaryOp::Add, sum, part)?,
        });
    }
    let sum = sum.unwrap_or(padded);
    let mut e = l.expand();
    let scaled = e.scalar(BinaryOp::Mul, sum, alpha / size as f64)?;
    let shifted = e.scalar(BinaryOp::Add, scaled, bias)?;
    let divisor = e.scalar(BinaryOp::Pow, shifted, beta)?;
    Ok(vec![e.binary(BinaryOp::Div, x, divisor)?])
}
