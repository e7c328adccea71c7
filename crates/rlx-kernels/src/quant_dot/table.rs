//! The instances of the family: rows by format and dot primitive, for selection, tests, benchmarks and reports.

use rlx_tensor::DType;

use super::block::{Block, BlockArgs, Column, ColumnArgs, Unpack, UnpackArgs};
use super::dot::{DotEntry, DotSet, dot_entry};
use super::format::{Dense, IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
use super::pack::Geometry;

/// Microkernels of 1, 2, 3, .. rows by one panel.
pub(super) type Blocks = &'static [Option<DotEntry<BlockArgs>>];

/// The instances of one format on one dot primitive.
pub(super) struct FormatRow {
    pub set: DotSet,
    /// Strips of a panel.
    pub strips: usize,
    /// Microkernels that read packed strips: the way of few rows.
    pub direct: Blocks,
    pub unpack: Option<DotEntry<UnpackArgs>>,
}

/// All instances of one format.
pub(super) struct FormatRows {
    pub geometry: Geometry,
    /// Reads one column, on any machine.
    pub column: Option<DotEntry<ColumnArgs>>,
    pub sets: &'static [FormatRow],
}

macro_rules! blocks {
    ($format:ty, $set:expr, $strips:literal, [$($rows:literal),*]) => {
        &[$(dot_entry::<Block<$format, $rows, $strips>>($set)),*]
    };
}

macro_rules! format_row {
    ($format:ty, $set:expr, $strips:literal, $rows:tt) => {
        FormatRow {
            set: $set,
            strips: $strips,
            direct: blocks!($format, $set, $strips, $rows),
            unpack: dot_entry::<Unpack<$format, $strips>>($set),
        }
    };
}

macro_rules! format_rows {
    ($($format:ty),*) => {
        &[$(FormatRows {
            geometry: Geometry::of::<$format>(),
            column: dot_entry::<Column<$format>>(DotSet::Scalar),
            sets: &[
                format_row!($format, DotSet::Scalar, 1, [1]),
                format_row!($format, DotSet::Simd128, 1, [1, 2]),
                format_row!($format, DotSet::Neon, 1, [1, 2]),
                format_row!($format, DotSet::NeonDot, 1, [1, 2, 3]),
                format_row!($format, DotSet::Avx2, 1, [1, 2]),
                format_row!($format, DotSet::AvxVnni, 1, [1, 2, 3]),
                format_row!($format, DotSet::Avx512, 2, [1]),
                format_row!($format, DotSet::Avx512Vnni, 2, [1, 2, 3, 4]),
            ],
        }),*]
    };
}

/// All formats.
pub(super) const FORMATS: &[FormatRows] =
    format_rows!(Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, Q4_K, Q5_K, Q6_K, Q2_K, Q3_K, IQ4_XS);

/// Microkernels over unpacked strips, of one form on one dot primitive; complete from one row on.
pub(super) struct DenseRows {
    pub halves: bool,
    pub min: bool,
    pub wide: bool,
    pub set: DotSet,
    pub blocks: Blocks,
}

macro_rules! dense_rows {
    ($(($halves:literal, $min:literal, $wide:literal) by $most:tt),*) => {
        &[$(dense_rows!(@ $halves, $min, $wide, $most)),*]
    };
    (@ $halves:literal, $min:literal, $wide:literal, $most:tt) => {
        [
            dense_rows!(@ $halves, $min, $wide, DotSet::Scalar, 1, [1, 2]),
            dense_rows!(@ $halves, $min, $wide, DotSet::Simd128, 1, [1, 2]),
            dense_rows!(@ $halves, $min, $wide, DotSet::Neon, 1, [1, 2, 3]),
            dense_rows!(@ $halves, $min, $wide, DotSet::NeonDot, 1, [1, 2, 3]),
            dense_rows!(@ $halves, $min, $wide, DotSet::Avx2, 1, [1, 2]),
            dense_rows!(@ $halves, $min, $wide, DotSet::AvxVnni, 1, [1, 2, 3]),
            dense_rows!(@ $halves, $min, $wide, DotSet::Avx512, 2, [1, 2]),
            dense_rows!(@ $halves, $min, $wide, DotSet::Avx512Vnni, 2, $most),
        ]
    };
    (@ $halves:literal, $min:literal, $wide:literal, $set:expr, $strips:literal, $rows:tt) => {
        DenseRows {
            halves: $halves,
            min: $min,
            wide: $wide,
            set: $set,
            blocks: blocks!(Dense<$halves, $min, $wide>, $set, $strips, $rows),
        }
    };
}

/// All forms of unpacked strips. Six rows of halves by two strips need more registers than there are.
pub(super) const DENSE: &[[DenseRows; DotSet::ALL.len()]] = dense_rows!(
    (false, false, false) by [1, 2, 3, 4, 5, 6],
    (false, false, true) by [1, 2, 3, 4, 5, 6],
    (false, true, false) by [1, 2, 3, 4, 5, 6],
    (true, false, false) by [1, 2, 3, 4, 5],
    (true, true, false) by [1, 2, 3, 4, 5]
);

/// The format of a dtype.
pub(super) fn format_of(dtype: DType) -> Option<&'static FormatRows> {
    FORMATS.iter().find(|rows| rows.geometry.dtype == dtype)
}
