//! Linear layers over block-quantised weights, on integer dot products.
//!
//! Rows are quantised to bytes with one f32 scale per 32 inputs, in every phase, so a prefilled row equals a decoded one.
//! Few rows read the packed strips as they are; more rows share a slab of unpacked bytes. Both are instances of one body
//! (`block`), which states the numeric contract; a format is described once (`format`).

mod block;
pub(crate) mod dot;
mod format;
mod pack;
mod rows;
mod table;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;
use std::ops::Range;

use rlx_tensor::DType;

use crate::gemm::LinearGrid;
use crate::isa::{Entry, Isa, LANES, fetch_line, select};
use block::{BlockArgs, ColumnArgs, UnpackArgs};
use dot::{DotEntry, DotSet};
use format::{CELL, WORDS_BYTES, dense_vectors};
use pack::Geometry;
pub(crate) use rows::RowForm;
use rows::{CELL_BYTES, QUANTIZE, QuantizeArgs};
use table::{Blocks, DENSE, FORMATS, FormatRow, format_of};

/// Rows that share one unpacked slab.
pub(crate) const CHUNK_ROWS: usize = 128;

/// Cells of a slab: 256 inputs.
const SLAB_CELLS: usize = 8;

/// Strips of a panel at most.
const PANEL_STRIPS: usize = 2;

/// Rows of a microkernel at most.
const MAX_ROWS: usize = 8;

/// The dtypes that have kernels.
pub fn dtypes() -> impl Iterator<Item = DType> {
    FORMATS.iter().map(|rows| rows.geometry.dtype)
}

/// Inputs per block if the dtype has kernels.
pub(crate) fn block_inputs(dtype: DType) -> Option<usize> {
    Some(format_of(dtype)?.geometry.block.0)
}

/// Bytes of `n` source rows of `k` inputs; `None` if the dtype has no kernels or `k` is no whole number of blocks.
pub(crate) fn source_bytes(dtype: DType, n: usize, k: usize) -> Option<usize> {
    format_of(dtype)?;
    dtype.bytes_for(k)?.checked_mul(n)
}

/// Bytes of a panel of `columns` columns, a multiple of 16; 0 for a dtype without kernels.
pub(crate) fn panel_bytes(dtype: DType, k: usize, columns: usize) -> usize {
    format_of(dtype).map_or(0, |rows| rows.geometry.panel_bytes(k, columns / LANES))
}

/// Packs one panel from the bytes of its columns' source rows; padding columns become zero.
pub(crate) fn pack_panel(dtype: DType, k: usize, columns: &[Option<&[u8]>], out: &mut [u8]) {
    let Some(rows) = format_of(dtype) else { return };
    let geometry = &rows.geometry;
    let strips = columns.len() / LANES;
    for (strip, columns) in columns.chunks_exact(LANES).enumerate() {
        (geometry.pack)(columns, k / geometry.block.0, (strip, strips), out);
    }
}

/// Decodes column `lane` of a panel of `columns` columns to `out`, `k` values: the bits of the plain decoder.
pub(crate) fn column(dtype: DType, panel: &[u8], (lane, columns): (usize, usize), out: &mut [f32]) {
    let Some(rows) = format_of(dtype) else { return };
    let (geometry, k) = (&rows.geometry, out.len());
    let Some(entry) = rows.column else { return };
    assert!(panel.len() >= geometry.panel_bytes(k, columns / LANES) && lane < columns);
    let args = ColumnArgs {
        w: panel.as_ptr(),
        strips: columns / LANES,
        superblocks: k / geometry.block.0,
        column: lane,
        offset: geometry.offset as f32,
        out: out.as_mut_ptr(),
    };
    // SAFETY: the panel has the superblocks and the column, the output `k` values.
    unsafe { entry(&args) };
}

fn row_of(rows: &'static [FormatRow], set: DotSet) -> Option<&'static FormatRow> {
    rows.iter().find(|row| row.set == set)
}

/// The instances chosen for one format and dot primitive.
#[derive(Clone, Copy)]
pub(crate) struct Chosen {
    geometry: &'static Geometry,
    set: DotSet,
    panel_strips: usize,
    /// Over packed panels, by rows - 1.
    direct: Blocks,
    /// Over an unpacked slab of a panel, by rows - 1.
    dense: Blocks,
    unpack: DotEntry<UnpackArgs>,
    quantize: Entry<QuantizeArgs>,
}

/// The fastest instances of an instruction set for panels of `columns` columns.
pub(crate) fn choose(isa: Isa, dtype: DType, columns: usize) -> Option<Chosen> {
    choose_set(DotSet::of(isa)?, dtype, columns)
}

fn choose_set(set: DotSet, dtype: DType, columns: usize) -> Option<Chosen> {
    let rows = format_of(dtype)?;
    let (geometry, row) = (&rows.geometry, row_of(rows.sets, set)?);
    let form = |d: &&table::DenseRows| {
        (d.halves, d.min, d.wide, d.set) == (geometry.halves, geometry.min, geometry.wide, set)
    };
    let dense = DENSE.iter().flatten().find(form)?.blocks;
    let panel_strips = columns / LANES;
    let whole = panel_strips == row.strips && panel_strips <= PANEL_STRIPS && dense.len() <= MAX_ROWS;
    whole.then_some(Chosen {
        geometry,
        set,
        panel_strips,
        direct: row.direct,
        dense,
        unpack: row.unpack?,
        quantize: select(&QUANTIZE, set.isa())?,
    })
}

/// Units per worker aimed at, so that the last ones are short.
const UNITS_PER_WORKER: usize = 8;

/// Bytes of packed weights of a unit of many rows at most, so that they stay in the second-level cache while all rows come by.
const UNIT_WEIGHT_BYTES: usize = 512 << 10;

/// Rows that are quantised by one worker at a time.
const QUANTIZED_TOGETHER: usize = 16;

/// Sums of a chunk of rows for one panel.
#[repr(align(64))]
struct Sums([MaybeUninit<f32>; CHUNK_ROWS * PANEL_STRIPS * LANES]);

const DENSE_CELL_BYTES: usize = dense_vectors(true, true) * WORDS_BYTES;

/// An unpacked slab of one panel.
#[repr(align(64))]
struct Slab([MaybeUninit<u8>; PANEL_STRIPS * SLAB_CELLS * DENSE_CELL_BYTES]);

/// What a chunk of rows is multiplied with.
pub(crate) struct Panels {
    /// First byte of the packed matrix.
    pub w: *const u8,
    pub k: usize,
    pub which: Range<usize>,
}

/// Where the outputs of a panel will stand, or what is added to them: rows of some bytes, `stride` bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub start: *const u8,
    pub stride: usize,
    pub bytes: usize,
}

impl Target {
    /// Asks for the lines of some rows, so that they are there when the sums are.
    fn fetch(&self, rows: Range<usize>) {
        for row in rows {
            for at in (0..self.bytes).step_by(64) {
                fetch_line(self.start.wrapping_add(row * self.stride + at));
            }
        }
    }
}

/// Bytes of one quantised row of `k` values.
pub(crate) const fn row_bytes(k: usize) -> usize {
    (k / CELL).next_multiple_of(SLAB_CELLS) * CELL_BYTES
}

impl Chosen {
    /// `linear_{dtype}_{set}_{rows}x1p`.
    pub fn name(&self, m: usize) -> String {
        let direct = m <= self.direct_rows();
        let (rows, path) = if direct { (m.max(1), "") } else { (self.dense.len(), "_unpacked") };
        format!("linear_{}_{}_{rows}x1p{path}", self.geometry.name, self.set.name())
    }

    /// Rows that are multiplied with packed strips as they are.
    pub fn direct_rows(&self) -> usize {
        self.direct.len()
    }

    /// What the words of a quantised row's cells hold.
    pub fn form(&self) -> RowForm {
        let geometry = self.geometry;
        RowForm {
            offset: if geometry.wide && self.set.is_signed() { 0 } else { geometry.offset },
            halves: geometry.halves,
            min: geometry.min,
        }
    }

    /// The cut where every worker quantises the rows of its tiles: few tiles to a chunk of rows.
    pub fn cut(&self, m: usize, panels: usize, workers: usize) -> LinearGrid {
        if m <= self.direct_rows() {
            return LinearGrid::of_panels(m, 1, panels, workers);
        }
        let chunks = m.div_ceil(CHUNK_ROWS);
        let units = if workers <= 1 { 1 } else { UNITS_PER_WORKER / 2 * workers };
        LinearGrid::of_chunks(m, chunks, panels, units.div_ceil(chunks), workers).with_steps(1, 1)
    }

    /// The cut of more than [`Chosen::direct_rows`] rows that are quantised already: a tile's panels stay in the cache.
    pub fn cut_quantized(&self, m: usize, k: usize, panels: usize, workers: usize) -> LinearGrid {
        let chunks = m.div_ceil(CHUNK_ROWS);
        let panel_bytes = self.geometry.panel_bytes(k, self.panel_strips);
        let wanted = if workers <= 1 { 1 } else { (UNITS_PER_WORKER * workers).div_ceil(chunks) };
        let blocks = panels.div_ceil((UNIT_WEIGHT_BYTES / panel_bytes.max(1)).max(1)).max(wanted);
        LinearGrid::of_chunks(m, chunks, panels, blocks, workers).with_steps(chunks, 1)
    }

    /// Bytes from one quantised row of a chunk of `m` to the next, and from a slab of a row to its next.
    fn strides(&self, m: usize, k: usize) -> (usize, usize) {
        let slab = SLAB_CELLS * CELL_BYTES;
        if m <= self.direct_rows() { (row_bytes(k), slab) } else { (slab, m * slab) }
    }

    /// Pieces of a chunk of `m` rows that are quantised apart.
    pub fn quantize_tiles(m: usize) -> usize {
        m.div_ceil(QUANTIZED_TOGETHER)
    }

    /// Quantises some rows of a chunk of `m` as [`Chosen::run_chunk`] reads them.
    ///
    /// # Safety
    /// `x` is valid for the `m` rows of `k` values, `out` for `m` times [`row_bytes`].
    pub unsafe fn quantize(
        &self,
        (m, k): (usize, usize),
        which: Range<usize>,
        (x, x_stride): (*const f32, usize),
        out: *mut u8,
    ) {
        let (out_stride, slab_stride) = self.strides(m, k);
        let args =
            QuantizeArgs { x, x_stride, cells: k / CELL, form: self.form(), out, out_stride, slab_stride };
        for row in which {
            // SAFETY: the caller guarantees the rows and as many quantised ones.
            unsafe { (self.quantize)(&args, row) };
        }
    }

    /// Quantises a piece of a chunk; see [`Chosen::quantize_tiles`].
    ///
    /// # Safety
    /// As for [`Chosen::quantize`].
    pub unsafe fn quantize_tile(
        &self,
        size: (usize, usize),
        tile: usize,
        x: (*const f32, usize),
        out: *mut u8,
    ) {
        let which = tile * QUANTIZED_TOGETHER..size.0.min((tile + 1) * QUANTIZED_TOGETHER);
        // SAFETY: passed on to the caller.
        unsafe { self.quantize(size, which, x, out) };
    }

    /// Multiplies `m` quantised rows (at most a chunk) with panels; `finish` gets each panel's sums, `stride` values a row, and reads
    /// and writes what `targets` says.
    ///
    /// # Safety
    /// `x` has the `m` rows as [`Chosen::quantize`] wrote them; the matrix is packed in this format.
    pub unsafe fn run_chunk(
        &self,
        m: usize,
        x: *const u8,
        panels: &Panels,
        targets: impl Fn(usize) -> [Option<Target>; 2],
        mut finish: impl FnMut(usize, *const f32, usize),
    ) {
        let geometry = self.geometry;
        let (x_stride, slab_stride) = self.strides(m, panels.k);
        let panel_bytes = geometry.panel_bytes(panels.k, self.panel_strips);
        let mut sums = Sums([MaybeUninit::uninit(); CHUNK_ROWS * PANEL_STRIPS * LANES]);
        let acc = sums.0.as_mut_ptr().cast::<f32>();
        for panel in panels.which.clone() {
            let args = BlockArgs {
                x,
                x_stride,
                w: panels.w.wrapping_add(panel * panel_bytes),
                superblocks: panels.k / geometry.block.0,
                acc,
                acc_stride: self.panel_strips * LANES,
                resume: false,
            };
            if m > self.direct_rows() {
                // SAFETY: passed on to the caller.
                unsafe { self.run_unpacked(m, &args, slab_stride, targets(panel)) };
            } else {
                let Some(entry) = self.direct[m - 1] else { return };
                // SAFETY: the caller guarantees the rows and the panel; the sums fit.
                unsafe { entry(&args) };
            }
            finish(panel, acc.cast_const(), args.acc_stride);
        }
    }

    /// All of k of one panel, slab by slab.
    unsafe fn run_unpacked(
        &self,
        m: usize,
        packed: &BlockArgs,
        slab_stride: usize,
        targets: [Option<Target>; 2],
    ) {
        let geometry = self.geometry;
        let cells_of = geometry.block.0 / CELL;
        let slab_superblocks = SLAB_CELLS / cells_of;
        let superblock_bytes = self.panel_strips * (geometry.w_bytes + geometry.h_bytes);
        let mut slab = Slab([MaybeUninit::uninit(); PANEL_STRIPS * SLAB_CELLS * DENSE_CELL_BYTES]);
        let slab = slab.0.as_mut_ptr().cast::<u8>();
        let groups = m.div_ceil(self.dense.len());
        let (mut done, mut x) = (0, packed.x);
        while done < packed.superblocks {
            let superblocks = slab_superblocks.min(packed.superblocks - done);
            let args =
                UnpackArgs { w: packed.w.wrapping_add(done * superblock_bytes), superblocks, out: slab };
            // SAFETY: the caller guarantees the panel; a slab has room for its strips.
            unsafe { (self.unpack)(&args) };
            for group in 0..groups {
                let rows = group * m / groups..(group + 1) * m / groups;
                if done == 0 {
                    targets.iter().flatten().for_each(|target| target.fetch(rows.clone()));
                }
                let args = BlockArgs {
                    x: x.wrapping_add(rows.start * packed.x_stride),
                    w: slab,
                    superblocks: superblocks * cells_of,
                    acc: packed.acc.wrapping_add(rows.start * packed.acc_stride),
                    resume: done > 0,
                    ..*packed
                };
                let Some(entry) = self.dense[rows.len() - 1] else { return };
                // SAFETY: the rows lie in the chunk, the slab has just been written.
                unsafe { entry(&args) };
            }
            done += superblocks;
            x = x.wrapping_add(slab_stride);
        }
        if packed.superblocks == 0 {
            // SAFETY: the sums of a chunk of rows.
            unsafe { packed.acc.write_bytes(0, m * packed.acc_stride) };
        }
    }
}
