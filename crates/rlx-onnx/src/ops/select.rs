//! Picking by value: results whose extents data decides, and what else looks at single elements.

use super::{Row, movement};
use crate::decode::int_vector;
use crate::error::{Refusal, invalid};
use crate::lower::{Host, Lowering};
use crate::model::axis_of;
use crate::value::{CodedTensor, ElementType, Value, from_floats};
use rlx_graph::ValueId;
use rlx_graph::eval::strides;
use rlx_graph::ops::gather::Gather;
use rlx_tensor::{DType, Tensor};
use std::cmp::Ordering;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("NonZero", non_zero),
    Row::host("Compress", compress),
    Row::host("Unique", unique),
    Row::host("OneHot", one_hot),
    Row::host("Det", det),
    Row::host("AffineGrid", affine_grid),
    Row::host("BitCast", bit_cast),
    Row::host("MelWeightMatrix", mel_weights),
];

fn non_zero(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (dims, values) = (h.dims(0)?, h.floats(0)?);
    let (rank, own) = (dims.len(), strides(dims));
    let hits: Vec<usize> = (0..values.len()).filter(|&i| values[i] != 0.0).collect();
    let along = |axis: usize| hits.iter().map(move |i| (axis, *i));
    let flat: Vec<i64> =
        (0..rank).flat_map(along).map(|(axis, i)| (i / own[axis] % dims[axis]) as i64).collect();
    Ok(vec![Tensor::from_slice(&[rank, hits.len()], &flat)?.into()])
}

fn take(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    let axis = match l.node.int_opt("axis")? {
        Some(axis) => Some(axis_of(axis, l.rank(0)?)?),
        None => None,
    };
    let mut x = l.value(0)?;
    if axis.is_none() {
        let count = l.dims(0)?.iter().product();
        x = l.reshape(x, &[count])?;
    }
    let indices = l.value(1)?;
    Ok(vec![l.add(Gather { axis: axis.unwrap_or(0) }, &[x, indices])?])
}

/// Slices of operand 0 along the node's axis (elements, if it has none).
fn taken(h: &Host<'_>, indices: &[i64]) -> Result<Vec<Value>, Refusal> {
    let inputs = vec![Some(h.value(0)?.clone()), Some(int_vector(indices))];
    let inner = Host { node: h.node, inputs, captured: Vec::new(), runtime: h.runtime };
    movement::by_index(&inner, take, 1)
}

fn compress(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let keep = h.ints(1)?;
    let indices: Vec<i64> = (0..keep.len()).filter(|&i| keep[i] != 0).map(|i| i as i64).collect();
    taken(h, &indices)
}

/// The order of two elements of a value.
fn compare(value: &Value, floats: &[f64], a: usize, b: usize) -> Ordering {
    match value {
        Value::Text(text) => text.items[a].cmp(&text.items[b]),
        _ => floats[a].total_cmp(&floats[b]),
    }
}

fn unique(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.value(0)?;
    let dims = h.dims(0)?;
    let floats = if matches!(x, Value::Text(_)) { Vec::new() } else { x.floats()? };
    let slices: Vec<Vec<usize>> = match h.node.int_opt("axis")? {
        None => (0..dims.iter().product()).map(|i| vec![i]).collect(),
        Some(axis) => {
            let axis = axis_of(axis, dims.len())?;
            let own = strides(dims);
            let all = 0..dims.iter().product::<usize>();
            let slice = |k: usize| all.clone().filter(|i| i / own[axis] % dims[axis] == k).collect();
            (0..dims[axis]).map(slice).collect()
        }
    };
    let order = |a: usize, b: usize| {
        let pairs = slices[a].iter().zip(&slices[b]);
        pairs.map(|(&i, &j)| compare(x, &floats, i, j)).find(|o| o.is_ne()).unwrap_or(Ordering::Equal)
    };
    let mut sorted: Vec<usize> = (0..slices.len()).collect();
    sorted.sort_by(|&a, &b| order(a, b));
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for at in sorted {
        match groups.last_mut() {
            Some(group) if order(group[0], at).is_eq() => group.push(at),
            _ => groups.push(vec![at]),
        }
    }
    if !h.node.flag("sorted", true)? {
        groups.sort_by_key(|group| group[0]);
    }
    let first: Vec<i64> = groups.iter().map(|g| g[0] as i64).collect();
    let counts: Vec<i64> = groups.iter().map(|g| g.len() as i64).collect();
    let mut inverse = vec![0i64; slices.len()];
    for (number, group) in groups.iter().enumerate() {
        group.iter().for_each(|&at| inverse[at] = number as i64);
    }
    let mut results = taken(h, &first)?;
    results.extend([int_vector(&first), int_vector(&inverse), int_vector(&counts)]);
    Ok(results)
}

fn one_hot(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let indices = h.floats(0)?;
    let depth = h.floats(1)?.first().copied().unwrap_or(0.0) as i64;
    let values = h.tensor(2)?;
    let own = h.dims(0)?;
    let axis = axis_of(h.node.int("axis", -1)?, own.len() + 1)?;
    let Some(extent) = usize::try_from(depth).ok().filter(|&d| d <= 1 << 28) else {
        return invalid(format!("depth {depth} is negative or too large"));
    };
    if values.len() != 2 {
        return invalid("values must be the off and the on value");
    }
    let mut dims = own.to_vec();
    dims.insert(axis, extent);
    let inner: usize = own[axis..].iter().product();
    let element = values.dtype().element_bytes().unwrap_or(1);
    let (off, on) = values.bytes().split_at(element);
    let mut bytes = off.repeat(dims.iter().product());
    for (i, &index) in indices.iter().enumerate() {
        let at = index as i64;
        let at = if at < 0 { at + depth } else { at };
        if (0..depth).contains(&at) {
            let linear = (i / inner * extent + at as usize) * inner + i % inner;
            bytes[linear * element..(linear + 1) * element].copy_from_slice(on);
        }
    }
    Ok(vec![Tensor::from_bytes(&dims, values.dtype(), &bytes)?.into()])
}

fn det(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let dims = h.dims(0)?;
    let [lead @ .., rows, columns] = dims else { return invalid("operand 0 must have rank 2 at least") };
    if rows != columns {
        return invalid(format!("{rows} x {columns} is no square"));
    }
    let all = h.floats(0)?;
    let result: Vec<f64> = all.chunks((rows * rows).max(1)).map(|m| determinant(m.to_vec(), *rows)).collect();
    Ok(vec![from_floats(h.element(0)?, lead, &result)?])
}

/// By elimination with the largest pivot.
fn determinant(mut m: Vec<f64>, n: usize) -> f64 {
    let mut product = 1.0;
    for column in 0..n {
        let pivot = (column..n).max_by(|&a, &b| m[a * n + column].abs().total_cmp(&m[b * n + column].abs()));
        let Some(pivot) = pivot.filter(|&p| m[p * n + column] != 0.0) else { return 0.0 };
        if pivot != column {
            (0..n).for_each(|j| m.swap(pivot * n + j, column * n + j));
            product = -product;
        }
        product *= m[column * n + column];
        for row in column + 1..n {
            let factor = m[row * n + column] / m[column * n + column];
            (column..n).for_each(|j| m[row * n + j] -= factor * m[column * n + j]);
        }
    }
    product
}

fn affine_grid(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let theta = h.floats(0)?;
    let size = h.ints(1)?;
    let corners = h.node.flag("align_corners", false)?;
    let [batch, _, space @ ..] = &size[..] else { return invalid("the size must have 4 or 5 entries") };
    let space: Vec<usize> = space.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect();
    let (rank, batch) = (space.len(), usize::try_from(*batch).unwrap_or(0));
    if !(2..=3).contains(&rank) || theta.len() != batch * rank * (rank + 1) {
        return invalid(format!("{} numbers are no {batch} maps of {rank} dims", theta.len()));
    }
    let own = strides(&space);
    let place = |axis: usize, i: usize| match (corners, space[axis]) {
        (true, 1) => -1.0,
        (true, n) => -1.0 + 2.0 * i as f64 / (n as f64 - 1.0),
        (false, n) => (2.0 * i as f64 + 1.0) / n as f64 - 1.0,
    };
    let mut out = Vec::new();
    for map in theta.chunks(rank * (rank + 1)) {
        for linear in 0..space.iter().product::<usize>() {
            let at = |axis: usize| place(axis, linear / own[axis] % space[axis]);
            let point: Vec<f64> = (0..rank).rev().map(at).chain([1.0]).collect();
            out.extend(
                map.chunks(rank + 1).map(|row| row.iter().zip(&point).map(|(a, b)| a * b).sum::<f64>()),
            );
        }
    }
    let mut dims = vec![batch];
    dims.extend(&space);
    dims.push(rank);
    Ok(vec![from_floats(h.element(0)?, &dims, &out)?])
}

fn bit_cast(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let Some(to) = h.node.element_opt("to")? else { return invalid("attribute \"to\" is missing") };
    match (h.value(0)?, to) {
        (Value::Tensor(t), ElementType::Plain(dtype)) => Ok(vec![t.bitcast(dtype)?.into()]),
        (Value::Coded(t), ElementType::Coded(coding)) if coding.bits() == t.coding.bits() => {
            Ok(vec![Value::Coded(CodedTensor { coding, ..t.clone() })])
        }
        (Value::Tensor(t), ElementType::Coded(coding))
            if t.bytes().len() == t.len() && coding.bits() == 8 =>
        {
            Ok(vec![Value::Coded(CodedTensor { coding, dims: t.dims().to_vec(), codes: t.bytes().to_vec() })])
        }
        (Value::Coded(t), ElementType::Plain(dtype)) if t.coding.bits() == 8 => {
            Ok(vec![Tensor::from_bytes(&t.dims, dtype, &t.codes)?.into()])
        }
        (x, to) => invalid(format!("{} has no bits of {to}", x.describe())),
    }
}

fn mel_weights(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let number = |i: usize| -> Result<f64, Refusal> {
        h.floats(i)?.first().copied().ok_or_else(|| Refusal::Invalid(format!("operand {i} is empty")))
    };
    let (bins, length, rate) = (number(0)?, number(1)?, number(2)?);
    let mel = |hertz: f64| 2595.0 * (1.0 + hertz / 700.0).log10();
    let (low, high) = (mel(number(3)?), mel(number(4)?));
    let (columns, rows) = (bins as usize, length as usize / 2 + 1);
    let step = (high - low) / (bins + 2.0);
    let edge = |i: usize| {
        let hertz = 700.0 * (10f64.powf((low + step * i as f64) / 2595.0) - 1.0);
        ((length + 1.0) * hertz / rate).floor() as usize
    };
    let mut out = vec![0.0; rows * columns];
    for i in 0..columns {
        let (left, centre, right) = (edge(i), edge(i + 1), edge(i + 2));
        if right > rows || centre >= rows {
            return invalid("the highest frequency is beyond the spectrum");
        }
        if centre == left {
            out[centre * columns + i] = 1.0;
        }
        for j in left..=centre {
            if centre > left {
                out[j * columns + i] = (j - left) as f64 / (centre - left) as f64;
            }
        }
        for j in centre..right {
            out[j * columns + i] = (right - j) as f64 / (right - centre) as f64;
        }
    }
    let element = h.node.element_opt("output_datatype")?.unwrap_or(ElementType::Plain(DType::F32));
    Ok(vec![from_floats(element, &[rows, columns], &out)?])
}
