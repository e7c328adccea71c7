//! Matrix products by matrix units: operands rounded to bfloat16, sums of 32 bits, for devices whose warps of 32 lanes multiply together.
//!
//! Every form sums in one order, as the forms without units do: chunks of [`CHUNK`] products, each from nothing by one instruction for 16
//! products after another, and the chunks one after another. Rows stand in the instruction's rows and columns in its columns, so that a row
//! has the same bits whichever form a run's number of rows chooses; within an instruction a device adds in an order of its own.

use super::lines::{Lines, offset, scaled};
use super::product::{CHUNK, Finish, Product, Spot, Stager, chunks};
use super::schedules::{Choice, LARGE_FROM};
use super::{Amount, Draft, LowerCx};
use crate::ir::{BinaryFn, Element, Pairs, TileId, Value};
use rlx::backend::BackendError;

const WARP: u32 = 32;
/// Products of each element that a tile holds.
const DEPTH: u32 = 32;
/// Words from one line of a tile to the next: eight lines begin in different banks, four words apart.
const PITCH: u32 = DEPTH / 2 + 4;
/// Rows that a warp multiplies at once; as many columns are one fragment, two instructions.
pub(super) const ROWS: u32 = 16;
pub(super) const COLUMNS: u32 = 8;

/// How programs and warps share a product of many rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    pub rows: u32,
    /// Columns of each matrix.
    pub columns: u32,
    /// Warps along the rows and along the columns.
    warps: [u32; 2],
}

impl Form {
    const MIDDLE: Form = Form { rows: 64, columns: 64, warps: [2, 2] };
    /// Of gate and up: twice as many columns of both would leave too few registers.
    const MIDDLE_PAIR: Form = Form { columns: 32, ..Self::MIDDLE };
    /// Of one matrix: a warp sums 64 x 32.
    const LARGE: Form = Form { rows: 128, columns: 128, warps: [2, 4] };
    /// Of gate and up: a warp sums 64 x 16 of both.
    const LARGE_PAIR: Form = Form { columns: 64, ..Self::LARGE };
    /// Of rows that have a matrix of their own.
    pub const GROUP: Form = Form { rows: super::grouped::BLOCK, columns: 64, warps: [1, 4] };

    pub fn lanes(self) -> u32 {
        WARP * self.warps[0] * self.warps[1]
    }

    /// The forms of one matrix or two with the rows that take them, from so many on: the large one, of fewer columns unless told otherwise,
    /// where there are as many of its programs as a device runs at once.
    pub fn of(
        matrices: usize,
        is_wide: bool,
        columns: &Amount,
        first: usize,
        wave: usize,
    ) -> Vec<(Form, usize, usize)> {
        let large = if is_wide { Form::LARGE } else { Form::LARGE_PAIR };
        let from = match columns {
            Amount::Known(n) if *n >= large.columns as usize => {
                wave.div_ceil(n.div_ceil(large.columns as usize)).max(1) * large.rows as usize
            }
            _ => usize::MAX,
        };
        Self::large_from(matrices, is_wide, first, from)
    }

    /// As [`Form::of`], the large one from so many rows on.
    fn large_from(matrices: usize, is_wide: bool, first: usize, from: usize) -> Vec<(Form, usize, usize)> {
        let middle = if matrices == 1 { Form::MIDDLE } else { Form::MIDDLE_PAIR };
        let large = if is_wide { Form::LARGE } else { Form::LARGE_PAIR };
        let forms = [(middle, first, from - 1), (large, from, usize::MAX)];
        forms.into_iter().filter(|&(_, from, _)| from < usize::MAX).collect()
    }

    /// The lane's part, of tiles whose lines stand so many words apart.
    pub fn warp(self, d: &mut Draft<'_>, pitch: u32) -> Warp {
        let lane = d.b.lane();
        let (warp, own) = d.b.halves(lane, WARP);
        let (down, across) = d.b.halves(warp, self.warps[1]);
        let sides = [self.rows / self.warps[0], self.columns / self.warps[1]];
        let (down, across) = (scaled(d, down, sides[0]), scaled(d, across, sides[1]));
        let firsts = [scaled(d, down, pitch), scaled(d, across, pitch)];
        let (group, place) = d.b.halves(own, 4);
        let place = scaled(d, place, 2);
        let (row, column) = (d.b.add(down, group), d.b.add(across, place));
        Warp { firsts, counts: sides.map(|side| side / ROWS), row, column }
    }
}

/// What a warp multiplies: the first word of its rows and of its columns in their tiles, how many fragments follow, and the lane's first row
/// and column.
pub(super) struct Warp {
    pub firsts: [Value; 2],
    pub counts: [u32; 2],
    pub row: Value,
    pub column: Value,
}

impl Warp {
    /// The lane's sums of each matrix.
    pub fn sums(&self) -> usize {
        (self.counts[0] * self.counts[1] * 8) as usize
    }
}

/// Rows that the forms for few have room for: a program of up to four rows stages no more.
pub(super) const FEW: [u32; 2] = [4, ROWS];
/// Chunks that a program of few rows sums at once, a warp each.
const CHUNKS: u32 = 8;
pub(super) const FEW_LANES: u32 = WARP * CHUNKS;
/// Columns of a program of few rows.
pub(super) const FEW_COLUMNS: u32 = 16;

/// What lanes fetch of an operand for a step, and the tiles where they put it in pairs.
struct Staged {
    fetches: Stager,
    tiles: Vec<TileId>,
    /// Lines of one chunk.
    lines: u32,
}

impl Staged {
    /// Of so many lines in so many chunks at once.
    fn new(d: &mut Draft<'_>, lines: Lines, count: u32, chunks: u32, buffers: usize) -> Self {
        let lanes = d.b.lanes();
        let group = lines.group(count * chunks * DEPTH, DEPTH, lanes);
        let words = count * chunks * PITCH;
        let tiles: Vec<TileId> = (0..buffers).map(|_| d.b.tile(Element::I32, words)).collect();
        let groups = DEPTH / group;
        let unit = |d: &mut Draft<'_>, round: u32| {
            let lane = d.b.lane();
            let number = offset(d, lane, round * lanes);
            let (place, part) = d.b.halves(number, groups);
            let (chunk, line) = d.b.halves(place, count);
            let (along, own) = (scaled(d, chunk, CHUNK), scaled(d, part, group));
            let (first, word) = (scaled(d, place, PITCH), scaled(d, part, group / 2));
            [line, d.b.add(along, own), d.b.add(first, word)]
        };
        let units = (0..count * chunks * groups / lanes).map(|round| unit(d, round)).collect();
        let fetches = Stager { lines, tile: tiles[0], group, units, apart: 1 };
        Staged { fetches, tiles, lines: count }
    }

    fn put(&self, d: &mut Draft<'_>, buffer: usize, values: &[Value], first: Value) {
        let Stager { lines, group, units, .. } = &self.fetches;
        for (&[_, along, at], raw) in units.iter().zip(values.chunks(lines.raw(*group))) {
            let words = match lines.pairs() {
                Some(Pairs::Brain) => raw.to_vec(),
                _ => {
                    let elements = lines.decode(d, raw, |d| d.b.add(first, along), *group);
                    let pack = |two: &[Value]| d.b.binary(BinaryFn::PackBrains, two[0], two[1]);
                    elements.chunks(2).map(pack).collect()
                }
            };
            for (i, part) in words.chunks(4).enumerate() {
                let at = offset(d, at, 4 * i as u32);
                d.b.put(self.tiles[buffer], at, part);
            }
        }
    }
}

/// What a warp multiplies: the first word of its rows and of its columns in their tiles, and how many fragments follow.
struct Part {
    firsts: [Value; 2],
    counts: [u32; 2],
}

/// The operands of a product on their way into tiles.
struct StagedOperands {
    a: Staged,
    b: Vec<Staged>,
}

impl StagedOperands {
    fn all(&self) -> impl Iterator<Item = &Staged> {
        std::iter::once(&self.a).chain(&self.b)
    }

    fn fetch(&self, d: &mut Draft<'_>, spot: &Spot<'_>, first_row: Value, k: Value) -> Vec<Value> {
        let mut values = self.a.fetches.fetch(d, &spot.lead, [first_row, k], spot.inside);
        for b in &self.b {
            values.extend(b.fetches.fetch(d, &spot.lead, [spot.line, k], spot.inside));
        }
        values
    }

    fn put(&self, d: &mut Draft<'_>, buffer: usize, values: &[Value], first: Value) {
        let mut rest = values;
        for staged in self.all() {
            let (own, after) = rest.split_at(staged.fetches.count());
            staged.put(d, buffer, own, first);
            rest = after;
        }
    }

    /// Products of what stands in the tiles, added to the warp's sums: of each matrix, row and pair of columns four.
    fn multiply(&self, d: &mut Draft<'_>, buffer: usize, part: &Part, sums: &[Value]) -> Vec<Value> {
        let mut sums = sums.to_vec();
        for word in (0..DEPTH / 2).step_by(8) {
            let fragment = |d: &mut Draft<'_>, of: &Staged, side: usize, at: u32| {
                let at = offset(d, part.firsts[side], at * ROWS * PITCH + word);
                d.b.fragment(of.tiles[buffer], at, PITCH, of.lines.min(ROWS))
            };
            let rows: Vec<_> = (0..part.counts[0]).map(|i| fragment(d, &self.a, 0, i)).collect();
            let each = sums.len() / self.b.len();
            for (b, sums) in self.b.iter().zip(sums.chunks_mut(each)) {
                for j in 0..part.counts[1] {
                    let [w0, w1, w2, w3] = fragment(d, b, 1, j);
                    for (i, &row) in rows.iter().enumerate() {
                        for (half, columns) in [[w0, w2], [w1, w3]].into_iter().enumerate() {
                            let at = 4 * ((i as u32 * part.counts[1] + j) * 2 + half as u32) as usize;
                            let so_far = [sums[at], sums[at + 1], sums[at + 2], sums[at + 3]];
                            let new = d.b.mma(Pairs::Brain, row, columns, so_far);
                            sums[at..at + 4].copy_from_slice(&new);
                        }
                    }
                }
            }
        }
        sums
    }
}

impl Product<'_> {
    /// Operands in so many chunks at once, and the line that the first row is fetched from.
    fn staged(
        &self,
        d: &mut Draft<'_>,
        [rows, columns]: [u32; 2],
        chunks: u32,
        buffers: usize,
        spot: &Spot<'_>,
    ) -> (StagedOperands, Value) {
        let lines = self.row_lines(d);
        let mut a = Staged::new(d, lines, rows, chunks, buffers);
        let first_row = a.fetches.begin(d, spot);
        let lines = self.column_lines(d);
        let b = lines.into_iter().map(|lines| Staged::new(d, lines, columns, chunks, buffers)).collect();
        (StagedOperands { a, b }, first_row)
    }

    /// A product of any number of rows. Tiles are put to in turn, so that lanes wait for each other once a step.
    pub fn many_by_units(&self, d: &mut Draft<'_>, form: Form, spot: &Spot<'_>, finish: &Finish<'_>) {
        let (of, first_row) = self.staged(d, [form.rows, form.columns], 1, 2, spot);
        let warp = form.warp(d, PITCH);
        let part = Part { firsts: warp.firsts, counts: warp.counts };
        let zero = d.b.float(0.0);
        let each = warp.sums();
        let zeros = vec![zero; each * of.b.len()];
        let fetch = |d: &mut Draft<'_>, k: Value| of.fetch(d, spot, first_row, k);
        let step = |d: &mut Draft<'_>, staged: &[Value], [at, next]: [Value; 2], sums: &[Value]| {
            of.put(d, 0, staged, at);
            d.b.barrier();
            let second = offset(d, at, DEPTH);
            let staged = fetch(d, second);
            let sums = of.multiply(d, 0, &part, sums);
            of.put(d, 1, &staged, second);
            d.b.barrier();
            let staged = fetch(d, next);
            [of.multiply(d, 1, &part, &sums), staged].concat()
        };
        let sums = chunks(d, spot.end, 2 * DEPTH, &zeros, &fetch, &step);
        self.finish_warp(d, &warp, spot, &sums, finish);
    }

    /// Finishes a lane's sums, those of each matrix by fragments of rows and by eight columns, four each.
    pub fn finish_warp(
        &self,
        d: &mut Draft<'_>,
        warp: &Warp,
        spot: &Spot<'_>,
        sums: &[Value],
        finish: &Finish<'_>,
    ) {
        for i in 0..warp.counts[0] {
            for low in [0, 8] {
                let own = offset(d, warp.row, i * ROWS + low);
                let (row, known) = self.row(d, spot, own, spot.inside);
                for j in 0..2 * warp.counts[1] {
                    for right in 0..2 {
                        let own = offset(d, warp.column, j * COLUMNS + right);
                        let column = d.b.add(spot.firsts[1], own);
                        let mask = self.known(d, column, 1, known);
                        let at: Vec<Value> = spot.lead.iter().copied().chain([row, column]).collect();
                        let of_each = ((i * 2 * warp.counts[1] + j) * 4 + low / 4 + right) as usize;
                        let values: Vec<Value> = sums.chunks(warp.sums()).map(|own| own[of_each]).collect();
                        finish(d, &at, mask, &values);
                    }
                }
            }
        }
    }

    /// A product of few rows: a warp sums a chunk at a time, and lanes then add a group of chunks in their order. Each weight is read once.
    pub fn few_by_units(&self, d: &mut Draft<'_>, rows: u32, spot: &Spot<'_>, finish: &Finish<'_>) {
        let (of, first_row) = self.staged(d, [rows, FEW_COLUMNS], CHUNKS, 1, spot);
        let block = ROWS * FEW_COLUMNS;
        let parts: Vec<TileId> = of.b.iter().map(|_| d.b.tile(Element::F32, CHUNKS * block)).collect();
        let lane = d.b.lane();
        let (warp, own) = d.b.halves(lane, WARP);
        let firsts = [rows, FEW_COLUMNS].map(|lines| scaled(d, warp, lines * PITCH));
        let part = Part { firsts, counts: [1, 1] };
        let (group, place) = d.b.halves(own, 4);
        let (mine, place) = (scaled(d, group, FEW_COLUMNS), scaled(d, place, 2));
        let mine = d.b.add(mine, place);
        let first = scaled(d, warp, block);
        let mine = d.b.add(first, mine);
        let (zero, first, end) = (d.b.float(0.0), d.b.int(0), spot.end);
        let count = of.b.len();
        let begun = [vec![zero; count], of.fetch(d, spot, first_row, first)].concat();
        let totals = d.repeat([first, end], CHUNK * CHUNKS, &begun, |d, base, carried| {
            let (first, most) = (d.b.int(0), d.b.int(CHUNK as i32));
            let left = d.b.sub(end, base);
            let to = d.b.binary(BinaryFn::Min, left, most);
            let after = offset(d, base, CHUNK * CHUNKS);
            let sums = vec![zero; 8 * count];
            let inner = [sums.as_slice(), &carried[count..]].concat();
            let inner = d.repeat([first, to], DEPTH, &inner, |d, at, carried| {
                d.b.barrier();
                let begun = d.b.add(base, at);
                of.put(d, 0, &carried[8 * count..], begun);
                d.b.barrier();
                let next = offset(d, at, DEPTH);
                let there = d.b.less(next, to);
                let near = d.b.add(base, next);
                let next = d.b.select(there, near, after);
                let fetched = of.fetch(d, spot, first_row, next);
                [of.multiply(d, 0, &part, &carried[..8 * count]), fetched].concat()
            });
            d.b.barrier();
            for (&tile, sums) in parts.iter().zip(inner.chunks(8)) {
                for (at, two) in sums.chunks(2).enumerate().take(4) {
                    let (half, low) = (at as u32 / 2, at as u32 % 2);
                    let at = offset(d, mine, low * 8 * FEW_COLUMNS + half * COLUMNS);
                    d.b.put(tile, at, two);
                }
            }
            d.b.barrier();
            let mut totals = carried[..count].to_vec();
            for (&tile, total) in parts.iter().zip(&mut totals) {
                for chunk in 0..CHUNKS {
                    let at = offset(d, lane, chunk * block);
                    let part = d.b.take(tile, at, 1)[0];
                    *total = d.b.add(*total, part);
                }
            }
            [totals.as_slice(), &inner[8 * count..]].concat()
        });
        let (row, column) = d.b.halves(lane, FEW_COLUMNS);
        let column = d.b.add(spot.firsts[1], column);
        let room = d.b.int(rows as i32);
        self.finish_own(d, spot, [row, column], [row, room], finish, &totals[..count]);
    }

    /// Launches for every number of rows; programs of the large form serve where there are as many as a device runs at once.
    pub fn launch_by_units(
        &self,
        cx: &mut LowerCx<'_>,
        name: &str,
        wave: usize,
        timed: Option<Choice>,
        prepare: &dyn Fn(&mut Draft<'_>) -> Box<Finish<'static>>,
    ) -> Result<(), BackendError> {
        let [.., rows, columns] = self.dims else { return Err(cx.mismatched()) };
        let few = timed.map_or(ROWS as usize, |choice| choice.few);
        let (count, first) = (self.b.len(), if few > 0 { few + 1 } else { 0 });
        let forms = match timed {
            Some(choice) => Form::large_from(
                count,
                count == 1,
                first,
                LARGE_FROM[choice.schedule.min(LARGE_FROM.len() - 1)],
            ),
            None => Form::of(count, count == 1, columns, first, wave),
        };
        for (form, from, to) in forms {
            let programs = Amount::product(&self.grid(form.rows, form.columns));
            let Some(programs) = rows.when(from, to, programs) else { continue };
            let mut d = cx.draft_of(format!("{name}_mma{}", form.rows), form.lanes());
            let finish = prepare(&mut d);
            let spot = self.place(&mut d, form.rows, form.columns);
            self.many_by_units(&mut d, form, &spot, &*finish);
            cx.launch(d, programs)?;
        }
        let mut from = 0;
        for room in FEW.into_iter().filter(|_| few > 0) {
            let programs = Amount::product(&self.grid(room, FEW_COLUMNS));
            let most = few.min(room as usize);
            if let Some(programs) = rows.when(from, most, programs).filter(|_| from <= most) {
                let mut d = cx.draft_of(format!("{name}_mma_few{room}"), FEW_LANES);
                let finish = prepare(&mut d);
                let spot = self.place(&mut d, room, FEW_COLUMNS);
                self.few_by_units(&mut d, room, &spot, &*finish);
                cx.launch(d, programs)?;
            }
            from = room as usize + 1;
        }
        Ok(())
    }
}
