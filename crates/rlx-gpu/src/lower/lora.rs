//! Linear layers whose rows may each have a low-rank update: one launch multiplies every row by its own adapter's first factor, one by
//! its second, and the layer's products add what that gives.

use super::elementwise::map;
use super::linear::{GpuLinear, Update, layer};
use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand, Room};
use crate::ir::{Arg, BinaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::lora_linear::LoraLinear;
use rlx_tensor::{DType, Shape};

/// Adapters at most: a kernel has a loop for each, of which a row runs its own.
const MAX_SLOTS: usize = 16;

/// `lora_linear`.
pub(super) struct GpuLoraLinear;

impl GpuOp for GpuLoraLinear {
    fn name(&self) -> &'static str {
        LoraLinear::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<LoraLinear>() else { return false };
        let float = |s: &&Shape| matches!(s.dtype(), DType::F32 | DType::F16 | DType::BF16);
        op.slots <= MAX_SLOTS
            && GpuLinear.supports(&op.linear(), &inputs[..op.slots_at()], outputs)
            && inputs[op.adapter_at(0)..].iter().all(float)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<LoraLinear>().ok_or_else(|| cx.mismatched())?.clone();
        let (mut from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        let mut room = Room::default();
        for adapter in &mut from[op.adapter_at(0)..] {
            // More are bound than a kernel may bind, if they are weights.
            if cx.is_weight(adapter) {
                let copy = room.take(DType::F32, &adapter.dims);
                map(cx, "copy", std::slice::from_ref(adapter), &copy, |_, v| v[0])?;
                *adapter = copy;
            }
        }
        let widths = (0..op.parts).map(|part| from[1 + part].dims[usize::from(op.transposed)].clone());
        let updates = Updates::new(&op, &from, widths.collect(), &mut room);
        updates.shrink(cx)?;
        updates.expand(cx)?;
        let update = Update { values: updates.values.clone(), slots: updates.slots.clone() };
        layer(cx, &op.linear(), &from[..op.slots_at()], &to, Some(&update), &mut room)?;
        cx.scratch.push(room.words());
        Ok(())
    }
}

/// The operands of both launches.
struct Updates<'u> {
    op: &'u LoraLinear,
    x: Operand,
    slots: Operand,
    scales: Operand,
    adapters: &'u [Operand],
    /// Columns of each part.
    widths: Vec<Amount>,
    /// `[rows, parts, ranks]`
    inner: Operand,
    /// `[rows, columns of all parts]`
    values: Operand,
}

/// What a row's adapter is, in all lanes alike, and its factors.
struct Row {
    row: Value,
    slot: Value,
    factors: Vec<ViewId>,
    ranks: Vec<Arg>,
    scales: ViewId,
}

impl<'u> Updates<'u> {
    fn new(op: &'u LoraLinear, from: &'u [Operand], widths: Vec<Amount>, room: &mut Room) -> Self {
        let (x, adapters) = (from[0].rows(), &from[op.adapter_at(0)..]);
        let rows = x.dims[0].clone();
        let sum = |all: &[Amount]| all.iter().fold(Amount::Known(0), |sum, n| Amount::sum(&sum, n));
        let ranks: Vec<Amount> = adapters.iter().map(|a| a.dims[0].clone()).collect();
        let inner = room.take(DType::F32, &[rows.clone(), Amount::Known(op.parts), sum(&ranks)]);
        let values = room.take(DType::F32, &[rows, sum(&widths)]);
        let (slots, scales) = (from[op.slots_at()].clone(), from[op.slots_at() + 1].clone());
        Self { op, x, slots, scales, adapters, widths, inner, values }
    }

    fn row(&self, d: &mut Draft<'_>, row: Value, inside: Value) -> Row {
        let slots = d.read(&self.slots);
        let none = d.b.int(-1);
        let slot = d.b.load(slots, &[row], Some(inside));
        let slot = d.b.select(inside, slot, none);
        // The same in every lane, which the fold makes known.
        let slot = d.b.fold(BinaryFn::Max, slot);
        let factors = self.adapters.iter().map(|adapter| d.read(adapter)).collect();
        let ranks = self.adapters.iter().map(|adapter| d.size(&adapter.dims[0])).collect();
        Row { row, slot, factors, ranks, scales: d.read(&self.scales) }
    }

    /// Of each part's numbers the one of a part.
    fn of_part(&self, d: &mut Draft<'_>, part: Value, numbers: &[usize]) -> Value {
        let first = d.b.int(numbers[0] as i32);
        numbers.iter().enumerate().skip(1).fold(first, |found, (at, &number)| {
            let (at, number) = (d.b.int(at as i32), d.b.int(number as i32));
            let own = d.b.binary(BinaryFn::Equal, part, at);
            d.b.select(own, number, found)
        })
    }

    /// A part's scale in an adapter, and whether the adapter changes the part.
    fn scale(&self, d: &mut Draft<'_>, row: &Row, slot: usize, part: Value, mask: Value) -> (Value, Value) {
        let site = self.of_part(d, part, &self.op.sites);
        let sites = d.size(&self.scales.dims[1]);
        let within = d.b.within(site, sites);
        let mask = d.b.and(mask, within);
        let (slot, zero) = (d.b.int(slot as i32), d.b.float(0.0));
        let slots = d.size(&self.scales.dims[0]);
        let known = d.b.within(slot, slots);
        let mask = d.b.and(mask, known);
        let scale = d.b.load(row.scales, &[slot, site], Some(mask));
        let none = d.b.binary(BinaryFn::Equal, scale, zero);
        (scale, d.b.unary(crate::ir::UnaryFn::Not, none))
    }

    /// As many turns as an adapter has ranks if it is the row's, none otherwise; `body` gets the rank.
    fn ranks(
        &self,
        d: &mut Draft<'_>,
        row: &Row,
        slot: usize,
        firsts: &[Value],
        body: impl FnOnce(&mut Draft<'_>, Value, &[Value]) -> Vec<Value>,
    ) -> Vec<Value> {
        let (number, zero, ranks) = (d.b.int(slot as i32), d.b.int(0), d.b.arg(row.ranks[slot]));
        let own = d.b.binary(BinaryFn::Equal, row.slot, number);
        let to = d.b.select(own, ranks, zero);
        d.repeat([zero, to], 1, firsts, body)
    }

    /// A program a row and part: the row times the first factor of its adapter, scaled.
    fn shrink(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let mut d = cx.draft("lora_shrink");
        let program = d.b.program();
        let grid = &self.inner.dims[..2];
        let (at, inside) = d.coordinates(program, grid);
        let row = self.row(&mut d, at[0], inside);
        let (lane, zero) = (d.b.lane(), d.b.int(0));
        let first = d.b.binary(BinaryFn::Equal, lane, zero);
        let lead = d.b.and(first, inside);
        let (slots, one) = (d.b.int(self.op.slots as i32), d.b.int(-1));
        let (below, above) = (d.b.less(row.slot, slots), d.b.binary(BinaryFn::LessEqual, one, row.slot));
        let holds = d.b.and(below, above);
        let guard = cx.guard(&mut d, "a row names an adapter that there is not");
        d.b.check(holds, lead, guard);
        let (x, inner) = (d.read(&self.x), d.write(&self.inner));
        let column = self.of_part(&mut d, at[1], &self.op.columns);
        let most = d.size(&self.inner.dims[2]);
        let nothing = d.b.float(0.0);
        for slot in 0..self.op.slots {
            let (scale, _) = self.scale(&mut d, &row, slot, at[1], inside);
            let width = d.size(&self.adapters[slot].dims[1]);
            self.ranks(&mut d, &row, slot, &[], |d, rank, _| {
                let there = d.b.within(rank, row.ranks[slot]);
                let sums = d.stride_over(&self.x.dims[1], &[nothing], |d, k, within, sums| {
                    let mask = d.b.and(inside, within);
                    let left = d.b.load(x, &[row.row, k], Some(mask));
                    let along = d.b.add(column, k);
                    let within = d.b.within(along, width);
                    let mask = d.b.and(mask, within);
                    let mask = d.b.and(mask, there);
                    let right = d.b.load(row.factors[slot], &[rank, along], Some(mask));
                    vec![d.b.fma(left, right, sums[0])]
                });
                let sum = d.b.fold(BinaryFn::Add, sums[0]);
                let y = d.b.mul(sum, scale);
                let within = d.b.within(rank, most);
                let writer = d.b.and(lead, within);
                d.b.store(inner, &[row.row, at[1], rank], y, Some(writer));
                Vec::new()
            });
        }
        cx.launch(d, Amount::product(grid))
    }

    /// A program a row and [`LANES`] columns: what the row's adapter makes of the inner products.
    fn expand(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let mut d = cx.draft("lora_expand");
        let program = d.b.program();
        let grid = [self.values.dims[0].clone(), self.values.dims[1].ceil_div(LANES as usize)];
        let (at, inside) = d.coordinates(program, &grid);
        let row = self.row(&mut d, at[0], inside);
        let (lane, lanes) = (d.b.lane(), d.b.int(LANES as i32));
        let first = d.b.mul(at[1], lanes);
        let column = d.b.add(first, lane);
        let extent = d.size(&self.values.dims[1]);
        let within = d.b.within(column, extent);
        let mask = d.b.and(inside, within);
        // The part of a column, and the column's place in it.
        let (mut part, mut own) = (d.b.int(0), column);
        let mut start = Amount::Known(0);
        for (number, width) in self.widths.iter().enumerate().take(self.op.parts - 1) {
            start = Amount::sum(&start, width);
            let begin = d.size(&start);
            let (begin, number) = (d.b.arg(begin), d.b.int(number as i32 + 1));
            let behind = d.b.binary(BinaryFn::LessEqual, begin, column);
            let place = d.b.sub(column, begin);
            (part, own) = (d.b.select(behind, number, part), d.b.select(behind, place, own));
        }
        let k = d.size(&self.x.dims[1]);
        let k = d.b.arg(k);
        let factors = self.of_part(&mut d, part, &self.op.columns);
        let along = d.b.add(factors, k);
        let along = d.b.add(along, own);
        let (inner, write) = (d.read(&self.inner), d.write(&self.values));
        let (parts, most) = (d.size(&self.inner.dims[1]), d.size(&self.inner.dims[2]));
        let known = d.b.within(part, parts);
        let mut sum = d.b.float(0.0);
        for slot in 0..self.op.slots {
            let (_, changes) = self.scale(&mut d, &row, slot, part, mask);
            let width = d.size(&self.adapters[slot].dims[1]);
            let within = d.b.within(along, width);
            let sums = self.ranks(&mut d, &row, slot, &[sum], |d, rank, sums| {
                let (there, one) = (d.b.within(rank, row.ranks[slot]), d.b.within(rank, most));
                let mask = [changes, known, within, there, one].iter().fold(mask, |m, &c| d.b.and(m, c));
                let left = d.b.load(inner, &[row.row, part, rank], Some(mask));
                let right = d.b.load(row.factors[slot], &[rank, along], Some(mask));
                vec![d.b.fma(left, right, sums[0])]
            });
            sum = sums[0];
        }
        d.b.store(write, &[row.row, column], sum, Some(mask));
        cx.launch(d, Amount::product(&grid))
    }
}
