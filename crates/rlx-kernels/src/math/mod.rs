//! Elementary functions of vectors of f32 lanes.
//!
//! Errors, measured over dense samples against f64: [`exp`] and [`exp2`] 1.5 ulp, [`log`] 2 ulp, [`tanh`] and [`erf`] 3 ulp,
//! [`sigmoid`] 3 ulp. Denormal results are kept, `exp` overflows to infinity and gives 0 at minus infinity, a NaN stays
//! a NaN. Polynomials are weighted minimax fits.

#[cfg(test)]
mod tests;

use crate::isa::{Isa, Simd};

/// `c[0] + c[1] x + c[2] x^2 + ...` by Horner's rule with fused steps.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::V, c: [f32; N]) -> S::V {
    let mut y = s.splat(c[N - 1]);
    for i in (0..N - 1).rev() {
        y = s.fma(y, x, s.splat(c[i]));
    }
    y
}

/// Keeps scalar code small; vector code must stay inside the function that has its features.
#[inline(never)]
fn out_of_line<S: Simd>(s: S, x: S::V, f: impl Fn(S, S::V) -> S::V) -> S::V {
    f(s, x)
}

const EXP: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_46, 0.008_368_892, 0.001_381_076_2];
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// `e^x`.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    if matches!(S::ISA, Isa::Scalar) { out_of_line(s, x, exp_here) } else { exp_here(s, x) }
}

#[inline(always)]
fn exp_here<S: Simd>(s: S, x: S::V) -> S::V {
    // This order of operands keeps a NaN. Beyond the limits the result is 0 or infinity by rounding.
    let x = s.max(s.splat(-104.0), s.min(s.splat(88.8), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fnma(n, s.splat(LN2_HIGH), x);
    let r = s.fnma(n, s.splat(LN2_LOW), r);
    let p = polynomial(s, r, EXP);
    let y = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    s.scale_by_power(y, n)
}

const EXP2: [f32; 6] =
    [std::f32::consts::LN_2, 0.240_226_48, 0.055_503_324, 0.009_618_437, 0.001_339_888, 0.000_153_533_77];

/// `2^x` for `x` up to 127: exactly 1 at zero, 0 at minus infinity.
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    if matches!(S::ISA, Isa::Scalar) { out_of_line(s, x, exp2_here) } else { exp2_here(s, x) }
}

#[inline(always)]
fn exp2_here<S: Simd>(s: S, x: S::V) -> S::V {
    // This order of operands keeps a NaN. Below the limit the result is 0 by rounding.
    let x = s.max(s.splat(-151.0), x);
    let n = s.round(x);
    let r = s.sub(x, n);
    let y = s.fma(r, polynomial(s, r, EXP2), s.splat(1.0));
    s.scale_by_power(y, n)
}

/// [`exp2`] of several vectors, a step of all before the next, so that their latencies overlap; the same bits.
#[inline(always)]
pub fn exp2_of_all<S: Simd, const V: usize, const N: usize>(s: S, x: [[S::V; V]; N]) -> [[S::V; V]; N] {
    let (mut r, mut y) = (x, x);
    let mut n = x;
    if matches!(S::ISA, Isa::Scalar) {
        for i in 0..N {
            for v in 0..V {
                y[i][v] = exp2(s, x[i][v]);
            }
        }
        return y;
    }
    for i in 0..N {
        for v in 0..V {
            r[i][v] = s.max(s.splat(-151.0), x[i][v]);
            n[i][v] = s.round(r[i][v]);
        }
    }
    for i in 0..N {
        for v in 0..V {
            r[i][v] = s.sub(r[i][v], n[i][v]);
            y[i][v] = s.splat(EXP2[EXP2.len() - 1]);
        }
    }
    for c in (0..EXP2.len() - 1).rev() {
        for i in 0..N {
            for v in 0..V {
                y[i][v] = s.fma(y[i][v], r[i][v], s.splat(EXP2[c]));
            }
        }
    }
    for i in 0..N {
        for v in 0..V {
            y[i][v] = s.fma(r[i][v], y[i][v], s.splat(1.0));
        }
    }
    for i in 0..N {
        for v in 0..V {
            y[i][v] = s.scale_by_power(y[i][v], n[i][v]);
        }
    }
    y
}

const LOG: [f32; 8] = [
    0.333_333_3,
    -0.250_008_37,
    0.200_012_7,
    -0.166_227_58,
    0.142_001_97,
    -0.131_647_29,
    0.127_759_81,
    -0.076_409_2,
];

/// Natural logarithm: minus infinity at zero, NaN below.
#[inline(always)]
pub fn log<S: Simd>(s: S, x: S::V) -> S::V {
    let tiny = s.lt(x, s.splat(f32::MIN_POSITIVE));
    let scaled = s.select(tiny, s.mul(x, s.splat(8_388_608.0)), x);
    let bits = s.bits(scaled);
    // Moves the mantissa to [sqrt(1/2), sqrt(2)).
    let shifted = s.isub(bits, s.isplat(0x3f35_04f3));
    let exponent = s.to_float(s.isar(shifted, 23));
    let exponent = s.select(tiny, s.sub(exponent, s.splat(23.0)), exponent);
    let mantissa = s.isub(bits, s.iand(shifted, s.isplat(0xff80_0000u32 as i32)));
    let f = s.sub(s.with_bits(mantissa), s.splat(1.0));
    let f2 = s.mul(f, f);
    let p = polynomial(s, f, LOG);
    let low = s.fma(exponent, s.splat(LN2_LOW), s.mul(s.mul(f2, f), p));
    let low = s.fnma(s.splat(0.5), f2, low);
    let y = s.fma(exponent, s.splat(LN2_HIGH), s.add(f, low));
    let infinity = s.splat(f32::INFINITY);
    let y = s.select(s.eq(x, infinity), infinity, y);
    let y = s.select(s.eq(x, s.zero()), s.splat(f32::NEG_INFINITY), y);
    s.select(s.le(s.zero(), x), y, s.splat(f32::NAN))
}

const TANH: [f32; 6] =
    [-0.333_333_3, 0.133_332_04, -0.053_946_514, 0.021_699_29, -0.008_173_79, 0.002_139_57];

/// Hyperbolic tangent.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    if matches!(S::ISA, Isa::Scalar) { out_of_line(s, x, tanh_here) } else { tanh_here(s, x) }
}

#[inline(always)]
fn tanh_here<S: Simd>(s: S, x: S::V) -> S::V {
    let a = s.abs(x);
    let a2 = s.mul(a, a);
    let small = s.fma(s.mul(a, a2), polynomial(s, a2, TANH), a);
    let e = exp(s, s.add(a, a));
    let one = s.splat(1.0);
    let large = s.sub(one, s.div(s.splat(2.0), s.add(e, one)));
    s.copysign(s.select(s.lt(a, s.splat(0.625)), small, large), x)
}

const ERF_SMALL: [f32; 7] = [
    0.128_379_17,
    -0.376_126_35,
    0.112_836_97,
    -0.026_859_503,
    0.005_201_293,
    -0.000_814_567_5,
    8.382_701e-5,
];
/// `-log(erfc(x))` on [0.9, 4].
const ERFC_LOG: [f32; 8] = [
    -0.000_170_762_07,
    1.129_496_2,
    0.633_384_6,
    0.108_238_94,
    -0.025_093_026,
    0.004_161_122_7,
    -0.000_432_429_77,
    2.092_090_3e-5,
];

/// The error function.
#[inline(always)]
pub fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    if matches!(S::ISA, Isa::Scalar) { out_of_line(s, x, erf_here) } else { erf_here(s, x) }
}

#[inline(always)]
fn erf_here<S: Simd>(s: S, x: S::V) -> S::V {
    let a = s.abs(x);
    let small = s.fma(a, polynomial(s, s.mul(a, a), ERF_SMALL), a);
    let clamped = s.min(s.splat(4.0), a);
    let g = polynomial(s, clamped, ERFC_LOG);
    let large = s.sub(s.splat(1.0), exp(s, s.neg(g)));
    s.copysign(s.select(s.lt(a, s.splat(0.92)), small, large), x)
}

/// `1 / (1 + e^-x)`, without losing small results.
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let z = exp(s, s.neg(s.abs(x)));
    let numerator = s.select(s.lt(x, s.zero()), z, one);
    s.div(numerator, s.add(one, z))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.mul(x, sigmoid(s, x))
}

/// `max(x, 0)`; a NaN stays.
#[inline(always)]
pub fn relu<S: Simd>(s: S, x: S::V) -> S::V {
    s.max(s.zero(), x)
}

/// `log2` of the normal distribution's tail beyond `a`, on [0, 9].
const LOG2_TAIL: [f32; 11] = [
    -0.999_999_94,
    -1.151_109,
    -0.459_176_12,
    -0.052_594_487,
    0.007_198_926_5,
    -0.000_224_786_02,
    -0.000_164_371_65,
    4.176_383_7e-5,
    -4.946_524e-6,
    3.021_474_7e-7,
    -7.609_993_5e-9,
];
/// `(2^r - 1) / r` on [-1/2, 1/2].
const EXP2_MINUS_1: [f32; 5] =
    [std::f32::consts::LN_2, 0.240_222_83, 0.055_505_585, 0.009_669_692, 0.001_330_060_7];

/// `x/2 * (1 + erf(x / sqrt 2))`, evaluated as `max(x, 0) - |x| * tail(|x|)`: within 1.2e-7 of `|x|`, and small negative results
/// keep four digits down to x = -5.
#[inline(always)]
pub fn gelu_erf<S: Simd>(s: S, x: S::V) -> S::V {
    if matches!(S::ISA, Isa::Scalar) { out_of_line(s, x, gelu_erf_here) } else { gelu_erf_here(s, x) }
}

#[inline(always)]
fn gelu_erf_here<S: Simd>(s: S, x: S::V) -> S::V {
    let a = s.min(s.splat(9.0), s.abs(x));
    let y = polynomial(s, a, LOG2_TAIL);
    let n = s.round(y);
    let r = s.sub(y, n);
    let power = s.fma(r, polynomial(s, r, EXP2_MINUS_1), s.splat(1.0));
    s.fnma(a, s.scale_by_power(power, n), s.max(s.zero(), x))
}

/// `x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, evaluated as `x * sigmoid` of twice the argument.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let x2 = s.mul(x, x);
    let u = s.mul(x, s.fma(x2, s.splat(0.071_354_814), s.splat(1.595_769)));
    s.mul(x, sigmoid(s, u))
}

/// `x * sigmoid(1.702 x)`.
#[inline(always)]
pub fn gelu_quick<S: Simd>(s: S, x: S::V) -> S::V {
    s.mul(x, sigmoid(s, s.mul(x, s.splat(1.702))))
}

/// A function of one f64 for every lane, for operations too rare to vectorise.
#[inline(always)]
pub fn by_lane<S: Simd>(s: S, x: S::V, f: fn(f64) -> f64) -> S::V {
    let mut lanes = [0.0f32; crate::isa::LANES];
    // SAFETY: the array holds 16 values.
    unsafe { s.store(lanes.as_mut_ptr(), x) };
    for lane in &mut lanes {
        *lane = f(f64::from(*lane)) as f32;
    }
    // SAFETY: the array holds 16 values.
    unsafe { s.load(lanes.as_ptr()) }
}

/// `x^y` for every lane, in f64.
#[inline(always)]
pub fn pow<S: Simd>(s: S, x: S::V, y: S::V) -> S::V {
    let mut bases = [0.0f32; crate::isa::LANES];
    let mut exponents = [0.0f32; crate::isa::LANES];
    // SAFETY: the arrays hold 16 values.
    unsafe {
        s.store(bases.as_mut_ptr(), x);
        s.store(exponents.as_mut_ptr(), y);
    }
    for (base, exponent) in bases.iter_mut().zip(exponents) {
        *base = f64::from(*base).powf(f64::from(exponent)) as f32;
    }
    // SAFETY: the array holds 16 values.
    unsafe { s.load(bases.as_ptr()) }
}
