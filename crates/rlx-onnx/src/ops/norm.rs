//! Normalisation over trailing axes.

use super::Row;
use crate::error::Refusal;
use crate::lower::Lowering;
use crate::model::{axes_of, axis_of};
use crate::value::ElementType;
use rlx_graph::ValueId;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::layer_norm::LayerNorm;
use rlx_graph::ops::reduce::{Reduce, ReduceOp};
use rlx_graph::ops::rms_norm::RmsNorm;
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::DType;

type Lowered = Result<Vec<ValueId>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("LayerNormalization", layer_norm),
    Row::lower("RMSNormalization", rms_norm),
    Row::lower("SimplifiedLayerNormalization", rms_norm),
    Row::lower("MeanVarianceNormalization", mean_variance),
    Row::lower("LpNormalization", lp_norm),
];

fn mean(l: &mut Lowering<'_>, x: ValueId, axes: &[usize]) -> Result<ValueId, Refusal> {
    l.add(Reduce { kind: ReduceOp::Mean, axes: axes.to_vec(), keep_dims: true }, &[x])
}

fn stash(l: &Lowering<'_>) -> Result<DType, Refusal> {
    let own = l.dtype(0)?;
    let stash = i32::try_from(l.node.int("stash_type", 1)?).ok().and_then(ElementType::from_onnx);
    Ok(match stash {
        Some(ElementType::Plain(stash)) if own != DType::F64 => stash,
        _ => own,
    })
}

fn layer_norm(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.shape(0)?.dims().to_vec();
    let axis = axis_of(l.node.int("axis", -1)?, dims.len())?;
    let eps = l.node.float("epsilon", 1e-5)?;
    let (x, weight, bias) = (l.value(0)?, l.value(1)?, l.optional(2)?);
    let dtype = l.dtype(0)?;
    let plain = dtype == DType::F32 && !l.wants(1) && !l.wants(2);
    if plain && axis + 1 == dims.len() && l.shape(1)?.dims() == &dims[axis..] {
        let op = LayerNorm { eps, bias: bias.is_some(), residual: false };
        let operands: Vec<ValueId> = [x, weight].into_iter().chain(bias).collect();
        return Ok(vec![l.add(op, &operands)?]);
    }
    let axes: Vec<usize> = (axis..dims.len()).collect();
    let work = stash(l)?;
    let wide = l.cast(x, work)?;
    let centre = mean(l, wide, &axes)?;
    let shifted = l.expand().binary(BinaryOp::Sub, wide, centre)?;
    let square = l.expand().binary(BinaryOp::Mul, shifted, shifted)?;
    let variance = mean(l, square, &axes)?;
    let mut e = l.expand();
    let more = e.scalar(BinaryOp::Add, variance, eps)?;
    let deviation = e.unary(UnaryOp::Sqrt, more)?;
    let inverse = e.unary(UnaryOp::Reciprocal, deviation)?;
    let normal = e.binary(BinaryOp::Mul, shifted, inverse)?;
    let normal = l.cast(normal, dtype)?;
    let mut y = l.expand().binary(BinaryOp::Mul, normal, weight)?;
    if let Some(bias) = bias {
        y = l.expand().binary(BinaryOp::Add, y, bias)?;
    }
    Ok(vec![y, centre, inverse])
}

fn rms_norm(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.shape(0)?.dims().to_vec();
    let axis = axis_of(l.node.int("axis", -1)?, dims.len())?;
    let eps = l.node.float("epsilon", 1e-5)?;
    let (x, weight) = (l.value(0)?, l.value(1)?);
    let dtype = l.dtype(0)?;
    if dtype == DType::F32
        && axis + 1 == dims.len()
        && l.shape(1)?.dims() == &dims[axis..]
        && l.dtype(1)? == dtype
    {
        let op = RmsNorm { eps, unit_offset: false, groups: 1, residual: false };
        return Ok(vec![l.add(op, &[x, weight])?]);
    }
    let axes: Vec<usize> = (axis..dims.len()).collect();
    let work = stash(l)?;
    let wide = l.cast(x, work)?;
    let square = l.expand().binary(BinaryOp::Mul, wide, wide)?;
    let size = mean(l, square, &axes)?;
    let mut e = l.expand();
    let more = e.scalar(BinaryOp::Add, size, eps)?;
    let root = e.unary(UnaryOp::Sqrt, more)?;
    let normal = e.binary(BinaryOp::Div, wide, root)?;
    let out = l.dtype(1)?;
    let normal = l.cast(normal, out)?;
    Ok(vec![l.expand().binary(BinaryOp::Mul, normal, weight)?])
}

fn mean_variance(l: &mut Lowering<'_>) -> Lowered {
    let rank = l.rank(0)?;
    let axes = axes_of(&l.node.ints_opt("axes")?.unwrap_or_else(|| vec![0, 2, 3]), rank)?;
    let x = l.value(0)?;
    let centre = mean(l, x, &axes)?;
    let shifted = l.expand().binary(BinaryOp::Sub, x, centre)?;
    let square = l.expand().binary(BinaryOp::Mul, shifted, shifted)?;
    let variance = mean(l, square, &axes)?;
    let mut e = l.expand();
    let deviation = e.unary(UnaryOp::Sqrt, variance)?;
    let safe = e.scalar(BinaryOp::Add, deviation, 1e-9)?;
    Ok(vec![e.binary(BinaryOp::Div, shifted, safe)?])
}

fn lp_norm(l: &mut Lowering<'_>) -> Lowered {
    let axis = axis_of(l.node.int("axis", -1)?, l.rank(0)?)?;
    let x = l.value(0)?;
    let one = l.node.int("p", 2)? == 1;
    let dtype = l.dtype(0)?;
    let mut e = l.expand();
    let parts = if one { e.unary(UnaryOp::Abs, x)? } else { e.binary(BinaryOp::Mul, x, x)? };
    let sum = e.reduce(ReduceOp::Sum, parts, axis)?;
    let size = if one { sum } else { e.unary(UnaryOp::Sqrt, sum)? };
    let empty = e.scalar(BinaryOp::Equal, size, 0.0)?;
    let unit = e.number(1.0, dtype)?;
    let safe = e.select(empty, unit, size)?;
    Ok(vec![e.binary(BinaryOp::Div, x, safe)?])
}
