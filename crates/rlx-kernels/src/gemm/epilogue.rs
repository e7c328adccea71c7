//! From raw accumulators to outputs: bias, activation, gate and residual, in that order.

use super::activation::{Activation, activate};
use crate::isa::{Kernel, LANES, Simd};

/// One panel's outputs for a block of rows: `out = residual + act(acc + bias)`, or, gated,
/// `out = residual + act(gate + bias) * (up + up_bias)`.
pub(super) struct EpilogueArgs {
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
    /// Null, or values to add; may be `out` itself with the same stride.
    pub residual: *const f32,
    pub residual_stride: usize,
    pub out: *mut f32,
    pub out_stride: usize,
    pub activation: Activation,
}

/// The epilogue of every weight type.
pub(super) struct Epilogue;

impl Kernel for Epilogue {
    type Args = EpilogueArgs;
    const OP: &'static str = "linear_epilogue";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &EpilogueArgs, _tile: usize) {
        let mut column = 0;
        while column < args.columns {
            let lanes = LANES.min(args.columns - column);
            // SAFETY: the caller guarantees `columns` values in every operand, of which these are `lanes`.
            unsafe {
                let bias = load_or_zero(s, args.bias, column, lanes);
                let up_bias = load_or_zero(s, args.up_bias, column, lanes);
                for row in 0..args.rows {
                    let acc = args.acc.add(row * args.acc_stride + column);
                    let mut value =
                        activate(s, args.activation, with_bias(s, args.bias, load(s, acc, lanes), bias));
                    if args.up != 0 {
                        let up = with_bias(s, args.up_bias, load(s, acc.add(args.up), lanes), up_bias);
                        value = s.mul(value, up);
                    }
                    if !args.residual.is_null() {
                        let residual = args.residual.add(row * args.residual_stride + column);
                        value = s.add(load(s, residual, lanes), value);
                    }
                    let out = args.out.add(row * args.out_stride + column);
                    if lanes == LANES { s.store(out, value) } else { s.store_part(out, lanes, value) }
                }
            }
            column += LANES;
        }
    }
}

/// Adding a bias of zero would turn an accumulator of -0 into +0, so a bias that is absent is not added.
#[inline(always)]
fn with_bias<S: Simd>(s: S, bias: *const f32, acc: S::V, loaded: S::V) -> S::V {
    if bias.is_null() { acc } else { s.add(acc, loaded) }
}

#[inline(always)]
unsafe fn load<S: Simd>(s: S, p: *const f32, lanes: usize) -> S::V {
    // SAFETY: the caller guarantees `lanes` values.
    unsafe { if lanes == LANES { s.load(p) } else { s.load_part(p, lanes) } }
}

#[inline(always)]
unsafe fn load_or_zero<S: Simd>(s: S, p: *const f32, column: usize, lanes: usize) -> S::V {
    // SAFETY: the caller guarantees `column + lanes` values unless the pointer is null.
    unsafe { if p.is_null() { s.zero() } else { load(s, p.add(column), lanes) } }
}
