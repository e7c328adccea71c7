//! The activations a linear layer applies in its epilogue.

use crate::isa::Simd;
use crate::math;

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
        Activation::Relu => math::relu(s, v),
        Activation::Gelu => math::gelu_erf(s, v),
        Activation::GeluTanh => math::gelu_tanh(s, v),
        Activation::Silu => math::silu(s, v),
        Activation::Tanh => math::tanh(s, v),
        Activation::Sigmoid => math::sigmoid(s, v),
        Activation::QuickGelu => math::gelu_quick(s, v),
    }
}
