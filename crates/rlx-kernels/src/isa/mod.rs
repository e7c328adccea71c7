//! Instruction sets: detection, SIMD tokens and kernel instances.
//!
//! A kernel body is written once, generic over a [`Simd`] token, as [`Kernel::run`]; [`entry`] returns the instance
//! of it compiled for an [`Isa`]. Every token has the same [`LANES`] and the same arithmetic per lane, and reductions
//! across lanes use one tree, so that a body gives the same bits on every instruction set that has fused multiply-adds
//! ([`Simd::FUSED`]).

pub mod half;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod features;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
mod simd;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod simd128;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
pub use features::{CacheSizes, CpuFeatures};
#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use scalar::Scalar;
pub use simd::{LANES, Simd};
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
pub use simd128::Simd128;

/// Asks for the cache lines of some bytes, into the second level; nothing on architectures without a stable way to.
pub fn fetch_lines(bytes: &[u8]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: the instruction is in the architecture's baseline, and a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = bytes;
}

/// Asks for the cache line of an address, into the first level; nothing on architectures without a stable way to.
pub(crate) fn fetch_line(p: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction is in the architecture's baseline, and a prefetch may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = p;
}

/// An instruction set that kernels are compiled for, from the most portable to the fastest of an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, any machine.
    Scalar,
    /// 128-bit vectors of WebAssembly. Products and sums are fused where the build has relaxed vectors, else each is rounded.
    Simd128,
    /// 128-bit vectors of AArch64.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, CD, DQ and VL, on top of [`Isa::Avx2`].
    Avx512,
}

impl Isa {
    /// All instruction sets, in order.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Simd128, Isa::Neon, Isa::Avx2, Isa::Avx512];

    /// The fastest instruction set of this machine.
    pub fn detect() -> Isa {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED
            .get_or_init(|| Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar))
    }

    /// The instruction sets of this machine, in order; [`Isa::Scalar`] is always the first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this machine runs kernels of this instruction set.
    pub fn is_available(self) -> bool {
        let f = CpuFeatures::detect();
        match self {
            Isa::Scalar => true,
            Isa::Simd128 => f.simd128,
            Isa::Neon => f.neon,
            Isa::Avx2 => f.avx2 && f.fma && f.f16c,
            Isa::Avx512 => f.avx512 && Isa::Avx2.is_available(),
        }
    }

    /// The name in settings and reports: `scalar`, `simd128`, `neon`, `avx2`, `avx512`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Simd128 => "simd128",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text that names no [`Isa`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownIsa {
    /// The text.
    pub text: String,
}

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown instruction set {:?}: expected scalar, simd128, neon, avx2 or avx512", self.text)
    }
}

impl std::error::Error for UnknownIsa {}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(text: &str) -> Result<Isa, UnknownIsa> {
        let lower = text.trim().to_ascii_lowercase();
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name() == lower)
            .ok_or_else(|| UnknownIsa { text: text.to_owned() })
    }
}

/// One kernel: a body generic over the SIMD token. A row of a family's table names it and an [`Isa`].
pub trait Kernel: 'static {
    /// What a call needs: raw pointers, sizes and strides.
    type Args;
    /// The operation, as in `{op}_{dtypes}_{isa}[_variant]`.
    const OP: &'static str;
    /// The data types, as in `{op}_{dtypes}_{isa}[_variant]`.
    const DTYPES: &'static str;
    /// The variant, or an empty text.
    const VARIANT: &'static str = "";

    /// Computes tile `tile` of the output. Implementations are `#[inline(always)]`, as is everything they call that
    /// takes a token, so that the whole body is compiled with the features of its instance.
    ///
    /// # Safety
    /// The pointers of `args` must be valid for what the family's documentation says the kernel reads and writes, and
    /// no other thread may access what it writes.
    unsafe fn run<S: Simd>(s: S, args: &Self::Args, tile: usize);
}

/// A compiled kernel instance: `entry(args, tile)`. The caller guarantees the contract of [`Kernel::run`] and that the
/// machine has the instance's instruction set ([`Isa::is_available`]).
pub type Entry<A> = unsafe fn(&A, usize);

/// The instances of a kernel. Methods, because the compiler puts those into the unit of the kernel's own module; functions
/// would all go into this module's, which one thread would compile for minutes.
trait Instances: Kernel {
    #[inline(never)]
    unsafe fn run_scalar(args: &Self::Args, tile: usize) {
        // SAFETY: the caller guarantees the contract of `Kernel::run`.
        unsafe { Self::run(Scalar::default(), args, tile) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run_avx2(args: &Self::Args, tile: usize) {
        // SAFETY: the caller guarantees the contract of `Kernel::run`; this function's features are the token's.
        unsafe { Self::run(Avx2::assume(), args, tile) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
    unsafe fn run_avx512(args: &Self::Args, tile: usize) {
        // SAFETY: the caller guarantees the contract of `Kernel::run`; this function's features are the token's.
        unsafe { Self::run(Avx512::assume(), args, tile) }
    }

    #[cfg(target_arch = "aarch64")]
    #[inline(never)]
    #[target_feature(enable = "neon")]
    unsafe fn run_neon(args: &Self::Args, tile: usize) {
        // SAFETY: the caller guarantees the contract of `Kernel::run`; this function's features are the token's.
        unsafe { Self::run(Neon::assume(), args, tile) }
    }

    #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
    #[inline(never)]
    unsafe fn run_simd128(args: &Self::Args, tile: usize) {
        // SAFETY: the caller guarantees the contract of `Kernel::run`; the whole build has the token's features.
        unsafe { Self::run(Simd128::assume(), args, tile) }
    }
}

impl<K: Kernel + ?Sized> Instances for K {}

/// The instance of kernel `K` for `isa`; `None` when this build's architecture has no such instruction set.
pub const fn entry<K: Kernel>(isa: Isa) -> Option<Entry<K::Args>> {
    match isa {
        Isa::Scalar => Some(K::run_scalar),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Some(K::run_avx2),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => Some(K::run_avx512),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => Some(K::run_neon),
        #[cfg(target_arch = "x86_64")]
        Isa::Neon => None,
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => None,
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        Isa::Neon => None,
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        Isa::Simd128 => Some(K::run_simd128),
        #[cfg(not(all(target_arch = "wasm32", target_feature = "simd128")))]
        Isa::Simd128 => None,
    }
}

/// One row of a family's table.
pub struct Row<A> {
    /// The operation.
    pub op: &'static str,
    /// The data types.
    pub dtypes: &'static str,
    /// The variant, or an empty text.
    pub variant: &'static str,
    /// The instruction set the instance is compiled for.
    pub isa: Isa,
    /// The instance; `None` on another architecture.
    pub entry: Option<Entry<A>>,
}

/// The rows of a kernel that every instruction set has one instance of.
pub type Rows<A> = [Row<A>; Isa::ALL.len()];

impl<A> Row<A> {
    /// The row of kernel `K` and `isa`.
    pub const fn of<K: Kernel<Args = A>>(isa: Isa) -> Row<A> {
        Row { op: K::OP, dtypes: K::DTYPES, variant: K::VARIANT, isa, entry: entry::<K>(isa) }
    }

    /// The rows of kernel `K`, one per instruction set.
    pub const fn all_of<K: Kernel<Args = A>>() -> Rows<A> {
        [
            Row::of::<K>(Isa::Scalar),
            Row::of::<K>(Isa::Simd128),
            Row::of::<K>(Isa::Neon),
            Row::of::<K>(Isa::Avx2),
            Row::of::<K>(Isa::Avx512),
        ]
    }

    /// `{op}_{dtypes}_{isa}[_variant]`.
    pub fn name(&self) -> String {
        let tail = if self.variant.is_empty() { String::new() } else { format!("_{}", self.variant) };
        format!("{}_{}_{}{tail}", self.op, self.dtypes, self.isa)
    }
}

/// The row of `rows` for `isa`, or the fastest row below it that this build has.
pub fn select<A>(rows: &[Row<A>], isa: Isa) -> Option<Entry<A>> {
    rows.iter()
        .filter(|row| row.isa <= isa && row.entry.is_some())
        .max_by_key(|row| row.isa)
        .and_then(|row| row.entry)
}
