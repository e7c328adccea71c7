use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::half::{f32_to_bf16, f32_to_f16};
use super::{Instances, Isa, Kernel, LANES, Simd};

/// The token of [`Isa::Avx2`]: vectors are pairs of 256-bit registers.
#[derive(Clone, Copy, Debug)]
pub struct Avx2 {
    proof: PhantomData<()>,
}

impl Avx2 {
    /// The token, where the machine has the instruction set.
    pub fn detect() -> Option<Avx2> {
        Isa::Avx2.is_available().then_some(Avx2 { proof: PhantomData })
    }

    /// The token, unchecked.
    ///
    /// # Safety
    /// The machine has [`Isa::Avx2`].
    #[inline(always)]
    pub const unsafe fn assume() -> Avx2 {
        Avx2 { proof: PhantomData }
    }
}

type V = [__m256; 2];
type I = [__m256i; 2];
type M = [__m256; 2];

macro_rules! fold_8 {
    ($($name:ident = $wide:ident, $narrow:ident;)*) => {$(
        /// # Safety
        /// The machine has AVX.
        #[inline(always)]
        pub(super) unsafe fn $name(x: __m256) -> f32 {
            // SAFETY: the caller guarantees the features.
            unsafe {
                let x = $wide(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
                let x = $wide(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32($narrow(x, _mm_shuffle_ps::<1>(x, x)))
            }
        }
    )*};
}

fold_8! {
    reduce_add_8 = _mm_add_ps, _mm_add_ss;
    reduce_max_8 = _mm_max_ps, _mm_max_ss;
    reduce_min_8 = _mm_min_ps, _mm_min_ss;
}

macro_rules! halves {
    ($($name:ident($($arg:ident: $t:ty),*) -> $r:ty = $e:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $t),*) -> $r {
            halves!(@low $($arg),*; $e)
        }
    )*};
    (@low $a:ident; $e:expr) => {{
        let f = $a;
        // SAFETY: the token proves the features; no memory is accessed.
        unsafe { [{ let $a = f[0]; $e }, { let $a = f[1]; $e }] }
    }};
    (@low $a:ident, $b:ident; $e:expr) => {{
        let (f, g) = ($a, $b);
        // SAFETY: the token proves the features; no memory is accessed.
        unsafe { [{ let ($a, $b) = (f[0], g[0]); $e }, { let ($a, $b) = (f[1], g[1]); $e }] }
    }};
    (@low $a:ident, $b:ident, $c:ident; $e:expr) => {{
        let (f, g, h) = ($a, $b, $c);
        // SAFETY: the token proves the features; no memory is accessed.
        unsafe { [{ let ($a, $b, $c) = (f[0], g[0], h[0]); $e }, { let ($a, $b, $c) = (f[1], g[1], h[1]); $e }] }
    }};
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

static FIRST: [i32; 32] = {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 16 {
        table[i] = -1;
        i += 1;
    }
    table
};

#[inline(always)]
fn first_mask(n: usize) -> [__m256i; 2] {
    let n = n.min(LANES);
    // SAFETY: at most 16 entries are skipped of a table of 32; AVX is proven by the callers' token.
    unsafe {
        let p = FIRST.as_ptr().add(LANES - n);
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())]
    }
}

#[inline(always)]
fn bf16_bits(s: Avx2, v: V) -> __m256i {
    let bits = s.bits(v);
    let odd = s.iand(s.ishr(bits, 16), s.isplat(1));
    let rounded = s.iadd(s.iadd(bits, s.isplat(0x7fff)), odd);
    let quiet = s.ior(bits, s.isplat(0x40_0000));
    let chosen = s.bits(s.select(s.is_nan(v), s.with_bits(quiet), s.with_bits(rounded)));
    let [low, high] = s.ishr(chosen, 16);
    // SAFETY: the token proves the features; no memory is accessed.
    unsafe { _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(low, high)) }
}

#[inline(always)]
unsafe fn load_16bit_part(p: *const u16, n: usize) -> [u16; LANES] {
    let mut buffer = [0u16; LANES];
    for (i, x) in buffer.iter_mut().enumerate().take(n) {
        // SAFETY: the caller guarantees `n` readable values.
        *x = unsafe { p.add(i).read_unaligned() };
    }
    buffer
}

impl Simd for Avx2 {
    type V = V;
    type I = I;
    type M = M;

    const ISA: Isa = Isa::Avx2;

    #[inline(always)]
    unsafe fn call<K: Kernel>(self, args: &K::Args, tile: usize) {
        // SAFETY: the token proves the features; the caller guarantees the kernel's contract.
        unsafe { K::run_avx2(args, tile) }
    }

    halves! {
        add(a: V, b: V) -> V = _mm256_add_ps(a, b);
        sub(a: V, b: V) -> V = _mm256_sub_ps(a, b);
        mul(a: V, b: V) -> V = _mm256_mul_ps(a, b);
        div(a: V, b: V) -> V = _mm256_div_ps(a, b);
        fma(a: V, b: V, c: V) -> V = _mm256_fmadd_ps(a, b, c);
        fnma(a: V, b: V, c: V) -> V = _mm256_fnmadd_ps(a, b, c);
        min(a: V, b: V) -> V = _mm256_min_ps(a, b);
        max(a: V, b: V) -> V = _mm256_max_ps(a, b);
        sqrt(a: V) -> V = _mm256_sqrt_ps(a);
        round(a: V) -> V = _mm256_round_ps::<0x08>(a);
        floor(a: V) -> V = _mm256_round_ps::<0x09>(a);
        ceil(a: V) -> V = _mm256_round_ps::<0x0a>(a);
        trunc(a: V) -> V = _mm256_round_ps::<0x0b>(a);
        lt(a: V, b: V) -> M = _mm256_cmp_ps::<_CMP_LT_OQ>(a, b);
        le(a: V, b: V) -> M = _mm256_cmp_ps::<_CMP_LE_OQ>(a, b);
        eq(a: V, b: V) -> M = _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b);
        select(m: M, a: V, b: V) -> V = _mm256_blendv_ps(b, a, m);
        and(a: M, b: M) -> M = _mm256_and_ps(a, b);
        or(a: M, b: M) -> M = _mm256_or_ps(a, b);
        not(a: M) -> M = _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(-1)));
        iadd(a: I, b: I) -> I = _mm256_add_epi32(a, b);
        isub(a: I, b: I) -> I = _mm256_sub_epi32(a, b);
        iand(a: I, b: I) -> I = _mm256_and_si256(a, b);
        ior(a: I, b: I) -> I = _mm256_or_si256(a, b);
        ixor(a: I, b: I) -> I = _mm256_xor_si256(a, b);
        igt(a: I, b: I) -> M = _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b));
        ieq(a: I, b: I) -> M = _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b));
        to_int(a: V) -> I = _mm256_cvtps_epi32(a);
        to_float(a: I) -> V = _mm256_cvtepi32_ps(a);
        bits(a: V) -> I = _mm256_castps_si256(a);
        with_bits(a: I) -> V = _mm256_castsi256_ps(a);
    }

    wrap! {
        zero() -> V = [_mm256_setzero_ps(); 2];
        splat(x: f32) -> V = [_mm256_set1_ps(x); 2];
        isplat(x: i32) -> I = [_mm256_set1_epi32(x); 2];
        ishl(a: I, n: u32) -> I = {
            let n = _mm_cvtsi32_si128(n as i32);
            [_mm256_sll_epi32(a[0], n), _mm256_sll_epi32(a[1], n)]
        };
        ishr(a: I, n: u32) -> I = {
            let n = _mm_cvtsi32_si128(n as i32);
            [_mm256_srl_epi32(a[0], n), _mm256_srl_epi32(a[1], n)]
        };
        isar(a: I, n: u32) -> I = {
            let n = _mm_cvtsi32_si128(n as i32);
            [_mm256_sra_epi32(a[0], n), _mm256_sra_epi32(a[1], n)]
        };
        first(n: usize) -> M = {
            let [low, high] = first_mask(n);
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        };
        any(m: M) -> bool = _mm256_movemask_ps(_mm256_or_ps(m[0], m[1])) != 0;
        reduce_add(v: V) -> f32 = reduce_add_8(_mm256_add_ps(v[0], v[1]));
        reduce_max(v: V) -> f32 = reduce_max_8(_mm256_max_ps(v[0], v[1]));
        reduce_min(v: V) -> f32 = reduce_min_8(_mm256_min_ps(v[0], v[1]));
    }

    wrap_memory! {
        load(p: *const f32) -> V = [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))];
        load_part(p: *const f32, n: usize) -> V = {
            let [low, high] = first_mask(n);
            [_mm256_maskload_ps(p, low), _mm256_maskload_ps(p.wrapping_add(8), high)]
        };
        store(p: *mut f32, v: V) = {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        };
        store_part(p: *mut f32, n: usize, v: V) = {
            let [low, high] = first_mask(n);
            _mm256_maskstore_ps(p, low, v[0]);
            _mm256_maskstore_ps(p.wrapping_add(8), high, v[1]);
        };
        iload(p: *const i32) -> I = [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())];
        istore(p: *mut i32, v: I) = {
            _mm256_storeu_si256(p.cast(), v[0]);
            _mm256_storeu_si256(p.add(8).cast(), v[1]);
        };
        iload_i8(p: *const i8) -> I = {
            let bytes = _mm_loadu_si128(p.cast());
            [_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))]
        };
        istore_i8(p: *mut i8, v: I) = {
            let words = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(v[0], v[1]));
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(p.cast(), _mm_packs_epi16(low, high));
        };
        load_bf16(p: *const u16) -> V = {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        };
        load_bf16_part(p: *const u16, n: usize) -> V = Avx2::assume().load_bf16(load_16bit_part(p, n).as_ptr());
        store_bf16(p: *mut u16, v: V) = _mm256_storeu_si256(p.cast(), bf16_bits(Avx2::assume(), v));
        store_bf16_part(p: *mut u16, n: usize, v: V) = {
            let mut lanes = [0.0; LANES];
            Avx2::assume().store(lanes.as_mut_ptr(), v);
            for (i, lane) in lanes.iter().enumerate().take(n) {
                p.add(i).write_unaligned(f32_to_bf16(*lane));
            }
        };
        load_f16(p: *const u16) -> V =
            [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))];
        load_f16_part(p: *const u16, n: usize) -> V = Avx2::assume().load_f16(load_16bit_part(p, n).as_ptr());
        store_f16(p: *mut u16, v: V) = {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]));
        };
        store_f16_part(p: *mut u16, n: usize, v: V) = {
            let mut lanes = [0.0; LANES];
            Avx2::assume().store(lanes.as_mut_ptr(), v);
            for (i, lane) in lanes.iter().enumerate().take(n) {
                p.add(i).write_unaligned(f32_to_f16(*lane));
            }
        };
    }

    #[inline(always)]
    fn transpose(self, rows: [V; 16]) -> [V; 16] {
        let mut flat = [[0.0f32; LANES]; LANES];
        let mut out = rows;
        for (i, row) in rows.iter().enumerate() {
            for j in 0..2 {
                let mut part = [0.0f32; 8];
                // SAFETY: the token proves the features; the destination holds 8 values.
                unsafe { _mm256_storeu_ps(part.as_mut_ptr(), row[j]) };
                for (k, x) in part.iter().enumerate() {
                    flat[8 * j + k][i] = *x;
                }
            }
        }
        for (i, row) in out.iter_mut().enumerate() {
            // SAFETY: a row of `flat` holds 16 values.
            *row = unsafe { self.load(flat[i].as_ptr()) };
        }
        out
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: the token proves the features; a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
