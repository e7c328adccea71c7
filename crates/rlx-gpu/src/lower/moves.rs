//! Elements moved to other places.

use super::blocks::{Blocks, is_blocks};
use super::elementwise::map;
use super::whole::literal;
use super::{Amount, GpuOp, LANES, LowerCx, Operand, contiguous};
use crate::ir::{BinaryFn, UnaryFn, Value};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::broadcast::Broadcast;
use rlx_graph::ops::concat::Concat;
use rlx_graph::ops::embedding::Embedding;
use rlx_graph::ops::gather::Gather;
use rlx_graph::ops::iota::Iota;
use rlx_graph::ops::pad::Pad;
use rlx_graph::ops::reshape::Reshape;
use rlx_graph::ops::slice::Slice;
use rlx_graph::ops::transpose::Transpose;
use rlx_tensor::Shape;

fn copy(cx: &mut LowerCx<'_>, from: Operand, to: &Operand) -> Result<(), BackendError> {
    map(cx, "copy", &[from], to, |_, v| v[0])
}

/// `broadcast`.
pub(super) struct GpuBroadcast;

impl GpuOp for GpuBroadcast {
    fn name(&self) -> &'static str {
        Broadcast::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        copy(cx, from.broadcast(&to.dims), &to)
    }
}

/// `reshape`.
pub(super) struct GpuReshape;

impl GpuOp for GpuReshape {
    fn name(&self) -> &'static str {
        Reshape::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let whole = from.strides == contiguous(&from.dims) && to.strides == contiguous(&to.dims);
        if from.dims == to.dims || whole {
            let (dims, strides) = (to.dims.clone(), to.strides.clone());
            let same = if whole { Operand { dims, strides, ..from } } else { from };
            return copy(cx, same, &to);
        }
        let mut d = cx.draft("reshape");
        let linear = d.linear();
        let (at_from, inside_from) = d.coordinates(linear, &from.dims);
        let (at_to, inside_to) = d.coordinates(linear, &to.dims);
        let (read, write) = (d.read(&from), d.write(&to));
        let value = d.b.load(read, &at_from, Some(inside_from));
        d.b.store(write, &at_to, value, Some(inside_to));
        cx.launch(d, Amount::product(&to.dims).ceil_div(LANES as usize))
    }
}

/// `slice`.
pub(super) struct GpuSlice;

impl GpuOp for GpuSlice {
    fn name(&self) -> &'static str {
        Slice::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Slice>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let axis = op.axis.unwrap_or(from.dims.len().saturating_sub(1));
        let start = Amount::product(&[Amount::of_dim(&op.start), from.strides[axis].clone()]);
        let mut window = from.shifted(&start);
        window.dims.clone_from(&to.dims);
        window.strides[axis] = Amount::product(&[window.strides[axis].clone(), Amount::Known(op.step)]);
        copy(cx, window, &to)
    }
}

/// `transpose`.
pub(super) struct GpuTranspose;

impl GpuOp for GpuTranspose {
    fn name(&self) -> &'static str {
        Transpose::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Transpose>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let turned = from.axes(&op.perm);
        copy(cx, Operand { dims: to.dims.clone(), ..turned }, &to)
    }
}

/// `concat`.
pub(super) struct GpuConcat;

impl GpuOp for GpuConcat {
    fn name(&self) -> &'static str {
        Concat::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Concat>().ok_or_else(|| cx.mismatched())?;
        let to = cx.operand(&step.outputs[0]);
        let mut start = Amount::Known(0);
        for from in cx.inputs(step) {
            let offset = Amount::product(&[start.clone(), to.strides[op.axis].clone()]);
            let window = Operand { dims: from.dims.clone(), ..to.shifted(&offset) };
            start = Amount::sum(&start, &from.dims[op.axis]);
            copy(cx, from, &window)?;
        }
        Ok(())
    }
}

/// `pad`.
pub(super) struct GpuPad;

impl GpuOp for GpuPad {
    fn name(&self) -> &'static str {
        Pad::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Pad>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let mut d = cx.draft("pad");
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &to.dims);
        let (mut own, mut within) = (Vec::with_capacity(at.len()), inside);
        for (axis, &coordinate) in at.iter().enumerate() {
            let (before, extent) = (d.size(&Amount::of_dim(&op.before[axis])), d.size(&from.dims[axis]));
            let before = d.b.arg(before);
            let shifted = d.b.sub(coordinate, before);
            let there = d.b.within(shifted, extent);
            within = d.b.and(within, there);
            own.push(shifted);
        }
        let (read, write) = (d.read(&from), d.write(&to));
        let value = d.b.load(read, &own, Some(within));
        let fill = match to.dtype.is_float() {
            true => d.b.float(op.value),
            false => {
                let beyond = || cx.unsupported(format!("no word of the device holds {}", op.value));
                d.b.int(literal(to.dtype, op.value).ok_or_else(beyond)?)
            }
        };
        let fill = d.rounded(to.dtype, fill);
        let value = d.b.select(within, value, fill);
        d.b.store(write, &at, value, Some(inside));
        cx.launch(d, Amount::product(&to.dims).ceil_div(LANES as usize))
    }
}

/// `iota`.
pub(super) struct GpuIota;

impl GpuOp for GpuIota {
    fn name(&self) -> &'static str {
        Iota::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Iota>().ok_or_else(|| cx.mismatched())?;
        let to = cx.operand(&step.outputs[0]);
        let mut d = cx.draft("iota");
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &to.dims);
        let write = d.write(&to);
        let count = at[op.axis];
        let value = if to.dtype.is_float() { d.b.unary(UnaryFn::ToFloat, count) } else { count };
        let value = d.rounded(to.dtype, value);
        d.b.store(write, &at, value, Some(inside));
        cx.launch(d, Amount::product(&to.dims).ceil_div(LANES as usize))
    }
}

/// A gather of `table` along `axis` at `indices`, which stand in place of the axis.
fn gather(
    cx: &mut LowerCx<'_>,
    table: &Operand,
    indices: &Operand,
    axis: usize,
    to: &Operand,
) -> Result<(), BackendError> {
    let bands = if axis == 0 { cx.bands(table, 0) } else { vec![table.clone()] };
    for band in &bands {
        gather_band(cx, (table, band), indices, axis, to)?;
    }
    Ok(())
}

/// Of a gather what stands in a band of the table, which may be all of it.
fn gather_band(
    cx: &mut LowerCx<'_>,
    (table, band): (&Operand, &Operand),
    indices: &Operand,
    axis: usize,
    to: &Operand,
) -> Result<(), BackendError> {
    let mut d = cx.draft("gather");
    let linear = d.linear();
    let (at, inside) = d.coordinates(linear, &to.dims);
    let after = axis + indices.dims.len();
    let index_view = d.read(indices);
    let mut index = d.b.load(index_view, &at[axis..after], Some(inside));
    let first = band.band.map_or(0, |band| band.first);
    let mut written = inside;
    if first == 0 {
        let extent = d.size(&table.dims[axis]);
        let there = d.b.within(index, extent);
        let slot = cx.guard(&mut d, "an index is outside the axis it points into");
        d.b.check(there, inside, slot);
    } else {
        let before = d.b.int(i32::try_from(first).map_err(|_| cx.unsupported("an axis beyond 31 bits"))?);
        index = d.b.sub(index, before);
    }
    let extent = d.size(&band.dims[axis]);
    let there = d.b.within(index, extent);
    let mask = d.b.and(inside, there);
    if band.band.is_some() {
        let mut own = there;
        if first == 0 {
            // For an index outside of all bands something has to be written too.
            let extent = d.size(&table.dims[axis]);
            let known = d.b.within(index, extent);
            let nowhere = d.b.unary(UnaryFn::Not, known);
            own = d.b.binary(BinaryFn::Or, there, nowhere);
        }
        written = d.b.and(inside, own);
    }
    let coordinates: Vec<Value> =
        at[..axis].iter().copied().chain([index]).chain(at[after..].iter().copied()).collect();
    let blocks = Blocks::new(&mut d, band);
    let value = match (&blocks, coordinates.as_slice()) {
        (Some(blocks), &[line, k]) => blocks.element(&mut d, line, k, mask),
        _ => {
            let read = d.read(band);
            d.b.load(read, &coordinates, Some(mask))
        }
    };
    let write = d.write(to);
    d.b.store(write, &at, value, Some(written));
    cx.launch(d, Amount::product(&to.dims).ceil_div(LANES as usize))
}

/// `gather`.
pub(super) struct GpuGather;

impl GpuOp for GpuGather {
    fn name(&self) -> &'static str {
        Gather::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Gather>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        gather(cx, &from[0], &from[1], op.axis, &to)
    }
}

/// `embedding`.
pub(super) struct GpuEmbedding;

impl GpuOp for GpuEmbedding {
    fn name(&self) -> &'static str {
        Embedding::NAME
    }

    fn supports(&self, _op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let known = |s: &&Shape| super::element(s.dtype()).is_some();
        let table = |s: &Shape| known(&s) || (is_blocks(s.dtype()) && s.known_dims().is_some());
        let operands = inputs.iter().enumerate().all(|(i, s)| if i == 1 { table(s) } else { known(s) });
        operands && outputs.iter().all(known)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        gather(cx, &from[1], &from[0], 0, &to)
    }
}
