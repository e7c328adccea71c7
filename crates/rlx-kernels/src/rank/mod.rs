//! Largest elements of rows: arg-max and top-k. Ties go to the lowest index.

#[cfg(test)]
mod tests;

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};

/// Arguments of arg-max; tile `r` is row `r`. A NaN counts as the largest, as in NumPy.
#[derive(Clone, Copy, Debug)]
pub struct ArgmaxArgs {
    /// Input rows.
    pub x: *const f32,
    /// Elements between input rows.
    pub x_stride: usize,
    /// Elements of a row, at least 1.
    pub cols: usize,
    /// One index per row.
    pub out: *mut i32,
}

/// Arguments of top-k; tile `r` is row `r`. Values descend; a NaN counts as the largest.
#[derive(Clone, Copy, Debug)]
pub struct TopKArgs {
    /// Input rows.
    pub x: *const f32,
    /// Elements between input rows.
    pub x_stride: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Elements wanted, 1 to `cols`; meant to be small.
    pub k: usize,
    /// `k` values per row.
    pub values: *mut f32,
    /// `k` indices per row.
    pub indices: *mut i32,
}

/// Instances of arg-max.
pub static ARGMAX: Rows<ArgmaxArgs> = Row::all_of::<ArgmaxF32>();
/// Instances of top-k.
pub static TOP_K: Rows<TopKArgs> = Row::all_of::<TopKF32>();

/// Arg-max for `isa`.
pub fn argmax_entry(isa: Isa) -> Option<Entry<ArgmaxArgs>> {
    select(&ARGMAX, isa)
}

/// Top-k for `isa`.
pub fn top_k_entry(isa: Isa) -> Option<Entry<TopKArgs>> {
    select(&TOP_K, isa)
}

struct ArgmaxF32;

impl Kernel for ArgmaxF32 {
    type Args = ArgmaxArgs;
    const OP: &'static str = "argmax";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &ArgmaxArgs, tile: usize) {
        // SAFETY: the caller guarantees the row.
        unsafe {
            let x = args.x.add(tile * args.x_stride);
            let lowest = s.splat(f32::NEG_INFINITY);
            let mut top = lowest;
            for i in (0..args.cols).step_by(LANES) {
                let v = s.load_to(x.add(i), args.cols - i);
                let v = s.select(s.first((args.cols - i).min(LANES)), v, lowest);
                top = s.select(s.is_nan(v), s.splat(f32::INFINITY), s.max(v, top));
                if s.any(s.is_nan(v)) {
                    *args.out.add(tile) = (i..args.cols).find(|j| (*x.add(*j)).is_nan()).unwrap_or(0) as i32;
                    return;
                }
            }
            let top = s.reduce_max(top);
            let wanted = s.splat(top);
            let mut found = 0;
            for i in (0..args.cols).step_by(LANES) {
                let v = s.load_to(x.add(i), args.cols - i);
                let hit = s.and(s.eq(v, wanted), s.first((args.cols - i).min(LANES)));
                if s.any(hit) {
                    found = (i..args.cols).find(|j| *x.add(*j) == top).unwrap_or(0);
                    break;
                }
            }
            *args.out.add(tile) = found as i32;
        }
    }
}

struct TopKF32;

impl Kernel for TopKF32 {
    type Args = TopKArgs;
    const OP: &'static str = "top_k";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &TopKArgs, tile: usize) {
        // SAFETY: the caller guarantees the row and the outputs.
        unsafe {
            let x = args.x.add(tile * args.x_stride);
            top_of_row(
                s,
                x,
                args.cols,
                args.k,
                args.values.add(tile * args.k),
                args.indices.add(tile * args.k),
            );
        }
    }
}

/// The `k <= n` largest of a row, descending, ties to the lowest index.
///
/// # Safety
/// `x` is valid for `n` reads, the outputs for `k` writes.
#[inline(always)]
pub(crate) unsafe fn top_of_row<S: Simd>(
    s: S,
    x: *const f32,
    n: usize,
    k: usize,
    values: *mut f32,
    indices: *mut i32,
) {
    let mut held = 0;
    // SAFETY: the caller guarantees the row and the outputs; at most `k` are held.
    unsafe {
        for i in (0..n).step_by(LANES) {
            if held == k {
                let v = s.load_to(x.add(i), n - i);
                let better = s.or(s.lt(s.splat(*values.add(k - 1)), v), s.is_nan(v));
                if !s.any(better) {
                    continue;
                }
            }
            for j in i..n.min(i + LANES) {
                let v = *x.add(j);
                let mut at = held.min(k - 1);
                if held == k && !precedes(v, *values.add(at)) {
                    continue;
                }
                while at > 0 && precedes(v, *values.add(at - 1)) {
                    *values.add(at) = *values.add(at - 1);
                    *indices.add(at) = *indices.add(at - 1);
                    at -= 1;
                }
                *values.add(at) = v;
                *indices.add(at) = j as i32;
                held = (held + 1).min(k);
            }
        }
    }
}

#[inline(always)]
fn precedes(a: f32, b: f32) -> bool {
    a > b || (a.is_nan() && !b.is_nan())
}
