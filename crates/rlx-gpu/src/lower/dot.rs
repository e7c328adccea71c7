//! Products of quantised rows with packed weights: codes are multiplied four at a time, floats only where scales meet.
//!
//! Every form computes one sum, that of the host (`rlx-kernels/src/quant_dot/block.rs`): for the elements of each scale, from the first to
//! the last, the products of codes are summed exactly as integers, and `sum = fma(dot * scale, row's scale, sum)`; of weights with minima
//! then `sum = fma(-min, row's scale * sum of its codes, sum)`.
//!
//! Mesa's compiler takes `a * c + (b * c + sum)` for `(a + b) * c + sum`, in one form and not in the other. So a row's scale stands in a tile
//! once for each scale of the weights that it meets, and sums begin with a zero that only a run knows.

mod units;

use super::blocks::Blocks;
use super::few::COLUMNS;
use super::lines::{offset, scaled};
use super::product::{Finish, Product, Spot};
use super::quantise::{CELL, CodeViews, Codes};
use super::schedules::Schedule;
use super::{Amount, Draft, Operand, blocks};
use crate::ir::{BinaryFn, Element, TileId, UnaryFn, Value};

/// Elements along k that stand in tiles at once where rows are many.
const DEPTH: u32 = 64;
/// Lanes that share a column where rows are few: each takes every eighth cell.
const SHARES: u32 = 8;
/// Words of tiles that few rows may take.
const ROOM: u32 = 4096;
/// What integer sums begin with: read as a float, their bits are 1.5 * 2^23 and the sum.
const ANCHOR_BITS: i32 = 0x4b40_0000;

/// Whether these matrices are packed blocks of one type, which codes may be multiplied with.
pub(super) fn takes(matrices: &[Operand]) -> bool {
    matrices.iter().all(|m| blocks::is_whole(m) && m.dtype == matrices[0].dtype)
}

/// A sum of products of codes as a float, exactly.
fn exact(d: &mut Draft<'_>, sum: Value) -> Value {
    let anchored = d.b.unary(UnaryFn::FromBits, sum);
    let anchor = d.b.float(f64::from(f32::from_bits(ANCHOR_BITS as u32)));
    d.b.sub(anchored, anchor)
}

/// A zero of which a device's compiler does not know that it is one.
fn unknown_zero(d: &mut Draft<'_>) -> Value {
    let zero = d.free(Amount::Known(0));
    let zero = d.b.arg(zero);
    d.b.unary(UnaryFn::ToFloat, zero)
}

/// Where one operand's codes and scales stand in tiles.
struct Side {
    words: TileId,
    /// Words from one line's codes to the next's, and from one word along k to the next.
    apart: [u32; 2],
    /// Scales, and minima or what they are multiplied by.
    scales: Vec<TileId>,
    /// Elements that a lane brings at once, and those that one of its scales covers.
    group: u32,
    per: u32,
    /// Words from scales of all lines to the next along k.
    pitch: u32,
    /// For each fetch: line within the program, and which group along k.
    units: Vec<[Value; 2]>,
}

impl Side {
    /// Lines beside each other, words along k one after another.
    fn new(d: &mut Draft<'_>, lines: u32, per_scale: u32, tiles: usize) -> Self {
        Self::apart(d, lines, per_scale, tiles, [1, lines + 4])
    }

    fn apart(d: &mut Draft<'_>, lines: u32, per_scale: u32, tiles: usize, apart: [u32; 2]) -> Self {
        let (lanes, pitch) = (d.b.lanes(), lines + 4);
        let group = if (lines * DEPTH / 32).is_multiple_of(lanes) { 32 } else { 16 };
        let (per, groups) = (per_scale.min(group), DEPTH / group);
        let unit = |d: &mut Draft<'_>, round: u32| {
            let lane = d.b.lane();
            let number = offset(d, lane, round * lanes);
            let (line, part) = d.b.halves(number, groups);
            [line, part]
        };
        let units = (0..lines * groups / lanes).map(|round| unit(d, round)).collect();
        let words = d.b.tile(Element::I32, (lines * apart[0]).max(DEPTH / 4 * apart[1]));
        let scales = (0..tiles).map(|_| d.b.tile(Element::F32, DEPTH / per * pitch)).collect();
        Side { words, apart, scales, group, per, pitch, units }
    }

    /// Where a unit's elements begin along k.
    fn along(&self, d: &mut Draft<'_>, part: Value, k: Value) -> Value {
        let along = scaled(d, part, self.group);
        d.b.add(k, along)
    }

    /// Puts the codes of a unit, and its scales, a list for each tile.
    fn put(&self, d: &mut Draft<'_>, [line, part]: [Value; 2], words: &[Value], scales: &[Vec<Value>]) {
        let (first, line_at) =
            (scaled(d, part, self.group / 4 * self.apart[1]), scaled(d, line, self.apart[0]));
        let first = d.b.add(first, line_at);
        let wide = if self.apart[1] == 1 { 4 } else { 1 };
        for (i, words) in words.chunks(wide).enumerate() {
            let at = offset(d, first, (i * wide) as u32 * self.apart[1]);
            d.b.put(self.words, at, words);
        }
        let first = scaled(d, part, self.group / self.per * self.pitch);
        let first = d.b.add(first, line);
        for (&tile, values) in self.scales.iter().zip(scales) {
            for (i, &value) in values.iter().enumerate() {
                let at = offset(d, first, i as u32 * self.pitch);
                d.b.put(tile, at, &[value]);
            }
        }
    }

    /// Where the first line's scale for a group of so many elements stands.
    fn scale_at(&self, d: &mut Draft<'_>, group: Value, of: u32) -> Value {
        let slot = match self.per {
            per if per > of => d.b.halves(group, per / of).0,
            per => scaled(d, group, of / per),
        };
        scaled(d, slot, self.pitch)
    }
}

/// Which of a program's rows and columns are a lane's, and how they are written out.
struct Own {
    row: Value,
    column: Value,
    schedule: Schedule,
}

impl Own {
    /// Values of the lane's rows, from where the first line's stands.
    fn of_rows(&self, d: &mut Draft<'_>, tile: TileId, at: Value) -> Vec<Value> {
        let at = d.b.add(at, self.row);
        let part = |part: u32| {
            let at = offset(d, at, part * 4 * self.schedule.down());
            d.b.take(tile, at, 4)
        };
        (0..self.schedule.each[0] / 4).flat_map(part).collect()
    }

    /// Values of the lane's columns.
    fn of_columns(&self, d: &mut Draft<'_>, tile: TileId, at: Value) -> Vec<Value> {
        let at = d.b.add(at, self.column);
        let take = |part: u32| {
            let at = offset(d, at, part * self.schedule.across());
            d.b.take(tile, at, 1)[0]
        };
        (0..self.schedule.each[1]).map(take).collect()
    }
}

/// The sums of a program's rows and columns over one step along k: `sums` for each matrix, rows by columns.
fn over_step(
    d: &mut Draft<'_>,
    own: &Own,
    a: &Side,
    b: &[Side],
    per_scale: u32,
    sums: &[Value],
) -> Vec<Value> {
    let each = (own.schedule.each[0] * own.schedule.each[1]) as usize;
    let columns = own.schedule.each[1] as usize;
    let (first, end, anchor) = (d.b.int(0), d.b.int((DEPTH / per_scale) as i32), d.b.int(ANCHOR_BITS));
    let turns = own.schedule.turns.min(per_scale / 4);
    d.repeat([first, end], 1, sums, |d, group, sums| {
        let (words, none) = (d.b.int((per_scale / 4) as i32), d.b.int(0));
        let begun = d.b.mul(group, words);
        let anchors = vec![anchor; each * b.len()];
        let turn = |d: &mut Draft<'_>, word: Value, dots: &[Value]| {
            let mut dots = dots.to_vec();
            for turn in 0..turns {
                let word = d.b.add(begun, word);
                let word = offset(d, word, turn);
                let at = scaled(d, word, a.apart[1]);
                let left = own.of_rows(d, a.words, at);
                for (b, dots) in b.iter().zip(dots.chunks_mut(each)) {
                    let at = scaled(d, word, b.apart[1]);
                    let right = own.of_columns(d, b.words, at);
                    for (at, dot) in dots.iter_mut().enumerate() {
                        *dot = d.b.dot4(left[at / columns], right[at % columns], *dot);
                    }
                }
            }
            dots
        };
        let dots = match turns * 4 == per_scale {
            true => turn(d, none, &anchors),
            false => d.repeat([none, words], turns, &anchors, |d, word, dots| turn(d, word, dots)),
        };
        let at = a.scale_at(d, group, per_scale);
        let rows: Vec<Vec<Value>> = a.scales.iter().map(|&tile| own.of_rows(d, tile, at)).collect();
        let mut next = Vec::with_capacity(sums.len());
        for ((b, dots), sums) in b.iter().zip(dots.chunks(each)).zip(sums.chunks(each)) {
            let at = b.scale_at(d, group, per_scale);
            let columns_of: Vec<Vec<Value>> =
                b.scales.iter().map(|&tile| own.of_columns(d, tile, at)).collect();
            for (at, (&dot, &sum)) in dots.iter().zip(sums).enumerate() {
                let (i, j) = (at / columns, at % columns);
                let of_row: Vec<Value> = rows.iter().map(|values| values[i]).collect();
                let of_column: Vec<Value> = columns_of.iter().map(|values| values[j]).collect();
                let dot = exact(d, dot);
                let dot = d.b.mul(dot, of_column[0]);
                next.push(added(d, dot, &of_row, of_column.get(1).copied(), sum));
            }
        }
        next
    })
}

/// A scaled dot of a row added to its sum, and a minimum if there is one.
fn added(d: &mut Draft<'_>, dot: Value, of_row: &[Value], minus: Option<Value>, sum: Value) -> Value {
    let sum = d.b.fma(dot, of_row[0], sum);
    match (minus, of_row.get(1)) {
        (Some(minus), Some(&codes)) => d.b.fma(minus, codes, sum),
        _ => sum,
    }
}

/// Views of the operands of a product.
struct CodeOperands {
    rows: CodeViews,
    matrices: Vec<Blocks>,
    line: Amount,
}

impl CodeOperands {
    fn new(d: &mut Draft<'_>, product: &Product<'_>, codes: &Codes) -> Self {
        let matrices: Vec<Blocks> = product.b.iter().filter_map(|o| Blocks::new(d, o)).collect();
        let minima = matrices.iter().find(|m| m.has_minima()).map(Blocks::per_scale);
        CodeOperands { rows: codes.views(d, minima), matrices, line: product.b[0].dims[0].clone() }
    }

    /// Tiles of scales of one side.
    fn scale_tiles(&self) -> usize {
        1 + usize::from(self.rows.has_sums())
    }

    fn per_scale(&self) -> u32 {
        self.matrices.iter().map(Blocks::per_scale).min().unwrap_or(CELL)
    }

    /// Whether the matrices have a line, and the mask says so.
    fn known(&self, d: &mut Draft<'_>, line: Value, mask: Value) -> Value {
        let extent = d.size(&self.line);
        let there = d.b.within(line, extent);
        d.b.and(mask, there)
    }

    /// The codes of what was fetched of a matrix, its scales, and its minima if it has some.
    fn decoded(
        d: &mut Draft<'_>,
        blocks: &Blocks,
        raw: &[Value],
        k: Value,
        count: u32,
    ) -> (Vec<Value>, Vec<Vec<Value>>) {
        let words = blocks.bytes(d, raw, k, count);
        let (scales, minima) = blocks.scales(d, raw, k, count);
        (words, [scales, minima].into_iter().filter(|values| !values.is_empty()).collect())
    }
}

/// The line of the rows' codes that a row's stand in.
fn line_of(d: &mut Draft<'_>, spot: &Spot<'_>, own: Value) -> Value {
    let row = d.b.add(spot.firsts[0], own);
    spot.stands.map_or(row, |stands| stands(d, row))
}

impl Product<'_> {
    /// A schedule whose sums, integers and floats, fit a lane's registers.
    pub fn fitted(&self, schedule: Schedule) -> Schedule {
        match self.codes.is_some() && self.b.len() > 1 && schedule.each[0] > 4 {
            true => Schedule::PAIR,
            false => schedule,
        }
    }

    /// A product of any number of quantised rows: tiles of codes.
    pub fn many_dots(
        &self,
        d: &mut Draft<'_>,
        codes: &Codes,
        schedule: Schedule,
        spot: &Spot<'_>,
        finish: &Finish<'_>,
    ) {
        let operands = CodeOperands::new(d, self, codes);
        let (per_scale, tiles) = (operands.per_scale(), operands.scale_tiles());
        let a = Side::new(d, schedule.rows, per_scale, tiles);
        let b = operands.matrices.iter().map(|_| Side::new(d, schedule.columns, per_scale, tiles)).collect();
        let lane = d.b.lane();
        let (row, column) = d.b.halves(lane, schedule.across());
        let own = Own { row: scaled(d, row, 4), column, schedule };
        let staged = StagedCodes::new(d, operands, a, b, spot);
        let each = (schedule.each[0] * schedule.each[1]) as usize;
        let step =
            |d: &mut Draft<'_>, sums: &[Value]| over_step(d, &own, &staged.a, &staged.b, per_scale, sums);
        let sums = staged.over_k(d, spot, each * self.b.len(), &step);
        self.finish_block(d, schedule, spot, [own.row, own.column], &sums, finish);
    }
}

/// Codes of rows and columns on their way into tiles.
struct StagedCodes {
    operands: CodeOperands,
    a: Side,
    b: Vec<Side>,
    /// Of each of the first side's fetches the line, and whether it is one.
    rows: Vec<(Value, Value)>,
}

/// New sums of those so far and of what stands in tiles.
type CodeStep<'s> = dyn Fn(&mut Draft<'_>, &[Value]) -> Vec<Value> + 's;

impl StagedCodes {
    fn new(d: &mut Draft<'_>, operands: CodeOperands, a: Side, b: Vec<Side>, spot: &Spot<'_>) -> Self {
        let rows = a
            .units
            .iter()
            .map(|&[line, _]| {
                let line = line_of(d, spot, line);
                (line, operands.rows.known(d, line, spot.inside))
            })
            .collect();
        StagedCodes { operands, a, b, rows }
    }

    /// What is to be loaded for a step that begins at `k`.
    fn fetch(&self, d: &mut Draft<'_>, spot: &Spot<'_>, k: Value) -> Vec<Value> {
        let StagedCodes { operands, a, b, rows } = self;
        let mut values = Vec::new();
        for (&[_, part], &(line, known)) in a.units.iter().zip(rows) {
            let k = a.along(d, part, k);
            values.extend(operands.rows.codes(d, [line, k], known, a.group));
            values.extend(operands.rows.scales(d, [line, k], known, a.group));
        }
        for (side, blocks) in b.iter().zip(&operands.matrices) {
            for &[line, part] in &side.units {
                let (line, k) = (d.b.add(spot.line, line), side.along(d, part, k));
                let known = operands.known(d, line, spot.inside);
                values.extend(blocks.fetch(d, [line, k], known, side.group));
            }
        }
        values
    }

    fn put(&self, d: &mut Draft<'_>, mut staged: &[Value], k: Value) {
        let StagedCodes { operands, a, b, .. } = self;
        let mut next = |count: usize| {
            let (own, rest) = staged.split_at(count);
            staged = rest;
            own.to_vec()
        };
        for &unit in &a.units {
            let words = next(a.group as usize / 4);
            let copies = (a.group / a.per) as usize;
            let scales = next(operands.rows.scale_count(a.group));
            let scales = operands.rows.spread(&scales, copies);
            a.put(d, unit, &words, &scales);
        }
        for (side, blocks) in b.iter().zip(&operands.matrices) {
            for &unit in &side.units {
                let k = side.along(d, unit[1], k);
                let raw = next(blocks.raw(side.group));
                let (words, scales) = CodeOperands::decoded(d, blocks, &raw, k, side.group);
                side.put(d, unit, &words, &scales);
            }
        }
    }

    /// So many sums over all of k: the next step's codes are loaded while this one's are multiplied.
    fn over_k(&self, d: &mut Draft<'_>, spot: &Spot<'_>, count: usize, step: &CodeStep<'_>) -> Vec<Value> {
        let (first, zero) = (d.b.int(0), unknown_zero(d));
        let begun = [vec![zero; count], self.fetch(d, spot, first)].concat();
        let mut sums = d.repeat([first, spot.end], DEPTH, &begun, |d, k, carried| {
            d.b.barrier();
            self.put(d, &carried[count..], k);
            d.b.barrier();
            let next = offset(d, k, DEPTH);
            let fetched = self.fetch(d, spot, next);
            [step(d, &carried[..count]), fetched].concat()
        });
        sums.truncate(count);
        sums
    }
}

/// How few rows are multiplied.
#[derive(Clone, Copy)]
struct Few {
    /// Rows that there is room for: a power of two, no more than [`SHARES`].
    rows: u32,
    /// Cells of a column that stand in tiles at once.
    cells: u32,
    /// Scaled dots of a cell.
    parts: u32,
}

impl Few {
    fn new(rows: u32, matrices: u32, parts: u32, minima: bool) -> Self {
        let of = |turns: u32| Few { rows, cells: SHARES * turns, parts };
        let fits = |few: &Few| few.words(matrices, minima) <= ROOM && few.cells * rows <= 16 * SHARES;
        [4, 2].map(of).into_iter().find(fits).unwrap_or(of(1))
    }

    /// Words from one row or column to the next.
    fn pitch(self) -> u32 {
        self.cells * self.parts + 4
    }

    /// Rows whose scales stand in tiles: as many as all lanes bring.
    fn lines(self) -> u32 {
        self.rows.max(COLUMNS * SHARES / self.cells)
    }

    fn words(self, matrices: u32, minima: bool) -> u32 {
        let minima = u32::from(minima);
        let columns = matrices * COLUMNS * (self.rows + minima);
        (columns + (1 + minima) * self.lines()) * self.pitch()
    }
}

/// Tiles of few rows.
struct FewTiles {
    /// For each matrix, by column and row.
    dots: Vec<TileId>,
    /// For each matrix with minima, by column.
    minima: Vec<TileId>,
    /// Scales by row, and what minima are multiplied by.
    rows: Vec<TileId>,
}

impl FewTiles {
    fn new(d: &mut Draft<'_>, few: Few, operands: &CodeOperands) -> Self {
        let mut tile = |lines: u32| d.b.tile(Element::F32, lines * few.pitch());
        let matrices = &operands.matrices;
        FewTiles {
            dots: matrices.iter().map(|_| tile(COLUMNS * few.rows)).collect(),
            minima: matrices.iter().filter(|m| m.has_minima()).map(|_| tile(COLUMNS)).collect(),
            rows: (0..operands.scale_tiles()).map(|_| tile(few.lines())).collect(),
        }
    }

    /// A row's scaled dots of a column added to its sums, one for each matrix, in their order.
    fn add_up(&self, d: &mut Draft<'_>, few: Few, [column, row]: [Value; 2], sums: &[Value]) -> Vec<Value> {
        let first = scaled(d, column, few.rows);
        let first = d.b.add(first, row);
        let [first, of_row, of_column] = [first, row, column].map(|line| scaled(d, line, few.pitch()));
        let mut sums = sums.to_vec();
        let four = |d: &mut Draft<'_>, tile: TileId, first: Value, at: u32| {
            let at = offset(d, first, at);
            d.b.take(tile, at, 4)
        };
        for at in (0..few.cells * few.parts).step_by(4) {
            let rows: Vec<Vec<Value>> = self.rows.iter().map(|&tile| four(d, tile, of_row, at)).collect();
            for (matrix, sum) in sums.iter_mut().enumerate() {
                let dots = four(d, self.dots[matrix], first, at);
                let minima = self.minima.get(matrix).map(|&tile| four(d, tile, of_column, at));
                for (i, &dot) in dots.iter().enumerate() {
                    let of_row: Vec<Value> = rows.iter().map(|values| values[i]).collect();
                    *sum = added(d, dot, &of_row, minima.as_ref().map(|values| values[i]), *sum);
                }
            }
        }
        sums
    }
}

impl Product<'_> {
    /// A product of few quantised rows: a lane multiplies whole cells of one column, and what cells give is added up in their order.
    pub fn few_dots(
        &self,
        d: &mut Draft<'_>,
        codes: &Codes,
        rows: u32,
        spot: &Spot<'_>,
        finish: &Finish<'_>,
    ) {
        let operands = CodeOperands::new(d, self, codes);
        let minima = operands.rows.has_sums();
        let few = Few::new(rows, self.b.len() as u32, CELL / operands.per_scale(), minima);
        let tiles = FewTiles::new(d, few, &operands);
        let lane = d.b.lane();
        let (column, share) = d.b.halves(lane, SHARES);
        let lines: Vec<(Value, Value)> = (0..rows)
            .map(|row| {
                let row = d.b.int(row as i32);
                let line = line_of(d, spot, row);
                (line, operands.rows.known(d, line, spot.inside))
            })
            .collect();
        let line = d.b.add(spot.line, column);
        let known = operands.known(d, line, spot.inside);
        let staged = self.staged_scales(d, few, &operands, spot);
        let turns = few.cells / SHARES;
        let cell_of = |d: &mut Draft<'_>, k: Value, turn: u32| {
            let own = offset(d, share, turn * SHARES);
            let along = scaled(d, own, CELL);
            d.b.add(k, along)
        };
        let fetch = |d: &mut Draft<'_>, k: Value| -> Vec<Value> {
            let mut values = Vec::new();
            for turn in 0..turns {
                let k = cell_of(d, k, turn);
                operands.matrices.iter().for_each(|m| values.extend(m.fetch(d, [line, k], known, CELL)));
            }
            values
        };
        let count = self.b.len();
        let (first, zero) = (d.b.int(0), unknown_zero(d));
        // The row whose cells this lane adds up.
        let most = d.b.int(rows as i32 - 1);
        let row = d.b.binary(BinaryFn::And, share, most);
        let begun = [vec![zero; count], fetch(d, first)].concat();
        let sums = d.repeat([first, spot.end], few.cells * CELL, &begun, |d, base, carried| {
            let mut rest = &carried[count..];
            d.b.barrier();
            for &[line, cell, known, at] in &staged {
                let along = scaled(d, cell, CELL);
                let k = d.b.add(base, along);
                let scales = operands.rows.scales(d, [line, k], known, CELL);
                for (&tile, scales) in
                    tiles.rows.iter().zip(operands.rows.spread(&scales, few.parts as usize))
                {
                    d.b.put(tile, at, &scales);
                }
            }
            for turn in 0..turns {
                let k = cell_of(d, base, turn);
                let mut matrices = Vec::with_capacity(count);
                for blocks in &operands.matrices {
                    let (own, after) = rest.split_at(blocks.raw(CELL));
                    rest = after;
                    matrices.push(CodeOperands::decoded(d, blocks, own, k, CELL));
                }
                let own = offset(d, share, turn * SHARES);
                tiles.put_minima(d, few, [column, own], &matrices);
                for (row, &(line, known)) in lines.iter().enumerate() {
                    let x = operands.rows.codes(d, [line, k], known, CELL);
                    tiles.put_dots(d, few, [column, own], row as u32, &x, &matrices);
                }
            }
            d.b.barrier();
            let next = offset(d, base, few.cells * CELL);
            let fetched = fetch(d, next);
            [tiles.add_up(d, few, [column, row], &carried[..count]), fetched].concat()
        });
        let column = d.b.add(spot.firsts[1], column);
        let taken = d.b.int(rows as i32);
        self.finish_own(d, spot, [row, column], [share, taken], finish, &sums[..count]);
    }

    /// What each lane brings of the rows' scales: the line, the cell within a step, whether there is such a row, and where it stands.
    fn staged_scales(
        &self,
        d: &mut Draft<'_>,
        few: Few,
        operands: &CodeOperands,
        spot: &Spot<'_>,
    ) -> Vec<[Value; 4]> {
        let lanes = d.b.lanes();
        let unit = |d: &mut Draft<'_>, round: u32| {
            let lane = d.b.lane();
            let number = offset(d, lane, round * lanes);
            let (row, cell) = d.b.halves(number, few.cells);
            let line = line_of(d, spot, row);
            let (first, own) = (scaled(d, row, few.pitch()), scaled(d, cell, few.parts));
            [line, cell, operands.rows.known(d, line, spot.inside), d.b.add(first, own)]
        };
        (0..few.lines() * few.cells / lanes).map(|round| unit(d, round)).collect()
    }
}

/// Of each matrix the codes of a cell, its scales and its minima.
type Cells = [(Vec<Value>, Vec<Vec<Value>>)];

impl FewTiles {
    fn put_minima(&self, d: &mut Draft<'_>, few: Few, [column, own]: [Value; 2], matrices: &Cells) {
        for (&tile, (_, scales)) in self.minima.iter().zip(matrices) {
            let (first, own) = (scaled(d, column, few.pitch()), scaled(d, own, few.parts));
            let at = d.b.add(first, own);
            d.b.put(tile, at, &scales[1]);
        }
    }

    /// Multiplies the codes of a row's cell by those of each matrix.
    fn put_dots(
        &self,
        d: &mut Draft<'_>,
        few: Few,
        [column, own]: [Value; 2],
        row: u32,
        x: &[Value],
        matrices: &Cells,
    ) {
        let first = scaled(d, column, few.rows);
        let first = offset(d, first, row);
        let first = scaled(d, first, few.pitch());
        let own = scaled(d, own, few.parts);
        let at = d.b.add(first, own);
        let each = x.len() / few.parts as usize;
        for (&tile, (words, scales)) in self.dots.iter().zip(matrices) {
            let parts = x.chunks(each).zip(words.chunks(each)).zip(&scales[0]);
            let dots: Vec<Value> = parts
                .map(|((x, words), &scale)| {
                    let anchor = d.b.int(ANCHOR_BITS);
                    let pairs = x.iter().zip(words);
                    let dot = pairs.fold(anchor, |dot, (&x, &word)| d.b.dot4(word, x, dot));
                    let dot = exact(d, dot);
                    d.b.mul(dot, scale)
                })
                .collect();
            d.b.put(tile, at, &dots);
        }
    }
}
