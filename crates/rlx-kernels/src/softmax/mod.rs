//! Softmax of rows.
//!
//! Numeric contract: `e = exp(x * scale - max)`, summed in 16 lanes in order and one combine tree, then `e / sum`. A row
//! whose elements are all minus infinity gives NaN, as the definition does.

#[cfg(test)]
mod tests;

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
use crate::math::{exp, log};

/// Arguments of softmax and log-softmax.
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxArgs {
    /// Input rows.
    pub x: *const f32,
    /// Elements between input rows.
    pub x_stride: usize,
    /// Output rows; may be `x` itself.
    pub y: *mut f32,
    /// Elements between output rows.
    pub y_stride: usize,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Factor of the inputs.
    pub scale: f32,
    /// Rows of one tile.
    pub rows_per_tile: usize,
}

impl SoftmaxArgs {
    /// Number of tiles.
    pub const fn tiles(&self) -> usize {
        self.rows.div_ceil(self.rows_per_tile)
    }
}

/// Instances of softmax.
pub static SOFTMAX: Rows<SoftmaxArgs> = Row::all_of::<SoftmaxF32>();
/// Instances of log-softmax.
pub static LOG_SOFTMAX: Rows<SoftmaxArgs> = Row::all_of::<LogSoftmaxF32>();

/// Softmax for `isa`.
pub fn softmax_entry(isa: Isa) -> Option<Entry<SoftmaxArgs>> {
    select(&SOFTMAX, isa)
}

/// Log-softmax for `isa`.
pub fn log_softmax_entry(isa: Isa) -> Option<Entry<SoftmaxArgs>> {
    select(&LOG_SOFTMAX, isa)
}

macro_rules! kernels {
    ($($name:ident = $op:literal, $log:literal;)*) => {$(
        struct $name;
        impl Kernel for $name {
            type Args = SoftmaxArgs;
            const OP: &'static str = $op;
            const DTYPES: &'static str = "f32";

            #[inline(always)]
            unsafe fn run<S: Simd>(s: S, args: &SoftmaxArgs, tile: usize) {
                let first = tile * args.rows_per_tile;
                for row in first..args.rows.min(first + args.rows_per_tile) {
                    // SAFETY: the caller guarantees the rows.
                    unsafe {
                        let (x, y) = (args.x.add(row * args.x_stride), args.y.add(row * args.y_stride));
                        softmax_row::<S, $log>(s, x, y, args.cols, args.scale);
                    }
                }
            }
        }
    )*};
}

kernels! {
    SoftmaxF32 = "softmax", false;
    LogSoftmaxF32 = "log_softmax", true;
}

#[inline(always)]
unsafe fn softmax_row<S: Simd, const LOG: bool>(s: S, x: *const f32, y: *mut f32, n: usize, scale: f32) {
    let factor = s.splat(scale);
    let lowest = s.splat(f32::NEG_INFINITY);
    // SAFETY: the caller guarantees both rows.
    unsafe {
        let mut top = lowest;
        for i in (0..n).step_by(LANES) {
            let v = s.mul(s.load_to(x.add(i), n - i), factor);
            top = s.max(s.select(s.first((n - i).min(LANES)), v, lowest), top);
        }
        let top = s.splat(s.reduce_max(top));
        let mut sum = s.zero();
        for i in (0..n).step_by(LANES) {
            let v = s.sub(s.mul(s.load_to(x.add(i), n - i), factor), top);
            let e = exp(s, v);
            sum = s.add(sum, s.select(s.first((n - i).min(LANES)), e, s.zero()));
            s.store_to(y.add(i), n - i, if LOG { v } else { e });
        }
        let sum = s.splat(s.reduce_add(sum));
        let sum = if LOG { log(s, sum) } else { sum };
        for i in (0..n).step_by(LANES) {
            let v = s.load_to(y.add(i), n - i);
            s.store_to(y.add(i), n - i, if LOG { s.sub(v, sum) } else { s.div(v, sum) });
        }
    }
}
