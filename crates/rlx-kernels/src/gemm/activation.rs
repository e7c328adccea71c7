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
    /// `min(max(v, 0), 6)`
    Relu6,
}

/// An activation chosen at compile time, so that the loop over a tile holds only its own code.
pub(crate) trait Activate: 'static {
    fn apply<S: Simd>(s: S, v: S::V) -> S::V;
}

macro_rules! activations {
    ($($name:ident = $f:expr;)*) => {$(
        pub(crate) struct $name;

        impl Activate for $name {
            #[inline(always)]
            fn apply<S: Simd>(s: S, v: S::V) -> S::V {
                $f(s, v)
            }
        }
    )*};
}

#[inline(always)]
fn identity<S: Simd>(_s: S, v: S::V) -> S::V {
    v
}

#[inline(always)]
fn relu6<S: Simd>(s: S, v: S::V) -> S::V {
    s.min(s.splat(6.0), math::relu(s, v))
}

activations! {
    None = identity;
    Relu = math::relu;
    Gelu = math::gelu_erf;
    GeluTanh = math::gelu_tanh;
    Silu = math::silu;
    Tanh = math::tanh;
    Sigmoid = math::sigmoid;
    QuickGelu = math::gelu_quick;
    Relu6 = relu6;
}
