use crate::isa::{Entry, Isa, Kernel, Row, Rows, Simd, select};

/// Type of the elements of a running sum or a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberType {
    /// 32-bit floats.
    F32,
    /// 32-bit integers, wrapping.
    I32,
    /// 64-bit integers, wrapping.
    I64,
}

/// Arguments of a running sum along rows; tile `r` is row `r`.
#[derive(Clone, Copy, Debug)]
pub struct CumsumArgs {
    /// Type of the elements.
    pub dtype: NumberType,
    /// Input rows.
    pub x: *const u8,
    /// Elements between input rows.
    pub x_stride: usize,
    /// Output rows; may be `x` itself.
    pub y: *mut u8,
    /// Elements between output rows.
    pub y_stride: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Whether an element is left out of its own sum.
    pub exclusive: bool,
    /// Whether sums run from the end.
    pub reverse: bool,
}

/// Arguments of a counter: `out[i] = start + i * step`, one tile.
#[derive(Clone, Copy, Debug)]
pub struct IotaArgs {
    /// Type of the elements.
    pub dtype: NumberType,
    /// Output.
    pub out: *mut u8,
    /// Elements.
    pub n: usize,
    /// First value.
    pub start: i64,
    /// Difference of neighbours.
    pub step: i64,
}

/// Instances of the running sum.
pub static CUMSUM: Rows<CumsumArgs> = Row::all_of::<Cumsum>();
/// Instances of the counter.
pub static IOTA: Rows<IotaArgs> = Row::all_of::<Iota>();

/// The running sum for `isa`.
pub fn cumsum_entry(isa: Isa) -> Option<Entry<CumsumArgs>> {
    select(&CUMSUM, isa)
}

/// The counter for `isa`.
pub fn iota_entry(isa: Isa) -> Option<Entry<IotaArgs>> {
    select(&IOTA, isa)
}

struct Cumsum;

impl Kernel for Cumsum {
    type Args = CumsumArgs;
    const OP: &'static str = "cumsum";
    const DTYPES: &'static str = "any";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &CumsumArgs, tile: usize) {
        // SAFETY: the caller guarantees both rows.
        unsafe {
            match args.dtype {
                NumberType::F32 => running_sum(args, tile, 0.0f32, |a, b| a + b),
                NumberType::I32 => running_sum(args, tile, 0i32, i32::wrapping_add),
                NumberType::I64 => running_sum(args, tile, 0i64, i64::wrapping_add),
            }
        }
    }
}

#[inline(never)]
unsafe fn running_sum<T: Copy>(args: &CumsumArgs, row: usize, zero: T, add: impl Fn(T, T) -> T) {
    let mut acc = zero;
    for i in 0..args.cols {
        let at = if args.reverse { args.cols - 1 - i } else { i };
        // SAFETY: the caller guarantees both rows.
        unsafe {
            let sum = add(acc, *args.x.cast::<T>().add(row * args.x_stride + at));
            args.y.cast::<T>().add(row * args.y_stride + at).write(if args.exclusive { acc } else { sum });
            acc = sum;
        }
    }
}

struct Iota;

impl Kernel for Iota {
    type Args = IotaArgs;
    const OP: &'static str = "iota";
    const DTYPES: &'static str = "any";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &IotaArgs, _tile: usize) {
        for i in 0..args.n {
            let value = args.start.wrapping_add((i as i64).wrapping_mul(args.step));
            // SAFETY: the caller guarantees `n` elements.
            unsafe {
                match args.dtype {
                    NumberType::F32 => args.out.cast::<f32>().add(i).write(value as f32),
                    NumberType::I32 => args.out.cast::<i32>().add(i).write(value as i32),
                    NumberType::I64 => args.out.cast::<i64>().add(i).write(value),
                }
            }
        }
    }
}
