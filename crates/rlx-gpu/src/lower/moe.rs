//! Mixtures of gated experts: rows are sent to their experts on the device, brought into groups of one expert, and multiplied by all
//! experts' weights in one launch.

use super::blocks::is_blocks;
use super::classes::Class;
use super::elementwise::{activation, has_activation, map};
use super::grouped::{BLOCK, Grouped, Tables, blocks, few_of, stored};
use super::lines::offset;
use super::product::{Finish, Product, Rows};
use super::quantise::codes_of;
use super::schedules::Choice;
use super::topk::{SEEKERS, seek};
use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand, Room};
use crate::ir::{BinaryFn, Element, UnaryFn, Value};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::moe::Moe;
use rlx_tensor::{DType, Shape};

/// Lanes of a program that counts or places: as many places as it looks at.
const SORTERS: u32 = 256;
/// Experts at most: their counts stand in a tile.
const MAX_EXPERTS: usize = 1024;

/// `moe`.
pub(super) struct GpuMoe;

impl GpuOp for GpuMoe {
    fn name(&self) -> &'static str {
        Moe::NAME
    }

    /// Experts of one form: what the launches for all of them read is bound as one weight.
    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<Moe>() else { return false };
        let experts = inputs.get(2..).unwrap_or(&[]);
        let one = |s: &Shape| {
            let float = matches!(s.dtype(), DType::F32 | DType::F16 | DType::BF16);
            s.known_dims().is_some() && (float || is_blocks(s.dtype()))
        };
        let alike = experts.chunks(3).all(|own| {
            let matrices = own.iter().zip(experts);
            own.len() == 3 && own[0].dtype() == own[1].dtype() && matrices.into_iter().all(|(a, b)| *a == *b)
        });
        has_activation(op.activation)
            && alike
            && op.experts <= MAX_EXPERTS
            && experts.iter().take(3).all(|s| one(s))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Moe>().ok_or_else(|| cx.mismatched())?.clone();
        let from = cx.inputs(step);
        let (x, to) = (from[0].rows(), cx.operand(&step.outputs[0]).rows());
        let mut room = Room::default();
        let class = Class::of_experts(&from[2], op.experts, op.top_k, cx.choices.operands.of(&from[2..3]));
        cx.may_choose(class);
        let timed = cx.choices.timed(class);
        let mixture = Mixture::new(&op, &x, &from, timed, &mut room);
        let role = |role: usize| (0..op.experts).map(|e| from[op.expert_at(e) + role].clone()).collect();
        let roles: [Vec<Operand>; 3] = [role(0), role(1), role(2)];
        let mut stacks = Vec::with_capacity(3);
        for role in &roles {
            stacks.push(stacked(cx, role, &mut room)?);
        }
        mixture.route(cx, &from[1])?;
        mixture.group(cx)?;
        let experts = &from[2..];
        let codes = codes_of(cx, &x, &experts[..1], &mut room)?;
        let (mut begin, width) = (0, x.dims[1].clone());
        for ((gate, count), (up, _)) in stacks[0].iter().zip(&stacks[1]) {
            let bound = [gate.clone(), up.clone()];
            let (a, dims) = (Rows::Stored(&x), &mixture.inner.dims);
            let codes = codes.as_ref().filter(|_| super::dot::takes(&bound));
            let operands = cx.choices.operands.of(&bound);
            let product = Product { a, codes, b: &bound, dims, k: &width, operands };
            let (kind, inner) = (op.activation, &mixture.inner);
            let prepare = |d: &mut Draft<'_>| -> Box<Finish<'static>> {
                let write = d.write(inner);
                Box::new(move |d, at, mask, sums| {
                    let gate = activation(d, kind, sums[0]);
                    let y = d.b.mul(gate, sums[1]);
                    d.b.store(write, at, y, Some(mask));
                })
            };
            let grouped = mixture.grouped(product, Some(op.top_k), gate, [begin, *count]);
            grouped.launch(cx, "moe_gated", &mixture.rows, &mixture.tables, &prepare)?;
            begin += count;
        }
        let codes = codes_of(cx, &mixture.inner, &experts[2..3], &mut room)?;
        cx.scratch.push(room.words());
        let (mut begin, inner) = (0, mixture.inner.dims[1].clone());
        for (down, count) in &stacks[2] {
            let bound = std::slice::from_ref(down);
            let (a, dims) = (Rows::Stored(&mixture.inner), &mixture.y.dims);
            let codes = codes.as_ref().filter(|_| super::dot::takes(bound));
            let operands = cx.choices.operands.of(bound);
            let product = Product { a, codes, b: bound, dims, k: &inner, operands };
            let prepare = |d: &mut Draft<'_>| stored(d.write(&mixture.y));
            let grouped = mixture.grouped(product, None, down, [begin, *count]);
            grouped.launch(cx, "moe_down", &mixture.rows, &mixture.tables, &prepare)?;
            begin += count;
        }
        mixture.combine(cx, &to)
    }
}

/// Matrices of one form as lines of one operand, in as few as bindings hold, each with how many it has. What is no param is copied.
fn stacked(
    cx: &mut LowerCx<'_>,
    matrices: &[Operand],
    room: &mut Room,
) -> Result<Vec<(Operand, usize)>, BackendError> {
    if let Some(stacks) = cx.stacks(matrices) {
        return Ok(stacks);
    }
    let (first, count) = (&matrices[0], matrices.len());
    let dims = [Amount::product(&[Amount::Known(count), first.dims[0].clone()]), first.dims[1].clone()];
    let stack = room.take(DType::F32, &dims);
    let each = Amount::product(&first.dims);
    let mut place = stack.clone();
    for matrix in matrices {
        let to = Operand { dims: matrix.dims.clone(), ..place.clone() };
        map(cx, "copy", std::slice::from_ref(matrix), &to, |_, v| v[0])?;
        place = place.shifted(&each);
    }
    Ok(vec![(stack, count)])
}

/// The operands of a mixture's launches.
struct Mixture<'m> {
    op: &'m Moe,
    timed: Option<Choice>,
    rows: Amount,
    /// `[places]`, a row's one after another: what experts count for.
    weights: Operand,
    /// `[places]`: the position of each.
    position: Operand,
    /// `[parts, experts]`: places of each expert in each part, then those in the parts before it.
    counts: Operand,
    /// `[experts]`: the first position of each.
    starts: Operand,
    tables: Tables,
    /// `[positions, inner]` and `[positions, width]`.
    inner: Operand,
    y: Operand,
}

impl<'m> Mixture<'m> {
    fn new(op: &'m Moe, x: &Operand, from: &[Operand], timed: Option<Choice>, room: &mut Room) -> Self {
        let rows = x.dims[0].clone();
        let places = Amount::product(&[rows.clone(), Amount::Known(op.top_k)]);
        let blocks = blocks(&places, op.experts);
        let mut table = |dims: &[Amount]| room.take(DType::I32, dims);
        let of_places = std::slice::from_ref(&places);
        let of_blocks = std::slice::from_ref(&blocks);
        let experts = Amount::Known(op.experts);
        let tables = Tables {
            chosen: table(of_places),
            sorted: table(of_places),
            blocks: [table(of_blocks), table(of_blocks), table(of_blocks)],
        };
        let position = table(of_places);
        let counts = table(&[places.ceil_div(SORTERS as usize), experts.clone()]);
        let starts = table(&[experts]);
        let mut floats = |dims: &[Amount]| room.take(DType::F32, dims);
        let inner = floats(&[places.clone(), from[op.expert_at(0)].dims[0].clone()]);
        let y = floats(&[places.clone(), x.dims[1].clone()]);
        let weights = floats(of_places);
        Self { op, timed, rows, weights, position, counts, starts, tables, inner, y }
    }

    fn places(&self) -> &Amount {
        &self.weights.dims[0]
    }

    fn grouped<'g>(
        &self,
        product: Product<'g>,
        shared: Option<usize>,
        stack: &Operand,
        [begin, count]: [usize; 2],
    ) -> Grouped<'g> {
        let lines = match stack.dims[0] {
            Amount::Known(lines) => lines / count.max(1),
            _ => 0,
        };
        Grouped { product, shared, lines, matrices: [begin, count], timed: self.timed }
    }

    /// A program a row: what each of its experts counts for, the most probable first.
    fn route(&self, cx: &mut LowerCx<'_>, logits: &Operand) -> Result<(), BackendError> {
        let mut d = cx.draft_of("moe_route", SEEKERS);
        let program = d.b.program();
        let (at, inside) = d.coordinates(program, std::slice::from_ref(&self.rows));
        let row = at[0];
        let (read, weights, chosen) = (d.read(logits), d.write(&self.weights), d.write(&self.tables.chosen));
        let extent = d.size(&Amount::Known(self.op.experts));
        let load = |d: &mut Draft<'_>, expert: Value| {
            let within = d.b.within(expert, extent);
            let mask = d.b.and(inside, within);
            (d.b.load(read, &[row, expert], Some(mask)), mask)
        };
        let (zero, lane, end, lowest) =
            (d.b.int(0), d.b.lane(), d.b.arg(extent), d.b.float(f64::NEG_INFINITY));
        let most = d.repeat([zero, end], SEEKERS, &[lowest], |d, first, most| {
            let expert = d.b.add(first, lane);
            let (x, mask) = load(d, expert);
            let x = d.b.select(mask, x, lowest);
            vec![d.b.binary(BinaryFn::Max, most[0], x)]
        });
        let most = d.b.fold(BinaryFn::Max, most[0]);
        let power = |d: &mut Draft<'_>, x: Value| {
            let below = d.b.sub(x, most);
            d.b.unary(UnaryFn::Exp, below)
        };
        let nothing = d.b.float(0.0);
        let total = d.repeat([zero, end], SEEKERS, &[nothing], |d, first, total| {
            let expert = d.b.add(first, lane);
            let (x, mask) = load(d, expert);
            let power = power(d, x);
            let power = d.b.select(mask, power, nothing);
            vec![d.b.add(total[0], power)]
        });
        let total = d.b.fold(BinaryFn::Add, total[0]);
        let turns = d.b.int(self.op.top_k as i32);
        let places = d.size(self.places());
        seek(&mut d, [zero, end], turns, &load, &|d, [turn, expert, x], _| {
            let zero = d.b.int(0);
            let first = d.b.binary(BinaryFn::Equal, lane, zero);
            let each = d.b.int(self.op.top_k as i32);
            let place = d.b.mul(row, each);
            let place = d.b.add(place, turn);
            let within = d.b.within(place, places);
            let writer = d.b.and(first, within);
            let writer = d.b.and(writer, inside);
            let weight = power(d, x);
            let weight = d.b.div(weight, total);
            d.b.store(weights, &[place], weight, Some(writer));
            d.b.store(chosen, &[place], expert, Some(writer));
        });
        cx.launch(d, self.rows.clone())
    }

    /// Positions of places in the order of experts, and the blocks that they fill. Few rows need none.
    fn group(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let parts = self.counts.dims[0].clone();
        let Some(programs) = self.rows.when(few_of(self.timed) + 1, usize::MAX, parts) else { return Ok(()) };
        self.count(cx, programs.clone())?;
        self.start(cx)?;
        self.place(cx, programs)
    }

    /// The lane's place in a program of [`SORTERS`], whether it is one, and its expert, which other lanes may look at.
    fn own_place(&self, d: &mut Draft<'_>) -> (Value, Value, Value, Value) {
        let (program, lane, lanes) = (d.b.program(), d.b.lane(), d.b.int(SORTERS as i32));
        let first = d.b.mul(program, lanes);
        let place = d.b.add(first, lane);
        let extent = d.size(self.places());
        let there = d.b.within(place, extent);
        let view = d.read(&self.tables.chosen);
        let (expert, none) = (d.b.load(view, &[place], Some(there)), d.b.int(-1));
        let expert = d.b.select(there, expert, none);
        (place, there, expert, d.b.stage(expert))
    }

    /// How many places of each expert a part has: a lane an expert.
    fn count(&self, cx: &mut LowerCx<'_>, programs: Amount) -> Result<(), BackendError> {
        let mut d = cx.draft_of("moe_count", SORTERS);
        let (.., staged) = self.own_place(&mut d);
        let write = d.write(&self.counts);
        let (parts, experts) = (d.size(&self.counts.dims[0]), d.size(&self.counts.dims[1]));
        let (program, lane) = (d.b.program(), d.b.lane());
        let (zero, one, lanes, end) = (d.b.int(0), d.b.int(1), d.b.int(SORTERS as i32), d.b.arg(experts));
        let known = d.b.within(program, parts);
        d.repeat([zero, end], SORTERS, &[], |d, first, _| {
            let own = d.b.add(first, lane);
            let count = d.repeat([zero, lanes], 1, &[zero], |d, other, count| {
                let other = d.b.peek(staged, other);
                let same = d.b.binary(BinaryFn::Equal, other, own);
                let more = d.b.select(same, one, zero);
                vec![d.b.add(count[0], more)]
            });
            let within = d.b.within(own, experts);
            let mask = d.b.and(known, within);
            d.b.store(write, &[program, own], count[0], Some(mask));
            Vec::new()
        });
        cx.launch(d, programs)
    }

    /// One program: how many places of an expert the parts before each have, where each expert's positions begin, and its blocks.
    fn start(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let from = few_of(self.timed) + 1;
        let Some(programs) = self.rows.when(from, usize::MAX, Amount::Known(1)) else { return Ok(()) };
        let mut d = cx.draft_of("moe_starts", SORTERS);
        let slots = (self.op.experts as u32).next_multiple_of(SORTERS);
        let tile = d.b.tile(Element::I32, slots);
        let counts = d.view(&self.counts, crate::ir::Access::Update);
        let starts = d.write(&self.starts);
        let (parts, experts) = (d.size(&self.counts.dims[0]), d.size(&self.counts.dims[1]));
        let (program, lane, zero) = (d.b.program(), d.b.lane(), d.b.int(0));
        let only = d.b.binary(BinaryFn::Equal, program, zero);
        let (all_parts, all_experts) = (d.b.arg(parts), d.b.arg(experts));
        // Lanes put words that their numbers alone decide, so turns are written out.
        let rounds: Vec<Value> =
            (0..slots / SORTERS).map(|round| offset(&mut d, lane, round * SORTERS)).collect();
        for &own in &rounds {
            let within = d.b.within(own, experts);
            let mask = d.b.and(only, within);
            let total = d.repeat([zero, all_parts], 1, &[zero], |d, part, total| {
                let count = d.b.load(counts, &[part, own], Some(mask));
                d.b.store(counts, &[part, own], total[0], Some(mask));
                vec![d.b.add(total[0], count)]
            });
            let total = d.b.select(mask, total[0], zero);
            d.b.put(tile, own, &[total]);
        }
        d.b.barrier();
        let block = d.b.int(BLOCK as i32);
        let padded = d.b.int(BLOCK as i32 - 1);
        let filled = |d: &mut Draft<'_>, count: Value| {
            let up = d.b.add(count, padded);
            d.b.div(up, block)
        };
        for &own in &rounds {
            let first = d.repeat([zero, all_experts], 1, &[zero], |d, expert, first| {
                let count = d.b.take(tile, expert, 1)[0];
                let before = d.b.less(expert, own);
                let more = d.b.select(before, count, zero);
                vec![d.b.add(first[0], more)]
            });
            let within = d.b.within(own, experts);
            let mask = d.b.and(only, within);
            d.b.store(starts, &[own], first[0], Some(mask));
        }
        let views = self.tables.blocks.each_ref().map(|table| d.write(table));
        let table = &self.tables.blocks[0].dims[0];
        let (extent, none) = (d.size(table), d.b.int(-1));
        let end = d.b.arg(extent);
        d.repeat([zero, end], SORTERS, &[], |d, first, _| {
            let own = d.b.add(first, lane);
            // Carried: the blocks and positions before an expert, and what the own block is.
            let found =
                d.repeat([zero, all_experts], 1, &[zero, zero, none, zero, zero], |d, expert, so_far| {
                    let count = d.b.take(tile, expert, 1)[0];
                    let blocks = filled(d, count);
                    let behind = d.b.add(so_far[0], blocks);
                    let after = d.b.add(so_far[1], count);
                    let from = d.b.binary(BinaryFn::LessEqual, so_far[0], own);
                    let to = d.b.less(own, behind);
                    let mine = d.b.and(from, to);
                    let number = d.b.sub(own, so_far[0]);
                    let start = d.b.mul(number, block);
                    let start = d.b.add(so_far[1], start);
                    let full = d.b.add(start, block);
                    let last = d.b.binary(BinaryFn::Min, full, after);
                    let own = [expert, start, last].into_iter().zip(&so_far[2..]);
                    let own: Vec<Value> = own.map(|(new, &old)| d.b.select(mine, new, old)).collect();
                    [vec![behind, after], own].concat()
                });
            let within = d.b.within(own, extent);
            let mask = d.b.and(only, within);
            for (&view, &value) in views.iter().zip(&found[2..]) {
                d.b.store(view, &[own], value, Some(mask));
            }
            Vec::new()
        });
        cx.launch(d, programs)
    }

    /// The position of each place, and the place at each position.
    fn place(&self, cx: &mut LowerCx<'_>, programs: Amount) -> Result<(), BackendError> {
        let mut d = cx.draft_of("moe_place", SORTERS);
        let (place, there, expert, staged) = self.own_place(&mut d);
        let (counts, starts) = (d.read(&self.counts), d.read(&self.starts));
        let (position, sorted) = (d.write(&self.position), d.write(&self.tables.sorted));
        let (parts, experts) = (d.size(&self.counts.dims[0]), d.size(&self.counts.dims[1]));
        let (program, lane) = (d.b.program(), d.b.lane());
        let (zero, one, lanes) = (d.b.int(0), d.b.int(1), d.b.int(SORTERS as i32));
        let earlier = d.repeat([zero, lanes], 1, &[zero], |d, other, count| {
            let own = d.b.peek(staged, other);
            let same = d.b.binary(BinaryFn::Equal, own, expert);
            let before = d.b.less(other, lane);
            let counts = d.b.and(same, before);
            let more = d.b.select(counts, one, zero);
            vec![d.b.add(count[0], more)]
        });
        let (known, routed) = (d.b.within(program, parts), d.b.within(expert, experts));
        let mask = d.b.and(known, routed);
        let mask = d.b.and(mask, there);
        let before = d.b.load(counts, &[program, expert], Some(mask));
        let start = d.b.load(starts, &[expert], Some(mask));
        let at = d.b.add(start, before);
        let at = d.b.add(at, earlier[0]);
        d.b.store(position, &[place], at, Some(mask));
        let places = d.size(self.places());
        let within = d.b.within(at, places);
        let mask = d.b.and(mask, within);
        d.b.store(sorted, &[at], place, Some(mask));
        cx.launch(d, programs)
    }

    /// A lane an element: what a row's experts give, weighted, from the most probable down.
    fn combine(&self, cx: &mut LowerCx<'_>, to: &Operand) -> Result<(), BackendError> {
        let total = Amount::product(&to.dims).ceil_div(LANES as usize);
        let few = few_of(self.timed);
        for (from, most) in [(0, few), (few + 1, usize::MAX)] {
            let programs = self.rows.when(from, most, total.clone()).filter(|_| most > 0);
            let Some(programs) = programs else { continue };
            let mut d = cx.draft("moe_combine");
            let linear = d.linear();
            let (at, inside) = d.coordinates(linear, &to.dims);
            let (weights, y) = (d.read(&self.weights), d.read(&self.y));
            let positions = (from > 0).then(|| d.read(&self.position));
            let (write, places) = (d.write(to), d.size(self.places()));
            let (zero, end, none) = (d.b.int(0), d.b.int(self.op.top_k as i32), d.b.float(0.0));
            let first = d.b.mul(at[0], end);
            let weight = |d: &mut Draft<'_>, rank: Value| {
                let place = d.b.add(first, rank);
                let within = d.b.within(place, places);
                let mask = d.b.and(inside, within);
                (d.b.load(weights, &[place], Some(mask)), place, mask)
            };
            let sum = if self.op.renormalize {
                d.repeat([zero, end], 1, &[none], |d, rank, sum| {
                    let (weight, ..) = weight(d, rank);
                    vec![d.b.add(sum[0], weight)]
                })[0]
            } else {
                d.b.float(1.0)
            };
            let sums = d.repeat([zero, end], 1, &[none], |d, rank, sums| {
                let (weight, place, mask) = weight(d, rank);
                let weight = if self.op.renormalize { d.b.div(weight, sum) } else { weight };
                let position = match positions {
                    Some(view) => d.b.load(view, &[place], Some(mask)),
                    None => place,
                };
                let within = d.b.within(position, places);
                let mask = d.b.and(mask, within);
                let y = d.b.load(y, &[position, at[1]], Some(mask));
                vec![d.b.fma(weight, y, sums[0])]
            });
            d.b.store(write, &at, sums[0], Some(inside));
            cx.launch(d, programs)?;
        }
        Ok(())
    }
}
