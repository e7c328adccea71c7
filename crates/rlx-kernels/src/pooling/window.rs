//! Pooling over windows of images whose channels are adjacent.
//!
//! Numeric contract: elements in the order of the window, rows first; a mean is their f32 sum divided by their number.

use crate::conv::{ConvLayer, Images, clip};
use crate::elementwise::codes;
use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};

/// What stands for a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowPooling {
    /// Its largest element; NaN if any is NaN.
    Max,
    /// The mean of its elements inside the image.
    Mean,
    /// The sum of its elements inside the image by the number of those within the image and what is added at its ends.
    MeanOfAll,
}

/// What is pooled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowValues {
    /// 32-bit floats.
    F32,
    /// Bytes, by their largest; a window outside the image gives the smallest.
    U8,
    /// The same with a sign.
    I8,
}

/// Arguments of pooling; tile `t` is a block of output lines. Strides are in values, from one pixel to the next.
#[derive(Clone, Copy, Debug)]
pub struct WindowArgs {
    /// How.
    pub pooling: WindowPooling,
    /// The window; groups, channels and outputs are not read.
    pub layer: ConvLayer,
    /// Sizes.
    pub images: Images,
    /// Channels.
    pub channels: usize,
    /// What the values are.
    pub values: WindowValues,
    /// `[batch, lines, columns, channels]`.
    pub x: *const u8,
    /// Pixel stride of `x`.
    pub x_stride: usize,
    /// As `x` at each position, written.
    pub out: *mut u8,
    /// Pixel stride of `out`.
    pub out_stride: usize,
    /// Output lines of a tile.
    pub lines: usize,
}

static WINDOW: Rows<WindowArgs> = Row::all_of::<Window>();

/// Pooling for `isa`.
pub fn window_entry(isa: Isa) -> Option<Entry<WindowArgs>> {
    select(&WINDOW, isa)
}

struct Window;

impl Kernel for Window {
    type Args = WindowArgs;
    const OP: &'static str = "pool_window";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &WindowArgs, tile: usize) {
        let images = &args.images;
        let total = images.batch * images.positions[0];
        for line in tile * args.lines..((tile + 1) * args.lines).min(total) {
            // SAFETY: the caller guarantees the images.
            unsafe {
                match args.pooling {
                    WindowPooling::Max => pool_line::<S, true>(s, args, line),
                    _ => pool_line::<S, false>(s, args, line),
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn pool_line<S: Simd, const MAX: bool>(s: S, args: &WindowArgs, line: usize) {
    let (layer, images) = (&args.layer, &args.images);
    let (image, y) = (line / images.positions[0], line % images.positions[0]);
    let see = |axis: usize, at: usize, extent: usize| {
        clip(at, layer.before[axis], layer.window[axis], layer.dilations[axis], extent)
    };
    let all = |axis: usize, at: usize| {
        clip(
            at,
            0,
            layer.window[axis],
            layer.dilations[axis],
            images.extents[axis] + layer.before[axis] + layer.after[axis],
        )
        .len()
    };
    let top = y * layer.strides[0];
    let rows = see(0, top, images.extents[0]);
    let least = match args.values {
        WindowValues::F32 => f32::NEG_INFINITY,
        WindowValues::U8 => 0.0,
        WindowValues::I8 => -128.0,
    };
    for x in 0..images.positions[1] {
        let left = x * layer.strides[1];
        let columns = see(1, left, images.extents[1]);
        let count = match args.pooling {
            WindowPooling::MeanOfAll => all(0, top) * all(1, left),
            _ => rows.len() * columns.len(),
        };
        let divisor = s.splat(count as f32);
        let out = (line * images.positions[1] + x) * args.out_stride;
        for channel in (0..args.channels).step_by(LANES) {
            let lanes = args.channels - channel;
            let mut acc = if MAX { s.splat(least) } else { s.zero() };
            for row in rows.clone() {
                let from_y = top + row * layer.dilations[0] - layer.before[0];
                let start = (image * images.extents[0] + from_y) * images.extents[1];
                for column in columns.clone() {
                    let from_x = left + column * layer.dilations[1] - layer.before[1];
                    let from = (start + from_x) * args.x_stride + channel;
                    // SAFETY: the caller guarantees the image; the element is inside it.
                    let v = unsafe {
                        match args.values {
                            WindowValues::F32 => s.load_to(args.x.cast::<f32>().add(from), lanes),
                            kind => {
                                codes::read(s, args.x.add(from), kind == WindowValues::U8, lanes.min(LANES))
                            }
                        }
                    };
                    acc = match MAX {
                        true => s.select(s.is_nan(v), v, s.max(v, acc)),
                        false => s.add(acc, v),
                    };
                }
            }
            let value = if MAX { acc } else { s.div(acc, divisor) };
            // SAFETY: the caller guarantees the result.
            unsafe {
                match args.values {
                    WindowValues::F32 => s.store_to(args.out.cast::<f32>().add(out + channel), lanes, value),
                    kind => {
                        let unsigned = kind == WindowValues::U8;
                        codes::write(s, args.out.add(out + channel), unsigned, lanes.min(LANES), value);
                    }
                }
            }
        }
    }
}
