//! Microkernels over rows that are read in pieces: an implicit matrix product, whose rows are windows of an image.
//!
//! Numeric contract: that of `block.rs`, with k counting through the pieces in order. f32 weights.

use super::block::{AHEAD, F32, GROUP, GROUPS, Operands, VARIANTS, for_each_row, opaque, run_words};
use super::epilogue::EpilogueArgs;
use super::pack::panel_columns;
use super::table::{EPILOGUES, MAX_ROWS};
use crate::isa::{Entry, Isa, Kernel, LANES, Row, Simd};

/// One call of a microkernel.
pub(crate) struct TapsArgs {
    /// `ROWS` rows, `ldx` values apart.
    pub x: *const f32,
    pub ldx: usize,
    /// Where the pieces of a row start, in values from its start.
    pub pieces: *const usize,
    pub piece_count: usize,
    /// Values of a piece.
    pub length: usize,
    /// The first of `PANELS` consecutive packed panels, whose k is `piece_count * length`.
    pub w: *const u8,
    pub panel_bytes: usize,
    /// `[ROWS][PANELS * NR]` values, written.
    pub acc: *mut f32,
}

/// `ROWS` rows by `PANELS` panels.
struct Taps<const ROWS: usize, const PANELS: usize>;

impl<const ROWS: usize, const PANELS: usize> Kernel for Taps<ROWS, PANELS> {
    type Args = TapsArgs;
    const OP: &'static str = "conv";
    const DTYPES: &'static str = "f32";
    const VARIANT: &'static str = VARIANTS[PANELS - 1][ROWS - 1];

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &TapsArgs, _tile: usize) {
        // SAFETY: the caller guarantees the operands of `TapsArgs`.
        unsafe {
            if panel_columns(S::ISA) == 2 * LANES {
                accumulate::<S, ROWS, PANELS, 2>(s, args);
            } else {
                accumulate::<S, ROWS, PANELS, 1>(s, args);
            }
        }
    }
}

#[inline(always)]
unsafe fn accumulate<S: Simd, const ROWS: usize, const PANELS: usize, const VECS: usize>(
    s: S,
    args: &TapsArgs,
) {
    const { assert!(ROWS <= GROUP * GROUPS) };
    let mut acc = [[[s.zero(); VECS]; PANELS]; ROWS];
    let mut at = Operands::<PANELS> { rows: [args.x; GROUPS], panels: [args.w; PANELS] };
    for panel in 0..PANELS {
        at.panels[panel] = args.w.wrapping_add(opaque(panel * args.panel_bytes));
    }
    let ahead = AHEAD * VECS * LANES * 4;
    for piece in 0..args.piece_count {
        // SAFETY: the caller guarantees the pieces, ROWS rows with all of them, and PANELS panels of as many packed rows as the
        // pieces have values; the pointers into the panels advance by as many as have been read.
        unsafe {
            let start = args.x.wrapping_add(*args.pieces.add(piece));
            for group in 0..GROUPS.min(ROWS.div_ceil(GROUP)) {
                at.rows[group] = start.wrapping_add(opaque(group * GROUP * args.ldx));
            }
            run_words::<S, F32, ROWS, PANELS, VECS>(s, &mut acc, &mut at, args.ldx, args.length, ahead);
        }
    }
    for_each_row!(row in ROWS {
        for panel in 0..PANELS {
            for vec in 0..VECS {
                let column = (row * PANELS + panel) * VECS + vec;
                // SAFETY: the caller guarantees `ROWS` rows of as many accumulators as the panels have columns.
                unsafe { s.store(args.acc.add(column * LANES), acc[row][panel][vec]) };
            }
        }
    });
}

/// A microkernel: accumulators of `rows` rows by `panels` panels.
struct TapsRow {
    rows: usize,
    panels: usize,
    row: Row<TapsArgs>,
}

macro_rules! rows {
    ($isa:expr, [$($rows:literal),*], [$(($few:literal, $panels:literal)),*]) => {
        &[
            $(TapsRow { rows: $rows, panels: 1, row: Row::of::<Taps<$rows, 1>>($isa) },)*
            $(TapsRow { rows: $few, panels: $panels, row: Row::of::<Taps<$few, $panels>>($isa) },)*
        ]
    };
}

/// In each group the one-panel rows are complete from one row up to the most rows of the instance.
const TAPS: &[&[TapsRow]] = &[
    rows!(
        Isa::Avx512,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
        [(1, 4), (2, 4), (3, 3), (4, 2), (5, 2), (6, 2), (7, 2)]
    ),
    rows!(Isa::Avx2, [1, 2, 3, 4, 5, 6], [(1, 4), (2, 2)]),
    rows!(Isa::Neon, [1, 2, 3, 4, 5, 6], [(1, 4), (2, 2)]),
    rows!(Isa::Simd128, [1, 2, 3], [(1, 2)]),
    rows!(Isa::Scalar, [1, 2, 3, 4], [(1, 2)]),
];

/// The instances of one instruction set.
#[derive(Clone, Copy)]
pub(crate) struct TapsChosen {
    /// One-panel instances, by rows - 1; filled up to `max_rows`.
    pub one: [Option<Entry<TapsArgs>>; MAX_ROWS],
    pub max_rows: usize,
    /// Several-panel instances and their panels, by rows - 1.
    pub several: [Option<(Entry<TapsArgs>, usize)>; MAX_ROWS],
    pub epilogue: Entry<EpilogueArgs>,
}

/// Chooses the instances of exactly this instruction set; `None` if the build or the machine lacks them.
pub(crate) fn choose(isa: Isa) -> Option<TapsChosen> {
    let epilogue = EPILOGUES.iter().find(|row| row.isa == isa)?.entry?;
    let mut chosen = TapsChosen { one: [None; MAX_ROWS], max_rows: 0, several: [None; MAX_ROWS], epilogue };
    for row in TAPS.iter().copied().flatten().filter(|row| row.row.isa == isa && isa.is_available()) {
        let entry = row.row.entry?;
        if row.panels == 1 {
            chosen.one[row.rows - 1] = Some(entry);
            chosen.max_rows = chosen.max_rows.max(row.rows);
        } else {
            chosen.several[row.rows - 1] = Some((entry, row.panels));
        }
    }
    (chosen.max_rows > 0).then_some(chosen)
}
