//! Combinations along axes: a program for each line, or a lane where lines are short by nature.

use super::whole::{self, BEYOND, computes_whole, is_wide};
use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand, computes};
use crate::ir::{BinaryFn, Element, UnaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::cumsum::CumSum;
use rlx_graph::ops::l2_normalize::L2Normalize;
use rlx_graph::ops::layer_norm::LayerNorm;
use rlx_graph::ops::pool::{Pool, PoolKind};
use rlx_graph::ops::reduce::{Reduce, ReduceOp};
use rlx_graph::ops::rms_norm::RmsNorm;
use rlx_graph::ops::softmax::Softmax;
use rlx_tensor::Shape;

/// The lines of an operand: which coordinates the program stands for, and how many elements a line has.
struct Lines {
    /// Extents that the program counts.
    lead: Vec<Amount>,
    /// Extents of a line.
    line: Vec<Amount>,
    at: Vec<Value>,
    inside: Value,
}

impl Lines {
    fn new(d: &mut Draft<'_>, lead: &[Amount], line: &[Amount]) -> Self {
        let program = d.b.program();
        let (at, inside) = d.coordinates(program, lead);
        Lines { lead: lead.to_vec(), line: line.to_vec(), at, inside }
    }

    fn length(&self) -> Amount {
        Amount::product(&self.line)
    }

    fn programs(&self) -> Amount {
        Amount::product(&self.lead)
    }

    /// Goes over a line, a lane an element; `body` gets the element's coordinates, those of its place in the line, and whether it is one.
    fn over(
        &self,
        d: &mut Draft<'_>,
        firsts: &[Value],
        body: impl FnOnce(&mut Draft<'_>, &[Value], &[Value], Value, &[Value]) -> Vec<Value>,
    ) -> Vec<Value> {
        d.stride_over(&self.length(), firsts, |d, index, _, carried| {
            let (along, within) = d.coordinates(index, &self.line);
            let mask = d.b.and(self.inside, within);
            let at = [self.at.as_slice(), &along].concat();
            body(d, &at, &along, mask, carried)
        })
    }

    /// Combines what `element` gives for each element of a line.
    fn fold(
        &self,
        d: &mut Draft<'_>,
        function: BinaryFn,
        identity: Value,
        element: impl FnOnce(&mut Draft<'_>, &[Value], &[Value], Value) -> Value,
    ) -> Value {
        let folded = self.over(d, &[identity], |d, at, along, mask, carried| {
            let value = element(d, at, along, mask);
            let value = d.b.select(mask, value, identity);
            vec![d.b.binary(function, carried[0], value)]
        });
        d.b.fold(function, folded[0])
    }

    /// Whether the lane is the one that writes a line's result.
    fn writer(&self, d: &mut Draft<'_>) -> Value {
        let (lane, zero) = (d.b.lane(), d.b.int(0));
        let first = d.b.binary(BinaryFn::Equal, lane, zero);
        d.b.and(first, self.inside)
    }

    /// The length of a line as a float.
    fn count(&self, d: &mut Draft<'_>) -> Value {
        let length = d.size(&self.length());
        let length = d.b.arg(length);
        d.b.unary(UnaryFn::ToFloat, length)
    }
}

/// `reduce`.
pub(super) struct GpuReduce;

impl GpuOp for GpuReduce {
    fn name(&self) -> &'static str {
        Reduce::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        use ReduceOp::{Max, Mean, Min, Prod, Sum};
        let kind = op.as_any().downcast_ref::<Reduce>().map(|r| r.kind);
        computes_whole(inputs, outputs) && kind.is_some_and(|k| matches!(k, Sum | Mean | Prod | Max | Min))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Reduce>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let kept: Vec<usize> = (0..from.dims.len()).filter(|a| !op.axes.contains(a)).collect();
        let (lead, line) = (from.axes(&kept).dims, from.axes(&op.axes).dims);
        let mut d = cx.draft(format!("reduce_{}", op.kind.name()));
        let lines = Lines::new(&mut d, &lead, &line);
        let turned = from.axes(&[kept, op.axes.clone()].concat());
        let view = d.read(&turned);
        let float = d.b.view_element(view) == Element::F32;
        let number = |d: &mut Draft<'_>, f: f64, i: i32| if float { d.b.float(f) } else { d.b.int(i) };
        let (function, identity) = match op.kind {
            ReduceOp::Sum | ReduceOp::Mean => (BinaryFn::Add, number(&mut d, 0.0, 0)),
            ReduceOp::Prod => (BinaryFn::Mul, number(&mut d, 1.0, 1)),
            ReduceOp::Max => (BinaryFn::Max, number(&mut d, f64::NEG_INFINITY, i32::MIN)),
            _ => (BinaryFn::Min, number(&mut d, f64::INFINITY, i32::MAX)),
        };
        let mut value =
            lines.fold(&mut d, function, identity, |d, at, _, mask| d.b.load(view, at, Some(mask)));
        if op.kind == ReduceOp::Mean {
            let count = lines.count(&mut d);
            value = d.b.div(value, count);
        }
        let writer = lines.writer(&mut d);
        if !float {
            let holds = match op.kind {
                ReduceOp::Max | ReduceOp::Min => has_elements(&mut d, &lines),
                _ if is_wide(from.dtype) => Some(stays_small(&mut d, &lines, view, function)),
                _ => None,
            };
            if let Some(holds) = holds {
                let slot = cx.limit(&mut d, BEYOND);
                d.b.check(holds, writer, slot);
            }
        }
        let value = d.rounded(to.dtype, value);
        let strides = match op.keep_dims {
            true => to.axes(&(0..from.dims.len()).filter(|a| !op.axes.contains(a)).collect::<Vec<_>>()),
            false => to,
        };
        let write = d.write(&Operand { dims: lead, ..strides });
        d.b.store(write, &lines.at, value, Some(writer));
        cx.launch(d, lines.programs())
    }
}

/// Whether lines have elements, where that is not known: the largest of none is a number that no word holds.
fn has_elements(d: &mut Draft<'_>, lines: &Lines) -> Option<Value> {
    let length = lines.length();
    if matches!(length, Amount::Known(count) if count > 0) {
        return None;
    }
    let length = d.size(&length);
    let (zero, length) = (d.b.int(0), d.b.arg(length));
    Some(d.b.less(zero, length))
}

/// Whether a line's integers combine to less than 2^30 when each is taken without its sign. Then no wrapping changed the result, for
/// the sum in floats is off by less than half of it up to lines of 2^28 elements.
fn stays_small(d: &mut Draft<'_>, lines: &Lines, view: ViewId, function: BinaryFn) -> Value {
    let identity = d.b.float(if function == BinaryFn::Add { 0.0 } else { 1.0 });
    let total = lines.fold(d, function, identity, |d, at, _, mask| {
        let x = d.b.load(view, at, Some(mask));
        let x = d.b.unary(UnaryFn::ToFloat, x);
        d.b.unary(UnaryFn::Abs, x)
    });
    let limit = d.b.float(2f64.powi(30));
    d.b.less(total, limit)
}

/// `softmax`.
pub(super) struct GpuSoftmax;

impl GpuOp for GpuSoftmax {
    fn name(&self) -> &'static str {
        Softmax::NAME
    }

    fn supports(&self, _op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        computes(inputs, outputs)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Softmax>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let rank = from.dims.len();
        let order: Vec<usize> = (0..rank).filter(|&a| a != op.axis).chain([op.axis]).collect();
        let (from, to) = (from.axes(&order), to.axes(&order));
        let mut d = cx.draft("softmax");
        let lines = Lines::new(&mut d, &from.dims[..rank - 1], &from.dims[rank - 1..]);
        let (read, write) = (d.read(&from), d.write(&to));
        let lowest = d.b.float(f64::NEG_INFINITY);
        let most = lines.fold(&mut d, BinaryFn::Max, lowest, |d, at, _, mask| d.b.load(read, at, Some(mask)));
        let power = |d: &mut Draft<'_>, at: &[Value], mask: Value| {
            let x = d.b.load(read, at, Some(mask));
            let below = d.b.sub(x, most);
            d.b.unary(UnaryFn::Exp, below)
        };
        let zero = d.b.float(0.0);
        let sum = lines.fold(&mut d, BinaryFn::Add, zero, |d, at, _, mask| power(d, at, mask));
        lines.over(&mut d, &[], |d, at, _, mask, _| {
            let power = power(d, at, mask);
            let y = d.b.div(power, sum);
            let y = d.rounded(to.dtype, y);
            d.b.store(write, at, y, Some(mask));
            Vec::new()
        });
        cx.launch(d, lines.programs())
    }
}

/// The value that is normalised: x, or x plus the residual.
struct Summed {
    x: ViewId,
    residual: Option<ViewId>,
}

impl Summed {
    fn load(&self, d: &mut Draft<'_>, at: &[Value], mask: Value) -> Value {
        let x = d.b.load(self.x, at, Some(mask));
        match self.residual {
            Some(view) => {
                let residual = d.b.load(view, at, Some(mask));
                d.b.add(x, residual)
            }
            None => x,
        }
    }
}

fn all_but_last(operand: &Operand) -> &[Amount] {
    operand.dims.split_last().map_or(&[], |(_, lead)| lead)
}

/// `layer_norm`.
pub(super) struct GpuLayerNorm;

impl GpuOp for GpuLayerNorm {
    fn name(&self) -> &'static str {
        LayerNorm::NAME
    }

    fn supports(&self, _op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        computes(inputs, outputs)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<LayerNorm>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.inputs(step), cx.outputs(step));
        let x = &from[0];
        let mut d = cx.draft("layer_norm");
        let last = x.dims[x.dims.len() - 1..].to_vec();
        let lines = Lines::new(&mut d, all_but_last(x), &last);
        let source = Summed { x: d.read(x), residual: op.residual_at().map(|at| d.read(&from[at])) };
        let vector = |o: &Operand| Operand { dims: last.clone(), ..o.clone() };
        let (weight, bias) = (d.read(&vector(&from[1])), op.bias.then(|| d.read(&vector(&from[2]))));
        let writes: Vec<ViewId> = to.iter().map(|o| d.write(o)).collect();
        let (zero, count) = (d.b.float(0.0), lines.count(&mut d));
        let sum = lines.fold(&mut d, BinaryFn::Add, zero, |d, at, _, mask| source.load(d, at, mask));
        let mean = d.b.div(sum, count);
        let squares = lines.fold(&mut d, BinaryFn::Add, zero, |d, at, _, mask| {
            let x = source.load(d, at, mask);
            let centred = d.b.sub(x, mean);
            d.b.mul(centred, centred)
        });
        let scale = inverse_root(&mut d, squares, count, op.eps);
        lines.over(&mut d, &[], |d, at, along, mask, _| {
            let x = source.load(d, at, mask);
            let centred = d.b.sub(x, mean);
            let scaled = d.b.mul(centred, scale);
            let w = d.b.load(weight, along, Some(mask));
            let mut y = d.b.mul(scaled, w);
            if let Some(bias) = bias {
                let b = d.b.load(bias, along, Some(mask));
                y = d.b.add(y, b);
            }
            writes.iter().zip([y, x]).for_each(|(&view, value)| d.b.store(view, at, value, Some(mask)));
            Vec::new()
        });
        cx.launch(d, lines.programs())
    }
}

/// `1 / sqrt(sum / count + eps)`
fn inverse_root(d: &mut Draft<'_>, sum: Value, count: Value, eps: f64) -> Value {
    let (one, eps) = (d.b.float(1.0), d.b.float(eps));
    let mean = d.b.div(sum, count);
    let shifted = d.b.add(mean, eps);
    let root = d.b.unary(UnaryFn::Sqrt, shifted);
    d.b.div(one, root)
}

/// `rms_norm`.
pub(super) struct GpuRmsNorm;

impl GpuOp for GpuRmsNorm {
    fn name(&self) -> &'static str {
        RmsNorm::NAME
    }

    fn supports(&self, _op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        computes(inputs, outputs)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<RmsNorm>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.inputs(step), cx.outputs(step));
        let width = from[1].dims[0].clone();
        let grouped = |o: &Operand| o.split_last(op.groups, width.clone());
        let x = grouped(&from[0]);
        let mut d = cx.draft("rms_norm");
        let lines = Lines::new(&mut d, all_but_last(&x), std::slice::from_ref(&width));
        let residual = op.residual.then(|| d.read(&grouped(&from[2])));
        let source = Summed { x: d.read(&x), residual };
        let weight = d.read(&from[1]);
        let writes: Vec<ViewId> = to.iter().map(|o| d.write(&grouped(o))).collect();
        let (zero, one, count) = (d.b.float(0.0), d.b.float(1.0), lines.count(&mut d));
        let squares = lines.fold(&mut d, BinaryFn::Add, zero, |d, at, _, mask| {
            let x = source.load(d, at, mask);
            d.b.mul(x, x)
        });
        let scale = inverse_root(&mut d, squares, count, op.eps);
        lines.over(&mut d, &[], |d, at, along, mask, _| {
            let x = source.load(d, at, mask);
            let scaled = d.b.mul(x, scale);
            let mut w = d.b.load(weight, along, Some(mask));
            if op.unit_offset {
                w = d.b.add(one, w);
            }
            let y = d.b.mul(scaled, w);
            writes.iter().zip([y, x]).for_each(|(&view, value)| d.b.store(view, at, value, Some(mask)));
            Vec::new()
        });
        cx.launch(d, lines.programs())
    }
}

/// `l2_normalize`.
pub(super) struct GpuL2Normalize;

impl GpuOp for GpuL2Normalize {
    fn name(&self) -> &'static str {
        L2Normalize::NAME
    }

    fn supports(&self, _op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        computes(inputs, outputs)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<L2Normalize>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let mut d = cx.draft("l2_normalize");
        let lines = Lines::new(&mut d, all_but_last(&from), &from.dims[from.dims.len() - 1..]);
        let (read, write) = (d.read(&from), d.write(&to));
        let (zero, eps) = (d.b.float(0.0), d.b.float(op.eps));
        let squares = lines.fold(&mut d, BinaryFn::Add, zero, |d, at, _, mask| {
            let x = d.b.load(read, at, Some(mask));
            d.b.mul(x, x)
        });
        let length = d.b.unary(UnaryFn::Sqrt, squares);
        let divisor = d.b.binary(BinaryFn::Max, length, eps);
        lines.over(&mut d, &[], |d, at, _, mask, _| {
            let x = d.b.load(read, at, Some(mask));
            let y = d.b.div(x, divisor);
            let y = d.rounded(to.dtype, y);
            d.b.store(write, at, y, Some(mask));
            Vec::new()
        });
        cx.launch(d, lines.programs())
    }
}

/// `cumsum`: a lane a line.
pub(super) struct GpuCumSum;

impl GpuOp for GpuCumSum {
    fn name(&self) -> &'static str {
        CumSum::NAME
    }

    fn supports(&self, _op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        computes_whole(inputs, outputs)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<CumSum>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let rank = from.dims.len();
        let order: Vec<usize> = (0..rank).filter(|&a| a != op.axis).chain([op.axis]).collect();
        let (from, to) = (from.axes(&order), to.axes(&order));
        let lead = &from.dims[..rank - 1];
        let mut d = cx.draft("cumsum");
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, lead);
        let (read, write) = (d.read(&from), d.write(&to));
        let extent = d.size(&from.dims[rank - 1]);
        let (first, end) = (d.b.int(0), d.b.arg(extent));
        let zero = if from.dtype.is_float() { d.b.float(0.0) } else { d.b.int(0) };
        let (one, limit) = (d.b.int(1), d.b.arg(extent));
        let slot = is_wide(from.dtype).then(|| cx.limit(&mut d, BEYOND));
        d.repeat([first, end], 1, &[zero], |d, index, carried| {
            let last = d.b.sub(limit, one);
            let along = if op.reverse { d.b.sub(last, index) } else { index };
            let within = d.b.within(along, extent);
            let mask = d.b.and(inside, within);
            let at: Vec<Value> = at.iter().copied().chain([along]).collect();
            let x = d.b.load(read, &at, Some(mask));
            let sum = d.b.add(carried[0], x);
            let (sum, exact) = whole::binary(d, from.dtype, BinaryOp::Add, [carried[0], x], sum);
            if let (Some(exact), Some(slot)) = (exact, slot) {
                d.b.check(exact, mask, slot);
            }
            let y = d.rounded(to.dtype, if op.exclusive { carried[0] } else { sum });
            d.b.store(write, &at, y, Some(mask));
            vec![sum]
        });
        cx.launch(d, Amount::product(lead).ceil_div(LANES as usize))
    }
}

/// `pool`: a program for some columns of a sequence.
pub(super) struct GpuPool;

impl GpuOp for GpuPool {
    fn name(&self) -> &'static str {
        Pool::NAME
    }

    fn supports(&self, op: &dyn OpDef, _inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        use PoolKind::{Cls, Last, Max, Mean};
        let kind = op.as_any().downcast_ref::<Pool>().map(|p| p.kind);
        kind.is_some_and(|k| matches!(k, Cls | Last | Max | Mean))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Pool>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        let mut d = cx.draft(format!("pool_{}", op.kind.name()));
        let blocks = to.dims[1].ceil_div(LANES as usize);
        let program = d.b.program();
        let grid = [to.dims[0].clone(), blocks];
        let (at, inside) = d.coordinates(program, &grid);
        let (lane, lanes) = (d.b.lane(), d.b.int(LANES as i32));
        let first = d.b.mul(at[1], lanes);
        let column = d.b.add(first, lane);
        let width = d.size(&to.dims[1]);
        let there = d.b.within(column, width);
        let inside = d.b.and(inside, there);
        let (read, starts, write) = (d.read(&from[0]), d.read(&from[1]), d.write(&to));
        let [start, end] = bounds(cx, &mut d, starts, &from[1], &from[0].dims[0], at[0], inside);
        let rows = d.size(&from[0].dims[0]);
        let one = d.b.int(1);
        let last = d.b.sub(end, one);
        let some = d.b.less(start, end);
        let value = match op.kind {
            PoolKind::Cls | PoolKind::Last => {
                let row = if op.kind == PoolKind::Cls { start } else { last };
                let within = d.b.within(row, rows);
                let mask = d.b.and(inside, within);
                let mask = d.b.and(mask, some);
                d.b.load(read, &[row, column], Some(mask))
            }
            _ => {
                let (lowest, zero) = (d.b.float(f64::NEG_INFINITY), d.b.float(0.0));
                let identity = if op.kind == PoolKind::Max { lowest } else { zero };
                let function = if op.kind == PoolKind::Max { BinaryFn::Max } else { BinaryFn::Add };
                let total = d.repeat([start, end], 1, &[identity], |d, row, carried| {
                    let within = d.b.within(row, rows);
                    let mask = d.b.and(inside, within);
                    let x = d.b.load(read, &[row, column], Some(mask));
                    vec![d.b.binary(function, carried[0], x)]
                });
                let count = d.b.sub(end, start);
                let count = d.b.unary(UnaryFn::ToFloat, count);
                let mean = d.b.div(total[0], count);
                let value = if op.kind == PoolKind::Max { total[0] } else { mean };
                d.b.select(some, value, zero)
            }
        };
        d.b.store(write, &[at[0], column], value, Some(inside));
        cx.launch(d, Amount::product(&grid))
    }
}

/// The first row of a sequence and the first after it, the same in all lanes; checked to be rows in order.
fn bounds(
    cx: &mut LowerCx<'_>,
    d: &mut Draft<'_>,
    starts: ViewId,
    operand: &Operand,
    rows: &Amount,
    sequence: Value,
    inside: Value,
) -> [Value; 2] {
    let (count, rows) = (d.size(&operand.dims[0]), d.size(rows));
    let one = d.b.int(1);
    let next = d.b.add(sequence, one);
    let mut load = |at: Value| {
        let within = d.b.within(at, count);
        let mask = d.b.and(inside, within);
        let value = d.b.load(starts, &[at], Some(mask));
        // Lanes outside load nothing; the others agree.
        d.b.fold(BinaryFn::Max, value)
    };
    let [start, end] = [load(sequence), load(next)];
    let (zero, rows) = (d.b.int(0), d.b.arg(rows));
    let first = d.b.binary(BinaryFn::LessEqual, zero, start);
    let ordered = d.b.binary(BinaryFn::LessEqual, start, end);
    let last = d.b.binary(BinaryFn::LessEqual, end, rows);
    let holds = d.b.and(first, ordered);
    let holds = d.b.and(holds, last);
    let slot = cx.guard(d, "sequence starts are no rows in order");
    d.b.check(holds, inside, slot);
    [start, end]
}
