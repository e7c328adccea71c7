//! Convolutions by windows of three by three and strides of one in 16 products for each four outputs (Winograd's F(2x2, 3x3)).
//!
//! Tiles of two by two outputs read four by four elements, which overlap. Elements and weights are transformed, so that each of 16
//! places is a matrix product of its own, tiles by channels by outputs; the products are transformed back to outputs.
//!
//! Numeric contract: transformed weights are computed in f64 and rounded once; elements are transformed down, then across, in f32; a
//! product is one f32 accumulator, updated by fused multiply-add in the order of channels; it is transformed back down, then across;
//! then bias, addend, activation. Elements outside the image are zeros. A number that is not finite reaches all outputs of the tiles
//! that read it.

use super::{
    ConvArgs, ConvGrid, ConvKernel, ConvLayer, Images, NOTHING, Stream, TILE_WEIGHT_BYTES, TILES_PER_WORKER,
};
use crate::gemm::Activation;
use crate::gemm::epilogue::{Epilogue, EpilogueArgs};
use crate::gemm::taps::{Finish, SLICE, TapsArgs};
use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
use std::ops::Range;
use std::ptr::null;

/// Places of a tile, and transformed weights of a window.
pub(super) const PLACES: usize = 16;

/// Channels and outputs from which on transforming is worth it.
const LEAST_CHANNELS: usize = 32;

/// Channels by outputs up to which it is: transformed weights are 16 ninths of the others, which one image must make up for.
const MOST_WEIGHTS: usize = 256 * 256;

/// Bytes of transformed elements of a tile of the grid, about.
const TILE_BYTES: usize = 1 << 20;

/// Bytes of transformed weights of a tile of the grid, where there are several blocks of elements.
const BLOCK_WEIGHT_BYTES: usize = 2 << 20;

/// Where a row of length one starts.
static START: usize = 0;

/// Whether a layer is computed so.
pub(super) fn suits(layer: &ConvLayer) -> bool {
    layer.window == [3; 2]
        && layer.strides == [1; 2]
        && layer.dilations == [1; 2]
        && layer.groups == 1
        && layer.channels.min(layer.outputs) >= LEAST_CHANNELS
        && layer.channels.saturating_mul(layer.outputs) <= MOST_WEIGHTS
}

/// Transformed weights as rows `[panels, places, columns of a panel]` of `channels` values.
pub(super) fn weight_rows(layer: &ConvLayer, columns: usize, weights: &[f32]) -> Vec<f32> {
    let channels = layer.channels;
    let mut rows = vec![0.0; layer.outputs.next_multiple_of(columns) * PLACES * channels];
    for (output, source) in weights.chunks_exact(9 * channels).enumerate() {
        let first = output / columns * PLACES * columns + output % columns;
        for (channel, window) in source.chunks_exact(9).enumerate() {
            for (place, value) in transformed(window).into_iter().enumerate() {
                rows[(first + place * columns) * channels + channel] = value;
            }
        }
    }
    rows
}

fn transformed(window: &[f32]) -> [f32; PLACES] {
    let spread = |w: [f64; 3]| {
        let (ends, middle) = (w[0] + w[2], w[1]);
        [w[0], (ends + middle) * 0.5, (ends - middle) * 0.5, w[2]]
    };
    let columns = [0, 1, 2].map(|x| spread([0, 1, 2].map(|y| f64::from(window[y * 3 + x]))));
    let mut places = [0.0; PLACES];
    for y in 0..4 {
        for (x, value) in spread([0, 1, 2].map(|x| columns[x][y])).into_iter().enumerate() {
            places[y * 4 + x] = value as f32;
        }
    }
    places
}

/// The transformations of one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Winograd {
    elements: Entry<ElementsArgs>,
    outputs: Entry<OutputsArgs>,
}

static ELEMENTS: Rows<ElementsArgs> = Row::all_of::<Elements>();
static OUTPUTS: Rows<OutputsArgs> = Row::all_of::<Outputs>();

impl Winograd {
    pub(super) fn choose(isa: Isa) -> Option<Winograd> {
        Some(Winograd { elements: select(&ELEMENTS, isa)?, outputs: select(&OUTPUTS, isa)? })
    }
}

/// Values from one place to the next: an odd number of cache lines, so that places do not share a set of a cache.
fn pitch(values: usize) -> usize {
    (values.div_ceil(LANES) | 1) * LANES
}

/// Tiles along the axes of an image.
fn tiles_of(images: &Images) -> [usize; 2] {
    images.positions.map(|positions| positions.div_ceil(2))
}

impl ConvKernel {
    /// Units of the microkernel's rows that are transformed at a time, at most.
    fn most_units(&self) -> usize {
        let unit = self.chosen.max_rows * PLACES * self.layer.channels * 4;
        (TILE_BYTES / unit).max(1)
    }

    pub(super) fn winograd_scratch(&self, images: &Images) -> usize {
        let [rows, columns] = tiles_of(images);
        let tiles = (images.batch * rows * columns).min(self.most_units() * self.chosen.max_rows);
        let (channels, outputs) = (self.layer.channels, self.layout.panel_columns());
        PLACES * (pitch(tiles * channels) + pitch(tiles * outputs)) * 4
    }

    /// The cut: chunks of tiles of all images by blocks of panels.
    pub(super) fn winograd_grid(&self, images: &Images, workers: usize) -> ConvGrid {
        let [rows, columns] = tiles_of(images);
        let (tiles, panels) = (images.batch * rows * columns, self.group_panels());
        let units = tiles.div_ceil(self.chosen.max_rows);
        let wanted = if workers <= 1 { 1 } else { workers * TILES_PER_WORKER };
        let (mut row_blocks, mut panel_blocks) = (units.div_ceil(self.most_units()), 1);
        if row_blocks > 1 {
            panel_blocks = self.layout.bytes().div_ceil(BLOCK_WEIGHT_BYTES).min(panels);
            if panel_blocks == 1 {
                row_blocks = row_blocks.next_multiple_of(workers.max(1));
            }
        } else if self.layout.bytes() > TILE_WEIGHT_BYTES || units < 2 * workers {
            panel_blocks = panels.min(wanted);
        }
        if panel_blocks == 1 {
            row_blocks = row_blocks.max(wanted.min(units / 2)).min(units).max(1);
        }
        ConvGrid {
            images: usize::from(tiles > 0),
            units,
            pixels: tiles,
            chunked: true,
            row_blocks,
            panels,
            panel_blocks,
            by_pixel: false,
            far: [false; 2],
        }
    }

    /// [`ConvKernel::run_tile`] of such a layer.
    pub(super) unsafe fn run_winograd(
        &self,
        winograd: &Winograd,
        args: &ConvArgs,
        (grid, tile): (&ConvGrid, usize),
        scratch: *mut u8,
        held: &mut usize,
    ) {
        let (block, channels) = (grid.block_of(tile), self.layer.channels);
        let units = grid.units_of(block);
        let range = grid.pixel_of(units.start)..grid.pixel_of(units.end);
        let elements = Pitched { start: scratch.cast(), pitch: pitch(range.len() * channels) };
        let from = PLACES * elements.pitch;
        let columns = self.layout.panel_columns();
        let sums = Pitched { start: elements.start.wrapping_add(from), pitch: pitch(range.len() * columns) };
        let at = Tiles { range, each: tiles_of(&args.images) };
        if *held != block {
            let args = ElementsArgs {
                at: at.clone(),
                x: args.x,
                x_stride: args.x_stride,
                extents: args.images.extents,
                before: self.layer.before,
                channels,
                to: elements,
            };
            // SAFETY: the caller guarantees `x` and a scratch for the transformed elements of a tile.
            unsafe { (winograd.elements)(&args, 0) };
            *held = block;
        }
        for panel in grid.panels_of(tile) {
            let left = self.layer.outputs - panel * columns;
            // SAFETY: the caller guarantees the weights, and a scratch for the sums of a panel behind the elements.
            let width = unsafe { self.products(args, grid, &units, panel, (elements, sums)) };
            let column = |p: *const f32| if p.is_null() { p } else { p.wrapping_add(panel * columns) };
            let args = OutputsArgs {
                at: at.clone(),
                from: sums,
                from_stride: width,
                positions: args.images.positions,
                columns: left.min(width),
                bias: column(args.bias),
                addend: column(args.addend),
                addend_stride: args.addend_stride,
                out: args.out.wrapping_add(panel * columns),
                out_stride: args.out_stride,
                activation: args.activation,
            };
            // SAFETY: the sums were written; the caller guarantees bias, addend and the outputs of these tiles and columns.
            unsafe { (winograd.outputs)(&args, 0) };
        }
    }

    /// The sums of all places of a panel; gives the columns of a row of sums.
    unsafe fn products(
        &self,
        args: &ConvArgs,
        grid: &ConvGrid,
        units: &Range<usize>,
        panel: usize,
        (elements, sums): (Pitched, Pitched),
    ) -> usize {
        let (channels, bytes) = (self.layer.channels, self.layout.panel_bytes());
        let columns = self.layout.panel_columns();
        let half = self.layer.outputs - panel * columns <= LANES && self.chosen.half[0].is_some();
        let (entries, width) = if half { (&self.chosen.half, LANES) } else { (&self.chosen.one, columns) };
        let first = grid.pixel_of(units.start);
        let bursts = channels.div_ceil(SLICE);
        let far = self.layout.bytes() > TILE_WEIGHT_BYTES / 2;
        for place in 0..PLACES {
            let w = args.w.wrapping_add((panel * PLACES + place) * bytes);
            let next = if far { (w.wrapping_add(bytes), bytes) } else { NOTHING };
            let mut stream = Stream::new([next, NOTHING, NOTHING], units.len() * bursts);
            for unit in units.clone() {
                let (start, end) = (grid.pixel_of(unit) - first, grid.pixel_of(unit + 1) - first);
                let Some(entry) = entries[end - start - 1] else { continue };
                let (fetch, fetch_lines) = stream.part(bursts);
                let block = TapsArgs {
                    x: elements.at(place, start * channels),
                    ldx: channels,
                    pieces: &START,
                    piece_count: 1,
                    length: channels,
                    w,
                    panel_bytes: bytes,
                    fetch,
                    fetch_lines,
                    finish: Finish::RAW,
                    out: sums.at(place, start * width),
                    out_stride: width,
                };
                // SAFETY: the transformed elements were written; weights and room for sums are the caller's.
                unsafe { entry(&block, 0) };
            }
        }
        width
    }
}

/// Values of each place.
#[derive(Clone, Copy)]
struct Pitched {
    start: *mut f32,
    pitch: usize,
}

impl Pitched {
    #[inline(always)]
    fn at(&self, place: usize, value: usize) -> *mut f32 {
        self.start.wrapping_add(place * self.pitch + value)
    }
}

/// Tiles of images, counted through lines of tiles.
#[derive(Clone)]
struct Tiles {
    range: Range<usize>,
    /// Along the axes of an image.
    each: [usize; 2],
}

/// Tiles next to each other.
struct Run {
    image: usize,
    /// The first outputs' line and column.
    line: usize,
    column: usize,
    tiles: usize,
}

impl Tiles {
    /// The tiles from one on that are in the same line.
    #[inline(always)]
    fn run_at(&self, tile: usize) -> Run {
        let [lines, columns] = self.each;
        let (line, column) = (tile / columns, tile % columns);
        let tiles = (self.range.end - tile).min(columns - column);
        Run { image: line / lines, line: line % lines * 2, column: column * 2, tiles }
    }
}

/// The elements of tiles, to be transformed.
struct ElementsArgs {
    at: Tiles,
    x: *const f32,
    x_stride: usize,
    extents: [usize; 2],
    before: [usize; 2],
    channels: usize,
    /// `[tiles, channels]` for each place, written.
    to: Pitched,
}

/// Elements to what the products take.
struct Elements;

impl Kernel for Elements {
    type Args = ElementsArgs;
    const OP: &'static str = "conv_winograd_elements";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &ElementsArgs, _tile: usize) {
        let (mut tile, [height, width]) = (args.at.range.start, args.extents);
        while tile < args.at.range.end {
            let run = args.at.run_at(tile);
            let rows = inside(run.line, args.before[0], height);
            let line = (run.image * height + run.line).wrapping_sub(args.before[0]).wrapping_mul(width);
            for index in 0..run.tiles {
                let column = run.column + 2 * index;
                let columns = inside(column, args.before[1], width);
                let pixel = line.wrapping_add(column).wrapping_sub(args.before[1]);
                let x = args.x.wrapping_add(pixel.wrapping_mul(args.x_stride));
                let to = (tile + index - args.at.range.start) * args.channels;
                // SAFETY: the caller guarantees the images, of which rows and columns say what is inside, and the result.
                unsafe {
                    if rows.len() == 4 && columns.len() == 4 {
                        elements::<S, true>(s, args, x, to, &rows, &columns);
                    } else {
                        elements::<S, false>(s, args, x, to, &rows, &columns);
                    }
                }
            }
            tile += run.tiles;
        }
    }
}

/// Which of four elements are inside the image, the first of which has this many and what is before the image in front.
#[inline(always)]
fn inside(at: usize, before: usize, extent: usize) -> Range<usize> {
    let first = before.saturating_sub(at).min(4);
    first..(extent + before).saturating_sub(at).min(4).max(first)
}

#[inline(always)]
unsafe fn elements<S: Simd, const INSIDE: bool>(
    s: S,
    args: &ElementsArgs,
    x: *const f32,
    to: usize,
    rows: &Range<usize>,
    columns: &Range<usize>,
) {
    let line = args.extents[1] * args.x_stride;
    let mut channel = 0;
    while channel < args.channels {
        let lanes = args.channels - channel;
        let mut down = [[s.zero(); 4]; 4];
        for column in 0..4 {
            let mut values = [s.zero(); 4];
            for row in 0..4 {
                if INSIDE || (rows.contains(&row) && columns.contains(&column)) {
                    let from = x.wrapping_add(row * line + column * args.x_stride + channel);
                    // SAFETY: the caller guarantees that the element is inside the image.
                    values[row] = unsafe { s.load_to(from, lanes) };
                }
            }
            down[column] = spread(s, values);
        }
        for row in 0..4 {
            let across = spread(s, [down[0][row], down[1][row], down[2][row], down[3][row]]);
            for column in 0..4 {
                // SAFETY: the caller guarantees room for the channels of the tile.
                unsafe { s.store_to(args.to.at(row * 4 + column, to + channel), lanes, across[column]) };
            }
        }
        channel += LANES;
    }
}

#[inline(always)]
fn spread<S: Simd>(s: S, d: [S::V; 4]) -> [S::V; 4] {
    [s.sub(d[0], d[2]), s.add(d[1], d[2]), s.sub(d[2], d[1]), s.sub(d[1], d[3])]
}

#[inline(always)]
fn gather<S: Simd>(s: S, m: [S::V; 4]) -> [S::V; 2] {
    [s.add(s.add(m[0], m[1]), m[2]), s.sub(s.sub(m[1], m[2]), m[3])]
}

/// The sums of tiles, to be transformed back.
struct OutputsArgs {
    at: Tiles,
    /// Rows of a tile's sums for each place.
    from: Pitched,
    from_stride: usize,
    positions: [usize; 2],
    /// Outputs of a pixel.
    columns: usize,
    bias: *const f32,
    addend: *const f32,
    addend_stride: usize,
    /// Of all images, written.
    out: *mut f32,
    out_stride: usize,
    activation: Activation,
}

/// Sums to outputs.
struct Outputs;

impl Kernel for Outputs {
    type Args = OutputsArgs;
    const OP: &'static str = "conv_winograd_outputs";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &OutputsArgs, _tile: usize) {
        let mut tile = args.at.range.start;
        while tile < args.at.range.end {
            let run = args.at.run_at(tile);
            let pixel = (run.image * args.positions[0] + run.line) * args.positions[1] + run.column;
            let lines = (args.positions[0] - run.line).min(2);
            let pixels = (args.positions[1] - run.column).min(2 * run.tiles);
            for index in 0..run.tiles {
                let from = (tile + index - args.at.range.start) * args.from_stride;
                let each = [lines, (pixels - 2 * index).min(2)];
                // SAFETY: the caller guarantees the sums, and what belongs to the outputs of the pixels named.
                unsafe { outputs(s, args, from, pixel + 2 * index, each) };
            }
            if Finish::range(args.activation).is_none() {
                for line in 0..lines {
                    // SAFETY: these outputs were written.
                    unsafe {
                        s.call::<Epilogue>(&activated(args, pixel + line * args.positions[1], pixels), 0);
                    }
                }
            }
            tile += run.tiles;
        }
    }
}

/// Outputs of pixels as an epilogue sees them that activates them in place.
fn activated(args: &OutputsArgs, pixel: usize, pixels: usize) -> EpilogueArgs {
    let out = args.out.wrapping_add(pixel * args.out_stride);
    EpilogueArgs {
        acc: out,
        acc_stride: args.out_stride,
        rows: pixels,
        columns: args.columns,
        up: 0,
        bias: null(),
        up_bias: null(),
        addend: null(),
        up_addend: null(),
        addend_stride: 0,
        residual: null(),
        residual_stride: 0,
        out,
        out_stride: args.out_stride,
        activation: args.activation,
    }
}

/// One tile's outputs, as many lines and columns of them as are inside.
#[inline(always)]
unsafe fn outputs<S: Simd>(s: S, args: &OutputsArgs, from: usize, pixel: usize, inside: [usize; 2]) {
    let (least, most) = Finish::range(args.activation).unwrap_or((f32::NEG_INFINITY, f32::INFINITY));
    let (least, most) = (s.splat(least), s.splat(most));
    let mut channel = 0;
    while channel < args.columns {
        let lanes = args.columns - channel;
        let mut down = [[s.zero(); 2]; 4];
        for column in 0..4 {
            let mut values = [s.zero(); 4];
            for row in 0..4 {
                // SAFETY: the caller guarantees whole rows of sums, of which `columns` values are read.
                values[row] = unsafe { s.load_to(args.from.at(row * 4 + column, from + channel), lanes) };
            }
            down[column] = gather(s, values);
        }
        // SAFETY: the caller guarantees bias, addend and outputs of these columns of the pixels inside.
        unsafe {
            let bias = match args.bias.is_null() {
                true => s.splat(-0.0),
                false => s.load_to(args.bias.wrapping_add(channel), lanes),
            };
            for line in 0..inside[0] {
                let row = match line {
                    0 => gather(s, [down[0][0], down[1][0], down[2][0], down[3][0]]),
                    _ => gather(s, [down[0][1], down[1][1], down[2][1], down[3][1]]),
                };
                for column in 0..inside[1] {
                    let pixel = pixel + line * args.positions[1] + column;
                    let mut value = s.add(if column == 0 { row[0] } else { row[1] }, bias);
                    if !args.addend.is_null() {
                        let addend = args.addend.wrapping_add(pixel * args.addend_stride + channel);
                        value = s.add(value, s.load_to(addend, lanes));
                    }
                    let value = s.min(most, s.max(least, value));
                    s.store_to(args.out.wrapping_add(pixel * args.out_stride + channel), lanes, value);
                }
            }
        }
        channel += LANES;
    }
}
