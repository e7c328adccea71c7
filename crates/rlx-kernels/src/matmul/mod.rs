//! Products of two values that are not weights: batched by the caller, either operand given transposed by its strides.
//!
//! Numeric contract: an output element is one f32 accumulator, updated by fused multiply-add for p = 0, 1, 2, .. from zero, so
//! its bits depend neither on tiles nor on the instruction set.

#[cfg(test)]
mod tests;

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};

/// Rows of one tile.
const ROWS: usize = 48;
/// Rows that share a pass over the packed columns.
const GROUP: usize = 6;
/// Columns of one tile.
const COLUMNS: usize = 2 * LANES;
/// Reduced elements packed at a time.
const DEPTH: usize = 128;

/// Arguments of `out [m, n] = a [m, k] x b [k, n]`; strides are in elements.
#[derive(Clone, Copy, Debug)]
pub struct MatMulArgs {
    /// Element (i, p) at `i * a_row + p * a_column`.
    pub a: *const f32,
    /// Between rows of `a`.
    pub a_row: usize,
    /// Between columns of `a`.
    pub a_column: usize,
    /// Element (p, j) at `p * b_row + j * b_column`.
    pub b: *const f32,
    /// Between rows of `b`.
    pub b_row: usize,
    /// Between columns of `b`.
    pub b_column: usize,
    /// Element (i, j) at `i * n + j`; overlaps neither operand.
    pub out: *mut f32,
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Reduced extent.
    pub k: usize,
}

impl MatMulArgs {
    /// Number of tiles.
    pub const fn tiles(&self) -> usize {
        self.m.div_ceil(ROWS) * self.n.div_ceil(COLUMNS)
    }
}

/// Instances of the product.
pub static MATMUL: Rows<MatMulArgs> = Row::all_of::<MatMulF32>();

/// The product for `isa`.
pub fn matmul_entry(isa: Isa) -> Option<Entry<MatMulArgs>> {
    select(&MATMUL, isa)
}

struct MatMulF32;

#[repr(align(64))]
struct Tile<const N: usize>([[f32; COLUMNS]; N]);

impl Kernel for MatMulF32 {
    type Args = MatMulArgs;
    const OP: &'static str = "matmul";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &MatMulArgs, tile: usize) {
        let columns = args.n.div_ceil(COLUMNS);
        let (row, column) = (tile / columns * ROWS, tile % columns * COLUMNS);
        let (rows, width) = (ROWS.min(args.m - row), COLUMNS.min(args.n - column));
        let mut packed = Tile::<DEPTH>([[0.0; COLUMNS]; DEPTH]);
        let mut sums = Tile::<ROWS>([[0.0; COLUMNS]; ROWS]);
        // SAFETY: the caller guarantees the operands; rows and columns are inside them.
        unsafe {
            for from in (0..args.k).step_by(DEPTH) {
                let depth = DEPTH.min(args.k - from);
                let b = args.b.add(from * args.b_row + column * args.b_column);
                pack(s, b, args.b_row, args.b_column, depth, width, &mut packed);
                let a = args.a.add(row * args.a_row + from * args.a_column);
                for first in (0..rows).step_by(GROUP) {
                    add_rows(s, args, a, first, rows, depth, &packed, &mut sums);
                }
            }
            for r in 0..rows {
                let out = args.out.add((row + r) * args.n + column);
                for j in (0..width).step_by(LANES) {
                    s.store_to(out.add(j), width - j, s.load(sums.0[r].as_ptr().add(j)));
                }
            }
        }
    }
}

/// Copies `depth` rows of `width` columns; what stood in further columns stays and is never stored.
#[inline(always)]
unsafe fn pack<S: Simd>(
    s: S,
    b: *const f32,
    b_row: usize,
    b_column: usize,
    depth: usize,
    width: usize,
    packed: &mut Tile<DEPTH>,
) {
    for p in 0..depth {
        let to = packed.0[p].as_mut_ptr();
        // SAFETY: the caller guarantees the rows and columns; a packed row has `COLUMNS` elements.
        unsafe {
            if b_column == 1 {
                for j in (0..width).step_by(LANES) {
                    s.store(to.add(j), s.load_to(b.add(p * b_row + j), width - j));
                }
            } else {
                for j in 0..width {
                    *to.add(j) = *b.add(p * b_row + j * b_column);
                }
            }
        }
    }
}

/// Adds `depth` products to the sums of [`GROUP`] rows from `first` on; rows past the last repeat it.
#[inline(always)]
unsafe fn add_rows<S: Simd>(
    s: S,
    args: &MatMulArgs,
    a: *const f32,
    first: usize,
    rows: usize,
    depth: usize,
    packed: &Tile<DEPTH>,
    sums: &mut Tile<ROWS>,
) {
    // SAFETY: the caller guarantees the rows; sums have `ROWS` rows, a multiple of `GROUP`.
    unsafe {
        let at = |r: usize| a.add((first + r).min(rows - 1) * args.a_row);
        let starts = [at(0), at(1), at(2), at(3), at(4), at(5)];
        let mut acc = [[s.zero(); 2]; GROUP];
        for r in 0..GROUP {
            let sum = sums.0[first + r].as_ptr();
            acc[r] = [s.load(sum), s.load(sum.add(LANES))];
        }
        for p in 0..depth {
            let b = packed.0[p].as_ptr();
            let (low, high) = (s.load(b), s.load(b.add(LANES)));
            for r in 0..GROUP {
                let x = s.splat(*starts[r].add(p * args.a_column));
                acc[r] = [s.fma(x, low, acc[r][0]), s.fma(x, high, acc[r][1])];
            }
        }
        for r in 0..GROUP {
            let sum = sums.0[first + r].as_mut_ptr();
            s.store(sum, acc[r][0]);
            s.store(sum.add(LANES), acc[r][1]);
        }
    }
}
