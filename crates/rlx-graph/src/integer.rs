//! What products of codes of eight bits share: codes less their zero points are summed as whole numbers, then become numbers or codes.

use crate::expand::Expand;
use crate::graph::GraphError;
use crate::ids::ValueId;
use crate::op::{EvalError, InferCx, InferError};
use crate::ops::binary::BinaryOp;
use crate::ops::cast::to_dtype;
use crate::ops::unary::UnaryOp;
use rlx_tensor::{DType, Dim, Shape, Tensor};

/// Whether a dtype holds codes of eight bits.
pub(crate) fn is_code(dtype: DType) -> bool {
    matches!(dtype, DType::U8 | DType::I8)
}

/// Smallest and largest code of a dtype.
pub fn code_range(dtype: DType) -> Option<(i64, i64)> {
    match dtype {
        DType::U8 => Some((0, 255)),
        DType::I8 => Some((-128, 127)),
        _ => None,
    }
}

/// Operands and result of a product of codes. Operands: x, w, the zero point of x, then those there are of the weights' zero points,
/// scales (unless the result is I32), the scale of a result of codes, and bias.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    pub weight_zeros: bool,
    pub bias: bool,
    pub to: DType,
    pub zero: i64,
    pub low: i64,
    pub high: i64,
}

impl Form {
    pub fn is_scaled(&self) -> bool {
        self.to != DType::I32
    }

    pub fn arity(&self) -> usize {
        let scales = usize::from(self.is_scaled()) + usize::from(is_code(self.to));
        3 + usize::from(self.weight_zeros) + scales + usize::from(self.bias)
    }

    pub fn weight_zeros_at(&self) -> Option<usize> {
        self.weight_zeros.then_some(3)
    }

    pub fn scale_at(&self) -> Option<usize> {
        self.is_scaled().then_some(3 + usize::from(self.weight_zeros))
    }

    pub fn result_scale_at(&self) -> Option<usize> {
        self.scale_at().filter(|_| is_code(self.to)).map(|at| at + 1)
    }

    pub fn bias_at(&self) -> Option<usize> {
        self.bias.then_some(self.arity() - 1)
    }

    /// Checks the operands but for the dims of x and w; `outputs` is the number of channels of the result.
    pub fn infer(&self, cx: &mut InferCx, inputs: &[&Shape], outputs: &Dim) -> Result<(), InferError> {
        InferError::arity(self.arity(), inputs)?;
        for operand in [0, 1] {
            let found = inputs[operand].dtype();
            if !is_code(found) {
                return Err(InferError::DType { operand, expected: "u8 or i8".into(), found });
            }
        }
        InferError::rank(inputs, 2, 0)?;
        InferError::dtype(inputs, 2, inputs[0].dtype())?;
        let mut each = |operand: usize, what: &'static str| match inputs[operand].dims() {
            [only] if *only == 1 => Ok(()),
            [count] => cx.require_equal(what, count, outputs),
            _ => InferError::rank(inputs, operand, 1),
        };
        if let Some(at) = self.weight_zeros_at() {
            InferError::dtype(inputs, at, inputs[1].dtype())?;
            each(at, "zero points and outputs")?;
        }
        if let Some(at) = self.scale_at() {
            InferError::dtype(inputs, at, DType::F32)?;
            each(at, "scales and outputs")?;
        }
        if let Some(at) = self.result_scale_at() {
            InferError::dtype(inputs, at, DType::F32)?;
            InferError::rank(inputs, at, 1)?;
        }
        if let Some(at) = self.bias_at() {
            each(at, "bias and outputs")?;
            let found = inputs[at].dtype();
            if found != DType::I32 && (found != DType::F32 || !self.is_scaled()) {
                return Err(InferError::DType {
                    operand: at,
                    expected: "i32, or f32 beside scales".into(),
                    found,
                });
            }
        }
        let fits = match code_range(self.to) {
            Some((low, high)) => low <= self.low && self.low <= self.high && self.high <= high,
            None => matches!(self.to, DType::I32 | DType::F32),
        };
        match fits {
            true => Ok(()),
            false => {
                let reason = format!("{} with {}..={} is no result", self.to, self.low, self.high);
                Err(InferError::Attribute { name: "to", reason })
            }
        }
    }

    /// The result from sums in an order in which `channel` tells each sum's output.
    pub fn finish(
        &self,
        inputs: &[&Tensor],
        dims: &[usize],
        sums: &[i64],
        channel: impl Fn(usize) -> usize,
    ) -> Result<Tensor, EvalError> {
        let floats = |at: usize| inputs[at].as_slice::<f32>().map_err(EvalError::from);
        let of = |values: &[f32], channel: usize| values.get(channel).or(values.first()).copied();
        let scales = self.scale_at().map(floats).transpose()?.unwrap_or_default();
        let step = self.result_scale_at().map(floats).transpose()?.and_then(|step| step.first().copied());
        let (mut whole, mut bias) = (&[][..], &[][..]);
        match self.bias_at() {
            Some(at) if inputs[at].dtype() == DType::I32 => whole = inputs[at].as_slice::<i32>()?,
            Some(at) => bias = floats(at)?,
            None => {}
        }
        let mut values = Vec::with_capacity(sums.len());
        for (index, &sum) in sums.iter().enumerate() {
            let channel = channel(index);
            let sum = (sum as i32).wrapping_add(whole.get(channel).or(whole.first()).copied().unwrap_or(0));
            if !self.is_scaled() {
                values.push(f64::from(sum));
                continue;
            }
            let scale = of(scales, channel).unwrap_or(1.0);
            let mut value = sum as f32 * step.map_or(scale, |step| scale / step);
            if let Some(bias) = of(bias, channel) {
                value += step.map_or(bias, |step| bias / step);
            }
            if self.to != DType::F32 {
                let code = value.round_ties_even() + self.zero as f32;
                value = code.max(self.low as f32).min(self.high as f32);
            }
            values.push(f64::from(value));
        }
        crate::eval::from_f64(dims, self.to, &values)
    }

    /// Codes less their zero point as I32; `axis` is that of one zero point each.
    pub fn centred(
        to: &mut Expand<'_>,
        codes: ValueId,
        zero: Option<ValueId>,
        axis: usize,
    ) -> Result<ValueId, GraphError> {
        let wide = to_dtype(to.graph, codes, DType::I32)?;
        let Some(zero) = zero else { return Ok(wide) };
        let zero = to_dtype(to.graph, zero, DType::I32)?;
        let zero = Self::along(to, zero, axis, wide)?;
        to.binary(BinaryOp::Sub, wide, zero)
    }

    /// A number, or one for each index of an axis, as it is broadcast over a value.
    fn along(
        to: &mut Expand<'_>,
        numbers: ValueId,
        axis: usize,
        over: ValueId,
    ) -> Result<ValueId, GraphError> {
        let shape = to.graph.shape(numbers).clone();
        let Some(count) = shape.last() else { return Ok(numbers) };
        let mut dims = vec![Dim::Known(1); to.graph.shape(over).rank()];
        dims[axis] = count.clone();
        to.reshape(numbers, &dims)
    }

    /// The result from sums as I32, whose outputs are along `axis`.
    pub fn expand(
        &self,
        to: &mut Expand<'_>,
        inputs: &[ValueId],
        sums: ValueId,
        axis: usize,
    ) -> Result<ValueId, GraphError> {
        let mut y = sums;
        let bias = self.bias_at().map(|at| inputs[at]);
        let whole = bias.filter(|&bias| to.graph.shape(bias).dtype() == DType::I32);
        if let Some(bias) = whole {
            let bias = Self::along(to, bias, axis, y)?;
            y = to.binary(BinaryOp::Add, y, bias)?;
        }
        let Some(scale) = self.scale_at() else { return Ok(y) };
        y = to.float(y)?;
        let step = self.result_scale_at().map(|at| inputs[at]);
        let stepped = |to: &mut Expand<'_>, numbers: ValueId| match step {
            Some(step) => to.binary(BinaryOp::Div, numbers, step),
            None => Ok(numbers),
        };
        let scale = stepped(to, inputs[scale])?;
        let scale = Self::along(to, scale, axis, y)?;
        y = to.binary(BinaryOp::Mul, y, scale)?;
        if let Some(bias) = bias.filter(|_| whole.is_none()) {
            let bias = stepped(to, bias)?;
            let bias = Self::along(to, bias, axis, y)?;
            y = to.binary(BinaryOp::Add, y, bias)?;
        }
        if self.to == DType::F32 {
            return Ok(y);
        }
        y = to.unary(UnaryOp::Round, y)?;
        y = to.scalar(BinaryOp::Add, y, self.zero as f64)?;
        y = to.scalar(BinaryOp::Max, y, self.low as f64)?;
        y = to.scalar(BinaryOp::Min, y, self.high as f64)?;
        to_dtype(to.graph, y, self.to)
    }
}
