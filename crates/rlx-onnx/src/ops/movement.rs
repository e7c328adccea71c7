//! Elements in other places: reshaping, slicing, joining, gathering. Text and narrow codes move as their indices do.

use super::{LowerFn, Row, interpret_lowering};
use crate::error::{Refusal, invalid, unsupported};
use crate::lower::{Host, Lowering};
use crate::model::{axes_of, axis_of};
use crate::value::{CodedTensor, TextTensor, Value};
use rlx_graph::ValueId;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::concat::Concat;
use rlx_graph::ops::gather::Gather;
use rlx_graph::ops::pad::Pad;
use rlx_graph::ops::slice::Slice;
use rlx_graph::ops::transpose::Transpose;
use rlx_tensor::{DType, Dim, Tensor};

type Lowered = Result<Vec<ValueId>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::both("Reshape", reshape, |h| by_index(h, reshape, 1)),
    Row::both("Flatten", flatten, |h| by_index(h, flatten, 1)),
    Row::both("Squeeze", squeeze, |h| by_index(h, squeeze, 1)),
    Row::both("Unsqueeze", unsqueeze, |h| by_index(h, unsqueeze, 1)),
    Row::both("Transpose", transpose, |h| by_index(h, transpose, 1)),
    Row::both("Concat", concat, |h| by_index(h, concat, usize::MAX)),
    Row::both("Split", split, |h| by_index(h, split, 1)),
    Row::both("Slice", slice, |h| by_index(h, slice, 1)),
    Row::both("Gather", gather, |h| by_index(h, gather, 1)),
    Row::both("GatherElements", gather_elements, |h| by_index(h, gather_elements, 1)),
    Row::both("GatherND", gather_nd, |h| by_index(h, gather_nd, 1)),
    Row::both("Expand", expand, |h| by_index(h, expand, 1)),
    Row::both("Tile", tile, |h| by_index(h, tile, 1)),
    Row::lower("Pad", pad),
    Row::lower("DepthToSpace", depth_to_space),
    Row::lower("SpaceToDepth", space_to_depth),
    Row::lower("CenterCropPad", center_crop_pad),
    Row::lower("ReverseSequence", reverse_sequence),
];

/// A row that only moves elements, evaluated on indices: what it gives is looked up in the first `moved` operands.
pub fn by_index(h: &Host<'_>, lower: LowerFn, moved: usize) -> Result<Vec<Value>, Refusal> {
    let moved = moved.min(h.inputs.len());
    let mut operands = h.inputs.clone();
    let mut start = 0i64;
    for operand in operands.iter_mut().take(moved) {
        let Some(value) = operand else { continue };
        let Some(dims) = value.dims().map(<[usize]>::to_vec) else {
            return invalid("operand 0 must be a tensor");
        };
        let count = dims.iter().product::<usize>() as i64;
        let indices: Vec<i64> = (start..start + count).collect();
        start += count;
        *operand = Some(Value::Tensor(Tensor::from_slice(&dims, &indices)?));
    }
    let results = interpret_lowering(h.node, lower, operands)?;
    results.iter().map(|indices| pick(&h.inputs[..moved], indices)).collect()
}

fn pick(from: &[Option<Value>], indices: &Value) -> Result<Value, Refusal> {
    let dims = indices.dims().unwrap_or_default().to_vec();
    let at: Vec<usize> = indices.ints()?.into_iter().map(|i| i as usize).collect();
    match from.first().and_then(Option::as_ref) {
        Some(Value::Text(_)) => {
            let mut all = Vec::new();
            for value in from.iter().flatten() {
                all.extend_from_slice(&value.text()?.items);
            }
            Ok(Value::Text(TextTensor { dims, items: at.iter().map(|&i| all[i].clone()).collect() }))
        }
        Some(Value::Coded(first)) => {
            let mut all = Vec::new();
            for value in from.iter().flatten() {
                let Value::Coded(codes) = value else { return invalid("operands differ in type") };
                all.extend_from_slice(&codes.codes);
            }
            let codes = at.iter().map(|&i| all[i]).collect();
            Ok(Value::Coded(CodedTensor { coding: first.coding, dims, codes }))
        }
        Some(Value::Tensor(first)) => {
            let element = first.dtype().element_bytes().unwrap_or(1);
            let mut all = Vec::new();
            for value in from.iter().flatten() {
                all.extend_from_slice(value.tensor()?.bytes());
            }
            let bytes: Vec<u8> =
                at.iter().flat_map(|&i| all[i * element..(i + 1) * element].iter().copied()).collect();
            Ok(Value::Tensor(Tensor::from_bytes(&dims, first.dtype(), &bytes)?))
        }
        _ => invalid("operand 0 must be a tensor"),
    }
}

fn reshape(l: &mut Lowering<'_>) -> Lowered {
    if l.symbolic(1).is_some() || l.dims(0).is_err() {
        return reshape_symbols(l);
    }
    let own = l.dims(0)?;
    let wanted = match l.node.ints_opt("shape")? {
        Some(shape) => shape,
        None => l.ints(1)?,
    };
    let keep_zero = l.node.flag("allowzero", false)?;
    let count: usize = own.iter().product();
    let mut dims = Vec::with_capacity(wanted.len());
    let mut open = None;
    for (axis, &size) in wanted.iter().enumerate() {
        dims.push(match size {
            0 if !keep_zero => match own.get(axis) {
                Some(&dim) => dim,
                None => return invalid(format!("dim {axis} is to be copied from rank {}", own.len())),
            },
            -1 if open.is_none() => {
                open = Some(axis);
                1
            }
            size => match usize::try_from(size) {
                Ok(size) => size,
                Err(_) => return invalid(format!("dims {wanted:?} hold {size} (twice)")),
            },
        });
    }
    if let Some(axis) = open {
        let rest: usize = dims.iter().product();
        if rest == 0 || !count.is_multiple_of(rest) {
            return invalid(format!("{count} elements do not fill dims {wanted:?}"));
        }
        dims[axis] = count / rest;
    }
    let x = l.value(0)?;
    Ok(vec![l.reshape(x, &dims)?])
}

/// A reshape over symbols: the dim that is left open is found by taking out what both sides share.
fn reshape_symbols(l: &mut Lowering<'_>) -> Lowered {
    let own = l.shape(0)?.dims().to_vec();
    let (mut dims, mut open) = (Vec::new(), None);
    if let Some(wanted) = l.symbolic(1) {
        dims.clone_from(&wanted.dims);
    } else {
        for (axis, size) in l.ints(1)?.into_iter().enumerate() {
            dims.push(match size {
                0 => own
                    .get(axis)
                    .cloned()
                    .ok_or_else(|| Refusal::Invalid(format!("dim {axis} has no source")))?,
                -1 => {
                    open = Some(axis);
                    Dim::Known(1)
                }
                size => {
                    Dim::Known(usize::try_from(size).map_err(|_| Refusal::Invalid(format!("dim {size}")))?)
                }
            });
        }
    }
    if let Some(axis) = open {
        let mut left = own;
        let (mut above, mut below) = (1, 1);
        for dim in dims.iter().filter(|d| **d != 1) {
            match (left.iter().position(|l| l == dim), dim.known()) {
                (Some(at), _) => drop(left.remove(at)),
                (None, Some(known)) => below *= known,
                _ => return unsupported(format!("dims {dims:?} with one open")),
            }
        }
        let mut rest = Dim::Known(1);
        for dim in left {
            match dim.known() {
                Some(known) => above *= known,
                None => rest = rest * dim,
            }
        }
        if below == 0 || above % below != 0 {
            return unsupported(format!("dims {dims:?} with one open"));
        }
        dims[axis] = rest * (above / below);
    }
    let x = l.value(0)?;
    Ok(vec![l.reshape_to(x, &dims)?])
}

fn flatten(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let axis = l.node.int("axis", 1)?;
    let axis = if axis == dims.len() as i64 { dims.len() } else { axis_of(axis, dims.len())? };
    let x = l.value(0)?;
    Ok(vec![l.reshape(x, &[dims[..axis].iter().product(), dims[axis..].iter().product()])?])
}

fn squeeze(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let axes = match l.attr_or_ints("axes", 1)? {
        Some(axes) => axes_of(&axes, dims.len())?,
        None => (0..dims.len()).filter(|&a| dims[a] == 1).collect(),
    };
    if let Some(axis) = axes.iter().find(|&&a| dims[a] != 1) {
        return invalid(format!("axis {axis} has extent {}, not 1", dims[*axis]));
    }
    let kept: Vec<usize> = (0..dims.len()).filter(|a| !axes.contains(a)).map(|a| dims[a]).collect();
    let x = l.value(0)?;
    Ok(vec![l.reshape(x, &kept)?])
}

fn unsqueeze(l: &mut Lowering<'_>) -> Lowered {
    let own = l.shape(0)?.dims().to_vec();
    let Some(axes) = l.attr_or_ints("axes", 1)? else { return invalid("there are no axes") };
    let axes = axes_of(&axes, own.len() + axes.len())?;
    let mut dims = own;
    for axis in axes {
        dims.insert(axis, Dim::Known(1));
    }
    let x = l.value(0)?;
    Ok(vec![l.expand().reshape(x, &dims)?])
}

fn transpose(l: &mut Lowering<'_>) -> Lowered {
    let rank = l.rank(0)?;
    let perm = match l.node.ints_opt("perm")? {
        Some(perm) => perm.iter().map(|&a| axis_of(a, rank)).collect::<Result<Vec<_>, _>>()?,
        None => (0..rank).rev().collect(),
    };
    let x = l.value(0)?;
    Ok(vec![l.add(Transpose { perm }, &[x])?])
}

fn concat(l: &mut Lowering<'_>) -> Lowered {
    let axis = axis_of(l.node.int("axis", 1)?, l.rank(0)?)?;
    let all = l.values()?;
    Ok(vec![if let [only] = all[..] { only } else { l.add(Concat { axis }, &all)? }])
}

fn split(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let axis = axis_of(l.node.int("axis", 0)?, dims.len())?;
    let sizes = match l.attr_or_ints("split", 1)? {
        Some(sizes) => sizes,
        None => {
            let parts = l.node.int("num_outputs", l.node.outputs.len() as i64)?.max(1) as usize;
            let each = dims[axis].div_ceil(parts);
            (0..parts).map(|i| dims[axis].saturating_sub(i * each).min(each) as i64).collect()
        }
    };
    if sizes.iter().any(|&s| s < 0) || sizes.iter().sum::<i64>() != dims[axis] as i64 {
        return invalid(format!("parts {sizes:?} do not make up {} elements", dims[axis]));
    }
    let x = l.value(0)?;
    let mut start = 0;
    let mut results = Vec::new();
    for size in sizes {
        results.push(l.expand().slice(x, axis, start as usize, size as usize)?);
        start += size;
    }
    Ok(results)
}

/// Elements `start, start + step, ..` of an axis, whatever the sign of the step.
pub fn strided(
    l: &mut Lowering<'_>,
    x: ValueId,
    axis: usize,
    start: usize,
    len: usize,
    step: i64,
) -> Result<ValueId, Refusal> {
    let dims = l.dims_of(x)?;
    if step == 1 && start == 0 && len == dims[axis] {
        return Ok(x);
    }
    if len == 0 {
        return Ok(l.expand().slice(x, axis, 0usize, 0usize)?);
    }
    let last = start as i64 + (len as i64 - 1) * step;
    let whole_steps = step > 0 && (start as i64 + len as i64 * step - (step - 1)) <= dims[axis] as i64;
    if whole_steps {
        let last_axis = axis + 1 == dims.len();
        let op = Slice {
            axis: (!last_axis).then_some(axis),
            start: Dim::Known(start),
            len: Dim::Known(len),
            step: step as usize,
        };
        return l.add(op, &[x]);
    }
    debug_assert!(last >= 0);
    let indices: Vec<i64> = (0..len as i64).map(|i| start as i64 + i * step).collect();
    let indices = l.int_vector(&indices)?;
    l.add(Gather { axis }, &[x, indices])
}

/// A slice whose only end is a symbol: `start .. end` of one axis.
fn slice_to_symbol(l: &mut Lowering<'_>) -> Lowered {
    let Some(end) = l.symbolic(2).map(|d| d.dims.clone()) else { return invalid("the end is known") };
    let (starts, rank) = (l.ints(1)?, l.rank(0)?);
    let axes = l.ints_opt(3)?.unwrap_or_else(|| vec![0]);
    let steps = l.ints_opt(4)?.unwrap_or_else(|| vec![1]);
    let ([end], [start], [axis], [1]) = (&end[..], &starts[..], &axes[..], &steps[..]) else {
        return unsupported("several symbolic ends");
    };
    let Ok(start) = usize::try_from(*start) else {
        return unsupported("a negative start with a symbolic end");
    };
    let axis = axis_of(*axis, rank)?;
    let x = l.value(0)?;
    let len = end - &Dim::Known(start);
    Ok(vec![l.expand().slice(x, axis, start, len)?])
}

fn slice(l: &mut Lowering<'_>) -> Lowered {
    if l.symbolic(2).is_some() {
        return slice_to_symbol(l);
    }
    let dims = l.dims(0)?;
    let (starts, ends) = (l.attr_or_ints("starts", 1)?, l.attr_or_ints("ends", 2)?);
    let (Some(starts), Some(ends)) = (starts, ends) else { return invalid("starts or ends are missing") };
    let axes = match l.attr_or_ints("axes", 3)? {
        Some(axes) => axes.iter().map(|&a| axis_of(a, dims.len())).collect::<Result<Vec<_>, _>>()?,
        None => (0..starts.len()).collect(),
    };
    let steps = l.ints_opt(4)?.unwrap_or_else(|| vec![1; starts.len()]);
    let lengths = [ends.len(), axes.len(), steps.len()];
    if lengths.iter().any(|&n| n != starts.len()) || axes.iter().any(|&a| a >= dims.len()) {
        return invalid(format!("{} starts with ends, axes, steps of {lengths:?}", starts.len()));
    }
    let mut x = l.value(0)?;
    for (i, &axis) in axes.iter().enumerate() {
        let (extent, step) = (dims[axis] as i64, steps[i]);
        if step == 0 {
            return invalid("a step is 0");
        }
        let from_front = |v: i64| if v < 0 { v.saturating_add(extent) } else { v };
        let (low, high) = if step > 0 { (0, extent) } else { (-1, extent - 1) };
        let start = from_front(starts[i]).clamp(low.max(0), high.max(0));
        let end = from_front(ends[i]).clamp(low, high);
        let span = if step > 0 { end - start } else { start - end };
        let len = if extent == 0 { 0 } else { span.max(0).saturating_add(step.abs() - 1) / step.abs() };
        x = strided(l, x, axis, start as usize, len as usize, step)?;
    }
    Ok(vec![x])
}

/// Indices with negative ones counted from the end.
fn wrapped(l: &mut Lowering<'_>, operand: usize, extent: usize) -> Result<ValueId, Refusal> {
    if let Some(known) = l.constant(operand) {
        let dims = l.dims(operand)?;
        let values: Vec<i64> =
            known.ints()?.into_iter().map(|v| if v < 0 { v + extent as i64 } else { v }).collect();
        return Ok(l.tensor(Tensor::from_slice(&dims, &values)?));
    }
    let indices = l.value(operand)?;
    let mut e = l.expand();
    let negative = e.scalar(BinaryOp::Less, indices, 0.0)?;
    let moved = e.scalar(BinaryOp::Add, indices, extent as f64)?;
    Ok(e.select(negative, moved, indices)?)
}

fn gather(l: &mut Lowering<'_>) -> Lowered {
    let shape = l.shape(0)?;
    let axis = axis_of(l.node.int("axis", 0)?, shape.rank())?;
    let x = l.value(0)?;
    if let Some(part) = neighbours(l, axis)? {
        return Ok(vec![part]);
    }
    let known = l.constant(1).is_some_and(|v| v.ints().is_ok_and(|all| all.iter().all(|&i| i >= 0)));
    let indices = match shape.dims()[axis].known() {
        Some(extent) => wrapped(l, 1, extent)?,
        None if known => l.value(1)?,
        None => return unsupported("indices that may count from a symbolic end"),
    };
    Ok(vec![l.add(Gather { axis }, &[x, indices])?])
}

/// What a gather with known indices picks, if they follow each other along an axis of known extent: a part of it.
fn neighbours(l: &mut Lowering<'_>, axis: usize) -> Result<Option<ValueId>, Refusal> {
    let shape = l.shape(0)?;
    let (Some(extent), Some(known)) = (shape.dims()[axis].known(), l.constant(1)) else { return Ok(None) };
    let wrap = |v: i64| if v < 0 { v + extent as i64 } else { v };
    let (rank, at) = (l.rank(1)?, known.ints()?.into_iter().map(wrap).collect::<Vec<_>>());
    let Some(first) = at.first().and_then(|&v| usize::try_from(v).ok()) else { return Ok(None) };
    let follow = at.windows(2).all(|pair| pair[1] == pair[0] + 1);
    if rank > 1 || !follow || first + at.len() > extent {
        return Ok(None);
    }
    let x = l.value(0)?;
    let part = l.expand().slice(x, axis, first, at.len())?;
    if rank == 1 {
        return Ok(Some(part));
    }
    let mut dims = shape.dims().to_vec();
    dims.remove(axis);
    l.reshape_to(part, &dims).map(Some)
}

/// The linear index of every element asked for, in x flattened: gathers with indices of several axes become one.
fn flat_gather(l: &mut Lowering<'_>, linear: ValueId) -> Lowered {
    let count = l.dims(0)?.iter().product();
    let x = l.value(0)?;
    let flat = l.reshape(x, &[count])?;
    Ok(vec![l.add(Gather { axis: 0 }, &[flat, linear])?])
}

fn gather_elements(l: &mut Lowering<'_>) -> Lowered {
    let (dims, wanted) = (l.dims(0)?, l.dims(1)?);
    let axis = axis_of(l.node.int("axis", 0)?, dims.len())?;
    if wanted.len() != dims.len() {
        return invalid("indices and data differ in rank");
    }
    let own = rlx_graph::eval::strides(&dims);
    let to = rlx_graph::eval::strides(&wanted);
    let count: usize = wanted.iter().product();
    let base = |linear: usize| -> i64 {
        let along = (0..dims.len()).filter(|&a| a != axis);
        along.map(|a| (linear / to[a] % wanted[a] * own[a]) as i64).sum()
    };
    let base: Vec<i64> = (0..count).map(base).collect();
    let base = l.tensor(Tensor::from_slice(&wanted, &base)?);
    let indices = wrapped(l, 1, dims[axis])?;
    let indices = l.cast(indices, DType::I64)?;
    let mut e = l.expand();
    let scaled = e.scalar(BinaryOp::Mul, indices, own[axis] as f64)?;
    let linear = e.binary(BinaryOp::Add, scaled, base)?;
    flat_gather(l, linear)
}

fn gather_nd(l: &mut Lowering<'_>) -> Lowered {
    let (dims, wanted) = (l.dims(0)?, l.dims(1)?);
    let batch = usize::try_from(l.node.int("batch_dims", 0)?).unwrap_or(usize::MAX);
    let Some(&depth) = wanted.last() else { return invalid("indices must have rank 1 at least") };
    if batch >= wanted.len() || batch + depth > dims.len() || dims[..batch] != wanted[..batch] {
        return invalid(format!("indices {wanted:?} do not fit data {dims:?}"));
    }
    let own = rlx_graph::eval::strides(&dims);
    let lead = &wanted[..wanted.len() - 1];
    let (count, batch_size) = (lead.iter().product::<usize>(), dims[batch..].iter().product::<usize>());
    let per_batch: usize = lead[batch..].iter().product();
    let indices = l.value(1)?;
    let indices = l.cast(indices, DType::I64)?;
    let base: Vec<i64> = (0..count).map(|i| (i / per_batch.max(1) * batch_size) as i64).collect();
    let mut linear = l.tensor(Tensor::from_slice(&[count, 1], &base)?);
    let table = l.reshape(indices, &[count, depth])?;
    for j in 0..depth {
        let column = l.expand().slice(table, 1, j, 1usize)?;
        let extent = dims[batch + j] as f64;
        let mut e = l.expand();
        let negative = e.scalar(BinaryOp::Less, column, 0.0)?;
        let moved = e.scalar(BinaryOp::Add, column, extent)?;
        let column = e.select(negative, moved, column)?;
        let scaled = e.scalar(BinaryOp::Mul, column, own[batch + j] as f64)?;
        linear = e.binary(BinaryOp::Add, linear, scaled)?;
    }
    let run: Vec<i64> = (0..dims[batch + depth..].iter().product::<usize>() as i64).collect();
    let run = l.int_vector(&run)?;
    let linear = l.expand().binary(BinaryOp::Add, linear, run)?;
    let linear = l.reshape(linear, &[lead, &dims[batch + depth..]].concat())?;
    flat_gather(l, linear)
}

fn expand(l: &mut Lowering<'_>) -> Lowered {
    if let Some(wanted) = l.symbolic(1).map(|d| d.dims.clone()) {
        let own = l.shape(0)?.dims().to_vec();
        let dims = rlx_graph::InferCx::default().broadcast(&own, &wanted);
        let dims = dims.map_err(|e| Refusal::Invalid(e.to_string()))?;
        let x = l.value(0)?;
        return Ok(vec![l.expand().broadcast(x, &dims)?]);
    }
    let own = l.dims(0)?;
    let wanted = l.ints(1)?;
    let wanted: Option<Vec<usize>> = wanted.iter().map(|&d| usize::try_from(d).ok()).collect();
    let Some(wanted) = wanted else { return invalid("a dim is negative") };
    let dims = rlx_graph::eval::broadcast_dims(&own, &wanted);
    let Some(dims) = dims else { return invalid(format!("{own:?} does not broadcast to {wanted:?}")) };
    let x = l.value(0)?;
    Ok(vec![l.broadcast(x, &dims)?])
}

fn tile(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let repeats = l.ints(1)?;
    if repeats.len() != dims.len() || repeats.iter().any(|&r| r < 0) {
        return invalid(format!("repeats {repeats:?} do not fit dims {dims:?}"));
    }
    let x = l.value(0)?;
    let (mut split, mut wide, mut result) = (Vec::new(), Vec::new(), Vec::new());
    for (&dim, &repeat) in dims.iter().zip(&repeats) {
        split.extend([1, dim]);
        wide.extend([repeat as usize, dim]);
        result.push(dim * repeat as usize);
    }
    let x = l.reshape(x, &split)?;
    let x = l.broadcast(x, &wide)?;
    Ok(vec![l.reshape(x, &result)?])
}

fn pad(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let pads = match l.node.ints_opt("pads")? {
        Some(pads) => pads,
        None => match l.node.ints_opt("paddings")? {
            Some(pads) => pads,
            None => l.ints(1)?,
        },
    };
    let axes = match l.ints_opt(3)? {
        Some(axes) => axes.iter().map(|&a| axis_of(a, dims.len())).collect::<Result<Vec<_>, _>>()?,
        None => (0..dims.len()).collect(),
    };
    if pads.len() != 2 * axes.len() {
        return invalid(format!("{} pads for {} axes", pads.len(), axes.len()));
    }
    let mut sides = vec![(0i64, 0i64); dims.len()];
    for (i, &axis) in axes.iter().enumerate() {
        sides[axis] = (pads[i], pads[axes.len() + i]);
    }
    let mut x = l.value(0)?;
    let mode = l.node.text("mode", "constant")?.to_owned();
    for (axis, &(before, after)) in sides.iter().enumerate() {
        let extent = dims[axis] as i64;
        let size = extent + before + after;
        if size < 0 {
            return invalid(format!("pads {pads:?} leave nothing of axis {axis}"));
        }
        if mode == "constant" || extent == 0 {
            if before < 0 || after < 0 {
                let start = (-before).max(0);
                let len = extent - start - (-after).max(0);
                x = strided(l, x, axis, start as usize, len.max(0) as usize, 1)?;
            }
            continue;
        }
        if (before, after) == (0, 0) {
            continue;
        }
        let indices = (0..size).map(|i| source(&mode, i - before, extent));
        let indices = indices.collect::<Result<Vec<i64>, _>>()?;
        let indices = l.int_vector(&indices)?;
        x = l.add(Gather { axis }, &[x, indices])?;
    }
    let grows = sides.iter().any(|&(a, b)| a > 0 || b > 0);
    if mode != "constant" || !grows {
        return Ok(vec![x]);
    }
    let side = |v: i64| Dim::Known(v.max(0) as usize);
    let before = sides.iter().map(|s| side(s.0)).collect();
    let after = sides.iter().map(|s| side(s.1)).collect();
    let value = match l.node.float_opt("value")? {
        Some(value) => value,
        None if l.has(2) => l.float(2)?,
        None => 0.0,
    };
    let dtype = l.dtype(0)?;
    if dtype == DType::Bool {
        let wide = l.cast(x, DType::U8)?;
        let padded = l.add(Pad { before, after, value }, &[wide])?;
        return Ok(vec![l.cast(padded, dtype)?]);
    }
    Ok(vec![l.add(Pad { before, after, value }, &[x])?])
}

/// The element that stands at position `i` (counted from the first real one) of a padded axis.
fn source(mode: &str, i: i64, extent: i64) -> Result<i64, Refusal> {
    Ok(match mode {
        "edge" => i.clamp(0, extent - 1),
        "wrap" => i.rem_euclid(extent),
        "reflect" if extent == 1 => 0,
        "reflect" => {
            let at = i.rem_euclid(2 * (extent - 1));
            if at < extent { at } else { 2 * (extent - 1) - at }
        }
        other => return invalid(format!("mode {other:?} is unknown")),
    })
}

fn blocks(l: &Lowering<'_>) -> Result<([usize; 4], usize), Refusal> {
    let dims = l.dims(0)?;
    let [n, c, h, w] = dims[..] else { return invalid("operand 0 must have rank 4") };
    let block = usize::try_from(l.node.int("blocksize", 0)?).ok().filter(|&b| b > 0);
    match block {
        Some(block) => Ok(([n, c, h, w], block)),
        None => invalid("blocksize must be at least 1"),
    }
}

fn depth_to_space(l: &mut Lowering<'_>) -> Lowered {
    let ([n, c, h, w], b) = blocks(l)?;
    if c % (b * b) != 0 {
        return invalid(format!("{c} channels are no multiple of {b} squared"));
    }
    let depth = c / (b * b);
    let (split, perm) = match l.node.text("mode", "DCR")? {
        "DCR" => ([n, b, b, depth, h, w], vec![0, 3, 4, 1, 5, 2]),
        "CRD" => ([n, depth, b, b, h, w], vec![0, 1, 4, 2, 5, 3]),
        other => return invalid(format!("mode {other:?} is neither DCR nor CRD")),
    };
    let x = l.value(0)?;
    let x = l.reshape(x, &split)?;
    let x = l.add(Transpose { perm }, &[x])?;
    Ok(vec![l.reshape(x, &[n, depth, h * b, w * b])?])
}

fn space_to_depth(l: &mut Lowering<'_>) -> Lowered {
    let ([n, c, h, w], b) = blocks(l)?;
    if h % b != 0 || w % b != 0 {
        return invalid(format!("{h} x {w} is no multiple of {b}"));
    }
    let x = l.value(0)?;
    let x = l.reshape(x, &[n, c, h / b, b, w / b, b])?;
    let x = l.add(Transpose { perm: vec![0, 3, 5, 1, 2, 4] }, &[x])?;
    Ok(vec![l.reshape(x, &[n, c * b * b, h / b, w / b])?])
}

fn center_crop_pad(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let wanted = l.ints(1)?;
    let axes = match l.node.ints_opt("axes")? {
        Some(axes) => axes.iter().map(|&a| axis_of(a, dims.len())).collect::<Result<Vec<_>, _>>()?,
        None => (0..dims.len()).collect(),
    };
    if axes.len() != wanted.len() || wanted.iter().any(|&w| w < 0) {
        return invalid(format!("sizes {wanted:?} for axes {axes:?}"));
    }
    let mut x = l.value(0)?;
    let (mut before, mut after) = (vec![Dim::Known(0); dims.len()], vec![Dim::Known(0); dims.len()]);
    for (&axis, &size) in axes.iter().zip(&wanted) {
        let size = size as usize;
        if size < dims[axis] {
            x = strided(l, x, axis, (dims[axis] - size) / 2, size, 1)?;
        } else {
            let room = size - dims[axis];
            (before[axis], after[axis]) = (Dim::Known(room / 2), Dim::Known(room - room / 2));
        }
    }
    Ok(vec![l.add(Pad { before, after, value: 0.0 }, &[x])?])
}

fn reverse_sequence(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let (batch, time) = (l.node.int("batch_axis", 1)?, l.node.int("time_axis", 0)?);
    let (batch, time) = (axis_of(batch, dims.len())?, axis_of(time, dims.len())?);
    let own = rlx_graph::eval::strides(&dims);
    if batch == time || l.dims(1)? != [dims[batch]] {
        return invalid(format!("lengths of dims {:?} for {} sequences", l.dims(1)?, dims[batch]));
    }
    let count: usize = dims.iter().product();
    let step = |i: usize| (i / own[time] % dims[time]) as i64;
    let steps: Vec<i64> = (0..count).map(step).collect();
    let rest: Vec<i64> = (0..count).map(|i| i as i64 - step(i) * own[time] as i64).collect();
    let (steps, rest) = (Tensor::from_slice(&dims, &steps)?, Tensor::from_slice(&dims, &rest)?);
    let (steps, rest) = (l.tensor(steps), l.tensor(rest));
    let mut wide = vec![1; dims.len()];
    wide[batch] = dims[batch];
    let lengths = l.value(1)?;
    let lengths = l.cast(lengths, DType::I64)?;
    let lengths = l.reshape(lengths, &wide)?;
    let mut e = l.expand();
    let inside = e.binary(BinaryOp::Less, steps, lengths)?;
    let last = e.scalar(BinaryOp::Sub, lengths, 1.0)?;
    let turned = e.binary(BinaryOp::Sub, last, steps)?;
    let step = e.select(inside, turned, steps)?;
    let moved = e.scalar(BinaryOp::Mul, step, own[time] as f64)?;
    let linear = e.binary(BinaryOp::Add, rest, moved)?;
    flat_gather(l, linear)
}

/// Elements `start .. start + size` of an axis, which goes if asked: operand 1 is `[axis, start, size, drop]`.
fn window(l: &mut Lowering<'_>) -> Lowered {
    let [axis, start, size, drop] = l.ints(1)?[..] else { return invalid("a window has four numbers") };
    let x = l.value(0)?;
    let part = strided(l, x, axis as usize, start as usize, size as usize, 1)?;
    if drop == 0 {
        return Ok(vec![part]);
    }
    let mut dims = l.dims_of(part)?;
    dims.remove(axis as usize);
    Ok(vec![l.reshape(part, &dims)?])
}

/// A window of a value of any kind.
pub fn sliced(h: &Host<'_>, operands: Vec<Option<Value>>) -> Result<Vec<Value>, Refusal> {
    let inner = Host { node: h.node, inputs: operands, captured: Vec::new(), runtime: h.runtime };
    by_index(&inner, window, 1)
}
