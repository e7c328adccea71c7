//! Integers. A word of an arena is 32 bits: it holds every element of a narrower dtype, and those elements of a wider one that a signed
//! word holds. Narrow results wrap as their dtype does. A wide result that a word does not hold is told apart by a check, which fails the
//! run by name: no wrong number is ever stored as if it were right.

use super::{Draft, LowerCx, element};
use crate::ir::{BinaryFn, Element, UnaryFn, Value};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::{DType, Shape};

/// What the check of a wide result says.
pub(crate) const BEYOND: &str = "a result does not fit the 32 bits that the device keeps of an integer";

/// A value, and whether 64 bits would give the same, where that is not certain.
pub(super) type Exact = (Value, Option<Value>);

/// Whether a word holds some elements only.
pub(super) fn is_wide(dtype: DType) -> bool {
    matches!(dtype, DType::I64 | DType::U64 | DType::U32)
}

/// Whether operands and results are of dtypes whose arithmetic devices do, integers of every width included.
pub(super) fn computes_whole(inputs: &[&Shape], outputs: &[&Shape]) -> bool {
    inputs.iter().chain(outputs).all(|s| element(s.dtype()).is_some())
}

/// Whether elements are integers of less than a word.
pub(super) fn is_narrow(dtype: DType) -> bool {
    range(dtype).is_some()
}

/// The least and the largest element of a narrow dtype.
fn range(dtype: DType) -> Option<[i32; 2]> {
    match dtype {
        DType::I8 => Some([-128, 127]),
        DType::U8 => Some([0, 255]),
        DType::I16 => Some([-32_768, 32_767]),
        DType::U16 => Some([0, 65_535]),
        _ => None,
    }
}

/// An element of an integer dtype, from a number: truncated and saturated; `None` if no word holds it.
pub(super) fn literal(dtype: DType, number: f64) -> Option<i32> {
    match (dtype, range(dtype)) {
        (_, Some([least, most])) => Some((number as i32).clamp(least, most)),
        (DType::I64, _) => i32::try_from(number as i64).ok(),
        (DType::U64 | DType::U32, _) => i32::try_from(number as u64).ok(),
        _ => Some(number as i32),
    }
}

/// The value as a narrow dtype holds it: its lowest bits.
pub(super) fn wrapped(d: &mut Draft<'_>, dtype: DType, value: Value) -> Value {
    let Some([least, most]) = range(dtype) else { return value };
    let b = &mut d.b;
    let mask = b.int(most - least);
    let low = b.binary(BinaryFn::And, value, mask);
    if least == 0 {
        return low;
    }
    let (most, span) = (b.int(most), b.int(most - least + 1));
    let above = b.less(most, low);
    let negative = b.sub(low, span);
    b.select(above, negative, low)
}

fn both(d: &mut Draft<'_>, a: Option<Value>, b: Option<Value>) -> Option<Value> {
    match (a, b) {
        (Some(a), Some(b)) => Some(d.b.and(a, b)),
        (one, None) | (None, one) => one,
    }
}

fn not(d: &mut Draft<'_>, x: Value) -> Value {
    d.b.unary(UnaryFn::Not, x)
}

fn equals(d: &mut Draft<'_>, x: Value, number: i32) -> Value {
    let number = d.b.int(number);
    d.b.binary(BinaryFn::Equal, x, number)
}

/// A result with what an unsigned dtype asks of it besides: that it is not below 0.
fn signed_as(d: &mut Draft<'_>, dtype: DType, (value, exact): Exact) -> Exact {
    if dtype == DType::I64 {
        return (value, exact);
    }
    let zero = d.b.int(0);
    let there = d.b.binary(BinaryFn::LessEqual, zero, value);
    (value, both(d, exact, Some(there)))
}

/// `plain` is the function of two integers in 32 bits, computed already.
pub(super) fn binary(
    d: &mut Draft<'_>,
    dtype: DType,
    kind: BinaryOp,
    [x, y]: [Value; 2],
    plain: Value,
) -> Exact {
    if !is_wide(dtype) || kind.is_comparison() {
        return (plain, None);
    }
    let exact = match kind {
        BinaryOp::Add | BinaryOp::Sub => Some(sum_is_exact(d, kind, [x, y], plain)),
        BinaryOp::Mul => Some(product_is_exact(d, [x, y], plain)),
        BinaryOp::Div => {
            let (least, minus) = (equals(d, x, i32::MIN), equals(d, y, -1));
            let beyond = d.b.and(least, minus);
            Some(not(d, beyond))
        }
        _ => None,
    };
    signed_as(d, dtype, (plain, exact))
}

/// A sum wrapped if it has neither term's sign; a difference if its sign and the second term's are not the first's.
fn sum_is_exact(d: &mut Draft<'_>, kind: BinaryOp, [x, y]: [Value; 2], result: Value) -> Value {
    let b = &mut d.b;
    let first = b.binary(BinaryFn::Xor, x, result);
    let second = match kind {
        BinaryOp::Add => b.binary(BinaryFn::Xor, y, result),
        _ => b.binary(BinaryFn::Xor, x, y),
    };
    let turned = b.binary(BinaryFn::And, first, second);
    let zero = b.int(0);
    b.binary(BinaryFn::LessEqual, zero, turned)
}

/// A product that did not wrap gives back its factor.
fn product_is_exact(d: &mut Draft<'_>, [x, y]: [Value; 2], product: Value) -> Value {
    let quotient = d.b.div(product, x);
    let back = d.b.binary(BinaryFn::Equal, quotient, y);
    // The one product that gives it back although it wrapped.
    let (minus, least) = (equals(d, x, -1), equals(d, y, i32::MIN));
    let beyond = d.b.and(minus, least);
    let within = not(d, beyond);
    let back = d.b.and(back, within);
    let none = equals(d, x, 0);
    d.b.binary(BinaryFn::Or, none, back)
}

/// `plain` is the function of one integer in 32 bits, computed already.
pub(super) fn unary(d: &mut Draft<'_>, dtype: DType, kind: UnaryOp, x: Value, plain: Value) -> Exact {
    if !is_wide(dtype) {
        return (plain, None);
    }
    let exact = matches!(kind, UnaryOp::Neg | UnaryOp::Abs).then(|| {
        let least = equals(d, x, i32::MIN);
        not(d, least)
    });
    signed_as(d, dtype, (plain, exact))
}

/// An integer or a truth value as an integer dtype.
fn of_integer(d: &mut Draft<'_>, x: Value, to: DType) -> Exact {
    match is_wide(to) {
        true => signed_as(d, to, (x, None)),
        false => (wrapped(d, to, x), None),
    }
}

/// A float as an integer dtype: truncated and saturated; NaN is 0.
fn of_float(d: &mut Draft<'_>, x: Value, to: DType) -> Exact {
    let whole = d.b.unary(UnaryFn::ToInt, x);
    if let Some([least, most]) = range(to) {
        let (least, most) = (d.b.int(least), d.b.int(most));
        let above = d.b.binary(BinaryFn::Max, whole, least);
        return (d.b.binary(BinaryFn::Min, above, most), None);
    }
    if !is_wide(to) {
        return (whole, None);
    }
    let limit = d.b.float(2f64.powi(31));
    let nan = d.b.unary(UnaryFn::IsNan, x);
    let below = d.b.less(x, limit);
    let mut there = d.b.binary(BinaryFn::Or, nan, below);
    if to != DType::I64 {
        let zero = d.b.int(0);
        return (d.b.binary(BinaryFn::Max, whole, zero), Some(there));
    }
    let limit = d.b.float(-(2f64.powi(31)));
    let above = d.b.binary(BinaryFn::LessEqual, limit, x);
    let above = d.b.binary(BinaryFn::Or, nan, above);
    there = d.b.and(there, above);
    (whole, Some(there))
}

/// A number or truth value as an integer dtype.
pub(super) fn convert(d: &mut Draft<'_>, x: Value, to: DType) -> Exact {
    match d.b.ty(x).element {
        Element::F32 => of_float(d, x, to),
        Element::I32 => of_integer(d, x, to),
        Element::Bool => {
            let (one, zero) = (d.b.int(1), d.b.int(0));
            (d.b.select(x, one, zero), None)
        }
    }
}

/// A check that a wide result is exact.
pub(super) fn check(cx: &mut LowerCx<'_>, d: &mut Draft<'_>, exact: Option<Value>, inside: Value) {
    if let Some(exact) = exact {
        let slot = cx.limit(d, BEYOND);
        d.b.check(exact, inside, slot);
    }
}
