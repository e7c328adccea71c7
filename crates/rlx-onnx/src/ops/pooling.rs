//! Pooling over windows and over whole images.

use super::Row;
use super::convolution::Geometry;
use crate::error::{Refusal, invalid};
use crate::lower::{Host, Lowering};
use crate::value::{Value, from_floats};
use rlx_graph::ValueId;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::pool_window::{PoolWindow, WindowPool};
use rlx_graph::ops::reduce::{Reduce, ReduceOp};
use rlx_graph::ops::unary::UnaryOp;

type Lowered = Result<Vec<ValueId>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("MaxPool", |l| pool(l, WindowPool::Max)),
    Row::lower("AveragePool", |l| pool(l, WindowPool::Mean)),
    Row::lower("LpPool", |l| pool(l, WindowPool::Lp)),
    Row::lower("GlobalMaxPool", |l| global(l, ReduceOp::Max)),
    Row::lower("GlobalAveragePool", |l| global(l, ReduceOp::Mean)),
    Row::lower("GlobalLpPool", global_lp),
    Row::host("MaxUnpool", max_unpool),
];

fn pool(l: &mut Lowering<'_>, kind: WindowPool) -> Lowered {
    let dims = l.dims(0)?;
    if dims.len() < 3 {
        return invalid(format!("images of rank {}", dims.len()));
    }
    let window = Geometry::read(l.node, &dims[2..], None)?;
    let indices = kind == WindowPool::Max && l.wants(1);
    let op = PoolWindow {
        strides: window.strides,
        dilations: window.dilations,
        before: Geometry::dims(&window.before),
        after: Geometry::dims(&window.after),
        ceil: l.node.flag("ceil_mode", false)?,
        count_added: l.node.flag("count_include_pad", false)?,
        power: if kind == WindowPool::Lp { l.node.int("p", 2)? as f64 } else { 2.0 },
        indices,
        column_major: l.node.flag("storage_order", false)?,
        ..PoolWindow::plain(kind, &window.window)
    };
    let x = l.value(0)?;
    l.add_all(op, &[x])
}

fn spatial(l: &Lowering<'_>) -> Result<Vec<usize>, Refusal> {
    match l.rank(0)? {
        rank if rank > 2 => Ok((2..rank).collect()),
        rank => invalid(format!("images of rank {rank}")),
    }
}

fn global(l: &mut Lowering<'_>, kind: ReduceOp) -> Lowered {
    let (axes, x) = (spatial(l)?, l.value(0)?);
    Ok(vec![l.add(Reduce { kind, axes, keep_dims: true }, &[x])?])
}

fn global_lp(l: &mut Lowering<'_>) -> Lowered {
    let (axes, x, power) = (spatial(l)?, l.value(0)?, l.node.int("p", 2)? as f64);
    let mut e = l.expand();
    let size = e.unary(UnaryOp::Abs, x)?;
    let powers = e.scalar(BinaryOp::Pow, size, power)?;
    let sum = l.add(Reduce { kind: ReduceOp::Sum, axes, keep_dims: true }, &[powers])?;
    Ok(vec![l.expand().scalar(BinaryOp::Pow, sum, 1.0 / power)?])
}

fn max_unpool(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let dims = h.dims(0)?;
    if dims.len() < 3 || h.dims(1)? != dims {
        return invalid("values and indices must be images of one shape");
    }
    let window = Geometry::read(h.node, &dims[2..], None)?;
    let natural: Vec<usize> = (0..dims.len() - 2)
        .map(|axis| {
            let full = (dims[2 + axis].max(1) - 1) * window.strides[axis] + window.window[axis];
            full.saturating_sub(window.before[axis] + window.after[axis])
        })
        .collect();
    let natural: Vec<usize> = dims[..2].iter().copied().chain(natural).collect();
    let wanted: Vec<usize> = match h.optional(2) {
        Some(shape) => shape.ints()?.iter().map(|&v| v.max(0) as usize).collect(),
        None => natural.clone(),
    };
    if wanted.len() != dims.len() {
        return invalid(format!("an output shape of {} axes", wanted.len()));
    }
    let (x, at) = (h.floats(0)?, h.ints(1)?);
    let mut y = vec![0.0; wanted.iter().product()];
    let own = rlx_graph::eval::strides(&natural);
    let target = rlx_graph::eval::strides(&wanted);
    for (value, at) in x.into_iter().zip(at) {
        let Ok(at) = usize::try_from(at) else { return invalid(format!("index {at}")) };
        let place: usize =
            (0..natural.len()).map(|axis| at / own[axis].max(1) % natural[axis].max(1) * target[axis]).sum();
        match y.get_mut(place) {
            Some(target) => *target = value,
            None => return invalid(format!("index {at} is outside {wanted:?}")),
        }
    }
    Ok(vec![from_floats(h.element(0)?, &wanted, &y)?])
}
