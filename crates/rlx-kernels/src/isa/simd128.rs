use std::arch::wasm32::*;
use std::marker::PhantomData;

use super::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::{Instances, Isa, Kernel, LANES, Simd};

/// The token of [`Isa::Simd128`]: vectors are four 128-bit registers.
#[derive(Clone, Copy, Debug)]
pub struct Simd128 {
    proof: PhantomData<()>,
}

impl Simd128 {
    /// The token, where the machine has the instruction set.
    pub fn detect() -> Option<Simd128> {
        Isa::Simd128.is_available().then_some(Simd128 { proof: PhantomData })
    }

    /// The token, unchecked.
    ///
    /// # Safety
    /// The machine has [`Isa::Simd128`].
    #[inline(always)]
    pub const unsafe fn assume() -> Simd128 {
        Simd128 { proof: PhantomData }
    }
}

type V = [v128; 4];

macro_rules! quarters {
    ($($name:ident($($arg:ident),*) = $e:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: V),*) -> V {
            [
                { $(let $arg = $arg[0];)* $e },
                { $(let $arg = $arg[1];)* $e },
                { $(let $arg = $arg[2];)* $e },
                { $(let $arg = $arg[3];)* $e },
            ]
        }
    )*};
}

macro_rules! wrap_memory {
    ($($name:ident($($arg:ident: $t:ty),*) $(-> $r:ty)? = $e:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name(self, $($arg: $t),*) $(-> $r)? {
            // SAFETY: the caller guarantees the memory; tokens are of this module's instruction set.
            unsafe { $e }
        }
    )*};
}

macro_rules! fold {
    ($($name:ident = $by:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, v: V) -> f32 {
            let by: fn(v128, v128) -> v128 = $by;
            let x = by(by(v[0], v[2]), by(v[1], v[3]));
            let x = by(x, i32x4_shuffle::<2, 3, 0, 1>(x, x));
            f32x4_extract_lane::<0>(by(x, i32x4_shuffle::<1, 0, 3, 2>(x, x)))
        }
    )*};
}

#[inline(always)]
fn add4(a: v128, b: v128) -> v128 {
    f32x4_add(a, b)
}

/// `a > b ? a : b`: the instruction tells the operands apart the other way round.
#[inline(always)]
fn max4(a: v128, b: v128) -> v128 {
    f32x4_pmax(b, a)
}

#[inline(always)]
fn min4(a: v128, b: v128) -> v128 {
    f32x4_pmin(b, a)
}

#[cfg(target_feature = "relaxed-simd")]
#[inline(always)]
fn fma4(a: v128, b: v128, c: v128) -> v128 {
    f32x4_relaxed_madd(a, b, c)
}

#[cfg(not(target_feature = "relaxed-simd"))]
#[inline(always)]
fn fma4(a: v128, b: v128, c: v128) -> v128 {
    f32x4_add(f32x4_mul(a, b), c)
}

#[cfg(target_feature = "relaxed-simd")]
#[inline(always)]
fn fnma4(a: v128, b: v128, c: v128) -> v128 {
    f32x4_relaxed_nmadd(a, b, c)
}

#[cfg(not(target_feature = "relaxed-simd"))]
#[inline(always)]
fn fnma4(a: v128, b: v128, c: v128) -> v128 {
    f32x4_sub(c, f32x4_mul(a, b))
}

impl Simd128 {
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

    #[inline(always)]
    unsafe fn words(self, p: *const v128) -> V {
        // SAFETY: the caller guarantees 16 readable words.
        unsafe { [v128_load(p), v128_load(p.add(1)), v128_load(p.add(2)), v128_load(p.add(3))] }
    }

    #[inline(always)]
    unsafe fn put_words(self, p: *mut v128, v: V) {
        for (i, part) in v.into_iter().enumerate() {
            // SAFETY: the caller guarantees 16 writable words.
            unsafe { v128_store(p.add(i), part) };
        }
    }
}

/// Exchanges rows and columns of 4 x 4 lanes.
#[inline(always)]
fn transpose4([a, b, c, d]: [v128; 4]) -> [v128; 4] {
    let (ab, cd) = (i32x4_shuffle::<0, 4, 1, 5>(a, b), i32x4_shuffle::<0, 4, 1, 5>(c, d));
    let (ef, gh) = (i32x4_shuffle::<2, 6, 3, 7>(a, b), i32x4_shuffle::<2, 6, 3, 7>(c, d));
    [
        i64x2_shuffle::<0, 2>(ab, cd),
        i64x2_shuffle::<1, 3>(ab, cd),
        i64x2_shuffle::<0, 2>(ef, gh),
        i64x2_shuffle::<1, 3>(ef, gh),
    ]
}

impl Simd for Simd128 {
    type V = V;
    type I = V;
    type M = V;

    const ISA: Isa = Isa::Simd128;
    const FUSED: bool = cfg!(target_feature = "relaxed-simd");

    #[inline(always)]
    unsafe fn call<K: Kernel>(self, args: &K::Args, tile: usize) {
        // SAFETY: the caller guarantees the kernel's contract.
        unsafe { K::run_simd128(args, tile) }
    }

    quarters! {
        add(a, b) = f32x4_add(a, b);
        sub(a, b) = f32x4_sub(a, b);
        mul(a, b) = f32x4_mul(a, b);
        div(a, b) = f32x4_div(a, b);
        fma(a, b, c) = fma4(a, b, c);
        fnma(a, b, c) = fnma4(a, b, c);
        min(a, b) = min4(a, b);
        max(a, b) = max4(a, b);
        sqrt(a) = f32x4_sqrt(a);
        round(a) = f32x4_nearest(a);
        floor(a) = f32x4_floor(a);
        ceil(a) = f32x4_ceil(a);
        trunc(a) = f32x4_trunc(a);
        lt(a, b) = f32x4_lt(a, b);
        le(a, b) = f32x4_le(a, b);
        eq(a, b) = f32x4_eq(a, b);
        select(m, a, b) = v128_bitselect(a, b, m);
        and(a, b) = v128_and(a, b);
        or(a, b) = v128_or(a, b);
        not(a) = v128_not(a);
        iadd(a, b) = i32x4_add(a, b);
        isub(a, b) = i32x4_sub(a, b);
        iand(a, b) = v128_and(a, b);
        ior(a, b) = v128_or(a, b);
        ixor(a, b) = v128_xor(a, b);
        igt(a, b) = i32x4_gt(a, b);
        ieq(a, b) = i32x4_eq(a, b);
        to_int(a) = i32x4_trunc_sat_f32x4(f32x4_nearest(a));
        to_float(a) = f32x4_convert_i32x4(a);
    }

    #[inline(always)]
    fn bits(self, a: V) -> V {
        a
    }
    #[inline(always)]
    fn with_bits(self, a: V) -> V {
        a
    }
    #[inline(always)]
    fn zero(self) -> V {
        [f32x4_splat(0.0); 4]
    }
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [f32x4_splat(x); 4]
    }
    #[inline(always)]
    fn isplat(self, x: i32) -> V {
        [i32x4_splat(x); 4]
    }
    #[inline(always)]
    fn ishl(self, a: V, n: u32) -> V {
        [i32x4_shl(a[0], n), i32x4_shl(a[1], n), i32x4_shl(a[2], n), i32x4_shl(a[3], n)]
    }
    #[inline(always)]
    fn ishr(self, a: V, n: u32) -> V {
        [u32x4_shr(a[0], n), u32x4_shr(a[1], n), u32x4_shr(a[2], n), u32x4_shr(a[3], n)]
    }
    #[inline(always)]
    fn isar(self, a: V, n: u32) -> V {
        [i32x4_shr(a[0], n), i32x4_shr(a[1], n), i32x4_shr(a[2], n), i32x4_shr(a[3], n)]
    }
    #[inline(always)]
    fn first(self, n: usize) -> V {
        let n = i32x4_splat(n as i32);
        [
            i32x4_gt(n, i32x4(0, 1, 2, 3)),
            i32x4_gt(n, i32x4(4, 5, 6, 7)),
            i32x4_gt(n, i32x4(8, 9, 10, 11)),
            i32x4_gt(n, i32x4(12, 13, 14, 15)),
        ]
    }
    #[inline(always)]
    fn any(self, m: V) -> bool {
        v128_any_true(v128_or(v128_or(m[0], m[1]), v128_or(m[2], m[3])))
    }

    wrap_memory! {
        load(p: *const f32) -> V = Simd128::assume().words(p.cast());
        load_part(p: *const f32, n: usize) -> V = {
            let mut lanes = [0.0; LANES];
            for (i, lane) in lanes.iter_mut().enumerate().take(n) {
                *lane = p.add(i).read_unaligned();
            }
            Simd128::assume().load(lanes.as_ptr())
        };
        store(p: *mut f32, v: V) = Simd128::assume().put_words(p.cast(), v);
        store_part(p: *mut f32, n: usize, v: V) = {
            let mut lanes = [0.0; LANES];
            Simd128::assume().store(lanes.as_mut_ptr(), v);
            for (i, lane) in lanes.iter().enumerate().take(n) {
                p.add(i).write_unaligned(*lane);
            }
        };
        iload(p: *const i32) -> V = Simd128::assume().words(p.cast());
        istore(p: *mut i32, v: V) = Simd128::assume().put_words(p.cast(), v);
        iload_i8(p: *const i8) -> V = {
            let bytes = v128_load(p.cast());
            let (low, high) = (i16x8_extend_low_i8x16(bytes), i16x8_extend_high_i8x16(bytes));
            [
                i32x4_extend_low_i16x8(low),
                i32x4_extend_high_i16x8(low),
                i32x4_extend_low_i16x8(high),
                i32x4_extend_high_i16x8(high),
            ]
        };
        istore_i8(p: *mut i8, v: V) = {
            let (low, high) = (i16x8_narrow_i32x4(v[0], v[1]), i16x8_narrow_i32x4(v[2], v[3]));
            v128_store(p.cast(), i8x16_narrow_i16x8(low, high));
        };
        load_bf16(p: *const u16) -> V = {
            let (low, high) = (v128_load(p.cast()), v128_load(p.add(8).cast()));
            let wide = [
                u32x4_extend_low_u16x8(low),
                u32x4_extend_high_u16x8(low),
                u32x4_extend_low_u16x8(high),
                u32x4_extend_high_u16x8(high),
            ];
            Simd128::assume().ishl(wide, 16)
        };
        load_bf16_part(p: *const u16, n: usize) -> V = Simd128::assume().widen(p, n, bf16_to_f32);
        store_bf16(p: *mut u16, v: V) = Simd128::assume().narrow(p, LANES, v, f32_to_bf16);
        store_bf16_part(p: *mut u16, n: usize, v: V) = Simd128::assume().narrow(p, n, v, f32_to_bf16);
        load_f16(p: *const u16) -> V = Simd128::assume().widen(p, LANES, f16_to_f32);
        load_f16_part(p: *const u16, n: usize) -> V = Simd128::assume().widen(p, n, f16_to_f32);
        store_f16(p: *mut u16, v: V) = Simd128::assume().narrow(p, LANES, v, f32_to_f16);
        store_f16_part(p: *mut u16, n: usize, v: V) = Simd128::assume().narrow(p, n, v, f32_to_f16);
    }

    fold! {
        reduce_add = add4;
        reduce_max = max4;
        reduce_min = min4;
    }

    #[inline(always)]
    fn transpose(self, rows: [V; 16]) -> [V; 16] {
        let mut out = rows;
        for from in 0..4 {
            for to in 0..4 {
                let block = [0, 1, 2, 3].map(|i| rows[4 * from + i][to]);
                for (i, part) in transpose4(block).into_iter().enumerate() {
                    out[4 * to + i][from] = part;
                }
            }
        }
        out
    }
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}
