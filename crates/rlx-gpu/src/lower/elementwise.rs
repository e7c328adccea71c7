//! Functions of elements: a lane each.

use super::whole::{self, Exact, computes_whole};
use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand, computes, contiguous, element};
use crate::ir::{BinaryFn, Element, UnaryFn, Value};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::activation::{Activation, ActivationKind};
use rlx_graph::ops::binary::{Binary, BinaryOp};
use rlx_graph::ops::cast::Cast;
use rlx_graph::ops::fused_elementwise::{Arg, Function, FusedElementwise};
use rlx_graph::ops::gated::Gated;
use rlx_graph::ops::select::Select;
use rlx_graph::ops::unary::{Unary, UnaryOp};
use rlx_tensor::{DType, Shape};

/// A kernel of one lane an element of `to`, whose operands have the result's dims.
pub(super) fn map(
    cx: &mut LowerCx<'_>,
    name: &str,
    from: &[Operand],
    to: &Operand,
    element: impl FnOnce(&mut Draft<'_>, &[Value]) -> Value,
) -> Result<(), BackendError> {
    map_exact(cx, name, from, to, |d, values| (element(d, values), None))
}

/// As [`map`], of values that may not be what wide integers give.
fn map_exact(
    cx: &mut LowerCx<'_>,
    name: &str,
    from: &[Operand],
    to: &Operand,
    element: impl FnOnce(&mut Draft<'_>, &[Value]) -> Exact,
) -> Result<(), BackendError> {
    let mut d = cx.draft(format!("map_{name}"));
    let total = Amount::product(&to.dims);
    let flat =
        |o: &Operand| Operand { dims: vec![total.clone()], strides: vec![Amount::Known(1)], ..o.clone() };
    let plain = contiguous(&to.dims);
    let whole = from.iter().chain([to]).all(|o| o.strides == plain);
    let (from, to) = match whole {
        true => (from.iter().map(flat).collect(), flat(to)),
        false => (from.to_vec(), to.clone()),
    };
    let linear = d.linear();
    let (at, inside) = d.coordinates(linear, &to.dims);
    let mut values = Vec::with_capacity(from.len());
    for operand in &from {
        let view = d.read(operand);
        values.push(d.b.load(view, &at, Some(inside)));
    }
    let (value, exact) = element(&mut d, &values);
    whole::check(cx, &mut d, exact, inside);
    let value = d.rounded(to.dtype, value);
    let view = d.write(&to);
    d.b.store(view, &at, value, Some(inside));
    cx.launch(d, total.ceil_div(LANES as usize))
}

/// The step's operands broadcast to its result.
fn aligned(cx: &LowerCx<'_>, step: &StepSpec) -> (Vec<Operand>, Operand) {
    let to = cx.operand(&step.outputs[0]);
    let from = cx.inputs(step).iter().map(|o| o.broadcast(&to.dims)).collect();
    (from, to)
}

fn erf(d: &mut Draft<'_>, x: Value) -> Value {
    // Abramowitz and Stegun, 7.1.26: off by 1.5e-7 at most.
    let b = &mut d.b;
    let size = b.unary(UnaryFn::Abs, x);
    let (one, p) = (b.float(1.0), b.float(0.3275911));
    let scaled = b.mul(p, size);
    let below = b.add(one, scaled);
    let t = b.div(one, below);
    let mut sum = b.float(1.061405429);
    for coefficient in [-1.453152027, 1.421413741, -0.284496736, 0.254829592] {
        let c = b.float(coefficient);
        let product = b.mul(sum, t);
        sum = b.add(product, c);
    }
    let sum = b.mul(sum, t);
    let square = b.mul(size, size);
    let minus = b.unary(UnaryFn::Neg, square);
    let power = b.unary(UnaryFn::Exp, minus);
    let rest = b.mul(sum, power);
    let y = b.sub(one, rest);
    signed(d, x, y)
}

/// The natural logarithm. What devices have is off by 2^-21 near 1 (WGSL, 15.7.4), where `log(1 + e^x)` needs every bit.
///
/// With x = 2^e m, m from the root of 1/2 to that of 2, and s = (m - 1) / (m + 1), log m = 2 s (1 + s^2 / 3 + .. + s^8 / 9), less than
/// s^10 / 11 < 2.1e-9 of itself being left out; roundings are a few units in the last place.
fn log(d: &mut Draft<'_>, x: Value) -> Value {
    let b = &mut d.b;
    let own = b.unary(UnaryFn::Bits, x);
    // A subnormal is so many times 2^-149; devices may take it for zero, but not its bits.
    let normal = b.int(0x0080_0000);
    let small = b.less(own, normal);
    let count = b.unary(UnaryFn::ToFloat, own);
    let scaled = b.unary(UnaryFn::Bits, count);
    let bits = b.select(small, scaled, own);
    // The root of 1/2 as bits: what is above it belongs to the next exponent.
    let (root, by, fraction) = (b.int(0x3f35_04f3), b.int(23), b.int(0x007f_ffff));
    let (one_bits, bias, further) = (b.int(0x3f80_0000), b.int(127), b.int(127 + 149));
    let bias = b.select(small, further, bias);
    let gap = b.sub(one_bits, root);
    let shifted = b.add(bits, gap);
    let exponent = b.binary(BinaryFn::ShiftRight, shifted, by);
    let exponent = b.sub(exponent, bias);
    let low = b.binary(BinaryFn::And, shifted, fraction);
    let low = b.add(low, root);
    let m = b.unary(UnaryFn::FromBits, low);
    let one = b.float(1.0);
    let (above, below) = (b.sub(m, one), b.add(m, one));
    let s = b.div(above, below);
    let square = b.mul(s, s);
    let mut sum = b.float(1.0 / 9.0);
    for odd in [7.0, 5.0, 3.0] {
        let (product, c) = (b.mul(sum, square), b.float(1.0 / odd));
        sum = b.add(product, c);
    }
    let double = b.add(s, s);
    let rest = b.mul(sum, square);
    let rest = b.mul(rest, double);
    let exponent = b.unary(UnaryFn::ToFloat, exponent);
    // ln 2 in two parts, the first of few bits, so that its products with exponents are exact.
    let (high, low) = (b.float(0.693_359_375), b.float(-2.121_944_4e-4));
    let (high, low) = (b.mul(exponent, high), b.mul(exponent, low));
    let rest = b.add(rest, low);
    let rest = b.add(rest, double);
    let y = b.add(rest, high);
    let (zero, infinity, nan) = (b.float(0.0), b.float(f64::INFINITY), b.float(f64::NAN));
    let (nothing, size) = (b.int(0), b.int(i32::MAX));
    let negative = b.less(own, nothing);
    let y = b.select(negative, nan, y);
    let size = b.binary(BinaryFn::And, own, size);
    let none = b.binary(BinaryFn::Equal, size, nothing);
    let lowest = b.float(f64::NEG_INFINITY);
    let y = b.select(none, lowest, y);
    let largest = b.binary(BinaryFn::Equal, x, infinity);
    let y = b.select(largest, infinity, y);
    let known = b.binary(BinaryFn::LessEqual, zero, x);
    b.select(known, y, nan)
}

/// `y` with the sign of `x`.
fn signed(d: &mut Draft<'_>, x: Value, y: Value) -> Value {
    let (zero, minus) = (d.b.float(0.0), d.b.unary(UnaryFn::Neg, y));
    let negative = d.b.less(x, zero);
    d.b.select(negative, minus, y)
}

/// By powers, and up to 1/4, where their difference would lose bits, by the series up to x^9: what it leaves out is less than 1e-8 of it.
pub(super) fn tanh(d: &mut Draft<'_>, x: Value) -> Value {
    let size = d.b.unary(UnaryFn::Abs, x);
    let square = d.b.mul(x, x);
    let mut sum = d.b.float(62.0 / 2835.0);
    for coefficient in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0] {
        let (product, c) = (d.b.mul(sum, square), d.b.float(coefficient));
        sum = d.b.add(product, c);
    }
    let cube = d.b.mul(square, x);
    let bent = d.b.mul(sum, cube);
    let near = d.b.add(x, bent);
    let quarter = d.b.float(0.25);
    let small = d.b.less(size, quarter);
    let (two, one) = (d.b.float(-2.0), d.b.float(1.0));
    let scaled = d.b.mul(two, size);
    let power = d.b.unary(UnaryFn::Exp, scaled);
    let (above, below) = (d.b.sub(one, power), d.b.add(one, power));
    let y = d.b.div(above, below);
    let far = signed(d, x, y);
    d.b.select(small, near, far)
}

fn sigmoid(d: &mut Draft<'_>, x: Value) -> Value {
    let (minus, one) = (d.b.unary(UnaryFn::Neg, x), d.b.float(1.0));
    let power = d.b.unary(UnaryFn::Exp, minus);
    let below = d.b.add(one, power);
    d.b.div(one, below)
}

fn sign(d: &mut Draft<'_>, x: Value) -> Value {
    let float = d.b.ty(x).element == Element::F32;
    let number = |d: &mut Draft<'_>, v: i32| if float { d.b.float(f64::from(v)) } else { d.b.int(v) };
    let (zero, one, minus) = (number(d, 0), number(d, 1), number(d, -1));
    let (above, below) = (d.b.less(zero, x), d.b.less(x, zero));
    let rest = d.b.select(below, minus, x);
    d.b.select(above, one, rest)
}

fn unary(d: &mut Draft<'_>, kind: UnaryOp, x: Value) -> Value {
    let simple = match kind {
        UnaryOp::Neg => UnaryFn::Neg,
        UnaryOp::Abs => UnaryFn::Abs,
        UnaryOp::Exp => UnaryFn::Exp,
        UnaryOp::Sqrt => UnaryFn::Sqrt,
        UnaryOp::Sin => UnaryFn::Sin,
        UnaryOp::Cos => UnaryFn::Cos,
        UnaryOp::Floor => UnaryFn::Floor,
        UnaryOp::Ceil => UnaryFn::Ceil,
        UnaryOp::Round => UnaryFn::RoundEven,
        UnaryOp::Not => UnaryFn::Not,
        _ => return composed(d, kind, x),
    };
    d.b.unary(simple, x)
}

fn composed(d: &mut Draft<'_>, kind: UnaryOp, x: Value) -> Value {
    match kind {
        UnaryOp::Tanh => tanh(d, x),
        UnaryOp::Erf => erf(d, x),
        UnaryOp::Log => log(d, x),
        UnaryOp::Sigmoid => sigmoid(d, x),
        UnaryOp::Sign => sign(d, x),
        _ => {
            let one = d.b.float(1.0);
            let below = if kind == UnaryOp::Rsqrt { d.b.unary(UnaryFn::Sqrt, x) } else { x };
            d.b.div(one, below)
        }
    }
}

pub(super) fn activation(d: &mut Draft<'_>, kind: ActivationKind, x: Value) -> Value {
    match kind {
        ActivationKind::Identity => x,
        ActivationKind::Relu | ActivationKind::Relu6 => {
            let (zero, six) = (d.b.float(0.0), d.b.float(6.0));
            let above = d.b.binary(BinaryFn::Max, x, zero);
            match kind {
                ActivationKind::Relu => above,
                _ => d.b.binary(BinaryFn::Min, above, six),
            }
        }
        ActivationKind::Gelu => {
            let factor = d.b.float(std::f64::consts::FRAC_1_SQRT_2);
            let inner = d.b.mul(x, factor);
            let bent = erf(d, inner);
            half_times_one_plus(d, x, bent)
        }
        ActivationKind::GeluTanh => {
            let (cubic, factor) = (d.b.float(0.044715), d.b.float((2.0 / std::f64::consts::PI).sqrt()));
            let square = d.b.mul(x, x);
            let cube = d.b.mul(square, x);
            let bent = d.b.mul(cubic, cube);
            let sum = d.b.add(x, bent);
            let inner = d.b.mul(factor, sum);
            let bent = tanh(d, inner);
            half_times_one_plus(d, x, bent)
        }
        ActivationKind::QuickGelu | ActivationKind::Silu => {
            let factor = d.b.float(if kind == ActivationKind::Silu { 1.0 } else { 1.702 });
            let inner = d.b.mul(factor, x);
            let gate = sigmoid(d, inner);
            d.b.mul(x, gate)
        }
        ActivationKind::Tanh => tanh(d, x),
        _ => sigmoid(d, x),
    }
}

fn half_times_one_plus(d: &mut Draft<'_>, x: Value, y: Value) -> Value {
    let (half, one) = (d.b.float(0.5), d.b.float(1.0));
    let (scaled, sum) = (d.b.mul(half, x), d.b.add(one, y));
    d.b.mul(scaled, sum)
}

/// Whether devices have a function of one element.
fn has_unary(kind: UnaryOp) -> bool {
    use UnaryOp::{
        Abs, Ceil, Cos, Erf, Exp, Floor, Log, Neg, Not, Reciprocal, Round, Rsqrt, Sigmoid, Sign, Sin,
    };
    let rest = matches!(kind, UnaryOp::Sqrt | UnaryOp::Tanh);
    let plain = matches!(kind, Abs | Ceil | Cos | Exp | Floor | Log | Neg | Not | Round | Sin);
    rest || plain || matches!(kind, Erf | Reciprocal | Rsqrt | Sigmoid | Sign)
}

/// Whether devices have a function of two elements.
fn has_binary(kind: BinaryOp) -> bool {
    use BinaryOp::{Add, And, Div, Max, Min, Mul, Or, Pow, Rem, Sub, Xor};
    kind.is_comparison() || matches!(kind, Add | And | Div | Max | Min | Mul | Or | Pow | Rem | Sub | Xor)
}

/// Whether devices have an activation.
pub(super) fn has_activation(kind: ActivationKind) -> bool {
    use ActivationKind::{Gelu, GeluTanh, Identity, QuickGelu, Relu, Relu6, Sigmoid, Silu, Tanh};
    matches!(kind, Identity | Relu | Relu6 | Gelu | GeluTanh | QuickGelu | Silu | Tanh | Sigmoid)
}

fn binary(d: &mut Draft<'_>, kind: BinaryOp, x: Value, y: Value) -> Value {
    let simple = match kind {
        BinaryOp::Add => BinaryFn::Add,
        BinaryOp::Sub => BinaryFn::Sub,
        BinaryOp::Mul => BinaryFn::Mul,
        BinaryOp::Div => BinaryFn::Div,
        BinaryOp::Min => BinaryFn::Min,
        BinaryOp::Max => BinaryFn::Max,
        BinaryOp::And => BinaryFn::And,
        BinaryOp::Or => BinaryFn::Or,
        BinaryOp::Xor => BinaryFn::Xor,
        BinaryOp::Equal => BinaryFn::Equal,
        BinaryOp::Less => BinaryFn::Less,
        BinaryOp::LessEqual => BinaryFn::LessEqual,
        BinaryOp::Greater => return d.b.less(y, x),
        BinaryOp::GreaterEqual => return d.b.binary(BinaryFn::LessEqual, y, x),
        BinaryOp::Pow => return power(d, x, y),
        _ => return remainder(d, x, y),
    };
    d.b.binary(simple, x, y)
}

fn remainder(d: &mut Draft<'_>, x: Value, y: Value) -> Value {
    if d.b.ty(x).element == Element::I32 {
        return d.b.binary(BinaryFn::Rem, x, y);
    }
    let quotient = d.b.div(x, y);
    let whole = d.b.unary(UnaryFn::Trunc, quotient);
    let product = d.b.mul(whole, y);
    d.b.sub(x, product)
}

/// `x ^ y` also where x is not above 0, where devices leave it open.
pub(super) fn power(d: &mut Draft<'_>, x: Value, y: Value) -> Value {
    let b = &mut d.b;
    let (zero, one, two, nan) = (b.float(0.0), b.float(1.0), b.float(2.0), b.float(f64::NAN));
    let size = b.unary(UnaryFn::Abs, x);
    let infinity = b.float(f64::INFINITY);
    let positive = b.binary(BinaryFn::Pow, size, y);
    let upward = b.less(zero, y);
    let of_zero = b.select(upward, zero, infinity);
    let is_zero = b.binary(BinaryFn::Equal, size, zero);
    let power = b.select(is_zero, of_zero, positive);
    let whole = b.unary(UnaryFn::Trunc, y);
    let is_whole = b.binary(BinaryFn::Equal, whole, y);
    let half = b.div(y, two);
    let half_whole = b.unary(UnaryFn::Trunc, half);
    let even = b.binary(BinaryFn::Equal, half, half_whole);
    let minus = b.unary(UnaryFn::Neg, power);
    let odd = b.select(even, power, minus);
    let of_negative = b.select(is_whole, odd, nan);
    let negative = b.less(x, zero);
    let y0 = b.binary(BinaryFn::Equal, y, zero);
    let power = b.select(negative, of_negative, power);
    b.select(y0, one, power)
}

fn convert(d: &mut Draft<'_>, x: Value, to: DType) -> Exact {
    let b = &mut d.b;
    let value = match (b.ty(x).element, element(to).unwrap_or(Element::I32)) {
        (_, Element::I32) => return whole::convert(d, x, to),
        (Element::I32, Element::F32) => b.unary(UnaryFn::ToFloat, x),
        (Element::Bool, Element::F32) => {
            let (one, zero) = (b.float(1.0), b.float(0.0));
            b.select(x, one, zero)
        }
        (from @ (Element::F32 | Element::I32), Element::Bool) => {
            let zero = if from == Element::F32 { b.float(0.0) } else { b.int(0) };
            let equal = b.binary(BinaryFn::Equal, x, zero);
            b.unary(UnaryFn::Not, equal)
        }
        _ => x,
    };
    (value, None)
}

/// `unary`.
pub(super) struct GpuUnary;

impl GpuOp for GpuUnary {
    fn name(&self) -> &'static str {
        Unary::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let kind = op.as_any().downcast_ref::<Unary>().map(|u| u.kind);
        computes_whole(inputs, outputs) && kind.is_some_and(has_unary)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Unary>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = aligned(cx, step);
        let dtype = from[0].dtype;
        map_exact(cx, op.kind.name(), &from, &to, |d, v| {
            let plain = unary(d, op.kind, v[0]);
            whole::unary(d, dtype, op.kind, v[0], plain)
        })
    }
}

/// `binary`.
pub(super) struct GpuBinary;

impl GpuOp for GpuBinary {
    fn name(&self) -> &'static str {
        Binary::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let Some(kind) = op.as_any().downcast_ref::<Binary>().map(|b| b.kind) else { return false };
        let whole_power = inputs[0].dtype().is_int() && kind == BinaryOp::Pow;
        computes_whole(inputs, outputs) && has_binary(kind) && !whole_power
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Binary>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = aligned(cx, step);
        let dtype = from[0].dtype;
        map_exact(cx, op.kind.name(), &from, &to, |d, v| {
            let plain = binary(d, op.kind, v[0], v[1]);
            whole::binary(d, dtype, op.kind, [v[0], v[1]], plain)
        })
    }
}

/// `activation`.
pub(super) struct GpuActivation;

impl GpuOp for GpuActivation {
    fn name(&self) -> &'static str {
        Activation::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let kind = op.as_any().downcast_ref::<Activation>().map(|a| a.kind);
        computes(inputs, outputs) && kind.is_some_and(has_activation)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Activation>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = aligned(cx, step);
        map(cx, op.kind.name(), &from, &to, |d, v| activation(d, op.kind, v[0]))
    }
}

/// `gated`.
pub(super) struct GpuGated;

impl GpuOp for GpuGated {
    fn name(&self) -> &'static str {
        Gated::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let kind = op.as_any().downcast_ref::<Gated>().map(|a| a.activation);
        computes(inputs, outputs) && kind.is_some_and(has_activation)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Gated>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = aligned(cx, step);
        map(cx, &format!("gated_{}", op.activation.name()), &from, &to, |d, v| {
            let gate = activation(d, op.activation, v[0]);
            d.b.mul(gate, v[1])
        })
    }
}

/// `fused_elementwise`.
pub(super) struct GpuFusedElementwise;

impl GpuOp for GpuFusedElementwise {
    fn name(&self) -> &'static str {
        FusedElementwise::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let program = op.as_any().downcast_ref::<FusedElementwise>().and_then(|f| f.parse().ok());
        let known = |function: Function| match function {
            Function::Activation(kind) => has_activation(kind),
            Function::Unary(kind) => has_unary(kind),
            Function::Binary(kind) => has_binary(kind),
            Function::Select => true,
            _ => false,
        };
        let codes = inputs.iter().any(|s| matches!(s.dtype(), DType::U8 | DType::I8));
        let whole = program.is_some_and(|p| p.steps.iter().all(|s| known(s.function)));
        computes(inputs, outputs) && whole && !codes
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<FusedElementwise>().ok_or_else(|| cx.mismatched())?;
        let program = op.parse().map_err(|e| cx.unsupported(e.to_string()))?;
        let (from, to) = aligned(cx, step);
        map(cx, "fused", &from, &to, |d, operands| {
            let mut results: Vec<Value> = Vec::with_capacity(program.steps.len());
            for statement in &program.steps {
                let args: Vec<Value> = statement
                    .args
                    .iter()
                    .map(|arg| match arg {
                        Arg::Operand(i) => operands[*i],
                        Arg::Step(i) => results[*i],
                        Arg::Number(value) => d.b.float(*value),
                    })
                    .collect();
                results.push(match (statement.function, args.as_slice()) {
                    (Function::Unary(kind), &[x]) => unary(d, kind, x),
                    (Function::Activation(kind), &[x]) => activation(d, kind, x),
                    (Function::Binary(kind), &[x, y]) => binary(d, kind, x, y),
                    (_, args) => d.b.select(args[0], args[1], args[2]),
                });
            }
            results.last().copied().unwrap_or(operands[0])
        })
    }
}

/// `select`.
pub(super) struct GpuSelect;

impl GpuOp for GpuSelect {
    fn name(&self) -> &'static str {
        Select::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let (from, to) = aligned(cx, step);
        map(cx, "select", &from, &to, |d, v| d.b.select(v[0], v[1], v[2]))
    }
}

/// `cast`.
pub(super) struct GpuCast;

impl GpuOp for GpuCast {
    fn name(&self) -> &'static str {
        Cast::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let (from, to) = aligned(cx, step);
        let dtype = to.dtype;
        map_exact(cx, "cast", &from, &to, |d, v| convert(d, v[0], dtype))
    }
}
