//! Elements and slices written, or combined with what is there, at places that an operand names.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::{Host, Lowering};
use crate::model::{NodeDef, axis_of};
use crate::value::Value;
use rlx_graph::ValueId;
use rlx_graph::eval::{from_f64, from_i64, strides, to_f64, to_i64};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::concat::Concat;
use rlx_graph::ops::gather::Gather;
use rlx_graph::ops::iota::Iota;
use rlx_graph::ops::reduce::ReduceOp;
use rlx_tensor::{DType, Dim, Tensor};

type Evaluated = Result<Vec<Value>, Refusal>;

/// Larger data is scattered on the host: a place for each element is part of the graph.
const MOST: usize = 1 << 20;
/// So many updates of one element are combined in a region.
const ROUNDS: usize = 8;
/// So many pairs of a place and an update are compared in a region.
const PAIRS: usize = 1 << 20;
/// Whole numbers below this are F32 exactly.
const EXACT: usize = 1 << 24;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::both("ScatterElements", |l| picked(l, elements), |h| evaluated(h, elements)),
    Row::both("Scatter", |l| picked(l, elements), |h| evaluated(h, elements)),
    Row::both("ScatterND", |l| picked(l, slices), |h| evaluated(h, slices)),
];

/// Writes updates: `(element of data, element of updates)` pairs in order.
fn write(h: &Host<'_>, pairs: &[(usize, usize)]) -> Evaluated {
    let (data, updates) = (h.tensor(0)?, h.tensor(2)?);
    let reduction = h.node.text("reduction", "none")?;
    if data.dtype() != updates.dtype() {
        return invalid(format!("updates are {}, the data is {}", updates.dtype(), data.dtype()));
    }
    if reduction == "none" {
        let Some(element) = data.dtype().element_bytes() else {
            return invalid("blocks cannot be scattered");
        };
        let mut bytes = data.bytes().to_vec();
        for &(to, from) in pairs {
            bytes[to * element..][..element].copy_from_slice(&updates.bytes()[from * element..][..element]);
        }
        return Ok(vec![Tensor::from_bytes(data.dims(), data.dtype(), &bytes)?.into()]);
    }
    let unknown = || Refusal::Invalid(format!("reduction {reduction:?}"));
    if data.dtype().is_int() {
        let combine: fn(i64, i64) -> i64 = match reduction {
            "add" => i64::wrapping_add,
            "mul" => i64::wrapping_mul,
            "min" => i64::min,
            "max" => i64::max,
            _ => return Err(unknown()),
        };
        let (mut values, news) = (to_i64(data)?, to_i64(updates)?);
        pairs.iter().for_each(|&(to, from)| values[to] = combine(values[to], news[from]));
        return Ok(vec![from_i64(data.dims(), data.dtype(), &values)?.into()]);
    }
    let combine: fn(f64, f64) -> f64 = match reduction {
        "add" => |a, b| a + b,
        "mul" => |a, b| a * b,
        "min" => f64::min,
        "max" => f64::max,
        _ => return Err(unknown()),
    };
    let (mut values, news) = (to_f64(data)?, to_f64(updates)?);
    pairs.iter().for_each(|&(to, from)| values[to] = combine(values[to], news[from]));
    Ok(vec![from_f64(data.dims(), data.dtype(), &values)?.into()])
}

fn place(index: i64, extent: usize) -> Result<usize, Refusal> {
    let from_front = if index < 0 { index + extent as i64 } else { index };
    match usize::try_from(from_front) {
        Ok(at) if at < extent => Ok(at),
        _ => invalid(format!("index {index} is outside {extent} elements")),
    }
}

/// Where updates go: `(element of data, element of updates)` pairs in order.
type Places = fn(&Operands<'_>) -> Result<Vec<(usize, usize)>, Refusal>;

/// What places depend on.
struct Operands<'a> {
    node: &'a NodeDef,
    dims: [&'a [usize]; 3],
    indices: Vec<i64>,
}

fn elements(o: &Operands<'_>) -> Result<Vec<(usize, usize)>, Refusal> {
    let [dims, index_dims, updates] = o.dims;
    let axis = axis_of(o.node.int("axis", 0)?, dims.len())?;
    let fits = index_dims.len() == dims.len()
        && updates == index_dims
        && (0..dims.len()).all(|a| a == axis || index_dims[a] <= dims[a]);
    if !fits {
        return invalid(format!("indices {index_dims:?} do not fit {dims:?}"));
    }
    let (own, source) = (strides(dims), strides(index_dims));
    let mut pairs = Vec::with_capacity(o.indices.len());
    for (from, &index) in o.indices.iter().enumerate() {
        let mut to = place(index, dims[axis])? * own[axis];
        for a in (0..dims.len()).filter(|&a| a != axis) {
            to += from / source[a] % index_dims[a] * own[a];
        }
        pairs.push((to, from));
    }
    Ok(pairs)
}

fn slices(o: &Operands<'_>) -> Result<Vec<(usize, usize)>, Refusal> {
    let [dims, index_dims, updates] = o.dims;
    let Some((&depth, lead)) = index_dims.split_last() else {
        return invalid("indices must have a last axis");
    };
    if depth > dims.len() || updates != [lead, &dims[depth..]].concat() {
        return invalid(format!("indices {index_dims:?} and updates {updates:?} do not fit {dims:?}"));
    }
    let own = strides(dims);
    let slice: usize = dims[depth..].iter().product();
    let count: usize = lead.iter().product();
    let mut pairs = Vec::with_capacity(count * slice);
    for row in 0..count {
        let mut start = 0;
        for axis in 0..depth {
            start += place(o.indices[row * depth + axis], dims[axis])? * own[axis];
        }
        pairs.extend((0..slice).map(|i| (start + i, row * slice + i)));
    }
    Ok(pairs)
}

fn evaluated(h: &Host<'_>, places: Places) -> Evaluated {
    let dims = [h.dims(0)?, h.dims(1)?, h.dims(2)?];
    write(h, &places(&Operands { node: h.node, dims, indices: h.ints(1)? })?)
}

/// As part of a region, where places are known: each element is picked from the data or from the updates.
fn picked(l: &mut Lowering<'_>, places: Places) -> Result<Vec<ValueId>, Refusal> {
    let Some(indices) = l.constant(1) else { return rounds(l) };
    let (data, updates) = (l.dims(0)?, l.dims(2)?);
    let (count, news) = (data.iter().product::<usize>(), updates.iter().product::<usize>());
    let reduction = l.node.text("reduction", "none")?.to_owned();
    if count > MOST || l.dtype(0)? != l.dtype(2)? || !matches!(reduction.as_str(), "none" | "add") {
        return Err(Refusal::Host);
    }
    let index_dims = indices.dims().unwrap_or_default().to_vec();
    let dims = [data.as_slice(), &index_dims, &updates];
    let pairs = places(&Operands { node: l.node, dims, indices: indices.ints()? })?;
    let (x, u) = (l.value(0)?, l.value(2)?);
    let (x, u) = (l.reshape(x, &[count])?, l.reshape(u, &[news])?);
    let y = if reduction == "add" {
        added(l, x, u, count, news, &pairs)?
    } else {
        let mut from: Vec<i64> = (0..count as i64).collect();
        pairs.iter().for_each(|&(to, update)| from[to] = (count + update) as i64);
        pick(l, &[x, u], &from)?
    };
    Ok(vec![l.reshape(y, &data)?])
}

/// Elements of values behind each other.
fn pick(l: &mut Lowering<'_>, from: &[ValueId], at: &[i64]) -> Result<ValueId, Refusal> {
    let all = l.add(Concat { axis: 0 }, from)?;
    let at = l.int_vector(at)?;
    l.add(Gather { axis: 0 }, &[all, at])
}

/// The updates of an element are added one after the other: first all first ones, then all second ones.
fn added(
    l: &mut Lowering<'_>,
    x: ValueId,
    updates: ValueId,
    count: usize,
    news: usize,
    pairs: &[(usize, usize)],
) -> Result<ValueId, Refusal> {
    let mut rounds: Vec<Vec<i64>> = Vec::new();
    let mut seen = vec![0; count];
    for &(to, update) in pairs {
        if seen[to] == rounds.len() {
            rounds.push(vec![news as i64; count]);
        }
        rounds[seen[to]][to] = update as i64;
        seen[to] += 1;
    }
    if rounds.len() > ROUNDS {
        return Err(Refusal::Host);
    }
    let dtype = l.shape_of(x).dtype();
    // Adding this changes no number, not even a negative zero.
    let nothing = l.expand().number(if dtype.is_float() { -0.0 } else { 0.0 }, dtype)?;
    let nothing = l.reshape(nothing, &[1])?;
    let mut y = x;
    for round in &rounds {
        let more = pick(l, &[updates, nothing], round)?;
        y = l.expand().binary(BinaryOp::Add, y, more)?;
    }
    Ok(y)
}

/// Updates of an axis: what is at `[.., place, ..]` of data meets what is at `[.., m, ..]` of updates, whose places are at `[.., m, ..]` of `at`.
struct Axis {
    data: ValueId,
    updates: ValueId,
    /// Places as F32, one axis of extent 1 where all inner elements have the same.
    at: ValueId,
    extents: [usize; 3],
    count: usize,
}

/// As part of a region, where only a run knows the places: each update meets every place of its axis.
fn rounds(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    let data = l.dims(0)?;
    let dtype = l.dtype(0)?;
    let reduction = l.node.text("reduction", "none")?.to_owned();
    let kind = match reduction.as_str() {
        "none" => None,
        "add" => Some(BinaryOp::Add),
        "mul" => Some(BinaryOp::Mul),
        "min" if dtype.is_int() => Some(BinaryOp::Min),
        "max" if dtype.is_int() => Some(BinaryOp::Max),
        _ => return Err(Refusal::Host),
    };
    let narrow = kind.is_some() && !(dtype.is_int() || matches!(dtype, DType::F32 | DType::F64));
    if narrow || dtype != l.dtype(2)? || data.contains(&0) || l.dims(1)?.contains(&0) {
        return Err(Refusal::Host);
    }
    let axis = if l.node.op == "ScatterND" { leading(l)? } else { along(l)? };
    let y = match kind {
        None if axis.count > ROUNDS => last_of_each(l, &axis)?,
        _ if axis.count <= ROUNDS => round_by_round(l, &axis, kind)?,
        _ => return Err(Refusal::Host),
    };
    Ok(vec![l.reshape(y, &data)?])
}

/// Places as whole numbers in F32, counted from the front. One that is not there is found out by the gather.
fn checked(l: &mut Lowering<'_>, indices: ValueId, extent: usize) -> Result<ValueId, Refusal> {
    let own = Iota { dims: vec![Dim::Known(extent)], axis: 0, dtype: DType::F32 };
    let own = l.add(own, &[])?;
    let mut e = l.expand();
    let negative = e.scalar(BinaryOp::Less, indices, 0.0)?;
    let moved = e.scalar(BinaryOp::Add, indices, extent as f64)?;
    let indices = e.select(negative, moved, indices)?;
    l.add(Gather { axis: 0 }, &[own, indices])
}

/// `ScatterND`: the leading axes that indices name, as one.
fn leading(l: &mut Lowering<'_>) -> Result<Axis, Refusal> {
    let (dims, index_dims, updates) = (l.dims(0)?, l.dims(1)?, l.dims(2)?);
    let Some((&depth, lead)) = index_dims.split_last() else { return Err(Refusal::Host) };
    if depth == 0 || depth > dims.len() || updates != [lead, &dims[depth..]].concat() {
        return Err(Refusal::Host);
    }
    let count = lead.iter().product::<usize>();
    let (places, slice) = (dims[..depth].iter().product::<usize>(), dims[depth..].iter().product::<usize>());
    if places + count >= EXACT {
        return Err(Refusal::Host);
    }
    let own = strides(&dims[..depth]);
    let indices = l.value(1)?;
    let table = l.reshape(indices, &[count, depth])?;
    let mut at: Option<ValueId> = None;
    for j in 0..depth {
        let column = l.expand().slice(table, 1, j, 1usize)?;
        let column = checked(l, column, dims[j])?;
        let scaled = l.expand().scalar(BinaryOp::Mul, column, own[j] as f64)?;
        at = Some(match at {
            Some(sum) => l.expand().binary(BinaryOp::Add, sum, scaled)?,
            None => scaled,
        });
    }
    let at = at.ok_or(Refusal::Host)?;
    let (data, news) = (l.value(0)?, l.value(2)?);
    Ok(Axis {
        data: l.reshape(data, &[1, places, slice])?,
        updates: l.reshape(news, &[1, count, slice])?,
        at: l.reshape(at, &[1, count, 1])?,
        extents: [1, places, slice],
        count,
    })
}

/// `ScatterElements`: its axis, where all others are covered.
fn along(l: &mut Lowering<'_>) -> Result<Axis, Refusal> {
    let (dims, index_dims, updates) = (l.dims(0)?, l.dims(1)?, l.dims(2)?);
    let axis = axis_of(l.node.int("axis", 0)?, dims.len())?;
    let covered = index_dims.len() == dims.len()
        && (0..dims.len()).all(|a| a == axis || index_dims[a] == dims[a])
        && updates == index_dims;
    let (count, inner) = (index_dims.get(axis).copied().unwrap_or(0), dims[axis + 1..].iter().product());
    if !covered || count > ROUNDS || dims[axis] >= EXACT {
        return Err(Refusal::Host);
    }
    let outer = dims[..axis].iter().product();
    let indices = l.value(1)?;
    let at = checked(l, indices, dims[axis])?;
    let (data, news) = (l.value(0)?, l.value(2)?);
    Ok(Axis {
        data: l.reshape(data, &[outer, dims[axis], inner])?,
        updates: l.reshape(news, &[outer, count, inner])?,
        at: l.reshape(at, &[outer, count, inner])?,
        extents: [outer, dims[axis], inner],
        count,
    })
}

/// Update after update, each over all places.
fn round_by_round(l: &mut Lowering<'_>, axis: &Axis, kind: Option<BinaryOp>) -> Result<ValueId, Refusal> {
    let places = vec![Dim::Known(1), Dim::Known(axis.extents[1]), Dim::Known(1)];
    let own = l.add(Iota { dims: places, axis: 1, dtype: DType::F32 }, &[])?;
    let mut y = axis.data;
    for m in 0..axis.count {
        let mut e = l.expand();
        let (at, update) = (e.slice(axis.at, 1, m, 1usize)?, e.slice(axis.updates, 1, m, 1usize)?);
        let hit = e.binary(BinaryOp::Equal, own, at)?;
        let update = match kind {
            Some(kind) => e.binary(kind, y, update)?,
            None => update,
        };
        y = e.select(hit, update, y)?;
    }
    Ok(y)
}

/// Each place gets the last update that is for it, or stays.
fn last_of_each(l: &mut Lowering<'_>, axis: &Axis) -> Result<ValueId, Refusal> {
    let ([outer, places, slice], count) = (axis.extents, axis.count);
    if outer != 1 || places.saturating_mul(count) > PAIRS {
        return Err(Refusal::Host);
    }
    let at = l.reshape(axis.at, &[1, count])?;
    let column =
        |axis: usize, dims: [usize; 2]| Iota { dims: dims.map(Dim::Known).to_vec(), axis, dtype: DType::F32 };
    let own = l.add(column(0, [places, 1]), &[])?;
    let updates = l.add(column(1, [1, count]), &[])?;
    let mut e = l.expand();
    let hit = e.binary(BinaryOp::Equal, own, at)?;
    let none = e.number(-1.0, DType::F32)?;
    let which = e.select(hit, updates, none)?;
    let last = e.reduce(ReduceOp::Max, which, 1)?;
    let stays = e.scalar(BinaryOp::Less, last, 0.0)?;
    let from = e.scalar(BinaryOp::Add, last, places as f64)?;
    let from = e.select(stays, own, from)?;
    let from = l.cast(from, DType::I64)?;
    let from = l.reshape(from, &[places])?;
    let data = l.reshape(axis.data, &[places, slice])?;
    let news = l.reshape(axis.updates, &[count, slice])?;
    let all = l.add(Concat { axis: 0 }, &[data, news])?;
    l.add(Gather { axis: 0 }, &[all, from])
}
