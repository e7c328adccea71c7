use super::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::{Instances, Isa, Kernel, LANES, Simd};

/// The token of [`Isa::Scalar`]: plain Rust on arrays.
///
/// Operations that compute are functions of their own: a kernel body of sixteen times as many scalar instructions, with
/// a library call for each multiply-add, takes far longer to compile than the rest of this crate and runs no faster.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scalar {}

/// Sixteen lanes as an array.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Lanes<T>([T; LANES]);

#[inline(never)]
fn map<T: Copy, R: Copy + Default>(a: Lanes<T>, f: impl Fn(T) -> R) -> Lanes<R> {
    let mut out = [R::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a.0[i]);
    }
    Lanes(out)
}

#[inline(never)]
fn fused(a: Lanes<f32>, b: Lanes<f32>, c: Lanes<f32>) -> Lanes<f32> {
    let mut out = c.0;
    for i in 0..LANES {
        out[i] = a.0[i].mul_add(b.0[i], out[i]);
    }
    Lanes(out)
}

#[inline(never)]
fn zip<T: Copy, R: Copy + Default>(a: Lanes<T>, b: Lanes<T>, f: impl Fn(T, T) -> R) -> Lanes<R> {
    let mut out = [R::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a.0[i], b.0[i]);
    }
    Lanes(out)
}

#[inline(never)]
fn fold(v: Lanes<f32>, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut x = v.0;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            x[i] = f(x[i], x[i + width]);
        }
        width /= 2;
    }
    x[0]
}

macro_rules! lanewise {
    ($($name:ident($($arg:ident: $t:ty),+) -> $r:ty = $by:ident($f:expr);)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $t),+) -> $r {
            $by($($arg),+, $f)
        }
    )*};
}

type V = Lanes<f32>;
type I = Lanes<i32>;
type M = Lanes<bool>;

impl Simd for Scalar {
    type V = V;
    type I = I;
    type M = M;

    const ISA: Isa = Isa::Scalar;

    #[inline(always)]
    unsafe fn call<K: Kernel>(self, args: &K::Args, tile: usize) {
        // SAFETY: the token proves the features; the caller guarantees the kernel's contract.
        unsafe { K::run_scalar(args, tile) }
    }

    lanewise! {
        add(a: V, b: V) -> V = zip(|x, y| x + y);
        sub(a: V, b: V) -> V = zip(|x, y| x - y);
        mul(a: V, b: V) -> V = zip(|x, y| x * y);
        div(a: V, b: V) -> V = zip(|x, y| x / y);
        min(a: V, b: V) -> V = zip(|x, y| if x < y { x } else { y });
        max(a: V, b: V) -> V = zip(|x, y| if x > y { x } else { y });
        sqrt(a: V) -> V = map(f32::sqrt);
        round(a: V) -> V = map(f32::round_ties_even);
        floor(a: V) -> V = map(f32::floor);
        ceil(a: V) -> V = map(f32::ceil);
        trunc(a: V) -> V = map(f32::trunc);
        lt(a: V, b: V) -> M = zip(|x, y| x < y);
        le(a: V, b: V) -> M = zip(|x, y| x <= y);
        eq(a: V, b: V) -> M = zip(|x, y| x == y);
        and(a: M, b: M) -> M = zip(|x, y| x & y);
        or(a: M, b: M) -> M = zip(|x, y| x | y);
        not(a: M) -> M = map(|x: bool| !x);
        iadd(a: I, b: I) -> I = zip(i32::wrapping_add);
        isub(a: I, b: I) -> I = zip(i32::wrapping_sub);
        iand(a: I, b: I) -> I = zip(|x, y| x & y);
        ior(a: I, b: I) -> I = zip(|x, y| x | y);
        ixor(a: I, b: I) -> I = zip(|x, y| x ^ y);
        igt(a: I, b: I) -> M = zip(|x, y| x > y);
        ieq(a: I, b: I) -> M = zip(|x, y| x == y);
        to_int(a: V) -> I = map(|x: f32| x.round_ties_even() as i32);
        to_float(a: I) -> V = map(|x: i32| x as f32);
        bits(a: V) -> I = map(|x: f32| x.to_bits() as i32);
        with_bits(a: I) -> V = map(|x: i32| f32::from_bits(x as u32));
    }

    #[inline(always)]
    fn zero(self) -> V {
        Lanes([0.0; LANES])
    }
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        Lanes([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller guarantees 16 readable values.
        unsafe { Lanes(p.cast::<[f32; LANES]>().read_unaligned()) }
    }
    #[inline(never)]
    unsafe fn load_part(self, p: *const f32, n: usize) -> V {
        let mut out = [0.0; LANES];
        for (i, lane) in out.iter_mut().enumerate().take(n) {
            // SAFETY: the caller guarantees `n` readable values.
            *lane = unsafe { p.add(i).read_unaligned() };
        }
        Lanes(out)
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the caller guarantees 16 writable values.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(v.0) }
    }
    #[inline(never)]
    unsafe fn store_part(self, p: *mut f32, n: usize, v: V) {
        for (i, lane) in v.0.iter().enumerate().take(n) {
            // SAFETY: the caller guarantees `n` writable values.
            unsafe { p.add(i).write_unaligned(*lane) };
        }
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        fused(a, b, c)
    }
    #[inline(always)]
    fn fnma(self, a: V, b: V, c: V) -> V {
        fused(map(a, |x: f32| -x), b, c)
    }
    #[inline(never)]
    fn select(self, m: M, a: V, b: V) -> V {
        let mut out = b.0;
        for i in 0..LANES {
            if m.0[i] {
                out[i] = a.0[i];
            }
        }
        Lanes(out)
    }
    #[inline(never)]
    fn first(self, n: usize) -> M {
        let mut out = [false; LANES];
        for (i, lane) in out.iter_mut().enumerate() {
            *lane = i < n;
        }
        Lanes(out)
    }
    #[inline(never)]
    fn any(self, m: M) -> bool {
        m.0.iter().any(|x| *x)
    }
    #[inline(always)]
    fn isplat(self, x: i32) -> I {
        Lanes([x; LANES])
    }
    #[inline(always)]
    unsafe fn iload(self, p: *const i32) -> I {
        // SAFETY: the caller guarantees 16 readable values.
        unsafe { Lanes(p.cast::<[i32; LANES]>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn istore(self, p: *mut i32, v: I) {
        // SAFETY: the caller guarantees 16 writable values.
        unsafe { p.cast::<[i32; LANES]>().write_unaligned(v.0) }
    }
    #[inline(never)]
    unsafe fn iload_i8(self, p: *const i8) -> I {
        // SAFETY: the caller guarantees 16 readable values.
        map(unsafe { Lanes(p.cast::<[i8; LANES]>().read_unaligned()) }, i32::from)
    }
    #[inline(never)]
    unsafe fn istore_i8(self, p: *mut i8, v: I) {
        let bytes = map(v, |x| x as i8);
        // SAFETY: the caller guarantees 16 writable values.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(bytes.0) }
    }
    #[inline(always)]
    fn ishl(self, a: I, n: u32) -> I {
        map(a, |x| x << n)
    }
    #[inline(always)]
    fn ishr(self, a: I, n: u32) -> I {
        map(a, |x| ((x as u32) >> n) as i32)
    }
    #[inline(always)]
    fn isar(self, a: I, n: u32) -> I {
        map(a, |x| x >> n)
    }
    #[inline(never)]
    unsafe fn load_bf16(self, p: *const u16) -> V {
        // SAFETY: the caller guarantees 16 readable values.
        map(Lanes(unsafe { p.cast::<[u16; LANES]>().read_unaligned() }), bf16_to_f32)
    }
    #[inline(never)]
    unsafe fn load_bf16_part(self, p: *const u16, n: usize) -> V {
        let mut out = [0.0; LANES];
        for (i, lane) in out.iter_mut().enumerate().take(n) {
            // SAFETY: the caller guarantees `n` readable values.
            *lane = bf16_to_f32(unsafe { p.add(i).read_unaligned() });
        }
        Lanes(out)
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: V) {
        // SAFETY: the caller guarantees 16 writable values.
        unsafe { self.store_bf16_part(p, LANES, v) }
    }
    #[inline(never)]
    unsafe fn store_bf16_part(self, p: *mut u16, n: usize, v: V) {
        for (i, lane) in v.0.iter().enumerate().take(n) {
            // SAFETY: the caller guarantees `n` writable values.
            unsafe { p.add(i).write_unaligned(f32_to_bf16(*lane)) };
        }
    }
    #[inline(never)]
    unsafe fn load_f16(self, p: *const u16) -> V {
        // SAFETY: the caller guarantees 16 readable values.
        map(Lanes(unsafe { p.cast::<[u16; LANES]>().read_unaligned() }), f16_to_f32)
    }
    #[inline(never)]
    unsafe fn load_f16_part(self, p: *const u16, n: usize) -> V {
        let mut out = [0.0; LANES];
        for (i, lane) in out.iter_mut().enumerate().take(n) {
            // SAFETY: the caller guarantees `n` readable values.
            *lane = f16_to_f32(unsafe { p.add(i).read_unaligned() });
        }
        Lanes(out)
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: V) {
        // SAFETY: the caller guarantees 16 writable values.
        unsafe { self.store_f16_part(p, LANES, v) }
    }
    #[inline(never)]
    unsafe fn store_f16_part(self, p: *mut u16, n: usize, v: V) {
        for (i, lane) in v.0.iter().enumerate().take(n) {
            // SAFETY: the caller guarantees `n` writable values.
            unsafe { p.add(i).write_unaligned(f32_to_f16(*lane)) };
        }
    }
    #[inline(always)]
    fn reduce_add(self, v: V) -> f32 {
        fold(v, |a, b| a + b)
    }
    #[inline(always)]
    fn reduce_max(self, v: V) -> f32 {
        fold(v, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn reduce_min(self, v: V) -> f32 {
        fold(v, |a, b| if a < b { a } else { b })
    }
    #[inline(never)]
    fn transpose(self, rows: [V; 16]) -> [V; 16] {
        let mut out = rows;
        for (i, row) in out.iter_mut().enumerate() {
            for (j, source) in rows.iter().enumerate() {
                row.0[j] = source.0[i];
            }
        }
        out
    }
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}
