//! Functions of elements, with broadcasting: arithmetic, comparisons, logic, activations, casts.

use super::Row;
use crate::error::{Refusal, invalid, unsupported};
use crate::lower::{Host, Lowering};
use crate::value::{CodedTensor, ElementType, TextTensor, Value, from_floats};
use rlx_graph::ValueId;
use rlx_graph::eval::{broadcast_dims, broadcast_indices, from_i64, to_f64};
use rlx_graph::ops::activation::{Activation, ActivationKind};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::select::Select;
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::{DType, DTypeClass};

type Lowered = Result<Vec<ValueId>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("Abs", |l| unary(l, UnaryOp::Abs)),
    Row::lower("Neg", |l| unary(l, UnaryOp::Neg)),
    Row::lower("Exp", |l| unary(l, UnaryOp::Exp)),
    Row::lower("Log", |l| unary(l, UnaryOp::Log)),
    Row::lower("Sqrt", |l| unary(l, UnaryOp::Sqrt)),
    Row::lower("Reciprocal", |l| unary(l, UnaryOp::Reciprocal)),
    Row::lower("Tanh", |l| activation(l, ActivationKind::Tanh)),
    Row::lower("Erf", |l| unary(l, UnaryOp::Erf)),
    Row::lower("Sigmoid", |l| activation(l, ActivationKind::Sigmoid)),
    Row::lower("Sin", |l| unary(l, UnaryOp::Sin)),
    Row::lower("Cos", |l| unary(l, UnaryOp::Cos)),
    Row::lower("Floor", |l| unary(l, UnaryOp::Floor)),
    Row::lower("Ceil", |l| unary(l, UnaryOp::Ceil)),
    Row::lower("Round", |l| unary(l, UnaryOp::Round)),
    Row::lower("Sign", |l| unary(l, UnaryOp::Sign)),
    Row::lower("Not", |l| unary(l, UnaryOp::Not)),
    Row::host("Acos", |h| map(h, f64::acos)),
    Row::host("Acosh", |h| map(h, f64::acosh)),
    Row::host("Asin", |h| map(h, f64::asin)),
    Row::host("Asinh", |h| map(h, f64::asinh)),
    Row::host("Atan", |h| map(h, f64::atan)),
    Row::host("Atanh", |h| map(h, f64::atanh)),
    Row::host("Cosh", |h| map(h, f64::cosh)),
    Row::host("Sinh", |h| map(h, f64::sinh)),
    Row::host("Tan", |h| map(h, f64::tan)),
    Row::lower("Add", |l| binary(l, BinaryOp::Add)),
    Row::lower("Sub", |l| binary(l, BinaryOp::Sub)),
    Row::lower("Mul", |l| binary(l, BinaryOp::Mul)),
    Row::lower("Div", |l| binary(l, BinaryOp::Div)),
    Row::lower("Pow", pow),
    Row::lower("Mod", modulo),
    Row::lower("And", |l| binary(l, BinaryOp::And)),
    Row::lower("Or", |l| binary(l, BinaryOp::Or)),
    Row::lower("Xor", |l| binary(l, BinaryOp::Xor)),
    Row::both("Equal", |l| binary(l, BinaryOp::Equal), equal_text),
    Row::lower("Less", |l| binary(l, BinaryOp::Less)),
    Row::lower("LessOrEqual", |l| binary(l, BinaryOp::LessEqual)),
    Row::lower("Greater", |l| binary(l, BinaryOp::Greater)),
    Row::lower("GreaterOrEqual", |l| binary(l, BinaryOp::GreaterEqual)),
    Row::lower("Max", |l| chain(l, BinaryOp::Max)),
    Row::lower("Min", |l| chain(l, BinaryOp::Min)),
    Row::lower("Sum", |l| chain(l, BinaryOp::Add)),
    Row::lower("Mean", mean),
    Row::lower("Where", select),
    Row::lower("Relu", relu),
    Row::lower("LeakyRelu", leaky_relu),
    Row::lower("PRelu", prelu),
    Row::lower("ThresholdedRelu", thresholded_relu),
    Row::lower("Elu", |l| elu(l, 1.0, 1.0, false)),
    Row::lower("Selu", |l| elu(l, 1.673_263_192_176_818_8, 1.050_701_022_148_132_3, false)),
    Row::lower("Celu", |l| elu(l, 1.0, 1.0, true)),
    Row::lower("HardSigmoid", |l| {
        let (alpha, beta) = (l.node.float("alpha", 0.2)?, l.node.float("beta", 0.5)?);
        let x = l.value(0)?;
        hard_sigmoid(l, x, alpha, beta).map(|y| vec![y])
    }),
    Row::lower("HardSwish", |l| {
        let x = l.value(0)?;
        let gate = hard_sigmoid(l, x, 1.0 / 6.0, 0.5)?;
        Ok(vec![l.expand().binary(BinaryOp::Mul, x, gate)?])
    }),
    Row::lower("Softplus", |l| {
        let x = l.value(0)?;
        softplus(l, x).map(|y| vec![y])
    }),
    Row::lower("Softsign", softsign),
    Row::lower("Mish", mish),
    Row::lower("Swish", swish),
    Row::lower("Gelu", gelu),
    Row::lower("Shrink", shrink),
    Row::lower("Clip", clip),
    Row::lower("IsNaN", is_nan),
    Row::lower("IsInf", is_inf),
    Row::host("BitShift", bit_shift),
    Row::host("BitwiseAnd", |h| bits(h, |a, b| a & b)),
    Row::host("BitwiseOr", |h| bits(h, |a, b| a | b)),
    Row::host("BitwiseXor", |h| bits(h, |a, b| a ^ b)),
    Row::host("BitwiseNot", bitwise_not),
    Row::both("Cast", cast, cast_host),
    Row::both("CastLike", cast_like, cast_like_host),
];

fn unary(l: &mut Lowering<'_>, kind: UnaryOp) -> Lowered {
    let x = l.value(0)?;
    Ok(vec![l.expand().unary(kind, x)?])
}

fn activation(l: &mut Lowering<'_>, kind: ActivationKind) -> Lowered {
    let x = l.value(0)?;
    Ok(vec![l.add(Activation { kind }, &[x])?])
}

fn map(h: &Host<'_>, f: fn(f64) -> f64) -> Result<Vec<Value>, Refusal> {
    let x = h.tensor(0)?;
    let values: Vec<f64> = to_f64(x)?.into_iter().map(f).collect();
    Ok(vec![from_floats(ElementType::Plain(x.dtype()), x.dims(), &values)?])
}

/// Versions before 7 broadcast operand 1 from an axis on.
fn old_broadcast(l: &mut Lowering<'_>) -> Result<ValueId, Refusal> {
    let b = l.value(1)?;
    if l.opset() >= 7 || !l.node.flag("broadcast", false)? {
        return Ok(b);
    }
    let (rank, own) = (l.rank(0)?, l.dims(1)?);
    let axis = l.node.int("axis", rank as i64 - own.len() as i64)?;
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    let after = rank.checked_sub(axis.max(0) as usize + own.len());
    let after = after.ok_or_else(|| Refusal::Invalid(format!("axis {axis} leaves no room for {own:?}")))?;
    let dims = [own, vec![1; after]].concat();
    l.reshape(b, &dims)
}

fn binary(l: &mut Lowering<'_>, kind: BinaryOp) -> Lowered {
    let (a, b) = (l.value(0)?, old_broadcast(l)?);
    Ok(vec![l.expand().binary(kind, a, b)?])
}

fn equal_text(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (Value::Text(a), Value::Text(b)) = (h.value(0)?, h.value(1)?) else { return Err(Refusal::Host) };
    let Some(dims) = broadcast_dims(&a.dims, &b.dims) else { return invalid("operands do not broadcast") };
    let pairs = broadcast_indices(&dims, &a.dims).into_iter().zip(broadcast_indices(&dims, &b.dims));
    let truths: Vec<i64> = pairs.map(|(i, j)| i64::from(a.items[i] == b.items[j])).collect();
    Ok(vec![from_i64(&dims, DType::Bool, &truths)?.into()])
}

fn chain(l: &mut Lowering<'_>, kind: BinaryOp) -> Lowered {
    let all = l.values()?;
    let Some((&first, rest)) = all.split_first() else { return invalid("no operands") };
    let mut sum = first;
    for &next in rest {
        sum = l.expand().binary(kind, sum, next)?;
    }
    Ok(vec![sum])
}

fn mean(l: &mut Lowering<'_>) -> Lowered {
    let count = l.count() as f64;
    let sum = chain(l, BinaryOp::Add)?[0];
    Ok(vec![l.expand().scalar(BinaryOp::Div, sum, count)?])
}

fn pow(l: &mut Lowering<'_>) -> Lowered {
    let (x, y) = (l.value(0)?, old_broadcast(l)?);
    let (base, exponent) = (l.dtype(0)?, l.dtype(1)?);
    let work = if base.is_int() && exponent.is_float() { exponent } else { base };
    let (a, b) = (l.cast(x, work)?, l.cast(y, work)?);
    let result = match square_exponent(l) {
        true => l.expand().binary(BinaryOp::Mul, a, a)?,
        false => l.expand().binary(BinaryOp::Pow, a, b)?,
    };
    Ok(vec![l.cast(result, base)?])
}

/// Whether operand 1 is the constant 2 and does not widen the result.
fn square_exponent(l: &Lowering<'_>) -> bool {
    let fits = match (l.shape(0), l.shape(1)) {
        (Ok(x), Ok(y)) => y.rank() <= x.rank(),
        _ => false,
    };
    let two = l.constant(1).and_then(|v| v.floats().ok());
    fits && two.is_some_and(|v| v == [2.0])
}

fn modulo(l: &mut Lowering<'_>) -> Lowered {
    let (a, b) = (l.value(0)?, l.value(1)?);
    let by_dividend = l.node.flag("fmod", false)?;
    let mut e = l.expand();
    let rest = e.binary(BinaryOp::Rem, a, b)?;
    if by_dividend {
        return Ok(vec![rest]);
    }
    let zero = e.scalar(BinaryOp::Mul, b, 0.0)?;
    let (negative_rest, negative_b) =
        (e.binary(BinaryOp::Less, rest, zero)?, e.binary(BinaryOp::Less, b, zero)?);
    let differ = e.binary(BinaryOp::Xor, negative_rest, negative_b)?;
    let none = e.binary(BinaryOp::Equal, rest, zero)?;
    let some = e.unary(UnaryOp::Not, none)?;
    let shift = e.binary(BinaryOp::And, differ, some)?;
    let shifted = e.binary(BinaryOp::Add, rest, b)?;
    Ok(vec![e.select(shift, shifted, rest)?])
}

fn select(l: &mut Lowering<'_>) -> Lowered {
    let all = [l.value(0)?, l.value(1)?, l.value(2)?];
    Ok(vec![l.add(Select {}, &all)?])
}

fn relu(l: &mut Lowering<'_>) -> Lowered {
    if l.dtype(0)?.is_float() {
        return activation(l, ActivationKind::Relu);
    }
    let x = l.value(0)?;
    Ok(vec![l.expand().scalar(BinaryOp::Max, x, 0.0)?])
}

/// `x where x >= 0, else other`
fn above_zero(l: &mut Lowering<'_>, x: ValueId, above: ValueId, other: ValueId) -> Lowered {
    let mut e = l.expand();
    let below = e.scalar(BinaryOp::Less, x, 0.0)?;
    Ok(vec![e.select(below, other, above)?])
}

fn leaky_relu(l: &mut Lowering<'_>) -> Lowered {
    let alpha = l.node.float("alpha", 0.01)?;
    let x = l.value(0)?;
    let scaled = l.expand().scalar(BinaryOp::Mul, x, alpha)?;
    above_zero(l, x, x, scaled)
}

fn prelu(l: &mut Lowering<'_>) -> Lowered {
    let (x, mut slope) = (l.value(0)?, l.value(1)?);
    let (rank, own) = (l.rank(0)?, l.dims(1)?);
    if l.opset() < 7 && own.len() == 1 && rank > 2 {
        let dims = [own, vec![1; rank - 2]].concat();
        slope = l.reshape(slope, &dims)?;
    }
    let scaled = l.expand().binary(BinaryOp::Mul, x, slope)?;
    above_zero(l, x, x, scaled)
}

fn thresholded_relu(l: &mut Lowering<'_>) -> Lowered {
    let alpha = l.node.float("alpha", 1.0)?;
    let x = l.value(0)?;
    let dtype = l.dtype(0)?;
    let mut e = l.expand();
    let above = e.scalar(BinaryOp::Greater, x, alpha)?;
    let zero = e.number(0.0, dtype)?;
    Ok(vec![e.select(above, x, zero)?])
}

fn elu(l: &mut Lowering<'_>, alpha: f64, gamma: f64, divided: bool) -> Lowered {
    let (alpha, gamma) = (l.node.float("alpha", alpha)?, l.node.float("gamma", gamma)?);
    let x = l.value(0)?;
    let mut e = l.expand();
    let inner = if divided { e.scalar(BinaryOp::Div, x, alpha)? } else { x };
    let power = e.unary(UnaryOp::Exp, inner)?;
    let less = e.scalar(BinaryOp::Sub, power, 1.0)?;
    let below = e.scalar(BinaryOp::Mul, less, alpha)?;
    let result = above_zero(l, x, x, below)?[0];
    Ok(vec![if gamma == 1.0 { result } else { l.expand().scalar(BinaryOp::Mul, result, gamma)? }])
}

fn clamp(l: &mut Lowering<'_>, x: ValueId, low: f64, high: f64) -> Result<ValueId, Refusal> {
    let mut e = l.expand();
    let raised = e.scalar(BinaryOp::Max, x, low)?;
    Ok(e.scalar(BinaryOp::Min, raised, high)?)
}

fn hard_sigmoid(l: &mut Lowering<'_>, x: ValueId, alpha: f64, beta: f64) -> Result<ValueId, Refusal> {
    let mut e = l.expand();
    let scaled = e.scalar(BinaryOp::Mul, x, alpha)?;
    let moved = e.scalar(BinaryOp::Add, scaled, beta)?;
    clamp(l, moved, 0.0, 1.0)
}

/// `log(1 + e^x)` without overflow.
fn softplus(l: &mut Lowering<'_>, x: ValueId) -> Result<ValueId, Refusal> {
    let mut e = l.expand();
    let size = e.unary(UnaryOp::Abs, x)?;
    let negative = e.unary(UnaryOp::Neg, size)?;
    let power = e.unary(UnaryOp::Exp, negative)?;
    let more = e.scalar(BinaryOp::Add, power, 1.0)?;
    let log = e.unary(UnaryOp::Log, more)?;
    let above = e.scalar(BinaryOp::Max, x, 0.0)?;
    Ok(e.binary(BinaryOp::Add, above, log)?)
}

fn softsign(l: &mut Lowering<'_>) -> Lowered {
    let x = l.value(0)?;
    let mut e = l.expand();
    let size = e.unary(UnaryOp::Abs, x)?;
    let more = e.scalar(BinaryOp::Add, size, 1.0)?;
    Ok(vec![e.binary(BinaryOp::Div, x, more)?])
}

fn mish(l: &mut Lowering<'_>) -> Lowered {
    let x = l.value(0)?;
    let plus = softplus(l, x)?;
    let mut e = l.expand();
    let gate = e.unary(UnaryOp::Tanh, plus)?;
    Ok(vec![e.binary(BinaryOp::Mul, x, gate)?])
}

fn swish(l: &mut Lowering<'_>) -> Lowered {
    let alpha = l.node.float("alpha", 1.0)?;
    let x = l.value(0)?;
    if alpha == 1.0 {
        return activation(l, ActivationKind::Silu);
    }
    let mut e = l.expand();
    let scaled = e.scalar(BinaryOp::Mul, x, alpha)?;
    let gate = e.unary(UnaryOp::Sigmoid, scaled)?;
    Ok(vec![e.binary(BinaryOp::Mul, x, gate)?])
}

fn gelu(l: &mut Lowering<'_>) -> Lowered {
    match l.node.text("approximate", "none")? {
        "none" => activation(l, ActivationKind::Gelu),
        "tanh" => activation(l, ActivationKind::GeluTanh),
        other => invalid(format!("approximate {other:?} is neither none nor tanh")),
    }
}

fn shrink(l: &mut Lowering<'_>) -> Lowered {
    let (bias, bound) = (l.node.float("bias", 0.0)?, l.node.float("lambd", 0.5)?);
    let x = l.value(0)?;
    let dtype = l.dtype(0)?;
    let mut e = l.expand();
    let zero = e.number(0.0, dtype)?;
    let (low, high) = (e.scalar(BinaryOp::Less, x, -bound)?, e.scalar(BinaryOp::Greater, x, bound)?);
    let (up, down) = (e.scalar(BinaryOp::Add, x, bias)?, e.scalar(BinaryOp::Sub, x, bias)?);
    let inner = e.select(high, down, zero)?;
    Ok(vec![e.select(low, up, inner)?])
}

fn clip(l: &mut Lowering<'_>) -> Lowered {
    let mut x = l.value(0)?;
    for (operand, name, kind) in [(1, "min", BinaryOp::Max), (2, "max", BinaryOp::Min)] {
        if let Some(bound) = l.node.float_opt(name)? {
            x = l.expand().scalar(kind, x, bound)?;
        } else if let Some(bound) = l.optional(operand)? {
            let bound = match l.rank(operand)? {
                0 => bound,
                _ => l.reshape(bound, &[])?,
            };
            x = l.expand().binary(kind, x, bound)?;
        }
    }
    Ok(vec![x])
}

fn is_nan(l: &mut Lowering<'_>) -> Lowered {
    let x = l.value(0)?;
    let mut e = l.expand();
    let same = e.binary(BinaryOp::Equal, x, x)?;
    Ok(vec![e.unary(UnaryOp::Not, same)?])
}

fn is_inf(l: &mut Lowering<'_>) -> Lowered {
    let (up, down) = (l.node.flag("detect_positive", true)?, l.node.flag("detect_negative", true)?);
    let x = l.value(0)?;
    let mut e = l.expand();
    let value = match (up, down) {
        (true, true) => e.unary(UnaryOp::Abs, x)?,
        (false, true) => e.unary(UnaryOp::Neg, x)?,
        _ => x,
    };
    let bound = if up || down { f64::INFINITY } else { f64::NAN };
    Ok(vec![e.scalar(BinaryOp::Equal, value, bound)?])
}

fn bits(h: &Host<'_>, f: fn(i64, i64) -> i64) -> Result<Vec<Value>, Refusal> {
    let (a, b) = (h.tensor(0)?, h.tensor(1)?);
    let Some(dims) = broadcast_dims(a.dims(), b.dims()) else { return invalid("operands do not broadcast") };
    let pairs = broadcast_indices(&dims, a.dims()).into_iter().zip(broadcast_indices(&dims, b.dims()));
    let (x, y) = (h.ints(0)?, h.ints(1)?);
    let values: Vec<i64> = pairs.map(|(i, j)| f(x[i], y[j])).collect();
    Ok(vec![from_i64(&dims, a.dtype(), &values)?.into()])
}

fn bit_shift(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    match h.node.text("direction", "")? {
        "LEFT" => bits(h, |a, b| (a as u64).checked_shl(b as u32).unwrap_or(0) as i64),
        "RIGHT" => bits(h, |a, b| (a as u64).checked_shr(b as u32).unwrap_or(0) as i64),
        other => invalid(format!("direction {other:?} is neither LEFT nor RIGHT")),
    }
}

fn bitwise_not(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.tensor(0)?;
    let values: Vec<i64> = h.ints(0)?.into_iter().map(|v| !v).collect();
    Ok(vec![from_i64(x.dims(), x.dtype(), &values)?.into()])
}

fn cast(l: &mut Lowering<'_>) -> Lowered {
    let Some(element) = l.node.element_opt("to")? else { return invalid("attribute \"to\" is missing") };
    cast_to(l, element)
}

fn cast_to(l: &mut Lowering<'_>, element: ElementType) -> Lowered {
    let ElementType::Plain(dtype) = element else { return Err(Refusal::Host) };
    let x = l.value(0)?;
    if dtype.class() == DTypeClass::Complex || l.dtype(0)?.class() == DTypeClass::Complex {
        return unsupported("casts of complex numbers");
    }
    Ok(vec![l.cast(x, dtype)?])
}

fn cast_like(l: &mut Lowering<'_>) -> Lowered {
    let element = ElementType::Plain(l.dtype(1)?);
    cast_to(l, element)
}

fn cast_host(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let Some(element) = h.node.element_opt("to")? else { return invalid("attribute \"to\" is missing") };
    convert(h.value(0)?, element, h.node.flag("saturate", true)?, h.node.text("round_mode", "up")?)
}

fn cast_like_host(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let element = h.element(1)?;
    convert(h.value(0)?, element, h.node.flag("saturate", true)?, h.node.text("round_mode", "up")?)
}

fn convert(x: &Value, to: ElementType, saturate: bool, rounding: &str) -> Result<Vec<Value>, Refusal> {
    let Some(dims) = x.dims().map(<[usize]>::to_vec) else { return invalid("operand 0 must be a tensor") };
    if let Value::Text(text) = x {
        return parse_text(text, to).map(|v| vec![v]);
    }
    if to == ElementType::Text {
        return Ok(vec![Value::Text(TextTensor { items: print_numbers(x)?, dims })]);
    }
    if let (Value::Tensor(t), ElementType::Plain(dtype)) = (x, to)
        && !t.dtype().is_float()
        && !dtype.is_float()
    {
        return Ok(vec![from_i64(&dims, dtype, &x.ints()?)?.into()]);
    }
    let values = x.floats()?;
    Ok(vec![match to {
        ElementType::Coded(coding) => {
            let code = |&v: &f64| coding.encode_rounded(v, saturate, rounding);
            Value::Coded(CodedTensor { coding, codes: values.iter().map(code).collect(), dims })
        }
        other => from_floats(other, &dims, &values)?,
    }])
}

fn parse_text(text: &TextTensor, to: ElementType) -> Result<Value, Refusal> {
    let whole = matches!(to, ElementType::Plain(dtype) if dtype.is_int());
    if whole {
        let parse =
            |s: &String| s.trim().parse::<i64>().or_else(|_| s.trim().parse::<f64>().map(|v| v as i64));
        let values: Result<Vec<i64>, _> = text.items.iter().map(parse).collect();
        if let (Ok(values), ElementType::Plain(dtype)) = (values, to) {
            return Ok(from_i64(&text.dims, dtype, &values)?.into());
        }
        return invalid("a string is no integer");
    }
    let parse = |s: &String| match s.trim() {
        "INF" | "+INF" => Ok(f64::INFINITY),
        "-INF" => Ok(f64::NEG_INFINITY),
        other => other.parse::<f64>().map_err(|_| Refusal::Invalid(format!("{other:?} is no number"))),
    };
    let values = text.items.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    from_floats(to, &text.dims, &values)
}

fn print_numbers(x: &Value) -> Result<Vec<String>, Refusal> {
    if let Value::Tensor(t) = x {
        if t.dtype() == DType::Bool {
            return Ok(x.ints()?.iter().map(|&v| if v != 0 { "True" } else { "False" }.to_owned()).collect());
        }
        if t.dtype().is_int() {
            return Ok(x.ints()?.iter().map(i64::to_string).collect());
        }
        if t.dtype() == DType::F32 {
            return Ok(t.as_slice::<f32>()?.iter().map(|v| python_float(&format!("{v:?}"))).collect());
        }
        if t.dtype() == DType::F16 {
            return Ok(x.floats()?.iter().map(|v| python_float(&format!("{:?}", *v as f32))).collect());
        }
    }
    Ok(x.floats()?.iter().map(|v| python_float(&format!("{v:?}"))).collect())
}

fn python_float(text: &str) -> String {
    match text {
        "NaN" => "nan".to_owned(),
        other => other.to_owned(),
    }
}
