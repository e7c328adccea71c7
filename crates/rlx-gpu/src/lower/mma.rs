//! Matrix products by matrix units: operands of 16 bits, sums of 32, for devices whose warps of 32 lanes multiply together. The other
//! operand is rounded to the weights' type, and a device adds in an order of its own, so results are not those of the other forms: whoever
//! asks for it asks for it in every run.

use super::Draft;
use super::product::{Finish, Lines, Product, Spot, offset, scaled};
use crate::ir::{BinaryFn, Element, Pairs, TileId, UnaryFn, Value};
use rlx_tensor::DType;

/// Rows and columns of a program: four warps, each with half of both.
pub(super) const SIDE: u32 = 64;
pub(super) const LANES: u32 = 128;
/// Products of each element that stand in tiles at once.
const DEPTH: u32 = 32;
/// Words from one line of a tile to the next: lanes of a warp find their words in different banks.
const PITCH: u32 = DEPTH / 2 + 4;
/// Rows and columns that a warp multiplies at once, and how often within its part.
const ROWS: u32 = 16;
const COLUMNS: u32 = 8;
const DOWN: u32 = SIDE / 2 / ROWS;
const ACROSS: u32 = SIDE / 2 / COLUMNS;

/// What a lane fetches of an operand for a step, and where it puts it in pairs.
struct Stager {
    lines: Lines,
    tile: TileId,
    group: u32,
    /// For each fetch: line within the program, offset along k, first word.
    units: Vec<[Value; 3]>,
}

impl Stager {
    fn new(d: &mut Draft<'_>, lines: Lines) -> Self {
        let group = lines.group(SIDE * DEPTH, DEPTH, LANES);
        let tile = d.b.tile(Element::I32, SIDE * PITCH);
        let groups = DEPTH / group;
        let unit = |d: &mut Draft<'_>, round: u32| {
            let lane = d.b.lane();
            let number = offset(d, lane, round * LANES);
            let (line, part) = d.b.halves(number, groups);
            let (first, word) = (scaled(d, line, PITCH), scaled(d, part, group / 2));
            [line, scaled(d, part, group), d.b.add(first, word)]
        };
        let units = (0..SIDE * groups / LANES).map(|round| unit(d, round)).collect();
        Stager { lines, tile, group, units }
    }

    fn fetch(&self, d: &mut Draft<'_>, lead: &[Value], first: [Value; 2], inside: Value) -> Vec<Value> {
        let each = |d: &mut Draft<'_>, &[line, along, _]: &[Value; 3]| {
            let at = [d.b.add(first[0], line), d.b.add(first[1], along)];
            self.lines.fetch(d, lead, at, inside, self.group)
        };
        self.units.iter().flat_map(|unit| each(d, unit)).collect()
    }

    fn put(&self, d: &mut Draft<'_>, pairs: Pairs, values: &[Value], first: Value) {
        let raw = self.lines.raw(self.group);
        for (&[_, along, at], raw) in self.units.iter().zip(values.chunks(raw)) {
            let words = match self.lines.pairs() {
                Some(own) if own == pairs => raw.to_vec(),
                _ => {
                    let group = self.lines.decode(d, raw, |d| d.b.add(first, along), self.group);
                    group.chunks(2).map(|two| packed(d, pairs, [two[0], two[1]])).collect()
                }
            };
            for (i, part) in words.chunks(4).enumerate() {
                let at = offset(d, at, 4 * i as u32);
                d.b.put(self.tile, at, part);
            }
        }
    }
}

/// Two floats, rounded, in a word.
fn packed(d: &mut Draft<'_>, pairs: Pairs, both: [Value; 2]) -> Value {
    if pairs == Pairs::Half {
        return d.b.binary(BinaryFn::PackHalves, both[0], both[1]);
    }
    let [low, high] = both.map(|x| {
        let rounded = d.rounded(DType::BF16, x);
        d.b.unary(UnaryFn::Bits, rounded)
    });
    let (sixteen, upper) = (d.b.int(16), d.b.int(-1 << 16));
    let low = d.b.binary(BinaryFn::ShiftRight, low, sixteen);
    let high = d.b.binary(BinaryFn::And, high, upper);
    d.b.binary(BinaryFn::Or, low, high)
}

impl Product<'_> {
    /// The type of the operands if a device's matrix units take them.
    pub fn mma_pairs(&self) -> Option<Pairs> {
        match self.b.iter().map(|o| o.dtype).collect::<Vec<_>>().as_slice() {
            [DType::F16] => Some(Pairs::Half),
            [DType::BF16] => Some(Pairs::Brain),
            _ => None,
        }
    }

    /// A product of one matrix by matrix units.
    pub fn mma(&self, d: &mut Draft<'_>, pairs: Pairs, finish: &Finish<'_>) {
        let Spot { lead, firsts, inside, end, .. } = self.place(d, SIDE, SIDE);
        let (rows, columns) = (Lines::of_rows(d, self), Lines::new(d, &self.b[0]));
        let (a, b) = (Stager::new(d, rows), Stager::new(d, columns));
        let lane = d.b.lane();
        let (warp, own) = d.b.halves(lane, 32);
        let (down, across) = d.b.halves(warp, 2);
        let (down, across) = (scaled(d, down, SIDE / 2), scaled(d, across, SIDE / 2));
        let count = (DOWN * ACROSS * 4) as usize;
        let fetch = |d: &mut Draft<'_>, k: Value| {
            let left = a.fetch(d, &lead, [firsts[0], k], inside);
            [left, b.fetch(d, &lead, [firsts[1], k], inside)].concat()
        };
        let (first, zero) = (d.b.int(0), d.b.float(0.0));
        let begun = [vec![zero; count], fetch(d, first)].concat();
        let sums = d.repeat([first, end], DEPTH, &begun, |d, at, carried| {
            let (sums, staged) = carried.split_at(count);
            let (left, right) = staged.split_at(a.units.len() * a.lines.raw(a.group));
            d.b.barrier();
            a.put(d, pairs, left, at);
            b.put(d, pairs, right, at);
            d.b.barrier();
            let next = offset(d, at, DEPTH);
            let fetched = fetch(d, next);
            let mut sums = sums.to_vec();
            for word in (0..DEPTH / 2).step_by(8) {
                for (at, four) in sums.chunks_mut(4).enumerate() {
                    let (i, j) = (at as u32 / ACROSS, at as u32 % ACROSS);
                    let row = offset(d, down, i * ROWS);
                    let row = scaled(d, row, PITCH);
                    let column = offset(d, across, j * COLUMNS);
                    let column = scaled(d, column, PITCH);
                    let places = [offset(d, row, word), offset(d, column, word)];
                    let so_far = [four[0], four[1], four[2], four[3]];
                    let new = d.b.mma(pairs, [a.tile, b.tile], places, [PITCH; 2], so_far);
                    four.copy_from_slice(&new);
                }
            }
            [sums, fetched].concat()
        });
        let (group, place) = d.b.halves(own, 4);
        let place = scaled(d, place, 2);
        for (at, four) in sums[..count].chunks(4).enumerate() {
            let (i, j) = (at as u32 / ACROSS, at as u32 % ACROSS);
            for (part, &sum) in four.iter().enumerate() {
                let (low, right) = (part as u32 / 2 * 8, part as u32 % 2);
                let row = offset(d, down, i * ROWS + low);
                let row = d.b.add(row, group);
                let row = d.b.add(firsts[0], row);
                let column = offset(d, across, j * COLUMNS + right);
                let column = d.b.add(column, place);
                let column = d.b.add(firsts[1], column);
                let known = self.known(d, row, 0, inside);
                let mask = self.known(d, column, 1, known);
                let at: Vec<Value> = lead.iter().copied().chain([row, column]).collect();
                finish(d, &at, mask, &[sum]);
            }
        }
    }
}
