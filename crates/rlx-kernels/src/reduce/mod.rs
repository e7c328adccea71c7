//! Reductions over one axis, running sums and counters.
//!
//! Numeric contract, f32: along a contiguous axis, four vectors of lanes in turn, combined `(0, 1), (2, 3)` and by the
//! tree of [`Simd::reduce_add`]; along a strided axis, one accumulator per output in order. NaN spreads through maximum
//! and minimum.

mod scan;
#[cfg(test)]
mod tests;

use crate::elementwise::IntegerType;
use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
pub use scan::{CUMSUM, CumsumArgs, IOTA, IotaArgs, NumberType, cumsum_entry, iota_entry};

/// How elements combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// Sum.
    Sum,
    /// Sum divided by the number of elements.
    Mean,
    /// Largest.
    Max,
    /// Smallest.
    Min,
    /// Product.
    Prod,
}

/// Arguments of a reduction of `[outer][axis][inner]` to `[outer][inner]`, contiguous.
#[derive(Clone, Copy, Debug)]
pub struct ReduceArgs {
    /// How elements combine.
    pub op: ReduceOp,
    /// Element `[o][a][i]` at `o * outer_stride + a * axis_stride + i`.
    pub x: *const f32,
    /// Elements between outer steps.
    pub outer_stride: usize,
    /// Elements between steps of the axis.
    pub axis_stride: usize,
    /// Outer extent.
    pub outer: usize,
    /// Extent of the axis.
    pub axis: usize,
    /// Inner extent; 1 when the axis is the last (then `axis_stride` is 1).
    pub inner: usize,
    /// Output.
    pub out: *mut f32,
    /// Outer steps of one tile.
    pub outer_per_tile: usize,
}

impl ReduceArgs {
    /// Number of tiles.
    pub const fn tiles(&self) -> usize {
        self.outer.div_ceil(self.outer_per_tile)
    }
}

/// Arguments of an integer reduction, as [`ReduceArgs`]; sums and products wrap, a mean is the truncated quotient.
#[derive(Clone, Copy, Debug)]
pub struct IntegerReduceArgs {
    /// How elements combine.
    pub op: ReduceOp,
    /// Type of the elements.
    pub dtype: IntegerType,
    /// As in [`ReduceArgs`].
    pub x: *const u8,
    /// Elements between outer steps.
    pub outer_stride: usize,
    /// Elements between steps of the axis.
    pub axis_stride: usize,
    /// Outer extent.
    pub outer: usize,
    /// Extent of the axis.
    pub axis: usize,
    /// Inner extent.
    pub inner: usize,
    /// Output.
    pub out: *mut u8,
}

/// Instances of the f32 reduction.
pub static REDUCE: Rows<ReduceArgs> = Row::all_of::<ReduceF32>();
/// Instances of the integer reduction: tile `o` is outer step `o`.
pub static REDUCE_INTEGER: Rows<IntegerReduceArgs> = Row::all_of::<ReduceInteger>();

/// The f32 reduction for `isa`.
pub fn reduce_entry(isa: Isa) -> Option<Entry<ReduceArgs>> {
    select(&REDUCE, isa)
}

/// The integer reduction for `isa`.
pub fn reduce_integer_entry(isa: Isa) -> Option<Entry<IntegerReduceArgs>> {
    select(&REDUCE_INTEGER, isa)
}

const fn identity(op: ReduceOp) -> f32 {
    match op {
        ReduceOp::Sum | ReduceOp::Mean => 0.0,
        ReduceOp::Max => f32::NEG_INFINITY,
        ReduceOp::Min => f32::INFINITY,
        ReduceOp::Prod => 1.0,
    }
}

#[inline(always)]
fn combine<S: Simd>(s: S, op: ReduceOp, acc: S::V, x: S::V) -> S::V {
    match op {
        ReduceOp::Sum | ReduceOp::Mean => s.add(acc, x),
        ReduceOp::Max => s.select(s.is_nan(x), x, s.max(x, acc)),
        ReduceOp::Min => s.select(s.is_nan(x), x, s.min(x, acc)),
        ReduceOp::Prod => s.mul(acc, x),
    }
}

#[inline(always)]
fn combine_lanes<S: Simd>(s: S, op: ReduceOp, v: S::V) -> f32 {
    let mut lanes = [0.0f32; LANES];
    // SAFETY: the array holds 16 values.
    unsafe { s.store(lanes.as_mut_ptr(), v) };
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            let (a, b) = (lanes[i], lanes[i + width]);
            lanes[i] = match op {
                ReduceOp::Sum | ReduceOp::Mean => a + b,
                ReduceOp::Max => {
                    if b.is_nan() || b > a {
                        b
                    } else {
                        a
                    }
                }
                ReduceOp::Min => {
                    if b.is_nan() || b < a {
                        b
                    } else {
                        a
                    }
                }
                ReduceOp::Prod => a * b,
            };
        }
        width /= 2;
    }
    lanes[0]
}

struct ReduceF32;

impl Kernel for ReduceF32 {
    type Args = ReduceArgs;
    const OP: &'static str = "reduce";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &ReduceArgs, tile: usize) {
        let first = tile * args.outer_per_tile;
        let divisor = args.axis as f32;
        for o in first..args.outer.min(first + args.outer_per_tile) {
            // SAFETY: the caller guarantees the operands.
            unsafe {
                let x = args.x.add(o * args.outer_stride);
                let out = args.out.add(o * args.inner);
                if args.inner == 1 && args.axis_stride == 1 {
                    let y = reduce_row(s, args.op, x, args.axis);
                    *out = if args.op == ReduceOp::Mean { y / divisor } else { y };
                    continue;
                }
                for i in (0..args.inner).step_by(LANES) {
                    let left = args.inner - i;
                    let mut acc = s.splat(identity(args.op));
                    for a in 0..args.axis {
                        acc = combine(s, args.op, acc, s.load_to(x.add(a * args.axis_stride + i), left));
                    }
                    if args.op == ReduceOp::Mean {
                        acc = s.div(acc, s.splat(divisor));
                    }
                    s.store_to(out.add(i), left, acc);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn reduce_row<S: Simd>(s: S, op: ReduceOp, x: *const f32, n: usize) -> f32 {
    let start = s.splat(identity(op));
    let mut acc = [start; 4];
    let mut i = 0;
    // SAFETY: the caller guarantees the row.
    unsafe {
        while i < n {
            for k in 0..4 {
                let at = i + k * LANES;
                if at < n {
                    let left = (n - at).min(LANES);
                    let v = s.select(s.first(left), s.load_to(x.add(at), left), start);
                    acc[k] = combine(s, op, acc[k], v);
                }
            }
            i += 4 * LANES;
        }
    }
    let low = combine(s, op, acc[0], acc[1]);
    let high = combine(s, op, acc[2], acc[3]);
    combine_lanes(s, op, combine(s, op, low, high))
}

struct ReduceInteger;

impl Kernel for ReduceInteger {
    type Args = IntegerReduceArgs;
    const OP: &'static str = "reduce";
    const DTYPES: &'static str = "int";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &IntegerReduceArgs, tile: usize) {
        // SAFETY: the caller guarantees the operands.
        unsafe {
            match args.dtype {
                IntegerType::I32 => reduce_integers::<i32>(args, tile),
                IntegerType::I64 => reduce_integers::<i64>(args, tile),
                IntegerType::U8 => reduce_integers::<u8>(args, tile),
            }
        }
    }
}

trait Whole: Copy {
    const LOWEST: i64;
    const HIGHEST: i64;
    fn widen(self) -> i64;
    fn narrow(x: i64) -> Self;
}

macro_rules! whole {
    ($($t:ty),*) => {$(
        impl Whole for $t {
            const LOWEST: i64 = <$t>::MIN as i64;
            const HIGHEST: i64 = <$t>::MAX as i64;
            #[inline(always)]
            fn widen(self) -> i64 {
                self as i64
            }
            #[inline(always)]
            fn narrow(x: i64) -> $t {
                x as $t
            }
        }
    )*};
}

whole!(i32, i64, u8);

#[inline(never)]
unsafe fn reduce_integers<T: Whole>(args: &IntegerReduceArgs, o: usize) {
    for i in 0..args.inner {
        let mut acc = match args.op {
            ReduceOp::Sum | ReduceOp::Mean => 0,
            ReduceOp::Max => T::LOWEST,
            ReduceOp::Min => T::HIGHEST,
            ReduceOp::Prod => 1,
        };
        // SAFETY: the caller guarantees the operands.
        unsafe {
            let x = args.x.cast::<T>().add(o * args.outer_stride + i);
            for a in 0..args.axis {
                let v = (*x.add(a * args.axis_stride)).widen();
                acc = match args.op {
                    ReduceOp::Sum | ReduceOp::Mean => acc.wrapping_add(v),
                    ReduceOp::Max => acc.max(v),
                    ReduceOp::Min => acc.min(v),
                    ReduceOp::Prod => acc.wrapping_mul(v),
                };
            }
            if args.op == ReduceOp::Mean && args.axis > 0 {
                acc /= args.axis as i64;
            }
            args.out.cast::<T>().add(o * args.inner + i).write(T::narrow(acc));
        }
    }
}
