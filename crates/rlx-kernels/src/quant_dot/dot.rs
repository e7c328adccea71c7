//! The dot primitive and its instances: sixteen sums of four byte products, exact in i32 on every instruction set.

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
use std::arch::wasm32::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "aarch64")]
use crate::isa::Neon;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
use crate::isa::Simd128;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Avx2, Avx512};
use crate::isa::{CpuFeatures, Isa, LANES, Scalar, Simd};

/// A token that proves an instruction set together with a way to multiply bytes.
///
/// A vector of 16 words holds four bytes a word: four consecutive k of 16 columns.
pub(crate) trait Dot: Copy + 'static {
    /// The vectors.
    type S: Simd;
    /// Whether bodies are compiled as straight code for it, see `for_each_part`: the sets that weights are read fastest with.
    const STRAIGHT: bool = false;

    /// The token of the vectors.
    fn simd(self) -> Self::S;
    /// `acc + w . x` for each word: bytes of `w` in 0..=127, of `x` in -127..=127.
    fn dot(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self>;
    /// As [`Dot::dot`] with any bytes of `w`; with `w - 128` if the set is
    /// [signed](DotSet::is_signed).
    fn dot_wide(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self>;
    /// `acc + w . x` for each word, for any bytes: those of `w` signed, those of `x` unsigned, or signed if the set
    /// [takes rows so](DotSet::takes_signed_rows).
    fn dot_codes(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self>;
    /// Each byte of `index`, 0..=15, replaced by that entry of the table.
    fn lookup(self, table: &[u8; 16], index: I<Self>) -> I<Self>;
}

pub(crate) type I<D> = <<D as Dot>::S as Simd>::I;
pub(super) type V<D> = <<D as Dot>::S as Simd>::V;

/// The ways to multiply bytes, from the most portable to the fastest of an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DotSet {
    Scalar,
    /// Widening multiplies of WebAssembly.
    Simd128,
    /// Widening multiplies.
    Neon,
    /// `sdot`.
    NeonDot,
    /// `vpmaddubsw`, `vpmaddwd`.
    Avx2,
    /// `vpdpbusd` on 256 bits.
    AvxVnni,
    /// `vpmaddubsw`, `vpmaddwd` on 512 bits.
    Avx512,
    /// `vpdpbusd` on 512 bits.
    Avx512Vnni,
}

impl DotSet {
    pub(crate) const ALL: [DotSet; 8] = [
        DotSet::Scalar,
        DotSet::Simd128,
        DotSet::Neon,
        DotSet::NeonDot,
        DotSet::Avx2,
        DotSet::AvxVnni,
        DotSet::Avx512,
        DotSet::Avx512Vnni,
    ];

    pub(crate) const fn isa(self) -> Isa {
        match self {
            DotSet::Scalar => Isa::Scalar,
            DotSet::Simd128 => Isa::Simd128,
            DotSet::Neon | DotSet::NeonDot => Isa::Neon,
            DotSet::Avx2 | DotSet::AvxVnni => Isa::Avx2,
            DotSet::Avx512 | DotSet::Avx512Vnni => Isa::Avx512,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            DotSet::Scalar => "scalar",
            DotSet::Simd128 => "simd128",
            DotSet::Neon => "neon",
            DotSet::NeonDot => "neon_dotprod",
            DotSet::Avx2 => "avx2",
            DotSet::AvxVnni => "avx_vnni",
            DotSet::Avx512 => "avx512",
            DotSet::Avx512Vnni => "avx512_vnni",
        }
    }

    /// Whether [`Dot::dot_wide`] multiplies by `w - 128` rather than by `w`.
    pub(crate) const fn is_signed(self) -> bool {
        !matches!(self, DotSet::Scalar | DotSet::AvxVnni | DotSet::Avx512Vnni)
    }

    /// Whether [`Dot::dot_codes`] takes rows as signed bytes.
    pub(crate) const fn takes_signed_rows(self) -> bool {
        matches!(self, DotSet::Simd128 | DotSet::Neon | DotSet::NeonDot)
    }

    /// Whether this machine has it.
    pub(crate) fn is_available(self) -> bool {
        let features = CpuFeatures::detect();
        let extra = match self {
            DotSet::NeonDot => features.neon_dotprod,
            DotSet::AvxVnni => features.avx_vnni,
            DotSet::Avx512Vnni => features.avx512_vnni,
            _ => true,
        };
        extra && self.isa().is_available()
    }

    /// The fastest of an instruction set that this machine has.
    pub(crate) fn of(isa: Isa) -> Option<DotSet> {
        DotSet::ALL.into_iter().rev().find(|set| set.isa() == isa && set.is_available())
    }
}

fn lanes<S: Simd>(s: S, v: S::I) -> [[u8; 4]; LANES] {
    let mut words = [0i32; LANES];
    // SAFETY: the array has 16 words.
    unsafe { s.istore(words.as_mut_ptr(), v) };
    words.map(i32::to_le_bytes)
}

fn from_lanes<S: Simd>(s: S, bytes: [[u8; 4]; LANES]) -> S::I {
    let words = bytes.map(i32::from_le_bytes);
    // SAFETY: the array has 16 words.
    unsafe { s.iload(words.as_ptr()) }
}

#[derive(Clone, Copy)]
pub(super) struct ScalarDot(Scalar);

impl Dot for ScalarDot {
    type S = Scalar;

    #[inline(always)]
    fn simd(self) -> Scalar {
        self.0
    }
    #[inline(never)]
    fn dot(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        let (w, x) = (lanes(self.0, w), lanes(self.0, x));
        let mut sums = [[0u8; 4]; LANES];
        for lane in 0..LANES {
            let mut sum = 0;
            for i in 0..4 {
                sum += i32::from(w[lane][i]) * i32::from(x[lane][i] as i8);
            }
            sums[lane] = sum.to_le_bytes();
        }
        self.0.iadd(acc, from_lanes(self.0, sums))
    }
    #[inline(always)]
    fn dot_wide(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        self.dot(acc, w, x)
    }
    #[inline(always)]
    fn dot_codes(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        self.dot(acc, x, w)
    }
    #[inline(never)]
    fn lookup(self, table: &[u8; 16], index: I<Self>) -> I<Self> {
        from_lanes(self.0, lanes(self.0, index).map(|word| word.map(|byte| table[usize::from(byte & 15)])))
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! halves {
    (|$($arg:ident),+| $e:expr) => {{
        // SAFETY: the token proves the features; no memory is accessed.
        unsafe {
            [{ $(let $arg = $arg[0];)+ $e }, { $(let $arg = $arg[1];)+ $e }]
        }
    }};
}

#[cfg(target_arch = "x86_64")]
macro_rules! lookup_256 {
    () => {
        #[inline(always)]
        fn lookup(self, table: &[u8; 16], index: I<Self>) -> I<Self> {
            halves!(|index| {
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
                _mm256_shuffle_epi8(table, index)
            })
        }
    };
}

/// AVX2: a pair of u8 x i8 products fits i16 as long as one factor is at most 128.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2Dot(Avx2);

#[cfg(target_arch = "x86_64")]
impl Dot for Avx2Dot {
    type S = Avx2;

    #[inline(always)]
    fn simd(self) -> Avx2 {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        halves!(|acc, w, x| {
            let pairs = _mm256_maddubs_epi16(w, x);
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }
    #[inline(always)]
    fn dot_wide(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        halves!(|acc, w, x| {
            let w = _mm256_xor_si256(w, _mm256_set1_epi8(i8::MIN));
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }
    #[inline(always)]
    fn dot_codes(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        // Pairs of products of 16 bits fit 32; pairs of those of bytes do not fit 16.
        halves!(|acc, w, x| {
            let low = _mm256_set1_epi16(0xff);
            let (x_even, x_odd) = (_mm256_and_si256(x, low), _mm256_srli_epi16::<8>(x));
            let w_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w));
            let w_odd = _mm256_srai_epi16::<8>(w);
            let acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x_even, w_even));
            _mm256_add_epi32(acc, _mm256_madd_epi16(x_odd, w_odd))
        })
    }
    lookup_256!();
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct AvxVnniDot(Avx2);

#[cfg(target_arch = "x86_64")]
impl Dot for AvxVnniDot {
    type S = Avx2;
    const STRAIGHT: bool = true;

    #[inline(always)]
    fn simd(self) -> Avx2 {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        halves!(|acc, w, x| _mm256_dpbusd_avx_epi32(acc, w, x))
    }
    #[inline(always)]
    fn dot_wide(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        self.dot(acc, w, x)
    }
    #[inline(always)]
    fn dot_codes(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        self.dot(acc, x, w)
    }
    lookup_256!();
}

#[cfg(target_arch = "x86_64")]
macro_rules! lookup_512 {
    () => {
        #[inline(always)]
        fn lookup(self, table: &[u8; 16], index: I<Self>) -> I<Self> {
            // SAFETY: the token proves the features; the table has 16 bytes.
            unsafe {
                let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
                _mm512_shuffle_epi8(table, index)
            }
        }
    };
}

/// AVX-512 without VNNI.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512Dot(Avx512);

#[cfg(target_arch = "x86_64")]
impl Dot for Avx512Dot {
    type S = Avx512;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        // SAFETY: the token proves the features; no memory is accessed.
        unsafe {
            let pairs = _mm512_maddubs_epi16(w, x);
            _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn dot_wide(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        // SAFETY: the token proves the features; no memory is accessed.
        unsafe {
            let w = _mm512_xor_si512(w, _mm512_set1_epi8(i8::MIN));
            let x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
            self.dot(acc, _mm512_abs_epi8(w), x)
        }
    }
    #[inline(always)]
    fn dot_codes(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        // SAFETY: the token proves the features; no memory is accessed.
        unsafe {
            let low = _mm512_set1_epi16(0xff);
            let (x_even, x_odd) = (_mm512_and_si512(x, low), _mm512_srli_epi16::<8>(x));
            let w_even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(w));
            let w_odd = _mm512_srai_epi16::<8>(w);
            let acc = _mm512_add_epi32(acc, _mm512_madd_epi16(x_even, w_even));
            _mm512_add_epi32(acc, _mm512_madd_epi16(x_odd, w_odd))
        }
    }
    lookup_512!();
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512VnniDot(Avx512);

#[cfg(target_arch = "x86_64")]
impl Dot for Avx512VnniDot {
    type S = Avx512;
    const STRAIGHT: bool = true;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        // SAFETY: the token proves the features; no memory is accessed.
        unsafe { _mm512_dpbusd_epi32(acc, w, x) }
    }
    #[inline(always)]
    fn dot_wide(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        self.dot(acc, w, x)
    }
    #[inline(always)]
    fn dot_codes(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        self.dot(acc, x, w)
    }
    lookup_512!();
}

/// Products of bytes fit 16 bits, pairs of them 32.
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
#[derive(Clone, Copy)]
pub(super) struct Simd128Dot(Simd128);

#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
impl Dot for Simd128Dot {
    type S = Simd128;

    #[inline(always)]
    fn simd(self) -> Simd128 {
        self.0
    }
    #[inline(always)]
    fn dot(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        let mut out = acc;
        for part in 0..4 {
            let low = i32x4_extadd_pairwise_i16x8(i16x8_extmul_low_i8x16(w[part], x[part]));
            let high = i32x4_extadd_pairwise_i16x8(i16x8_extmul_high_i8x16(w[part], x[part]));
            let (even, odd) =
                (i32x4_shuffle::<0, 2, 4, 6>(low, high), i32x4_shuffle::<1, 3, 5, 7>(low, high));
            out[part] = i32x4_add(acc[part], i32x4_add(even, odd));
        }
        out
    }
    #[inline(always)]
    fn dot_wide(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        self.dot(acc, self.0.ixor(w, self.0.isplat(SIGNS)), x)
    }
    #[inline(always)]
    fn dot_codes(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
        self.dot(acc, w, x)
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], index: I<Self>) -> I<Self> {
        // SAFETY: the table has 16 bytes.
        let table = unsafe { v128_load(table.as_ptr().cast()) };
        index.map(|part| i8x16_swizzle(table, part))
    }
}

#[cfg(target_arch = "aarch64")]
macro_rules! neon_dot {
    ($name:ident, |$acc:ident, $w:ident, $x:ident| $dot:expr) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name(Neon);

        impl Dot for $name {
            type S = Neon;

            #[inline(always)]
            fn simd(self) -> Neon {
                self.0
            }
            #[inline(always)]
            fn dot(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
                let mut out = acc;
                for part in 0..4 {
                    let ($acc, $w, $x) = (acc[part], w[part], x[part]);
                    // SAFETY: the token proves the features; no memory is accessed.
                    out[part] = unsafe {
                        let ($w, $x) = (vreinterpretq_s8_s32($w), vreinterpretq_s8_s32($x));
                        $dot
                    };
                }
                out
            }
            #[inline(always)]
            fn dot_wide(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
                self.dot(acc, self.0.ixor(w, self.0.isplat(SIGNS)), x)
            }
            #[inline(always)]
            fn dot_codes(self, acc: I<Self>, w: I<Self>, x: I<Self>) -> I<Self> {
                self.dot(acc, w, x)
            }
            #[inline(always)]
            fn lookup(self, table: &[u8; 16], index: I<Self>) -> I<Self> {
                let mut out = index;
                for part in &mut out {
                    // SAFETY: the token proves the features; the table has 16 bytes.
                    *part = unsafe {
                        let found = vqtbl1q_u8(vld1q_u8(table.as_ptr()), vreinterpretq_u8_s32(*part));
                        vreinterpretq_s32_u8(found)
                    };
                }
                out
            }
        }
    };
}

/// The sign bit of each byte.
#[cfg(any(target_arch = "aarch64", all(target_arch = "wasm32", target_feature = "simd128")))]
const SIGNS: i32 = 0x8080_8080_u32 as i32;

#[cfg(target_arch = "aarch64")]
neon_dot!(NeonPlainDot, |acc, w, x| {
    let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
    let high = vmull_s8(vget_high_s8(w), vget_high_s8(x));
    vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))
});

#[cfg(target_arch = "aarch64")]
neon_dot!(NeonDotprodDot, |acc, w, x| {
    let mut sum = acc;
    std::arch::asm!(
        "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
        sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x,
        options(pure, nomem, nostack, preserves_flags)
    );
    sum
});

/// A kernel body generic over the dot primitive. Implementations are `#[inline(always)]`, as is what they call.
pub(crate) trait Body: 'static {
    /// What a call needs.
    type Args;

    /// # Safety
    /// As the body's arguments say.
    unsafe fn run<D: Dot>(d: D, args: &Self::Args);
}

/// A compiled instance. The caller guarantees the body's contract and that the machine has the instance's set.
pub(crate) type DotEntry<A> = unsafe fn(&A);

macro_rules! instances {
    ($($(#[$attribute:meta])* $name:ident = $token:expr;)*) => {
        /// The instances of a body, as methods for the reason that those of [`crate::isa::Kernel`] are.
        trait Instances: Body {$(
            $(#[$attribute])*
            #[inline(never)]
            unsafe fn $name(args: &Self::Args) {
                // SAFETY: the caller guarantees the body's contract; this function's features are the token's.
                unsafe { Self::run($token, args) }
            }
        )*}
    };
}

instances! {
    run_scalar = ScalarDot(Scalar::default());
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    run_avx2 = Avx2Dot(Avx2::assume());
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    run_avx_vnni = AvxVnniDot(Avx2::assume());
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
    run_avx512 = Avx512Dot(Avx512::assume());
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni")]
    run_avx512_vnni = Avx512VnniDot(Avx512::assume());
    #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
    run_simd128 = Simd128Dot(Simd128::assume());
    #[cfg(target_arch = "aarch64")]
    #[target_feature(enable = "neon")]
    run_neon = NeonPlainDot(Neon::assume());
    #[cfg(target_arch = "aarch64")]
    #[target_feature(enable = "neon,dotprod")]
    run_neon_dotprod = NeonDotprodDot(Neon::assume());
}

impl<B: Body + ?Sized> Instances for B {}

/// The instance of a body; `None` on another architecture.
pub(crate) const fn dot_entry<B: Body>(set: DotSet) -> Option<DotEntry<B::Args>> {
    match set {
        DotSet::Scalar => Some(B::run_scalar),
        #[cfg(target_arch = "x86_64")]
        DotSet::Avx2 => Some(B::run_avx2),
        #[cfg(target_arch = "x86_64")]
        DotSet::AvxVnni => Some(B::run_avx_vnni),
        #[cfg(target_arch = "x86_64")]
        DotSet::Avx512 => Some(B::run_avx512),
        #[cfg(target_arch = "x86_64")]
        DotSet::Avx512Vnni => Some(B::run_avx512_vnni),
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        DotSet::Simd128 => Some(B::run_simd128),
        #[cfg(target_arch = "aarch64")]
        DotSet::Neon => Some(B::run_neon),
        #[cfg(target_arch = "aarch64")]
        DotSet::NeonDot => Some(B::run_neon_dotprod),
        #[cfg(not(all(target_arch = "x86_64", target_arch = "aarch64")))]
        _ => None,
    }
}
