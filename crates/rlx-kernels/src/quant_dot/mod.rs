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
use crate::isa::{Entry, Isa, LANES, select};
use block::{BlockArgs, ColumnArgs, UnpackArgs};
use dot::{DotEntry, DotSet};
use format::{CELL, WORDS_BYTES, dense_vectors};
use pack::Geometry;
use rows::{CELL_BYTES, QUANTIZE, QuantizeArgs, RowForm};
use table::{BlockRow, DENSE, FORMATS, FormatRow, format_of};

/// Rows that share one unpacked slab.
const CHUNK_ROWS: usize = 64;

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
    format_of(dtype).map_or(0, |rows| rows.geometry.strip_bytes(k) * (columns / LANES))
}

/// Packs one panel from the bytes of its columns' source rows; padding columns become zero.
pub(crate) fn pack_panel(dtype: DType, k: usize, columns: &[Option<&[u8]>], out: &mut [u8]) {
    let Some(rows) = format_of(dtype) else { return };
    let geometry = &rows.geometry;
    let strips = out.chunks_exact_mut(geometry.strip_bytes(k).max(1));
    for (columns, strip) in columns.chunks(LANES).zip(strips) {
        let superblocks = k / geometry.block.0;
        let used = superblocks * (geometry.w_bytes + geometry.h_bytes);
        (geometry.pack)(columns, superblocks, &mut strip[..used]);
    }
}

/// Decodes column `lane` of a panel to `out`, `k` values: the bits of the plain decoder.
pub(crate) fn column(dtype: DType, panel: &[u8], lane: usize, out: &mut [f32]) {
    let Some(rows) = format_of(dtype) else { return };
    let (geometry, k) = (&rows.geometry, out.len());
    let Some(entry) = rows.column else { return };
    let strip_bytes = geometry.strip_bytes(k);
    let strip = &panel[lane / LANES * strip_bytes..(lane / LANES + 1) * strip_bytes];
    let superblocks = k / geometry.block.0;
    let args = ColumnArgs {
        w: strip.as_ptr(),
        h: strip.as_ptr().wrapping_add(superblocks * geometry.w_bytes),
        superblocks,
        column: lane % LANES,
        offset: geometry.offset as f32,
        out: out.as_mut_ptr(),
    };
    // SAFETY: the strip has the superblocks, the output `k` values.
    unsafe { entry(&args) };
}

fn row_of(rows: &'static [FormatRow], set: DotSet) -> Option<&'static FormatRow> {
    rows.iter().find(|row| row.set == set)
}

type Instances = [Option<DotEntry<BlockArgs>>; MAX_ROWS];

/// The instances chosen for one format and dot primitive.
#[derive(Clone, Copy)]
pub(crate) struct Chosen {
    geometry: &'static Geometry,
    set: DotSet,
    panel_strips: usize,
    /// Over packed strips of a panel, by rows - 1.
    direct: Instances,
    direct_rows: usize,
    /// One row over the strips of several panels.
    single: Option<(DotEntry<BlockArgs>, usize)>,
    /// Over an unpacked slab of a panel, by rows - 1.
    dense: Instances,
    dense_rows: usize,
    unpack: DotEntry<UnpackArgs>,
    quantize: Entry<QuantizeArgs>,
}

fn by_rows(blocks: &[BlockRow], strips: usize) -> (Instances, usize) {
    let (mut instances, mut most) = ([None; MAX_ROWS], 0);
    for block in blocks.iter().filter(|block| block.strips == strips) {
        instances[block.rows - 1] = block.entry;
        most = most.max(block.rows);
    }
    (instances, most)
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
    let dense = DENSE.iter().flatten().find(form)?;
    let panel_strips = columns / LANES;
    let (direct, direct_rows) = by_rows(row.direct, panel_strips);
    let (dense, dense_rows) = by_rows(dense.blocks, panel_strips);
    let single = row.direct.iter().find(|block| block.rows == 1 && block.strips > panel_strips);
    let single = single.and_then(|block| Some((block.entry?, block.strips / panel_strips)));
    let whole = direct_rows > 0 && dense_rows > 0 && panel_strips <= PANEL_STRIPS;
    whole.then_some(Chosen {
        geometry,
        set,
        panel_strips,
        direct,
        direct_rows,
        single,
        dense,
        dense_rows,
        unpack: row.unpack?,
        quantize: select(&QUANTIZE, set.isa())?,
    })
}

/// Sums of a chunk of rows for one panel.
/// Units per worker aimed at, so that the last ones are short.
const UNITS_PER_WORKER: usize = 4;

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

impl Chosen {
    /// `linear_{dtype}_{set}_{rows}x{panels}p`.
    pub fn name(&self, m: usize) -> String {
        let (rows, panels) = match self.single {
            Some((_, panels)) if m == 1 => (1, panels),
            _ if m <= self.direct_rows => (m.max(1), 1),
            _ => (self.dense_rows, 1),
        };
        let path = if m <= self.direct_rows { "" } else { "_unpacked" };
        format!("linear_{}_{}_{rows}x{panels}p{path}", self.geometry.name, self.set.name())
    }

    /// f32 values of scratch a worker needs: a chunk of quantised rows.
    pub fn scratch_len(&self, k: usize) -> usize {
        CHUNK_ROWS * k / CELL * CELL_BYTES / size_of::<f32>()
    }

    pub fn cut(&self, m: usize, panels: usize, workers: usize) -> LinearGrid {
        if m <= self.direct_rows {
            let step = self.single.filter(|_| m == 1).map_or(1, |(_, panels)| panels);
            return LinearGrid::of_panels(m, 1, panels, workers).with_steps(usize::MAX, step);
        }
        let chunks = m.div_ceil(CHUNK_ROWS);
        let units = if workers <= 1 { 1 } else { UNITS_PER_WORKER * workers };
        LinearGrid::of_chunks(m, chunks, panels, units.div_ceil(chunks), workers).with_steps(1, 1)
    }

    /// Multiplies `m` rows (at most a chunk) with panels; `finish` gets each panel's sums, `stride` values a row.
    ///
    /// # Safety
    /// `x` is valid for `m` rows of `k` values, the matrix is packed in this format, `scratch` is valid for
    /// [`Chosen::scratch_len`] values, which no other thread accesses, and unless it is fresh holds these rows quantised.
    pub unsafe fn run_chunk(
        &self,
        m: usize,
        x: (*const f32, usize),
        panels: &Panels,
        (scratch, fresh): (*mut f32, bool),
        mut finish: impl FnMut(usize, *const f32, usize),
    ) {
        let geometry = self.geometry;
        let cells = panels.k / CELL;
        let form = RowForm {
            offset: if geometry.wide && self.set.is_signed() { 0 } else { geometry.offset },
            halves: geometry.halves,
            min: geometry.min,
        };
        let rows = QuantizeArgs {
            x: x.0,
            x_stride: x.1,
            cells,
            form,
            out: scratch.cast(),
            out_stride: cells * CELL_BYTES,
        };
        for row in 0..if fresh { m } else { 0 } {
            // SAFETY: the caller guarantees the rows and the scratch.
            unsafe { (self.quantize)(&rows, row) };
        }
        let strip_bytes = geometry.strip_bytes(panels.k);
        let superblocks = panels.k / geometry.block.0;
        let block = |panel: usize| {
            let w = panels.w.wrapping_add(panel * self.panel_strips * strip_bytes);
            BlockArgs {
                x: rows.out,
                x_stride: rows.out_stride,
                w,
                h: w.wrapping_add(superblocks * geometry.w_bytes),
                strip_bytes,
                superblocks,
                acc: std::ptr::null_mut(),
                acc_stride: self.panel_strips * LANES,
                resume: false,
            }
        };
        let mut sums = Sums([MaybeUninit::uninit(); CHUNK_ROWS * PANEL_STRIPS * LANES]);
        let acc = sums.0.as_mut_ptr().cast::<f32>();
        let mut panel = panels.which.start;
        while panel < panels.which.end {
            let mut args = BlockArgs { acc, ..block(panel) };
            let mut step = 1;
            if m > self.direct_rows {
                // SAFETY: passed on to the caller.
                unsafe { self.run_unpacked(m, &args) };
            } else {
                let single =
                    self.single.filter(|&(_, panels_of)| m == 1 && panel + panels_of <= panels.which.end);
                let entry = match single {
                    Some((entry, panels_of)) => {
                        step = panels_of;
                        args.acc_stride *= panels_of;
                        Some(entry)
                    }
                    None => self.direct[m - 1],
                };
                let Some(entry) = entry else { return };
                // SAFETY: the caller guarantees the rows and panels; any instance's sums fit.
                unsafe { entry(&args) };
            }
            for index in 0..step {
                let sums = acc.wrapping_add(index * self.panel_strips * LANES);
                finish(panel + index, sums.cast_const(), args.acc_stride);
            }
            panel += step;
        }
    }

    /// All of k of one panel, slab by slab.
    unsafe fn run_unpacked(&self, m: usize, packed: &BlockArgs) {
        let geometry = self.geometry;
        let cells_of = geometry.block.0 / CELL;
        let slab_superblocks = SLAB_CELLS / cells_of;
        let cell_bytes = dense_vectors(geometry.halves, geometry.min) * WORDS_BYTES;
        let mut slab = Slab([MaybeUninit::uninit(); PANEL_STRIPS * SLAB_CELLS * DENSE_CELL_BYTES]);
        let slab = slab.0.as_mut_ptr().cast::<u8>();
        let groups = m.div_ceil(self.dense_rows);
        let mut done = 0;
        while done < packed.superblocks {
            let superblocks = slab_superblocks.min(packed.superblocks - done);
            for strip in 0..self.panel_strips {
                let offset = strip * packed.strip_bytes;
                let args = UnpackArgs {
                    w: packed.w.wrapping_add(offset + done * geometry.w_bytes),
                    h: packed.h.wrapping_add(offset + done * geometry.h_bytes),
                    superblocks,
                    out: slab.wrapping_add(strip * SLAB_CELLS * cell_bytes),
                };
                // SAFETY: the caller guarantees the panel; a slab has room for its strips.
                unsafe { (self.unpack)(&args) };
            }
            for group in 0..groups {
                let rows = group * m / groups..(group + 1) * m / groups;
                let args = BlockArgs {
                    x: packed.x.wrapping_add(rows.start * packed.x_stride + done * cells_of * CELL_BYTES),
                    w: slab,
                    h: slab,
                    strip_bytes: SLAB_CELLS * cell_bytes,
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
        }
        if packed.superblocks == 0 {
            // SAFETY: the sums of a chunk of rows.
            unsafe { packed.acc.write_bytes(0, m * packed.acc_stride) };
        }
    }
}
