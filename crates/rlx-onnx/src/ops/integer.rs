//! Products of codes of eight bits: of one group with known weights an op of their own. Others' sums are those of integers, but go through the
//! kernels of floats: F32 holds every integer up to 2^24, and as many terms are summed at once as stay below it, whatever the order; more are
//! summed as I32.

use super::convolution::conv_op;
use crate::error::{Refusal, invalid};
use crate::lower::Lowering;
use crate::value::Value;
use rlx_graph::ValueId;
use rlx_graph::eval::from_f64;
use rlx_graph::integer::code_range;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::conv::Conv;
use rlx_graph::ops::integer_conv::IntegerConv;
use rlx_graph::ops::integer_linear::IntegerLinear;
use rlx_graph::ops::matmul::MatMul;
use rlx_graph::ops::unary::UnaryOp;
use rlx_tensor::{DType, Tensor};

type Lowered = Result<Vec<ValueId>, Refusal>;

/// Terms of a sum of products of codes at most, so that none leaves 32 bits.
const MOST_TERMS: usize = 1 << 15;

/// F32 holds every integer up to this one.
const EXACT: f64 = 16_777_216.0;

/// Codes less their zero point.
struct Centred {
    value: ValueId,
    /// No magnitude is larger.
    reach: f64,
}

/// Known weights less their zero points, outputs first or last.
struct Weights {
    operand: usize,
    dims: Vec<usize>,
    values: Vec<f64>,
}

fn is_one(l: &Lowering<'_>, operand: usize) -> bool {
    !l.has(operand) || l.shape(operand).is_ok_and(|s| s.dims().iter().all(|d| *d == 1))
}

/// An operand of codes with one zero point, as F32.
fn centred(l: &mut Lowering<'_>, operand: usize, zero: usize) -> Result<Centred, Refusal> {
    let (low, high) = match l.dtype(operand)? {
        DType::U8 => (0.0, 255.0),
        DType::I8 => (-128.0, 127.0),
        _ => return Err(Refusal::Host),
    };
    let known = if l.has(zero) { l.constant(zero) } else { Some(Value::Tensor(Tensor::scalar(0f32))) };
    let reach = match known.map(|v| v.floats()).transpose()?.as_deref() {
        Some(&[zero]) => f64::max(high - zero, zero - low),
        _ => 255.0,
    };
    let x = l.value(operand)?;
    let mut value = l.cast(x, DType::F32)?;
    if let Some(zero) = l.optional(zero)? {
        let zero = single(l, zero)?;
        value = l.expand().binary(BinaryOp::Sub, value, zero)?;
    }
    Ok(Centred { value, reach })
}

/// The only number of a value, as F32 without dims.
fn single(l: &mut Lowering<'_>, value: ValueId) -> Result<ValueId, Refusal> {
    let value = l.cast(value, DType::F32)?;
    l.reshape(value, &[])
}

/// Weights that are known without a run; nothing if they are not. A zero point is that of an output, whose axis is given, or of all.
fn weights(l: &Lowering<'_>, operand: usize, zero: usize, axis: usize) -> Result<Option<Weights>, Refusal> {
    let Some(known) = l.constant(operand) else { return Ok(None) };
    let dims = known.dims().unwrap_or_default().to_vec();
    let mut values = known.floats()?;
    if l.has(zero) {
        let Some(zeros) = l.constant(zero) else { return Ok(None) };
        let zeros = zeros.floats()?;
        let own = rlx_graph::eval::strides(&dims);
        match zeros.as_slice() {
            [zero] => values.iter_mut().for_each(|w| *w -= zero),
            all if dims.get(axis) == Some(&all.len()) => {
                values.iter_mut().enumerate().for_each(|(i, w)| *w -= all[i / own[axis] % dims[axis]]);
            }
            _ => return Ok(None),
        }
    }
    Ok(Some(Weights { operand, dims, values }))
}

impl Weights {
    /// Where to cut an axis so that no output's sum over a piece can leave the exact integers; nothing if one step is too much.
    fn pieces(&self, axis: usize, outputs: usize, reach: f64) -> Option<Vec<(usize, usize)>> {
        let own = rlx_graph::eval::strides(&self.dims);
        let extent = self.dims[axis];
        let mut of_step = vec![vec![0.0; self.dims[outputs]]; extent];
        for (i, w) in self.values.iter().enumerate() {
            let (step, output) = (i / own[axis] % extent, i / own[outputs] % self.dims[outputs]);
            of_step[step][output] += w.abs() * reach;
        }
        let mut pieces = Vec::new();
        let (mut start, mut sums) = (0, vec![0.0; self.dims[outputs]]);
        for (step, more) in of_step.iter().enumerate() {
            if more.iter().any(|&m| m > EXACT) {
                return None;
            }
            if sums.iter().zip(more).any(|(s, m)| s + m > EXACT) {
                pieces.push((start, step - start));
                (start, sums) = (step, vec![0.0; self.dims[outputs]]);
            }
            sums.iter_mut().zip(more).for_each(|(s, m)| *s += m);
        }
        pieces.push((start, extent - start));
        Some(pieces)
    }

    /// Steps `start .. start + len` of an axis as F32 weights.
    fn piece(&self, l: &mut Lowering<'_>, axis: usize, start: usize, len: usize) -> Result<ValueId, Refusal> {
        let own = rlx_graph::eval::strides(&self.dims);
        let inside = |i: usize| (start..start + len).contains(&(i / own[axis] % self.dims[axis]));
        let mut dims = self.dims.clone();
        dims[axis] = len;
        l.derived(self.operand, &format!("from{start}"), &dims, || {
            let kept = self.values.iter().enumerate().filter(|(i, _)| inside(*i));
            let kept: Vec<f32> = kept.map(|(_, &w)| w as f32).collect();
            Ok(Tensor::from_slice(&dims, &kept)?)
        })
    }
}

/// `op` over pieces of an axis of x and of the weights, summed: whole numbers as F32 if there is one piece, else as I32.
fn summed(
    l: &mut Lowering<'_>,
    x: &Centred,
    weights: &Weights,
    [x_axis, w_axis, outputs]: [usize; 3],
    op: impl Fn(&mut Lowering<'_>, ValueId, ValueId) -> Result<ValueId, Refusal>,
) -> Result<Option<ValueId>, Refusal> {
    let Some(pieces) = weights.pieces(w_axis, outputs, x.reach) else { return Ok(None) };
    let mut sum = None;
    for &(start, len) in &pieces {
        let part = weights.piece(l, w_axis, start, len)?;
        let of_x = match pieces.len() {
            1 => x.value,
            _ => l.expand().slice(x.value, x_axis, start, len)?,
        };
        let product = op(l, of_x, part)?;
        if pieces.len() == 1 {
            return Ok(Some(product));
        }
        let product = l.cast(product, DType::I32)?;
        sum = Some(match sum {
            None => product,
            Some(sum) => l.expand().binary(BinaryOp::Add, sum, product)?,
        });
    }
    Ok(sum)
}

/// Whether a dtype holds codes of eight bits.
pub(super) fn is_code(dtype: DType) -> bool {
    matches!(dtype, DType::U8 | DType::I8)
}

/// Sums of products of codes as one op, where weights and their zero points are known and x has one zero point.
struct Codes {
    operands: Vec<ValueId>,
    weight_zeros: bool,
}

/// The first operands of such an op; `inputs` is how many terms a sum has.
fn codes(
    l: &mut Lowering<'_>,
    [x, zero, w, w_zero]: [usize; 4],
    inputs: usize,
) -> Result<Option<Codes>, Refusal> {
    let known = l.is_known(w) && (!l.has(w_zero) || l.is_known(w_zero));
    let few = (1..=MOST_TERMS).contains(&inputs);
    if !known || !few || !is_one(l, zero) || !is_code(l.dtype(x)?) || !is_code(l.dtype(w)?) {
        return Ok(None);
    }
    let (from, of) = (l.dtype(x)?, l.dtype(w)?);
    let zeros = l.has(w_zero).then(|| l.constant(w_zero)).flatten().map(|v| v.floats()).transpose()?;
    let zeros = zeros.filter(|zeros| zeros.iter().any(|&z| z != 0.0));
    let zero = match l.optional(zero)? {
        Some(zero) => l.reshape(zero, &[])?,
        None => l.tensor(from_f64(&[], from, &[0.0])?),
    };
    let mut operands = vec![l.value(x)?, l.value(w)?, zero];
    if let Some(zeros) = &zeros {
        operands.push(l.tensor(from_f64(&[zeros.len()], of, zeros)?));
    }
    Ok(Some(Codes { operands, weight_zeros: zeros.is_some() }))
}

/// A matrix product of codes.
fn linear_codes(l: &mut Lowering<'_>, at: [usize; 4]) -> Result<Option<(Codes, IntegerLinear)>, Refusal> {
    let [x, _, w, w_zero] = at;
    let whole = l.rank(w)? == 2 && l.rank(x)? >= 1;
    let (n, k) = if whole { (l.dims(w)?[1], l.dims(w)?[0]) } else { (0, 0) };
    let zeros: usize = if l.has(w_zero) { l.dims(w_zero)?.iter().product() } else { 1 };
    if n == 0 || !(zeros == 1 || zeros == n) {
        return Ok(None);
    }
    let codes = codes(l, at, k)?;
    Ok(codes.map(|codes| {
        let op =
            IntegerLinear { transposed: true, weight_zeros: codes.weight_zeros, ..IntegerLinear::sums() };
        (codes, op)
    }))
}

/// A single number, or one for each output, as a vector of F32.
fn vector(l: &mut Lowering<'_>, value: ValueId) -> Result<ValueId, Refusal> {
    let value = l.cast(value, DType::F32)?;
    let count = l.dims_of(value)?.iter().product();
    l.reshape(value, &[count])
}

/// The products of the scales of x and of the weights.
fn joint_scale(l: &mut Lowering<'_>, x_scale: usize, w_scale: usize) -> Result<ValueId, Refusal> {
    let (x, w) = (l.value(x_scale)?, l.value(w_scale)?);
    let (x, w) = (vector(l, x)?, vector(l, w)?);
    Ok(l.expand().binary(BinaryOp::Mul, x, w)?)
}

/// Zero point and ends of a result of codes, if its zero point is one known number.
fn result_codes(l: &mut Lowering<'_>, y_zero: usize) -> Result<Option<[i64; 3]>, Refusal> {
    let Some((low, high)) = code_range(l.dtype(y_zero)?) else { return Ok(None) };
    let known = l.constant(y_zero).map(|v| v.floats()).transpose()?;
    Ok(known.filter(|zero| zero.len() == 1).map(|zero| [zero[0] as i64, low, high]))
}

/// A product of codes with numbers for codes, as F32: `sum * x_scale * w_scale + bias`. Nothing if it is no such product.
pub(super) fn scaled_product(
    l: &mut Lowering<'_>,
    at: [usize; 4],
    [x_scale, w_scale]: [usize; 2],
    bias: usize,
) -> Result<Option<ValueId>, Refusal> {
    let single = is_one(l, x_scale) && l.dtype(x_scale)? == DType::F32;
    let Some((codes, op)) = linear_codes(l, at)?.filter(|_| single) else { return Ok(None) };
    let mut operands = codes.operands;
    operands.push(joint_scale(l, x_scale, w_scale)?);
    let bias = l.optional(bias)?;
    if let Some(bias) = bias {
        operands.push(vector(l, bias)?);
    }
    let op = IntegerLinear { to: DType::F32, bias: bias.is_some(), ..op };
    l.add(op, &operands).map(Some)
}

/// The product with a known matrix.
fn product(l: &mut Lowering<'_>, [x, zero, w, w_zero]: [usize; 4]) -> Result<ValueId, Refusal> {
    let matrix = weights(l, w, w_zero, 1)?.filter(|m| m.dims.len() == 2 && m.dims[0] > 0);
    let (Some(matrix), true) = (matrix, is_one(l, zero) && l.rank(x)? >= 2) else {
        return Err(Refusal::Host);
    };
    let axis = l.rank(x)? - 1;
    let x = centred(l, x, zero)?;
    let sum = summed(l, &x, &matrix, [axis, 0, 1], |l, x, w| l.add(MatMul::plain(), &[x, w]))?;
    sum.ok_or(Refusal::Host)
}

/// `MatMulInteger` with a known matrix.
pub fn matmul_integer(l: &mut Lowering<'_>) -> Lowered {
    if let Some((codes, op)) = linear_codes(l, [0, 2, 1, 3])? {
        return Ok(vec![l.add(op, &codes.operands)?]);
    }
    let sum = product(l, [0, 2, 1, 3])?;
    Ok(vec![l.cast(sum, DType::I32)?])
}

/// `QLinearMatMul` with a known matrix.
pub fn qlinear_matmul(l: &mut Lowering<'_>) -> Lowered {
    let row = l.rank(4)? <= 1 && [1, 6, 7].into_iter().all(|operand| is_one(l, operand));
    if !row || l.dtype(1)? != DType::F32 {
        return Err(Refusal::Host);
    }
    if let Some([zero, low, high]) = result_codes(l, 7)?
        && let Some((codes, op)) = linear_codes(l, [0, 2, 3, 5])?
    {
        let mut operands = codes.operands;
        operands.push(joint_scale(l, 1, 4)?);
        let step = l.value(6)?;
        operands.push(vector(l, step)?);
        let to = l.dtype(7)?;
        return Ok(vec![l.add(IntegerLinear { to, zero, low, high, ..op }, &operands)?]);
    }
    let sum = product(l, [0, 2, 3, 5])?;
    let scales = l.value(4)?;
    requantized(l, sum, [1, 6, 7], scales)
}

/// Sums as codes: `round(sum * (x_scale * w_scale / y_scale)) + zero`, all in F32, within the range of the type.
fn requantized(
    l: &mut Lowering<'_>,
    sum: ValueId,
    [x_scale, y_scale, y_zero]: [usize; 3],
    w_scale: ValueId,
) -> Lowered {
    let sum = l.cast(sum, DType::F32)?;
    let (x_scale, y_scale) = (l.value(x_scale)?, l.value(y_scale)?);
    let (x_scale, y_scale) = (single(l, x_scale)?, single(l, y_scale)?);
    let w_scale = l.cast(w_scale, DType::F32)?;
    let dtype = l.dtype(y_zero)?;
    let zero = l.value(y_zero)?;
    let zero = single(l, zero)?;
    let (low, high) = if dtype == DType::I8 { (-128.0, 127.0) } else { (0.0, 255.0) };
    let mut e = l.expand();
    let scale = e.binary(BinaryOp::Mul, x_scale, w_scale)?;
    let scale = e.binary(BinaryOp::Div, scale, y_scale)?;
    let mut y = e.binary(BinaryOp::Mul, sum, scale)?;
    y = e.unary(UnaryOp::Round, y)?;
    y = e.binary(BinaryOp::Add, y, zero)?;
    y = e.scalar(BinaryOp::Max, y, low)?;
    y = e.scalar(BinaryOp::Min, y, high)?;
    Ok(vec![l.cast(y, dtype)?])
}

/// Sums of a convolution of codes, through F32 where the weights are known and I32 otherwise.
fn conv(l: &mut Lowering<'_>, [x, zero, w, w_zero]: [usize; 4]) -> Result<ValueId, Refusal> {
    let op = conv_op(l, x, w, false)?;
    let images = l.dims(x)?;
    let known = weights(l, w, w_zero, 0)?.filter(|_| is_one(l, zero));
    if let Some(known) = known {
        let codes = centred(l, x, zero)?;
        // Pieces of the channels of one group only: with more groups a piece would have to be taken of each.
        let whole = op.groups == 1 || known.pieces(1, 0, codes.reach).is_some_and(|p| p.len() == 1);
        let plain = |l: &mut Lowering<'_>, x: ValueId, w: ValueId| l.add(op.clone(), &[x, w]);
        if whole
            && images[1] > 0
            && let Some(sum) = summed(l, &codes, &known, [1, 1, 0], plain)?
        {
            return Ok(sum);
        }
    }
    let x = whole_numbers(l, x, zero, 1)?;
    let w = whole_numbers(l, w, w_zero, 0)?;
    l.add(Conv { bias: false, ..op }, &[x, w])
}

/// Codes less their zero point, one for each index of `axis` or one for all, as I32.
fn whole_numbers(l: &mut Lowering<'_>, x: usize, zero: usize, axis: usize) -> Result<ValueId, Refusal> {
    let rank = l.rank(x)?;
    let value = l.value(x)?;
    let wide = l.cast(value, DType::I32)?;
    let Some(zero) = l.optional(zero)? else { return Ok(wide) };
    let zero = l.cast(zero, DType::I32)?;
    let zero = spread(l, zero, axis, rank)?;
    Ok(l.expand().binary(BinaryOp::Sub, wide, zero)?)
}

/// A number, or one for each index of an axis, as it is broadcast over values of a rank.
fn spread(l: &mut Lowering<'_>, value: ValueId, axis: usize, rank: usize) -> Result<ValueId, Refusal> {
    let mut dims = vec![1; rank];
    let count: usize = l.dims_of(value)?.iter().product();
    if count == 1 {
        return l.reshape(value, &[]);
    }
    dims[axis] = count;
    l.reshape(value, &dims)
}

/// A convolution of codes of one group.
fn conv_codes(l: &mut Lowering<'_>, at: [usize; 4]) -> Result<Option<(Codes, IntegerConv)>, Refusal> {
    let [x, _, w, w_zero] = at;
    let op = conv_op(l, x, w, false)?;
    let dims = l.dims(w)?;
    let zeros: usize = if l.has(w_zero) { l.dims(w_zero)?.iter().product() } else { 1 };
    let fits = op.groups == 1 && dims.len() <= 4 && (zeros == 1 || zeros == dims[0]) && dims[0] > 0;
    let codes = if fits { codes(l, at, dims[1..].iter().product())? } else { None };
    Ok(codes.map(|codes| {
        let op = IntegerConv { weight_zeros: codes.weight_zeros, ..IntegerConv::sums(&op) };
        (codes, op)
    }))
}

/// `ConvInteger`.
pub fn conv_integer(l: &mut Lowering<'_>) -> Lowered {
    if let Some((codes, op)) = conv_codes(l, [0, 2, 1, 3])? {
        return Ok(vec![l.add(op, &codes.operands)?]);
    }
    let sum = conv(l, [0, 2, 1, 3])?;
    Ok(vec![l.cast(sum, DType::I32)?])
}

/// `QLinearConv`.
pub fn qlinear_conv(l: &mut Lowering<'_>) -> Lowered {
    let rank = l.rank(0)?;
    if ![1, 6, 7].into_iter().all(|operand| is_one(l, operand)) {
        return invalid("scales and zero points of images must be single numbers");
    }
    if let Some([zero, low, high]) = result_codes(l, 7)?
        && let Some((codes, op)) = conv_codes(l, [0, 2, 3, 5])?
    {
        let mut operands = codes.operands;
        operands.push(joint_scale(l, 1, 4)?);
        let step = l.value(6)?;
        operands.push(vector(l, step)?);
        operands.extend(l.optional(8)?);
        let (to, bias) = (l.dtype(7)?, l.has(8));
        return Ok(vec![l.add(IntegerConv { to, bias, zero, low, high, ..op }, &operands)?]);
    }
    let mut sum = conv(l, [0, 2, 3, 5])?;
    if let Some(bias) = l.optional(8)? {
        let (bias, wide) = (spread(l, bias, 1, rank)?, l.cast(sum, DType::I32)?);
        sum = l.expand().binary(BinaryOp::Add, wide, bias)?;
    }
    let scales = l.value(4)?;
    let scales = spread(l, scales, 1, rank)?;
    requantized(l, sum, [1, 6, 7], scales)
}
