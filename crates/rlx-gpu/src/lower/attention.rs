//! Attention: a program for one head of one row, which keeps a running maximum and sum over the keys (as Milakov and Gimelshein, 2018),
//! after a launch that appends the run's keys and values to the cache, if there is one.

use super::elementwise::tanh;
use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand, element};
use crate::ir::{BinaryFn, UnaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::attention::{Attention, BLOCK};
use rlx_tensor::Shape;

/// Elements of a head at most: each lane keeps one in so many.
const MAX_HEAD: usize = 8 * LANES as usize;
const BLOCK_BITS: i32 = BLOCK.trailing_zeros() as i32;

/// `attention`.
pub(super) struct GpuAttention;

/// The operands of a step.
struct Parts<'o> {
    op: &'o Attention,
    from: &'o [Operand],
}

/// Views of the cache.
struct Cache {
    table: ViewId,
    keys: ViewId,
    values: ViewId,
    width: Amount,
    blocks: Amount,
}

/// Where a row's sequence lies; every value is the same in all lanes.
struct Sequence {
    number: Value,
    start: Value,
    end: Value,
    past: Value,
}

impl GpuOp for GpuAttention {
    fn name(&self) -> &'static str {
        Attention::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let fits = op.as_any().downcast_ref::<Attention>().is_some_and(|a| a.head_dim <= MAX_HEAD);
        fits && inputs.iter().chain(outputs).all(|s| element(s.dtype()).is_some())
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Attention>().ok_or_else(|| cx.mismatched())?.clone();
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        let parts = Parts { op: &op, from: &from };
        if op.cache {
            parts.append(cx)?;
        }
        parts.attend(cx, &to)
    }
}

fn heads(operand: &Operand, heads: usize, dim: usize) -> Operand {
    operand.split_last(heads, Amount::Known(dim))
}

impl Parts<'_> {
    fn rows(&self) -> Amount {
        self.from[0].dims[0].clone()
    }

    /// The cache's views; `write` chooses what may be done with keys and values.
    fn cache(&self, d: &mut Draft<'_>, write: bool) -> Option<Cache> {
        let at = self.op.past_at()?;
        let (table, keys, values) = (&self.from[at + 1], &self.from[at + 2], &self.from[at + 3]);
        let (width, blocks) = (table.dims[1].clone(), keys.dims[0].clone());
        let table = d.read(table);
        let (keys, values) =
            if write { (d.write(keys), d.write(values)) } else { (d.read(keys), d.read(values)) };
        Some(Cache { table, keys, values, width, blocks })
    }

    /// The sequence of a row, found among the starts.
    fn sequence(&self, cx: &mut LowerCx<'_>, d: &mut Draft<'_>, row: Value, inside: Value) -> Sequence {
        let starts = d.read(&self.from[3]);
        let count = d.size(&self.from[3].dims[0]);
        let rows = d.size(&self.rows());
        let (zero, one) = (d.b.int(0), d.b.int(1));
        let (end, rows) = (d.b.arg(count), d.b.arg(rows));
        let found = d.repeat([zero, end], 1, &[zero, zero, rows], |d, at, carried| {
            let start = d.b.load(starts, &[at], None);
            let begun = d.b.binary(BinaryFn::LessEqual, start, row);
            let next = d.b.add(carried[0], one);
            let number = d.b.select(begun, next, carried[0]);
            let latest = d.b.binary(BinaryFn::Max, carried[1], start);
            let first = d.b.select(begun, latest, carried[1]);
            let nearest = d.b.binary(BinaryFn::Min, carried[2], start);
            vec![number, first, d.b.select(begun, carried[2], nearest)]
        });
        let limit = d.b.arg(count);
        let some = d.b.less(zero, found[0]);
        let known = d.b.less(found[0], limit);
        let holds = d.b.and(some, known);
        let slot = cx.guard(d, "sequence starts do not cover every row");
        d.b.check(holds, inside, slot);
        let number = d.b.sub(found[0], one);
        let past = match self.op.past_at() {
            Some(at) => {
                let past = d.read(&self.from[at]);
                let extent = d.size(&self.from[at].dims[0]);
                let there = d.b.within(number, extent);
                let value = d.b.load(past, &[number], Some(there));
                let valid = d.b.binary(BinaryFn::LessEqual, zero, value);
                let slot = cx.guard(d, "a past length is below 0");
                d.b.check(valid, inside, slot);
                value
            }
            None => zero,
        };
        Sequence { number, start: found[1], end: found[2], past }
    }

    /// The block of a position, and whether the cache has it.
    fn block(&self, d: &mut Draft<'_>, cache: &Cache, sequence: Value, position: Value) -> (Value, Value) {
        let at = self.op.past_at().unwrap_or_default();
        let (width, blocks) = (d.size(&cache.width), d.size(&cache.blocks));
        let sequences = d.size(&self.from[at + 1].dims[0]);
        let bits = d.b.int(BLOCK_BITS);
        let entry = d.b.binary(BinaryFn::ShiftRight, position, bits);
        let (row, column) = (d.b.within(sequence, sequences), d.b.within(entry, width));
        let mask = d.b.and(row, column);
        let block = d.b.load(cache.table, &[sequence, entry], Some(mask));
        let there = d.b.within(block, blocks);
        (block, d.b.and(mask, there))
    }

    /// Writes the run's keys and values behind the past: a lane an element.
    fn append(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let op = self.op;
        let mut d = cx.draft("attention_append");
        let k = heads(&self.from[1], op.kv_heads, op.head_dim);
        let v = heads(&self.from[2], op.kv_heads, op.head_dim);
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &k.dims);
        let row = at[0];
        let sequence = self.sequence(cx, &mut d, row, inside);
        let behind = d.b.sub(row, sequence.start);
        let position = d.b.add(sequence.past, behind);
        let Some(cache) = self.cache(&mut d, true) else { return Err(cx.mismatched()) };
        let (block, there) = self.block(&mut d, &cache, sequence.number, position);
        let slot = cx.guard(&mut d, "the block table has no room for the run's positions");
        d.b.check(there, inside, slot);
        let mask = d.b.and(inside, there);
        let low = d.b.int(BLOCK as i32 - 1);
        let within = d.b.binary(BinaryFn::And, position, low);
        let dtype = self.from[op.past_at().unwrap_or_default() + 2].dtype;
        let (keys, values) = (d.read(&k), d.read(&v));
        let key = d.b.load(keys, &at, Some(inside));
        let key = d.rounded(dtype, key);
        d.b.store(cache.keys, &[block, at[1], at[2], within], key, Some(mask));
        let value = d.b.load(values, &at, Some(inside));
        let value = d.rounded(dtype, value);
        d.b.store(cache.values, &[block, at[1], within, at[2]], value, Some(mask));
        cx.launch(d, Amount::product(&k.dims).ceil_div(LANES as usize))
    }

    fn attend(&self, cx: &mut LowerCx<'_>, to: &Operand) -> Result<(), BackendError> {
        let op = self.op;
        let mut d = cx.draft(if op.cache { "attention_paged" } else { "attention" });
        let grid = [self.rows(), Amount::Known(op.heads)];
        let program = d.b.program();
        let (at, inside) = d.coordinates(program, &grid);
        let sequence = self.sequence(cx, &mut d, at[0], inside);
        let to = heads(to, op.heads, op.head_dim);
        let write = d.write(&to);
        let keys = Keys::new(self, &mut d, [at[0], at[1]], inside, sequence);
        let outcome = keys.run(&mut d);
        let dim = d.size(&Amount::Known(op.head_dim));
        let (lane, zero) = (d.b.lane(), d.b.float(0.0));
        let (sum, sums) = (outcome[1], &outcome[2..]);
        let none = d.b.binary(BinaryFn::Equal, sum, zero);
        for (part, &weighted) in sums.iter().enumerate() {
            let offset = d.b.int((part * LANES as usize) as i32);
            let i = d.b.add(lane, offset);
            let there = d.b.within(i, dim);
            let mask = d.b.and(inside, there);
            let mean = d.b.div(weighted, sum);
            let y = d.b.select(none, zero, mean);
            d.b.store(write, &[at[0], at[1], i], y, Some(mask));
        }
        cx.launch(d, Amount::product(&grid))
    }
}

/// The keys and values that one head of one row sees.
struct Keys<'p> {
    parts: &'p Parts<'p>,
    query: ViewId,
    /// Keys and values of this run, where there is no cache.
    own: Option<[ViewId; 2]>,
    cache: Option<Cache>,
    mask: Option<ViewId>,
    row: Value,
    head: Value,
    kv_head: Value,
    inside: Value,
    sequence: Sequence,
    /// First key and the first that is not seen, the same in all lanes.
    range: [Value; 2],
}

impl<'p> Keys<'p> {
    fn new(
        parts: &'p Parts<'p>,
        d: &mut Draft<'_>,
        [row, head]: [Value; 2],
        inside: Value,
        sequence: Sequence,
    ) -> Self {
        let (op, from) = (parts.op, parts.from);
        let query = d.read(&heads(&from[0], op.heads, op.head_dim));
        let kv = |o: &Operand| heads(o, op.kv_heads, op.head_dim);
        let own = (!op.cache).then(|| [d.read(&kv(&from[1])), d.read(&kv(&from[2]))]);
        let cache = parts.cache(d, false);
        let mask = op.mask_at().map(|at| d.read(&from[at]));
        let b = &mut d.b;
        let group = b.int((op.heads / op.kv_heads) as i32);
        let kv_head = b.div(head, group);
        let behind = b.sub(row, sequence.start);
        let position = b.add(sequence.past, behind);
        let own_rows = b.sub(sequence.end, sequence.start);
        let count = b.add(sequence.past, own_rows);
        let (zero, one) = (b.int(0), b.int(1));
        let next = b.add(position, one);
        let last = if op.causal { b.binary(BinaryFn::Min, count, next) } else { count };
        let first = match op.window {
            Some(window) => {
                let window = b.int(i32::try_from(window).unwrap_or(i32::MAX));
                let first = b.sub(next, window);
                b.binary(BinaryFn::Max, first, zero)
            }
            None => zero,
        };
        // All lanes agree; a fold is what makes that known.
        let range = [b.fold(BinaryFn::Max, first), b.fold(BinaryFn::Max, last)];
        Keys { parts, query, own, cache, mask, row, head, kv_head, inside, sequence, range }
    }

    /// Where a key or value stands and whether it is there: a row of this run, or a block of the cache.
    fn place(&self, d: &mut Draft<'_>, position: Value) -> (Value, Value) {
        match &self.cache {
            Some(cache) => self.parts.block(d, cache, self.sequence.number, position),
            None => {
                let rows = d.size(&self.parts.rows());
                let row = d.b.add(self.sequence.start, position);
                let there = d.b.within(row, rows);
                (row, there)
            }
        }
    }

    fn key(&self, d: &mut Draft<'_>, place: Value, position: Value, i: Value, mask: Value) -> Value {
        match (&self.cache, &self.own) {
            (Some(cache), _) => {
                let low = d.b.int(BLOCK as i32 - 1);
                let within = d.b.binary(BinaryFn::And, position, low);
                d.b.load(cache.keys, &[place, self.kv_head, i, within], Some(mask))
            }
            (None, own) => {
                let view = own.map_or(self.query, |[keys, _]| keys);
                d.b.load(view, &[place, self.kv_head, i], Some(mask))
            }
        }
    }

    fn value(&self, d: &mut Draft<'_>, place: Value, position: Value, i: Value, mask: Value) -> Value {
        match (&self.cache, &self.own) {
            (Some(cache), _) => {
                let low = d.b.int(BLOCK as i32 - 1);
                let within = d.b.binary(BinaryFn::And, position, low);
                d.b.load(cache.values, &[place, self.kv_head, within, i], Some(mask))
            }
            (None, own) => {
                let view = own.map_or(self.query, |[_, values]| values);
                d.b.load(view, &[place, self.kv_head, i], Some(mask))
            }
        }
    }

    /// The score of the lane's key.
    fn score(&self, d: &mut Draft<'_>, position: Value, place: Value, there: Value) -> Value {
        let op = self.parts.op;
        let dim = d.size(&Amount::Known(op.head_dim));
        let (first, end, zero) = (d.b.int(0), d.b.arg(dim), d.b.float(0.0));
        let dot = d.repeat([first, end], 1, &[zero], |d, i, carried| {
            let q = d.b.load(self.query, &[self.row, self.head, i], Some(self.inside));
            let k = self.key(d, place, position, i, there);
            let product = d.b.mul(q, k);
            vec![d.b.add(carried[0], product)]
        });
        let scale = d.b.float(op.scale);
        let mut score = d.b.mul(dot[0], scale);
        if let Some(cap) = op.softcap {
            let cap = d.b.float(cap);
            let small = d.b.div(score, cap);
            let bent = tanh(d, small);
            score = d.b.mul(bent, cap);
        }
        if let (Some(view), Some(at)) = (self.mask, op.mask_at()) {
            let dims = &self.parts.from[at].dims;
            let zero = d.b.int(0);
            let batch = if dims[0].is_one() { zero } else { self.sequence.number };
            let head = if dims[1].is_one() { zero } else { self.head };
            let own_row = d.b.sub(self.row, self.sequence.start);
            let coordinates = [batch, head, own_row, position];
            let mut mask = there;
            for (&coordinate, extent) in coordinates.iter().zip(dims) {
                let extent = d.size(extent);
                let within = d.b.within(coordinate, extent);
                mask = d.b.and(mask, within);
            }
            let added = d.b.load(view, &coordinates, Some(mask));
            score = d.b.add(score, added);
        }
        score
    }

    /// The running maximum, the sum of powers, and the weighted sums of the lane's elements.
    fn run(&self, d: &mut Draft<'_>) -> Vec<Value> {
        let op = self.parts.op;
        let parts = op.head_dim.div_ceil(LANES as usize);
        let dim = d.size(&Amount::Known(op.head_dim));
        let kv_heads = d.size(&Amount::Known(op.kv_heads));
        let (lane, zero, lowest) = (d.b.lane(), d.b.float(0.0), d.b.float(f64::NEG_INFINITY));
        let known_head = d.b.within(self.kv_head, kv_heads);
        let inside = d.b.and(self.inside, known_head);
        let elements: Vec<(Value, Value)> = (0..parts)
            .map(|part| {
                let offset = d.b.int((part * LANES as usize) as i32);
                let i = d.b.add(lane, offset);
                let there = d.b.within(i, dim);
                (i, d.b.and(inside, there))
            })
            .collect();
        let firsts: Vec<Value> = [lowest, zero].into_iter().chain(std::iter::repeat_n(zero, parts)).collect();
        d.repeat(self.range, LANES, &firsts, |d, base, carried| {
            let position = d.b.add(base, lane);
            let seen = d.b.less(position, self.range[1]);
            let (place, exists) = self.place(d, position);
            let there = d.b.and(inside, seen);
            let there = d.b.and(there, exists);
            let score = self.score(d, position, place, there);
            let score = d.b.select(there, score, lowest);
            let chunk = d.b.fold(BinaryFn::Max, score);
            let most = d.b.binary(BinaryFn::Max, carried[0], chunk);
            let power = |d: &mut Draft<'_>, x: Value| {
                let below = d.b.sub(x, most);
                let power = d.b.unary(UnaryFn::Exp, below);
                let nothing = d.b.binary(BinaryFn::Equal, x, lowest);
                d.b.select(nothing, zero, power)
            };
            let (keep, weight) = (power(d, carried[0]), power(d, score));
            let kept = d.b.mul(carried[1], keep);
            let added = d.b.fold(BinaryFn::Add, weight);
            let sum = d.b.add(kept, added);
            let (weights, places) = (d.b.stage(weight), d.b.stage(place));
            let scaled: Vec<Value> = carried[2..].iter().map(|&s| d.b.mul(s, keep)).collect();
            let sums = self.weigh(d, base, [weights, places], &elements, &scaled);
            [vec![most, sum], sums].concat()
        })
    }

    /// Adds a chunk's values under their weights.
    fn weigh(
        &self,
        d: &mut Draft<'_>,
        base: Value,
        [weights, places]: [Value; 2],
        elements: &[(Value, Value)],
        sums: &[Value],
    ) -> Vec<Value> {
        let (first, end, zero) = (d.b.int(0), d.b.int(LANES as i32), d.b.float(0.0));
        let extent = match &self.cache {
            Some(cache) => cache.blocks.clone(),
            None => self.parts.rows(),
        };
        let extent = d.size(&extent);
        d.repeat([first, end], 1, sums, |d, j, carried| {
            let (weight, place) = (d.b.peek(weights, j), d.b.peek(places, j));
            let position = d.b.add(base, j);
            let none = d.b.binary(BinaryFn::Equal, weight, zero);
            let counts = d.b.unary(UnaryFn::Not, none);
            let known = d.b.within(place, extent);
            let counts = d.b.and(counts, known);
            let mut next = Vec::with_capacity(carried.len());
            for (&(i, there), &sum) in elements.iter().zip(carried) {
                let mask = d.b.and(there, counts);
                let value = self.value(d, place, position, i, mask);
                let product = d.b.mul(weight, value);
                next.push(d.b.add(sum, product));
            }
            next
        })
    }
}
