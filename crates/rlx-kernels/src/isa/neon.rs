use std::arch::aarch64::*;
use std::marker::PhantomData;

use super::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::{Instances, Isa, Kernel, LANES, Simd};

/// The token of [`Isa::Neon`]: vectors are four 128-bit registers.
#[derive(Clone, Copy, Debug)]
pub struct Neon {
    proof: PhantomData<()>,
}

impl Neon {
    /// The token, where the machine has the instruction set.
    pub fn detect() -> Option<Neon> {
        Isa::Neon.is_available().then_some(Neon { proof: PhantomData })
    }

    /// The token, unchecked.
    ///
    /// # Safety
    /// The machine has [`Isa::Neon`].
    #[inline(always)]
    pub const unsafe fn assume() -> Neon {
        Neon { proof: PhantomData }
    }
}

type V = [float32x4_t; 4];
type I = [int32x4_t; 4];
type M = [uint32x4_t; 4];

macro_rules! quarters {
    ($($name:ident($($arg:ident: $t:ty),*) -> $r:ty = $e:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $t),*) -> $r {
            // SAFETY: the token proves the features; no memory is accessed.
            unsafe {
                [
                    { $(let $arg = $arg[0];)* $e },
                    { $(let $arg = $arg[1];)* $e },
                    { $(let $arg = $arg[2];)* $e },
                    { $(let $arg = $arg[3];)* $e },
                ]
            }
        }
    )*};
}

macro_rules! wrap {
    ($($name:ident($($arg:ident: $t:ty),*) -> $r:ty = $e:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $t),*) -> $r {
            // SAFETY: the token proves the features; no memory is accessed.
            unsafe { $e }
        }
    )*};
}

macro_rules! wrap_memory {
    ($($name:ident($($arg:ident: $t:ty),*) $(-> $r:ty)? = $e:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, $($arg: $t),*) $(-> $r)? {
            // SAFETY: the token proves the features; the caller guarantees the memory.
            unsafe { $e }
        }
    )*};
}

macro_rules! fold {
    ($($name:ident = $by:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, v: V) -> f32 {
            let by: fn(float32x4_t, float32x4_t) -> float32x4_t = $by;
            let x = by(by(v[0], v[2]), by(v[1], v[3]));
            // SAFETY: the token proves the features; no memory is accessed.
            unsafe {
                let x = by(x, vextq_f32::<2>(x, x));
                vgetq_lane_f32::<0>(by(x, vextq_f32::<1>(x, x)))
            }
        }
    )*};
}

#[inline(always)]
fn add4(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: called with a token at hand; no memory is accessed.
    unsafe { vaddq_f32(a, b) }
}

#[inline(always)]
fn max4(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: called with a token at hand; no memory is accessed.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

#[inline(always)]
fn min4(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: called with a token at hand; no memory is accessed.
    unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
}

impl Neon {
    #[inline(always)]
    unsafe fn widen(self, p: *const u16, n: usize, f: fn(u16) -> f32) -> V {
        let mut lanes = [0.0; LANES];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: the caller guarantees `n` readable values.
            *lane = f(unsafe { p.add(i).read_unaligned() });
        }
        // SAFETY: the array holds 16 values.
        unsafe { self.load(lanes.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn narrow(self, p: *mut u16, n: usize, v: V, f: fn(f32) -> u16) {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array holds 16 values.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        for (i, lane) in lanes.iter().enumerate().take(n) {
            // SAFETY: the caller guarantees `n` writable values.
            unsafe { p.add(i).write_unaligned(f(*lane)) };
        }
    }
}

impl Simd for Neon {
    type V = V;
    type I = I;
    type M = M;

    const ISA: Isa = Isa::Neon;

    #[inline(always)]
    unsafe fn call<K: Kernel>(self, args: &K::Args, tile: usize) {
        // SAFETY: the token proves the features; the caller guarantees the kernel's contract.
        unsafe { K::run_neon(args, tile) }
    }

    quarters! {
        add(a: V, b: V) -> V = vaddq_f32(a, b);
        sub(a: V, b: V) -> V = vsubq_f32(a, b);
        mul(a: V, b: V) -> V = vmulq_f32(a, b);
        div(a: V, b: V) -> V = vdivq_f32(a, b);
        fma(a: V, b: V, c: V) -> V = vfmaq_f32(c, a, b);
        fnma(a: V, b: V, c: V) -> V = vfmsq_f32(c, a, b);
        min(a: V, b: V) -> V = vbslq_f32(vcltq_f32(a, b), a, b);
        max(a: V, b: V) -> V = vbslq_f32(vcgtq_f32(a, b), a, b);
        sqrt(a: V) -> V = vsqrtq_f32(a);
        round(a: V) -> V = vrndnq_f32(a);
        floor(a: V) -> V = vrndmq_f32(a);
        ceil(a: V) -> V = vrndpq_f32(a);
        trunc(a: V) -> V = vrndq_f32(a);
        lt(a: V, b: V) -> M = vcltq_f32(a, b);
        le(a: V, b: V) -> M = vcleq_f32(a, b);
        eq(a: V, b: V) -> M = vceqq_f32(a, b);
        select(m: M, a: V, b: V) -> V = vbslq_f32(m, a, b);
        and(a: M, b: M) -> M = vandq_u32(a, b);
        or(a: M, b: M) -> M = vorrq_u32(a, b);
        not(a: M) -> M = vmvnq_u32(a);
        iadd(a: I, b: I) -> I = vaddq_s32(a, b);
        isub(a: I, b: I) -> I = vsubq_s32(a, b);
        iand(a: I, b: I) -> I = vandq_s32(a, b);
        ior(a: I, b: I) -> I = vorrq_s32(a, b);
        ixor(a: I, b: I) -> I = veorq_s32(a, b);
        igt(a: I, b: I) -> M = vcgtq_s32(a, b);
        ieq(a: I, b: I) -> M = vceqq_s32(a, b);
        to_int(a: V) -> I = vcvtnq_s32_f32(a);
        to_float(a: I) -> V = vcvtq_f32_s32(a);
        bits(a: V) -> I = vreinterpretq_s32_f32(a);
        with_bits(a: I) -> V = vreinterpretq_f32_s32(a);
    }

    wrap! {
        zero() -> V = [vdupq_n_f32(0.0); 4];
        splat(x: f32) -> V = [vdupq_n_f32(x); 4];
        isplat(x: i32) -> I = [vdupq_n_s32(x); 4];
        ishl(a: I, n: u32) -> I = {
            let n = vdupq_n_s32(n as i32);
            [vshlq_s32(a[0], n), vshlq_s32(a[1], n), vshlq_s32(a[2], n), vshlq_s32(a[3], n)]
        };
        ishr(a: I, n: u32) -> I = {
            let n = vdupq_n_s32(-(n as i32));
            let mut out = a;
            for x in &mut out {
                *x = vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(*x), n));
            }
            out
        };
        isar(a: I, n: u32) -> I = {
            let n = vdupq_n_s32(-(n as i32));
            [vshlq_s32(a[0], n), vshlq_s32(a[1], n), vshlq_s32(a[2], n), vshlq_s32(a[3], n)]
        };
        first(n: usize) -> M = {
            let mut lanes = [0u32; LANES];
            for lane in lanes.iter_mut().take(n) {
                *lane = u32::MAX;
            }
            let p = lanes.as_ptr();
            [vld1q_u32(p), vld1q_u32(p.add(4)), vld1q_u32(p.add(8)), vld1q_u32(p.add(12))]
        };
        any(m: M) -> bool = vmaxvq_u32(vorrq_u32(vorrq_u32(m[0], m[1]), vorrq_u32(m[2], m[3]))) != 0;
    }

    wrap_memory! {
        load(p: *const f32) -> V = [vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))];
        load_part(p: *const f32, n: usize) -> V = {
            let mut lanes = [0.0; LANES];
            for (i, lane) in lanes.iter_mut().enumerate().take(n) {
                *lane = p.add(i).read_unaligned();
            }
            Neon::assume().load(lanes.as_ptr())
        };
        store(p: *mut f32, v: V) = {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
            vst1q_f32(p.add(8), v[2]);
            vst1q_f32(p.add(12), v[3]);
        };
        store_part(p: *mut f32, n: usize, v: V) = {
            let mut lanes = [0.0; LANES];
            Neon::assume().store(lanes.as_mut_ptr(), v);
            for (i, lane) in lanes.iter().enumerate().take(n) {
                p.add(i).write_unaligned(*lane);
            }
        };
        iload(p: *const i32) -> I = [vld1q_s32(p), vld1q_s32(p.add(4)), vld1q_s32(p.add(8)), vld1q_s32(p.add(12))];
        istore(p: *mut i32, v: I) = {
            vst1q_s32(p, v[0]);
            vst1q_s32(p.add(4), v[1]);
            vst1q_s32(p.add(8), v[2]);
            vst1q_s32(p.add(12), v[3]);
        };
        iload_i8(p: *const i8) -> I = {
            let bytes = vld1q_s8(p);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)));
            [
                vmovl_s16(vget_low_s16(low)),
                vmovl_s16(vget_high_s16(low)),
                vmovl_s16(vget_low_s16(high)),
                vmovl_s16(vget_high_s16(high)),
            ]
        };
        istore_i8(p: *mut i8, v: I) = {
            let low = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
            let high = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
            vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
        };
        load_bf16(p: *const u16) -> V = {
            let (low, high) = (vld1q_u16(p), vld1q_u16(p.add(8)));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_high_u16(low))),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_high_u16(high))),
            ]
        };
        load_bf16_part(p: *const u16, n: usize) -> V = Neon::assume().widen(p, n, bf16_to_f32);
        store_bf16(p: *mut u16, v: V) = Neon::assume().narrow(p, LANES, v, f32_to_bf16);
        store_bf16_part(p: *mut u16, n: usize, v: V) = Neon::assume().narrow(p, n, v, f32_to_bf16);
        load_f16(p: *const u16) -> V = Neon::assume().widen(p, LANES, f16_to_f32);
        load_f16_part(p: *const u16, n: usize) -> V = Neon::assume().widen(p, n, f16_to_f32);
        store_f16(p: *mut u16, v: V) = Neon::assume().narrow(p, LANES, v, f32_to_f16);
        store_f16_part(p: *mut u16, n: usize, v: V) = Neon::assume().narrow(p, n, v, f32_to_f16);
    }

    fold! {
        reduce_add = add4;
        reduce_max = max4;
        reduce_min = min4;
    }

    #[inline(always)]
    fn transpose(self, rows: [V; 16]) -> [V; 16] {
        let mut flat = [[0.0f32; LANES]; LANES];
        let mut row = [0.0f32; LANES];
        for (i, v) in rows.iter().enumerate() {
            // SAFETY: the array holds 16 values.
            unsafe { self.store(row.as_mut_ptr(), *v) };
            for (j, x) in row.iter().enumerate() {
                flat[j][i] = *x;
            }
        }
        let mut out = rows;
        for (i, v) in out.iter_mut().enumerate() {
            // SAFETY: a row of `flat` holds 16 values.
            *v = unsafe { self.load(flat[i].as_ptr()) };
        }
        out
    }
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}
