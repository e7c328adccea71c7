//! Convolutions of each channel by itself: vectors run over channels, windows are clipped at the ends.
//!
//! Numeric contract: that of the family, but for elements outside the image, which are left out rather than added as zeros.

use super::{ConvLayer, Images};
use crate::gemm::Activation;
use crate::gemm::epilogue::{Epilogue, EpilogueArgs};
use crate::gemm::taps::Finish;
use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
use std::ops::Range;

/// The operands of a depthwise convolution; tile `t` is a block of output lines and channels. Strides are in values, from one pixel to
/// the next.
#[derive(Clone, Copy, Debug)]
pub struct DepthwiseArgs {
    /// The layer; a channel and an output a group.
    pub layer: ConvLayer,
    /// Sizes.
    pub images: Images,
    /// `[batch, lines, columns, groups]`.
    pub x: *const f32,
    /// Pixel stride of `x`.
    pub x_stride: usize,
    /// Weights as [`depthwise_order`] lays them out.
    pub w: *const f32,
    /// `groups` values, or null.
    pub bias: *const f32,
    /// A value of the result's sizes to add before the activation, or null; may be `out` itself with the same stride.
    pub addend: *const f32,
    /// Pixel stride of `addend`.
    pub addend_stride: usize,
    /// `[batch, lines, columns, groups]`, written.
    pub out: *mut f32,
    /// Pixel stride of `out`.
    pub out_stride: usize,
    /// What is applied last.
    pub activation: Activation,
    /// The cut, from [`DepthwiseCut::new`].
    pub cut: DepthwiseCut,
}

/// How the output of a run is cut into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DepthwiseCut {
    /// Output lines of a tile.
    pub lines: usize,
    /// Channels of a tile, a multiple of 16.
    pub channels: usize,
    /// Tiles along the channels.
    pub channel_blocks: usize,
    /// Tiles.
    pub tiles: usize,
}

impl DepthwiseCut {
    /// The cut for `workers` workers: blocks of lines where there are many, else blocks of channels, which share no input.
    pub fn new(images: &Images, channels: usize, workers: usize) -> DepthwiseCut {
        let lines = images.batch * images.positions[0];
        let wanted = if workers <= 1 { 1 } else { workers * super::TILES_PER_WORKER };
        let vectors = channels.div_ceil(LANES).max(1);
        let vectors_each = match lines >= 4 * wanted || vectors < 4 * workers {
            true => vectors,
            false => vectors.div_ceil((vectors / FEW_VECTORS).clamp(workers.max(1), wanted)),
        };
        let channel_blocks = vectors.div_ceil(vectors_each);
        let each = lines.div_ceil(wanted.div_ceil(channel_blocks)).max(1);
        let (channels, tiles) = (vectors_each * LANES, lines.div_ceil(each) * channel_blocks);
        DepthwiseCut { lines: each, channels, channel_blocks, tiles }
    }

    /// The lines and the channels of a tile.
    fn tile(&self, args: &DepthwiseArgs, tile: usize) -> (Range<usize>, Range<usize>) {
        let total = args.images.batch * args.images.positions[0];
        let (line, channel) =
            (tile / self.channel_blocks * self.lines, tile % self.channel_blocks * self.channels);
        (line..total.min(line + self.lines), channel..args.layer.groups.min(channel + self.channels))
    }
}

/// Weights `[groups, 1, window..]` as `[window.., groups]`.
pub fn depthwise_order(layer: &ConvLayer, weights: &[f32]) -> Option<Vec<f32>> {
    let taps = layer.window[0] * layer.window[1];
    if weights.len() != layer.groups * taps {
        return Option::None;
    }
    Some((0..weights.len()).map(|i| weights[i % layer.groups * taps + i / layer.groups]).collect())
}

/// `(tiles, output lines of a tile)` for `workers` workers.
pub fn line_tiles(images: &Images, workers: usize) -> (usize, usize) {
    let lines = images.batch * images.positions[0];
    let wanted = if workers <= 1 { 1 } else { workers * super::TILES_PER_WORKER };
    let each = lines.div_ceil(wanted).max(1);
    (lines.div_ceil(each), each)
}

static DEPTHWISE: Rows<DepthwiseArgs> = Row::all_of::<Depthwise>();

/// The kernel for `isa`.
pub fn depthwise_entry(isa: Isa) -> Option<Entry<DepthwiseArgs>> {
    select(&DEPTHWISE, isa)
}

struct Depthwise;

impl Kernel for Depthwise {
    type Args = DepthwiseArgs;
    const OP: &'static str = "conv_depthwise";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &DepthwiseArgs, tile: usize) {
        // SAFETY: passed on to the caller.
        unsafe {
            // Sixteen lanes of plain code are long already, so they come for one pixel at a time only.
            match S::ISA {
                Isa::Scalar => lines::<S, 1>(s, args, tile),
                _ => lines::<S, 4>(s, args, tile),
            }
            if Finish::range(args.activation).is_none() {
                s.call::<Epilogue>(&activated(args, tile), 0);
            }
        }
    }
}

/// The lines and channels of a tile as an epilogue sees them that activates them in place.
fn activated(args: &DepthwiseArgs, tile: usize) -> EpilogueArgs {
    let (lines, channels) = args.cut.tile(args, tile);
    let positions = args.images.positions[1];
    let out = args.out.wrapping_add(lines.start * positions * args.out_stride + channels.start);
    let none = std::ptr::null();
    EpilogueArgs {
        acc: out,
        acc_stride: args.out_stride,
        rows: lines.len() * positions,
        columns: channels.len(),
        up: 0,
        bias: none,
        up_bias: none,
        addend: none,
        up_addend: none,
        addend_stride: 0,
        residual: none,
        residual_stride: 0,
        out,
        out_stride: args.out_stride,
        activation: args.activation,
    }
}

/// The elements of a window along an axis that are inside the image, for the position at `at`.
#[inline(always)]
pub(crate) fn clip(at: usize, before: usize, window: usize, dilation: usize, extent: usize) -> Range<usize> {
    let first = before.saturating_sub(at).div_ceil(dilation);
    let end = (extent + before).saturating_sub(at).div_ceil(dilation).min(window);
    first.min(end)..end
}

/// Vectors of channels that make up for finding a pixel's window.
const FEW_VECTORS: usize = 8;

/// Bytes of the lines that a window covers which stay in the first-level cache, about.
const NEAR_BYTES: usize = 32 << 10;

/// The lines of a tile, up to `MOST` pixels at a time, as many channels at a time as stay near.
#[inline(always)]
unsafe fn lines<S: Simd, const MOST: usize>(s: S, args: &DepthwiseArgs, tile: usize) {
    let (lines, channels) = args.cut.tile(args, tile);
    let line_bytes = args.layer.window[0] * args.images.extents[1] * 4;
    let block = (NEAR_BYTES / line_bytes.max(1)).max(2 * FEW_VECTORS * LANES).next_multiple_of(LANES);
    for first in channels.clone().step_by(block) {
        let channels = first..channels.end.min(first + block);
        for line in lines.clone() {
            // SAFETY: the caller guarantees the operands.
            unsafe { one_line::<S, MOST>(s, args, line, &channels) };
        }
    }
}

#[inline(always)]
unsafe fn one_line<S: Simd, const MOST: usize>(
    s: S,
    args: &DepthwiseArgs,
    line: usize,
    channels: &Range<usize>,
) {
    let (layer, images) = (&args.layer, &args.images);
    let [positions_y, positions_x] = images.positions;
    let (image, y) = (line / positions_y, line % positions_y);
    let top = y * layer.strides[0];
    let rows = clip(top, layer.before[0], layer.window[0], layer.dilations[0], images.extents[0]);
    let unrolled = MOST > 1 && layer.window == [3; 2] && layer.dilations == [1; 2] && rows.len() == 3;
    let mut x = 0;
    while x < positions_x {
        let left = x * layer.strides[1];
        let column =
            |at: usize| clip(at, layer.before[1], layer.window[1], layer.dilations[1], images.extents[1]);
        let columns = column(left);
        let whole = 0..layer.window[1];
        let fits = x + MOST <= positions_x
            && columns == whole
            && column(left + (MOST - 1) * layer.strides[1]) == whole;
        let unrolled = unrolled && columns == whole;
        let at = At { image, line, top, left, rows: rows.clone(), columns, x };
        // SAFETY: the caller guarantees the operands; the window's elements named are inside the image.
        unsafe {
            match (layer.strides[1], fits) {
                (1, true) if unrolled => pixels::<S, MOST, 1>(s, args, &at, channels),
                (2, true) if unrolled => pixels::<S, MOST, 2>(s, args, &at, channels),
                (_, true) => pixels::<S, MOST, 0>(s, args, &at, channels),
                (_, false) if unrolled => pixels::<S, 1, 1>(s, args, &at, channels),
                (_, false) => pixels::<S, 1, 0>(s, args, &at, channels),
            }
        }
        x += if fits { MOST } else { 1 };
    }
}

/// Pixels next to each other and what their windows see.
struct At {
    image: usize,
    line: usize,
    top: usize,
    left: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    x: usize,
}

/// `N` pixels; `STRIDE` is that of a window of three by three which is whole, else 0.
#[inline(always)]
unsafe fn pixels<S: Simd, const N: usize, const STRIDE: usize>(
    s: S,
    args: &DepthwiseArgs,
    at: &At,
    channels: &Range<usize>,
) {
    let mut channel = channels.start;
    // SAFETY: the caller guarantees the pixels, of which these channels are.
    unsafe {
        while channel + LANES <= channels.end {
            let acc = match STRIDE {
                0 => window::<S, N, true>(s, args, at, channel, LANES),
                _ => three_by_three::<S, N, STRIDE>(s, args, at, channel),
            };
            finish::<S, N, true>(s, args, at, channel, LANES, acc);
            channel += LANES;
        }
        if channel < channels.end {
            let lanes = channels.end - channel;
            let acc = window::<S, N, false>(s, args, at, channel, lanes);
            finish::<S, N, false>(s, args, at, channel, lanes, acc);
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd, const WHOLE: bool>(s: S, p: *const f32, lanes: usize) -> S::V {
    // SAFETY: the caller guarantees `lanes` values, 16 if `WHOLE`.
    unsafe { if WHOLE { s.load(p) } else { s.load_part(p, lanes) } }
}

/// The sums of 16 channels over whole windows of three by three, each element of the image read once.
#[inline(always)]
unsafe fn three_by_three<S: Simd, const N: usize, const STRIDE: usize>(
    s: S,
    args: &DepthwiseArgs,
    at: &At,
    channel: usize,
) -> [S::V; N] {
    let (layer, images) = (&args.layer, &args.images);
    let line = (at.image * images.extents[0] + at.top - layer.before[0]) * images.extents[1];
    let mut from = args.x.wrapping_add((line + at.left - layer.before[1]) * args.x_stride + channel);
    let mut weights = args.w.wrapping_add(channel);
    let mut acc = [s.zero(); N];
    for _ in 0..3 {
        // SAFETY: the caller guarantees that the windows are inside the image, and the weights.
        unsafe {
            let weight = [0, 1, 2].map(|column| s.load(weights.wrapping_add(column * layer.groups)));
            for column in 0..(N - 1) * STRIDE + 3 {
                let value = s.load(from.wrapping_add(column * args.x_stride));
                for tap in 0..3 {
                    if column >= tap && (column - tap).is_multiple_of(STRIDE) && (column - tap) / STRIDE < N {
                        let n = (column - tap) / STRIDE;
                        acc[n] = s.fma(value, weight[tap], acc[n]);
                    }
                }
            }
        }
        from = from.wrapping_add(images.extents[1] * args.x_stride);
        weights = weights.wrapping_add(3 * layer.groups);
    }
    acc
}

/// The sums of some channels over the elements of any window that are inside the image.
#[inline(always)]
unsafe fn window<S: Simd, const N: usize, const WHOLE: bool>(
    s: S,
    args: &DepthwiseArgs,
    at: &At,
    channel: usize,
    lanes: usize,
) -> [S::V; N] {
    let (layer, images) = (&args.layer, &args.images);
    let step = layer.strides[1] * args.x_stride;
    let mut acc = [s.zero(); N];
    for row in at.rows.clone() {
        let y = at.top + row * layer.dilations[0] - layer.before[0];
        let line = (at.image * images.extents[0] + y) * images.extents[1];
        let weights = args.w.wrapping_add(row * layer.window[1] * layer.groups + channel);
        for column in at.columns.clone() {
            let x = at.left + column * layer.dilations[1] - layer.before[1];
            let from = args.x.wrapping_add((line + x) * args.x_stride + channel);
            // SAFETY: the caller guarantees that the window's elements named are inside the image, and the weights.
            unsafe {
                let weight = load::<S, WHOLE>(s, weights.wrapping_add(column * layer.groups), lanes);
                for n in 0..N {
                    let value = load::<S, WHOLE>(s, from.wrapping_add(n * step), lanes);
                    acc[n] = s.fma(value, weight, acc[n]);
                }
            }
        }
    }
    acc
}

/// From sums to outputs; what no range can say is left to the epilogue.
#[inline(always)]
unsafe fn finish<S: Simd, const N: usize, const WHOLE: bool>(
    s: S,
    args: &DepthwiseArgs,
    at: &At,
    channel: usize,
    lanes: usize,
    acc: [S::V; N],
) {
    let (least, most) = Finish::range(args.activation).unwrap_or((f32::NEG_INFINITY, f32::INFINITY));
    let (least, most) = (s.splat(least), s.splat(most));
    // SAFETY: the caller guarantees bias, addend and outputs of these pixels and channels.
    unsafe {
        let bias = match args.bias.is_null() {
            true => s.splat(-0.0),
            false => load::<S, WHOLE>(s, args.bias.wrapping_add(channel), lanes),
        };
        let pixel = at.line * args.images.positions[1] + at.x;
        for n in 0..N {
            let mut value = s.add(acc[n], bias);
            if !args.addend.is_null() {
                let addend = args.addend.wrapping_add((pixel + n) * args.addend_stride + channel);
                value = s.add(value, load::<S, WHOLE>(s, addend, lanes));
            }
            let value = s.min(most, s.max(least, value));
            let out = args.out.wrapping_add((pixel + n) * args.out_stride + channel);
            if WHOLE { s.store(out, value) } else { s.store_part(out, lanes, value) }
        }
    }
}
