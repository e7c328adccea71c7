//! Activations rounded to bf16, as the products of that precision read them.

use crate::isa::{Kernel, LANES, Simd};

/// Rows to round.
pub(super) struct RoundArgs {
    /// `rows` rows of `k` values, `stride` values apart.
    pub x: *const f32,
    pub stride: usize,
    pub rows: usize,
    pub k: usize,
    /// `rows` rows, written, without gaps: of `k` f32, or of `ceil(k / 2)` pairs of bf16.
    pub out: *mut f32,
}

/// Rounds and keeps f32, for fused multiply-adds.
pub(super) struct RoundToF32;

/// Rounds to pairs of bf16, for `vdpbf16ps`; of an odd k, the last pair's second value is zero.
pub(super) struct RoundToPairs;

/// `v` rounded to bf16, to nearest even, denormals kept; a NaN stays one.
#[inline(always)]
fn round<S: Simd>(s: S, v: S::V) -> S::V {
    let bits = s.bits(v);
    let odd = s.iand(s.ishr(bits, 16), s.isplat(1));
    let rounded = s.iadd(s.iadd(bits, s.isplat(0x7fff)), odd);
    let rounded = s.with_bits(s.iand(rounded, s.isplat(!0xffff)));
    s.select(s.is_nan(v), s.splat(f32::NAN), rounded)
}

impl Kernel for RoundToF32 {
    type Args = RoundArgs;
    const OP: &'static str = "linear_round";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &RoundArgs, _tile: usize) {
        for row in 0..args.rows {
            let (x, out) = (args.x.wrapping_add(row * args.stride), args.out.wrapping_add(row * args.k));
            for at in (0..args.k).step_by(LANES) {
                let left = args.k - at;
                // SAFETY: the caller guarantees `k` values of every row.
                unsafe { s.store_to(out.add(at), left, round(s, s.load_to(x.add(at), left))) };
            }
        }
    }
}

impl Kernel for RoundToPairs {
    type Args = RoundArgs;
    const OP: &'static str = "linear_round";
    const DTYPES: &'static str = "bf16";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &RoundArgs, _tile: usize) {
        let width = args.k.next_multiple_of(2);
        for row in 0..args.rows {
            let x = args.x.wrapping_add(row * args.stride);
            let out = args.out.cast::<u16>().wrapping_add(row * width);
            // SAFETY: the caller guarantees `k` values of every row, and `out` as wide as the next even number.
            unsafe {
                for at in (0..args.k).step_by(LANES) {
                    let left = args.k - at;
                    if left >= LANES {
                        s.store_bf16(out.add(at), s.load(x.add(at)));
                    } else {
                        s.store_bf16_part(out.add(at), left, s.load_part(x.add(at), left));
                    }
                }
                if width > args.k {
                    out.add(args.k).write(0);
                }
            }
        }
    }
}
