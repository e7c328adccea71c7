use super::{Isa, Kernel};

/// Lanes of [`Simd::V`], on every instruction set.
pub const LANES: usize = 16;

/// A token that proves an instruction set, with operations on vectors of [`LANES`] f32 or i32 lanes.
///
/// A token exists only where its instruction set does, so arithmetic is safe to call; memory operations are not. Every
/// implementation gives the same bits per lane (NaN payloads apart), but for [`Simd::FUSED`]: IEEE-754 arithmetic, round to nearest even.
/// Callers are `#[inline(always)]` and free of closures, so that the whole body takes the features of its instance.
pub trait Simd: Copy + Send + Sync + 'static {
    /// [`LANES`] f32 values.
    type V: Copy;
    /// [`LANES`] i32 values.
    type I: Copy;
    /// [`LANES`] truth values.
    type M: Copy;

    /// The instruction set this token proves.
    const ISA: Isa;
    /// [`Simd::fma`] and [`Simd::fnma`] round once. Without, the product is rounded before it is added.
    const FUSED: bool = true;

    /// Calls `K`'s instance of this instruction set as a function of its own: the way to keep a large body out of line.
    ///
    /// # Safety
    /// The contract of [`Kernel::run`].
    unsafe fn call<K: Kernel>(self, args: &K::Args, tile: usize);

    /// All lanes zero.
    fn zero(self) -> Self::V;
    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Loads 16 values, at any alignment.
    ///
    /// # Safety
    /// `p` is valid for reads of 16 values.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// Loads `n <= 16` values; the other lanes are zero.
    ///
    /// # Safety
    /// `p` is valid for reads of `n` values.
    unsafe fn load_part(self, p: *const f32, n: usize) -> Self::V;
    /// Stores 16 values, at any alignment.
    ///
    /// # Safety
    /// `p` is valid for writes of 16 values.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Stores the first `n <= 16` lanes.
    ///
    /// # Safety
    /// `p` is valid for writes of `n` values.
    unsafe fn store_part(self, p: *mut f32, n: usize, v: Self::V);

    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c` with one rounding, if [`Simd::FUSED`].
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c - a * b` with one rounding, if [`Simd::FUSED`].
    fn fnma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a < b ? a : b`: the second where a lane is unordered.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a > b ? a : b`: the second where a lane is unordered.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// Square root, correctly rounded.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// To the next integer at or below.
    fn floor(self, a: Self::V) -> Self::V;
    /// To the next integer at or above.
    fn ceil(self, a: Self::V) -> Self::V;
    /// To the next integer towards zero.
    fn trunc(self, a: Self::V) -> Self::V;

    /// `a < b`; false where unordered.
    fn lt(self, a: Self::V, b: Self::V) -> Self::M;
    /// `a <= b`; false where unordered.
    fn le(self, a: Self::V, b: Self::V) -> Self::M;
    /// `a == b`; false where unordered.
    fn eq(self, a: Self::V, b: Self::V) -> Self::M;
    /// `m ? a : b`.
    fn select(self, m: Self::M, a: Self::V, b: Self::V) -> Self::V;
    /// The first `n` lanes true; `n <= 16`.
    fn first(self, n: usize) -> Self::M;
    /// Both.
    fn and(self, a: Self::M, b: Self::M) -> Self::M;
    /// Either.
    fn or(self, a: Self::M, b: Self::M) -> Self::M;
    /// Neither.
    fn not(self, a: Self::M) -> Self::M;
    /// Whether a lane is true.
    fn any(self, m: Self::M) -> bool;

    /// All lanes `x`.
    fn isplat(self, x: i32) -> Self::I;
    /// Loads 16 integers, at any alignment.
    ///
    /// # Safety
    /// `p` is valid for reads of 16 values.
    unsafe fn iload(self, p: *const i32) -> Self::I;
    /// Stores 16 integers, at any alignment.
    ///
    /// # Safety
    /// `p` is valid for writes of 16 values.
    unsafe fn istore(self, p: *mut i32, v: Self::I);
    /// 16 signed bytes, widened.
    ///
    /// # Safety
    /// `p` is valid for reads of 16 values.
    unsafe fn iload_i8(self, p: *const i8) -> Self::I;
    /// Stores 16 integers, which must lie within i8, as bytes.
    ///
    /// # Safety
    /// `p` is valid for writes of 16 values.
    unsafe fn istore_i8(self, p: *mut i8, v: Self::I);
    /// `a + b`, wrapping.
    fn iadd(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a - b`, wrapping.
    fn isub(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bits in both.
    fn iand(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bits in either.
    fn ior(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bits in one.
    fn ixor(self, a: Self::I, b: Self::I) -> Self::I;
    /// Shifts left by `n < 32`.
    fn ishl(self, a: Self::I, n: u32) -> Self::I;
    /// Shifts right by `n < 32`, filling with zeros.
    fn ishr(self, a: Self::I, n: u32) -> Self::I;
    /// Shifts right by `n < 32`, filling with the sign.
    fn isar(self, a: Self::I, n: u32) -> Self::I;
    /// `a > b`, signed.
    fn igt(self, a: Self::I, b: Self::I) -> Self::M;
    /// `a == b`.
    fn ieq(self, a: Self::I, b: Self::I) -> Self::M;
    /// To the nearest integer, ties to even; lanes must lie within i32.
    fn to_int(self, a: Self::V) -> Self::I;
    /// To f32, rounded to nearest.
    fn to_float(self, a: Self::I) -> Self::V;
    /// The bits of each lane.
    fn bits(self, a: Self::V) -> Self::I;
    /// The values of given bits.
    fn with_bits(self, a: Self::I) -> Self::V;

    /// Widens 16 bf16 values.
    ///
    /// # Safety
    /// `p` is valid for reads of 16 values.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// Widens `n <= 16` bf16 values; the other lanes are zero.
    ///
    /// # Safety
    /// `p` is valid for reads of `n` values.
    unsafe fn load_bf16_part(self, p: *const u16, n: usize) -> Self::V;
    /// Stores 16 values rounded to bf16 (nearest even, denormals kept).
    ///
    /// # Safety
    /// `p` is valid for writes of 16 values.
    unsafe fn store_bf16(self, p: *mut u16, v: Self::V);
    /// Stores the first `n <= 16` lanes rounded to bf16.
    ///
    /// # Safety
    /// `p` is valid for writes of `n` values.
    unsafe fn store_bf16_part(self, p: *mut u16, n: usize, v: Self::V);
    /// Widens 16 f16 values.
    ///
    /// # Safety
    /// `p` is valid for reads of 16 values.
    unsafe fn load_f16(self, p: *const u16) -> Self::V;
    /// Widens `n <= 16` f16 values; the other lanes are zero.
    ///
    /// # Safety
    /// `p` is valid for reads of `n` values.
    unsafe fn load_f16_part(self, p: *const u16, n: usize) -> Self::V;
    /// Stores 16 values rounded to f16 (nearest even).
    ///
    /// # Safety
    /// `p` is valid for writes of 16 values.
    unsafe fn store_f16(self, p: *mut u16, v: Self::V);
    /// Stores the first `n <= 16` lanes rounded to f16.
    ///
    /// # Safety
    /// `p` is valid for writes of `n` values.
    unsafe fn store_f16_part(self, p: *mut u16, n: usize, v: Self::V);

    /// The sum of all lanes: lane `i` plus lane `i + 8`, then `+ 4`, `+ 2`, `+ 1`.
    fn reduce_add(self, v: Self::V) -> f32;
    /// The largest lane, by [`Simd::max`] in the tree of [`Simd::reduce_add`].
    fn reduce_max(self, v: Self::V) -> f32;
    /// The smallest lane, by [`Simd::min`] in the tree of [`Simd::reduce_add`].
    fn reduce_min(self, v: Self::V) -> f32;
    /// Exchanges rows and columns of a 16 x 16 tile.
    fn transpose(self, rows: [Self::V; 16]) -> [Self::V; 16];

    /// Hints that the line at `p` is read soon; any address may be given.
    fn prefetch(self, p: *const u8);

    /// Loads `min(n, 16)` values; the other lanes are zero.
    ///
    /// # Safety
    /// `p` is valid for reads of `min(n, 16)` values.
    #[inline(always)]
    unsafe fn load_to(self, p: *const f32, n: usize) -> Self::V {
        // SAFETY: the caller guarantees the memory.
        unsafe { if n >= LANES { self.load(p) } else { self.load_part(p, n) } }
    }
    /// Stores the first `min(n, 16)` lanes.
    ///
    /// # Safety
    /// `p` is valid for writes of `min(n, 16)` values.
    #[inline(always)]
    unsafe fn store_to(self, p: *mut f32, n: usize, v: Self::V) {
        // SAFETY: the caller guarantees the memory.
        unsafe { if n >= LANES { self.store(p, v) } else { self.store_part(p, n, v) } }
    }
    /// `a * 2^n` with one rounding, for whole `n` in -160..=160 and `a` in [0.5, 2), or a NaN.
    #[inline(always)]
    fn scale_by_power(self, a: Self::V, n: Self::V) -> Self::V {
        let n = self.to_int(n);
        let half = self.isar(n, 1);
        let bias = self.isplat(127);
        let low = self.with_bits(self.ishl(self.iadd(half, bias), 23));
        let high = self.with_bits(self.ishl(self.iadd(self.isub(n, half), bias), 23));
        self.mul(self.mul(a, low), high)
    }

    /// `|a|`.
    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        self.with_bits(self.iand(self.bits(a), self.isplat(i32::MAX)))
    }
    /// `-a`, also of zero and NaN.
    #[inline(always)]
    fn neg(self, a: Self::V) -> Self::V {
        self.with_bits(self.ixor(self.bits(a), self.isplat(i32::MIN)))
    }
    /// The magnitude of `a` with the sign of `b`.
    #[inline(always)]
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V {
        let sign = self.iand(self.bits(b), self.isplat(i32::MIN));
        self.with_bits(self.ior(self.iand(self.bits(a), self.isplat(i32::MAX)), sign))
    }
    /// Lanes that are NaN.
    #[inline(always)]
    fn is_nan(self, a: Self::V) -> Self::M {
        self.not(self.eq(a, a))
    }
}
