//! Elements and slices written, or combined with what is there, at places that an operand names.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Host;
use crate::model::axis_of;
use crate::value::Value;
use rlx_graph::eval::{from_f64, from_i64, strides, to_f64, to_i64};
use rlx_tensor::Tensor;

type Evaluated = Result<Vec<Value>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("ScatterElements", scatter_elements),
    Row::host("Scatter", scatter_elements),
    Row::host("ScatterND", scatter_nd),
];

/// Writes updates: `(element of data, element of updates)` pairs in order.
fn write(h: &Host<'_>, updates: usize, pairs: &[(usize, usize)]) -> Evaluated {
    let (data, updates) = (h.tensor(0)?, h.tensor(updates)?);
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

fn scatter_elements(h: &Host<'_>) -> Evaluated {
    let (dims, index_dims) = (h.dims(0)?.to_vec(), h.dims(1)?.to_vec());
    let axis = axis_of(h.node.int("axis", 0)?, dims.len())?;
    let fits = index_dims.len() == dims.len()
        && h.dims(2)? == index_dims
        && (0..dims.len()).all(|a| a == axis || index_dims[a] <= dims[a]);
    if !fits {
        return invalid(format!("indices {index_dims:?} do not fit {dims:?}"));
    }
    let (own, source) = (strides(&dims), strides(&index_dims));
    let indices = h.ints(1)?;
    let mut pairs = Vec::with_capacity(indices.len());
    for (from, &index) in indices.iter().enumerate() {
        let mut to = place(index, dims[axis])? * own[axis];
        for a in (0..dims.len()).filter(|&a| a != axis) {
            to += from / source[a] % index_dims[a] * own[a];
        }
        pairs.push((to, from));
    }
    write(h, 2, &pairs)
}

fn scatter_nd(h: &Host<'_>) -> Evaluated {
    let (dims, index_dims) = (h.dims(0)?.to_vec(), h.dims(1)?.to_vec());
    let Some((&depth, lead)) = index_dims.split_last() else {
        return invalid("indices must have a last axis");
    };
    if depth > dims.len() || h.dims(2)? != [lead, &dims[depth..]].concat() {
        return invalid(format!("indices {index_dims:?} and updates {:?} do not fit {dims:?}", h.dims(2)?));
    }
    let own = strides(&dims);
    let slice: usize = dims[depth..].iter().product();
    let indices = h.ints(1)?;
    let count: usize = lead.iter().product();
    let mut pairs = Vec::with_capacity(count * slice);
    for row in 0..count {
        let mut start = 0;
        for axis in 0..depth {
            start += place(indices[row * depth + axis], dims[axis])? * own[axis];
        }
        pairs.extend((0..slice).map(|i| (start + i, row * slice + i)));
    }
    write(h, 2, &pairs)
}
