//! Attention over units of keys (as Dao et al., 2022): a program keeps some rows of the heads that share keys, and goes over the keys in
//! units of [`UNIT`] that begin at multiples of it, whatever the rows are. Of each unit a row takes its largest score, the sum of powers and
//! the weighted values, each in an order of its own, and adds them to what the units before gave. So a row has the same bits in every form
//! and next to any others. Values that are not finite spread within a unit.

use super::attention::{Cache, Parts, heads};
use super::cache;
use super::classes::Class;
use super::elementwise::tanh;
use super::schedules::{FEW, QUERIES};
use super::{Amount, Draft, LANES, LowerCx, Operand};
use crate::ir::{Access, BinaryFn, Element, TileId, UnaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx_graph::ops::attention::BLOCK;

/// Keys of a unit.
const UNIT: u32 = 2 * BLOCK as u32;
/// Partial sums of a unit's powers: key i is in part i mod this.
const PARTS: u32 = 16;
const _: () = assert!(BLOCK == LANES as usize);

/// What a program computes at once.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Rows times heads that it has room for: 4, 8 or 16.
    queries: u32,
    /// Heads of each row, which share keys.
    heads: u32,
    /// Rows.
    rows: u32,
}

impl Form {
    fn new(group: usize, head_dim: usize, rows: usize, most: usize) -> Self {
        let most = most.min(match head_dim {
            0..=128 => 16,
            129..=256 => 8,
            _ => 4,
        });
        let heads = group.min(most);
        let queries = (heads * rows).next_power_of_two().clamp(4, most);
        Form { queries: queries as u32, heads: heads as u32, rows: (queries / heads).min(rows) as u32 }
    }

    /// Programs for the heads of one key head.
    fn blocks(self, group: usize) -> usize {
        group.div_ceil(self.heads as usize)
    }
}

/// Rows times heads that programs for many rows take.
const MANY: usize = 16;
/// Rows of a sequence, on average, from which programs take several of them.
const LONG: usize = 4;

impl Parts<'_> {
    /// Adds the launches: for few rows programs for each unit; else programs of several rows where sequences are long, of one where they
    /// are short.
    pub fn launch(&self, cx: &mut LowerCx<'_>, to: &Operand) -> Result<(), BackendError> {
        let (group, dim) = (self.op.heads / self.op.kv_heads, self.op.head_dim);
        let name = if self.op.cache { "attention_paged" } else { "attention" };
        let compact = cx.choices.compact;
        let cache = self.op.past_at().map(|at| self.from[at + 2].dtype);
        let class = Class::of_attention(self.op, cache);
        cx.may_choose(class);
        let timed = cx.choices.timed(class);
        let few = timed.map_or(FEW, |choice| choice.few.min(FEW));
        if self.op.cache && !compact && few > 0 {
            self.launch_split(cx, few, to)?;
        }
        let sequences = Amount::Less(Box::new(self.from[3].dims[0].clone()), 1);
        let mean = Amount::Ratio(Box::new(self.rows()), Box::new(sequences));
        let widest = if compact { QUERIES[QUERIES.len() - 1] } else { QUERIES[0] };
        let most = timed.map_or(widest, |choice| QUERIES[choice.schedule.min(QUERIES.len() - 1)]);
        let (one, many) = (Form::new(group, dim, 1, widest), Form::new(group, dim, MANY, most));
        for (form, from, below) in [(one, 0, LONG), (many, LONG, usize::MAX)] {
            let blocks = Amount::Known(self.op.kv_heads * form.blocks(group));
            let grid = [self.rows().ceil_div(form.rows as usize), blocks];
            let programs = Amount::product(&grid);
            if form.rows == 1 && from > 0 && !compact {
                continue;
            }
            if compact && from == 0 {
                continue;
            }
            let alone = many.rows == 1 || compact;
            let least = if self.op.cache && !compact && few > 0 { few + 1 } else { 0 };
            let programs = if alone { Some(programs) } else { mean.when(from, below - 1, programs) };
            if let Some(programs) = programs.and_then(|p| self.rows().when(least, usize::MAX, p)) {
                let mut d = cx.draft(format!("{name}_{}rows", form.rows));
                let flash = Flash::new(self, &mut d, form, &grid);
                let outcome = flash.sums(cx, &mut d, None);
                flash.finish(&mut d, &outcome, to);
                cx.launch(d, programs)?;
            }
        }
        Ok(())
    }

    fn launch_split(&self, cx: &mut LowerCx<'_>, few: usize, to: &Operand) -> Result<(), BackendError> {
        let (op, Some(past)) = (self.op, self.op.past_at()) else { return Err(cx.mismatched()) };
        let (group, dim) = (op.heads / op.kv_heads, op.head_dim);
        let form = Form::new(group, dim, 1, QUERIES[0]);
        let units = self.from[past + 1].dims[1].ceil_div(UNIT as usize / BLOCK);
        let grid = [self.rows(), Amount::Known(op.kv_heads * form.blocks(group)), units.clone()];
        let Some(programs) = self.rows().when(0, few, Amount::product(&grid)) else { return Ok(()) };
        let lead = [Amount::Known(FEW), units, Amount::Known(op.heads)];
        let count = Amount::product(&lead);
        let of = |width: usize| [lead.as_slice(), &[Amount::Known(width)]].concat();
        let sums = [of(dim), of(2)];
        let second = Amount::product(&[count.clone(), Amount::Known(dim)]);
        let bases = [Amount::Known(0), second];
        cx.scratch.push(Amount::product(&[count, Amount::Known(dim + 2)]));
        let mut d = cx.draft("attention_unit");
        let flash = Flash::new(self, &mut d, form, &grid);
        let outcome = flash.sums(cx, &mut d, Some(flash.unit));
        let views = [0, 1].map(|i| d.scratch(&sums[i], &bases[i], Access::Write));
        flash.keep_apart(&mut d, &outcome, views);
        cx.launch(d, programs)?;
        let grid = [self.rows(), Amount::Known(op.heads)];
        let mut d = cx.draft("attention_units");
        let flash = Flash::new(self, &mut d, Form { queries: 4, heads: 1, rows: 1 }, &grid);
        let views = [0, 1].map(|i| d.scratch(&sums[i], &bases[i], Access::Read));
        flash.add_up(cx, &mut d, views, to);
        match self.rows().when(0, few, Amount::product(&grid)) {
            Some(programs) => cx.launch(d, programs),
            None => Ok(()),
        }
    }
}

/// The tiles of a program.
struct Tiles {
    /// `[head_dim][queries]`
    query: TileId,
    /// `[UNIT][queries]`: scores, then powers.
    score: TileId,
    /// `[PARTS][queries]`: largest scores, and sums of powers.
    most: TileId,
    sum: TileId,
    /// For each lane, what its query's sums so far are multiplied by, and those of the unit.
    keep: TileId,
    add: TileId,
}

/// A kernel being written.
struct Flash<'p> {
    parts: &'p Parts<'p>,
    form: Form,
    tiles: Tiles,
    query: ViewId,
    /// Keys and values of this run, where there is no cache.
    own: Option<[ViewId; 2]>,
    cache: Option<Cache>,
    mask: Option<ViewId>,
    starts: ViewId,
    past: Option<ViewId>,
    /// First row, key head and first head of the program.
    row: Value,
    kv_head: Value,
    head: Value,
    /// The unit that it is for, if there are programs for each.
    unit: Value,
    inside: Value,
}

/// A sequence as a program sees it.
struct Sequence {
    number: Value,
    start: Value,
    end: Value,
    past: Value,
    /// First key that some row sees, and the first that none does.
    range: [Value; 2],
}

impl<'p> Flash<'p> {
    fn new(parts: &'p Parts<'p>, d: &mut Draft<'_>, form: Form, grid: &[Amount]) -> Self {
        let (op, from) = (parts.op, parts.from);
        let program = d.b.program();
        let (at, inside) = d.coordinates(program, grid);
        let group = op.heads / op.kv_heads;
        let (blocks, each, shared) =
            (d.b.int(form.blocks(group) as i32), d.b.int(form.heads as i32), d.b.int(group as i32));
        let (kv_head, part) = (d.b.div(at[1], blocks), d.b.binary(BinaryFn::Rem, at[1], blocks));
        let (first, offset) = (d.b.mul(kv_head, shared), d.b.mul(part, each));
        let head = d.b.add(first, offset);
        let rows = d.b.int(form.rows as i32);
        let row = d.b.mul(at[0], rows);
        let query = d.read(&heads(&from[0], op.heads, op.head_dim));
        let kv = |o: &Operand| heads(o, op.kv_heads, op.head_dim);
        let own = (!op.cache).then(|| {
            let (k, v) = (kv(&from[1]), kv(&from[2]));
            let whole = op.head_dim % 4 == 0
                && k.base.is_multiple(4)
                && k.strides[..2].iter().all(|s| s.is_multiple(4));
            let keys = d.read(&k);
            if whole {
                d.b.widen(keys, 4);
            }
            [keys, d.read(&v)]
        });
        let cache = parts.cache(d, false);
        let mask = op.mask_at().map(|at| d.read(&from[at]));
        let (starts, past) = (d.read(&from[3]), op.past_at().map(|at| d.read(&from[at])));
        let depth = op.head_dim.next_multiple_of(16) as u32;
        let mut tile = |words: u32| d.b.tile(Element::F32, words);
        let q = form.queries;
        let tiles = Tiles {
            query: tile(depth * q),
            score: tile(UNIT * q),
            most: tile(PARTS * q),
            sum: tile(PARTS * q),
            keep: tile(LANES),
            add: tile(LANES),
        };
        let unit = at.get(2).copied().unwrap_or(at[0]);
        Flash { parts, form, tiles, query, own, cache, mask, starts, past, row, kv_head, head, unit, inside }
    }

    /// Parts of a head's elements, one of each in a lane.
    fn slices(&self) -> usize {
        self.parts.op.head_dim.div_ceil(LANES as usize)
    }

    /// The row and head of a query, and whether the program has it.
    fn whose(&self, d: &mut Draft<'_>, query: Value) -> (Value, Value, Value) {
        let op = self.parts.op;
        let (each, rows) = (d.b.int(self.form.heads as i32), d.b.int(self.form.rows as i32));
        let (down, across) = (d.b.div(query, each), d.b.binary(BinaryFn::Rem, query, each));
        let (row, head) = (d.b.add(self.row, down), d.b.add(self.head, across));
        let own = d.b.less(down, rows);
        let group = d.b.int((op.heads / op.kv_heads) as i32);
        let next = d.b.mul(self.kv_head, group);
        let next = d.b.add(next, group);
        let shared = d.b.less(head, next);
        let (extent, count) = (d.size(&self.parts.rows()), d.size(&Amount::Known(op.heads)));
        let mut there = d.b.and(self.inside, own);
        for condition in [shared, d.b.within(row, extent), d.b.within(head, count)] {
            there = d.b.and(there, condition);
        }
        (row, head, there)
    }

    /// Puts the queries, `[head_dim][queries]`.
    fn stage_queries(&self, d: &mut Draft<'_>) {
        let dim = self.parts.op.head_dim;
        let depth = dim.next_multiple_of(16) as u32;
        let (lane, extent) = (d.b.lane(), d.size(&Amount::Known(dim)));
        for round in 0..depth * self.form.queries / LANES {
            let offset = d.b.int((round * LANES) as i32);
            let number = d.b.add(lane, offset);
            let size = d.b.int(depth as i32);
            let (query, i) = (d.b.div(number, size), d.b.binary(BinaryFn::Rem, number, size));
            let (row, head, there) = self.whose(d, query);
            let within = d.b.within(i, extent);
            let mask = d.b.and(there, within);
            let value = d.b.load(self.query, &[row, head, i], Some(mask));
            let width = d.b.int(self.form.queries as i32);
            let at = d.b.mul(i, width);
            let at = d.b.add(at, query);
            d.b.put(self.tiles.query, at, &[value]);
        }
        d.b.barrier();
    }

    /// First and last sequence that the program's rows are of, the same in all lanes.
    fn sequences(&self, cx: &mut LowerCx<'_>, d: &mut Draft<'_>) -> [Value; 2] {
        let count = d.size(&self.parts.from[3].dims[0]);
        let last = self.last_row(d);
        let (zero, one, end) = (d.b.int(0), d.b.int(1), d.b.arg(count));
        let found = d.repeat([zero, end], 1, &[zero, zero], |d, at, carried| {
            let start = d.b.load(self.starts, &[at], None);
            let count = |d: &mut Draft<'_>, row: Value, so_far: Value| {
                let begun = d.b.binary(BinaryFn::LessEqual, start, row);
                let next = d.b.add(so_far, one);
                d.b.select(begun, next, so_far)
            };
            vec![count(d, self.row, carried[0]), count(d, last, carried[1])]
        });
        let (some, known) = (d.b.less(zero, found[0]), d.b.less(found[1], end));
        let holds = d.b.and(some, known);
        let slot = cx.guard(d, "sequence starts do not cover every row");
        d.b.check(holds, self.inside, slot);
        let first = d.b.sub(found[0], one);
        let after = d.b.binary(BinaryFn::Max, found[0], found[1]);
        [d.b.fold(BinaryFn::Max, first), d.b.fold(BinaryFn::Max, after)]
    }

    fn last_row(&self, d: &mut Draft<'_>) -> Value {
        let (rows, by, one) = (d.size(&self.parts.rows()), d.b.int(self.form.rows as i32), d.b.int(1));
        let rows = d.b.arg(rows);
        let after = d.b.add(self.row, by);
        let after = d.b.binary(BinaryFn::Min, after, rows);
        d.b.sub(after, one)
    }

    fn sequence(&self, cx: &mut LowerCx<'_>, d: &mut Draft<'_>, number: Value) -> Sequence {
        let op = self.parts.op;
        let count = d.size(&self.parts.from[3].dims[0]);
        let (zero, one) = (d.b.int(0), d.b.int(1));
        let next = d.b.add(number, one);
        let mut bound = |at: Value| {
            let within = d.b.within(at, count);
            let mask = d.b.and(self.inside, within);
            d.b.load(self.starts, &[at], Some(mask))
        };
        let (start, end) = (bound(number), bound(next));
        let past = match self.past.zip(op.past_at()) {
            Some((view, at)) => {
                let extent = d.size(&self.parts.from[at].dims[0]);
                let there = d.b.within(number, extent);
                let value = d.b.load(view, &[number], Some(there));
                let valid = d.b.binary(BinaryFn::LessEqual, zero, value);
                let slot = cx.guard(d, "a past length is below 0");
                d.b.check(valid, self.inside, slot);
                value
            }
            None => zero,
        };
        let last = self.last_row(d);
        let b = &mut d.b;
        let low = b.binary(BinaryFn::Max, self.row, start);
        let after = b.add(last, one);
        let high = b.binary(BinaryFn::Min, after, end);
        let (behind, before) = (b.sub(low, start), b.sub(high, start));
        let (lowest, highest) = (b.add(past, behind), b.add(past, before));
        let own = b.sub(end, start);
        let keys = b.add(past, own);
        let to = if op.causal { b.binary(BinaryFn::Min, keys, highest) } else { keys };
        let from = match op.window {
            Some(window) => {
                let window = b.int(i32::try_from(window).unwrap_or(i32::MAX));
                let next = b.add(lowest, one);
                let from = b.sub(next, window);
                b.binary(BinaryFn::Max, from, zero)
            }
            None => zero,
        };
        // All lanes agree; a fold is what makes that known.
        let range = [b.fold(BinaryFn::Max, from), b.fold(BinaryFn::Max, to)];
        Sequence { number, start, end, past, range }
    }

    /// Where the keys of a block stand, and whether it is there: a row of this run, or a block of the cache.
    fn place(&self, d: &mut Draft<'_>, sequence: &Sequence, position: Value) -> (Value, Value) {
        match &self.cache {
            Some(cache) => self.parts.block(d, cache, sequence.number, position),
            None => {
                let rows = d.size(&self.parts.rows());
                let row = d.b.add(sequence.start, position);
                let there = d.b.within(row, rows);
                (row, there)
            }
        }
    }

    /// Elements `i ..` of a key, four of them.
    fn key(&self, d: &mut Draft<'_>, place: Value, position: Value, i: Value, mask: Value) -> Vec<Value> {
        let extent = d.size(&Amount::Known(self.parts.op.head_dim));
        let own = self.own.map(|[keys, _]| keys);
        if let Some(keys) = own.filter(|&k| d.b.width(k) == 4) {
            let within = d.b.within(i, extent);
            let mask = d.b.and(mask, within);
            return d.b.load_wide(keys, &[place, self.kv_head, i], 4, Some(mask));
        }
        if let Some(cache) = self.cache.as_ref().filter(|_| self.parts.is_quantised()) {
            return self.coded_key(d, cache, [place, position, i], mask);
        }
        (0..4)
            .map(|by| {
                let by = d.b.int(by);
                let i = d.b.add(i, by);
                let within = d.b.within(i, extent);
                let mask = d.b.and(mask, within);
                match (&self.cache, own) {
                    (Some(cache), _) => {
                        let low = d.b.int(BLOCK as i32 - 1);
                        let within = d.b.binary(BinaryFn::And, position, low);
                        d.b.load(cache.keys, &[place, self.kv_head, i, within], Some(mask))
                    }
                    (None, own) => d.b.load(own.unwrap_or(self.query), &[place, self.kv_head, i], Some(mask)),
                }
            })
            .collect()
    }

    /// Elements `i ..` of a key of integers, four of them, which stand in one word.
    fn coded_key(
        &self,
        d: &mut Draft<'_>,
        cache: &Cache,
        [place, position, i]: [Value; 3],
        mask: Value,
    ) -> Vec<Value> {
        let low = d.b.int(BLOCK as i32 - 1);
        let own = d.b.binary(BinaryFn::And, position, low);
        let at = |word: Value| [place, self.kv_head, word, own];
        let dim = self.parts.op.head_dim;
        let (first, within) = cache::group_of(d, i);
        let (word, _) = cache::word_of(d, within);
        let word = d.b.add(first, word);
        let scale = cache::load(d, cache.keys, at, (first, dim), mask);
        let codes = cache::load(d, cache.keys, at, (word, dim), mask);
        let one = |byte: i32| {
            let byte = d.b.int(byte);
            cache::scaled(d, codes, byte, scale)
        };
        (0..4).map(one).collect()
    }

    /// An element of a value.
    fn value(&self, d: &mut Draft<'_>, view: ViewId, row: &[Value], i: Value, mask: Value) -> Value {
        if !self.parts.is_quantised() {
            let at: Vec<Value> = row.iter().copied().chain([i]).collect();
            return d.b.load(view, &at, Some(mask));
        }
        let at = |word: Value| [row[0], row[1], row[2], word];
        let dim = self.parts.op.head_dim;
        let (first, within) = cache::group_of(d, i);
        let (word, byte) = cache::word_of(d, within);
        let word = d.b.add(first, word);
        let scale = cache::load(d, view, at, (first, dim), mask);
        let codes = cache::load(d, view, at, (word, dim), mask);
        cache::scaled(d, codes, byte, scale)
    }

    /// Puts the scores of a unit: a lane has two keys and all queries.
    fn scores(&self, d: &mut Draft<'_>, sequence: &Sequence, base: Value) {
        let (dim, queries) = (self.parts.op.head_dim, self.form.queries);
        let kv_heads = d.size(&Amount::Known(self.parts.op.kv_heads));
        let known = d.b.within(self.kv_head, kv_heads);
        let inside = d.b.and(self.inside, known);
        let lane = d.b.lane();
        let keys: Vec<[Value; 3]> = (0..UNIT / LANES)
            .map(|half| {
                let offset = d.b.int((half * LANES) as i32);
                let own = d.b.add(lane, offset);
                let position = d.b.add(base, own);
                let (place, exists) = self.place(d, sequence, position);
                let seen = d.b.less(position, sequence.range[1]);
                let begun = d.b.binary(BinaryFn::LessEqual, sequence.range[0], position);
                let mut there = d.b.and(inside, seen);
                for condition in [begun, exists] {
                    there = d.b.and(there, condition);
                }
                [position, place, there]
            })
            .collect();
        let (first, end, zero) = (d.b.int(0), d.b.int(dim.next_multiple_of(4) as i32), d.b.float(0.0));
        let zeros = vec![zero; keys.len() * queries as usize];
        let dots = d.repeat([first, end], 4, &zeros, |d, i, carried| {
            let of = |d: &mut Draft<'_>, &[position, place, there]: &[Value; 3]| {
                self.key(d, place, position, i, there)
            };
            let elements: Vec<Vec<Value>> = keys.iter().map(|key| of(d, key)).collect();
            let mut sums = carried.to_vec();
            for by in 0..4 {
                let query = self.take_all(d, self.tiles.query, i, by);
                for (key, sums) in elements.iter().zip(sums.chunks_mut(queries as usize)) {
                    for (sum, &q) in sums.iter_mut().zip(&query) {
                        *sum = d.b.fma(q, key[by as usize], *sum);
                    }
                }
            }
            sums
        });
        d.b.barrier();
        for (half, (key, dots)) in keys.iter().zip(dots.chunks(queries as usize)).enumerate() {
            let scores: Vec<Value> = dots
                .iter()
                .enumerate()
                .map(|(q, &dot)| self.score(d, sequence, q as u32, key, dot))
                .collect();
            for (part, four) in scores.chunks(4).enumerate() {
                let (offset, width) = (d.b.int((half as u32 * LANES) as i32), d.b.int(queries as i32));
                let own = d.b.add(lane, offset);
                let at = d.b.mul(own, width);
                let by = d.b.int(4 * part as i32);
                let at = d.b.add(at, by);
                d.b.put(self.tiles.score, at, four);
            }
        }
        d.b.barrier();
    }

    /// The words of all queries at place `index + by` of a tile.
    fn take_all(&self, d: &mut Draft<'_>, tile: TileId, index: Value, by: u32) -> Vec<Value> {
        let (offset, width) = (d.b.int(by as i32), d.b.int(self.form.queries as i32));
        let at = d.b.add(index, offset);
        let at = d.b.mul(at, width);
        (0..self.form.queries)
            .step_by(4)
            .flat_map(|part| {
                let part = d.b.int(part as i32);
                let at = d.b.add(at, part);
                d.b.take(tile, at, 4)
            })
            .collect()
    }

    /// A query's score of a key; the lowest where it does not see it.
    fn score(
        &self,
        d: &mut Draft<'_>,
        sequence: &Sequence,
        query: u32,
        &[position, _, there]: &[Value; 3],
        dot: Value,
    ) -> Value {
        let op = self.parts.op;
        let query = d.b.int(query as i32);
        let (row, head, known) = self.whose(d, query);
        let own_row = d.b.sub(row, sequence.start);
        let own = d.b.add(sequence.past, own_row);
        let after = d.b.binary(BinaryFn::LessEqual, sequence.start, row);
        let before = d.b.less(row, sequence.end);
        let mut seen = d.b.and(there, known);
        for condition in [after, before] {
            seen = d.b.and(seen, condition);
        }
        if op.causal {
            let causal = d.b.binary(BinaryFn::LessEqual, position, own);
            seen = d.b.and(seen, causal);
        }
        if let Some(window) = op.window {
            let window = d.b.int(i32::try_from(window).unwrap_or(i32::MAX));
            let behind = d.b.sub(own, position);
            let near = d.b.less(behind, window);
            seen = d.b.and(seen, near);
        }
        let scale = d.b.float(op.scale);
        let mut score = d.b.mul(dot, scale);
        if let Some(cap) = op.softcap {
            let cap = d.b.float(cap);
            let small = d.b.div(score, cap);
            let bent = tanh(d, small);
            score = d.b.mul(bent, cap);
        }
        if let (Some(view), Some(at)) = (self.mask, op.mask_at()) {
            let dims = &self.parts.from[at].dims;
            let zero = d.b.int(0);
            let batch = if dims[0].is_one() { zero } else { sequence.number };
            let head = if dims[1].is_one() { zero } else { head };
            let coordinates = [batch, head, own_row, position];
            let mut mask = seen;
            for (&coordinate, extent) in coordinates.iter().zip(dims) {
                let extent = d.size(extent);
                let within = d.b.within(coordinate, extent);
                mask = d.b.and(mask, within);
            }
            let added = d.b.load(view, &coordinates, Some(mask));
            score = d.b.add(score, added);
        }
        let lowest = d.b.float(f64::NEG_INFINITY);
        d.b.select(seen, score, lowest)
    }

    /// Turns the unit's scores into powers; the running maximum and sum of the lane's query, after those.
    fn powers(&self, d: &mut Draft<'_>, [most, sum]: [Value; 2]) -> [Value; 2] {
        let queries = self.form.queries;
        let (groups, lane) = (LANES / queries, d.b.lane());
        let (group, query) = d.b.halves(lane, queries);
        let (zero, lowest) = (d.b.float(0.0), d.b.float(f64::NEG_INFINITY));
        // A lane has some parts of one query; part `p` has keys `p`, `p + PARTS`, ..
        let place = |d: &mut Draft<'_>, key: u32| {
            let (offset, width) = (d.b.int(key as i32), d.b.int(queries as i32));
            let key = d.b.add(group, offset);
            let at = d.b.mul(key, width);
            d.b.add(at, query)
        };
        let parts: Vec<u32> = (0..PARTS / groups).map(|i| i * groups).collect();
        let keys = |part: u32| (0..UNIT / PARTS).map(move |j| j * PARTS + part);
        let mut scores = Vec::new();
        for &part in &parts {
            let mut largest = lowest;
            for key in keys(part) {
                let at = place(d, key);
                let score = d.b.take(self.tiles.score, at, 1)[0];
                largest = d.b.binary(BinaryFn::Max, largest, score);
                scores.push(score);
            }
            let at = place(d, part);
            d.b.put(self.tiles.most, at, &[largest]);
        }
        d.b.barrier();
        let all = |d: &mut Draft<'_>, tile: TileId| -> Vec<Value> {
            let word = |d: &mut Draft<'_>, part: u32| {
                let offset = d.b.int((part * queries) as i32);
                let at = d.b.add(query, offset);
                d.b.take(tile, at, 1)[0]
            };
            (0..PARTS).map(|part| word(d, part)).collect()
        };
        let largest = all(d, self.tiles.most);
        let largest = largest.into_iter().fold(lowest, |a, x| d.b.binary(BinaryFn::Max, a, x));
        let mut scores = scores.into_iter();
        for &part in &parts {
            let mut total = zero;
            for key in keys(part) {
                let score = scores.next().unwrap_or(lowest);
                let power = power_of(d, score, largest);
                total = d.b.add(total, power);
                let at = place(d, key);
                d.b.put(self.tiles.score, at, &[power]);
            }
            let at = place(d, part);
            d.b.put(self.tiles.sum, at, &[total]);
        }
        d.b.barrier();
        let own = all(d, self.tiles.sum).into_iter().fold(zero, |a, x| d.b.add(a, x));
        let next = d.b.binary(BinaryFn::Max, most, largest);
        let (keep, add) = (power_of(d, most, next), power_of(d, largest, next));
        d.b.put(self.tiles.keep, lane, &[keep]);
        d.b.put(self.tiles.add, lane, &[add]);
        d.b.barrier();
        let kept = d.b.mul(sum, keep);
        [next, d.b.fma(own, add, kept)]
    }

    /// The unit's values under its powers: for each slice of a head, all queries.
    fn weigh(&self, d: &mut Draft<'_>, sequence: &Sequence, base: Value) -> Vec<Value> {
        let (op, queries) = (self.parts.op, self.form.queries as usize);
        let (dim, kv_heads) = (d.size(&Amount::Known(op.head_dim)), d.size(&Amount::Known(op.kv_heads)));
        let (lane, zero) = (d.b.lane(), d.b.float(0.0));
        let known = d.b.within(self.kv_head, kv_heads);
        let inside = d.b.and(self.inside, known);
        let slices: Vec<(Value, Value)> = (0..self.slices())
            .map(|slice| {
                let offset = d.b.int((slice * LANES as usize) as i32);
                let i = d.b.add(lane, offset);
                let there = d.b.within(i, dim);
                (i, d.b.and(inside, there))
            })
            .collect();
        let mut sums = vec![zero; slices.len() * queries];
        for half in 0..UNIT / LANES {
            let offset = d.b.int((half * LANES) as i32);
            let first = d.b.add(base, offset);
            let (place, exists) = self.place(d, sequence, first);
            let (from, end) = (d.b.int(0), d.b.int(LANES as i32));
            sums = d.repeat([from, end], 4, &sums, |d, key, carried| {
                let mut sums = carried.to_vec();
                for by in 0..4 {
                    let step = d.b.int(by);
                    let own = d.b.add(key, step);
                    let position = d.b.add(first, own);
                    let (view, row, there) = self.value_row(d, place, own, exists);
                    let seen = d.b.less(position, sequence.range[1]);
                    let begun = d.b.binary(BinaryFn::LessEqual, sequence.range[0], position);
                    let mut there = d.b.and(there, seen);
                    there = d.b.and(there, begun);
                    let powers = self.take_all(d, self.tiles.score, own, half * LANES);
                    for (&(i, mask), sums) in slices.iter().zip(sums.chunks_mut(queries)) {
                        let mask = d.b.and(mask, there);
                        let value = self.value(d, view, &row, i, mask);
                        for (sum, &power) in sums.iter_mut().zip(&powers) {
                            *sum = d.b.fma(power, value, *sum);
                        }
                    }
                }
                sums
            });
        }
        sums
    }

    /// Coordinates of a value but for the element, and whether it is there.
    fn value_row(
        &self,
        d: &mut Draft<'_>,
        place: Value,
        own: Value,
        exists: Value,
    ) -> (ViewId, Vec<Value>, Value) {
        match (&self.cache, self.own) {
            (Some(cache), _) => (cache.values, vec![place, self.kv_head, own], exists),
            (None, own_views) => {
                let rows = d.size(&self.parts.rows());
                let row = d.b.add(place, own);
                let there = d.b.within(row, rows);
                (own_views.map_or(self.query, |[_, values]| values), vec![row, self.kv_head], there)
            }
        }
    }

    /// A unit after those before it: maximum and sum of the lane's query, and the weighted sums.
    fn next_unit(
        &self,
        d: &mut Draft<'_>,
        sequence: &Sequence,
        base: Value,
        carried: &[Value],
    ) -> Vec<Value> {
        self.scores(d, sequence, base);
        let [most, sum] = self.powers(d, [carried[0], carried[1]]);
        let weighted = self.weigh(d, sequence, base);
        let zero = d.b.int(0);
        let keep = self.take_all(d, self.tiles.keep, zero, 0);
        let add = self.take_all(d, self.tiles.add, zero, 0);
        let queries = self.form.queries as usize;
        let merged = carried[2..].iter().zip(&weighted).enumerate();
        let merged = merged
            .map(|(at, (&before, &own))| after(d, before, own, [keep[at % queries], add[at % queries]]));
        let merged: Vec<Value> = merged.collect();
        [vec![most, sum], merged].concat()
    }

    /// Maximum and sum of powers of the lane's query, and the weighted sums, over all units or one.
    fn sums(&self, cx: &mut LowerCx<'_>, d: &mut Draft<'_>, only: Option<Value>) -> Vec<Value> {
        self.stage_queries(d);
        let numbers = self.sequences(cx, d);
        let (zero, lowest, align) = (d.b.float(0.0), d.b.float(f64::NEG_INFINITY), d.b.int(-(UNIT as i32)));
        let queries = self.form.queries as usize;
        let firsts = [vec![lowest, zero], vec![zero; self.slices() * queries]].concat();
        d.repeat(numbers, 1, &firsts, |d, number, carried| {
            let sequence = self.sequence(cx, d, number);
            let [from, to] = sequence.range;
            let mut first = d.b.binary(BinaryFn::And, from, align);
            let mut end = to;
            if let Some(unit) = only {
                let (size, one) = (d.b.int(UNIT as i32), d.b.int(1));
                let base = d.b.mul(unit, size);
                let known = d.b.binary(BinaryFn::LessEqual, first, base);
                first = d.b.select(known, base, to);
                let next = d.b.add(base, one);
                end = d.b.binary(BinaryFn::Min, to, next);
            }
            d.repeat([first, end], UNIT, carried, |d, base, carried| {
                self.next_unit(d, &sequence, base, carried)
            })
        })
    }

    /// Goes over a query's elements that the lane has: `body` gets coordinates, the mask, and its position among the weighted sums.
    fn elements(
        &self,
        d: &mut Draft<'_>,
        mut body: impl FnMut(&mut Draft<'_>, [Value; 3], Value, [usize; 2]),
    ) {
        let (lane, dim) = (d.b.lane(), d.size(&Amount::Known(self.parts.op.head_dim)));
        for query in 0..self.form.queries as usize {
            let number = d.b.int(query as i32);
            let (row, head, there) = self.whose(d, number);
            for slice in 0..self.slices() {
                let offset = d.b.int((slice * LANES as usize) as i32);
                let i = d.b.add(lane, offset);
                let within = d.b.within(i, dim);
                let mask = d.b.and(there, within);
                body(d, [row, head, i], mask, [slice, query]);
            }
        }
    }

    fn finish(&self, d: &mut Draft<'_>, outcome: &[Value], to: &Operand) {
        let op = self.parts.op;
        // Each query's sum stands in the lane of its number.
        d.b.barrier();
        let (lane, zero) = (d.b.lane(), d.b.float(0.0));
        d.b.put(self.tiles.keep, lane, &[outcome[1]]);
        d.b.barrier();
        let origin = d.b.int(0);
        let sums = self.take_all(d, self.tiles.keep, origin, 0);
        let write = d.write(&heads(to, op.heads, op.head_dim));
        let queries = self.form.queries as usize;
        self.elements(d, |d, at, mask, [slice, query]| {
            let y = mean(d, outcome[2 + slice * queries + query], sums[query], zero);
            d.b.store(write, &at, y, Some(mask));
        });
    }

    /// Stores what one unit gave: the weighted sums, and maximum and sum of powers.
    fn keep_apart(&self, d: &mut Draft<'_>, outcome: &[Value], [sums, pairs]: [ViewId; 2]) {
        let (lane, queries) = (d.b.lane(), d.b.int(self.form.queries as i32));
        let few = d.size(&Amount::Known(FEW));
        let first = d.b.less(lane, queries);
        let (row, head, there) = self.whose(d, lane);
        let mask = d.b.and(there, first);
        let known = d.b.within(row, few);
        let mask = d.b.and(mask, known);
        for (i, &value) in outcome[..2].iter().enumerate() {
            let i = d.b.int(i as i32);
            d.b.store(pairs, &[row, self.unit, head, i], value, Some(mask));
        }
        let count = self.form.queries as usize;
        self.elements(d, |d, [row, head, i], mask, [slice, query]| {
            let known = d.b.within(row, few);
            let mask = d.b.and(mask, known);
            d.b.store(sums, &[row, self.unit, head, i], outcome[2 + slice * count + query], Some(mask));
        });
    }

    /// Adds up what the units gave: a program a head of a row, as a program that goes over the units itself does.
    fn add_up(&self, cx: &mut LowerCx<'_>, d: &mut Draft<'_>, [sums, pairs]: [ViewId; 2], to: &Operand) {
        let op = self.parts.op;
        let numbers = self.sequences(cx, d);
        let (zero, lowest, align) = (d.b.float(0.0), d.b.float(f64::NEG_INFINITY), d.b.int(-(UNIT as i32)));
        let past = op.past_at().unwrap_or_default();
        let units = d.size(&self.parts.from[past + 1].dims[1].ceil_div(UNIT as usize / BLOCK));
        let (few, count) = (d.size(&Amount::Known(FEW)), d.size(&Amount::Known(op.heads)));
        let (dim, lane) = (d.size(&Amount::Known(op.head_dim)), d.b.lane());
        let mut inside = self.inside;
        for condition in [d.b.within(self.row, few), d.b.within(self.head, count)] {
            inside = d.b.and(inside, condition);
        }
        let slices: Vec<(Value, Value)> = (0..self.slices())
            .map(|slice| {
                let offset = d.b.int((slice * LANES as usize) as i32);
                let i = d.b.add(lane, offset);
                let there = d.b.within(i, dim);
                (i, d.b.and(inside, there))
            })
            .collect();
        let firsts = [vec![lowest, zero], vec![zero; slices.len()]].concat();
        let outcome = d.repeat(numbers, 1, &firsts, |d, number, carried| {
            let [from, end] = self.sequence(cx, d, number).range;
            let first = d.b.binary(BinaryFn::And, from, align);
            d.repeat([first, end], UNIT, carried, |d, base, carried| {
                let bits = d.b.int(UNIT.trailing_zeros() as i32);
                let unit = d.b.binary(BinaryFn::ShiftRight, base, bits);
                let known = d.b.within(unit, units);
                let both = [0, 1].map(|i| {
                    let (i, mask) = (d.b.int(i), d.b.and(inside, known));
                    d.b.load(pairs, &[self.row, unit, self.head, i], Some(mask))
                });
                let next = d.b.binary(BinaryFn::Max, carried[0], both[0]);
                let (keep, add) = (power_of(d, carried[0], next), power_of(d, both[0], next));
                let kept = d.b.mul(carried[1], keep);
                let mut merged = vec![next, d.b.fma(both[1], add, kept)];
                for (&(i, there), &before) in slices.iter().zip(&carried[2..]) {
                    let mask = d.b.and(there, known);
                    let own = d.b.load(sums, &[self.row, unit, self.head, i], Some(mask));
                    merged.push(after(d, before, own, [keep, add]));
                }
                merged
            })
        });
        let write = d.write(&heads(to, op.heads, op.head_dim));
        let rows = d.size(&self.parts.rows());
        let there = d.b.within(self.row, rows);
        for (&(i, mask), &sum) in slices.iter().zip(&outcome[2..]) {
            let y = mean(d, sum, outcome[1], zero);
            let mask = d.b.and(mask, there);
            d.b.store(write, &[self.row, self.head, i], y, Some(mask));
        }
    }
}

/// A weighted sum divided by the sum of powers; nothing for a row that sees no key.
fn mean(d: &mut Draft<'_>, weighted: Value, sum: Value, zero: Value) -> Value {
    let mean = d.b.div(weighted, sum);
    let none = d.b.binary(BinaryFn::Equal, sum, zero);
    d.b.select(none, zero, mean)
}

/// A weighted sum after a unit's. A unit that a query does not see leaves it alone, whatever stands there.
fn after(d: &mut Draft<'_>, before: Value, own: Value, [keep, add]: [Value; 2]) -> Value {
    let none = d.b.float(0.0);
    let kept = d.b.mul(before, keep);
    let sum = d.b.fma(own, add, kept);
    let nothing = d.b.binary(BinaryFn::Equal, add, none);
    d.b.select(nothing, before, sum)
}

/// `e^(x - most)`, and nothing for the lowest x.
fn power_of(d: &mut Draft<'_>, x: Value, most: Value) -> Value {
    let (zero, lowest) = (d.b.float(0.0), d.b.float(f64::NEG_INFINITY));
    let below = d.b.sub(x, most);
    let power = d.b.unary(UnaryFn::Exp, below);
    let nothing = d.b.binary(BinaryFn::Equal, x, lowest);
    d.b.select(nothing, zero, power)
}
