//! Constants, counting, and what shapes alone decide.

use super::Row;
use crate::decode::int_vector;
use crate::error::{Refusal, invalid};
use crate::lower::{Host, Lowering};
use crate::model::Attr;
use crate::value::{ElementType, TextTensor, Value, from_floats};
use rlx_graph::ValueId;
use rlx_graph::eval::{from_f64, from_i64};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::iota::Iota;
use rlx_tensor::{DType, Dim, Tensor, element_count};

type Lowered = Result<Vec<ValueId>, Refusal>;

/// Elements that a made-up tensor may have at most.
const MADE_ELEMENTS: usize = 1 << 31;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::both("Shape", shape, shape_host),
    Row::both("Size", size, size_host),
    Row::host("Constant", constant),
    Row::both("ConstantOfShape", constant_of_shape, constant_of_shape_host),
    Row::host("Range", range),
    Row::lower("EyeLike", eye_like),
    Row::both("Identity", |l| Ok(vec![l.value(0)?]), |h| Ok(vec![h.value(0)?.clone()])),
    Row::lower("Trilu", trilu),
];

/// Start and end of the part of a shape that is asked for.
pub fn bounds(rank: usize, start: i64, end: Option<i64>) -> (usize, usize) {
    let clamp = |v: i64| (if v < 0 { v + rank as i64 } else { v }).clamp(0, rank as i64) as usize;
    let (start, end) = (clamp(start), end.map_or(rank, clamp));
    (start, end.max(start))
}

fn shape(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let (start, end) = bounds(dims.len(), l.node.int("start", 0)?, l.node.int_opt("end")?);
    let own: Vec<i64> = dims[start..end].iter().map(|&d| d as i64).collect();
    Ok(vec![l.int_vector(&own)?])
}

fn shape_host(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let dims = h.dims(0)?;
    let (start, end) = bounds(dims.len(), h.node.int("start", 0)?, h.node.int_opt("end")?);
    let own: Vec<i64> = dims[start..end].iter().map(|&d| d as i64).collect();
    Ok(vec![int_vector(&own)])
}

fn size(l: &mut Lowering<'_>) -> Lowered {
    let count = l.dims(0)?.iter().product::<usize>() as i64;
    Ok(vec![l.tensor(Tensor::scalar(count))])
}

fn size_host(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    Ok(vec![Tensor::scalar(h.dims(0)?.iter().product::<usize>() as i64).into()])
}

fn constant(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let Some((_, attr)) =
        h.node.attrs.iter().find(|(name, _)| name.starts_with("value") || *name == "sparse_value")
    else {
        return invalid("there is no value attribute");
    };
    let scalar = |text: &String| TextTensor { dims: vec![], items: vec![text.clone()] };
    Ok(vec![match attr {
        Attr::Tensor(value) => value.clone(),
        Attr::Float(v) => Tensor::scalar(*v).into(),
        Attr::Floats(v) => Tensor::from_slice(&[v.len()], v)?.into(),
        Attr::Int(v) => Tensor::scalar(*v).into(),
        Attr::Ints(v) => int_vector(v),
        Attr::Text(text) => Value::Text(scalar(text)),
        Attr::Texts(texts) => Value::Text(TextTensor { dims: vec![texts.len()], items: texts.clone() }),
        _ => return invalid("the value is of no kind that a constant can be"),
    }])
}

fn made_dims(dims: &[i64]) -> Result<Vec<usize>, Refusal> {
    let known: Option<Vec<usize>> = dims.iter().map(|&d| usize::try_from(d).ok()).collect();
    let fits = known.filter(|d| element_count(d).is_some_and(|n| n <= MADE_ELEMENTS));
    fits.ok_or_else(|| Refusal::Invalid(format!("dims {dims:?} are negative or too large")))
}

fn constant_of_shape(l: &mut Lowering<'_>) -> Lowered {
    let dims = made_dims(&l.ints(0)?)?;
    let fill = match l.node.tensor_opt("value")? {
        None => Tensor::scalar(0f32),
        Some(Value::Tensor(t)) => t.reshaped(&[])?,
        Some(_) => return Err(Refusal::Host),
    };
    if dims.iter().product::<usize>() <= 4096 {
        let bytes = fill.bytes().repeat(dims.iter().product());
        return Ok(vec![l.tensor(Tensor::from_bytes(&dims, fill.dtype(), &bytes)?)]);
    }
    let fill = l.tensor(fill);
    Ok(vec![l.broadcast(fill, &dims)?])
}

fn constant_of_shape_host(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let dims = made_dims(&h.ints(0)?)?;
    let fill = match h.node.tensor_opt("value")? {
        None => Value::Tensor(Tensor::scalar(0f32)),
        Some(value) => value.clone(),
    };
    let count = dims.iter().product();
    Ok(vec![match fill {
        Value::Tensor(t) => Tensor::from_bytes(&dims, t.dtype(), &t.bytes().repeat(count))?.into(),
        Value::Coded(mut t) => {
            t.codes = vec![t.codes.first().copied().unwrap_or(0); count];
            t.dims = dims;
            Value::Coded(t)
        }
        _ => return invalid("the fill value must be a number"),
    }])
}

fn range(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let ElementType::Plain(dtype) = h.element(0)? else { return invalid("a range is of numbers") };
    if dtype.is_int() {
        let at = |i: usize| h.value(i)?.int();
        let (start, limit, step) = (i128::from(at(0)?), i128::from(at(1)?), i128::from(at(2)?));
        if step == 0 {
            return invalid("the step is 0");
        }
        let span = limit - start;
        let count = if (span > 0) == (step > 0) { (span.abs() + step.abs() - 1) / step.abs() } else { 0 };
        let dims = made_dims(&[count as i64])?;
        let values: Vec<i64> = (0..dims[0]).map(|i| (start + i as i128 * step) as i64).collect();
        return Ok(vec![from_i64(&dims, dtype, &values)?.into()]);
    }
    let at = |i: usize| -> Result<f64, Refusal> { h.floats(i)?.first().copied().ok_or(Refusal::Host) };
    let (start, limit, step) = (at(0)?, at(1)?, at(2)?);
    let count = ((limit - start) / step).ceil();
    if !count.is_finite() {
        return invalid("the range has no end");
    }
    let dims = made_dims(&[count.max(0.0) as i64])?;
    let values: Vec<f64> = (0..dims[0]).map(|i| start + i as f64 * step).collect();
    Ok(vec![from_floats(ElementType::Plain(dtype), &dims, &values)?])
}

fn eye_like(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let [rows, columns] = dims[..] else { return invalid("operand 0 must have rank 2") };
    let dtype = match l.node.element_opt("dtype")? {
        Some(ElementType::Plain(dtype)) => dtype,
        Some(_) => return Err(Refusal::Host),
        None => l.dtype(0)?,
    };
    let k = l.node.int("k", 0)?;
    let mut values = vec![0.0; rows * columns];
    for row in 0..rows {
        if let Some(column) = usize::try_from(row as i64 + k).ok().filter(|&c| c < columns) {
            values[row * columns + column] = 1.0;
        }
    }
    Ok(vec![l.tensor(from_f64(&dims, dtype, &values)?)])
}

fn trilu(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let [.., rows, columns] = dims[..] else { return invalid("operand 0 must have rank 2 at least") };
    let k = if l.has(1) { l.known(1)?.int()? } else { 0 };
    let upper = l.node.flag("upper", true)?;
    let x = l.value(0)?;
    let own: Vec<Dim> = vec![Dim::Known(rows), Dim::Known(columns)];
    let row = l.add(Iota { dims: own.clone(), axis: 0, dtype: DType::I64 }, &[])?;
    let column = l.add(Iota { dims: own, axis: 1, dtype: DType::I64 }, &[])?;
    let offset = l.tensor(Tensor::scalar(k.clamp(-(1 << 40), 1 << 40)));
    let dtype = l.dtype(0)?;
    let zero = Tensor::zeros(&[], dtype)?;
    let zero = l.tensor(zero);
    let mut e = l.expand();
    let diagonal = e.binary(BinaryOp::Add, row, offset)?;
    let kind = if upper { BinaryOp::GreaterEqual } else { BinaryOp::LessEqual };
    let keep = e.binary(kind, column, diagonal)?;
    Ok(vec![e.select(keep, x, zero)?])
}
