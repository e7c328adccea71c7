//! From raw accumulators to outputs: bias, addend, activation, gate and residual, in that order.

use super::activation::{
    Activate, Activation, Gelu, GeluTanh, None, QuickGelu, Relu, Relu6, Sigmoid, Silu, Tanh,
};
use crate::isa::{Isa, Kernel, LANES, Simd};

/// One panel's outputs for a block of rows: `out = residual + act(acc + bias)`, or, gated,
/// `out = residual + act(gate + bias) * (up + up_bias)`.
pub(crate) struct EpilogueArgs {
    /// `rows` rows, `acc_stride` values apart.
    pub acc: *const f32,
    pub acc_stride: usize,
    pub rows: usize,
    /// Output columns to write, at most a panel's.
    pub columns: usize,
    /// Where in an accumulator row the up columns start; 0 if not gated.
    pub up: usize,
    /// `columns` values, or null.
    pub bias: *const f32,
    /// `columns` values of the up projection, or null.
    pub up_bias: *const f32,
    /// Null, or values to add before the activation.
    pub addend: *const f32,
    /// Null, or as `addend`, of the up projection.
    pub up_addend: *const f32,
    pub addend_stride: usize,
    /// Null, or values to add; may be `out` itself with the same stride.
    pub residual: *const f32,
    pub residual_stride: usize,
    pub out: *mut f32,
    pub out_stride: usize,
    pub activation: Activation,
}

/// The epilogue of every weight type.
pub(crate) struct Epilogue;

impl Kernel for Epilogue {
    type Args = EpilogueArgs;
    const OP: &'static str = "linear_epilogue";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &EpilogueArgs, _tile: usize) {
        // SAFETY: passed on to the caller.
        unsafe {
            match args.activation {
                Activation::None => finish::<S, None>(s, args),
                Activation::Relu => finish::<S, Relu>(s, args),
                Activation::Gelu => finish::<S, Gelu>(s, args),
                Activation::GeluTanh => finish::<S, GeluTanh>(s, args),
                Activation::Silu => finish::<S, Silu>(s, args),
                Activation::Tanh => finish::<S, Tanh>(s, args),
                Activation::Sigmoid => finish::<S, Sigmoid>(s, args),
                Activation::QuickGelu => finish::<S, QuickGelu>(s, args),
                Activation::Relu6 => finish::<S, Relu6>(s, args),
            }
        }
    }
}

#[inline(always)]
unsafe fn finish<S: Simd, A: Activate>(s: S, args: &EpilogueArgs) {
    let mut column = 0;
    while column < args.columns {
        let lanes = LANES.min(args.columns - column);
        // SAFETY: the caller guarantees `columns` values in every operand, of which these are `lanes`.
        unsafe {
            let bias = load_or_neutral(s, args.bias, column, lanes);
            if lanes == LANES && args.up == 0 && args.addend.is_null() {
                finish_whole::<S, A>(s, args, column, bias);
            } else if !matches!(S::ISA, Isa::Scalar)
                && lanes == LANES
                && args.up == 0
                && args.residual.is_null()
            {
                finish_added::<S, A>(s, args, column, bias);
            } else {
                finish_any::<S, A>(s, args, column, lanes, bias);
            }
        }
        column += LANES;
    }
}

/// 16 columns without a gate or an addend.
#[inline(always)]
unsafe fn finish_whole<S: Simd, A: Activate>(s: S, args: &EpilogueArgs, column: usize, bias: S::V) {
    let (mut acc, mut out) = (args.acc.wrapping_add(column), args.out.wrapping_add(column));
    // SAFETY: the caller guarantees 16 more columns of `rows` rows.
    unsafe {
        if args.residual.is_null() {
            for _ in 0..args.rows {
                s.store(out, A::apply(s, s.add(s.load(acc), bias)));
                (acc, out) = (acc.wrapping_add(args.acc_stride), out.wrapping_add(args.out_stride));
            }
        } else {
            let mut residual = args.residual.wrapping_add(column);
            for _ in 0..args.rows {
                let value = A::apply(s, s.add(s.load(acc), bias));
                s.store(out, s.add(s.load(residual), value));
                (acc, out) = (acc.wrapping_add(args.acc_stride), out.wrapping_add(args.out_stride));
                residual = residual.wrapping_add(args.residual_stride);
            }
        }
    }
}

/// 16 columns without a gate or a residual.
#[inline(always)]
unsafe fn finish_added<S: Simd, A: Activate>(s: S, args: &EpilogueArgs, column: usize, bias: S::V) {
    let (mut acc, mut out) = (args.acc.wrapping_add(column), args.out.wrapping_add(column));
    let mut addend = args.addend.wrapping_add(column);
    for _ in 0..args.rows {
        // SAFETY: the caller guarantees 16 more columns of `rows` rows.
        unsafe { s.store(out, A::apply(s, s.add(s.add(s.load(acc), bias), s.load(addend)))) };
        (acc, out) = (acc.wrapping_add(args.acc_stride), out.wrapping_add(args.out_stride));
        addend = addend.wrapping_add(args.addend_stride);
    }
}

/// Up to 16 columns of any layer.
#[inline(always)]
unsafe fn finish_any<S: Simd, A: Activate>(
    s: S,
    args: &EpilogueArgs,
    column: usize,
    lanes: usize,
    bias: S::V,
) {
    // SAFETY: the caller guarantees `lanes` more columns of `rows` rows.
    unsafe {
        let up_bias = load_or_neutral(s, args.up_bias, column, lanes);
        for row in 0..args.rows {
            let acc = args.acc.add(row * args.acc_stride + column);
            let at = row * args.addend_stride + column;
            let addend = load_or_neutral(s, args.addend, at, lanes);
            let mut value = A::apply(s, s.add(s.add(load(s, acc, lanes), bias), addend));
            if args.up != 0 {
                let addend = load_or_neutral(s, args.up_addend, at, lanes);
                value = s.mul(value, s.add(s.add(load(s, acc.add(args.up), lanes), up_bias), addend));
            }
            if !args.residual.is_null() {
                let residual = args.residual.add(row * args.residual_stride + column);
                value = s.add(load(s, residual, lanes), value);
            }
            let out = args.out.add(row * args.out_stride + column);
            if lanes == LANES { s.store(out, value) } else { s.store_part(out, lanes, value) }
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd>(s: S, p: *const f32, lanes: usize) -> S::V {
    // SAFETY: the caller guarantees `lanes` values.
    unsafe { if lanes == LANES { s.load(p) } else { s.load_part(p, lanes) } }
}

/// An absent bias is -0, which leaves every value as it is, -0 included.
#[inline(always)]
unsafe fn load_or_neutral<S: Simd>(s: S, p: *const f32, column: usize, lanes: usize) -> S::V {
    // SAFETY: the caller guarantees `column + lanes` values unless the pointer is null.
    unsafe { if p.is_null() { s.splat(-0.0) } else { load(s, p.add(column), lanes) } }
}
