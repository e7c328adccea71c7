//! Quantised numbers: scales and zero points a tensor, an axis or a block.

use super::{Row, integer, interpret_lowering, linear};
use crate::error::{Refusal, invalid};
use crate::lower::{CodedWeight, Host, INLINE_BYTES, Lowering};
use crate::model::axis_of;
use crate::value::{CodedTensor, ElementType, Value, from_floats};
use rlx_graph::ValueId;
use rlx_graph::eval::{from_f64, strides};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::reduce::{Reduce, ReduceOp};
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::rounding::{bf16_of, f16_of};
use rlx_tensor::{DType, Tensor};

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::both("QuantizeLinear", quantize_lower, quantize),
    Row::both("DequantizeLinear", dequantize_lower, dequantize)
        .making_weights(INLINE_BYTES / size_of::<f32>()),
    Row::both("DynamicQuantizeLinear", dynamic_quantize_lower, dynamic_quantize),
    Row::both("QLinearMatMul", integer::qlinear_matmul, q_linear_matmul),
    Row::both("MatMulInteger", integer::matmul_integer, matmul_integer),
];

/// For each element of a value, the position of its scale.
fn scale_positions(dims: &[usize], scale: &[usize], axis: i64, block: i64) -> Result<Vec<usize>, Refusal> {
    let count: usize = dims.iter().product();
    let scales: usize = scale.iter().product();
    if scales == 1 {
        return Ok(vec![0; count]);
    }
    let axis = axis_of(axis, dims.len())?;
    let own = strides(dims);
    if scale.len() == 1 && scales == dims[axis] {
        return Ok((0..count).map(|i| i / own[axis] % dims[axis]).collect());
    }
    let block = match usize::try_from(block).unwrap_or(0) {
        0 => dims[axis].div_ceil(scale.get(axis).copied().unwrap_or(1).max(1)),
        block => block,
    };
    let fits = scale.len() == dims.len()
        && (0..dims.len()).all(|a| scale[a] == if a == axis { dims[a].div_ceil(block) } else { dims[a] });
    if !fits {
        return invalid(format!("scales {scale:?} fit neither an axis nor blocks of {dims:?}"));
    }
    let to = strides(scale);
    let at = |i: usize| {
        let place = |a: usize| i / own[a] % dims[a] / if a == axis { block } else { 1 };
        (0..dims.len()).map(|a| place(a) * to[a]).sum()
    };
    Ok((0..count).map(at).collect())
}

/// Smallest and largest number of an integer type; nothing for floats.
fn int_range(element: ElementType) -> Option<(f64, f64)> {
    match element {
        ElementType::Coded(coding) => coding.int_range(),
        ElementType::Plain(DType::U8) => Some((0.0, 255.0)),
        ElementType::Plain(DType::I8) => Some((-128.0, 127.0)),
        ElementType::Plain(DType::U16) => Some((0.0, 65535.0)),
        ElementType::Plain(DType::I16) => Some((-32768.0, 32767.0)),
        ElementType::Plain(DType::I32) => Some((f64::from(i32::MIN), f64::from(i32::MAX))),
        _ => None,
    }
}

fn rounded_to(element: ElementType, value: f64) -> f64 {
    match element {
        ElementType::Plain(DType::F32) => f64::from(value as f32),
        ElementType::Plain(DType::F16) => f16_of(value).to_f64(),
        ElementType::Plain(DType::BF16) => bf16_of(value).to_f64(),
        _ => value,
    }
}

/// Numbers as a quantised type.
fn quantized(
    element: ElementType,
    dims: &[usize],
    values: impl Iterator<Item = f64>,
    zero: impl Fn(usize) -> f64,
    saturate: bool,
) -> Result<Value, Refusal> {
    let range = int_range(element);
    let code = |(i, v): (usize, f64)| match range {
        Some((low, high)) => (v.round_ties_even() + zero(i)).clamp(low, high),
        None => v + zero(i),
    };
    let all: Vec<f64> = values.enumerate().map(code).collect();
    match element {
        ElementType::Coded(coding) if coding.int_range().is_none() => {
            let codes = all.iter().map(|&v| coding.encode(v, saturate)).collect();
            Ok(Value::Coded(CodedTensor { coding, dims: dims.to_vec(), codes }))
        }
        element => from_floats(element, dims, &all),
    }
}

fn quantize(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (x, scale) = (h.floats(0)?, h.floats(1)?);
    let zero = h.optional(2).map(Value::floats).transpose()?.unwrap_or_default();
    let element = match (h.optional(2).and_then(Value::element), h.node.int("output_dtype", 0)?) {
        (Some(element), _) => element,
        (None, 0) => ElementType::Plain(DType::U8),
        (None, code) => match i32::try_from(code).ok().and_then(ElementType::from_onnx) {
            Some(element) => element,
            None => return invalid(format!("output_dtype {code} is no element type")),
        },
    };
    let dims = h.dims(0)?;
    let at = scale_positions(dims, h.dims(1)?, h.node.int("axis", 1)?, h.node.int("block_size", 0)?)?;
    let precision = match h.node.element_opt("precision") {
        Ok(Some(precision)) => precision,
        _ => h.element(1)?,
    };
    let divided = x.iter().zip(&at).map(|(v, &s)| rounded_to(precision, v / scale[s]));
    let zero_at = |i: usize| zero.get(at[i]).copied().unwrap_or(0.0);
    Ok(vec![quantized(element, dims, divided, zero_at, h.node.flag("saturate", true)?)?])
}

fn dequantize(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (x, scale) = (h.floats(0)?, h.floats(1)?);
    let zero = h.optional(2).map(Value::floats).transpose()?.unwrap_or_default();
    let dims = h.dims(0)?;
    let at = scale_positions(dims, h.dims(1)?, h.node.int("axis", 1)?, h.node.int("block_size", 0)?)?;
    let number = |(i, v): (usize, &f64)| (v - zero.get(at[i]).copied().unwrap_or(0.0)) * scale[at[i]];
    let values: Vec<f64> = x.iter().enumerate().map(number).collect();
    let element = match h.node.int("output_dtype", 0)? {
        0 => h.element(1)?,
        code => i32::try_from(code).ok().and_then(ElementType::from_onnx).unwrap_or(h.element(1)?),
    };
    Ok(vec![from_floats(element, dims, &values)?])
}

/// `round(x / scale) + zero` within the range of a type of eight bits, as that type.
fn codes_of(
    l: &mut Lowering<'_>,
    x: ValueId,
    [scale, zero]: [Option<ValueId>; 2],
    dtype: DType,
) -> Result<ValueId, Refusal> {
    let (low, high) = if dtype == DType::I8 { (-128.0, 127.0) } else { (0.0, 255.0) };
    let mut e = l.expand();
    let mut y = x;
    if let Some(scale) = scale {
        y = e.binary(BinaryOp::Div, y, scale)?;
    }
    y = e.unary(UnaryOp::Round, y)?;
    if let Some(zero) = zero {
        y = e.binary(BinaryOp::Add, y, zero)?;
    }
    y = e.scalar(BinaryOp::Max, y, low)?;
    y = e.scalar(BinaryOp::Min, y, high)?;
    l.cast(y, dtype)
}

/// A tensor or an axis in eight bits, as part of a region.
fn quantize_lower(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    let (rank, scales) = (l.rank(0)?, l.shape(1)?);
    let dtype = match (l.has(2), l.node.int("output_dtype", 0)?) {
        (true, _) => l.dtype(2)?,
        (false, 0) => DType::U8,
        (false, _) => return Err(Refusal::Host),
    };
    let plain = l.dtype(0)? == DType::F32 && scales.dtype() == DType::F32 && scales.rank() <= 1;
    let own = l.node.int("precision", 0)? == 0 && l.node.int("block_size", 0)? == 0;
    if !plain || !own || !matches!(dtype, DType::U8 | DType::I8) {
        return Err(Refusal::Host);
    }
    let (x, scale, zero) = (l.value(0)?, l.value(1)?, l.optional(2)?);
    let mut wide = vec![1; rank];
    if let Some(count) = scales.dims().first().and_then(|d| d.known()).filter(|&count| count != 1) {
        wide[axis_of(l.node.int("axis", 1)?, rank)?] = count;
    }
    let scale = l.reshape(scale, &wide)?;
    let zero = match zero {
        Some(zero) => {
            let zero = l.cast(zero, DType::F32)?;
            Some(l.reshape(zero, &wide)?)
        }
        None => None,
    };
    Ok(vec![codes_of(l, x, [Some(scale), zero], dtype)?])
}

/// A tensor by its own range, as part of a region.
fn dynamic_quantize_lower(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    let rank = l.rank(0)?;
    if rank == 0 || l.dtype(0)? != DType::F32 {
        return Err(Refusal::Host);
    }
    let x = l.value(0)?;
    let mut extreme = |kind: ReduceOp, limit: BinaryOp| -> Result<ValueId, Refusal> {
        let all = Reduce { kind, axes: (0..rank).collect(), keep_dims: false };
        let found = l.add(all, &[x])?;
        Ok(l.expand().scalar(limit, found, 0.0)?)
    };
    let (low, high) = (extreme(ReduceOp::Min, BinaryOp::Min)?, extreme(ReduceOp::Max, BinaryOp::Max)?);
    let mut e = l.expand();
    let range = e.binary(BinaryOp::Sub, high, low)?;
    let scale = e.scalar(BinaryOp::Div, range, 255.0)?;
    let (nothing, one) = (e.scalar(BinaryOp::Equal, scale, 0.0)?, e.number(1.0, DType::F32)?);
    // A tensor of zeros has no range: any divisor gives zeros.
    let divisor = e.select(nothing, one, scale)?;
    let below = e.unary(UnaryOp::Neg, low)?;
    let zero = e.binary(BinaryOp::Div, below, divisor)?;
    let zero = codes_of(l, zero, [None, None], DType::U8)?;
    let shift = l.cast(zero, DType::F32)?;
    Ok(vec![codes_of(l, x, [Some(divisor), Some(shift)], DType::U8)?, scale, zero])
}

/// A tensor or an axis of plain integers, as part of a region.
fn dequantize_lower(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    if let Some(weight) = coded_weight(l)? {
        return Ok(vec![weight]);
    }
    if let Some(weight) = dequantized_weight(l)? {
        return Ok(vec![weight]);
    }
    let (rank, scale_dims) = (l.rank(0)?, l.dims(1)?);
    let dtype = l.dtype(1)?;
    if l.node.int("output_dtype", 0)? != 0 || scale_dims.len() > 1 || dtype != DType::F32 {
        return Err(Refusal::Host);
    }
    let (x, mut scale, zero) = (l.value(0)?, l.value(1)?, l.optional(2)?);
    let mut wide = vec![1; rank];
    if scale_dims.iter().product::<usize>() != 1 {
        let axis = axis_of(l.node.int("axis", 1)?, rank)?;
        wide[axis] = scale_dims[0];
    }
    scale = l.reshape(scale, &wide)?;
    let mut y = l.cast(x, dtype)?;
    if let Some(zero) = zero {
        let zero = l.cast(zero, dtype)?;
        let zero = l.reshape(zero, &wide)?;
        y = l.expand().binary(BinaryOp::Sub, y, zero)?;
    }
    let y = l.expand().binary(BinaryOp::Mul, y, scale)?;
    let single = scale_dims.iter().product::<usize>() == 1;
    if single && integer::is_code(l.dtype(0)?) && l.is_known(1) && (!l.has(2) || l.is_known(2)) {
        l.region.dequantized.insert(y);
    }
    Ok(vec![y])
}

/// Known codes of eight bits with a scale each output, as numbers made in the graph: what multiplies with codes reads these codes.
fn coded_weight(l: &mut Lowering<'_>) -> Result<Option<ValueId>, Refusal> {
    let plain = l.node.int("output_dtype", 0)? == 0 && l.node.int("block_size", 0)? == 0;
    let known = (0..l.count()).all(|operand| !l.has(operand) || l.is_known(operand));
    if !plain || !known || !l.is_weight(0) || !integer::is_code(l.dtype(0)?) || l.dtype(1)? != DType::F32 {
        return Ok(None);
    }
    let (dims, axis) = (l.dims(0)?, l.node.int("axis", 1)?);
    if dims.len() < 2 || dims.iter().product::<usize>() * size_of::<f32>() <= INLINE_BYTES {
        return Ok(None);
    }
    let mut wide = vec![1; dims.len()];
    let count: usize = l.dims(1)?.iter().product();
    if count != 1 {
        let axis = axis_of(axis, dims.len())?;
        if l.rank(1)? != 1 || dims[axis] != count {
            return Ok(None);
        }
        wide[axis] = count;
    }
    let numbers = |l: &mut Lowering<'_>, operand: usize| -> Result<Option<Tensor>, Refusal> {
        let known = l.constant(operand).map(|v| v.floats()).transpose()?;
        Ok(known.map(|known| from_f64(&wide, DType::F32, &known)).transpose()?)
    };
    let Some(scale) = numbers(l, 1)? else { return Ok(None) };
    let zero = if l.has(2) { numbers(l, 2)? } else { None };
    let codes = l.value(0)?;
    let mut y = l.cast(codes, DType::F32)?;
    if let Some(zero) = zero {
        let zero = l.tensor(zero);
        y = l.expand().binary(BinaryOp::Sub, y, zero)?;
    }
    let scale = l.tensor(scale);
    let y = l.expand().binary(BinaryOp::Mul, y, scale)?;
    let (slots, result) = l.own_slots();
    l.region.coded.insert(y, CodedWeight { slots, result, dims, axis });
    Ok(Some(y))
}

/// The numbers of known codes, scales and zero points.
pub(crate) fn numbers(known: &[Value], dims: &[usize], axis: i64, block: i64) -> Result<Tensor, Refusal> {
    let [x, scale, rest @ ..] = known else { return invalid("operand 1 is missing") };
    let at = scale_positions(dims, scale.dims().unwrap_or_default(), axis, block)?;
    let (scale, zero) = (scale.floats()?, rest.first().map(Value::floats).transpose()?);
    let zero = zero.unwrap_or_else(|| vec![0.0; scale.len()]);
    let values = x.floats()?;
    let numbers = values.iter().zip(&at).map(|(v, &s)| ((v - zero[s]) * scale[s]) as f32);
    Ok(Tensor::from_slice(dims, &numbers.collect::<Vec<f32>>())?)
}

/// Known codes as a weight of F32, whatever their scales: what multiplies with it packs it once.
fn dequantized_weight(l: &mut Lowering<'_>) -> Result<Option<ValueId>, Refusal> {
    let given = (0..l.count()).filter(|&operand| l.has(operand)).collect::<Vec<_>>();
    let plain = l.node.int("output_dtype", 0)? == 0 && l.dtype(1)? == DType::F32;
    let known: Vec<Value> = given.iter().filter_map(|&operand| l.constant(operand)).collect();
    let Some(dims) = known.first().and_then(Value::dims).map(<[usize]>::to_vec) else { return Ok(None) };
    if !plain || known.len() != given.len() {
        return Ok(None);
    }
    let node = l.node;
    let weight = l.derived(0, "numbers", &dims, || {
        numbers(&known, &dims, node.int("axis", 1)?, node.int("block_size", 0)?)
    });
    weight.map(Some)
}

fn dynamic_quantize(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.floats(0)?;
    let low = x.iter().fold(0.0f64, |a, &b| a.min(b));
    let high = x.iter().fold(0.0f64, |a, &b| a.max(b));
    let scale = f64::from(((high - low) / 255.0) as f32);
    let zero = match scale {
        0.0 => 0.0,
        scale => (-low / scale).clamp(0.0, 255.0).round_ties_even(),
    };
    let divided = x.iter().map(|v| if scale == 0.0 { 0.0 } else { f64::from((v / scale) as f32) });
    let element = ElementType::Plain(DType::U8);
    Ok(vec![
        quantized(element, h.dims(0)?, divided, |_| zero, true)?,
        Tensor::scalar(scale as f32).into(),
        from_f64(&[], DType::U8, &[zero])?.into(),
    ])
}

/// Numbers less their zero points, as F64; a vector of zero points goes along the rows or the columns.
fn centred(h: &Host<'_>, operand: usize, zero: Option<&Value>, by_row: bool) -> Result<Value, Refusal> {
    let dims = h.dims(operand)?;
    let mut values = h.floats(operand)?;
    if let Some(zero) = zero {
        let at = row_or_column(dims, zero.dims().unwrap_or_default(), by_row)?;
        let zero = zero.floats()?;
        values.iter_mut().zip(at).for_each(|(v, i)| *v -= zero[i]);
    }
    Ok(from_f64(dims, DType::F64, &values)?.into())
}

/// For each element of a matrix, the position of its row's or column's number.
fn row_or_column(dims: &[usize], given: &[usize], by_row: bool) -> Result<Vec<usize>, Refusal> {
    let count: usize = dims.iter().product();
    let numbers: usize = given.iter().product();
    if numbers == 1 {
        return Ok(vec![0; count]);
    }
    let rank = dims.len();
    let axis = rank.saturating_sub(if by_row { 2 } else { 1 });
    let own = strides(dims);
    if dims.get(axis) == Some(&numbers) {
        return Ok((0..count).map(|i| i / own[axis] % dims[axis]).collect());
    }
    let to = strides(given);
    if given.len() != rank || given.iter().zip(dims).any(|(g, d)| *g != 1 && g != d) {
        return invalid(format!("{given:?} numbers fit neither rows nor columns of {dims:?}"));
    }
    let at = |i: usize| {
        let place = |a: usize| if given[a] == 1 { 0 } else { i / own[a] % dims[a] };
        (0..rank).map(|a| place(a) * to[a]).sum()
    };
    Ok((0..count).map(at).collect())
}

fn product_of(h: &Host<'_>, a: Value, b: Value) -> Result<Value, Refusal> {
    let lower = |l: &mut Lowering<'_>| {
        let (a, b) = (l.value(0)?, l.value(1)?);
        linear::product(l, a, b).map(|y| vec![y])
    };
    Ok(interpret_lowering(h.node, lower, vec![Some(a), Some(b)])?.swap_remove(0))
}

fn matmul_integer(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (a, b) = (centred(h, 0, h.optional(2), true)?, centred(h, 1, h.optional(3), false)?);
    let y = product_of(h, a, b)?;
    let values: Vec<i64> = y.floats()?.iter().map(|&v| v as i64).collect();
    let dims = y.dims().unwrap_or_default();
    Ok(vec![rlx_graph::eval::from_i64(dims, DType::I32, &values)?.into()])
}

fn q_linear_matmul(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (a, b) = (centred(h, 0, h.optional(2), true)?, centred(h, 3, h.optional(5), false)?);
    let (a, b) = (scaled(h, a, 1, true)?, scaled(h, b, 4, false)?);
    let y = product_of(h, a, b)?;
    let dims = y.dims().unwrap_or_default().to_vec();
    let (scale, zero) = (h.floats(6)?, h.floats(7)?);
    let at = row_or_column(&dims, h.dims(6)?, true)?;
    let values = y.floats()?;
    let divided = values.iter().zip(&at).map(|(v, &s)| v / scale[s]);
    Ok(vec![quantized(h.element(7)?, &dims, divided, |i| zero.get(at[i]).copied().unwrap_or(zero[0]), true)?])
}

fn scaled(h: &Host<'_>, x: Value, operand: usize, by_row: bool) -> Result<Value, Refusal> {
    let dims = x.dims().unwrap_or_default().to_vec();
    let at = row_or_column(&dims, h.dims(operand)?, by_row)?;
    let scale = h.floats(operand)?;
    let values: Vec<f64> = x.floats()?.iter().zip(at).map(|(v, i)| v * scale[i]).collect();
    Ok(from_f64(&dims, DType::F64, &values)?.into())
}
