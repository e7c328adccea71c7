//! Rows of floats as signed bytes, for products with packed weights: of each 32 elements eight words of codes and a scale. A row's codes
//! are the host's (`rlx-kernels/src/quant_dot/rows.rs`), where a device divides and multiplies as the host does.

use super::blocks::{is_whole, per_minimum};
use super::lines::{Lines, offset, scaled};
use super::{Amount, Draft, LANES, LowerCx, Operand, Room};
use crate::ir::{BinaryFn, Element, UnaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx_tensor::DType;
use std::collections::BTreeSet;

/// Elements of a scale.
pub(super) const CELL: u32 = 32;
/// Lanes that make a cell: each a word of codes.
const SHARE: u32 = CELL / 4;
/// Cells of a program.
const CELLS: u32 = LANES / SHARE;
/// A cell whose largest magnitude has smaller bits, those of 2^-100, counts as zero.
const TINY: i32 = (127 - 100) << 23;

/// Rows `[rows, k]` quantised.
pub(super) struct Codes {
    /// `[rows, k / 4]`
    words: Operand,
    /// `[rows, k / 32]`: the largest magnitude divided by 127; NaN where an element is not finite.
    scales: Operand,
    /// For weights with minima, of the elements that share one: `[rows, k / elements]`, the scale times the sum of the codes.
    sums: Vec<(u32, Operand)>,
    /// Programs that a device with matrix units for bytes runs at once.
    pub units: Option<usize>,
}

/// Rows `[rows, k]` quantised, if a device multiplies bytes and some of these matrices are packed.
pub(super) fn codes_of(
    cx: &mut LowerCx<'_>,
    x: &Operand,
    matrices: &[Operand],
    room: &mut Room,
) -> Result<Option<Codes>, BackendError> {
    let packed: Vec<&Operand> = matrices.iter().filter(|m| is_whole(m)).collect();
    let Some(first) = packed.first().filter(|_| !cx.choices.without_dots) else { return Ok(None) };
    let sums: BTreeSet<u32> = packed.iter().filter_map(|m| per_minimum(m.dtype)).collect();
    let x = Operand { dims: vec![x.dims[0].clone(), first.dims[1].clone()], ..x.clone() };
    Codes::of(cx, &x, &sums, room).map(Some)
}

impl Codes {
    /// Adds the launch that quantises rows `[rows, k]`, k a known multiple of 32.
    fn of(
        cx: &mut LowerCx<'_>,
        x: &Operand,
        sums: &BTreeSet<u32>,
        room: &mut Room,
    ) -> Result<Self, BackendError> {
        let (rows, k) = (x.dims[0].clone(), x.dims[1].clone());
        let parts = |by: u32| [rows.clone(), k.ceil_div(by as usize)];
        let words = room.take(DType::I32, &parts(4));
        let scales = room.take(DType::F32, &parts(CELL));
        let sums = sums.iter().map(|&per| (per, room.take(DType::F32, &parts(per)))).collect();
        let codes = Codes { words, scales, sums, units: cx.choices.byte_units };
        codes.launch(cx, x)?;
        Ok(codes)
    }

    fn launch(&self, cx: &mut LowerCx<'_>, x: &Operand) -> Result<(), BackendError> {
        let mut d = cx.draft("quantise_rows");
        let grid = [self.words.dims[0].clone(), self.scales.dims[1].ceil_div(CELLS as usize)];
        let program = d.b.program();
        let (at, inside) = d.coordinates(program, &grid);
        let lane = d.b.lane();
        let (row, word) = (at[0], scaled(&mut d, at[1], LANES));
        let word = d.b.add(word, lane);
        let k = scaled(&mut d, word, 4);
        let lines = Lines::new(&mut d, x);
        let values = lines.fetch(&mut d, &[], [row, k], inside, 4);
        let values = lines.decode(&mut d, &values, |_| k, 4);
        let most = self.largest(&mut d, &values, lane);
        let (limit, tiny) = (d.b.int(f32::INFINITY.to_bits() as i32), d.b.int(TINY));
        let (finite, small) = (d.b.less(most, limit), d.b.less(most, tiny));
        let (largest, codes) = (d.b.unary(UnaryFn::FromBits, most), d.b.float(127.0));
        let (zero, nan) = (d.b.float(0.0), d.b.float(f64::NAN));
        let (scale, inverse) = (d.b.div(largest, codes), d.b.div(codes, largest));
        let scale = d.b.select(small, zero, scale);
        let scale = d.b.select(finite, scale, nan);
        let inverse = d.b.select(small, zero, inverse);
        let codes: Vec<Value> = values
            .iter()
            .map(|&x| {
                let code = d.b.mul(x, inverse);
                let code = d.b.unary(UnaryFn::RoundEven, code);
                let code = d.b.unary(UnaryFn::ToInt, code);
                let none = d.b.int(0);
                d.b.select(finite, code, none)
            })
            .collect();
        let packed = packed(&mut d, &codes);
        let (words, scales) = (d.write(&self.words), d.write(&self.scales));
        let extent = d.size(&self.words.dims[1]);
        let there = d.b.within(word, extent);
        let mask = d.b.and(inside, there);
        d.b.store(words, &[row, word], packed, Some(mask));
        store_first(&mut d, scales, &self.scales, [row, word, inside], SHARE, scale);
        for (per, of) in &self.sums {
            let sums = d.write(of);
            let sum = codes[1..].iter().fold(codes[0], |sum, &code| d.b.add(sum, code));
            let sum = share(&mut d, sum, lane, per / 4, BinaryFn::Add);
            let sum = d.b.unary(UnaryFn::ToFloat, sum);
            let sum = d.b.mul(scale, sum);
            store_first(&mut d, sums, of, [row, word, inside], per / 4, sum);
        }
        cx.launch(d, Amount::product(&grid))
    }

    /// The bits of a cell's largest magnitude, which are in the order of magnitudes, with those that are no numbers above all.
    fn largest(&self, d: &mut Draft<'_>, values: &[Value], lane: Value) -> Value {
        let sign = d.b.int(i32::MAX);
        let bits: Vec<Value> = values
            .iter()
            .map(|&x| {
                let bits = d.b.unary(UnaryFn::Bits, x);
                d.b.binary(BinaryFn::And, bits, sign)
            })
            .collect();
        let most = bits[1..].iter().fold(bits[0], |most, &b| d.b.binary(BinaryFn::Max, most, b));
        share(d, most, lane, SHARE, BinaryFn::Max)
    }

    /// Their views in a kernel, with sums for minima of so many elements if it needs them.
    pub fn views(&self, d: &mut Draft<'_>, minima: Option<u32>) -> CodeViews {
        let words = d.read(&self.words);
        d.b.widen(words, 4);
        let scales = d.read(&self.scales);
        let mut cells = vec![(CELL, scales, self.scales.dims[1].clone())];
        for (per, sums) in self.sums.iter().filter(|(per, _)| minima == Some(*per)) {
            cells.push((*per, d.read(sums), sums.dims[1].clone()));
        }
        let [rows, count] = [&self.words.dims[0], &self.words.dims[1]].map(Amount::clone);
        CodeViews { words, cells, rows, count }
    }
}

/// Stores a value that lanes of so many words have in common, in the first of them.
fn store_first(
    d: &mut Draft<'_>,
    view: ViewId,
    to: &Operand,
    [row, word, inside]: [Value; 3],
    words: u32,
    value: Value,
) {
    let (at, part) = d.b.halves(word, words);
    let (none, extent) = (d.b.int(0), d.size(&to.dims[1]));
    let (lead, there) = (d.b.binary(BinaryFn::Equal, part, none), d.b.within(at, extent));
    let mask = d.b.and(inside, lead);
    let mask = d.b.and(mask, there);
    d.b.store(view, &[row, at], value, Some(mask));
}

/// Integers of so many lanes that stand together (4 or 8) combined, in each of them.
fn share(d: &mut Draft<'_>, own: Value, lane: Value, lanes: u32, function: BinaryFn) -> Value {
    let tile = d.b.tile(Element::I32, LANES);
    d.b.put(tile, lane, &[own]);
    d.b.barrier();
    let first = d.b.halves(lane, lanes).0;
    let first = scaled(d, first, lanes);
    let all: Vec<Value> = (0..lanes)
        .step_by(4)
        .flat_map(|by| {
            let at = offset(d, first, by);
            d.b.take(tile, at, 4)
        })
        .collect();
    all[1..].iter().fold(all[0], |so_far, &x| d.b.binary(function, so_far, x))
}

/// Four integers that fit a signed byte, in a word.
fn packed(d: &mut Draft<'_>, codes: &[Value]) -> Value {
    let (byte, up) = (d.b.int(255), d.b.int(256));
    let bytes: Vec<Value> = codes.iter().map(|&code| d.b.binary(BinaryFn::And, code, byte)).collect();
    bytes[..3].iter().rev().fold(bytes[3], |word, &byte| {
        let word = d.b.mul(word, up);
        d.b.binary(BinaryFn::Or, word, byte)
    })
}

/// Quantised rows as a kernel sees them.
pub(super) struct CodeViews {
    words: ViewId,
    /// Scales, and if there are minima what they are multiplied by: how many elements share one, and how many a row has.
    cells: Vec<(u32, ViewId, Amount)>,
    rows: Amount,
    /// Words of a row.
    count: Amount,
}

impl CodeViews {
    /// Whether a row is one, and the mask says so.
    pub fn known(&self, d: &mut Draft<'_>, row: Value, mask: Value) -> Value {
        let extent = d.size(&self.rows);
        let there = d.b.within(row, extent);
        d.b.and(mask, there)
    }

    /// The codes of so many elements of a [known](CodeViews::known) row from `k` on, a multiple of 16: four a word, zero where there are none.
    pub fn codes(&self, d: &mut Draft<'_>, [row, k]: [Value; 2], known: Value, count: u32) -> Vec<Value> {
        let extent = d.size(&self.count);
        let mut words = Vec::with_capacity(count as usize / 4);
        for first in (0..count / 4).step_by(4) {
            let word = d.b.halves(k, 4).0;
            let word = offset(d, word, first);
            let there = d.b.within(word, extent);
            let mask = d.b.and(known, there);
            words.extend(d.b.load_wide(self.words, &[row, word], 4, Some(mask)));
        }
        words
    }

    /// The scale of so many elements (16 or 32) from `k` on, a multiple of so many, and if there are minima what they are multiplied by.
    pub fn scales(&self, d: &mut Draft<'_>, [row, k]: [Value; 2], known: Value, count: u32) -> Vec<Value> {
        let mut values = Vec::with_capacity(self.scale_count(count));
        for (per, view, extent) in &self.cells {
            let (first, extent) = (d.b.halves(k, *per).0, d.size(extent));
            for i in 0..count.div_ceil(*per) {
                let at = offset(d, first, i);
                let there = d.b.within(at, extent);
                let mask = d.b.and(known, there);
                values.push(d.b.load(*view, &[row, at], Some(mask)));
            }
        }
        values
    }

    /// Values that [`CodeViews::scales`] gives.
    pub fn scale_count(&self, count: u32) -> usize {
        self.cells.iter().map(|(per, ..)| count.div_ceil(*per) as usize).sum()
    }

    /// Lists of values for tiles, of what [`CodeViews::scales`] gave: so many of each.
    pub fn spread(&self, values: &[Value], parts: usize) -> Vec<Vec<Value>> {
        let (scale, sums) = values.split_at(1);
        let sums = (self.cells.len() > 1).then(|| sums.to_vec());
        [vec![scale[0]; parts]].into_iter().chain(sums).collect()
    }

    /// Whether there is something that minima are multiplied by.
    pub fn has_sums(&self) -> bool {
        self.cells.len() > 1
    }
}
