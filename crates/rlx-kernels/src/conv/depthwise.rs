//! Convolutions of each channel by itself: vectors run over channels, windows are clipped at the ends.
//!
//! Numeric contract: that of the family, but for elements outside the image, which are left out rather than added as zeros.

use super::{ConvLayer, Images};
use crate::gemm::Activation;
use crate::gemm::activation::{Activate, None, Relu, Relu6};
use crate::gemm::epilogue::{Epilogue, EpilogueArgs};
use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
use std::ops::Range;

/// The operands of a depthwise convolution; tile `t` is a block of output lines. Strides are in values, from one pixel to the next.
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
    /// Output lines of a tile.
    pub lines: usize,
}

/// Weights `[groups, 1, window..]` as `[window.., groups]`.
pub fn depthwise_order(layer: &ConvLayer, weights: &[f32]) -> Option<Vec<f32>> {
    let taps = layer.window[0] * layer.window[1];
    if weights.len() != layer.groups * taps {
        return Option::None;
    }
    Some((0..weights.len()).map(|i| weights[i % layer.groups * taps + i / layer.groups]).collect())
}

/// `(tiles, lines of a tile)` for `workers` workers.
pub fn depthwise_tiles(images: &Images, workers: usize) -> (usize, usize) {
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
        // Sixteen lanes of plain code are long already, so they come once.
        let fused = !matches!(S::ISA, Isa::Scalar);
        // SAFETY: passed on to the caller.
        unsafe {
            match args.activation {
                Activation::Relu if fused => lines::<S, Relu, 4>(s, args, tile),
                Activation::Relu6 if fused => lines::<S, Relu6, 4>(s, args, tile),
                _ if fused => lines::<S, None, 4>(s, args, tile),
                _ => lines::<S, None, 1>(s, args, tile),
            }
            if !(fused && matches!(args.activation, Activation::Relu | Activation::Relu6)
                || args.activation == Activation::None)
            {
                s.call::<Epilogue>(&activated(args, tile), 0);
            }
        }
    }
}

/// The lines of a tile as an epilogue sees them that activates them in place.
fn activated(args: &DepthwiseArgs, tile: usize) -> EpilogueArgs {
    let [positions_y, positions_x] = args.images.positions;
    let first = tile * args.lines;
    let end = (first + args.lines).min(args.images.batch * positions_y);
    let out = args.out.wrapping_add(first * positions_x * args.out_stride);
    let none = std::ptr::null();
    EpilogueArgs {
        acc: out,
        acc_stride: args.out_stride,
        rows: (end - first) * positions_x,
        columns: args.layer.groups,
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

/// The lines of a tile, up to `MOST` pixels at a time.
#[inline(always)]
unsafe fn lines<S: Simd, A: Activate, const MOST: usize>(s: S, args: &DepthwiseArgs, tile: usize) {
    let (layer, images) = (&args.layer, &args.images);
    let [positions_y, positions_x] = images.positions;
    let total = images.batch * positions_y;
    for line in tile * args.lines..((tile + 1) * args.lines).min(total) {
        let (image, y) = (line / positions_y, line % positions_y);
        let top = y * layer.strides[0];
        let rows = clip(top, layer.before[0], layer.window[0], layer.dilations[0], images.extents[0]);
        let mut x = 0;
        while x < positions_x {
            let left = x * layer.strides[1];
            let column =
                |at: usize| clip(at, layer.before[1], layer.window[1], layer.dilations[1], images.extents[1]);
            let columns = column(left);
            let whole = 0..layer.window[1];
            let fits = |n: usize| {
                x + n <= positions_x && columns == whole && column(left + (n - 1) * layer.strides[1]) == whole
            };
            let at = At { image, line, top, left, rows: rows.clone(), columns: columns.clone(), x };
            // SAFETY: the caller guarantees the operands; the window's elements named are inside the image.
            unsafe {
                x += if MOST >= 4 && fits(4) {
                    pixels::<S, A, 4>(s, args, &at);
                    4
                } else if MOST >= 2 && fits(2) {
                    pixels::<S, A, 2>(s, args, &at);
                    2
                } else {
                    pixels::<S, A, 1>(s, args, &at);
                    1
                };
            }
        }
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

#[inline(always)]
unsafe fn pixels<S: Simd, A: Activate, const N: usize>(s: S, args: &DepthwiseArgs, at: &At) {
    let channels = args.layer.groups;
    let mut channel = 0;
    // SAFETY: the caller guarantees the pixels, of which these channels are.
    unsafe {
        while channel + LANES <= channels {
            channels_of::<S, A, N, true>(s, args, at, channel, LANES);
            channel += LANES;
        }
        if channel < channels {
            channels_of::<S, A, N, false>(s, args, at, channel, channels - channel);
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd, const WHOLE: bool>(s: S, p: *const f32, lanes: usize) -> S::V {
    // SAFETY: the caller guarantees `lanes` values, 16 if `WHOLE`.
    unsafe { if WHOLE { s.load(p) } else { s.load_part(p, lanes) } }
}

#[inline(always)]
unsafe fn channels_of<S: Simd, A: Activate, const N: usize, const WHOLE: bool>(
    s: S,
    args: &DepthwiseArgs,
    at: &At,
    channel: usize,
    lanes: usize,
) {
    let (layer, images) = (&args.layer, &args.images);
    let step = layer.strides[1] * args.x_stride;
    let mut acc = [s.zero(); N];
    // SAFETY: the caller guarantees that the window's elements named are inside the image, and the operands.
    unsafe {
        for row in at.rows.clone() {
            let y = at.top + row * layer.dilations[0] - layer.before[0];
            let line = (at.image * images.extents[0] + y) * images.extents[1];
            let weights = args.w.wrapping_add(row * layer.window[1] * layer.groups + channel);
            for column in at.columns.clone() {
                let x = at.left + column * layer.dilations[1] - layer.before[1];
                let from = args.x.wrapping_add((line + x) * args.x_stride + channel);
                let weight = load::<S, WHOLE>(s, weights.wrapping_add(column * layer.groups), lanes);
                for n in 0..N {
                    let value = load::<S, WHOLE>(s, from.wrapping_add(n * step), lanes);
                    acc[n] = s.fma(value, weight, acc[n]);
                }
            }
        }
        let bias = match args.bias.is_null() {
            true => s.splat(-0.0),
            false => load::<S, WHOLE>(s, args.bias.wrapping_add(channel), lanes),
        };
        let pixel = at.line * images.positions[1] + at.x;
        for n in 0..N {
            let mut value = s.add(acc[n], bias);
            if !args.addend.is_null() {
                let addend = args.addend.wrapping_add((pixel + n) * args.addend_stride + channel);
                value = s.add(value, load::<S, WHOLE>(s, addend, lanes));
            }
            let out = args.out.wrapping_add((pixel + n) * args.out_stride + channel);
            let value = A::apply(s, value);
            if WHOLE { s.store(out, value) } else { s.store_part(out, lanes, value) }
        }
    }
}
