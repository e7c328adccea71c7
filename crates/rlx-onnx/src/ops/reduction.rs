//! Combining elements along axes: reductions, softmax and its kin, running sums, arg-max, the largest.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::{Host, Lowering};
use crate::model::{axes_of, axis_of};
use crate::value::{ElementType, Value, from_floats};
use rlx_graph::ValueId;
use rlx_graph::eval::{from_i64, strides, to_f64, to_i64};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::cumsum::CumSum;
use rlx_graph::ops::reduce::{Reduce, ReduceOp};
use rlx_graph::ops::softmax::Softmax;
use rlx_graph::ops::topk::TopK;
use rlx_graph::ops::transpose::Transpose;
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::{DType, Tensor};

type Lowered = Result<Vec<ValueId>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("ReduceSum", |l| reduce(l, ReduceOp::Sum)),
    Row::lower("ReduceMean", |l| reduce(l, ReduceOp::Mean)),
    Row::lower("ReduceMax", |l| reduce(l, ReduceOp::Max)),
    Row::lower("ReduceMin", |l| reduce(l, ReduceOp::Min)),
    Row::lower("ReduceProd", |l| reduce(l, ReduceOp::Prod)),
    Row::lower("ReduceL1", reduce_l1),
    Row::lower("ReduceL2", reduce_l2),
    Row::lower("ReduceLogSum", reduce_log_sum),
    Row::lower("ReduceLogSumExp", reduce_log_sum_exp),
    Row::lower("ReduceSumSquare", reduce_sum_square),
    Row::lower("Softmax", softmax),
    Row::lower("LogSoftmax", log_softmax),
    Row::host("Hardmax", hardmax),
    Row::both("ArgMax", |l| arg_lower(l, true), |h| arg(h, true)),
    Row::both("ArgMin", |l| arg_lower(l, false), |h| arg(h, false)),
    Row::lower("CumSum", cumsum),
    Row::host("CumProd", cumprod),
    Row::both("TopK", topk_lower, topk),
];

/// What a reduction is over: axes, whether they stay, and whether anything is combined at all.
struct Over {
    axes: Vec<usize>,
    keep_dims: bool,
    nothing: bool,
}

fn over(l: &mut Lowering<'_>) -> Result<Over, Refusal> {
    let rank = l.rank(0)?;
    let axes = l.attr_or_ints("axes", 1)?.unwrap_or_default();
    let nothing = axes.is_empty() && l.node.flag("noop_with_empty_axes", false)?;
    let keep_dims = l.node.flag("keepdims", true)?;
    let axes = if axes.is_empty() && !nothing { (0..rank).collect() } else { axes_of(&axes, rank)? };
    Ok(Over { axes, keep_dims, nothing })
}

impl Over {
    fn op(&self, kind: ReduceOp) -> Reduce {
        Reduce { kind, axes: self.axes.clone(), keep_dims: self.keep_dims }
    }

    fn apply(&self, l: &mut Lowering<'_>, kind: ReduceOp, x: ValueId) -> Result<ValueId, Refusal> {
        if self.nothing { Ok(x) } else { l.add(self.op(kind), &[x]) }
    }
}

fn reduce(l: &mut Lowering<'_>, kind: ReduceOp) -> Lowered {
    let over = over(l)?;
    let x = l.value(0)?;
    let dtype = l.dtype(0)?;
    let work = match dtype {
        DType::Bool => DType::U8,
        dtype if dtype.is_int() && kind == ReduceOp::Mean => DType::F64,
        dtype => dtype,
    };
    let wide = l.cast(x, work)?;
    let result = over.apply(l, kind, wide)?;
    Ok(vec![l.cast(result, dtype)?])
}

fn reduce_l1(l: &mut Lowering<'_>) -> Lowered {
    let over = over(l)?;
    let x = l.value(0)?;
    let size = l.expand().unary(UnaryOp::Abs, x)?;
    Ok(vec![over.apply(l, ReduceOp::Sum, size)?])
}

fn squares(l: &mut Lowering<'_>, over: &Over) -> Result<ValueId, Refusal> {
    let x = l.value(0)?;
    let square = l.expand().binary(BinaryOp::Mul, x, x)?;
    over.apply(l, ReduceOp::Sum, square)
}

fn reduce_sum_square(l: &mut Lowering<'_>) -> Lowered {
    let over = over(l)?;
    Ok(vec![squares(l, &over)?])
}

fn reduce_l2(l: &mut Lowering<'_>) -> Lowered {
    let over = over(l)?;
    let sum = squares(l, &over)?;
    let dtype = l.dtype(0)?;
    let wide = if dtype.is_float() { sum } else { l.cast(sum, DType::F64)? };
    let root = l.expand().unary(UnaryOp::Sqrt, wide)?;
    Ok(vec![l.cast(root, dtype)?])
}

fn reduce_log_sum(l: &mut Lowering<'_>) -> Lowered {
    let over = over(l)?;
    let x = l.value(0)?;
    let sum = over.apply(l, ReduceOp::Sum, x)?;
    Ok(vec![l.expand().unary(UnaryOp::Log, sum)?])
}

fn reduce_log_sum_exp(l: &mut Lowering<'_>) -> Lowered {
    let over = over(l)?;
    let x = l.value(0)?;
    let dtype = l.dtype(0)?;
    if over.nothing {
        return Ok(vec![x]);
    }
    let kept = Over { axes: over.axes.clone(), keep_dims: true, nothing: false };
    let max = kept.apply(l, ReduceOp::Max, x)?;
    let mut e = l.expand();
    let size = e.unary(UnaryOp::Abs, max)?;
    let infinite = e.scalar(BinaryOp::Equal, size, f64::INFINITY)?;
    let zero = e.number(0.0, dtype)?;
    let base = e.select(infinite, zero, max)?;
    let shifted = e.binary(BinaryOp::Sub, x, base)?;
    let power = e.unary(UnaryOp::Exp, shifted)?;
    let sum = over.apply(l, ReduceOp::Sum, power)?;
    let log = l.expand().unary(UnaryOp::Log, sum)?;
    let dims = l.dims_of(log)?;
    let base = l.reshape(base, &dims)?;
    Ok(vec![l.expand().binary(BinaryOp::Add, log, base)?])
}

/// A value as softmax and its kin see it: before version 13 everything from the axis on is one axis.
fn along(l: &mut Lowering<'_>) -> Result<(ValueId, usize, Option<Vec<usize>>), Refusal> {
    let x = l.value(0)?;
    if l.opset() >= 13 {
        return Ok((x, axis_of(l.node.int("axis", -1)?, l.rank(0)?.max(1))?, None));
    }
    let dims = l.dims(0)?;
    let axis = l.node.int("axis", 1)?;
    let axis = if axis == dims.len() as i64 { dims.len() } else { axis_of(axis, dims.len())? };
    if axis + 1 == dims.len() {
        return Ok((x, axis, None));
    }
    let flat = [dims[..axis].iter().product(), dims[axis..].iter().product()];
    Ok((l.reshape(x, &flat)?, 1, Some(dims)))
}

fn softmax(l: &mut Lowering<'_>) -> Lowered {
    let (x, axis, dims) = along(l)?;
    let y = l.add(Softmax { axis }, &[x])?;
    Ok(vec![dims.map_or(Ok(y), |dims| l.reshape(y, &dims))?])
}

/// `x - max - log sum e^(x - max)`
pub fn log_softmax_of(l: &mut Lowering<'_>, x: ValueId, axis: usize) -> Result<ValueId, Refusal> {
    let mut e = l.expand();
    let max = e.reduce(ReduceOp::Max, x, axis)?;
    let shifted = e.binary(BinaryOp::Sub, x, max)?;
    let power = e.unary(UnaryOp::Exp, shifted)?;
    let sum = e.reduce(ReduceOp::Sum, power, axis)?;
    let log = e.unary(UnaryOp::Log, sum)?;
    Ok(e.binary(BinaryOp::Sub, shifted, log)?)
}

fn log_softmax(l: &mut Lowering<'_>) -> Lowered {
    let (x, axis, dims) = along(l)?;
    let y = log_softmax_of(l, x, axis)?;
    Ok(vec![dims.map_or(Ok(y), |dims| l.reshape(y, &dims))?])
}

/// The slices of a tensor along an axis: linear indices of each, and the number of slices after one step of the outer axes.
pub fn slices(dims: &[usize], axis: usize) -> Vec<Vec<usize>> {
    let (extent, stride) = (dims[axis], strides(dims)[axis]);
    let count: usize = dims.iter().product();
    let starts = (0..count).filter(|i| extent > 0 && i / stride % extent == 0);
    starts.map(|start| (0..extent).map(|j| start + j * stride).collect()).collect()
}

/// Position of the largest (or smallest) of some values; the last of equals if asked.
fn best(values: &[f64], largest: bool, last: bool) -> usize {
    let mut at = 0;
    for (i, &v) in values.iter().enumerate().skip(1) {
        let better = if largest { v > values[at] } else { v < values[at] };
        if better || (last && v == values[at]) || (v.is_nan() && !values[at].is_nan()) {
            at = i;
        }
    }
    at
}

fn hardmax(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.tensor(0)?;
    let old = h.node.opset < 13;
    let axis = axis_of(h.node.int("axis", if old { 1 } else { -1 })?, x.dims().len())?;
    let flat = [x.dims()[..axis].iter().product(), x.dims()[axis..].iter().product()];
    let (dims, axis) = if old { (flat.to_vec(), 1) } else { (x.dims().to_vec(), axis) };
    let values = to_f64(x)?;
    let mut result = vec![0.0; values.len()];
    for slice in slices(&dims, axis) {
        let own: Vec<f64> = slice.iter().map(|&i| values[i]).collect();
        result[slice[best(&own, true, false)]] = 1.0;
    }
    Ok(vec![from_floats(ElementType::Plain(x.dtype()), x.dims(), &result)?])
}

fn arg(h: &Host<'_>, largest: bool) -> Result<Vec<Value>, Refusal> {
    let x = h.tensor(0)?;
    let axis = axis_of(h.node.int("axis", 0)?, x.dims().len())?;
    let last = h.node.flag("select_last_index", false)?;
    let mut dims = x.dims().to_vec();
    if dims[axis] == 0 {
        return invalid("an axis without elements has no largest");
    }
    let values = to_f64(x)?;
    let found = slices(&dims, axis).into_iter().map(|slice| {
        let own: Vec<f64> = slice.iter().map(|&i| values[i]).collect();
        best(&own, largest, last) as i64
    });
    let found: Vec<i64> = found.collect();
    dims[axis] = 1;
    if !h.node.flag("keepdims", true)? {
        dims.remove(axis);
    }
    Ok(vec![Tensor::from_slice(&dims, &found)?.into()])
}

/// The first of the largest by [`TopK`], of floats; the smallest is the largest of the negated.
fn arg_lower(l: &mut Lowering<'_>, largest: bool) -> Lowered {
    let dims = l.dims(0)?;
    let axis = axis_of(l.node.int("axis", 0)?, dims.len())?;
    if l.node.flag("select_last_index", false)? || l.dtype(0)? != DType::F32 || dims[axis] == 0 {
        return Err(Refusal::Host);
    }
    let mut x = l.value(0)?;
    if !largest {
        x = l.expand().unary(UnaryOp::Neg, x)?;
    }
    let mut perm: Vec<usize> = (0..dims.len()).collect();
    perm.swap(axis, dims.len() - 1);
    let turned = axis + 1 != dims.len();
    if turned {
        x = l.add(Transpose { perm: perm.clone() }, &[x])?;
    }
    let mut at = l.add_all(TopK { k: 1 }, &[x])?[1];
    if turned {
        at = l.add(Transpose { perm }, &[at])?;
    }
    let mut kept = dims;
    kept[axis] = 1;
    if !l.node.flag("keepdims", true)? {
        kept.remove(axis);
    }
    let at = l.reshape(at, &kept)?;
    Ok(vec![l.cast(at, DType::I64)?])
}

fn topk_lower(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let axis = axis_of(l.node.int("axis", -1)?, dims.len())?;
    let largest = l.node.flag("largest", true)?;
    if axis + 1 != dims.len() || !largest || l.dtype(0)? != DType::F32 {
        return Err(Refusal::Host);
    }
    let k = match l.node.int_opt("k")? {
        Some(k) => k,
        None => l.known(1)?.int()?,
    };
    let Some(k) = usize::try_from(k).ok().filter(|&k| k > 0 && k <= dims[axis]) else {
        return Err(Refusal::Host);
    };
    let x = l.value(0)?;
    let found = l.add_all(TopK { k }, &[x])?;
    let at = l.cast(found[1], DType::I64)?;
    Ok(vec![found[0], at])
}

fn cumsum(l: &mut Lowering<'_>) -> Lowered {
    let axis = match l.ints(1)?.as_slice() {
        [axis] => axis_of(*axis, l.rank(0)?)?,
        _ => return invalid("the axis must be one integer"),
    };
    let (exclusive, reverse) = (l.node.flag("exclusive", false)?, l.node.flag("reverse", false)?);
    let x = l.value(0)?;
    Ok(vec![l.add(CumSum { axis, exclusive, reverse }, &[x])?])
}

fn cumprod(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.tensor(0)?;
    let axis = axis_of(h.value(1)?.int()?, x.dims().len())?;
    let (exclusive, reverse) = (h.node.flag("exclusive", false)?, h.node.flag("reverse", false)?);
    let whole = x.dtype().is_int();
    let (floats, ints) = (to_f64(x)?, if whole { to_i64(x)? } else { Vec::new() });
    let (mut out, mut out_ints) = (floats.clone(), ints.clone());
    for mut slice in slices(x.dims(), axis) {
        if reverse {
            slice.reverse();
        }
        let (mut product, mut whole_product) = (1.0, 1i64);
        for at in slice {
            let before = (product, whole_product);
            product *= floats[at];
            out[at] = if exclusive { before.0 } else { product };
            if whole {
                whole_product = whole_product.wrapping_mul(ints[at]);
                out_ints[at] = if exclusive { before.1 } else { whole_product };
            }
        }
    }
    Ok(vec![match whole {
        true => from_i64(x.dims(), x.dtype(), &out_ints)?.into(),
        false => from_floats(ElementType::Plain(x.dtype()), x.dims(), &out)?,
    }])
}

fn topk(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.tensor(0)?;
    let mut dims = x.dims().to_vec();
    let axis = axis_of(h.node.int("axis", -1)?, dims.len())?;
    let k = match h.node.int_opt("k")? {
        Some(k) => k,
        None => h.value(1)?.int()?,
    };
    let k = usize::try_from(k).ok().filter(|&k| k <= dims[axis]);
    let Some(k) = k else { return invalid(format!("k does not fit {} elements", dims[axis])) };
    let largest = h.node.flag("largest", true)?;
    let order = |a: f64, b: f64| {
        let up = a.total_cmp(&b);
        let up = if a == b { std::cmp::Ordering::Equal } else { up };
        if largest { up.reverse() } else { up }
    };
    let values = to_f64(x)?;
    let exact = if x.dtype().is_int() { to_i64(x)? } else { Vec::new() };
    let unsigned = x.dtype() == DType::U64;
    let compare = |a: usize, b: usize| {
        if exact.is_empty() {
            return order(values[a], values[b]);
        }
        let flip = if unsigned { i64::MIN } else { 0 };
        let up = (exact[a] ^ flip).cmp(&(exact[b] ^ flip));
        if largest { up.reverse() } else { up }
    };
    let all = slices(&dims, axis);
    let inner = strides(&dims)[axis];
    dims[axis] = k;
    let own = strides(&dims);
    let count: usize = dims.iter().product();
    let (mut picked, mut indices) = (vec![0usize; count], vec![0i64; count]);
    for (number, slice) in all.into_iter().enumerate() {
        let mut ranked: Vec<usize> = (0..slice.len()).collect();
        ranked.sort_by(|&a, &b| compare(slice[a], slice[b]));
        let start = number / inner * (inner * k) + number % inner;
        for (j, &at) in ranked.iter().take(k).enumerate() {
            picked[start + j * own[axis]] = slice[at];
            indices[start + j * own[axis]] = at as i64;
        }
    }
    let element = x.dtype().element_bytes().unwrap_or(1);
    let bytes: Vec<u8> =
        picked.iter().flat_map(|&i| x.bytes()[i * element..(i + 1) * element].iter().copied()).collect();
    Ok(vec![
        Tensor::from_bytes(&dims, x.dtype(), &bytes)?.into(),
        Tensor::from_slice(&dims, &indices)?.into(),
    ])
}
