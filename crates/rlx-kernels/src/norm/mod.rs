//! Normalisation of rows: layer norm, RMS norm and L2, with an optional residual added first.
//!
//! Numeric contract: sums use four vectors of lanes in turn and one combine tree; variance is taken around the mean in
//! a second pass. Each row is computed alone, so its bits do not depend on the others.

#[cfg(test)]
mod tests;

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};

/// Arguments of the norms. A row has `groups` runs of `cols` elements (the heads of a query, say; 1 for a whole row),
/// run `g` at `g * group_stride`; each run is normalised by itself. Strides are in elements.
#[derive(Clone, Copy, Debug)]
pub struct NormArgs {
    /// Input rows.
    pub x: *const f32,
    /// Elements between input rows.
    pub x_stride: usize,
    /// Added to the input before normalising; null for none.
    pub residual: *const f32,
    /// Elements between residual rows.
    pub residual_stride: usize,
    /// Where `x + residual` is stored; null if not wanted. May be `x` or `residual` itself.
    pub sum: *mut f32,
    /// Elements between rows of `sum`.
    pub sum_stride: usize,
    /// Output rows; may be `x` itself.
    pub y: *mut f32,
    /// Elements between output rows.
    pub y_stride: usize,
    /// `cols` factors; null for none.
    pub weight: *const f32,
    /// Added to every factor: 1 where checkpoints store `weight - 1`.
    pub weight_offset: f32,
    /// `cols` terms; null for none.
    pub bias: *const f32,
    /// Rows.
    pub rows: usize,
    /// Runs per row.
    pub groups: usize,
    /// Elements between the runs of a row, in every operand.
    pub group_stride: usize,
    /// Elements of a run.
    pub cols: usize,
    /// Added to the variance or mean square; for L2, the least divisor.
    pub eps: f32,
    /// Rows of one tile.
    pub rows_per_tile: usize,
}

impl NormArgs {
    /// Number of tiles.
    pub const fn tiles(&self) -> usize {
        self.rows.div_ceil(self.rows_per_tile)
    }
}

/// Instances of layer norm: `(x - mean) / sqrt(variance + eps) * weight + bias`.
pub static LAYER_NORM: Rows<NormArgs> = Row::all_of::<LayerNormF32>();
/// Instances of RMS norm: `x / sqrt(mean(x^2) + eps) * (weight + offset)`.
pub static RMS_NORM: Rows<NormArgs> = Row::all_of::<RmsNormF32>();
/// Instances of L2: `x / max(sqrt(sum(x^2)), eps)`.
pub static L2_NORM: Rows<NormArgs> = Row::all_of::<L2NormF32>();

/// Layer norm for `isa`.
pub fn layer_norm_entry(isa: Isa) -> Option<Entry<NormArgs>> {
    select(&LAYER_NORM, isa)
}

/// RMS norm for `isa`.
pub fn rms_norm_entry(isa: Isa) -> Option<Entry<NormArgs>> {
    select(&RMS_NORM, isa)
}

/// L2 normalisation for `isa`.
pub fn l2_norm_entry(isa: Isa) -> Option<Entry<NormArgs>> {
    select(&L2_NORM, isa)
}

macro_rules! kernels {
    ($($name:ident = $op:literal, $centred:literal, $scale:expr;)*) => {$(
        struct $name;
        impl Kernel for $name {
            type Args = NormArgs;
            const OP: &'static str = $op;
            const DTYPES: &'static str = "f32";

            #[inline(always)]
            unsafe fn run<S: Simd>(s: S, args: &NormArgs, tile: usize) {
                let first = tile * args.rows_per_tile;
                for row in first..args.rows.min(first + args.rows_per_tile) {
                    for group in 0..args.groups {
                        // SAFETY: the caller guarantees the operands of `NormArgs`.
                        unsafe { normalise::<S, $centred>(s, args, row, group * args.group_stride, $scale) }
                    }
                }
            }
        }
    )*};
}

kernels! {
    LayerNormF32 = "layer_norm", true, |squares, n, eps| 1.0 / (squares / n + eps).sqrt();
    RmsNormF32 = "rms_norm", false, |squares, n, eps| 1.0 / (squares / n + eps).sqrt();
    L2NormF32 = "l2_norm", false, |squares, _, eps| 1.0 / squares.sqrt().max(eps);
}

/// Scale of a run from its sum of squares, its length and `eps`.
type Scale = fn(f32, f32, f32) -> f32;

#[inline(always)]
unsafe fn normalise<S: Simd, const CENTRED: bool>(
    s: S,
    args: &NormArgs,
    row: usize,
    at: usize,
    scale: Scale,
) {
    let n = args.cols;
    // SAFETY: the caller guarantees the operands of `NormArgs`.
    unsafe {
        let mut x = args.x.add(row * args.x_stride + at);
        let y = args.y.add(row * args.y_stride + at);
        if !args.residual.is_null() {
            let residual = args.residual.add(row * args.residual_stride + at);
            // Without a place for the sum it lives in the output, which is written last.
            let sum = if args.sum.is_null() { y } else { args.sum.add(row * args.sum_stride + at) };
            for i in (0..n).step_by(LANES) {
                s.store_to(
                    sum.add(i),
                    n - i,
                    s.add(s.load_to(x.add(i), n - i), s.load_to(residual.add(i), n - i)),
                );
            }
            x = sum;
        }
        let mean = if CENTRED { sum_of(s, x, n) / n as f32 } else { 0.0 };
        let factor = s.splat(scale(sum_of_squares(s, x, n, mean), n as f32, args.eps));
        let (mean, offset) = (s.splat(mean), s.splat(args.weight_offset));
        for i in (0..n).step_by(LANES) {
            let left = n - i;
            let mut v = s.load_to(x.add(i), left);
            if CENTRED {
                v = s.sub(v, mean);
            }
            v = s.mul(v, factor);
            if !args.weight.is_null() {
                let weight = s.add(s.load_to(args.weight.add(i), left), offset);
                v = if args.bias.is_null() {
                    s.mul(v, weight)
                } else {
                    s.fma(v, weight, s.load_to(args.bias.add(i), left))
                };
            } else if !args.bias.is_null() {
                v = s.add(v, s.load_to(args.bias.add(i), left));
            }
            s.store_to(y.add(i), left, v);
        }
    }
}

/// The sum of a row: four vectors of lanes in turn, added as `(0 + 1) + (2 + 3)`, then [`Simd::reduce_add`].
///
/// # Safety
/// `x` is valid for `n` reads.
#[inline(always)]
pub unsafe fn sum_of<S: Simd>(s: S, x: *const f32, n: usize) -> f32 {
    let mut acc = [s.zero(); 4];
    let whole = n - n % (4 * LANES);
    // SAFETY: the caller guarantees the row.
    unsafe {
        for i in (0..whole).step_by(4 * LANES) {
            for k in 0..4 {
                acc[k] = s.add(acc[k], s.load(x.add(i + k * LANES)));
            }
        }
        for k in 0..4 {
            let i = whole + k * LANES;
            if i < n {
                acc[k] = s.add(acc[k], s.load_to(x.add(i), n - i));
            }
        }
    }
    s.reduce_add(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])))
}

/// The sum of `(x - mean)^2`, in the order of [`sum_of`].
#[inline(always)]
unsafe fn sum_of_squares<S: Simd>(s: S, x: *const f32, n: usize, mean: f32) -> f32 {
    let mut acc = [s.zero(); 4];
    let centre = s.splat(mean);
    let whole = n - n % (4 * LANES);
    // SAFETY: the caller guarantees the row.
    unsafe {
        for i in (0..whole).step_by(4 * LANES) {
            for k in 0..4 {
                let v = s.sub(s.load(x.add(i + k * LANES)), centre);
                acc[k] = s.fma(v, v, acc[k]);
            }
        }
        for k in 0..4 {
            let i = whole + k * LANES;
            if i < n {
                let v = s.sub(s.load_to(x.add(i), n - i), centre);
                let v = s.select(s.first((n - i).min(LANES)), v, s.zero());
                acc[k] = s.fma(v, v, acc[k]);
            }
        }
    }
    s.reduce_add(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])))
}
