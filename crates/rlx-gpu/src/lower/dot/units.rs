//! Products of quantised rows with packed weights by matrix units for bytes. Sums of integers are exact, so each element has the bits that it
//! has without.

use super::{ANCHOR_BITS, CodeOperands, Codes, DEPTH, Finish, Product, Side, Spot, StagedCodes, added};
use crate::ir::{TileId, UnaryFn, Value};
use crate::lower::blocks::per_scale;
use crate::lower::lines::{offset, scaled};
use crate::lower::mma::{COLUMNS, Form, ROWS, Warp};
use crate::lower::quantise::CELL;
use crate::lower::{Amount, Draft, LowerCx};
use rlx::backend::BackendError;

/// Words from one line of codes to the next: eight lines begin in different banks, four words apart.
const PITCH: u32 = DEPTH / 4 + 4;
/// Words of a cell.
const WORDS: u32 = CELL / 4;
const _: () = assert!(WORDS == 8 && PITCH % 32 % 8 == 4);

/// What scales a lane's rows or columns, and for minima what those are or what they are multiplied by.
type Factors = Vec<[Value; 2]>;

impl Warp {
    /// Of the lane's two rows of a fragment.
    fn of_rows(&self, d: &mut Draft<'_>, side: &Side, slot: Value, fragment: u32) -> Factors {
        let at = d.b.add(slot, self.row);
        let low_and_high = |tile: &TileId| {
            [0, 8].map(|low| {
                let at = offset(d, at, fragment * ROWS + low);
                d.b.take(*tile, at, 1)[0]
            })
        };
        side.scales.iter().map(low_and_high).collect()
    }

    /// Of the lane's two columns of eight, and the anchor times the first of each.
    fn of_columns(&self, d: &mut Draft<'_>, side: &Side, slot: Value, eight: u32) -> (Factors, [Value; 2]) {
        let at = d.b.add(slot, self.column);
        let two = |tile: &TileId| {
            let at = offset(d, at, eight * COLUMNS);
            let both = d.b.take(*tile, at, 2);
            [both[0], both[1]]
        };
        let factors: Factors = side.scales.iter().map(two).collect();
        let anchor = d.b.float(-f64::from(f32::from_bits(ANCHOR_BITS as u32)));
        (factors.clone(), factors[0].map(|scale| d.b.mul(scale, anchor)))
    }
}

/// The sums of a warp's rows and columns over one step along k.
fn over_step(
    d: &mut Draft<'_>,
    warp: &Warp,
    a: &Side,
    b: &[Side],
    per_scale: u32,
    sums: &[Value],
) -> Vec<Value> {
    let each = sums.len() / b.len();
    let parts = CELL / per_scale;
    let (first, end, anchor) = (d.b.int(0), d.b.int((DEPTH / CELL) as i32), d.b.int(ANCHOR_BITS));
    d.repeat([first, end], 1, sums, |d, cell, sums| {
        let mut sums = sums.to_vec();
        let (word, begun) = (scaled(d, cell, WORDS), scaled(d, cell, parts));
        let fragment = |d: &mut Draft<'_>, side: &Side, first: Value, at: u32| {
            let at = offset(d, first, at * ROWS * PITCH);
            let at = d.b.add(at, word);
            d.b.fragment(side.words, at, PITCH, ROWS)
        };
        let rows: Vec<_> = (0..warp.counts[0]).map(|i| fragment(d, a, warp.firsts[0], i)).collect();
        let slots = |d: &mut Draft<'_>, side: &Side| -> Vec<Value> {
            let slot = |part: u32| {
                let group = offset(d, begun, part);
                side.scale_at(d, group, per_scale)
            };
            (0..parts).map(slot).collect()
        };
        let of_rows: Vec<Vec<Factors>> = slots(d, a)
            .into_iter()
            .map(|slot| (0..warp.counts[0]).map(|i| warp.of_rows(d, a, slot, i)).collect())
            .collect();
        for (side, sums) in b.iter().zip(sums.chunks_mut(each)) {
            let slots = slots(d, side);
            for j in 0..warp.counts[1] {
                let [w0, w1, w2, w3] = fragment(d, side, warp.firsts[1], j);
                for (half, columns) in [[w0, w2], [w1, w3]].into_iter().enumerate() {
                    let eight = 2 * j + half as u32;
                    for (part, &slot) in slots.iter().enumerate() {
                        let (factors, anchored) = warp.of_columns(d, side, slot, eight);
                        for (i, row) in rows.iter().enumerate() {
                            let dots = match parts {
                                1 => d.b.mma_bytes(row, &columns, [anchor; 4]),
                                _ => d.b.mma_bytes(&row[2 * part..][..2], &columns[part..=part], [anchor; 4]),
                            };
                            let first = 4 * (i as u32 * 2 * warp.counts[1] + eight) as usize;
                            for (at, &dot) in dots.iter().enumerate() {
                                let of_row: Vec<Value> =
                                    of_rows[part][i].iter().map(|values| values[at / 2]).collect();
                                let dot = d.b.unary(UnaryFn::FromBits, dot);
                                let dot = d.b.fma(dot, factors[0][at % 2], anchored[at % 2]);
                                let minus = factors.get(1).map(|minima| minima[at % 2]);
                                sums[first + at] = added(d, dot, &of_row, minus, sums[first + at]);
                            }
                        }
                    }
                }
            }
        }
        sums
    })
}

impl Product<'_> {
    /// A product of any number of quantised rows.
    pub fn many_dots_by_units(
        &self,
        d: &mut Draft<'_>,
        codes: &Codes,
        form: Form,
        spot: &Spot<'_>,
        finish: &Finish<'_>,
    ) {
        let operands = CodeOperands::new(d, self, codes);
        let (per_scale, tiles) = (operands.per_scale(), operands.scale_tiles());
        let side = |d: &mut Draft<'_>, lines: u32| Side::apart(d, lines, per_scale, tiles, [PITCH, 1]);
        let a = side(d, form.rows);
        let b = operands.matrices.iter().map(|_| side(d, form.columns)).collect();
        let warp = form.warp(d, PITCH);
        let staged = StagedCodes::new(d, operands, a, b, spot);
        let step =
            |d: &mut Draft<'_>, sums: &[Value]| over_step(d, &warp, &staged.a, &staged.b, per_scale, sums);
        let sums = staged.over_k(d, spot, warp.sums() * self.b.len(), &step);
        self.finish_warp(d, &warp, spot, &sums, finish);
    }

    /// Launches for so many rows and more.
    pub fn launch_dots_by_units(
        &self,
        cx: &mut LowerCx<'_>,
        name: &str,
        (codes, wave): (&Codes, usize),
        first: usize,
        prepare: &dyn Fn(&mut Draft<'_>) -> Box<Finish<'static>>,
    ) -> Result<(), BackendError> {
        let [.., rows, columns] = self.dims else { return Err(cx.mismatched()) };
        // Twice the scales leave registers for half the sums.
        let is_wide = self.b.len() == 1 && per_scale(self.b[0].dtype) == Some(CELL);
        for (form, from, to) in Form::of(self.b.len(), is_wide, columns, first, wave) {
            let programs = Amount::product(&self.grid(form.rows, form.columns));
            let Some(programs) = rows.when(from, to, programs) else { continue };
            let mut d = cx.draft_of(format!("{name}_mma{}{}", form.rows, self.by()), form.lanes());
            let finish = prepare(&mut d);
            let spot = self.place(&mut d, form.rows, form.columns);
            self.many_dots_by_units(&mut d, codes, form, &spot, &*finish);
            cx.launch(d, programs)?;
        }
        Ok(())
    }
}
