//! `topk`: the largest elements of a line, largest first, the first of equal ones first.

use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand, computes};
use crate::ir::{Access, Arg, BinaryFn, Element, UnaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::topk::TopK;
use rlx_tensor::{DType, Shape};

/// Elements from which a program seeks one after another, reading its line once for each, rather than a lane counting for each element.
const LONG: usize = 256;
/// Lanes of a program that seeks.
pub(super) const SEEKERS: u32 = 256;

/// Elements of a line that a program looks at where several share it.
const SLICE: usize = 4096;
const _: () = assert!(SLICE.is_multiple_of(SEEKERS as usize));
/// Indices below this are floats.
const EXACT: usize = 1 << 24;

pub(super) struct GpuTopK;

impl GpuOp for GpuTopK {
    fn name(&self) -> &'static str {
        TopK::NAME
    }

    fn supports(&self, _op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        computes(inputs, outputs)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let (from, to) = (cx.operand(&step.inputs[0]), cx.outputs(step));
        match from.dims.last() {
            Some(Amount::Known(n)) if *n < LONG => count(cx, &from, &to),
            Some(Amount::Known(n)) if (2 * SLICE..EXACT).contains(n) && from.dtype == DType::F32 => {
                seek_slices(cx, &from, &to, n.div_ceil(SLICE))
            }
            _ => seek_line(cx, &from, &to),
        }
    }
}

/// A number that orders as the element does: NaN is the largest, and zeros are equal.
fn key(d: &mut Draft<'_>, x: Value) -> Value {
    if d.b.ty(x).element != Element::F32 {
        return x;
    }
    let (none, zero, low, most) = (d.b.int(0), d.b.float(0.0), d.b.int(i32::MAX), d.b.int(i32::MAX));
    let is_zero = d.b.binary(BinaryFn::Equal, x, zero);
    let plain = d.b.select(is_zero, zero, x);
    let bits = d.b.unary(UnaryFn::Bits, plain);
    let turned = d.b.binary(BinaryFn::Xor, bits, low);
    let negative = d.b.less(bits, none);
    let ordered = d.b.select(negative, turned, bits);
    let nan = d.b.unary(UnaryFn::IsNan, x);
    d.b.select(nan, most, ordered)
}

/// Finds elements one after another, the largest first: in each turn the lanes of a program look at all of `bounds` for the next after
/// the one found before. `load` gives an element and whether there is one, `found` gets turn, index, element and whether there was one.
pub(super) fn seek(
    d: &mut Draft<'_>,
    bounds: [Value; 2],
    turns: Value,
    load: &dyn Fn(&mut Draft<'_>, Value) -> (Value, Value),
    found: &dyn Fn(&mut Draft<'_>, [Value; 3], Value),
) {
    let (zero, lane) = (d.b.int(0), d.b.lane());
    let (highest, lowest, before, none) =
        (d.b.int(i32::MAX), d.b.int(i32::MIN), d.b.int(-1), d.b.int(i32::MAX));
    d.repeat([zero, turns], 1, &[highest, before], |d, turn, last| {
        let best = d.repeat(bounds, SEEKERS, &[lowest, none], |d, first, best| {
            let index = d.b.add(first, lane);
            let (x, mask) = load(d, index);
            let own = key(d, x);
            let below = d.b.less(own, last[0]);
            let same = d.b.binary(BinaryFn::Equal, own, last[0]);
            let behind = d.b.less(last[1], index);
            let tie = d.b.and(same, behind);
            let after = d.b.binary(BinaryFn::Or, below, tie);
            let larger = d.b.less(best[0], own);
            // The lowest key is an element's too: the first that is seen counts.
            let nothing = d.b.binary(BinaryFn::Equal, best[1], none);
            let better = d.b.binary(BinaryFn::Or, larger, nothing);
            let takes = d.b.and(after, better);
            let takes = d.b.and(takes, mask);
            vec![d.b.select(takes, own, best[0]), d.b.select(takes, index, best[1])]
        });
        let most = d.b.fold(BinaryFn::Max, best[0]);
        let holds = d.b.binary(BinaryFn::Equal, best[0], most);
        let own = d.b.select(holds, best[1], none);
        let index = d.b.fold(BinaryFn::Min, own);
        let (x, mask) = load(d, index);
        found(d, [turn, index, x], mask);
        vec![most, index]
    });
}

/// The element of a line at an index, and whether it has one.
fn element_of(
    d: &mut Draft<'_>,
    view: ViewId,
    lead: &[Value],
    index: Value,
    (inside, extent): (Value, Arg),
) -> (Value, Value) {
    let within = d.b.within(index, extent);
    let mask = d.b.and(inside, within);
    let at: Vec<Value> = lead.iter().copied().chain([index]).collect();
    (d.b.load(view, &at, Some(mask)), mask)
}

/// A program a line.
fn seek_line(cx: &mut LowerCx<'_>, from: &Operand, to: &[Operand]) -> Result<(), BackendError> {
    let rank = from.dims.len();
    let mut d = cx.draft_of("topk_seek", SEEKERS);
    let (lead, line) = from.dims.split_at(rank - 1);
    let program = d.b.program();
    let (at, inside) = d.coordinates(program, lead);
    let (read, writes) = (d.read(from), [d.write(&to[0]), d.write(&to[1])]);
    let (extent, k) = (d.size(&line[0]), d.size(&to[0].dims[rank - 1]));
    let (zero, end, turns) = (d.b.int(0), d.b.arg(extent), d.b.arg(k));
    let load = |d: &mut Draft<'_>, index: Value| element_of(d, read, &at, index, (inside, extent));
    seek(&mut d, [zero, end], turns, &load, &|d, [turn, index, x], mask| {
        let (lane, zero) = (d.b.lane(), d.b.int(0));
        let first = d.b.binary(BinaryFn::Equal, lane, zero);
        let writer = d.b.and(first, mask);
        let place: Vec<Value> = at.iter().copied().chain([turn]).collect();
        d.b.store(writes[0], &place, x, Some(writer));
        d.b.store(writes[1], &place, index, Some(writer));
    });
    cx.launch(d, Amount::product(lead))
}

/// A program a slice of a line, then one a line that seeks among what those found: equal elements stand in the order of their indices.
fn seek_slices(
    cx: &mut LowerCx<'_>,
    from: &Operand,
    to: &[Operand],
    slices: usize,
) -> Result<(), BackendError> {
    let rank = from.dims.len();
    let (lead, line) = from.dims.split_at(rank - 1);
    let count = to[0].dims[rank - 1].clone();
    let grid = [lead, &[Amount::Known(slices)]].concat();
    let dims = [grid.as_slice(), std::slice::from_ref(&count)].concat();
    let (origin, second) = (Amount::Known(0), Amount::product(&dims));
    cx.scratch.push(Amount::product(&[second.clone(), Amount::Known(2)]));
    let mut d = cx.draft_of("topk_slice", SEEKERS);
    let program = d.b.program();
    let (at, inside) = d.coordinates(program, &grid);
    let read = d.read(from);
    let writes = [&origin, &second].map(|base| d.scratch(&dims, base, Access::Write));
    let (extent, k) = (d.size(&line[0]), d.size(&count));
    let (size, end, turns) = (d.b.int(SLICE as i32), d.b.arg(extent), d.b.arg(k));
    let first = d.b.mul(at[rank - 1], size);
    let after = d.b.add(first, size);
    let to_end = d.b.binary(BinaryFn::Min, after, end);
    let load =
        |d: &mut Draft<'_>, index: Value| element_of(d, read, &at[..rank - 1], index, (inside, extent));
    seek(&mut d, [first, to_end], turns, &load, &|d, [turn, index, x], mask| {
        let (lane, zero, none) = (d.b.lane(), d.b.int(0), d.b.float(-1.0));
        let one = d.b.binary(BinaryFn::Equal, lane, zero);
        let writer = d.b.and(one, inside);
        let number = d.b.unary(UnaryFn::ToFloat, index);
        let number = d.b.select(mask, number, none);
        let place: Vec<Value> = at.iter().copied().chain([turn]).collect();
        d.b.store(writes[0], &place, x, Some(writer));
        d.b.store(writes[1], &place, number, Some(writer));
    });
    cx.launch(d, Amount::product(&grid))?;
    let found = Amount::product(&[Amount::Known(slices), count]);
    let dims = [lead, std::slice::from_ref(&found)].concat();
    let mut d = cx.draft_of("topk_slices", SEEKERS);
    let program = d.b.program();
    let (at, inside) = d.coordinates(program, lead);
    let [values, numbers] = [&origin, &second].map(|base| d.scratch(&dims, base, Access::Read));
    let writes = [d.write(&to[0]), d.write(&to[1])];
    let (extent, k) = (d.size(&found), d.size(&to[0].dims[rank - 1]));
    let (zero, end, turns) = (d.b.int(0), d.b.arg(extent), d.b.arg(k));
    let load = |d: &mut Draft<'_>, index: Value| {
        let (x, mask) = element_of(d, values, &at, index, (inside, extent));
        let (number, _) = element_of(d, numbers, &at, index, (inside, extent));
        let least = d.b.float(0.0);
        let there = d.b.binary(BinaryFn::LessEqual, least, number);
        (x, d.b.and(mask, there))
    };
    seek(&mut d, [zero, end], turns, &load, &|d, [turn, index, x], mask| {
        let (lane, zero) = (d.b.lane(), d.b.int(0));
        let (number, _) = element_of(d, numbers, &at, index, (mask, extent));
        let number = d.b.unary(UnaryFn::ToInt, number);
        let first = d.b.binary(BinaryFn::Equal, lane, zero);
        let writer = d.b.and(first, mask);
        let place: Vec<Value> = at.iter().copied().chain([turn]).collect();
        d.b.store(writes[0], &place, x, Some(writer));
        d.b.store(writes[1], &place, number, Some(writer));
    });
    cx.launch(d, Amount::product(lead))
}

/// A lane an element, which counts those that come before it.
fn count(cx: &mut LowerCx<'_>, from: &Operand, to: &[Operand]) -> Result<(), BackendError> {
    let rank = from.dims.len();
    let mut d = cx.draft("topk");
    let linear = d.linear();
    let (at, inside) = d.coordinates(linear, &from.dims);
    let (read, writes) = (d.read(from), [d.write(&to[0]), d.write(&to[1])]);
    let mine = d.b.load(read, &at, Some(inside));
    let position = at[rank - 1];
    let extent = d.size(&from.dims[rank - 1]);
    let (zero, one, end) = (d.b.int(0), d.b.int(1), d.b.arg(extent));
    let above = |d: &mut Draft<'_>, a: Value, b: Value| {
        let larger = d.b.less(b, a);
        if d.b.ty(a).element != Element::F32 {
            return larger;
        }
        let (a, b) = (d.b.unary(UnaryFn::IsNan, a), d.b.unary(UnaryFn::IsNan, b));
        let number = d.b.unary(UnaryFn::Not, b);
        let only = d.b.and(a, number);
        d.b.binary(BinaryFn::Or, larger, only)
    };
    let rank_of = d.repeat([zero, end], 1, &[zero], |d, index, carried| {
        let other: Vec<Value> = at[..rank - 1].iter().copied().chain([index]).collect();
        let other = d.b.load(read, &other, Some(inside));
        let (before, after) = (above(d, other, mine), above(d, mine, other));
        let same = d.b.unary(UnaryFn::Not, after);
        let earlier = d.b.less(index, position);
        let tie = d.b.and(same, earlier);
        let counts = d.b.binary(BinaryFn::Or, before, tie);
        let step = d.b.select(counts, one, zero);
        vec![d.b.add(carried[0], step)]
    });
    let k = d.size(&to[0].dims[rank - 1]);
    let within = d.b.within(rank_of[0], k);
    let mask = d.b.and(inside, within);
    let place: Vec<Value> = at[..rank - 1].iter().copied().chain([rank_of[0]]).collect();
    d.b.store(writes[0], &place, mine, Some(mask));
    d.b.store(writes[1], &place, position, Some(mask));
    cx.launch(d, Amount::product(&from.dims).ceil_div(LANES as usize))
}
