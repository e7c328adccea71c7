use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::{Instances, Isa, Kernel, Simd};

/// The token of [`Isa::Avx512`].
#[derive(Clone, Copy, Debug)]
pub struct Avx512 {
    proof: PhantomData<()>,
}

impl Avx512 {
    /// The token, where the machine has the instruction set.
    pub fn detect() -> Option<Avx512> {
        Isa::Avx512.is_available().then_some(Avx512 { proof: PhantomData })
    }

    /// The token, unchecked.
    ///
    /// # Safety
    /// The machine has [`Isa::Avx512`].
    #[inline(always)]
    pub const unsafe fn assume() -> Avx512 {
        Avx512 { proof: PhantomData }
    }
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

const fn first_mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

type V = __m512;
type I = __m512i;
type M = __mmask16;

#[inline(always)]
fn bf16_bits(s: Avx512, v: V) -> __m256i {
    let bits = s.bits(v);
    let odd = s.iand(s.ishr(bits, 16), s.isplat(1));
    let rounded = s.iadd(s.iadd(bits, s.isplat(0x7fff)), odd);
    let quiet = s.ior(bits, s.isplat(0x40_0000));
    let nan = s.is_nan(v);
    // SAFETY: the token proves the features; no memory is accessed.
    unsafe { _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet))) }
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Simd for Avx512 {
    type V = V;
    type I = I;
    type M = M;

    const ISA: Isa = Isa::Avx512;

    #[inline(always)]
    unsafe fn call<K: Kernel>(self, args: &K::Args, tile: usize) {
        // SAFETY: the token proves the features; the caller guarantees the kernel's contract.
        unsafe { K::run_avx512(args, tile) }
    }

    wrap! {
        zero() -> V = _mm512_setzero_ps();
        splat(x: f32) -> V = _mm512_set1_ps(x);
        add(a: V, b: V) -> V = _mm512_add_ps(a, b);
        sub(a: V, b: V) -> V = _mm512_sub_ps(a, b);
        mul(a: V, b: V) -> V = _mm512_mul_ps(a, b);
        div(a: V, b: V) -> V = _mm512_div_ps(a, b);
        fma(a: V, b: V, c: V) -> V = _mm512_fmadd_ps(a, b, c);
        fnma(a: V, b: V, c: V) -> V = _mm512_fnmadd_ps(a, b, c);
        min(a: V, b: V) -> V = _mm512_min_ps(a, b);
        max(a: V, b: V) -> V = _mm512_max_ps(a, b);
        sqrt(a: V) -> V = _mm512_sqrt_ps(a);
        round(a: V) -> V = _mm512_roundscale_ps::<0x08>(a);
        floor(a: V) -> V = _mm512_roundscale_ps::<0x09>(a);
        ceil(a: V) -> V = _mm512_roundscale_ps::<0x0a>(a);
        trunc(a: V) -> V = _mm512_roundscale_ps::<0x0b>(a);
        lt(a: V, b: V) -> M = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b);
        le(a: V, b: V) -> M = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b);
        eq(a: V, b: V) -> M = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b);
        select(m: M, a: V, b: V) -> V = _mm512_mask_blend_ps(m, b, a);
        isplat(x: i32) -> I = _mm512_set1_epi32(x);
        iadd(a: I, b: I) -> I = _mm512_add_epi32(a, b);
        isub(a: I, b: I) -> I = _mm512_sub_epi32(a, b);
        iand(a: I, b: I) -> I = _mm512_and_si512(a, b);
        ior(a: I, b: I) -> I = _mm512_or_si512(a, b);
        ixor(a: I, b: I) -> I = _mm512_xor_si512(a, b);
        ishl(a: I, n: u32) -> I = _mm512_sll_epi32(a, _mm_cvtsi32_si128(n as i32));
        ishr(a: I, n: u32) -> I = _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32));
        isar(a: I, n: u32) -> I = _mm512_sra_epi32(a, _mm_cvtsi32_si128(n as i32));
        igt(a: I, b: I) -> M = _mm512_cmpgt_epi32_mask(a, b);
        ieq(a: I, b: I) -> M = _mm512_cmpeq_epi32_mask(a, b);
        to_int(a: V) -> I = _mm512_cvtps_epi32(a);
        to_float(a: I) -> V = _mm512_cvtepi32_ps(a);
        scale_by_power(a: V, n: V) -> V = _mm512_scalef_ps(a, n);
        bits(a: V) -> I = _mm512_castps_si512(a);
        with_bits(a: I) -> V = _mm512_castsi512_ps(a);
        reduce_add(v: V) -> f32 = {
            let x = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            super::avx2::reduce_add_8(x)
        };
        reduce_max(v: V) -> f32 = {
            let x = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            super::avx2::reduce_max_8(x)
        };
        reduce_min(v: V) -> f32 = {
            let x = _mm256_min_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            super::avx2::reduce_min_8(x)
        };
    }

    wrap_memory! {
        load(p: *const f32) -> V = _mm512_loadu_ps(p);
        load_part(p: *const f32, n: usize) -> V = _mm512_maskz_loadu_ps(first_mask(n), p);
        store(p: *mut f32, v: V) = _mm512_storeu_ps(p, v);
        store_part(p: *mut f32, n: usize, v: V) = _mm512_mask_storeu_ps(p, first_mask(n), v);
        iload(p: *const i32) -> I = _mm512_loadu_epi32(p);
        istore(p: *mut i32, v: I) = _mm512_storeu_epi32(p, v);
        iload_i8(p: *const i8) -> I = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
        istore_i8(p: *mut i8, v: I) = _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v));
        load_bf16(p: *const u16) -> V = {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        };
        load_bf16_part(p: *const u16, n: usize) -> V = {
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_mask(n), p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        };
        store_bf16(p: *mut u16, v: V) = _mm256_storeu_si256(p.cast(), bf16_bits(Avx512::assume(), v));
        store_bf16_part(p: *mut u16, n: usize, v: V) =
            _mm256_mask_storeu_epi16(p.cast(), first_mask(n), bf16_bits(Avx512::assume(), v));
        load_f16(p: *const u16) -> V = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        load_f16_part(p: *const u16, n: usize) -> V =
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_mask(n), p.cast()));
        store_f16(p: *mut u16, v: V) = _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<NEAREST>(v));
        store_f16_part(p: *mut u16, n: usize, v: V) =
            _mm256_mask_storeu_epi16(p.cast(), first_mask(n), _mm512_cvtps_ph::<NEAREST>(v));
    }

    #[inline(always)]
    fn first(self, n: usize) -> M {
        first_mask(n)
    }
    #[inline(always)]
    fn and(self, a: M, b: M) -> M {
        a & b
    }
    #[inline(always)]
    fn or(self, a: M, b: M) -> M {
        a | b
    }
    #[inline(always)]
    fn not(self, a: M) -> M {
        !a
    }
    #[inline(always)]
    fn any(self, m: M) -> bool {
        m != 0
    }

    #[inline(always)]
    fn transpose(self, rows: [V; 16]) -> [V; 16] {
        // SAFETY: the token proves the features; no memory is accessed.
        unsafe {
            let mut a = rows;
            for i in (0..16).step_by(2) {
                let (x, y) = (rows[i], rows[i + 1]);
                a[i] = _mm512_unpacklo_ps(x, y);
                a[i + 1] = _mm512_unpackhi_ps(x, y);
            }
            // b[4g + c] holds, per 128-bit part q, column 4q + c of rows 4g..4g+4.
            let mut b = a;
            for i in (0..16).step_by(4) {
                b[i] = _mm512_shuffle_ps::<0x44>(a[i], a[i + 2]);
                b[i + 1] = _mm512_shuffle_ps::<0xee>(a[i], a[i + 2]);
                b[i + 2] = _mm512_shuffle_ps::<0x44>(a[i + 1], a[i + 3]);
                b[i + 3] = _mm512_shuffle_ps::<0xee>(a[i + 1], a[i + 3]);
            }
            let mut out = b;
            for c in 0..4 {
                let low01 = _mm512_shuffle_f32x4::<0x44>(b[c], b[c + 4]);
                let high01 = _mm512_shuffle_f32x4::<0xee>(b[c], b[c + 4]);
                let low23 = _mm512_shuffle_f32x4::<0x44>(b[c + 8], b[c + 12]);
                let high23 = _mm512_shuffle_f32x4::<0xee>(b[c + 8], b[c + 12]);
                out[c] = _mm512_shuffle_f32x4::<0x88>(low01, low23);
                out[c + 4] = _mm512_shuffle_f32x4::<0xdd>(low01, low23);
                out[c + 8] = _mm512_shuffle_f32x4::<0x88>(high01, high23);
                out[c + 12] = _mm512_shuffle_f32x4::<0xdd>(high01, high23);
            }
            out
        }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: the token proves the features; a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
