//! The microkernel: sums of a block of quantised rows by strips of weights.
//!
//! Numeric contract. For each cell of 32 inputs in order, and for each half of it where scales cover 16: the products of
//! codes are summed exactly in i32; then, in f32, `sum = fma(round(dot * scale), row scale, sum)` and, for formats with
//! minima, `sum = fma(-min, row scale * sum of the row's codes, sum)`. `round(dot * scale)` comes from one fused
//! operation, `fma(ANCHOR + dot, scale, -ANCHOR * scale)`, in which the product with the anchor is exact: a scale has at
//! most 19 significant bits; where products are not fused, from a subtraction, which is exact, and a product. Every instance, of every instruction set and number of rows, gives the same bits.

use std::marker::PhantomData;

use super::dot::{Body, Dot, I, V};
use super::format::{
    ANCHOR, ANCHOR_BITS, CELL, Cells, GROUPS, SHORTS_BYTES, WORDS_BYTES, dense_at, dense_vectors,
};
use super::rows::{CELL_BYTES, CELL_SCALE, CELL_WORDS};
use crate::isa::{LANES, Simd};

/// One call of a microkernel.
pub(super) struct BlockArgs {
    /// Cells of the first row, as the row kernel writes them; rows are `x_stride` bytes apart.
    pub x: *const u8,
    pub x_stride: usize,
    /// Words of the first superblock of the first strip; strips are `strip_bytes` apart.
    pub w: *const u8,
    /// Shorts of the first superblock of the first strip.
    pub h: *const u8,
    pub strip_bytes: usize,
    /// Superblocks to read.
    pub superblocks: usize,
    /// `[rows][strips][16]` sums, rows `acc_stride` values apart: continued if `resume`, else written.
    pub acc: *mut f32,
    pub acc_stride: usize,
    pub resume: bool,
}

/// `ROWS` rows by `STRIPS` strips.
pub(super) struct Block<F, const ROWS: usize, const STRIPS: usize>(PhantomData<F>);

/// Repeats the body for each row, as straight code: accumulators that a loop variable indexes would stay in memory.
macro_rules! for_each_row {
    ($row:ident in $rows:ident $body:block) => {
        for_each_row!(@ $row $rows $body 0 1 2 3 4 5 6 7)
    };
    (@ $row:ident $rows:ident $body:block $($index:literal)*) => {$(
        if $index < $rows {
            let $row: usize = $index;
            $body
        }
    )*};
}

impl<F: Cells, const ROWS: usize, const STRIPS: usize> Body for Block<F, ROWS, STRIPS> {
    type Args = BlockArgs;

    #[inline(always)]
    unsafe fn run<D: Dot>(d: D, args: &BlockArgs) {
        let s = d.simd();
        let mut sum = [[s.zero(); STRIPS]; ROWS];
        // SAFETY: the caller guarantees what the fields of `BlockArgs` say: rows of `superblocks * CELLS` cells, strips of as many
        // superblocks, and the sums.
        unsafe {
            if args.resume {
                for_each_row!(row in ROWS {
                    for strip in 0..STRIPS {
                        sum[row][strip] = s.load(args.acc.add(row * args.acc_stride + strip * LANES));
                    }
                });
            }
            let (mut x, mut w, mut h) = (args.x, args.w, args.h);
            for _ in 0..args.superblocks {
                for cell in 0..F::CELLS {
                    if F::HALVES {
                        half_cell::<D, F, ROWS, STRIPS>(d, args, &mut sum, x, w, h, cell, 0);
                        half_cell::<D, F, ROWS, STRIPS>(d, args, &mut sum, x, w, h, cell, 1);
                    } else {
                        half_cell::<D, F, ROWS, STRIPS>(d, args, &mut sum, x, w, h, cell, 0);
                    }
                    x = x.wrapping_add(CELL_BYTES);
                }
                w = w.wrapping_add(F::W_BYTES);
                h = h.wrapping_add(F::H_BYTES);
            }
            for_each_row!(row in ROWS {
                for strip in 0..STRIPS {
                    s.store(args.acc.add(row * args.acc_stride + strip * LANES), sum[row][strip]);
                }
            });
        }
    }
}

/// The inputs that one scale covers.
#[inline(always)]
unsafe fn half_cell<D: Dot, F: Cells, const ROWS: usize, const STRIPS: usize>(
    d: D,
    args: &BlockArgs,
    sum: &mut [[V<D>; STRIPS]; ROWS],
    x: *const u8,
    w: *const u8,
    h: *const u8,
    cell: usize,
    half: usize,
) {
    let s = d.simd();
    let mut acc = [[s.isplat(ANCHOR_BITS); STRIPS]; ROWS];
    let stride = args.x_stride;
    // SAFETY: the caller guarantees this cell of every row and strip.
    unsafe {
        if !F::MIN {
            for_each_row!(row in ROWS {
                let start = x.wrapping_add(row * stride + CELL_WORDS + 4 * half).cast::<i32>();
                for strip in 0..STRIPS {
                    acc[row][strip] = s.isplat(*start);
                }
            });
        }
        let groups = if F::HALVES { GROUPS / 2 } else { GROUPS };
        for step in 0..groups {
            let group = half * groups + step;
            let mut codes = [s.isplat(0); STRIPS];
            for strip in 0..STRIPS {
                codes[strip] = F::codes(d, w.wrapping_add(strip * args.strip_bytes), cell, group);
            }
            if F::AHEAD != 0 && group * F::CELLS * WORDS_BYTES < F::W_BYTES.next_multiple_of(64 * F::CELLS) {
                let ahead = F::AHEAD + cell * (F::W_BYTES / F::CELLS) + group * WORDS_BYTES;
                for strip in 0..STRIPS {
                    s.prefetch(w.wrapping_add(strip * args.strip_bytes + ahead));
                }
            }
            for_each_row!(row in ROWS {
                let codes_of_row = x.wrapping_add(row * stride + 4 * group).cast::<i32>();
                let inputs = s.isplat(*codes_of_row);
                for strip in 0..STRIPS {
                    acc[row][strip] = dot::<D, F>(d, acc[row][strip], codes[strip], inputs);
                }
            });
        }
        for strip in 0..STRIPS {
            let (w, h) = (w.wrapping_add(strip * args.strip_bytes), h.wrapping_add(strip * args.strip_bytes));
            let scale = F::scale(d, w, h, cell, half);
            let anchor = F::anchor(d, w, cell, half, scale);
            for_each_row!(row in ROWS {
                let row_scale = x.wrapping_add(row * stride + CELL_SCALE).cast::<f32>();
                let anchored = s.with_bits(acc[row][strip]);
                let scaled = if D::S::FUSED {
                    s.fma(anchored, scale, anchor)
                } else {
                    s.mul(s.sub(anchored, s.splat(ANCHOR)), scale)
                };
                sum[row][strip] = s.fma(scaled, s.splat(*row_scale), sum[row][strip]);
            });
            if F::MIN {
                let min = F::min(d, w, h, cell, half);
                for_each_row!(row in ROWS {
                    let row_sum = x.wrapping_add(row * stride + CELL_WORDS + 4 * half).cast::<f32>();
                    sum[row][strip] = s.fnma(min, s.splat(*row_sum), sum[row][strip]);
                });
            }
        }
    }
}

#[inline(always)]
fn dot<D: Dot, F: Cells>(d: D, acc: I<D>, w: I<D>, x: I<D>) -> I<D> {
    if F::WIDE { d.dot_wide(acc, w, x) } else { d.dot(acc, w, x) }
}

/// Unpacks superblocks of one strip into dense cells.
pub(super) struct UnpackArgs {
    /// Words of the first superblock.
    pub w: *const u8,
    /// Shorts of the first superblock.
    pub h: *const u8,
    pub superblocks: usize,
    /// Dense cells, written, aligned to 64 bytes.
    pub out: *mut u8,
}

/// See [`UnpackArgs`].
pub(super) struct Unpack<F>(PhantomData<F>);

impl<F: Cells> Body for Unpack<F> {
    type Args = UnpackArgs;

    #[inline(always)]
    unsafe fn run<D: Dot>(d: D, args: &UnpackArgs) {
        let s = d.simd();
        let (mut w, mut h, mut out) = (args.w, args.h, args.out);
        // SAFETY: the caller guarantees the superblocks and as many dense cells.
        unsafe {
            for _ in 0..args.superblocks {
                for cell in 0..F::CELLS {
                    for group in 0..GROUPS {
                        s.istore(out.add(group * WORDS_BYTES).cast(), F::codes(d, w, cell, group));
                        if F::AHEAD != 0 {
                            let ahead = F::AHEAD + (cell * GROUPS + group) * F::W_BYTES / (F::CELLS * GROUPS);
                            s.prefetch(w.wrapping_add(ahead));
                        }
                    }
                    for half in 0..if F::HALVES { 2 } else { 1 } {
                        let scale = F::scale(d, w, h, cell, half);
                        let anchor = F::anchor(d, w, cell, half, scale);
                        s.store(out.add(dense_at(F::HALVES, half, 0)).cast(), scale);
                        s.store(out.add(dense_at(F::HALVES, half, 1)).cast(), anchor);
                        if F::MIN {
                            let min = F::min(d, w, h, cell, half);
                            s.store(out.add(dense_at(F::HALVES, half, 2)).cast(), min);
                        }
                    }
                    out = out.add(dense_vectors(F::HALVES, F::MIN) * WORDS_BYTES);
                }
                w = w.wrapping_add(F::W_BYTES);
                h = h.wrapping_add(F::H_BYTES);
            }
        }
    }
}

/// Reads one column of a strip.
pub(super) struct ColumnArgs {
    pub w: *const u8,
    pub h: *const u8,
    pub superblocks: usize,
    pub column: usize,
    /// Added to every code's value, negated: the format's offset.
    pub offset: f32,
    /// `superblocks * CELLS * 32` values, written.
    pub out: *mut f32,
}

/// See [`ColumnArgs`]. Multiplies as the plain decoder does: `(code - offset) * scale - min`.
pub(super) struct Column<F>(PhantomData<F>);

impl<F: Cells> Body for Column<F> {
    type Args = ColumnArgs;

    #[inline(always)]
    unsafe fn run<D: Dot>(d: D, args: &ColumnArgs) {
        let s = d.simd();
        let (mut w, mut h, mut out) = (args.w, args.h, args.out);
        // SAFETY: the caller guarantees the superblocks, a column below 16 and the output.
        unsafe {
            for _ in 0..args.superblocks {
                for cell in 0..F::CELLS {
                    let (mut scale, mut min) = ([0.0f32; LANES], [0.0f32; LANES]);
                    for group in 0..GROUPS {
                        let half = if F::HALVES { group / (GROUPS / 2) } else { 0 };
                        if group % (if F::HALVES { GROUPS / 2 } else { GROUPS }) == 0 {
                            s.store(scale.as_mut_ptr(), F::scale(d, w, h, cell, half));
                            s.store(min.as_mut_ptr(), F::min(d, w, h, cell, half));
                        }
                        let mut words = [0i32; LANES];
                        s.istore(words.as_mut_ptr(), F::codes(d, w, cell, group));
                        for (i, code) in words[args.column].to_le_bytes().into_iter().enumerate() {
                            let scaled = (f32::from(code) - args.offset) * scale[args.column];
                            *out.add(4 * group + i) = if F::MIN { scaled - min[args.column] } else { scaled };
                        }
                    }
                    out = out.add(CELL);
                }
                w = w.wrapping_add(F::W_BYTES);
                h = h.wrapping_add(F::H_BYTES);
            }
        }
    }
}

const _: () = assert!(SHORTS_BYTES == 2 * LANES && CELL == 4 * GROUPS);
