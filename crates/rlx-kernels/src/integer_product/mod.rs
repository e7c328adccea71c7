//! Products of codes of eight bits with packed weights of codes, as a matrix and over windows of images whose channels are adjacent.
//!
//! Numeric contract: a sum is `(x - x zero) * (w - w zero)` over all inputs in 32-bit integers, exact and the same in any order. What becomes of
//! it is stated by [`Outcome`]. So results are equal to the bit for every instruction set, number of rows, cut and number of threads.
//!
//! A row is multiplied as it lies in memory where that is possible; other rows, and windows, are gathered by the worker that multiplies
//! them into its own scratch. Zero points are no part of the products: a sum starts at what they add to it, known from the sums of a
//! column's codes, which are made when weights are packed, and of a row's, which are needed only for weights with zero points.

mod block;
mod pack;
mod rows;
#[cfg(test)]
mod tests;

use crate::conv::{ConvLayer, Images};
use crate::isa::{Entry, Isa, LANES, fetch_lines, select};
use crate::pool::Pool;
use crate::quant_dot::dot::{DotEntry, DotSet};
use block::{BLOCKS, BlockArgs, MAX_ROWS};
pub use pack::{CodeOrder, IntegerMatrix};
pub use rows::Outcome;
use rows::{FINISH, FinishArgs, GATHER, GatherArgs};
use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Strips of a panel at most.
const MAX_STRIPS: usize = 2;

/// Bytes of rows that a worker gathers at a time, where one microkernel's are not more.
const CHUNK_BYTES: usize = 256 << 10;

/// Rows of a chunk at most.
const CHUNK_ROWS: usize = 8 * MAX_ROWS;

/// Bytes of weights from which on chunks are of more rows: each chunk reads all of them, and the inner caches do not keep so many.
const HEAVY_WEIGHTS: usize = 192 << 10;

/// The same limits for such weights.
const HEAVY_CHUNK: (usize, usize) = (512 << 10, 64 * MAX_ROWS);

/// Tiles per worker aimed at, so that an uneven machine still finishes together.
const TILES_PER_WORKER: usize = 4;

/// Inputs of a sum at most: no sum of so many can leave 32 bits.
pub const MAX_INPUTS: usize = 1 << 15;

/// The kernels of one layer on one instruction set. Its groups are not read: there is one.
#[derive(Clone, Copy)]
pub struct IntegerKernel {
    layer: ConvLayer,
    set: DotSet,
    strips: usize,
    max_rows: usize,
    blocks: [Option<DotEntry<BlockArgs>>; MAX_ROWS],
    gather: Entry<GatherArgs>,
    finish: Entry<FinishArgs>,
}

impl fmt::Debug for IntegerKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (set, layer) = (self.set, self.layer);
        f.debug_struct("IntegerKernel").field("set", &set).field("layer", &layer).finish_non_exhaustive()
    }
}

/// The operands of a run. Strides are in elements, from one pixel or row to the next.
#[derive(Clone, Copy, Debug)]
pub struct IntegerArgs<'a> {
    /// Sizes; a matrix product is over one image of one line.
    pub images: Images,
    /// `[batch, lines, columns, channels]` codes.
    pub x: *const u8,
    /// Pixel stride of `x`.
    pub x_stride: usize,
    /// Whether the codes of `x` are signed.
    pub x_signed: bool,
    /// The zero point of `x`, as its byte.
    pub x_zero: u8,
    /// The packed weights.
    pub weights: &'a IntegerMatrix,
    /// A number for each output, or one of all; unused for sums.
    pub scale: &'a [f32],
    /// What scale and bias are divided by: the scale of a result of codes, else 1.
    pub step: f32,
    /// Added to sums: a number for each output, one of all, or none.
    pub whole_bias: &'a [i32],
    /// Added to scaled sums: a number for each output, one of all, or none.
    pub bias: &'a [f32],
    /// What the result holds.
    pub outcome: Outcome,
    /// Zero point, smallest and largest code of a result of codes.
    pub codes: [f32; 3],
    /// `[batch, lines, columns, outputs]`, written.
    pub out: *mut u8,
    /// Pixel stride of `out`.
    pub out_stride: usize,
}

/// How the output of a run is cut into tiles: chunks of pixels by blocks of panels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntegerGrid {
    pixels: usize,
    chunks: usize,
    panel_blocks: usize,
    /// Chunks are whole lines of one image, whose windows are parts of copied lines.
    by_lines: bool,
}

impl IntegerGrid {
    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        self.chunks * self.panel_blocks
    }
}

/// Numbers of a panel's columns.
#[repr(align(64))]
struct Columns<T>([T; MAX_STRIPS * LANES]);

#[repr(align(64))]
struct Sums<const ROWS: usize>([MaybeUninit<i32>; ROWS]);

const SUMS: usize = MAX_ROWS * MAX_STRIPS * LANES;

/// A layer of a matrix product: windows are one element.
pub fn matrix_layer(n: usize, k: usize) -> ConvLayer {
    ConvLayer {
        window: [1; 2],
        strides: [1; 2],
        dilations: [1; 2],
        before: [0; 2],
        after: [0; 2],
        groups: 1,
        channels: k,
        outputs: n,
    }
}

/// Bytes of the packed weights of a layer on an instruction set; `None` if no kernel takes it.
pub fn packed_bytes(isa: Isa, layer: &ConvLayer) -> Option<usize> {
    let kernel = IntegerKernel::select(isa, *layer)?;
    pack::packed_bytes(layer.outputs, kernel.row_bytes(), kernel.strips)
}

impl IntegerKernel {
    /// The fastest kernels of an instruction set; `None` if this machine or build lacks it, or sums could leave 32 bits.
    pub fn select(isa: Isa, layer: ConvLayer) -> Option<IntegerKernel> {
        Self::of_set(DotSet::of(isa)?, layer)
    }

    fn of_set(set: DotSet, layer: ConvLayer) -> Option<IntegerKernel> {
        let row = BLOCKS.iter().find(|row| row.iter().all(|block| block.set == set))?;
        let (mut blocks, mut max_rows) = ([None; MAX_ROWS], 0);
        for block in row.iter() {
            blocks[block.rows - 1] = Some(block.entry?);
            max_rows = max_rows.max(block.rows);
        }
        let strips = row.first()?.strips;
        let (gather, finish) = (select(&GATHER, set.isa())?, select(&FINISH, set.isa())?);
        let fits = (1..=MAX_INPUTS).contains(&layer.k()) && layer.outputs > 0 && layer.groups == 1;
        fits.then_some(IntegerKernel { layer, set, strips, max_rows, blocks, gather, finish })
    }

    /// The layer.
    pub fn layer(&self) -> &ConvLayer {
        &self.layer
    }

    /// `{dtypes}_{set}` of the products.
    pub fn name(&self) -> String {
        format!("i8_{}", self.set.name())
    }

    /// Packs weights on all threads: signed codes or not, with zero points of each output, one of all, or none. `None` if their number is another.
    pub fn pack(
        &self,
        pool: &Pool,
        codes: &[u8],
        order: &CodeOrder,
        signed: bool,
        zeros: &[i32],
    ) -> Option<IntegerMatrix> {
        let fits = order.n == self.layer.outputs && order.k() == self.layer.k();
        let order = (order, self.layer.window[1] * self.layer.channels);
        fits.then(|| IntegerMatrix::pack(pool, self.set, self.strips, codes, order, (signed, zeros)))?
    }

    /// Whether packed weights are those of this layer and kernel.
    pub fn takes(&self, weights: &IntegerMatrix) -> bool {
        weights.set() == self.set && weights.n() == self.layer.outputs && weights.k() == self.layer.k()
    }

    /// Bytes of a row: each line of a window from a word on.
    fn row_bytes(&self) -> usize {
        let layer = &self.layer;
        layer.window[0] * (layer.window[1] * layer.channels).next_multiple_of(pack::WORD)
    }

    fn is_heavy(&self) -> bool {
        self.row_bytes() * self.layer.outputs > HEAVY_WEIGHTS
    }

    /// Rows of a chunk at most.
    fn chunk_rows(&self) -> usize {
        let (bytes, rows) = if self.is_heavy() { HEAVY_CHUNK } else { (CHUNK_BYTES, CHUNK_ROWS) };
        let most = bytes / self.row_bytes() / self.max_rows * self.max_rows;
        most.clamp(self.max_rows, rows)
    }

    /// Bytes of scratch that each worker needs: a chunk of gathered rows and their sums.
    pub fn scratch_bytes(&self) -> usize {
        let rows = self.chunk_rows();
        (rows * self.row_bytes()).next_multiple_of(64) + rows * size_of::<i32>()
    }

    /// The cut for `workers` workers. Constant time.
    pub fn grid(&self, args: &IntegerArgs<'_>, workers: usize) -> IntegerGrid {
        let [lines, columns] = args.images.positions;
        let pixels = args.images.batch * lines * columns;
        let panels = self.layer.outputs.div_ceil(self.strips * LANES);
        let wanted = if workers <= 1 { 1 } else { workers * TILES_PER_WORKER };
        let (mut chunks, mut by_lines) = (pixels.div_ceil(self.chunk_rows()), false);
        if let Some(most) = self.lines_of_chunk(args).filter(|_| pixels > 0) {
            let parts = if self.is_heavy() { 1 } else { wanted / args.images.batch };
            let parts = lines.div_ceil(most).max(parts.min(lines));
            let even = if parts > 1 { parts.next_multiple_of(workers.max(1)).min(lines) } else { 1 };
            (chunks, by_lines) = (args.images.batch * even, true);
        } else if chunks > workers && chunks < workers * 4 * TILES_PER_WORKER && pixels > chunks + workers {
            // No worker is left with one chunk more.
            chunks = chunks.next_multiple_of(workers.max(1));
        }
        IntegerGrid { pixels, chunks, panel_blocks: panels.min(wanted.div_ceil(chunks.max(1))), by_lines }
    }

    /// Output lines whose windows' lines, with the elements at their ends, a worker's scratch has room for, if rows are parts of such lines: those
    /// of a window then follow each other at one distance, and those of adjacent windows.
    fn lines_of_chunk(&self, args: &IntegerArgs<'_>) -> Option<usize> {
        let layer = &self.layer;
        let alike = args.x_signed == self.set.takes_signed_rows() && !args.weights.has_zeros();
        let adjacent = layer.dilations[1] == 1 && args.x_stride == layer.channels;
        if layer.window == [1; 2] || !alike || !adjacent {
            return None;
        }
        let line = self.line_columns(args) * layer.channels;
        // The last word of a line may reach behind it, where weights are 0.
        let lines = (self.chunk_rows() * self.row_bytes()).saturating_sub(pack::WORD).checked_div(line)?;
        let beyond = lines.checked_sub((layer.window[0] - 1) * layer.dilations[0] + 1)?;
        Some(beyond / layer.strides[0] + 1)
    }

    /// Columns that the windows of an output line cover.
    fn line_columns(&self, args: &IntegerArgs<'_>) -> usize {
        args.images.positions[1].saturating_sub(1) * self.layer.strides[1] + self.layer.window[1]
    }

    /// Copies the lines of an image that the windows of some output lines cover, with zero points for elements outside.
    ///
    /// # Safety
    /// As [`IntegerKernel::run_tile`]; the scratch has room for them.
    unsafe fn copy_lines(&self, args: &IntegerArgs<'_>, image: usize, lines: Range<usize>, scratch: *mut u8) {
        let (layer, [height, width]) = (&self.layer, args.images.extents);
        let columns = self.line_columns(args);
        let front = layer.before[1].min(columns);
        let inside = width.min(columns - front);
        let first = lines.start * layer.strides[0];
        let count = (lines.len() - 1) * layer.strides[0] + (layer.window[0] - 1) * layer.dilations[0] + 1;
        for line in 0..count {
            let to = scratch.wrapping_add(line * columns * layer.channels);
            let from = (first + line).checked_sub(layer.before[0]).filter(|&from| from < height);
            // SAFETY: the caller guarantees the image, of which `inside` columns are read, and the scratch.
            unsafe {
                let Some(from) = from else {
                    to.write_bytes(args.x_zero, columns * layer.channels);
                    continue;
                };
                let from = args.x.wrapping_add((image * height + from) * width * layer.channels);
                to.write_bytes(args.x_zero, front * layer.channels);
                let rest = to.add((front + inside) * layer.channels);
                std::ptr::copy_nonoverlapping(from, to.add(front * layer.channels), inside * layer.channels);
                rest.write_bytes(args.x_zero, (columns - front - inside) * layer.channels);
            }
        }
    }

    /// Whether rows can be read where they are.
    fn reads_in_place(&self, args: &IntegerArgs<'_>) -> bool {
        let layer = &self.layer;
        let pointwise = layer.window == [1; 2] && layer.strides == [1; 2];
        let ends = layer.before != [0; 2] || layer.after != [0; 2];
        let alike = args.x_signed == self.set.takes_signed_rows();
        pointwise && !ends && alike && layer.k().is_multiple_of(pack::WORD) && !args.weights.has_zeros()
    }

    /// Computes one tile of the output. `held` names the rows that the scratch holds, and is this worker's for one run; it starts as
    /// `usize::MAX`.
    ///
    /// # Safety
    /// The pointers of `args` are valid as [`IntegerArgs`] says for this layer, whose weights [`IntegerKernel::takes`]; lists have as many numbers
    /// as it says; `scratch` is valid for [`IntegerKernel::scratch_bytes`] bytes, aligned to 64 and this worker's alone; `out` overlaps no other
    /// operand; no other thread accesses this tile's outputs. `grid` is of [`IntegerKernel::grid`] with the same images and `tile < grid.tiles()`.
    pub unsafe fn run_tile(
        &self,
        args: &IntegerArgs<'_>,
        grid: &IntegerGrid,
        tile: usize,
        scratch: *mut u8,
        held: &mut usize,
    ) {
        let (chunk, block) = (tile / grid.panel_blocks, tile % grid.panel_blocks);
        let panels = args.weights.panels();
        let which = block * panels / grid.panel_blocks..(block + 1) * panels / grid.panel_blocks;
        let signed = self.set.takes_signed_rows();
        let flip = if args.x_signed == signed { 0 } else { 0x80 };
        let fresh = std::mem::replace(held, chunk) != chunk;
        // SAFETY: the caller guarantees the operands and the scratch.
        let mut rows = unsafe {
            match grid.by_lines {
                true => self.lines(args, grid, chunk, (scratch, fresh)),
                false => self.rows(args, grid, chunk, (scratch, fresh), flip),
            }
        };
        let zero = args.x_zero ^ flip;
        rows.zero = if signed { i32::from(zero as i8) } else { i32::from(zero) };
        for panel in which {
            // SAFETY: the caller guarantees the operands; the rows have just been found.
            unsafe { self.run_panel(args, panel, &rows) };
        }
    }

    /// The rows of a chunk of lines, copied unless they are in the scratch.
    ///
    /// # Safety
    /// As [`IntegerKernel::run_tile`].
    unsafe fn lines(
        &self,
        args: &IntegerArgs<'_>,
        grid: &IntegerGrid,
        chunk: usize,
        (scratch, fresh): (*mut u8, bool),
    ) -> Rows {
        let (layer, [lines, columns]) = (&self.layer, args.images.positions);
        let chunks = grid.chunks / args.images.batch;
        let (image, part) = (chunk / chunks, chunk % chunks);
        let range = part * lines / chunks..(part + 1) * lines / chunks;
        let (first, count) = (image * lines + range.start, range.len());
        if fresh && count > 0 {
            // SAFETY: the caller guarantees the operands; a chunk's lines fit the scratch.
            unsafe { self.copy_lines(args, image, range, scratch) };
        }
        let line = self.line_columns(args) * layer.channels;
        Rows {
            x: scratch,
            x_stride: layer.strides[1] * layer.channels,
            parts: layer.window[0],
            part_stride: layer.dilations[0] * line,
            lines: count,
            line_stride: layer.strides[0] * line,
            first: first * columns,
            count: columns,
            zero: 0,
            sums: std::ptr::null(),
        }
    }

    /// The rows of a chunk of pixels: where they are, or gathered unless they are in the scratch.
    ///
    /// # Safety
    /// As [`IntegerKernel::run_tile`].
    unsafe fn rows(
        &self,
        args: &IntegerArgs<'_>,
        grid: &IntegerGrid,
        chunk: usize,
        (scratch, fresh): (*mut u8, bool),
        flip: u8,
    ) -> Rows {
        let of = |chunk: usize| chunk * grid.pixels / grid.chunks;
        let (first, count) = (of(chunk), of(chunk + 1) - of(chunk));
        let sums: *mut i32 =
            scratch.wrapping_add((self.chunk_rows() * self.row_bytes()).next_multiple_of(64)).cast();
        let in_place = self.reads_in_place(args);
        if fresh && !in_place {
            let gather = GatherArgs {
                layer: self.layer,
                images: args.images,
                x: args.x,
                x_stride: args.x_stride,
                first,
                count,
                outside: args.x_zero,
                flip,
                out: scratch,
                out_stride: self.row_bytes(),
                sums: if args.weights.has_zeros() { sums } else { std::ptr::null_mut() },
                signed: self.set.takes_signed_rows(),
            };
            // SAFETY: the caller guarantees the images and the scratch, which has room for a chunk.
            unsafe { (self.gather)(&gather, 0) };
        }
        let (x, x_stride) = match in_place {
            true => (args.x.wrapping_add(first * args.x_stride), args.x_stride),
            false => (scratch.cast_const(), self.row_bytes()),
        };
        Rows { x, x_stride, parts: 1, part_stride: 0, lines: 1, line_stride: 0, first, count, zero: 0, sums }
    }

    /// All rows of a chunk by one panel.
    unsafe fn run_panel(&self, args: &IntegerArgs<'_>, panel: usize, rows: &Rows) {
        let width = self.strips * LANES;
        let column = panel * width;
        let columns = width.min(self.layer.outputs - column);
        let (totals, zeros) = args.weights.numbers(panel);
        let mut start = Columns([0i32; MAX_STRIPS * LANES]);
        let mut scale = Columns([0f32; MAX_STRIPS * LANES]);
        let mut bias = Columns([0f32; MAX_STRIPS * LANES]);
        let k = self.layer.k() as i32;
        columns_of(args.whole_bias, column, &mut start.0[..columns]);
        for (start, (&total, &zero)) in start.0.iter_mut().zip(totals.iter().zip(zeros)) {
            *start = start.wrapping_sub(rows.zero.wrapping_mul(total.wrapping_sub(zero.wrapping_mul(k))));
        }
        columns_of(args.scale, column, &mut scale.0[..columns]);
        columns_of(args.bias, column, &mut bias.0[..columns]);
        if args.step != 1.0 {
            scale.0.iter_mut().chain(&mut bias.0).for_each(|number| *number /= args.step);
        }
        let ahead = args.weights.codes_behind(panel);
        let bytes = if matches!(args.outcome, Outcome::I32 | Outcome::F32) { 4 } else { 1 };
        let groups = rows.count.div_ceil(self.max_rows);
        let mut own = Sums([MaybeUninit::uninit(); SUMS]);
        let mut sums = Sums([MaybeUninit::uninit(); SUMS]);
        let (own, sums) = (own.0.as_mut_ptr().cast::<i32>(), sums.0.as_mut_ptr().cast::<i32>());
        let words = args.weights.words() / rows.parts;
        for index in 0..rows.lines * groups {
            let (line, group) = (index / groups, index % groups);
            let (from, to) = (group * rows.count / groups, (group + 1) * rows.count / groups);
            let Some(entry) = self.blocks[to - from - 1] else { return };
            let part = |index: usize| index * ahead.len() / (rows.lines * groups);
            fetch_lines(&ahead[part(index)..part(index + 1)]);
            let (mut at, mut stride) = (start.0.as_ptr(), 0);
            if args.weights.has_zeros() {
                for row in from..to {
                    // SAFETY: the rows' sums have just been gathered; `own` has room for the rows of a microkernel.
                    unsafe {
                        let sum = *rows.sums.add(row);
                        for i in 0..width {
                            let value = start.0[i].wrapping_sub(zeros[i].wrapping_mul(sum));
                            own.add((row - from) * width + i).write(value);
                        }
                    }
                }
                (at, stride) = (own.cast_const(), width);
            }
            let block = BlockArgs {
                x: rows.x.wrapping_add(line * rows.line_stride + from * rows.x_stride),
                x_stride: rows.x_stride,
                parts: rows.parts,
                part_stride: rows.part_stride,
                words,
                w: args.weights.panel(panel),
                start: at,
                start_stride: stride,
                sums,
            };
            let pixel = rows.first + line * rows.count + from;
            let finish = FinishArgs {
                outcome: args.outcome,
                sums,
                sums_stride: width,
                rows: to - from,
                columns,
                scale: scale.0.as_ptr(),
                bias: if args.bias.is_empty() { std::ptr::null() } else { bias.0.as_ptr() },
                zero: args.codes[0],
                low: args.codes[1],
                high: args.codes[2],
                out: args.out.wrapping_add((pixel * args.out_stride + column) * bytes),
                out_stride: args.out_stride,
            };
            // SAFETY: the caller guarantees rows, weights and outputs; the sums of any instance fit.
            unsafe {
                entry(&block);
                (self.finish)(&finish, 0);
            }
        }
    }
}

/// A panel's numbers of those of all outputs, or of the only one.
fn columns_of<T: Copy>(list: &[T], first: usize, panel: &mut [T]) {
    match list {
        [] => {}
        [only] => panel.fill(*only),
        _ => panel.copy_from_slice(&list[first..first + panel.len()]),
    }
}

/// Rows of a chunk, where they are read.
struct Rows {
    x: *const u8,
    x_stride: usize,
    /// Parts of a row and bytes from one to the next.
    parts: usize,
    part_stride: usize,
    /// Lines of rows, and bytes from one to the next.
    lines: usize,
    line_stride: usize,
    /// The first pixel, and how many a line.
    first: usize,
    count: usize,
    /// The zero point as the kernel has it.
    zero: i32,
    /// Sums of rows, if weights have zero points.
    sums: *const i32,
}
