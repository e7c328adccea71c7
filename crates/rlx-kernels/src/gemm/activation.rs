//! The activations a linear layer applies in its epilogue.

use crate::isa::Simd;

/// What is applied to `acc + bias`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `v`
    #[default]
    None,
    /// `max(v, 0)`
    Relu,
    /// `v * (1 + erf(v / sqrt(2))) / 2`
    Gelu,
    /// `v * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 * v^3))) / 2`
    GeluTanh,
    /// `v / (1 + exp(-v))`
    Silu,
    /// `tanh(v)`
    Tanh,
    /// `1 / (1 + exp(-v))`
    Sigmoid,
    /// `v / (1 + exp(-1.702 * v))`
    QuickGelu,
}

/// Applies an activation to 16 values.
#[inline(always)]
pub(super) fn activate<S: Simd>(s: S, activation: Activation, v: S::V) -> S::V {
    match activation {
        Activation::None => v,
        Activation::Relu => s.select(s.lt(v, s.zero()), s.zero(), v),
        Activation::Silu => s.mul(v, sigmoid(s, v)),
        Activation::Sigmoid => sigmoid(s, v),
        Activation::QuickGelu => s.mul(v, sigmoid(s, s.mul(v, s.splat(1.702)))),
        Activation::Tanh => tanh(s, v),
        Activation::GeluTanh => {
            let cube = s.mul(s.mul(v, v), v);
            let inner = s.mul(s.fma(s.splat(0.044_715), cube, v), s.splat(0.797_884_6));
            let half = s.mul(v, s.splat(0.5));
            s.fma(half, tanh(s, inner), half)
        }
        Activation::Gelu => {
            let half = s.mul(v, s.splat(0.5));
            s.fma(half, erf(s, s.mul(v, s.splat(std::f32::consts::FRAC_1_SQRT_2))), half)
        }
    }
}

#[inline(always)]
fn exp<S: Simd>(s: S, v: S::V) -> S::V {
    let v = s.select(s.lt(v, s.splat(-87.0)), s.splat(-87.0), v);
    let v = s.select(s.lt(s.splat(88.0), v), s.splat(88.0), v);
    let n = s.round(s.mul(v, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fnma(n, s.splat(1.428_606_8e-6), s.fnma(n, s.splat(0.693_145_75), v));
    let mut p = s.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    let nan = s.is_nan(n);
    let scale = s.with_bits(s.ishl(s.iadd(s.to_int(s.select(nan, s.zero(), n)), s.isplat(127)), 23));
    s.mul(p, scale)
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, v: S::V) -> S::V {
    s.div(s.splat(1.0), s.add(s.splat(1.0), exp(s, s.neg(v))))
}

#[inline(always)]
fn tanh<S: Simd>(s: S, v: S::V) -> S::V {
    let e = exp(s, s.mul(s.abs(v), s.splat(-2.0)));
    s.copysign(s.div(s.sub(s.splat(1.0), e), s.add(s.splat(1.0), e)), v)
}

/// Abramowitz and Stegun, formula 7.1.26: absolute error at most 1.5e-7.
#[inline(always)]
fn erf<S: Simd>(s: S, v: S::V) -> S::V {
    let x = s.abs(v);
    let t = s.div(s.splat(1.0), s.fma(x, s.splat(0.327_591_1), s.splat(1.0)));
    let mut p = s.splat(1.061_405_4);
    for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
        p = s.fma(p, t, s.splat(c));
    }
    let e = exp(s, s.neg(s.mul(x, x)));
    s.copysign(s.fnma(s.mul(p, t), e, s.splat(1.0)), v)
}
