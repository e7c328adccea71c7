//! Blocks of a cache of 8-bit integers: as `f32` for tiles of many rows, with their scales apart for tiles of few. A scale times an
//! integer is exact, so what follows is what it is for an `f32` cache that holds these values.

use super::BLOCK;
use super::generic::Block;
use crate::isa::{Kernel, LANES, Simd};
use rlx_tensor::quant::{CACHE_GROUP, Q8Head};

/// One head of a block, and where it goes.
#[derive(Clone, Copy)]
pub(super) struct WidenArgs {
    pub k: *const u8,
    pub v: *const u8,
    /// `[head_dim][BLOCK]`
    pub keys: *mut f32,
    /// `[BLOCK][value_dim]`
    pub values: *mut f32,
    pub head_dim: usize,
    pub value_dim: usize,
    /// The keys and values that are read after these; hints only.
    pub next: [*const u8; 2],
}

/// Widens all keys of a block, and its first values: as many as the tile number says.
pub(super) struct Widen;

impl Kernel for Widen {
    type Args = WidenArgs;
    const OP: &'static str = "attention_widen";
    const DTYPES: &'static str = "q8_0";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &WidenArgs, used: usize) {
        // SAFETY: the caller guarantees the block and room for its keys and values.
        unsafe {
            widen_keys(s, args);
            widen_values(s, args, used);
        }
    }
}

/// Points a block, given as it is stored, at its integers and scales. The scales of the first `used` values become `f32` in `scratch`,
/// which holds a block of values.
#[inline(always)]
pub(super) unsafe fn integers<S: Simd>(
    s: S,
    block: &mut Block,
    (head_dim, value_dim): (usize, usize),
    used: usize,
    scratch: *mut f32,
) {
    let keys = Q8Head { dim: head_dim, positions: BLOCK, keys: true }.integers();
    let values = Q8Head { dim: value_dim, positions: BLOCK, keys: false }.integers();
    let (key_scales, value_scales) = (block.k.cast::<u16>(), block.v.cast::<u16>());
    // SAFETY: the caller guarantees the block and the scratch; a block has `BLOCK` scales for each group, a multiple of the lanes.
    unsafe {
        for n in (0..used * (value_dim / CACHE_GROUP)).step_by(LANES) {
            s.store(scratch.add(n), s.load_f16(value_scales.add(n)));
        }
        (block.k, block.v) = (block.k.byte_add(keys), block.v.byte_add(values));
    }
    (block.next_k, block.next_v) =
        (block.next_k.wrapping_byte_add(keys), block.next_v.wrapping_byte_add(values));
    (block.key_scales, block.value_scales) = (key_scales, scratch);
}

/// `scale * integer` of 16 integers.
#[inline(always)]
unsafe fn widen<S: Simd>(s: S, integers: *const u8, scale: S::V, to: *mut f32) {
    // SAFETY: the caller guarantees 16 values of both.
    unsafe { s.store(to, s.mul(scale, s.to_float(s.iload_i8(integers.cast())))) }
}

#[inline(always)]
unsafe fn widen_keys<S: Simd>(s: S, args: &WidenArgs) {
    let layout = Q8Head { dim: args.head_dim, positions: BLOCK, keys: true };
    // SAFETY: the caller guarantees the block.
    unsafe {
        for group in 0..args.head_dim / CACHE_GROUP {
            let mut scales = [s.zero(); BLOCK / LANES];
            for n in 0..BLOCK / LANES {
                scales[n] = s.load_f16(args.k.add(layout.scale_at(n * LANES, group * CACHE_GROUP)).cast());
            }
            for i in group * CACHE_GROUP..(group + 1) * CACHE_GROUP {
                let (from, to) = (layout.integer_at(0, i), args.keys.add(i * BLOCK));
                for n in 0..BLOCK / LANES {
                    widen(s, args.k.add(from + n * LANES), scales[n], to.add(n * LANES));
                }
                s.prefetch(args.next[0].wrapping_add(from));
            }
        }
    }
}

#[inline(always)]
unsafe fn widen_values<S: Simd>(s: S, args: &WidenArgs, used: usize) {
    let layout = Q8Head { dim: args.value_dim, positions: BLOCK, keys: false };
    let groups = args.value_dim / CACHE_GROUP;
    // SAFETY: the caller guarantees the block; a block has `BLOCK` scales for each group, a multiple of the lanes.
    unsafe {
        let from = args.v.add(layout.integers());
        let mut scales = [0.0f32; LANES];
        for n in 0..used * groups {
            if n.is_multiple_of(LANES) {
                s.store(scales.as_mut_ptr(), s.load_f16(args.v.add(2 * n).cast()));
            }
            let (at, scale) = (n * CACHE_GROUP, s.splat(scales[n % LANES]));
            widen(s, from.add(at), scale, args.values.add(at));
            widen(s, from.add(at + LANES), scale, args.values.add(at + LANES));
            s.prefetch(args.next[1].wrapping_add(layout.integers() + at));
        }
    }
}
