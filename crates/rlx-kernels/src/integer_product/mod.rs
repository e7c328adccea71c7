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
use crate::isa::{Entry, Isa, LANES, select};
use crate::pool::Pool;
use crate::quant_dot::dot::{DotEntry, DotSet};
use block::{BLOCKS, BlockArgs, MAX_ROWS};
pub use pack::{CodeOrder, IntegerMatrix};
pub use rows::Outcome;
use rows::{FINISH, FinishArgs, GATHER, GatherArgs};
use std::fmt;
use std::mem::MaybeUninit;

/// Strips of a panel at most.
const MAX_STRIPS: usize = 2;

/// Bytes of rows that a worker gathers at a time, where one microkernel's are not more.
const CHUNK_BYTES: usize = 256 << 10;

/// Rows of a chunk at most.
const CHUNK_ROWS: usize = 8 * MAX_ROWS;

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
    pack::packed_bytes(layer.outputs, layer.k(), kernel.strips)
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
        fits.then(|| IntegerMatrix::pack(pool, self.set, self.strips, codes, order, (signed, zeros)))?
    }

    /// Whether packed weights are those of this layer and kernel.
    pub fn takes(&self, weights: &IntegerMatrix) -> bool {
        weights.set() == self.set && weights.n() == self.layer.outputs && weights.k() == self.layer.k()
    }

    fn row_bytes(&self) -> usize {
        self.layer.k().next_multiple_of(pack::WORD)
    }

    /// Rows of a chunk at most.
    fn chunk_rows(&self) -> usize {
        let most = CHUNK_BYTES / self.row_bytes() / self.max_rows * self.max_rows;
        most.clamp(self.max_rows, CHUNK_ROWS)
    }

    /// Bytes of scratch that each worker needs: a chunk of gathered rows and their sums.
    pub fn scratch_bytes(&self) -> usize {
        let rows = self.chunk_rows();
        (rows * self.row_bytes()).next_multiple_of(64) + rows * size_of::<i32>()
    }

    /// The cut for `workers` workers. Constant time.
    pub fn grid(&self, images: &Images, workers: usize) -> IntegerGrid {
        let pixels = images.batch * images.positions[0] * images.positions[1];
        let chunks = pixels.div_ceil(self.chunk_rows());
        let panels = self.layer.outputs.div_ceil(self.strips * LANES);
        let wanted = if workers <= 1 { 1 } else { workers * TILES_PER_WORKER };
        let panel_blocks = panels.min(wanted.div_ceil(chunks.max(1)));
        IntegerGrid { pixels, chunks, panel_blocks }
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
        let of = |chunk: usize| chunk * grid.pixels / grid.chunks;
        let (first, count) = (of(chunk), of(chunk + 1) - of(chunk));
        let panels = args.weights.panels();
        let which = block * panels / grid.panel_blocks..(block + 1) * panels / grid.panel_blocks;
        let row_sums: *mut i32 =
            scratch.wrapping_add((self.chunk_rows() * self.row_bytes()).next_multiple_of(64)).cast();
        let signed = self.set.takes_signed_rows();
        let flip = if args.x_signed == signed { 0 } else { 0x80 };
        let (x, x_stride) = if self.reads_in_place(args) {
            (args.x.wrapping_add(first * args.x_stride), args.x_stride)
        } else {
            if std::mem::replace(held, chunk) != chunk {
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
                    sums: if args.weights.has_zeros() { row_sums } else { std::ptr::null_mut() },
                    signed,
                };
                // SAFETY: the caller guarantees the images and the scratch, which has room for a chunk.
                unsafe { (self.gather)(&gather, 0) };
            }
            (scratch.cast_const(), self.row_bytes())
        };
        let zero = args.x_zero ^ flip;
        let zero = if signed { i32::from(zero as i8) } else { i32::from(zero) };
        for panel in which {
            let rows = Rows { x, x_stride, first, count, zero, sums: row_sums };
            // SAFETY: the caller guarantees the operands; the rows have just been found.
            unsafe { self.run_panel(args, panel, &rows) };
        }
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
        for i in 0..columns {
            let of = |list: &[f32]| list.get(column + i).or(list.first()).copied().unwrap_or(0.0);
            let whole = args.whole_bias.get(column + i).or(args.whole_bias.first()).copied().unwrap_or(0);
            let centred = totals[i].wrapping_sub(zeros[i].wrapping_mul(k));
            start.0[i] = whole.wrapping_sub(rows.zero.wrapping_mul(centred));
            scale.0[i] = of(args.scale) / args.step;
            bias.0[i] = of(args.bias) / args.step;
        }
        let bytes = if matches!(args.outcome, Outcome::I32 | Outcome::F32) { 4 } else { 1 };
        let groups = rows.count.div_ceil(self.max_rows);
        let mut own = Sums([MaybeUninit::uninit(); SUMS]);
        let mut sums = Sums([MaybeUninit::uninit(); SUMS]);
        let (own, sums) = (own.0.as_mut_ptr().cast::<i32>(), sums.0.as_mut_ptr().cast::<i32>());
        for group in 0..groups {
            let (from, to) = (group * rows.count / groups, (group + 1) * rows.count / groups);
            let Some(entry) = self.blocks[to - from - 1] else { return };
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
                x: rows.x.wrapping_add(from * rows.x_stride),
                x_stride: rows.x_stride,
                w: args.weights.panel(panel),
                words: args.weights.words(),
                start: at,
                start_stride: stride,
                sums,
            };
            let pixel = rows.first + from;
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

/// Rows of a chunk, where they are read.
struct Rows {
    x: *const u8,
    x_stride: usize,
    /// The first pixel, and how many.
    first: usize,
    count: usize,
    /// The zero point as the kernel has it.
    zero: i32,
    /// Sums of rows, if weights have zero points.
    sums: *const i32,
}
