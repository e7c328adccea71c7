//! Matrix products of few rows: what a decoded token asks for. The weights are read once, in whole sectors, by lanes that stand along k;
//! each lane then sums one chunk of one column for all rows, and the chunks are added in their order.

use super::Draft;
use super::lines::{Lines, offset, scaled};
use super::product::{CHUNK, Finish, Product, Spot, Stager};
use crate::ir::{BinaryFn, Element, Value};

/// Columns of a program.
pub(super) const COLUMNS: u32 = 8;
/// Chunks of a column that a program sums at once.
const CHUNKS: u32 = 8;
/// Lanes of a program: one for each column and chunk.
pub(super) const LANES: u32 = COLUMNS * CHUNKS;

/// A form for so many rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    /// Fewest rows that take it.
    pub from: usize,
    /// Rows that it has room for: a power of two, no more than chunks.
    pub rows: u32,
    /// Products of each lane that stand in tiles at once.
    pub depth: u32,
}

/// The forms for up to [`super::schedules::FEW`] rows of one matrix or two: tiles of at most 16 KiB.
fn forms(matrices: usize) -> [Form; 2] {
    match matrices {
        1 => [Form { from: 0, rows: 1, depth: 32 }, Form { from: 2, rows: 8, depth: 16 }],
        _ => [Form { from: 0, rows: 2, depth: 16 }, Form { from: 3, rows: 8, depth: 16 }],
    }
}

/// A tile of `depth` products for each pair of a line and a chunk.
fn pairs(d: &mut Draft<'_>, source: Lines, lines: u32, depth: u32) -> Stager {
    let lanes = d.b.lanes();
    let group = source.group(lines * CHUNKS * depth, depth, lanes);
    let (groups, pitch) = (depth / group, depth + 4);
    let tile = d.b.tile(Element::F32, lines * CHUNKS * pitch);
    let unit = |d: &mut Draft<'_>, round: u32| {
        let lane = d.b.lane();
        let number = offset(d, lane, round * lanes);
        let (pair, part) = d.b.halves(number, groups);
        let (line, chunk) = d.b.halves(pair, CHUNKS);
        let within = scaled(d, part, group);
        let along = scaled(d, chunk, CHUNK);
        let along = d.b.add(along, within);
        let first = scaled(d, pair, pitch);
        [line, along, d.b.add(first, within)]
    };
    let units = (0..lines * CHUNKS * groups / lanes).map(|round| unit(d, round)).collect();
    Stager { lines: source, tile, group, units, apart: 1 }
}

impl Product<'_> {
    /// The forms for few rows.
    pub fn few_forms(&self) -> [Form; 2] {
        forms(if self.codes.is_some() { 1 } else { self.b.len() })
    }

    /// A product of few rows.
    pub fn few(&self, d: &mut Draft<'_>, form: Form, spot: &Spot<'_>, finish: &Finish<'_>) {
        match self.codes {
            Some(codes) => self.few_dots(d, codes, form.rows, spot, finish),
            None => self.few_floats(d, form, spot, finish),
        }
    }

    fn few_floats(&self, d: &mut Draft<'_>, form: Form, spot: &Spot<'_>, finish: &Finish<'_>) {
        let lines = self.row_lines(d);
        let mut a = pairs(d, lines, form.rows, form.depth);
        let first_row = a.begin(d, spot);
        let columns = self.column_lines(d);
        let b: Vec<Stager> = columns.into_iter().map(|lines| pairs(d, lines, COLUMNS, form.depth)).collect();
        let parts: Vec<_> = b.iter().map(|_| d.b.tile(Element::F32, form.rows * LANES)).collect();
        let lane = d.b.lane();
        let (column, chunk) = d.b.halves(lane, CHUNKS);
        let pitch = form.depth + 4;
        let (own, x) = (scaled(d, lane, pitch), scaled(d, chunk, pitch));
        let fetch = |d: &mut Draft<'_>, k: Value| -> Vec<Value> {
            let mut values = a.fetch(d, &spot.lead, [first_row, k], spot.inside);
            b.iter().for_each(|b| values.extend(b.fetch(d, &spot.lead, [spot.line, k], spot.inside)));
            values
        };
        let rows = form.rows as usize;
        let step = |d: &mut Draft<'_>, sums: &[Value]| -> Vec<Value> {
            let mut sums = sums.to_vec();
            for at in (0..form.depth).step_by(4) {
                let left: Vec<Vec<Value>> = (0..form.rows)
                    .map(|row| {
                        let at = offset(d, x, row * CHUNKS * pitch + at);
                        d.b.take(a.tile, at, 4)
                    })
                    .collect();
                for (b, sums) in b.iter().zip(sums.chunks_mut(rows)) {
                    let at = offset(d, own, at);
                    let right = d.b.take(b.tile, at, 4);
                    for (sum, left) in sums.iter_mut().zip(&left) {
                        for (&x, &w) in left.iter().zip(&right) {
                            *sum = d.b.fma(x, w, *sum);
                        }
                    }
                }
            }
            sums
        };
        // The row whose chunks this lane adds up.
        let most = d.b.int(form.rows as i32 - 1);
        let row = d.b.binary(BinaryFn::And, chunk, most);
        let (first, end, zero) = (d.b.int(0), spot.end, d.b.float(0.0));
        let count = b.len();
        let firsts_of = [vec![zero; count], fetch(d, first)].concat();
        let totals = d.repeat([first, end], CHUNK * CHUNKS, &firsts_of, |d, base, carried| {
            let (first, most) = (d.b.int(0), d.b.int(CHUNK as i32));
            let left = d.b.sub(end, base);
            let to = d.b.binary(BinaryFn::Min, left, most);
            let after = offset(d, base, CHUNK * CHUNKS);
            let zeros = vec![zero; rows * count];
            let inner = [zeros.as_slice(), &carried[count..]].concat();
            let inner = d.repeat([first, to], form.depth, &inner, |d, at, carried| {
                d.b.barrier();
                let mut rest = &carried[rows * count..];
                let begun = d.b.add(base, at);
                for stager in [&a].into_iter().chain(&b) {
                    let (own, after) = rest.split_at(stager.count());
                    stager.put(d, own, begun);
                    rest = after;
                }
                d.b.barrier();
                let next = offset(d, at, form.depth);
                let there = d.b.less(next, to);
                let near = d.b.add(base, next);
                let next = d.b.select(there, near, after);
                let fetched = fetch(d, next);
                [step(d, &carried[..rows * count]), fetched].concat()
            });
            d.b.barrier();
            for (&tile, sums) in parts.iter().zip(inner.chunks(rows)) {
                for (row, &sum) in sums.iter().enumerate().take(rows) {
                    let at = offset(d, lane, row as u32 * LANES);
                    d.b.put(tile, at, &[sum]);
                }
            }
            d.b.barrier();
            let at = scaled(d, row, LANES);
            let own = scaled(d, column, CHUNKS);
            let at = d.b.add(at, own);
            let mut totals = carried[..count].to_vec();
            for (&tile, total) in parts.iter().zip(&mut totals) {
                for i in (0..CHUNKS).step_by(4) {
                    let at = offset(d, at, i);
                    for part in d.b.take(tile, at, 4) {
                        *total = d.b.add(*total, part);
                    }
                }
            }
            [totals.as_slice(), &inner[rows * count..]].concat()
        });
        let column = d.b.add(spot.firsts[1], column);
        let taken = d.b.int(form.rows as i32);
        self.finish_own(d, spot, [row, column], [chunk, taken], finish, &totals[..count]);
    }
}

const _: () = assert!(CHUNKS as usize >= super::schedules::FEW);
