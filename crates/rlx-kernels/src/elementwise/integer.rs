use super::{MAX_OUTER, Placed, offset_of, tile_of, tiles_of};
use crate::isa::{Entry, Isa, Kernel, Row, Rows, Simd, select};

/// Type of the operands of an [`IntegerOp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IntegerType {
    /// 32-bit signed.
    I32,
    /// 64-bit signed.
    I64,
    /// 8-bit unsigned, booleans included.
    U8,
}

impl IntegerType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            IntegerType::I32 => 4,
            IntegerType::I64 => 8,
            IntegerType::U8 => 1,
        }
    }
}

/// An operation on two integers. Arithmetic wraps; division truncates, and by zero gives 0. Comparisons store a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IntegerOp {
    /// `a + b`.
    Add,
    /// `a - b`.
    Sub,
    /// `a * b`.
    Mul,
    /// `a / b`.
    Div,
    /// Remainder with the sign of `a`; by zero gives 0.
    Rem,
    /// The smaller.
    Min,
    /// The larger.
    Max,
    /// Bits in both.
    And,
    /// Bits in either.
    Or,
    /// Bits in one.
    Xor,
    /// `a == b`.
    Equal,
    /// `a < b`.
    Less,
    /// `a <= b`.
    LessEqual,
}

impl IntegerOp {
    /// Whether the result is a byte, 0 or 1.
    pub const fn compares(self) -> bool {
        matches!(self, IntegerOp::Equal | IntegerOp::Less | IntegerOp::LessEqual)
    }
}

/// Arguments of an integer operation. The output may lie exactly over an input of the same type.
#[derive(Clone, Copy, Debug)]
pub struct IntegerArgs {
    /// The operation.
    pub op: IntegerOp,
    /// Type of `a`, `b` and, unless the operation compares, of the output.
    pub dtype: IntegerType,
    /// First operand; only read.
    pub a: Placed,
    /// Second operand; only read.
    pub b: Placed,
    /// Output; `inner` is 1.
    pub out: Placed,
    /// Outer extents.
    pub outer: [usize; MAX_OUTER],
    /// Elements of the innermost run.
    pub cols: usize,
}

impl IntegerArgs {
    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        tiles_of(self.outer.iter().product(), self.cols)
    }
}

/// Arguments of a choice between two operands of any type: `out = mask != 0 ? a : b`.
#[derive(Clone, Copy, Debug)]
pub struct SelectArgs {
    /// Bytes of an element of `a`, `b` and `out`: 1, 2, 4 or 8.
    pub element_bytes: usize,
    /// Booleans, one byte each; only read.
    pub mask: Placed,
    /// Taken where the mask is set; only read.
    pub a: Placed,
    /// Taken elsewhere; only read.
    pub b: Placed,
    /// Output; `inner` is 1.
    pub out: Placed,
    /// Outer extents.
    pub outer: [usize; MAX_OUTER],
    /// Elements of the innermost run.
    pub cols: usize,
}

impl SelectArgs {
    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        tiles_of(self.outer.iter().product(), self.cols)
    }
}

/// Instances of integer operations.
pub static INTEGER: Rows<IntegerArgs> = Row::all_of::<IntegerKernel>();
/// Instances of the choice.
pub static SELECT: Rows<SelectArgs> = Row::all_of::<SelectKernel>();

/// Integer operations for `isa`.
pub fn integer_entry(isa: Isa) -> Option<Entry<IntegerArgs>> {
    select(&INTEGER, isa)
}

/// The choice for `isa`.
pub fn select_entry(isa: Isa) -> Option<Entry<SelectArgs>> {
    select(&SELECT, isa)
}

struct IntegerKernel;

impl Kernel for IntegerKernel {
    type Args = IntegerArgs;
    const OP: &'static str = "integer";
    const DTYPES: &'static str = "int";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &IntegerArgs, tile: usize) {
        // SAFETY: the caller guarantees the operands.
        unsafe {
            match args.dtype {
                IntegerType::I32 => run_integers::<i32>(args, tile),
                IntegerType::I64 => run_integers::<i64>(args, tile),
                IntegerType::U8 => run_integers::<u8>(args, tile),
            }
        }
    }
}

trait Integer: Copy + Ord {
    fn add(self, b: Self) -> Self;
    fn sub(self, b: Self) -> Self;
    fn mul(self, b: Self) -> Self;
    fn div(self, b: Self) -> Self;
    fn rem(self, b: Self) -> Self;
    fn and(self, b: Self) -> Self;
    fn or(self, b: Self) -> Self;
    fn xor(self, b: Self) -> Self;
}

macro_rules! integers {
    ($($t:ty),*) => {$(
        impl Integer for $t {
            #[inline(always)]
            fn add(self, b: $t) -> $t {
                self.wrapping_add(b)
            }
            #[inline(always)]
            fn sub(self, b: $t) -> $t {
                self.wrapping_sub(b)
            }
            #[inline(always)]
            fn mul(self, b: $t) -> $t {
                self.wrapping_mul(b)
            }
            #[inline(always)]
            fn div(self, b: $t) -> $t {
                if b == 0 { 0 } else { self.wrapping_div(b) }
            }
            #[inline(always)]
            fn rem(self, b: $t) -> $t {
                if b == 0 { 0 } else { self.wrapping_rem(b) }
            }
            #[inline(always)]
            fn and(self, b: $t) -> $t {
                self & b
            }
            #[inline(always)]
            fn or(self, b: $t) -> $t {
                self | b
            }
            #[inline(always)]
            fn xor(self, b: $t) -> $t {
                self ^ b
            }
        }
    )*};
}

integers!(i32, i64, u8);

#[inline(never)]
unsafe fn run_integers<T: Integer>(args: &IntegerArgs, tile: usize) {
    // SAFETY: the caller guarantees the operands.
    unsafe {
        match args.op {
            IntegerOp::Add => each(args, tile, T::add),
            IntegerOp::Sub => each(args, tile, T::sub),
            IntegerOp::Mul => each(args, tile, T::mul),
            IntegerOp::Div => each(args, tile, T::div),
            IntegerOp::Rem => each(args, tile, T::rem),
            IntegerOp::Min => each(args, tile, <T as Ord>::min),
            IntegerOp::Max => each(args, tile, <T as Ord>::max),
            IntegerOp::And => each(args, tile, T::and),
            IntegerOp::Or => each(args, tile, T::or),
            IntegerOp::Xor => each(args, tile, T::xor),
            IntegerOp::Equal => each(args, tile, |a: T, b: T| u8::from(a == b)),
            IntegerOp::Less => each(args, tile, |a: T, b: T| u8::from(a < b)),
            IntegerOp::LessEqual => each(args, tile, |a: T, b: T| u8::from(a <= b)),
        }
    }
}

#[inline(always)]
unsafe fn each<T: Copy, R>(args: &IntegerArgs, tile: usize, f: impl Fn(T, T) -> R) {
    let (runs, cols) = tile_of(args.outer.iter().product(), args.cols, tile);
    for run in runs {
        // SAFETY: the caller guarantees the operands; offsets stay inside them.
        unsafe {
            let a = args.a.at.cast::<T>().offset(offset_of(&args.outer, &args.a.strides, run));
            let b = args.b.at.cast::<T>().offset(offset_of(&args.outer, &args.b.strides, run));
            let out = args.out.at.cast::<R>().offset(offset_of(&args.outer, &args.out.strides, run));
            let (a_step, b_step) = (args.a.inner as usize, args.b.inner as usize);
            for i in cols.clone() {
                out.add(i).write(f(*a.add(i * a_step), *b.add(i * b_step)));
            }
        }
    }
}

struct SelectKernel;

impl Kernel for SelectKernel {
    type Args = SelectArgs;
    const OP: &'static str = "select";
    const DTYPES: &'static str = "any";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &SelectArgs, tile: usize) {
        // SAFETY: the caller guarantees the operands.
        unsafe {
            match args.element_bytes {
                1 => choose::<u8>(args, tile),
                2 => choose::<u16>(args, tile),
                4 => choose::<u32>(args, tile),
                _ => choose::<u64>(args, tile),
            }
        }
    }
}

#[inline(never)]
unsafe fn choose<T: Copy>(args: &SelectArgs, tile: usize) {
    let (runs, cols) = tile_of(args.outer.iter().product(), args.cols, tile);
    for run in runs {
        // SAFETY: the caller guarantees the operands; offsets stay inside them.
        unsafe {
            let mask = args.mask.at.offset(offset_of(&args.outer, &args.mask.strides, run));
            let a = args.a.at.cast::<T>().offset(offset_of(&args.outer, &args.a.strides, run));
            let b = args.b.at.cast::<T>().offset(offset_of(&args.outer, &args.b.strides, run));
            let out = args.out.at.cast::<T>().offset(offset_of(&args.outer, &args.out.strides, run));
            for i in cols.clone() {
                let source = if *mask.add(i * args.mask.inner as usize) != 0 {
                    (a, args.a.inner)
                } else {
                    (b, args.b.inner)
                };
                out.add(i).write(*source.0.add(i * source.1 as usize));
            }
        }
    }
}
