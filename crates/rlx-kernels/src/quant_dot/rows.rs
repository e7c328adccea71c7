//! Rows of f32 to bytes: one scale per 32 inputs, the same for every number of rows.

use super::SLAB_CELLS;
use super::format::{ANCHOR_BITS, CELL};
use crate::isa::{Kernel, LANES, Row, Rows, Simd};

/// Bytes of a cell of a row: 32 codes, the scale, two words, four bytes unused.
pub(super) const CELL_BYTES: usize = CELL + 16;

/// Where the scale of a cell is.
pub(super) const CELL_SCALE: usize = CELL;

/// Where the two words of a cell are.
///
/// Of weights without minima: the start of the integer sums of the cell's halves, `ANCHOR_BITS - offset * sum of codes`.
/// Of weights with minima: `scale * sum of codes`, as f32. Where one scale covers the cell, the first is of all codes.
pub(super) const CELL_WORDS: usize = CELL + 4;

/// What the words of a cell hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowForm {
    pub offset: i32,
    pub halves: bool,
    pub min: bool,
}

/// Arguments of the row kernel; tile `r` is row `r`.
///
/// A cell's scale is `max |x| / 127`, its codes are `x * (127 / max |x|)` rounded to nearest even. A cell whose largest
/// magnitude is below 2^-100 counts as zero; one with a NaN or an infinity gets the scale NaN.
pub(super) struct QuantizeArgs {
    /// Rows of `32 * cells` values.
    pub x: *const f32,
    pub x_stride: usize,
    pub cells: usize,
    pub form: RowForm,
    /// Rows of cells, written: eight cells of a row are adjacent, the next eight stand `slab_stride` bytes after them.
    pub out: *mut u8,
    pub out_stride: usize,
    pub slab_stride: usize,
}

/// Instances of the row kernel.
pub(super) static QUANTIZE: Rows<QuantizeArgs> = Row::all_of::<QuantizeRow>();

const TINY: f32 = f32::from_bits((127 - 100) << 23);

struct QuantizeRow;

impl Kernel for QuantizeRow {
    type Args = QuantizeArgs;
    const OP: &'static str = "quantize_rows";
    const DTYPES: &'static str = "f32_i8";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &QuantizeArgs, tile: usize) {
        let mut x = args.x.wrapping_add(tile * args.x_stride);
        let mut out = args.out.wrapping_add(tile * args.out_stride);
        let mut left = args.cells;
        while left > 0 {
            let n = left.min(LANES);
            // SAFETY: the caller guarantees the row's values and cells.
            unsafe {
                if n < FEWEST {
                    for i in 0..n {
                        quantize_cell(s, args.form, x.add(i * CELL), out.add(i * CELL_BYTES));
                    }
                } else {
                    quantize_cells(s, args.form, x, (out, args.slab_stride), n);
                }
            }
            (x, out) = (x.wrapping_add(n * CELL), out.wrapping_add(LANES / SLAB_CELLS * args.slab_stride));
            left -= n;
        }
    }
}

/// Where cell `i` of a row stands.
#[inline(always)]
fn cell_at((out, slab_stride): (*mut u8, usize), i: usize) -> *mut u8 {
    out.wrapping_add(i / SLAB_CELLS * slab_stride + i % SLAB_CELLS * CELL_BYTES)
}

const _: () = assert!(LANES.is_multiple_of(SLAB_CELLS) && FEWEST <= SLAB_CELLS);

/// Fewer cells than this are quicker one by one.
const FEWEST: usize = 4;

/// The sum of the lanes of each vector, for sums that are exact.
#[inline(always)]
fn totals<S: Simd>(s: S, rows: [S::V; LANES]) -> S::V {
    let columns = s.transpose(rows);
    let mut sum = columns[0];
    for column in &columns[1..] {
        sum = s.add(sum, *column);
    }
    sum
}

/// As [`quantize_cell`], `n <= 16` cells side by side: what is one number of a cell is a lane.
#[inline(always)]
unsafe fn quantize_cells<S: Simd>(s: S, form: RowForm, x: *const f32, out: (*mut u8, usize), n: usize) {
    // SAFETY: the caller guarantees `n` times 32 values and as many cells.
    unsafe {
        let (mut largest, mut odd) = ([s.zero(); LANES], s.zero());
        for i in 0..n {
            let (low, high) = (s.load(x.add(i * CELL)), s.load(x.add(i * CELL + LANES)));
            largest[i] = s.max(s.abs(low), s.abs(high));
            // Zero unless some value is not finite, where it is NaN.
            odd = s.add(odd, s.fma(high, s.zero(), s.mul(low, s.zero())));
        }
        if s.any(s.is_nan(odd)) {
            for i in 0..n {
                quantize_cell(s, form, x.add(i * CELL), cell_at(out, i));
            }
            return;
        }
        let columns = s.transpose(largest);
        let mut top = columns[0];
        for column in &columns[1..] {
            top = s.max(top, *column);
        }
        let tiny = s.lt(top, s.splat(TINY));
        let scales = s.select(tiny, s.zero(), s.div(top, s.splat(127.0)));
        let mut inverses = [0.0f32; LANES];
        s.store(inverses.as_mut_ptr(), s.select(tiny, s.zero(), s.div(s.splat(127.0), top)));
        let mut sums = [[s.zero(); LANES]; 2];
        for i in 0..n {
            let inverse = s.splat(inverses[i]);
            let low = s.to_int(s.mul(s.load(x.add(i * CELL)), inverse));
            let high = s.to_int(s.mul(s.load(x.add(i * CELL + LANES)), inverse));
            let codes = cell_at(out, i);
            s.istore_i8(codes.cast(), low);
            s.istore_i8(codes.add(LANES).cast(), high);
            if form.halves {
                (sums[0][i], sums[1][i]) = (s.to_float(low), s.to_float(high));
            } else {
                sums[0][i] = s.to_float(s.iadd(low, high));
            }
        }
        let sums = [totals(s, sums[0]), if form.halves { totals(s, sums[1]) } else { s.zero() }];
        let mut words = [[0.0f32; LANES]; 3];
        s.store(words[0].as_mut_ptr(), scales);
        for (half, sum) in sums.into_iter().enumerate() {
            let word = if form.min {
                s.mul(scales, sum)
            } else {
                // At most 128 times 32 times 127, exact.
                let moved = s.to_int(s.mul(sum, s.splat(form.offset as f32)));
                s.with_bits(s.isub(s.isplat(ANCHOR_BITS), moved))
            };
            s.store(words[1 + half].as_mut_ptr(), word);
        }
        for i in 0..n {
            let to = cell_at(out, i).add(CELL_SCALE).cast::<[f32; 4]>();
            to.write([words[0][i], words[1][i], words[2][i], 0.0]);
        }
    }
}

#[inline(always)]
unsafe fn quantize_cell<S: Simd>(s: S, form: RowForm, x: *const f32, out: *mut u8) {
    // SAFETY: the caller guarantees 32 values and a cell.
    unsafe {
        let (low, high) = (s.load(x), s.load(x.add(LANES)));
        let largest = s.reduce_max(s.max(s.abs(low), s.abs(high)));
        // Zero unless some value is not finite, where it is NaN.
        let odd = s.fma(high, s.zero(), s.mul(low, s.zero()));
        let finite = !s.any(s.is_nan(odd));
        let (scale, inverse) = if !finite {
            (f32::NAN, 0.0)
        } else if largest < TINY {
            (0.0, 0.0)
        } else {
            (largest / 127.0, 127.0 / largest)
        };
        let (mut codes, inverse) = ([s.isplat(0); 2], s.splat(inverse));
        if finite {
            codes = [s.to_int(s.mul(low, inverse)), s.to_int(s.mul(high, inverse))];
        }
        s.istore_i8(out.cast(), codes[0]);
        s.istore_i8(out.add(LANES).cast(), codes[1]);
        // Sums of at most 32 codes are exact in f32.
        let sums = if form.halves {
            [s.reduce_add(s.to_float(codes[0])), s.reduce_add(s.to_float(codes[1]))]
        } else {
            [s.reduce_add(s.to_float(s.iadd(codes[0], codes[1]))), 0.0]
        };
        let words = out.add(CELL_SCALE).cast::<f32>();
        *words = scale;
        for (half, sum) in sums.into_iter().enumerate() {
            let word = words.add(1 + half);
            if form.min {
                *word = scale * sum;
            } else {
                *word.cast::<i32>() = ANCHOR_BITS.wrapping_sub(form.offset * sum as i32);
            }
        }
        *words.add(3) = 0.0;
    }
}
