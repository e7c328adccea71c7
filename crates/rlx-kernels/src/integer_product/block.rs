//! The microkernel: exact sums of products of a block of rows with the strips of a panel.

use super::pack::STRIP_WORD_BYTES;
use crate::isa::{LANES, Simd};
use crate::quant_dot::dot::{Body, Dot, DotEntry, DotSet, dot_entry};

/// Rows of a microkernel at most.
pub(super) const MAX_ROWS: usize = 12;

/// One call of a microkernel.
pub(super) struct BlockArgs {
    /// First word of the first row; rows are `x_stride` bytes apart.
    pub x: *const u8,
    pub x_stride: usize,
    /// Parts of a row, bytes from one to the next, and words of each.
    pub parts: usize,
    pub part_stride: usize,
    pub words: usize,
    /// First word of the panel.
    pub w: *const u8,
    /// What the sums start at: rows of a panel's columns, `start_stride` values apart.
    pub start: *const i32,
    pub start_stride: usize,
    /// Rows of a panel's columns, written.
    pub sums: *mut i32,
}

/// `ROWS` rows by `STRIPS` strips. Sums are those of 32-bit integers, which no order changes.
struct Block<const ROWS: usize, const STRIPS: usize>;

/// Repeats the body for each row, as straight code: accumulators that a loop variable indexes would stay in memory.
macro_rules! each_row {
    ($row:ident in $rows:ident $body:block) => {
        each_row!(@ $row $rows $body 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $row:ident $rows:ident $body:block $($index:literal)*) => {$(
        if $index < $rows {
            let $row: usize = $index;
            $body
        }
    )*};
}

impl<const ROWS: usize, const STRIPS: usize> Body for Block<ROWS, STRIPS> {
    type Args = BlockArgs;

    #[inline(always)]
    unsafe fn run<D: Dot>(d: D, args: &BlockArgs) {
        let s = d.simd();
        let mut sums = [[s.isplat(0); STRIPS]; ROWS];
        let stride = args.x_stride;
        // SAFETY: the caller guarantees what the fields of `BlockArgs` say.
        unsafe {
            each_row!(row in ROWS {
                for strip in 0..STRIPS {
                    let start = args.start.wrapping_add(row * args.start_stride + strip * LANES);
                    sums[row][strip] = s.iload(start);
                }
            });
            let mut w = args.w;
            for part in 0..args.parts {
                let mut x = args.x.wrapping_add(part * args.part_stride);
                for _ in 0..args.words {
                    let mut codes = [s.isplat(0); STRIPS];
                    for strip in 0..STRIPS {
                        codes[strip] = s.iload(w.wrapping_add(strip * STRIP_WORD_BYTES).cast());
                    }
                    each_row!(row in ROWS {
                        let word = s.isplat(x.wrapping_add(row * stride).cast::<i32>().read_unaligned());
                        for strip in 0..STRIPS {
                            sums[row][strip] = d.dot_codes(sums[row][strip], codes[strip], word);
                        }
                    });
                    x = x.wrapping_add(4);
                    w = w.wrapping_add(STRIPS * STRIP_WORD_BYTES);
                }
            }
            each_row!(row in ROWS {
                for strip in 0..STRIPS {
                    s.istore(args.sums.wrapping_add((row * STRIPS + strip) * LANES), sums[row][strip]);
                }
            });
        }
    }
}

/// A microkernel of `rows` rows by `strips` strips.
pub(super) struct BlockRow {
    pub set: DotSet,
    pub rows: usize,
    pub strips: usize,
    pub entry: Option<DotEntry<BlockArgs>>,
}

macro_rules! blocks {
    ($($set:expr => $strips:literal x [$($rows:literal)*];)*) => {
        &[$(&[$(BlockRow {
            set: $set,
            rows: $rows,
            strips: $strips,
            entry: dot_entry::<Block<$rows, $strips>>($set),
        }),*]),*]
    };
}

/// All instances: for each way to multiply bytes, from one row on.
pub(super) const BLOCKS: &[&[BlockRow]] = blocks! {
    DotSet::Scalar => 1 x [1 2];
    DotSet::Simd128 => 1 x [1 2];
    DotSet::Neon => 1 x [1 2 3 4];
    DotSet::NeonDot => 1 x [1 2 3 4];
    DotSet::Avx2 => 1 x [1 2 3];
    DotSet::AvxVnni => 1 x [1 2 3];
    DotSet::Avx512 => 2 x [1 2 3 4 5 6];
    DotSet::Avx512Vnni => 2 x [1 2 3 4 5 6 7 8 9 10 11 12];
};
