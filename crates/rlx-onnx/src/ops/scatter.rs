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
use rlx_tensor::Tensor;

type Evaluated = Result<Vec<Value>, Refusal>;

/// Larger data is scattered on the host: a place for each element is part of the graph.
const MOST: usize = 1 << 20;
/// So many updates of one element are added in a region.
const ROUNDS: usize = 8;

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
    let Some(indices) = l.constant(1) else { return Err(Refusal::Host) };
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
