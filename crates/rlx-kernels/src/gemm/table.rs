//! The instances of the family: one row each, for selection, tests, benchmarks and reports.

use super::block::{Bf16, Block, BlockArgs, F16, F32, RoundedBf16, VARIANTS, Weight};
use super::epilogue::{Epilogue, EpilogueArgs};
use super::pack::WeightType;
use super::precision::Products;
use super::rounded::{RoundArgs, RoundToF32, RoundToPairs};
use crate::isa::{Entry, Isa, Row, Rows};

/// A microkernel: accumulators of `rows` rows by `panels` panels.
pub struct BlockRow {
    /// Element type of the weights.
    pub dtype: WeightType,
    /// How products are formed.
    pub products: Products,
    /// Rows of a call.
    pub rows: usize,
    /// Panels of a call.
    pub panels: usize,
    pub(super) row: Row<BlockArgs>,
}

impl BlockRow {
    const fn of<W: Weight, const ROWS: usize, const PANELS: usize>(isa: Isa) -> BlockRow {
        let row = Row::of::<Block<W, ROWS, PANELS>>(isa);
        BlockRow { dtype: W::DTYPE, products: W::PRODUCTS, rows: ROWS, panels: PANELS, row }
    }

    const fn dot<const ROWS: usize, const PANELS: usize>() -> BlockRow {
        #[cfg(target_arch = "x86_64")]
        let entry: Option<Entry<BlockArgs>> = Some(super::dot::dot_block::<ROWS, PANELS>);
        #[cfg(not(target_arch = "x86_64"))]
        let entry: Option<Entry<BlockArgs>> = None;
        let (op, dtypes, variant) = ("linear", RoundedBf16::NAME, VARIANTS[PANELS - 1][ROWS - 1]);
        let row = Row { op, dtypes, variant, isa: Isa::Avx512, entry };
        let (dtype, products) = (WeightType::Bf16, Products::Bf16Dot);
        BlockRow { dtype, products, rows: ROWS, panels: PANELS, row }
    }

    /// The instruction set the instance is compiled for.
    pub fn isa(&self) -> Isa {
        self.row.isa
    }

    /// `linear_{dtypes}_{isa}_{rows}x{panels}p`; the instruction set of `vdpbf16ps` is `avx512bf16`.
    pub fn name(&self) -> String {
        let Row { op, dtypes, variant, .. } = self.row;
        match self.products {
            Products::Bf16Dot => format!("{op}_{dtypes}_avx512bf16_{variant}"),
            Products::F32 | Products::Bf16Fma => self.row.name(),
        }
    }

    /// Whether this build and this machine have the instance.
    pub fn is_available(&self) -> bool {
        self.row.entry.is_some() && self.products.is_available(self.row.isa)
    }

    pub(super) fn serves(&self, isa: Isa, dtype: WeightType, products: Products) -> bool {
        self.row.isa == isa && self.dtype == dtype && self.products == products
    }
}

macro_rules! rows {
    (dot, [$($rows:literal),*], [$(($few:literal, $panels:literal)),*]) => {
        &[$(BlockRow::dot::<$rows, 1>(),)* $(BlockRow::dot::<$few, $panels>(),)*]
    };
    ($isa:expr, $w:ty, [$($rows:literal),*], [$(($few:literal, $panels:literal)),*]) => {
        &[$(BlockRow::of::<$w, $rows, 1>($isa),)* $(BlockRow::of::<$w, $few, $panels>($isa),)*]
    };
}

/// All microkernels. In each group the one-panel rows are complete from one row up to the most rows of the instance;
/// the rows with more panels keep enough accumulators in flight when there are few rows.
pub const BLOCKS: &[&[BlockRow]] = &[
    rows!(
        Isa::Avx512,
        F32,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
        [(1, 4), (2, 4), (3, 3), (4, 2)]
    ),
    rows!(Isa::Avx512, Bf16, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [(1, 4), (2, 3), (3, 3), (4, 2)]),
    rows!(
        Isa::Avx512,
        RoundedBf16,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
        [(1, 4), (2, 3), (3, 3), (4, 2)]
    ),
    rows!(dot, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [(1, 4), (2, 4), (3, 3), (4, 2)]),
    rows!(Isa::Avx512, F16, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [(1, 4), (2, 4), (3, 2), (4, 2)]),
    rows!(Isa::Avx2, F32, [1, 2, 3, 4, 5, 6], [(1, 4), (2, 2)]),
    rows!(Isa::Avx2, Bf16, [1, 2, 3, 4, 5], [(1, 4)]),
    rows!(Isa::Avx2, RoundedBf16, [1, 2, 3, 4, 5], [(1, 4)]),
    rows!(Isa::Avx2, F16, [1, 2, 3, 4], [(1, 2)]),
    rows!(Isa::Neon, F32, [1, 2, 3, 4, 5, 6], [(1, 4), (2, 2)]),
    rows!(Isa::Neon, Bf16, [1, 2, 3, 4, 5, 6], [(1, 4), (2, 2)]),
    rows!(Isa::Neon, RoundedBf16, [1, 2, 3, 4, 5, 6], [(1, 4), (2, 2)]),
    rows!(Isa::Neon, F16, [1, 2, 3, 4], [(1, 2)]),
    rows!(Isa::Simd128, F32, [1, 2, 3], [(1, 2)]),
    rows!(Isa::Simd128, Bf16, [1, 2, 3], [(1, 2)]),
    rows!(Isa::Simd128, RoundedBf16, [1, 2, 3], [(1, 2)]),
    rows!(Isa::Simd128, F16, [1, 2, 3], [(1, 2)]),
    rows!(Isa::Scalar, F32, [1, 2, 3, 4], [(1, 2)]),
    rows!(Isa::Scalar, Bf16, [1, 2, 3, 4], [(1, 2)]),
    rows!(Isa::Scalar, RoundedBf16, [1, 2, 3, 4], [(1, 2)]),
    rows!(Isa::Scalar, F16, [1, 2, 3, 4], [(1, 2)]),
];

pub(super) const EPILOGUES: Rows<EpilogueArgs> = Row::all_of::<Epilogue>();

const ROUND_TO_F32: Rows<RoundArgs> = Row::all_of::<RoundToF32>();

const ROUND_TO_PAIRS: Rows<RoundArgs> = Row::all_of::<RoundToPairs>();

/// The most rows any instance takes.
pub(super) const MAX_ROWS: usize = 14;

/// The most values a microkernel call accumulates: rows by panels by columns.
pub(super) const MAX_ACCUMULATORS: usize = 14 * 32;

/// The instances chosen for one instruction set and element type.
#[derive(Clone, Copy)]
pub(super) struct Chosen {
    /// One-panel instances, by rows - 1; filled up to `max_rows`.
    pub one: [Option<Entry<BlockArgs>>; MAX_ROWS],
    pub max_rows: usize,
    /// Several-panel instances and their panels, by rows - 1.
    pub several: [Option<(Entry<BlockArgs>, usize)>; MAX_ROWS],
    pub epilogue: Entry<EpilogueArgs>,
    /// What the rows of `x` go through first.
    pub round: Option<Entry<RoundArgs>>,
}

/// Chooses the instances of exactly this instruction set; `None` if the build or the machine lacks them. Of blocks, only the
/// epilogue.
pub(super) fn choose(isa: Isa, dtype: WeightType, products: Products) -> Option<Chosen> {
    if !products.is_available(isa) {
        return None;
    }
    let epilogue = EPILOGUES.iter().find(|row| row.isa == isa)?.entry?;
    let round = match products {
        Products::F32 => None,
        Products::Bf16Fma => Some(&ROUND_TO_F32),
        Products::Bf16Dot => Some(&ROUND_TO_PAIRS),
    };
    let round = round.and_then(|rows| rows.iter().find(|row| row.isa == isa)?.entry);
    let mut chosen =
        Chosen { one: [None; MAX_ROWS], max_rows: 0, several: [None; MAX_ROWS], epilogue, round };
    for row in BLOCKS.iter().copied().flatten().filter(|row| row.serves(isa, dtype, products)) {
        let entry = row.row.entry?;
        if row.panels == 1 {
            chosen.one[row.rows - 1] = Some(entry);
            chosen.max_rows = chosen.max_rows.max(row.rows);
        } else {
            chosen.several[row.rows - 1] = Some((entry, row.panels));
        }
    }
    (chosen.max_rows > 0 || matches!(dtype, WeightType::Blocks(_))).then_some(chosen)
}
