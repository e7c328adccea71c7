//! Microkernels over rows that are read in pieces: an implicit matrix product, whose rows are windows of an image.
//!
//! Numeric contract: that of `block.rs`, with k counting through the pieces in order. f32 weights. A result is
//! `clamp(acc + bias + addend)`, in that order; a NaN stays.

use super::activation::Activation;
use super::block::{AHEAD, F32, GROUP, GROUPS, HALVES, Operands, VARIANTS, for_each_row, opaque, run_words};
use super::epilogue::EpilogueArgs;
use super::pack::panel_columns;
use super::table::{EPILOGUES, MAX_ROWS};
use crate::isa::{Entry, Isa, Kernel, LANES, Row, Simd};
use std::ptr::null;

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
    /// Cache lines to fetch while [`SLICE`] values of a piece are read, from here on; any address may be given.
    pub fetch: *const u8,
    pub fetch_lines: usize,
    pub finish: Finish,
    /// `ROWS` rows of as many values as the panels have columns, written.
    pub out: *mut f32,
    pub out_stride: usize,
}

/// What becomes of the sums.
#[derive(Clone, Copy)]
pub(crate) struct Finish {
    /// A value for each column, or null.
    pub bias: *const f32,
    /// A value for each output, or null; may be `out` itself with the same stride.
    pub addend: *const f32,
    pub addend_stride: usize,
    /// The range of the results.
    pub least: f32,
    pub most: f32,
}

impl Finish {
    /// The sums as they are.
    pub const RAW: Finish = Finish {
        bias: null(),
        addend: null(),
        addend_stride: 0,
        least: f32::NEG_INFINITY,
        most: f32::INFINITY,
    };

    fn is_raw(&self) -> bool {
        let open = self.least == f32::NEG_INFINITY && self.most == f32::INFINITY;
        open && self.bias.is_null() && self.addend.is_null()
    }

    /// The range that an activation clamps to, where it does nothing else.
    pub fn range(activation: Activation) -> Option<(f32, f32)> {
        match activation {
            Activation::None => Some((f32::NEG_INFINITY, f32::INFINITY)),
            Activation::Relu => Some((0.0, f32::INFINITY)),
            Activation::Relu6 => Some((0.0, 6.0)),
            _ => None,
        }
    }
}

/// Values of a piece between two bursts of fetching.
pub(crate) const SLICE: usize = 32;

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
                accumulate::<S, ROWS, PANELS, 2, 2>(s, args);
            } else {
                accumulate::<S, ROWS, PANELS, 1, 1>(s, args);
            }
        }
    }
}

/// `ROWS` rows by the first 16 columns of a panel of 32.
struct Half<const ROWS: usize>;

impl<const ROWS: usize> Kernel for Half<ROWS> {
    type Args = TapsArgs;
    const OP: &'static str = "conv";
    const DTYPES: &'static str = "f32";
    const VARIANT: &'static str = HALVES[ROWS - 1];

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &TapsArgs, _tile: usize) {
        // SAFETY: the caller guarantees the operands of `TapsArgs`.
        unsafe { accumulate::<S, ROWS, 1, 1, 2>(s, args) }
    }
}

#[inline(always)]
unsafe fn accumulate<
    S: Simd,
    const ROWS: usize,
    const PANELS: usize,
    const VECS: usize,
    const PITCH: usize,
>(
    s: S,
    args: &TapsArgs,
) {
    const { assert!(ROWS <= GROUP * GROUPS) };
    let mut acc = [[[s.zero(); VECS]; PANELS]; ROWS];
    let mut at = Operands::<PANELS> { rows: [args.x; GROUPS], panels: [args.w; PANELS] };
    for panel in 0..PANELS {
        at.panels[panel] = args.w.wrapping_add(opaque(panel * args.panel_bytes));
    }
    let ahead = AHEAD * PITCH * LANES * 4;
    let mut far = args.fetch;
    for piece in 0..args.piece_count {
        // SAFETY: the caller guarantees the pieces, ROWS rows with all of them, and PANELS panels of as many packed rows as the
        // pieces have values; the pointers into the panels advance by as many as have been read.
        unsafe {
            let start = args.x.wrapping_add(*args.pieces.add(piece));
            for group in 0..GROUPS.min(ROWS.div_ceil(GROUP)) {
                at.rows[group] = start.wrapping_add(opaque(group * GROUP * args.ldx));
            }
            let mut left = args.length;
            while left > 0 {
                let values = if args.fetch_lines > 0 { left.min(SLICE) } else { left };
                for _ in 0..args.fetch_lines {
                    s.prefetch(far);
                    far = far.wrapping_add(64);
                }
                run_words::<S, F32, ROWS, PANELS, VECS, PITCH>(s, &mut acc, &mut at, args.ldx, values, ahead);
                left -= values;
            }
        }
    }
    // SAFETY: the caller guarantees the operands of `Finish` and the results.
    unsafe {
        if args.finish.is_raw() {
            for_each_row!(row in ROWS {
                for panel in 0..PANELS {
                    for vec in 0..VECS {
                        let out = args.out.wrapping_add(row * args.out_stride + (panel * VECS + vec) * LANES);
                        s.store(out, acc[row][panel][vec]);
                    }
                }
            });
        } else if args.finish.addend.is_null() {
            finish::<S, ROWS, PANELS, VECS, false>(s, args, &acc);
        } else {
            finish::<S, ROWS, PANELS, VECS, true>(s, args, &acc);
        }
    }
}

#[inline(always)]
unsafe fn finish<S: Simd, const ROWS: usize, const PANELS: usize, const VECS: usize, const ADDED: bool>(
    s: S,
    args: &TapsArgs,
    acc: &[[[S::V; VECS]; PANELS]; ROWS],
) {
    let (least, most) = (s.splat(args.finish.least), s.splat(args.finish.most));
    let mut bias = [[s.splat(-0.0); VECS]; PANELS];
    // SAFETY: the caller guarantees a bias for each column, and `ROWS` rows of outputs and addends.
    unsafe {
        if !args.finish.bias.is_null() {
            for panel in 0..PANELS {
                for vec in 0..VECS {
                    bias[panel][vec] = s.load(args.finish.bias.add((panel * VECS + vec) * LANES));
                }
            }
        }
        for_each_row!(row in ROWS {
            let out = args.out.wrapping_add(row * args.out_stride);
            let addend = args.finish.addend.wrapping_add(row * args.finish.addend_stride);
            for panel in 0..PANELS {
                for vec in 0..VECS {
                    let column = (panel * VECS + vec) * LANES;
                    let mut value = s.add(acc[row][panel][vec], bias[panel][vec]);
                    if ADDED {
                        value = s.add(value, s.load(addend.wrapping_add(column)));
                    }
                    s.store(out.wrapping_add(column), s.min(most, s.max(least, value)));
                }
            }
        });
    }
}

/// A microkernel: accumulators of `rows` rows by `panels` panels; by half a panel where there are none.
struct TapsRow {
    rows: usize,
    panels: usize,
    row: Row<TapsArgs>,
}

macro_rules! rows {
    ($isa:expr, [$($rows:literal),*], [$(($few:literal, $panels:literal)),*], [$($half:literal),*]) => {
        &[
            $(TapsRow { rows: $rows, panels: 1, row: Row::of::<Taps<$rows, 1>>($isa) },)*
            $(TapsRow { rows: $few, panels: $panels, row: Row::of::<Taps<$few, $panels>>($isa) },)*
            $(TapsRow { rows: $half, panels: 0, row: Row::of::<Half<$half>>($isa) },)*
        ]
    };
}

/// In each group the one-panel rows are complete from one row up to the most rows of the instance, and so are those of half a panel.
const TAPS: &[&[TapsRow]] = &[
    rows!(
        Isa::Avx512,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
        [(1, 4), (2, 4), (3, 3), (4, 2), (5, 2), (6, 2), (7, 2)],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    ),
    rows!(Isa::Avx2, [1, 2, 3, 4, 5, 6], [(1, 4), (2, 2)], []),
    rows!(Isa::Neon, [1, 2, 3, 4, 5, 6], [(1, 4), (2, 2)], []),
    rows!(Isa::Simd128, [1, 2, 3], [(1, 2)], []),
    rows!(Isa::Scalar, [1, 2, 3, 4], [(1, 2)], []),
];

/// The instances of one instruction set.
#[derive(Clone, Copy)]
pub(crate) struct TapsChosen {
    /// One-panel instances, by rows - 1; filled up to `max_rows`.
    pub one: [Option<Entry<TapsArgs>>; MAX_ROWS],
    pub max_rows: usize,
    /// Several-panel instances and their panels, by rows - 1.
    pub several: [Option<(Entry<TapsArgs>, usize)>; MAX_ROWS],
    /// Instances of a panel's first 16 columns, by rows - 1; filled up to `max_rows` or empty.
    pub half: [Option<Entry<TapsArgs>>; MAX_ROWS],
    pub epilogue: Entry<EpilogueArgs>,
}

/// Chooses the instances of exactly this instruction set; `None` if the build or the machine lacks them.
pub(crate) fn choose(isa: Isa) -> Option<TapsChosen> {
    let epilogue = EPILOGUES.iter().find(|row| row.isa == isa)?.entry?;
    let (one, half) = ([None; MAX_ROWS], [None; MAX_ROWS]);
    let mut chosen = TapsChosen { one, max_rows: 0, several: [None; MAX_ROWS], half, epilogue };
    for row in TAPS.iter().copied().flatten().filter(|row| row.row.isa == isa && isa.is_available()) {
        let entry = row.row.entry?;
        match row.panels {
            0 => chosen.half[row.rows - 1] = Some(entry),
            1 => {
                chosen.one[row.rows - 1] = Some(entry);
                chosen.max_rows = chosen.max_rows.max(row.rows);
            }
            panels => chosen.several[row.rows - 1] = Some((entry, panels)),
        }
    }
    (chosen.max_rows > 0).then_some(chosen)
}
