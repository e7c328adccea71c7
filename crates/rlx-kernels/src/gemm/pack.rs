//! Packed weights: the one layout that every row-count variant reads.
//!
//! Panels of [`panel_columns`] output columns, each `k` rows of that many values, the last panel padded with zeros.
//! f32 panels are `[k][NR]`; 16-bit panels are `[ceil(k/2)][NR][2]`, two consecutive k side by side, the second of the
//! last pair zero when k is odd. In a *gated* matrix the first half of a panel's columns belongs to the gate, the
//! second half to the up projection, at the same output columns.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use rlx_tensor::DType;

use super::precision::Precision;
use crate::aligned::AlignedBuf;
use crate::isa::half::f32_to_bf16;
use crate::isa::{Entry, Isa, Kernel, LANES, Simd, entry};
use crate::pool::{Pool, Team};
use crate::quant_dot;

/// The element type of a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// IEEE 754 binary32.
    F32,
    /// The upper half of a binary32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// Blocks of a quantised dtype, one of [`crate::quant_dot::dtypes`].
    Blocks(DType),
}

impl WeightType {
    /// Bytes per element; 0 where elements share a block.
    pub const fn bytes(self) -> usize {
        match self {
            WeightType::F32 => 4,
            WeightType::Bf16 | WeightType::F16 => 2,
            WeightType::Blocks(_) => 0,
        }
    }
}

impl WeightType {
    /// Bytes of an `[n, k]` source; `None` if they overflow or `k` is no whole number of blocks.
    pub fn source_bytes(self, n: usize, k: usize) -> Option<usize> {
        match self {
            WeightType::Blocks(dtype) => quant_dot::source_bytes(dtype, n, k),
            dense => n.checked_mul(k)?.checked_mul(dense.bytes()),
        }
    }
}

/// How the source of a weight is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightOrder {
    /// `[n, k]`: one row per output column, as checkpoints mostly store it.
    RowMajor,
    /// `[k, n]`: one row per input, as GPT-2's "Conv1D" stores it.
    Transposed,
}

/// One source matrix: `n` output columns by `k` inputs, contiguous, little-endian, at any alignment.
#[derive(Clone, Copy)]
pub struct WeightPart<'a> {
    /// `dtype.source_bytes(n, k)` bytes.
    pub bytes: &'a [u8],
    /// Element type.
    pub dtype: WeightType,
    /// Output columns.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Which of the two is contiguous.
    pub order: WeightOrder,
}

/// Why a weight cannot be packed or a packed weight not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PackError {
    /// No part was given.
    NoParts,
    /// A part's bytes do not match its shape.
    PartBytes {
        /// Index of the part.
        part: usize,
        /// Bytes its shape asks for.
        expected: usize,
        /// Bytes it has.
        found: usize,
    },
    /// A part's `k` differs from the first part's.
    PartInputs {
        /// Index of the part.
        part: usize,
        /// `k` of the first part.
        expected: usize,
        /// `k` of this part.
        found: usize,
    },
    /// A gated matrix is made of exactly two parts of equal `n`.
    GatedParts {
        /// `n` of each part given.
        columns: Vec<usize>,
    },
    /// Blocks that cannot be packed as asked.
    Blocks {
        /// The dtype.
        dtype: DType,
        /// Why not.
        reason: &'static str,
    },
    /// The packed size does not fit in memory addresses.
    TooLarge,
    /// The storage of a packed matrix is not the size of its layout.
    StorageBytes {
        /// Bytes the layout asks for.
        expected: usize,
        /// Bytes from the offset to the end of the storage.
        found: usize,
    },
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PackError::NoParts => write!(f, "a weight needs at least one part"),
            PackError::PartBytes { part, expected, found } => {
                write!(f, "weight part {part}: expected {expected} bytes for its shape, found {found}")
            }
            PackError::PartInputs { part, expected, found } => {
                write!(f, "weight part {part}: expected {expected} inputs as in part 0, found {found}")
            }
            PackError::GatedParts { columns } => {
                write!(f, "a gated weight needs two parts of equal columns, found {columns:?}")
            }
            PackError::Blocks { dtype, reason } => write!(f, "{dtype} blocks {reason}"),
            PackError::TooLarge => write!(f, "the packed weight is larger than the address space"),
            PackError::StorageBytes { expected, found } => {
                write!(f, "packed weight: expected {expected} bytes, found {found}")
            }
        }
    }
}

impl std::error::Error for PackError {}

/// Output columns per panel (`NR`) on an instruction set.
pub const fn panel_columns(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 32,
        _ => 16,
    }
}

/// Shape and place of everything in a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackedLayout {
    dtype: WeightType,
    n: usize,
    k: usize,
    panel_columns: usize,
    gated: bool,
}

impl PackedLayout {
    /// The layout of an `[n, k]` weight on `isa`; gated matrices count gate and up columns in `n`.
    pub fn new(
        dtype: WeightType,
        n: usize,
        k: usize,
        gated: bool,
        isa: Isa,
    ) -> Result<PackedLayout, PackError> {
        if gated && !n.is_multiple_of(2) {
            return Err(PackError::GatedParts { columns: vec![n] });
        }
        if let WeightType::Blocks(dtype) = dtype
            && !quant_dot::block_inputs(dtype).is_some_and(|inputs| k.is_multiple_of(inputs))
        {
            return Err(PackError::Blocks { dtype, reason: "have no kernels, or rows end inside one" });
        }
        let layout = PackedLayout { dtype, n, k, panel_columns: panel_columns(isa), gated };
        let rows = k.checked_add(1).ok_or(PackError::TooLarge)?;
        let columns = n.checked_add(2 * layout.panel_columns).ok_or(PackError::TooLarge)?;
        let bytes =
            rows.checked_mul(columns).and_then(|values| values.checked_mul(4)).ok_or(PackError::TooLarge)?;
        if bytes > isize::MAX as usize { Err(PackError::TooLarge) } else { Ok(layout) }
    }

    /// Element type.
    pub fn dtype(&self) -> WeightType {
        self.dtype
    }

    /// Columns of the weight (gate and up counted separately).
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns of the product: `n`, or `n / 2` if gated.
    pub fn outputs(&self) -> usize {
        if self.gated { self.n / 2 } else { self.n }
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Whether gate and up columns are interleaved.
    pub fn gated(&self) -> bool {
        self.gated
    }

    /// Columns per panel.
    pub fn panel_columns(&self) -> usize {
        self.panel_columns
    }

    /// Output columns per panel: half of [`PackedLayout::panel_columns`] if gated.
    pub fn panel_outputs(&self) -> usize {
        if self.gated { self.panel_columns / 2 } else { self.panel_columns }
    }

    /// Number of panels.
    pub fn panels(&self) -> usize {
        self.outputs().div_ceil(self.panel_outputs())
    }

    /// Bytes per panel, a multiple of 64.
    pub fn panel_bytes(&self) -> usize {
        match self.dtype {
            WeightType::F32 => self.k * self.panel_columns * 4,
            WeightType::Bf16 | WeightType::F16 => self.k.div_ceil(2) * self.panel_columns * 4,
            WeightType::Blocks(dtype) => quant_dot::panel_bytes(dtype, self.k, self.panel_columns),
        }
    }

    /// Bytes of the packed matrix.
    pub fn bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// Panel and column within it of weight column `column` (in the order the parts were stacked).
    fn place(&self, column: usize) -> (usize, usize) {
        let per_panel = self.panel_outputs();
        if self.gated && column >= self.n / 2 {
            let output = column - self.n / 2;
            (output / per_panel, per_panel + output % per_panel)
        } else {
            (column / per_panel, column % per_panel)
        }
    }

    /// Weight column at `lane` of `panel`; `None` in the padding.
    fn column(&self, panel: usize, lane: usize) -> Option<usize> {
        let per_panel = self.panel_outputs();
        let output = panel * per_panel + lane % per_panel;
        let base = if lane >= per_panel { self.n / 2 } else { 0 };
        (output < self.outputs()).then_some(base + output)
    }
}

/// Bytes that an `[n, k]` weight takes when packed for `isa`, for the memory estimate.
pub fn size_of_packed(n: usize, k: usize, dtype: WeightType, isa: Isa) -> Result<usize, PackError> {
    Ok(PackedLayout::new(dtype, n, k, false, isa)?.bytes())
}

/// A checked request to pack parts, cut into one tile per panel.
pub struct PackJob<'a> {
    parts: &'a [WeightPart<'a>],
    layout: PackedLayout,
    isa: Isa,
}

impl<'a> PackJob<'a> {
    /// Checks the parts and derives the layout.
    ///
    /// Parts are stacked along n; their element type becomes that of [`Precision::packed_type`].
    pub fn new(
        parts: &'a [WeightPart<'a>],
        gated: bool,
        isa: Isa,
        precision: Precision,
    ) -> Result<PackJob<'a>, PackError> {
        let first = parts.first().ok_or(PackError::NoParts)?;
        let mut n = 0usize;
        for (index, part) in parts.iter().enumerate() {
            if part.k != first.k {
                return Err(PackError::PartInputs { part: index, expected: first.k, found: part.k });
            }
            if let WeightType::Blocks(dtype) = part.dtype
                && (part.order != WeightOrder::RowMajor || part.dtype != first.dtype)
            {
                return Err(PackError::Blocks { dtype, reason: "are transposed, or beside another type" });
            }
            let expected = part.dtype.source_bytes(part.n, part.k).ok_or(PackError::TooLarge)?;
            if expected != part.bytes.len() {
                return Err(PackError::PartBytes { part: index, expected, found: part.bytes.len() });
            }
            n = n.checked_add(part.n).ok_or(PackError::TooLarge)?;
        }
        if gated && (parts.len() != 2 || parts[0].n != parts[1].n) {
            return Err(PackError::GatedParts { columns: parts.iter().map(|part| part.n).collect() });
        }
        let dtype = precision.packed_type(parts.iter().map(|part| part.dtype)).ok_or(PackError::NoParts)?;
        Ok(PackJob { parts, layout: PackedLayout::new(dtype, n, first.k, gated, isa)?, isa })
    }

    /// The layout of the result.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Packs this job's panels together with the other workers of the team, who pass the same job and bytes.
    /// Ends with a barrier.
    ///
    /// # Safety
    /// `out` is valid for writes of `layout().bytes()` bytes, which nothing else accesses until the barrier.
    pub unsafe fn pack_tiles(&self, team: &Team<'_>, out: *mut u8, panels: Range<usize>) {
        let panel_bytes = self.layout.panel_bytes();
        assert!(panels.end <= self.layout.panels(), "pack_tiles: panels out of range");
        for panel in team.tiles(panels.len()).map(|tile| panels.start + tile) {
            // SAFETY: the caller grants the whole matrix; panels are disjoint and each is claimed by one worker.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add(panel * panel_bytes), panel_bytes) };
            self.pack_panel(panel, out);
        }
        team.barrier();
    }

    /// Bytes at the start of a part's source that only panels before `panel` read.
    fn read_before(&self, part: usize, panel: usize) -> usize {
        let WeightPart { bytes, dtype, n, k, order } = self.parts[part];
        if panel >= self.layout.panels() {
            return bytes.len();
        }
        if order == WeightOrder::Transposed {
            return 0;
        }
        let before: usize =
            if self.layout.gated { 0 } else { self.parts[..part].iter().map(|part| part.n).sum() };
        (panel * self.layout.panel_outputs()).saturating_sub(before).min(n) * k * dtype.bytes()
    }

    /// Packs one panel; `out` is as long as a panel.
    fn pack_panel(&self, panel: usize, out: &mut [u8]) {
        let mut sources = [None; 32];
        for (lane, source) in sources.iter_mut().take(self.layout.panel_columns).enumerate() {
            *source = self.layout.column(panel, lane).map(|column| self.source(column));
        }
        let sources = &sources[..self.layout.panel_columns];
        if let WeightType::Blocks(dtype) = self.layout.dtype {
            let mut rows = [None; 32];
            for (row, source) in rows.iter_mut().zip(sources) {
                *row = source.as_ref().map(Source::row_bytes);
            }
            quant_dot::pack_panel(dtype, self.layout.k, &rows[..sources.len()], out);
            return;
        }
        if self.parts.iter().any(|part| part.order != WeightOrder::RowMajor) {
            copy_elements(sources, self.layout, out);
            return;
        }
        let row_bytes = self.layout.k * self.layout.dtype.bytes();
        let mut converted = Vec::new();
        if self.parts.iter().any(|part| part.dtype != self.layout.dtype) {
            converted = vec![0; sources.len() * row_bytes];
            for (row, source) in converted.chunks_exact_mut(row_bytes.max(1)).zip(sources) {
                if let Some(source) = source {
                    convert_row(self.isa, source.row_bytes(), source.part.dtype, self.layout.dtype, row);
                }
            }
        }
        let mut rows = [None; 32];
        for (lane, (row, source)) in rows.iter_mut().zip(sources).enumerate() {
            *row = source.as_ref().map(|source| match converted.is_empty() {
                true => source.row_bytes(),
                false => &converted[lane * row_bytes..(lane + 1) * row_bytes],
            });
        }
        transpose_words(self.isa, &rows[..sources.len()], row_bytes, out);
    }

    fn source(&self, column: usize) -> Source<'a> {
        let mut row = column;
        for part in self.parts {
            if row < part.n {
                return Source { part: *part, row };
            }
            row -= part.n;
        }
        unreachable!("a layout has as many columns as its parts together")
    }
}

#[derive(Clone, Copy)]
struct Source<'a> {
    part: WeightPart<'a>,
    row: usize,
}

impl<'a> Source<'a> {
    /// The values of a part in row order.
    fn row_bytes(&self) -> &'a [u8] {
        let bytes = self.part.bytes.len() / self.part.n;
        &self.part.bytes[self.row * bytes..(self.row + 1) * bytes]
    }

    /// The bits of element `input`, at the low end.
    fn bits(&self, input: usize) -> u32 {
        let index = match self.part.order {
            WeightOrder::RowMajor => self.row * self.part.k + input,
            WeightOrder::Transposed => input * self.part.n + self.row,
        };
        let bytes = self.part.bytes;
        match self.part.dtype {
            WeightType::F32 => {
                let at = index * 4;
                u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
            WeightType::Bf16 | WeightType::F16 => {
                u32::from(u16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]))
            }
            WeightType::Blocks(_) => 0,
        }
    }
}

/// Writes `out[word][lane]` from rows of 32-bit words: one f32, or two 16-bit values of consecutive k.
///
/// The words are `row_bytes / 4`, rounded up; the missing half of the last is zero.
fn transpose_words(isa: Isa, sources: &[Option<&[u8]>], row_bytes: usize, out: &mut [u8]) {
    let lanes = sources.len();
    let words = row_bytes / 4;
    let groups = if words == 0 { 0 } else { lanes };
    for first in (0..groups).step_by(LANES) {
        let mut rows = [std::ptr::null(); LANES];
        for (row, source) in rows.iter_mut().zip(&sources[first..]) {
            if let Some(source) = source {
                *row = source[..row_bytes].as_ptr().cast();
            }
        }
        assert!(out.len() >= row_bytes.div_ceil(4) * lanes * 4 && first + LANES <= lanes);
        let args = TransposeArgs { rows, words, out: out[first * 4..].as_mut_ptr().cast(), stride: lanes };
        let kernel = entry::<Transpose>(isa).filter(|_| isa.is_available()).unwrap_or(SCALAR_TRANSPOSE);
        // SAFETY: each row that is not null has `words` words; the last word is stored at lane `first + 15` of packed
        // row `words - 1`, within `out`.
        unsafe { kernel(&args, 0) };
    }
    if !row_bytes.is_multiple_of(4) {
        for (lane, source) in sources.iter().enumerate() {
            let mut value = [0; 4];
            if let Some(source) = source {
                value[..2].copy_from_slice(&source[row_bytes - 2..row_bytes]);
            }
            out[(words * lanes + lane) * 4..(words * lanes + lane) * 4 + 4].copy_from_slice(&value);
        }
    }
}

const SCALAR_TRANSPOSE: Entry<TransposeArgs> = match entry::<Transpose>(Isa::Scalar) {
    Some(kernel) => kernel,
    None => panic!("every build has the scalar instance"),
};

/// Converts a row to f32, exactly, or to bf16, rounded.
fn convert_row(isa: Isa, from: &[u8], from_type: WeightType, to_type: WeightType, to: &mut [u8]) {
    let n = from.len() / from_type.bytes();
    assert!(to.len() >= n * to_type.bytes());
    let args = ConvertArgs { from: from.as_ptr(), from_type, to: to.as_mut_ptr(), to_type, n };
    let kernel = entry::<Convert>(isa).filter(|_| isa.is_available()).unwrap_or(SCALAR_CONVERT);
    // SAFETY: both rows have `n` values of their types.
    unsafe { kernel(&args, 0) };
}

const SCALAR_CONVERT: Entry<ConvertArgs> = match entry::<Convert>(Isa::Scalar) {
    Some(kernel) => kernel,
    None => panic!("every build has the scalar instance"),
};

struct ConvertArgs {
    /// `n` values, at any alignment.
    from: *const u8,
    from_type: WeightType,
    /// `n` values of f32 or bf16, at any alignment.
    to: *mut u8,
    to_type: WeightType,
    n: usize,
}

struct Convert;

impl Kernel for Convert {
    type Args = ConvertArgs;
    const OP: &'static str = "linear_convert";
    const DTYPES: &'static str = "any";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &ConvertArgs, _tile: usize) {
        for at in (0..args.n).step_by(LANES) {
            let count = LANES.min(args.n - at);
            let from = args.from.wrapping_add(at * args.from_type.bytes());
            let to = args.to.wrapping_add(at * args.to_type.bytes());
            // SAFETY: the caller guarantees `n` values of both types.
            unsafe {
                let value = match args.from_type {
                    WeightType::F32 => s.load_to(from.cast(), count),
                    WeightType::Bf16 if count == LANES => s.load_bf16(from.cast()),
                    WeightType::Bf16 => s.load_bf16_part(from.cast(), count),
                    WeightType::F16 if count == LANES => s.load_f16(from.cast()),
                    WeightType::F16 => s.load_f16_part(from.cast(), count),
                    WeightType::Blocks(_) => s.zero(),
                };
                match args.to_type {
                    WeightType::Bf16 if count == LANES => s.store_bf16(to.cast(), value),
                    WeightType::Bf16 => s.store_bf16_part(to.cast(), count, value),
                    _ => s.store_to(to.cast(), count, value),
                }
            }
        }
    }
}

struct TransposeArgs {
    /// Rows of `words` words, at any alignment; null stands for zeros.
    rows: [*const f32; LANES],
    words: usize,
    /// `words` rows of 16 words, `stride` words apart.
    out: *mut f32,
    stride: usize,
}

struct Transpose;

impl Kernel for Transpose {
    type Args = TransposeArgs;
    const OP: &'static str = "linear_pack";
    const DTYPES: &'static str = "words";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &TransposeArgs, _tile: usize) {
        let mut word = 0;
        while word < args.words {
            let count = LANES.min(args.words - word);
            let mut tile = [s.zero(); LANES];
            // SAFETY: the caller guarantees `words` words in every row and in `out`.
            unsafe {
                for (row, start) in tile.iter_mut().zip(args.rows) {
                    if !start.is_null() {
                        let p = start.wrapping_byte_add(word * 4);
                        *row = if count == LANES { s.load(p) } else { s.load_part(p, count) };
                        s.prefetch(p.wrapping_byte_add(512).cast());
                    }
                }
                let columns = s.transpose(tile);
                for (index, column) in columns.into_iter().enumerate().take(count) {
                    s.store(args.out.wrapping_add((word + index) * args.stride), column);
                }
            }
            word += count;
        }
    }
}

/// Writes a panel element by element, from any order, converted where types differ.
fn copy_elements(sources: &[Option<Source<'_>>], layout: PackedLayout, out: &mut [u8]) {
    let lanes = sources.len();
    for input in 0..layout.k {
        for (lane, source) in sources.iter().enumerate() {
            let bits = source.as_ref().map_or(0, |source| source.bits(input));
            match layout.dtype {
                WeightType::Blocks(_) => {}
                WeightType::F32 => {
                    let dtype = source.as_ref().map_or(WeightType::F32, |source| source.part.dtype);
                    let at = (input * lanes + lane) * 4;
                    out[at..at + 4].copy_from_slice(&widen(bits, dtype).to_le_bytes());
                }
                WeightType::Bf16 | WeightType::F16 => {
                    let bits = match source {
                        Some(Source { part, .. }) if part.dtype != layout.dtype => {
                            f32_to_bf16(widen(bits, part.dtype))
                        }
                        _ => bits as u16,
                    };
                    let at = (input / 2 * lanes + lane) * 4 + input % 2 * 2;
                    out[at..at + 2].copy_from_slice(&bits.to_le_bytes());
                }
            }
        }
    }
    if !layout.k.is_multiple_of(2) && layout.dtype != WeightType::F32 {
        for lane in 0..lanes {
            let at = (layout.k / 2 * lanes + lane) * 4 + 2;
            out[at..at + 2].fill(0);
        }
    }
}

/// The value of an element, exactly.
pub(super) fn widen(bits: u32, dtype: WeightType) -> f32 {
    match dtype {
        WeightType::F32 => f32::from_bits(bits),
        WeightType::Bf16 => f32::from_bits(bits << 16),
        WeightType::F16 => widen_f16(bits),
        WeightType::Blocks(_) => f32::NAN,
    }
}

fn widen_f16(bits: u32) -> f32 {
    let sign = (bits & 0x8000) << 16;
    let magnitude = bits & 0x7fff;
    if magnitude >= 0x7c00 {
        // Quieting a signalling NaN is what the conversion instructions do.
        let quiet = if magnitude > 0x7c00 { 0x0040_0000 } else { 0 };
        return f32::from_bits(sign | 0x7f80_0000 | (magnitude & 0x03ff) << 13 | quiet);
    }
    // Exact: the product's exponent is adjusted from bias 15 to bias 127, denormals included.
    let value = f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(sign | value.to_bits())
}

/// Where the bytes of a packed matrix live: an own buffer, or a range of a mapped file.
pub type PackedStorage = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A weight in the layout the kernels read. Cloning shares the storage.
#[derive(Clone)]
pub struct PackedMatrix {
    layout: PackedLayout,
    storage: PackedStorage,
    offset: usize,
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackedMatrix").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl PackedMatrix {
    /// A matrix that was packed before, at `offset` of `storage` (best 64-byte aligned; any alignment is correct).
    pub fn from_storage(
        layout: PackedLayout,
        storage: PackedStorage,
        offset: usize,
    ) -> Result<PackedMatrix, PackError> {
        let found = (*storage).as_ref().len().saturating_sub(offset);
        if found < layout.bytes() {
            return Err(PackError::StorageBytes { expected: layout.bytes(), found });
        }
        Ok(PackedMatrix { layout, storage, offset })
    }

    /// Shape and layout.
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// The packed bytes, `layout().bytes()` of them.
    pub fn bytes(&self) -> &[u8] {
        &(*self.storage).as_ref()[self.offset..self.offset + self.layout.bytes()]
    }

    /// Writes weight column `row` (a row of the `[n, k]` source) to `out`, `k` values widened to f32: the embedding
    /// lookup from a table that is packed because it is also the output head.
    ///
    /// # Panics
    /// If `row` is not below n or `out` is not k long.
    pub fn gather_row(&self, row: usize, out: &mut [f32]) {
        let layout = &self.layout;
        assert!(row < layout.n && out.len() == layout.k, "gather_row: row or length out of range");
        let (panel, lane) = layout.place(row);
        let panel = &self.bytes()[panel * layout.panel_bytes()..(panel + 1) * layout.panel_bytes()];
        if let WeightType::Blocks(dtype) = layout.dtype {
            quant_dot::column(dtype, panel, (lane, layout.panel_columns), out);
            return;
        }
        let words = panel.chunks_exact(layout.panel_columns * 4);
        let word = |row: &[u8]| {
            let at = lane * 4;
            u32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]])
        };
        if layout.dtype == WeightType::F32 {
            for (value, row) in out.iter_mut().zip(words) {
                *value = f32::from_bits(word(row));
            }
        } else {
            for (pair, row) in out.chunks_mut(2).zip(words) {
                let bits = word(row);
                pair[0] = widen(bits & 0xffff, layout.dtype);
                if let Some(second) = pair.get_mut(1) {
                    *second = widen(bits >> 16, layout.dtype);
                }
            }
        }
    }
}

struct SharedOut(*mut u8);

// SAFETY: workers write disjoint panels through the pointer, see `PackJob::pack_tiles`.
unsafe impl Sync for SharedOut {}

impl SharedOut {
    fn start(&self) -> *mut u8 {
        self.0
    }
}

/// Packed bytes that are written before `done` of [`pack_on_releasing`] hears of their source.
const PIECE_BYTES: usize = 8 << 20;

/// Packs parts with all workers of a pool. See [`PackJob::new`] for what the parts must be.
pub fn pack_on(
    pool: &Pool,
    parts: &[WeightPart<'_>],
    gated: bool,
    isa: Isa,
    precision: Precision,
) -> Result<PackedMatrix, PackError> {
    pack_on_releasing(pool, parts, gated, isa, precision, &mut |_, _| {})
}

/// As [`pack_on`]; `done(part, bytes)` is told which bytes of a part's source are not read again, as the work goes on.
pub fn pack_on_releasing(
    pool: &Pool,
    parts: &[WeightPart<'_>],
    gated: bool,
    isa: Isa,
    precision: Precision,
    done: &mut dyn FnMut(usize, Range<usize>),
) -> Result<PackedMatrix, PackError> {
    let job = PackJob::new(parts, gated, isa, precision)?;
    let layout = job.layout();
    let mut buf = AlignedBuf::zeroed(layout.bytes()).ok_or(PackError::TooLarge)?;
    let out = SharedOut(buf.bytes_mut().as_mut_ptr());
    let mut told = vec![0; parts.len()];
    let piece = (PIECE_BYTES / layout.panel_bytes().max(1)).max(pool.threads());
    for first in (0..layout.panels()).step_by(piece) {
        let panels = first..(first + piece).min(layout.panels());
        // SAFETY: the buffer is as long as the layout asks and not otherwise accessed during the run.
        pool.run(|team| unsafe { job.pack_tiles(team, out.start(), panels.clone()) });
        for (part, told) in told.iter_mut().enumerate() {
            let read = job.read_before(part, panels.end);
            if read > *told {
                done(part, *told..read);
                *told = read;
            }
        }
    }
    PackedMatrix::from_storage(layout, Arc::new(buf), 0)
}

/// Packs parts on the calling thread. See [`PackJob::new`] for what the parts must be.
pub fn pack(
    parts: &[WeightPart<'_>],
    gated: bool,
    isa: Isa,
    precision: Precision,
) -> Result<PackedMatrix, PackError> {
    let job = PackJob::new(parts, gated, isa, precision)?;
    let mut buf = AlignedBuf::zeroed(job.layout().bytes()).ok_or(PackError::TooLarge)?;
    let panel_bytes = job.layout().panel_bytes();
    for panel in 0..job.layout().panels() {
        job.pack_panel(panel, &mut buf.bytes_mut()[panel * panel_bytes..(panel + 1) * panel_bytes]);
    }
    PackedMatrix::from_storage(job.layout(), Arc::new(buf), 0)
}
