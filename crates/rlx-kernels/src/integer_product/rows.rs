//! Rows of windows, and results from sums.

use super::pack::WORD;
use crate::conv::{ConvLayer, Images};
use crate::elementwise::codes;
use crate::isa::{Kernel, LANES, Row, Rows, Simd};

/// Gathers the windows of some pixels as rows of codes. Tile 0 is all of them.
pub(super) struct GatherArgs {
    pub layer: ConvLayer,
    pub images: Images,
    /// `[batch, lines, columns, channels]`; pixels are `x_stride` bytes apart.
    pub x: *const u8,
    pub x_stride: usize,
    /// The first pixel of the result, counted over all images, and how many.
    pub first: usize,
    pub count: usize,
    /// The code outside the images.
    pub outside: u8,
    /// What turns codes into those of the kernel.
    pub flip: u8,
    /// Rows, written: each line of a window from a word on, with zeros behind it.
    pub out: *mut u8,
    pub out_stride: usize,
    /// The sum of each row's codes, if they are needed: signed ones, or not.
    pub sums: *mut i32,
    pub signed: bool,
}

/// Instances of the row kernel.
pub(super) static GATHER: Rows<GatherArgs> = Row::all_of::<Gather>();

struct Gather;

/// Copies codes, turned.
#[inline(always)]
unsafe fn copy<S: Simd>(s: S, from: *const u8, to: *mut u8, n: usize, flip: u8) {
    // SAFETY: the caller guarantees `n` bytes of both.
    unsafe {
        if flip == 0 && n >= 8 * LANES {
            std::ptr::copy_nonoverlapping(from, to, n);
            return;
        }
        let (wide, word) = (s.isplat(i32::from_ne_bytes([flip; 4])), u64::from_ne_bytes([flip; 8]));
        let mut i = 0;
        while i + 4 * LANES <= n {
            s.istore(to.add(i).cast(), s.ixor(s.iload(from.add(i).cast()), wide));
            i += 4 * LANES;
        }
        while i + 8 <= n {
            to.add(i).cast::<u64>().write_unaligned(from.add(i).cast::<u64>().read_unaligned() ^ word);
            i += 8;
        }
        while i < n {
            *to.add(i) = *from.add(i) ^ flip;
            i += 1;
        }
    }
}

impl Kernel for Gather {
    type Args = GatherArgs;
    const OP: &'static str = "gather_windows";
    const DTYPES: &'static str = "u8";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &GatherArgs, _tile: usize) {
        let layer = &args.layer;
        let [lines, columns] = args.images.positions;
        let [height, width] = args.images.extents;
        let (channels, outside) = (layer.channels, args.outside ^ args.flip);
        let line_bytes = layer.window[1] * channels;
        let part_bytes = line_bytes.next_multiple_of(WORD);
        // Elements of a window's line follow each other in memory.
        let adjacent = layer.dilations[1] == 1 && args.x_stride == channels;
        let first = args.first;
        let (mut image, mut line, mut column) =
            (first / (lines * columns), first / columns % lines, first % columns);
        for index in 0..args.count {
            let row = args.out.wrapping_add(index * args.out_stride);
            // Where the window starts, counted from the elements in front of the image.
            let (top, left) = (line * layer.strides[0], column * layer.strides[1]);
            // SAFETY: the caller guarantees the images and the rows; windows are clipped to the image.
            unsafe {
                for y in 0..layer.window[0] {
                    let to = row.wrapping_add(y * part_bytes);
                    to.wrapping_add(line_bytes).write_bytes(0, part_bytes - line_bytes);
                    let at = (top + y * layer.dilations[0]).checked_sub(layer.before[0]);
                    let Some(at) = at.filter(|&at| at < height) else {
                        to.write_bytes(outside, line_bytes);
                        continue;
                    };
                    let source = args.x.wrapping_add((image * height + at) * width * args.x_stride);
                    let whole = left >= layer.before[1] && left - layer.before[1] + layer.window[1] <= width;
                    if adjacent && whole {
                        let from = source.wrapping_add((left - layer.before[1]) * channels);
                        copy(s, from, to, line_bytes, args.flip);
                        continue;
                    }
                    if adjacent {
                        let skip = layer.before[1].saturating_sub(left).min(layer.window[1]);
                        let start = (left + skip).saturating_sub(layer.before[1]);
                        let inside = width.saturating_sub(start).min(layer.window[1] - skip);
                        to.write_bytes(outside, skip * channels);
                        let from = source.wrapping_add(start * channels);
                        copy(s, from, to.wrapping_add(skip * channels), inside * channels, args.flip);
                        let rest = to.wrapping_add((skip + inside) * channels);
                        rest.write_bytes(outside, line_bytes - (skip + inside) * channels);
                        continue;
                    }
                    for x in 0..layer.window[1] {
                        let to = to.wrapping_add(x * channels);
                        let at = (left + x * layer.dilations[1]).checked_sub(layer.before[1]);
                        match at.filter(|&at| at < width) {
                            Some(at) => {
                                copy(s, source.wrapping_add(at * args.x_stride), to, channels, args.flip);
                            }
                            None => to.write_bytes(outside, channels),
                        }
                    }
                }
                if !args.sums.is_null() {
                    let mut sum = 0i32;
                    for i in 0..layer.window[0] * part_bytes {
                        let code = *row.add(i);
                        sum += if args.signed { i32::from(code as i8) } else { i32::from(code) };
                    }
                    args.sums.add(index).write(sum);
                }
            }
            column += 1;
            if column == columns {
                (line, column) = (line + 1, 0);
            }
            if line == lines {
                (image, line) = (image + 1, 0);
            }
        }
    }
}

/// What the result holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Sums.
    I32,
    /// `sum * scale + bias`.
    F32,
    /// `round(sum * scale + bias) + zero` within bounds.
    U8,
    /// The same, signed.
    I8,
}

/// Results of a panel's rows from their sums. Tile 0 is all of them.
///
/// Each step is rounded to F32: a product, then a sum, never both at once.
pub(super) struct FinishArgs {
    pub outcome: Outcome,
    /// Rows of `sums_stride` sums.
    pub sums: *const i32,
    pub sums_stride: usize,
    pub rows: usize,
    pub columns: usize,
    /// A number for each column, padded to whole vectors.
    pub scale: *const f32,
    /// The same, or null.
    pub bias: *const f32,
    pub zero: f32,
    pub low: f32,
    pub high: f32,
    /// Rows of results, `out_stride` elements apart.
    pub out: *mut u8,
    pub out_stride: usize,
}

/// Instances of the last step.
pub(super) static FINISH: Rows<FinishArgs> = Row::all_of::<Finish>();

struct Finish;

impl Kernel for Finish {
    type Args = FinishArgs;
    const OP: &'static str = "requantize";
    const DTYPES: &'static str = "i32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &FinishArgs, _tile: usize) {
        let bytes = if matches!(args.outcome, Outcome::I32 | Outcome::F32) { 4 } else { 1 };
        for row in 0..args.rows {
            let out = args.out.wrapping_add(row * args.out_stride * bytes);
            for column in (0..args.columns).step_by(LANES) {
                let left = (args.columns - column).min(LANES);
                // SAFETY: the caller guarantees the rows, with sums, scales and bias padded to whole vectors.
                unsafe {
                    let sum = s.iload(args.sums.add(row * args.sums_stride + column));
                    if args.outcome == Outcome::I32 {
                        s.store_to(out.cast::<f32>().add(column), left, s.with_bits(sum));
                        continue;
                    }
                    let mut y = s.mul(s.to_float(sum), s.load(args.scale.add(column)));
                    if !args.bias.is_null() {
                        y = s.add(y, s.load(args.bias.add(column)));
                    }
                    if args.outcome == Outcome::F32 {
                        s.store_to(out.cast::<f32>().add(column), left, y);
                        continue;
                    }
                    // Bounds are whole numbers, so what is bounded and then rounded is what is rounded and then bounded; the larger of a NaN and
                    // a number is the number.
                    let y = s.min(s.max(y, s.splat(args.low - args.zero)), s.splat(args.high - args.zero));
                    let code = s.iadd(s.to_int(y), s.isplat(args.zero as i32));
                    codes::write_whole(s, out.add(column), args.outcome == Outcome::U8, left, code);
                }
            }
        }
    }
}
