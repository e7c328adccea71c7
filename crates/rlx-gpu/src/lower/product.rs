//! Matrix products through tiles: `a [lead, m, k] x b [lead, n, k]`.
//!
//! Every form sums in one order, which k alone decides: chunks of [`CHUNK`] products, each from its first to its last, and the chunks one
//! after another. So a row has the same bits whichever form a run's number of rows chooses.

use super::blocks::is_packed;
use super::classes::Class;
use super::lines::{Lines, MadeElement, offset, scaled};
use super::operands::Operands;
use super::quantise::Codes;
use super::schedules::Schedule;
use super::{Amount, Draft, LowerCx, Operand};
use crate::ir::{self, BinaryFn, TileId, Value};
use rlx::backend::BackendError;
use std::rc::Rc;

/// Products that are summed one after another before they are added to what came before.
pub(super) const CHUNK: u32 = 128;
/// The rows of a product.
#[derive(Clone, Copy)]
pub(super) enum Rows<'p> {
    /// As they stand.
    Stored(&'p Operand),
    /// Computed where they are needed, by what is made for each kernel.
    Made(&'p dyn Fn(&mut Draft<'_>) -> Rc<MadeElement<'static>>),
}

/// Operands of a product, with the extents `[lead, m, n]` of the result.
pub(super) struct Product<'p> {
    pub a: Rows<'p>,
    /// The rows quantised, for matrices that [are multiplied so](super::dot::takes).
    pub codes: Option<&'p Codes>,
    /// One matrix, or gate and up.
    pub b: &'p [Operand],
    pub dims: &'p [Amount],
    pub k: &'p Amount,
    /// What elements are multiplied as.
    pub operands: Operands,
}

/// What becomes of an element: its coordinates, whether it is one, and its sums.
pub(super) type Finish<'f> = dyn Fn(&mut Draft<'_>, &[Value], Value, &[Value]) + 'f;

/// The line of the first operand where a row's elements stand; -1 for no row.
pub(super) type Stands<'s> = dyn Fn(&mut Draft<'_>, Value) -> Value + 's;

/// What a program stands for.
pub(super) struct Spot<'s> {
    pub lead: Vec<Value>,
    /// The first row and column.
    pub firsts: [Value; 2],
    /// The line of the matrices that is the first column.
    pub line: Value,
    /// Whether there is such a program.
    pub inside: Value,
    /// The first row that is another program's, where not only the result's extent says so.
    pub last: Option<Value>,
    /// Products of an element.
    pub end: Value,
    /// Where a row's elements stand, if not in the line of its number.
    pub stands: Option<&'s Stands<'s>>,
}

/// A step along k: what was fetched for it, where it begins and where to fetch for the next, and the sums so far; new sums, and what
/// was fetched.
pub(super) type Step<'f> = dyn Fn(&mut Draft<'_>, &[Value], [Value; 2], &[Value]) -> Vec<Value> + 'f;

/// What a lane fetches of an operand in each step, and where it puts it.
pub(super) struct Stager {
    pub lines: Lines,
    pub tile: TileId,
    pub group: u32,
    /// For each fetch: line within the program, offset along k, first word in the tile.
    pub units: Vec<[Value; 3]>,
    /// Words of the tile from one element of a group to the next.
    pub apart: u32,
}

impl Stager {
    /// The line that a program's first row is fetched from, after which it fetches each row's own where rows stand elsewhere.
    pub fn begin(&mut self, d: &mut Draft<'_>, spot: &Spot<'_>) -> Value {
        let Some(stands) = spot.stands else { return spot.firsts[0] };
        for [line, ..] in &mut self.units {
            let row = d.b.add(spot.firsts[0], *line);
            *line = stands(d, row);
        }
        d.b.int(0)
    }

    /// Values of a step.
    pub fn count(&self) -> usize {
        self.units.len() * self.lines.raw(self.group)
    }

    /// What is to be loaded for a step, whose first line and first k are given.
    pub fn fetch(&self, d: &mut Draft<'_>, lead: &[Value], first: [Value; 2], inside: Value) -> Vec<Value> {
        let mut values = Vec::with_capacity(self.count());
        for &[line, offset, _] in &self.units {
            let at = [d.b.add(first[0], line), d.b.add(first[1], offset)];
            values.extend(self.lines.fetch(d, lead, at, inside, self.group));
        }
        values
    }

    /// Puts what was loaded for a step that begins at `first`.
    pub fn put(&self, d: &mut Draft<'_>, values: &[Value], first: Value) {
        for (&[_, along, at], raw) in self.units.iter().zip(values.chunks(self.lines.raw(self.group))) {
            let elements = self.lines.decode(d, raw, |d| d.b.add(first, along), self.group);
            let group = self.lines.multiplied(d, elements);
            let each = if self.apart == 1 { 4 } else { 1 };
            for (i, part) in group.chunks(each).enumerate() {
                let at = offset(d, at, (i * each) as u32 * self.apart);
                d.b.put(self.tile, at, part);
            }
        }
    }
}

/// A tile `[depth][lines]` of an operand for a product of many rows.
fn tall(d: &mut Draft<'_>, source: Lines, lines: u32, depth: u32, pitch: u32) -> Stager {
    let lanes = d.b.lanes();
    let group = source.group(lines * depth, depth, lanes);
    let tile = d.b.tile(ir::Element::F32, depth * pitch);
    let groups = depth / group;
    let unit = |d: &mut Draft<'_>, round: u32| {
        let lane = d.b.lane();
        let number = offset(d, lane, round * lanes);
        let (line, part) = match source.is_apart() {
            true => {
                let (part, line) = d.b.halves(number, lines);
                (line, part)
            }
            false => d.b.halves(number, groups),
        };
        let along = scaled(d, part, group);
        let first = scaled(d, along, pitch);
        [line, along, d.b.add(first, line)]
    };
    let units = (0..lines * groups / lanes).map(|round| unit(d, round)).collect();
    Stager { lines: source, tile, group, units, apart: pitch }
}

/// Goes over k in steps of `depth`: `step` gets what was fetched for it, where to fetch for the next, and the sums of the chunk.
pub(super) fn chunks(
    d: &mut Draft<'_>,
    end: Value,
    depth: u32,
    zeros: &[Value],
    fetch: &dyn Fn(&mut Draft<'_>, Value) -> Vec<Value>,
    step: &Step<'_>,
) -> Vec<Value> {
    let first = d.b.int(0);
    let fetched = fetch(d, first);
    let count = zeros.len();
    let firsts = [zeros, fetched.as_slice()].concat();
    let mut sums = d.repeat([first, end], CHUNK, &firsts, |d, base, carried| {
        let (first, most) = (d.b.int(0), d.b.int(CHUNK as i32));
        let left = d.b.sub(end, base);
        let to = d.b.binary(BinaryFn::Min, left, most);
        let inner = [zeros, &carried[count..]].concat();
        let inner = d.repeat([first, to], depth, &inner, |d, at, carried| {
            let at = d.b.add(base, at);
            let next = offset(d, at, depth);
            step(d, &carried[count..], [at, next], &carried[..count])
        });
        let sums = carried[..count].iter().zip(&inner).map(|(&total, &sum)| d.b.add(total, sum));
        let sums: Vec<Value> = sums.collect();
        [sums.as_slice(), &inner[count..]].concat()
    });
    sums.truncate(count);
    sums
}

impl Product<'_> {
    /// The rows.
    pub fn row_lines(&self, d: &mut Draft<'_>) -> Lines {
        let rows = match self.a {
            Rows::Stored(operand) => Lines::new(d, operand),
            Rows::Made(make) => Lines::made(make(d), &self.dims[self.dims.len() - 2], self.k),
        };
        rows.multiplied_as(self.operands)
    }

    /// The columns of each matrix.
    pub fn column_lines(&self, d: &mut Draft<'_>) -> Vec<Lines> {
        self.b.iter().map(|operand| Lines::new(d, operand).multiplied_as(self.operands)).collect()
    }

    /// Extents of the programs that take so many rows and columns each: lead, then blocks of rows, then of columns.
    pub fn grid(&self, rows: u32, columns: u32) -> Vec<Amount> {
        let lead = self.dims.len() - 2;
        let blocks =
            [self.dims[lead].ceil_div(rows as usize), self.dims[lead + 1].ceil_div(columns as usize)];
        self.dims[..lead].iter().cloned().chain(blocks).collect()
    }

    /// What a program of so many rows and columns stands for.
    pub fn place(&self, d: &mut Draft<'_>, rows: u32, columns: u32) -> Spot<'static> {
        let at = self.dims.len() - 2;
        let program = d.b.program();
        let (mut lead, inside) = d.coordinates(program, &self.grid(rows, columns));
        let firsts = [scaled(d, lead[at], rows), scaled(d, lead[at + 1], columns)];
        lead.truncate(at);
        let k = d.size(self.k);
        let end = d.b.arg(k);
        Spot { lead, firsts, line: firsts[1], inside, last: None, end, stands: None }
    }

    /// A row, and whether it is one of the program's.
    pub fn row(&self, d: &mut Draft<'_>, spot: &Spot<'_>, own: Value, inside: Value) -> (Value, Value) {
        let row = d.b.add(spot.firsts[0], own);
        let mut known = self.known(d, row, 0, inside);
        if let Some(last) = spot.last {
            let before = d.b.less(row, last);
            known = d.b.and(known, before);
        }
        (row, known)
    }

    /// Finishes an element of few rows: a lane has one of so many rows, or none, and a column.
    pub fn finish_own(
        &self,
        d: &mut Draft<'_>,
        spot: &Spot<'_>,
        [row, column]: [Value; 2],
        [lane, rows]: [Value; 2],
        finish: &Finish<'_>,
        sums: &[Value],
    ) {
        let taken = d.b.less(lane, rows);
        let mask = d.b.and(spot.inside, taken);
        let (row, known) = self.row(d, spot, row, mask);
        let mask = self.known(d, column, 1, known);
        let at: Vec<Value> = spot.lead.iter().copied().chain([row, column]).collect();
        finish(d, &at, mask, sums);
    }

    /// A row or column, and whether the result has it.
    pub fn known(&self, d: &mut Draft<'_>, at: Value, axis: usize, inside: Value) -> Value {
        let lead = self.dims.len() - 2;
        let extent = d.size(&self.dims[lead + axis]);
        let there = d.b.within(at, extent);
        d.b.and(inside, there)
    }

    /// A product of any number of rows: a program stages a block of rows and of columns, a lane sums a block of both in registers.
    pub fn many(&self, d: &mut Draft<'_>, schedule: Schedule, spot: &Spot<'_>, finish: &Finish<'_>) {
        if let Some(codes) = self.codes {
            return self.many_dots(d, codes, schedule, spot, finish);
        }
        let [down, across] = schedule.each;
        let pitches = [schedule.rows + 4, schedule.columns + 4];
        let rows = self.row_lines(d);
        let mut a = tall(d, rows, schedule.rows, schedule.depth, pitches[0]);
        let first_row = a.begin(d, spot);
        let columns = self.column_lines(d);
        let b = columns.into_iter().map(|lines| tall(d, lines, schedule.columns, schedule.depth, pitches[1]));
        let b: Vec<Stager> = b.collect();
        let lane = d.b.lane();
        let (row, column) = d.b.halves(lane, schedule.across());
        let row = scaled(d, row, 4);
        let fetch = |d: &mut Draft<'_>, k: Value| -> Vec<Value> {
            let mut values = a.fetch(d, &spot.lead, [first_row, k], spot.inside);
            b.iter().for_each(|b| values.extend(b.fetch(d, &spot.lead, [spot.line, k], spot.inside)));
            values
        };
        let each = (down * across) as usize;
        let zero = d.b.float(0.0);
        let zeros = vec![zero; each * b.len()];
        let step = |d: &mut Draft<'_>, staged: &[Value], [at, next]: [Value; 2], sums: &[Value]| {
            d.b.barrier();
            let mut rest = staged;
            for stager in [&a].into_iter().chain(&b) {
                let (own, after) = rest.split_at(stager.count());
                stager.put(d, own, at);
                rest = after;
            }
            d.b.barrier();
            let fetched = fetch(d, next);
            let (first, end) = (d.b.int(0), d.b.int(schedule.depth as i32));
            let sums = d.repeat([first, end], schedule.turns, sums, |d, p, carried| {
                (0..schedule.turns).fold(carried.to_vec(), |sums, i| {
                    let p = offset(d, p, i);
                    let at = scaled(d, p, pitches[0]);
                    let at = d.b.add(at, row);
                    let left: Vec<Value> = (0..down / 4)
                        .flat_map(|part| {
                            let at = offset(d, at, part * 4 * schedule.down());
                            d.b.take(a.tile, at, 4)
                        })
                        .collect();
                    let at = scaled(d, p, pitches[1]);
                    let at = d.b.add(at, column);
                    let mut next = Vec::with_capacity(sums.len());
                    for (b, sums) in b.iter().zip(sums.chunks(each)) {
                        let take = |part: u32| {
                            let at = offset(d, at, part * schedule.across());
                            d.b.take(b.tile, at, 1)[0]
                        };
                        let right: Vec<Value> = (0..across).map(take).collect();
                        for (at, &sum) in sums.iter().enumerate() {
                            let (i, j) = (at / right.len(), at % right.len());
                            next.push(d.b.fma(left[i], right[j], sum));
                        }
                    }
                    next
                })
            });
            [sums, fetched].concat()
        };
        let sums = chunks(d, spot.end, schedule.depth, &zeros, &fetch, &step);
        self.finish_block(d, schedule, spot, [row, column], &sums, finish);
    }

    /// Finishes a lane's sums, those of each matrix by rows and columns.
    pub fn finish_block(
        &self,
        d: &mut Draft<'_>,
        schedule: Schedule,
        spot: &Spot<'_>,
        [row, column]: [Value; 2],
        sums: &[Value],
        finish: &Finish<'_>,
    ) {
        let [down, across] = schedule.each;
        for i in 0..down {
            let own = offset(d, row, i / 4 * 4 * schedule.down() + i % 4);
            let (row, known) = self.row(d, spot, own, spot.inside);
            for j in 0..across {
                let own = offset(d, column, j * schedule.across());
                let column = d.b.add(spot.firsts[1], own);
                let mask = self.known(d, column, 1, known);
                let at: Vec<Value> = spot.lead.iter().copied().chain([row, column]).collect();
                let all = sums.chunks((down * across) as usize);
                let values: Vec<Value> = all.map(|s| s[(i * across + j) as usize]).collect();
                finish(d, &at, mask, &values);
            }
        }
    }

    /// What kernels' names say of how they multiply.
    pub fn by(&self) -> &'static str {
        if self.codes.is_some() { "_q8" } else { "" }
    }

    /// Whether it is staged at all. Only k and the columns decide, so that all rows of a product are summed in one order.
    fn is_staged(&self) -> bool {
        let at_least = |amount: &Amount, least: usize| !matches!(amount, Amount::Known(n) if *n < least);
        let packed = self.b.iter().any(|matrix| is_packed(matrix.dtype));
        packed || (at_least(self.k, 16) && at_least(&self.dims[self.dims.len() - 1], 8))
    }

    /// Adds launches for every number of rows; `prepare` makes what finishes an element in each of the kernels.
    pub fn launch(
        &self,
        cx: &mut LowerCx<'_>,
        name: &str,
        prepare: &dyn Fn(&mut Draft<'_>) -> Box<Finish<'static>>,
    ) -> Result<(), BackendError> {
        let (rows, columns) = (&self.dims[self.dims.len() - 2], &self.dims[self.dims.len() - 1]);
        if !self.is_staged() {
            let mut d = cx.draft(name);
            let finish = prepare(&mut d);
            self.plain(&mut d, &*finish);
            return cx.launch(d, self.plain_programs());
        }
        let class = Class::of_product(self.b, self.operands);
        cx.may_choose(class);
        if let Operands::Units { wave } = self.operands {
            let timed = cx.choices.timed(class);
            return self.launch_by_units(cx, name, wave, timed, prepare);
        }
        let choice = cx.choices.of(class, self.b.len(), columns);
        let schedule = self.fitted(Schedule::TABLE[choice.schedule.min(Schedule::TABLE.len() - 1)]);
        let by = self.by();
        let programs = Amount::product(&self.grid(schedule.rows, schedule.columns));
        let few = self.dims.len() == 2;
        let first = if few && choice.few > 0 { choice.few + 1 } else { 0 };
        if let Some((codes, wave)) = self.codes.and_then(|codes| Some((codes, codes.units?))) {
            self.launch_dots_by_units(cx, name, (codes, wave), first, prepare)?;
        } else if let Some(programs) = rows.when(first, usize::MAX, programs) {
            let mut d = cx.draft_of(format!("{name}_tiled{by}"), schedule.lanes());
            let finish = prepare(&mut d);
            let spot = self.place(&mut d, schedule.rows, schedule.columns);
            self.many(&mut d, schedule, &spot, &*finish);
            cx.launch(d, programs)?;
        }
        if !few || choice.few == 0 {
            return Ok(());
        }
        for form in self.few_forms().into_iter().filter(|form| form.from <= choice.few) {
            let programs = Amount::product(&self.grid(form.rows, super::few::COLUMNS));
            let most = choice.few.min(form.rows as usize);
            if let Some(programs) = rows.when(form.from, most, programs) {
                let mut d = cx.draft_of(format!("{name}_few{}{by}", form.rows), super::few::LANES);
                let finish = prepare(&mut d);
                let spot = self.place(&mut d, form.rows, super::few::COLUMNS);
                self.few(&mut d, form, &spot, &*finish);
                cx.launch(d, programs)?;
            }
        }
        Ok(())
    }
}
