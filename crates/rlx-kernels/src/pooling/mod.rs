//! Pooling: of ragged rows, one row per sequence; of windows of images.

#[cfg(test)]
mod tests;
mod window;

pub use window::{WindowArgs, WindowPooling, WindowValues, window_entry};

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};

/// How the rows of a sequence become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Sum in row order divided by the number of rows.
    Mean,
    /// Sum in row order divided by the square root of the number of rows.
    MeanSqrt,
    /// The first row.
    First,
    /// The last row.
    Last,
    /// The largest of each column.
    Max,
}

/// Arguments of pooling; tile `b` is sequence `b`. A sequence without rows gives zeros.
#[derive(Clone, Copy, Debug)]
pub struct PoolArgs {
    /// How the rows of a sequence become one.
    pub pooling: Pooling,
    /// Input rows.
    pub x: *const f32,
    /// Elements between input rows.
    pub x_stride: usize,
    /// `batch + 1` ascending row numbers.
    pub seq_starts: *const i32,
    /// Sequences.
    pub batch: usize,
    /// Elements of a row.
    pub cols: usize,
    /// One row per sequence.
    pub out: *mut f32,
    /// Elements between output rows.
    pub out_stride: usize,
}

/// Instances of pooling.
pub static POOL: Rows<PoolArgs> = Row::all_of::<PoolF32>();

/// Pooling for `isa`.
pub fn pool_entry(isa: Isa) -> Option<Entry<PoolArgs>> {
    select(&POOL, isa)
}

struct PoolF32;

impl Kernel for PoolF32 {
    type Args = PoolArgs;
    const OP: &'static str = "pool";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &PoolArgs, tile: usize) {
        // SAFETY: the caller guarantees the rows and the starts.
        unsafe {
            let (start, end) = (*args.seq_starts.add(tile) as usize, *args.seq_starts.add(tile + 1) as usize);
            let rows = end - start;
            let (first, taken) = match args.pooling {
                Pooling::First => (start, rows.min(1)),
                Pooling::Last => (end - rows.min(1), rows.min(1)),
                _ => (start, rows),
            };
            let divisor = s.splat(match args.pooling {
                Pooling::Mean => rows.max(1) as f32,
                Pooling::MeanSqrt => (rows.max(1) as f32).sqrt(),
                _ => 1.0,
            });
            for i in (0..args.cols).step_by(LANES) {
                let left = args.cols - i;
                let mut acc = s.zero();
                for r in 0..taken {
                    let v = s.load_to(args.x.add((first + r) * args.x_stride + i), left);
                    acc = match args.pooling {
                        _ if r == 0 => v,
                        Pooling::Max => s.select(s.is_nan(v), v, s.max(v, acc)),
                        _ => s.add(acc, v),
                    };
                }
                s.store_to(args.out.add(tile * args.out_stride + i), left, s.div(acc, divisor));
            }
        }
    }
}
