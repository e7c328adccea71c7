//! Conversions between element types.
//!
//! Integers convert directly, wrapping; floats to integers truncate and saturate, a NaN gives 0; anything to a boolean
//! is `x != 0`. Roundings are to nearest even and happen once: f64 and integers reach f16 and bf16 through an f32 rounded
//! to odd.

#[cfg(test)]
mod tests;

use crate::isa::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
use rlx_tensor::rounding::f32_to_odd;

/// An element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 64-bit signed integer.
    I64,
    /// 32-bit signed integer.
    I32,
    /// 8-bit signed integer.
    I8,
    /// 8-bit unsigned integer.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl ElementType {
    /// All types.
    pub const ALL: [ElementType; 9] = [
        ElementType::F64,
        ElementType::F32,
        ElementType::F16,
        ElementType::Bf16,
        ElementType::I64,
        ElementType::I32,
        ElementType::I8,
        ElementType::U8,
        ElementType::Bool,
    ];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            ElementType::F64 | ElementType::I64 => 8,
            ElementType::F32 | ElementType::I32 => 4,
            ElementType::F16 | ElementType::Bf16 => 2,
            ElementType::I8 | ElementType::U8 | ElementType::Bool => 1,
        }
    }
}

/// Elements of one tile.
const TILE: usize = 16_384;

/// Arguments of a conversion of `n` contiguous elements; source and target do not overlap.
#[derive(Clone, Copy, Debug)]
pub struct CastArgs {
    /// Source elements.
    pub from: *const u8,
    /// Their type.
    pub from_type: ElementType,
    /// Target elements.
    pub to: *mut u8,
    /// Their type.
    pub to_type: ElementType,
    /// Elements.
    pub n: usize,
}

impl CastArgs {
    /// Number of tiles.
    pub const fn tiles(&self) -> usize {
        self.n.div_ceil(TILE)
    }
}

/// Instances of the conversion.
pub static CAST: Rows<CastArgs> = Row::all_of::<CastAny>();

/// The conversion for `isa`.
pub fn cast_entry(isa: Isa) -> Option<Entry<CastArgs>> {
    select(&CAST, isa)
}

trait Element: Copy {
    fn to_f64(self) -> f64;
    fn to_f32(self) -> f32;
    /// Not rounded to nearest where inexact, but so that a further rounding to 16 bits is right.
    fn to_f32_odd(self) -> f32;
    fn to_i64(self) -> i64;
    fn to_i32(self) -> i32;
    fn to_i8(self) -> i8;
    fn to_u8(self) -> u8;
    fn is_true(self) -> bool;
}

macro_rules! element {
    ($t:ty, $wide:expr, $odd:expr) => {
        impl Element for $t {
            #[inline(always)]
            fn to_f64(self) -> f64 {
                ($wide)(self) as f64
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                ($wide)(self) as f32
            }
            #[inline(always)]
            fn to_f32_odd(self) -> f32 {
                ($odd)(self)
            }
            #[inline(always)]
            fn to_i64(self) -> i64 {
                ($wide)(self) as i64
            }
            #[inline(always)]
            fn to_i32(self) -> i32 {
                ($wide)(self) as i32
            }
            #[inline(always)]
            fn to_i8(self) -> i8 {
                ($wide)(self) as i8
            }
            #[inline(always)]
            fn to_u8(self) -> u8 {
                ($wide)(self) as u8
            }
            #[inline(always)]
            fn is_true(self) -> bool {
                ($wide)(self) as f64 != 0.0
            }
        }
    };
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct F16(u16);
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Bf16(u16);
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Bool(u8);

element!(f64, |x: f64| x, f32_to_odd);
element!(f32, |x: f32| x, |x: f32| x);
element!(F16, |x: F16| f16_to_f32(x.0), |x: F16| f16_to_f32(x.0));
element!(Bf16, |x: Bf16| bf16_to_f32(x.0), |x: Bf16| bf16_to_f32(x.0));
element!(i64, |x: i64| x, odd_integer);
element!(i32, |x: i32| x, |x: i32| f32_to_odd(f64::from(x)));
element!(i8, |x: i8| x, |x: i8| f32::from(x));
element!(u8, |x: u8| x, |x: u8| f32::from(x));
element!(Bool, |x: Bool| u8::from(x.0 != 0), |x: Bool| f32::from(u8::from(x.0 != 0)));

/// [`f32_to_odd`] of an integer, exact also above 2^53.
#[inline(always)]
fn odd_integer(x: i64) -> f32 {
    let high = x & !0x7ff;
    let lost = i64::from(high != x);
    if x.unsigned_abs() < 1 << 53 { f32_to_odd(x as f64) } else { f32_to_odd((high | (lost << 11)) as f64) }
}

struct CastAny;

impl Kernel for CastAny {
    type Args = CastArgs;
    const OP: &'static str = "cast";
    const DTYPES: &'static str = "any";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &CastArgs, tile: usize) {
        let first = tile * TILE;
        let n = TILE.min(args.n - first);
        // SAFETY: the caller guarantees `n` elements of each type.
        unsafe {
            let from = args.from.add(first * args.from_type.bytes());
            let to = args.to.add(first * args.to_type.bytes());
            match (args.from_type, args.to_type) {
                (ElementType::F32, ElementType::F16 | ElementType::Bf16)
                | (ElementType::F16 | ElementType::Bf16, ElementType::F32) => {
                    by_vector(s, args.from_type, from, args.to_type, to, n);
                }
                (ElementType::F64, _) => to_any::<f64>(from, args.to_type, to, n),
                (ElementType::F32, _) => to_any::<f32>(from, args.to_type, to, n),
                (ElementType::F16, _) => to_any::<F16>(from, args.to_type, to, n),
                (ElementType::Bf16, _) => to_any::<Bf16>(from, args.to_type, to, n),
                (ElementType::I64, _) => to_any::<i64>(from, args.to_type, to, n),
                (ElementType::I32, _) => to_any::<i32>(from, args.to_type, to, n),
                (ElementType::I8, _) => to_any::<i8>(from, args.to_type, to, n),
                (ElementType::U8, _) => to_any::<u8>(from, args.to_type, to, n),
                (ElementType::Bool, _) => to_any::<Bool>(from, args.to_type, to, n),
            }
        }
    }
}

#[inline(always)]
unsafe fn by_vector<S: Simd>(
    s: S,
    from_type: ElementType,
    from: *const u8,
    to_type: ElementType,
    to: *mut u8,
    n: usize,
) {
    for i in (0..n).step_by(LANES) {
        let left = (n - i).min(LANES);
        // SAFETY: the caller guarantees `n` elements of each type.
        unsafe {
            let x = match from_type {
                ElementType::F16 => s.load_f16_part(from.cast::<u16>().add(i), left),
                ElementType::Bf16 => s.load_bf16_part(from.cast::<u16>().add(i), left),
                _ => s.load_part(from.cast::<f32>().add(i), left),
            };
            match to_type {
                ElementType::F16 => s.store_f16_part(to.cast::<u16>().add(i), left, x),
                ElementType::Bf16 => s.store_bf16_part(to.cast::<u16>().add(i), left, x),
                _ => s.store_part(to.cast::<f32>().add(i), left, x),
            }
        }
    }
}

#[inline(never)]
unsafe fn to_any<A: Element>(from: *const u8, to_type: ElementType, to: *mut u8, n: usize) {
    // SAFETY: the caller guarantees `n` elements of each type.
    unsafe {
        match to_type {
            ElementType::F64 => each(from, to, n, A::to_f64),
            ElementType::F32 => each(from, to, n, A::to_f32),
            ElementType::F16 => each(from, to, n, |x: A| f32_to_f16(x.to_f32_odd())),
            ElementType::Bf16 => each(from, to, n, |x: A| f32_to_bf16(x.to_f32_odd())),
            ElementType::I64 => each(from, to, n, A::to_i64),
            ElementType::I32 => each(from, to, n, A::to_i32),
            ElementType::I8 => each(from, to, n, A::to_i8),
            ElementType::U8 => each(from, to, n, A::to_u8),
            ElementType::Bool => each(from, to, n, |x: A| u8::from(x.is_true())),
        }
    }
}

#[inline(always)]
unsafe fn each<A: Copy, B>(from: *const u8, to: *mut u8, n: usize, f: impl Fn(A) -> B) {
    for i in 0..n {
        // SAFETY: the caller guarantees `n` elements of each type.
        unsafe { to.cast::<B>().add(i).write(f(*from.cast::<A>().add(i))) };
    }
}
