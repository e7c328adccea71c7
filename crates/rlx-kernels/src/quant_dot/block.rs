//! The microkernel: sums of a block of quantised rows by strips of weights.
//!
//! Numeric contract. For each cell of 32 inputs in order, and for each half of it where scales cover 16: the products of
//! codes are summed exactly in i32; then, in f32, `sum = fma(round(dot * scale), row scale, sum)` and, for formats with
//! minima, `sum = fma(-min, row scale * sum of the row's codes, sum)`. `round(dot * scale)` comes from one fused
//! operation, `fma(ANCHOR + dot, scale, -ANCHOR * scale)`, in which the product with the anchor is exact: a scale has at
//! most 19 significant bits; where products are not fused, from a subtraction, which is exact, and a product. Every instance, of every instruction set and number of rows, gives the same bits.

use std::marker::PhantomData;
use std::sync::atomic::{Ordering, compiler_fence};

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
    /// The first superblock of a panel of as many strips as the instance takes.
    pub w: *const u8,
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

/// Repeats the body for each of at most eight cells or groups, as straight code if told: shifts by a variable, and branches on
/// it, cost more than what they serve. A loop elsewhere, which compiles faster.
macro_rules! for_each_part {
    ($part:ident in $parts:ident, straight if $straight:expr, $body:block) => {
        if const { $straight } {
            for_each_row!($part in $parts $body);
        } else {
            for $part in 0..$parts $body
        }
    };
}

/// Whether a body of so many rows is straight code: not those of several rows over large blocks, which are longest and rarest.
const fn is_straight<D: Dot, F: Cells>(rows: usize) -> bool {
    D::STRAIGHT && (F::CELLS == 1 || rows == 1)
}

impl<F: Cells, const ROWS: usize, const STRIPS: usize> Body for Block<F, ROWS, STRIPS> {
    type Args = BlockArgs;

    #[inline(always)]
    unsafe fn run<D: Dot>(d: D, args: &BlockArgs) {
        let s = d.simd();
        let cells = F::CELLS;
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
            let (mut x, mut w) = (args.x, args.w);
            for _ in 0..args.superblocks {
                for_each_part!(cell in cells, straight if is_straight::<D, F>(ROWS), {
                    half_cell::<D, F, ROWS, STRIPS>(d, args, &mut sum, x, w, cell, 0);
                    if F::HALVES {
                        half_cell::<D, F, ROWS, STRIPS>(d, args, &mut sum, x, w, cell, 1);
                    }
                    x = x.wrapping_add(CELL_BYTES);
                    if F::CELLS > 1 && is_straight::<D, F>(ROWS) {
                        // Words that cells share are read again: the compiler would keep them on the stack.
                        compiler_fence(Ordering::SeqCst);
                    }
                });
                w = w.wrapping_add(superblock_bytes::<F>(STRIPS));
            }
            for_each_row!(row in ROWS {
                for strip in 0..STRIPS {
                    s.store(args.acc.add(row * args.acc_stride + strip * LANES), sum[row][strip]);
                }
            });
        }
    }
}

/// Bytes of a superblock of all strips of a panel.
const fn superblock_bytes<F: Cells>(strips: usize) -> usize {
    strips * (F::W_BYTES + F::H_BYTES)
}

/// Words and shorts of a strip in a panel's superblock.
#[inline(always)]
fn strip_at<F: Cells>(w: *const u8, strip: usize, strips: usize) -> (*const u8, *const u8) {
    (w.wrapping_add(strip * F::W_BYTES), w.wrapping_add(strips * F::W_BYTES + strip * F::H_BYTES))
}

/// Fetches the share of one group of a cell of what stands [`Cells::AHEAD`] bytes further on.
#[inline(always)]
fn fetch<S: Simd, F: Cells>(s: S, w: *const u8, strips: usize, at: usize) {
    const LINE: usize = 64;
    if F::AHEAD != 0 {
        let (lines, groups) = (superblock_bytes::<F>(strips) / LINE, F::CELLS * GROUPS);
        // The first cell of a large block reads all over it.
        let ahead = F::AHEAD + if F::CELLS > 1 { superblock_bytes::<F>(strips) } else { 0 };
        for line in at * lines / groups..(at + 1) * lines / groups {
            s.prefetch(w.wrapping_add(ahead + line * LINE));
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
        for_each_part!(step in groups, straight if is_straight::<D, F>(ROWS), {
            let group = half * groups + step;
            let mut codes = [s.isplat(0); STRIPS];
            for strip in 0..STRIPS {
                codes[strip] = F::codes(d, strip_at::<F>(w, strip, STRIPS).0, cell, group);
            }
            fetch::<D::S, F>(s, w, STRIPS, cell * GROUPS + group);
            for_each_row!(row in ROWS {
                let codes_of_row = x.wrapping_add(row * stride + 4 * group).cast::<i32>();
                let inputs = s.isplat(*codes_of_row);
                for strip in 0..STRIPS {
                    acc[row][strip] = dot::<D, F>(d, acc[row][strip], codes[strip], inputs);
                }
            });
        });
        for strip in 0..STRIPS {
            let (w, h) = strip_at::<F>(w, strip, STRIPS);
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

/// Unpacks superblocks of a panel into dense cells.
pub(super) struct UnpackArgs {
    /// The first superblock.
    pub w: *const u8,
    pub superblocks: usize,
    /// Dense cells of all strips, one cell after the other, written, aligned to 64 bytes.
    pub out: *mut u8,
}

/// See [`UnpackArgs`].
pub(super) struct Unpack<F, const STRIPS: usize>(PhantomData<F>);

impl<F: Cells, const STRIPS: usize> Body for Unpack<F, STRIPS> {
    type Args = UnpackArgs;

    #[inline(always)]
    unsafe fn run<D: Dot>(d: D, args: &UnpackArgs) {
        let (s, cells) = (d.simd(), F::CELLS);
        let (mut panel, mut out) = (args.w, args.out);
        // SAFETY: the caller guarantees the superblocks and as many dense cells.
        unsafe {
            for _ in 0..args.superblocks {
                for_each_part!(cell in cells, straight if is_straight::<D, F>(1), {
                    for strip in 0..STRIPS {
                        let (w, h) = strip_at::<F>(panel, strip, STRIPS);
                        for_each_part!(group in GROUPS, straight if is_straight::<D, F>(1), {
                            s.istore(out.add(group * WORDS_BYTES).cast(), F::codes(d, w, cell, group));
                            if strip == 0 {
                                fetch::<D::S, F>(s, panel, STRIPS, cell * GROUPS + group);
                            }
                        });
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
                });
                panel = panel.wrapping_add(superblock_bytes::<F>(STRIPS));
            }
        }
    }
}

/// Reads one column of a panel.
pub(super) struct ColumnArgs {
    /// The first superblock of a panel of `strips` strips.
    pub w: *const u8,
    pub strips: usize,
    pub superblocks: usize,
    /// Column of the panel.
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
        let (mut panel, mut out) = (args.w, args.out);
        let (strip, column) = (args.column / LANES, args.column % LANES);
        // SAFETY: the caller guarantees the superblocks, a column of the panel and the output.
        unsafe {
            for _ in 0..args.superblocks {
                let (w, h) = strip_at::<F>(panel, strip, args.strips);
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
                        for (i, code) in words[column].to_le_bytes().into_iter().enumerate() {
                            let scaled = (f32::from(code) - args.offset) * scale[column];
                            *out.add(4 * group + i) = if F::MIN { scaled - min[column] } else { scaled };
                        }
                    }
                    out = out.add(CELL);
                }
                panel = panel.wrapping_add(superblock_bytes::<F>(args.strips));
            }
        }
    }
}

const _: () = assert!(SHORTS_BYTES == 2 * LANES && CELL == 4 * GROUPS);
