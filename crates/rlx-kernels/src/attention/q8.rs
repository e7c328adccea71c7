//! Blocks of a cache of 8-bit integers as `f32`. A scale times an integer is exact, so what follows is what it is for an `f32` cache
//! that holds these values.

use super::BLOCK;
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

const CACHE_LINE: usize = 64;

#[inline(always)]
unsafe fn widen_keys<S: Simd>(s: S, args: &WidenArgs) {
    let layout = Q8Head { dim: args.head_dim, positions: BLOCK, keys: true };
    // SAFETY: the caller guarantees the block; rows of integers are a cache line each.
    unsafe {
        for group in 0..args.head_dim / CACHE_GROUP {
            let mut scales = [0.0f32; BLOCK];
            for j in (0..BLOCK).step_by(LANES) {
                let from = args.k.add(layout.scale_at(j, group * CACHE_GROUP));
                s.store(scales.as_mut_ptr().add(j), s.load_f16(from.cast()));
            }
            for i in group * CACHE_GROUP..(group + 1) * CACHE_GROUP {
                let integers = args.k.add(layout.integer_at(0, i)).cast::<[i8; BLOCK]>().read();
                let mut wide = [0.0; BLOCK];
                for j in 0..BLOCK {
                    wide[j] = scales[j] * f32::from(integers[j]);
                }
                args.keys.add(i * BLOCK).cast::<[f32; BLOCK]>().write(wide);
                s.prefetch(args.next[0].wrapping_add(layout.integer_at(0, i)));
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
        let mut scales = [0.0f32; LANES];
        for n in 0..used * groups {
            if n.is_multiple_of(LANES) {
                s.store(scales.as_mut_ptr(), s.load_f16(args.v.add(2 * n).cast()));
            }
            let at = n * CACHE_GROUP;
            let integers = args.v.add(layout.integers() + at).cast::<[i8; CACHE_GROUP]>().read();
            let wide = integers.map(|integer| scales[n % LANES] * f32::from(integer));
            args.values.add(at).cast::<[f32; CACHE_GROUP]>().write(wide);
            if at.is_multiple_of(CACHE_LINE) {
                s.prefetch(args.next[1].wrapping_add(layout.integers() + at));
            }
        }
    }
}
