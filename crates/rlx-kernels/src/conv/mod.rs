//! Convolutions of images whose channels are adjacent: `out = act(x * w + bias + addend)`.
//!
//! A convolution of all channels is a matrix product whose rows are windows and whose k counts window rows, window columns, input
//! channels. The rows are never formed: the microkernels of `gemm/taps.rs` read a window piece by piece, from `x` itself or, where a
//! window reaches past an end, from a copy of some lines with zeros around them.
//!
//! Numeric contract: an output is one f32 accumulator, updated by fused multiply-add in the order of k, padding included as
//! zeros, then bias, addend, activation. Its bits depend neither on batch, tiles and threads nor on the instruction set. Layers that
//! `winograd.rs` takes have the contract there.

mod depthwise;
#[cfg(test)]
mod tests;
mod winograd;

pub(crate) use depthwise::clip;
pub use depthwise::{DepthwiseArgs, DepthwiseCut, depthwise_entry, depthwise_order, line_tiles};

use crate::gemm::epilogue::EpilogueArgs;
use crate::gemm::taps::{Finish, SLICE, TapsArgs, TapsChosen, choose};
use crate::gemm::{Activation, PackError, PackedLayout, WeightType, panel_columns};
use crate::isa::{Isa, LANES};
use std::fmt;
use std::ops::Range;
use winograd::Winograd;

/// What a layer is, whatever the images. Pairs are of the vertical and the horizontal axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvLayer {
    /// Elements of the window.
    pub window: [usize; 2],
    /// Elements from one position of the window to the next, at least 1.
    pub strides: [usize; 2],
    /// Elements from one element of the window to the next, at least 1.
    pub dilations: [usize; 2],
    /// Zeros in front.
    pub before: [usize; 2],
    /// Zeros behind.
    pub after: [usize; 2],
    /// Groups of channels.
    pub groups: usize,
    /// Input channels of a group.
    pub channels: usize,
    /// Output channels of a group.
    pub outputs: usize,
}

impl ConvLayer {
    /// Elements from the window's first to behind its last.
    fn span(&self, axis: usize) -> usize {
        (self.window[axis] - 1) * self.dilations[axis] + 1
    }

    /// Positions over an extent; `None` where the window does not fit.
    pub fn positions(&self, axis: usize, extent: usize) -> Option<usize> {
        let padded = extent.checked_add(self.before[axis])?.checked_add(self.after[axis])?;
        Some(padded.checked_sub(self.span(axis))? / self.strides[axis] + 1)
    }

    /// Terms of an output.
    pub fn k(&self) -> usize {
        self.window[0] * self.window[1] * self.channels
    }

    /// True if the layer is computed by Winograd's transformation: from its sizes alone.
    pub fn is_winograd(&self) -> bool {
        winograd::suits(self)
    }

    /// True if each group has one channel and one output.
    pub fn is_depthwise(&self) -> bool {
        self.channels == 1 && self.outputs == 1 && self.groups > 1
    }

    /// True if a window is one element and some are left out.
    fn picks(&self) -> bool {
        self.window == [1; 2] && self.strides != [1; 2] && !self.has_ends()
    }

    fn has_ends(&self) -> bool {
        self.before != [0; 2] || self.after != [0; 2]
    }

    /// True if a window is one element and none is left out.
    fn is_pointwise(&self) -> bool {
        self.window == [1; 2] && self.strides == [1; 2] && !self.has_ends()
    }
}

/// The layout of a layer's packed weights: each group's outputs in panels of their own; in a layer of Winograd's a panel for each
/// place.
pub fn conv_layout(layer: &ConvLayer, isa: Isa) -> Result<PackedLayout, PackError> {
    let panels = layer.outputs.div_ceil(panel_columns(isa));
    if layer.is_winograd() {
        let columns = panels * panel_columns(isa) * winograd::PLACES;
        return PackedLayout::new(WeightType::F32, columns, layer.channels, false, isa);
    }
    let columns = match layer.groups {
        1 => Some(layer.outputs),
        groups => panels.checked_mul(panel_columns(isa)).and_then(|n| n.checked_mul(groups)),
    };
    let k = layer.window[0].checked_mul(layer.window[1]).and_then(|taps| taps.checked_mul(layer.channels));
    match (columns, k) {
        (Some(n), Some(k)) => PackedLayout::new(WeightType::F32, n, k, false, isa),
        _ => Err(PackError::TooLarge),
    }
}

/// Weights `[groups * outputs, channels, window..]` in the order that [`conv_layout`] packs as rows: `[n, k]`, k counting window
/// rows, window columns, channels (channels of a place in a layer of Winograd's); padding columns of a group are zero. `None` if the
/// number of weights is another.
pub fn conv_rows(layer: &ConvLayer, isa: Isa, weights: &[f32]) -> Option<Vec<f32>> {
    let taps = layer.window[0] * layer.window[1];
    let k = layer.k();
    let columns = match layer.groups {
        1 => layer.outputs,
        _ => layer.outputs.next_multiple_of(panel_columns(isa)),
    };
    if weights.len() != layer.groups * layer.outputs * k {
        return None;
    }
    if layer.is_winograd() {
        return Some(winograd::weight_rows(layer, panel_columns(isa), weights));
    }
    let mut rows = vec![0.0; layer.groups * columns * k];
    for (index, source) in weights.chunks_exact(k.max(1)).enumerate() {
        let row = index / layer.outputs * columns + index % layer.outputs;
        let row = &mut rows[row * k..(row + 1) * k];
        for (channel, values) in source.chunks_exact(taps.max(1)).enumerate() {
            values.iter().enumerate().for_each(|(tap, &v)| row[tap * layer.channels + channel] = v);
        }
    }
    Some(rows)
}

/// Sizes of the images of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Images {
    /// How many.
    pub batch: usize,
    /// Lines and columns of x.
    pub extents: [usize; 2],
    /// Lines and columns of the result.
    pub positions: [usize; 2],
}

/// The operands of a convolution. Strides are in values, from one pixel to the next.
#[derive(Clone, Copy, Debug)]
pub struct ConvArgs {
    /// Sizes.
    pub images: Images,
    /// `[batch, lines, columns, groups * channels]`.
    pub x: *const f32,
    /// Pixel stride of `x`.
    pub x_stride: usize,
    /// The packed weights.
    pub w: *const u8,
    /// `groups * outputs` values, or null.
    pub bias: *const f32,
    /// A value of the result's sizes to add before the activation, or null; may be `out` itself with the same stride.
    pub addend: *const f32,
    /// Pixel stride of `addend`.
    pub addend_stride: usize,
    /// `[batch, lines, columns, groups * outputs]`, written.
    pub out: *mut f32,
    /// Pixel stride of `out`.
    pub out_stride: usize,
    /// What is applied last.
    pub activation: Activation,
}

/// Bytes of packed weights a tile covers at most, so that they stay in the second-level cache across its rows.
const TILE_WEIGHT_BYTES: usize = 1 << 20;

/// Bytes of lines that are copied at a time, where one line is not more.
const COPY_BYTES: usize = 384 << 10;

/// Bytes of packed weights that stay near for all pixels: a tile of no more takes each pixel's outputs together.
const NEAR_WEIGHT_BYTES: usize = 64 << 10;

/// Times the weights' bytes that images take, from which on a tile takes each pixel's outputs together whatever its weights.
const MANY_IMAGES: usize = 4;

/// Bytes of an operand that do not stay in the second-level cache until the next step.
const FAR_BYTES: usize = 1 << 20;

/// Bytes of `x` that are read again for each panel, where a line is not more.
const BLOCK_BYTES: usize = 512 << 10;

/// Cache lines of the next panels that are fetched in one burst, at most.
const BURST: usize = 16;

/// Tiles per worker aimed at, so that an uneven machine still finishes together.
const TILES_PER_WORKER: usize = 4;

/// The kernels of one layer on one instruction set.
#[derive(Clone, Copy)]
pub struct ConvKernel {
    layer: ConvLayer,
    layout: PackedLayout,
    isa: Isa,
    chosen: TapsChosen,
    winograd: Option<Winograd>,
}

impl fmt::Debug for ConvKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = f.debug_struct("ConvKernel");
        text.field("isa", &self.isa).field("layer", &self.layer).finish_non_exhaustive()
    }
}

/// How the output of a run is cut into tiles: blocks of lines (of pixels, where windows are single elements or there is one line) by
/// blocks of panels.
///
/// The cut depends on the number of workers; what an element is does not depend on the cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvGrid {
    images: usize,
    /// Lines of an image, or chunks of pixels of all images or of an image's only line.
    units: usize,
    /// Pixels of a unit; of all units together, where they are chunks.
    pixels: usize,
    chunked: bool,
    row_blocks: usize,
    panels: usize,
    panel_blocks: usize,
    /// Whether a pixel's outputs are taken together, rather than a panel's pixels.
    by_pixel: bool,
    /// Whether `x` and the result come from beyond the second-level cache.
    far: [bool; 2],
}

impl ConvGrid {
    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        self.images * self.row_blocks * self.panel_blocks
    }

    /// Which lines a tile covers: a number that two tiles share if they cover the same.
    fn block_of(&self, tile: usize) -> usize {
        tile % (self.images * self.row_blocks)
    }

    /// The first of a line's pixels that a chunk covers.
    fn pixel_of(&self, unit: usize) -> usize {
        if self.chunked { unit * self.pixels / self.units } else { 0 }
    }

    /// Pixels of a unit, about.
    fn unit_pixels(&self) -> usize {
        if self.chunked { self.pixels.div_ceil(self.units.max(1)) } else { self.pixels }
    }

    /// Output columns of some units.
    fn columns(&self, units: &Range<usize>) -> usize {
        if self.chunked { self.pixel_of(units.end) - self.pixel_of(units.start) } else { self.pixels }
    }

    fn units_of(&self, block: usize) -> Range<usize> {
        let block = block % self.row_blocks;
        block * self.units / self.row_blocks..(block + 1) * self.units / self.row_blocks
    }

    fn panels_of(&self, tile: usize) -> Range<usize> {
        let block = tile / (self.images * self.row_blocks);
        block * self.panels / self.panel_blocks..(block + 1) * self.panels / self.panel_blocks
    }
}

/// Where a tile's rows are read.
struct Rows {
    start: *const f32,
    /// Values from one output pixel's window to the next.
    step: usize,
    /// Values from one output line's windows to the next.
    line_step: usize,
    pieces: *const usize,
    piece_count: usize,
    length: usize,
}

/// Some pixels, at most a microkernel's, and their windows.
struct Chunk {
    pixels: Range<usize>,
    x: *const f32,
}

/// What calls soon touch: up to three ranges of cache lines, fetched a part in each call.
struct Stream {
    ranges: [(*const u8, usize); 3],
    per_burst: usize,
}

/// No range.
const NOTHING: (*const u8, usize) = (std::ptr::null(), 0);

impl Stream {
    /// Ranges of an address and bytes, fetched in this many bursts.
    fn new(ranges: [(*const u8, usize); 3], bursts: usize) -> Stream {
        let ranges = ranges.map(|(at, bytes)| (at, bytes / 64));
        let lines: usize = ranges.iter().map(|range| range.1).sum();
        Stream { ranges, per_burst: lines.div_ceil(bursts.max(1)).min(BURST) }
    }

    /// The address from which a call fetches, and the lines of each of its bursts.
    fn part(&mut self, bursts: usize) -> (*const u8, usize) {
        let Some((at, left)) = self.ranges.iter_mut().find(|range| range.1 > 0) else { return NOTHING };
        let lines = self.per_burst.min(left.div_ceil(bursts));
        let part = (*at, lines);
        (*at, *left) = (at.wrapping_add(lines * bursts * 64), left.saturating_sub(lines * bursts));
        part
    }
}

impl ConvKernel {
    /// The kernels for a layer; `None` if this machine or build lacks the instructions or the weights are too large.
    pub fn select(isa: Isa, layer: ConvLayer) -> Option<ConvKernel> {
        let layout = conv_layout(&layer, isa).ok()?;
        let winograd = if layer.is_winograd() { Some(Winograd::choose(isa)?) } else { None };
        Some(ConvKernel { layer, layout, isa, chosen: choose(isa)?, winograd })
    }

    /// The layer.
    pub fn layer(&self) -> &ConvLayer {
        &self.layer
    }

    /// The layout of the weights the kernels read.
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Channels of a pixel.
    pub fn channels(&self) -> usize {
        self.layer.groups * self.layer.channels
    }

    /// Panels of a group.
    fn group_panels(&self) -> usize {
        self.layer.outputs.div_ceil(self.layout.panel_columns())
    }

    /// Lines and columns of `x`, with zeros around, that the windows of some output lines and columns cover.
    fn covered(&self, lines: usize, columns: usize) -> [usize; 2] {
        let cover = |axis: usize, positions: usize| {
            positions.saturating_sub(1) * self.layer.strides[axis] + self.layer.span(axis)
        };
        [cover(0, lines), cover(1, columns)]
    }

    fn copied_values(&self, lines: usize, columns: usize) -> usize {
        let [height, width] = self.covered(lines, columns);
        height * width * self.channels()
    }

    /// Output columns of an image's only line that are taken at a time, at most; `None` if the line is not cut.
    fn segment(&self, images: &Images) -> Option<usize> {
        let chunk = self.chosen.max_rows;
        let one_line =
            images.positions[0] == 1 && self.layer.window[1] > 1 && images.positions[1] > 4 * chunk;
        let [height, _] = self.covered(1, 1);
        let width = COPY_BYTES / (height * self.channels() * 4).max(1);
        let columns = width.saturating_sub(self.layer.span(1)) / self.layer.strides[1] / chunk * chunk;
        one_line.then_some(columns.max(chunk))
    }

    /// Output lines whose windows are copied at a time, at most.
    fn copied_lines(&self, images: &Images) -> usize {
        let [_, width] = self.covered(1, images.positions[1]);
        let lines = COPY_BYTES / (width * self.channels() * 4).max(1);
        (lines.saturating_sub(self.layer.span(0)) / self.layer.strides[0] + 1).min(images.positions[0].max(1))
    }

    /// The layer as one of all pixels of images that hold only those it reads ([`ConvKernel::pick_line`]), where its lines are too
    /// short for the microkernels; weights are the same.
    pub fn picked(&self, images: &Images) -> Option<(ConvKernel, Images)> {
        let short = self.layer.picks() && 2 * images.positions[1] <= self.chosen.max_rows;
        let kernel = ConvKernel { layer: ConvLayer { strides: [1; 2], ..self.layer }, ..*self };
        (short && images.positions[0] > 1)
            .then_some((kernel, Images { extents: images.positions, ..*images }))
    }

    /// Bytes of the picked pixels of images of these sizes, and of smaller ones.
    pub fn picked_bytes(&self, images: &Images) -> usize {
        let columns = images.positions[1].min(self.chosen.max_rows / 2);
        let pixels = images.batch * images.positions[0] * columns;
        if self.layer.picks() { pixels * self.channels() * 4 } else { 0 }
    }

    /// Copies the pixels that an output line reads; lines are counted through all images.
    ///
    /// # Safety
    /// `x` is valid as [`ConvArgs`] says, `to` for the picked pixels of all images; no other thread accesses the line's.
    pub unsafe fn pick_line(
        &self,
        images: &Images,
        (x, x_stride): (*const f32, usize),
        line: usize,
        to: *mut f32,
    ) {
        let ([lines, columns], channels) = (images.positions, self.channels());
        let from = line / lines * images.extents[0] + line % lines * self.layer.strides[0];
        for column in 0..columns {
            let from = (from * images.extents[1] + column * self.layer.strides[1]) * x_stride;
            let to = to.wrapping_add((line * columns + column) * channels);
            // SAFETY: the caller guarantees the image's pixels and room for those picked.
            unsafe { to.copy_from_nonoverlapping(x.wrapping_add(from), channels) };
        }
    }

    fn pieces(&self) -> usize {
        self.layer.window[0] * self.layer.window[1]
    }

    /// Bytes of scratch each worker needs for images of these sizes, and for smaller ones.
    pub fn scratch_bytes(&self, images: &Images) -> usize {
        if self.winograd.is_some() {
            return self.winograd_scratch(images);
        }
        let pieces = (self.pieces() * size_of::<usize>()).next_multiple_of(64);
        let lines = if self.layer.has_ends() { self.copied_lines(images) } else { 0 };
        let columns = images.positions[1];
        // A line that is not cut may be longer than a segment.
        let most = self.segment(images).map_or(columns, |segment| segment.max(4 * self.chosen.max_rows));
        let copied = if lines == 0 { 0 } else { self.copied_values(lines, most.min(columns)) * 4 };
        // A smaller image may fit more lines into the limit.
        let limit = COPY_BYTES.min(self.copied_values(images.positions[0], columns) * 4);
        pieces + if lines == 0 { 0 } else { copied.max(limit) }
    }

    /// The cut for `workers` workers. Constant time.
    pub fn grid(&self, images: &Images, workers: usize) -> ConvGrid {
        if self.winograd.is_some() {
            return self.winograd_grid(images, workers);
        }
        let wanted = if workers <= 1 { 1 } else { workers * TILES_PER_WORKER };
        let flat = self.layer.is_pointwise();
        let segment = self.segment(images).filter(|_| !flat);
        let pixels = images.batch * images.positions[0] * images.positions[1];
        let panels = self.layer.groups * self.group_panels();
        let (lines, columns) = (images.positions[0], images.positions[1]);
        let (count, units, unit_pixels) = match segment {
            _ if flat => (1, pixels.div_ceil(self.chosen.max_rows), pixels),
            Some(most) => {
                let each = columns.div_ceil(wanted).next_multiple_of(self.chosen.max_rows);
                (images.batch, columns.div_ceil(each.min(most)), columns)
            }
            None => (images.batch, lines, columns),
        };
        let empty = pixels == 0 || panels == 0;
        let mut grid = ConvGrid {
            images: if empty { 0 } else { count },
            units,
            pixels: unit_pixels,
            chunked: flat || segment.is_some(),
            row_blocks: 1,
            panels,
            panel_blocks: 1,
            by_pixel: false,
            far: [false; 2],
        };
        if empty {
            return grid;
        }
        let in_cache = (TILE_WEIGHT_BYTES / self.layout.panel_bytes().max(1)).max(1);
        if self.layer.has_ends() {
            grid.row_blocks =
                if segment.is_some() { units } else { units.div_ceil(self.copied_lines(images)) };
        }
        if count * units > 1 {
            grid.panel_blocks = panels.div_ceil(in_cache);
        }
        let x_bytes = images.batch * images.extents[0] * images.extents[1] * self.channels() * 4;
        let more_rows = |grid: &mut ConvGrid| {
            let others = grid.images * grid.panel_blocks;
            grid.row_blocks = grid.row_blocks.max(units.min(wanted.div_ceil(others)));
        };
        let more_panels = |grid: &mut ConvGrid| {
            let others = grid.images * grid.row_blocks;
            grid.panel_blocks = grid.panel_blocks.max(panels.min(wanted.div_ceil(others)));
        };
        if self.layout.bytes() > x_bytes {
            more_panels(&mut grid);
            more_rows(&mut grid);
        } else {
            more_rows(&mut grid);
            more_panels(&mut grid);
        }
        let out_bytes = pixels * self.layer.groups * self.layer.outputs * 4;
        let tile_bytes = panels.div_ceil(grid.panel_blocks) * self.layout.panel_bytes();
        let many = x_bytes + out_bytes > MANY_IMAGES * self.layout.bytes();
        grid.by_pixel = tile_bytes <= NEAR_WEIGHT_BYTES || many;
        grid.far = [x_bytes > FAR_BYTES, out_bytes > FAR_BYTES];
        grid
    }

    /// The packed weights, in bytes, that worker `index` of `workers` reads first for these images.
    pub fn first_weights(&self, images: &Images, workers: usize, index: usize) -> Range<usize> {
        let grid = self.grid(images, workers);
        let first = index * grid.tiles() / workers.max(1);
        if first >= grid.tiles() {
            return 0..0;
        }
        let panels = grid.panels_of(first);
        let bytes = self.layout.bytes() / grid.panels;
        panels.start * bytes..panels.end * bytes
    }

    /// Computes one tile of the output. `held` names the lines that the scratch holds, and is this worker's for one run of the
    /// layer; it starts as `usize::MAX`.
    ///
    /// # Safety
    /// The pointers of `args` are valid as [`ConvArgs`] says for this layer; `scratch` is valid for
    /// [`ConvKernel::scratch_bytes`] bytes, aligned to 64 and this worker's alone; `out` overlaps no other operand except an
    /// identical `addend`; no other thread accesses this tile's outputs. `grid` is of [`ConvKernel::grid`] with the same
    /// images and `tile < grid.tiles()`.
    pub unsafe fn run_tile(
        &self,
        args: &ConvArgs,
        grid: &ConvGrid,
        tile: usize,
        scratch: *mut u8,
        held: &mut usize,
    ) {
        if let Some(winograd) = &self.winograd {
            // SAFETY: passed on to the caller.
            return unsafe { self.run_winograd(winograd, args, (grid, tile), scratch, held) };
        }
        let block = grid.block_of(tile);
        let (image, units) = (block / grid.row_blocks, grid.units_of(block));
        let pieces: *mut usize = scratch.cast();
        let copy = scratch.wrapping_add((self.pieces() * size_of::<usize>()).next_multiple_of(64)).cast();
        // SAFETY: the scratch holds the pieces, then the lines of a tile; the caller guarantees `x`.
        let rows = unsafe {
            if self.layer.has_ends() && *held != block {
                self.copy_lines(args, grid, image, &units, copy);
            }
            *held = block;
            self.rows(args, grid, (image, &units), pieces, copy)
        };
        let panels = grid.panels_of(tile);
        let line_bytes = if grid.chunked { grid.unit_pixels() * rows.step } else { rows.line_step } * 4;
        let (block, most) = match grid.by_pixel {
            true => (1, panels.len()),
            false => ((BLOCK_BYTES / line_bytes.max(1)).max(1), self.panels_at_once(grid)),
        };
        let mut first = units.start;
        while first < units.end {
            let lines = first..units.end.min(first + block);
            for panel in panels.clone().step_by(most) {
                let several = panel..panels.end.min(panel + most);
                let next = match () {
                    () if several.end < panels.end => several.end,
                    () if lines.end < units.end || grid.images * grid.row_blocks > 1 => panels.start,
                    () => panels.end,
                };
                let ahead = (!grid.by_pixel && next < grid.panels)
                    .then(|| args.w.wrapping_add(next * self.layout.panel_bytes()));
                // SAFETY: the caller guarantees the operands; the rows are windows of this tile's lines.
                unsafe {
                    self.run_lines(args, grid, (image, units.start, lines.clone()), several, &rows, ahead)
                };
            }
            first = lines.end;
        }
    }

    /// Panels that the microkernel for most of a line's pixels takes together.
    fn panels_at_once(&self, grid: &ConvGrid) -> usize {
        let pixels = grid.unit_pixels();
        let most = pixels.div_ceil(pixels.div_ceil(self.chosen.max_rows).max(1));
        self.chosen.several.get(most.wrapping_sub(1)).copied().flatten().map_or(1, |(_, panels)| panels)
    }

    /// Computes some lines of some panels, and fetches the weights at `ahead` meanwhile. `start` is the line that `rows` starts at.
    unsafe fn run_lines(
        &self,
        args: &ConvArgs,
        grid: &ConvGrid,
        (image, start, lines): (usize, usize, Range<usize>),
        panels: Range<usize>,
        rows: &Rows,
        ahead: Option<*const u8>,
    ) {
        let chunks_of = |pixels: usize| pixels.div_ceil(self.chosen.max_rows);
        let calls = lines.len() * chunks_of(grid.unit_pixels());
        let bursts = rows.piece_count * rows.length.div_ceil(SLICE);
        let bytes = panels.len() * self.layout.panel_bytes();
        let weights = ahead.map_or(NOTHING, |at| (at, bytes));
        let mut stream = Stream::new([weights, NOTHING, NOTHING], calls * bursts);
        for line in lines {
            let (first, pixels, x) = match grid.chunked {
                true => {
                    let at = grid.pixel_of(line);
                    let x = rows.start.wrapping_add((at - grid.pixel_of(start)) * rows.step);
                    (image * grid.pixels + at, grid.pixel_of(line + 1) - at, x)
                }
                false => {
                    let x = rows.start.wrapping_add((line - start) * rows.line_step);
                    ((image * grid.units + line) * grid.pixels, grid.pixels, x)
                }
            };
            let chunks = chunks_of(pixels);
            for chunk in 0..chunks {
                let span = chunk * pixels / chunks..(chunk + 1) * pixels / chunks;
                let x = x.wrapping_add(span.start * rows.step);
                let chunk = Chunk { pixels: first + span.start..first + span.end, x };
                if grid.by_pixel && grid.far != [false; 2] {
                    stream = self.next_pixels(args, grid, &chunk, panels.len(), (rows, bursts));
                }
                // SAFETY: passed on to the caller.
                unsafe { self.run_chunk(args, &chunk, panels.clone(), rows, (&mut stream, bursts)) };
            }
        }
    }

    /// What the calls for the pixels after a chunk's touch, where its operands are far away.
    fn next_pixels(
        &self,
        args: &ConvArgs,
        grid: &ConvGrid,
        chunk: &Chunk,
        panels: usize,
        (rows, bursts): (&Rows, usize),
    ) -> Stream {
        let (pixels, [x_far, out_far]) = (chunk.pixels.len(), grid.far);
        let range = |there: bool, at: *const f32, stride: usize| match there {
            true => (at.wrapping_add(chunk.pixels.end * stride).cast(), pixels * stride * 4),
            false => NOTHING,
        };
        let x = match x_far && self.layer.is_pointwise() {
            true => (chunk.x.wrapping_add(pixels * rows.step).cast(), pixels * rows.step * 4),
            false => NOTHING,
        };
        let whole = out_far && panels == grid.panels;
        let addend = range(whole && !args.addend.is_null(), args.addend, args.addend_stride);
        let out = range(whole, args.out.cast_const(), args.out_stride);
        Stream::new([x, addend, out], panels * bursts)
    }

    /// Copies what the windows of some lines cover, with zeros around it.
    unsafe fn copy_lines(
        &self,
        args: &ConvArgs,
        grid: &ConvGrid,
        image: usize,
        units: &Range<usize>,
        to: *mut f32,
    ) {
        let (images, channels) = (&args.images, self.channels());
        let lines = if grid.chunked { 0..1 } else { units.clone() };
        let [height, width] = self.covered(lines.len(), grid.columns(units));
        let [extent_y, extent_x] = images.extents;
        let before = self.layer.before;
        let first = grid.pixel_of(units.start) * self.layer.strides[1];
        let left = before[1].saturating_sub(first).min(width);
        let skipped = first.saturating_sub(before[1]).min(extent_x);
        let inside = (extent_x - skipped).min(width - left);
        for y in 0..height {
            let line = to.wrapping_add(y * width * channels);
            let source = (lines.start * self.layer.strides[0] + y).checked_sub(before[0]);
            // SAFETY: the caller guarantees `height * width * channels` values at `to`, and in `x` the pixels inside the image.
            unsafe {
                let Some(source) = source.filter(|&s| s < extent_y) else {
                    line.write_bytes(0, width * channels);
                    continue;
                };
                line.write_bytes(0, left * channels);
                let from = ((image * extent_y + source) * extent_x + skipped) * args.x_stride;
                let from = args.x.wrapping_add(from);
                let target = line.wrapping_add(left * channels);
                if args.x_stride == channels {
                    target.copy_from_nonoverlapping(from, inside * channels);
                } else {
                    for pixel in 0..inside {
                        let from = from.wrapping_add(pixel * args.x_stride);
                        target.wrapping_add(pixel * channels).copy_from_nonoverlapping(from, channels);
                    }
                }
                let end = left + inside;
                line.wrapping_add(end * channels).write_bytes(0, (width - end) * channels);
            }
        }
    }

    /// Where the windows of a tile are read, their pieces written to `pieces`.
    unsafe fn rows(
        &self,
        args: &ConvArgs,
        grid: &ConvGrid,
        (image, units): (usize, &Range<usize>),
        pieces: *mut usize,
        copy: *mut f32,
    ) -> Rows {
        let layer = &self.layer;
        let copied = layer.has_ends();
        let (pixel, width) = match copied {
            true => (self.channels(), self.covered(1, grid.columns(units))[1]),
            false => (args.x_stride, args.images.extents[1]),
        };
        let merged = layer.dilations[1] == 1 && layer.groups == 1 && pixel == layer.channels;
        let (columns, length) = match merged {
            true => (1, layer.window[1] * layer.channels),
            false => (layer.window[1], layer.channels),
        };
        for y in 0..layer.window[0] {
            for x in 0..columns {
                let at = (y * layer.dilations[0] * width + x * layer.dilations[1]) * pixel;
                // SAFETY: the caller guarantees room for a piece for each element of the window.
                unsafe { pieces.add(y * columns + x).write(at) };
            }
        }
        let (step, piece_count) = (layer.strides[1] * pixel, layer.window[0] * columns);
        let line_step = layer.strides[0] * width * pixel;
        let above = image * args.images.extents[0] * width * pixel;
        let start = match (copied, grid.chunked) {
            (true, _) => copy.cast_const(),
            (false, true) => args.x.wrapping_add(above + grid.pixel_of(units.start) * step),
            (false, false) => args.x.wrapping_add(above + units.start * line_step),
        };
        Rows { start, step, line_step, pieces, piece_count, length }
    }

    /// Computes some pixels of some panels.
    unsafe fn run_chunk(
        &self,
        args: &ConvArgs,
        chunk: &Chunk,
        panels: Range<usize>,
        rows: &Rows,
        (stream, bursts): (&mut Stream, usize),
    ) {
        let (layout, each, pixels) = (&self.layout, self.group_panels(), &chunk.pixels);
        let columns = layout.panel_columns();
        let range = Finish::range(args.activation);
        let mut panel = panels.start;
        while panel < panels.end {
            let group = panel / each;
            let end = panels.end.min((group + 1) * each);
            let column = (panel - group * each) * columns;
            let left = self.layer.outputs - column;
            let several = self.chosen.several[pixels.len() - 1].filter(|(_, step)| panel + step <= end);
            let half = self.chosen.half[pixels.len() - 1].filter(|_| left <= LANES);
            let (entry, step, width) = match (half, several) {
                (Some(entry), _) => (Some(entry), 1, LANES),
                (_, Some((entry, step))) => (Some(entry), step, step * columns),
                _ => (self.chosen.one[pixels.len() - 1], 1, columns),
            };
            let Some(entry) = entry else { return };
            let column = group * self.layer.outputs + column;
            let at = |p: *const f32, stride: usize| match p.is_null() {
                true => p,
                false => p.wrapping_add(pixels.start * stride + column),
            };
            let out = args.out.wrapping_add(pixels.start * args.out_stride + column);
            let (fetch, fetch_lines) = stream.part(bursts);
            let mut block = TapsArgs {
                x: chunk.x.wrapping_add(group * self.layer.channels),
                ldx: rows.step,
                pieces: rows.pieces,
                piece_count: rows.piece_count,
                length: rows.length,
                w: args.w.wrapping_add(panel * layout.panel_bytes()),
                panel_bytes: layout.panel_bytes(),
                fetch,
                fetch_lines,
                finish: Finish::RAW,
                out,
                out_stride: args.out_stride,
            };
            let (bias, addend) = (at(args.bias, 0), at(args.addend, args.addend_stride));
            panel += step;
            if let Some((least, most)) = range.filter(|_| width <= left) {
                block.finish = Finish { bias, addend, addend_stride: args.addend_stride, least, most };
                // SAFETY: the caller guarantees rows and panels, and bias, addend and outputs of these pixels and panels.
                unsafe { entry(&block, 0) };
                continue;
            }
            let mut acc = Accumulators([std::mem::MaybeUninit::uninit(); MAX_ACCUMULATORS]);
            (block.out, block.out_stride) = (acc.0.as_mut_ptr().cast(), width);
            let epilogue = EpilogueArgs {
                acc: block.out,
                acc_stride: width,
                rows: pixels.len(),
                columns: width.min(left),
                up: 0,
                bias,
                up_bias: std::ptr::null(),
                addend,
                up_addend: std::ptr::null(),
                addend_stride: args.addend_stride,
                residual: std::ptr::null(),
                residual_stride: 0,
                out,
                out_stride: args.out_stride,
                activation: args.activation,
            };
            // SAFETY: as above; the accumulators of any instance fit in `acc`, which the epilogue reads after they are written.
            unsafe {
                entry(&block, 0);
                (self.chosen.epilogue)(&epilogue, 0);
            }
        }
    }
}

/// The most values a microkernel call accumulates: rows by panels by columns.
const MAX_ACCUMULATORS: usize = 14 * 32;

#[repr(align(64))]
struct Accumulators([std::mem::MaybeUninit<f32>; MAX_ACCUMULATORS]);
