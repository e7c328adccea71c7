//! Products of codes of eight bits with a matrix of codes.

use crate::attrs::op_struct;
use crate::eval::to_i64;
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::integer::Form;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::conv::Conv;
use crate::ops::transpose::Transpose;
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// Whole sums of `(x - x zero) * (w - w zero)`, as numbers or codes.
    ///
    /// Operands: `x [.., k]` of U8 or I8; `w [n, k]` of U8 or I8 (`[k, n]` if `transposed`); the zero point of x, a scalar of its dtype; then, if
    /// `weight_zeros`, `[n]` or `[1]` of w's dtype; then, unless the result is I32, scales `[n]` or `[1]` of F32; then, if the
    /// result is codes, its own scale, `[1]` of F32; then, if `bias`, `[n]` or `[1]` of I32, added to the sums, or of F32, added to scaled
    /// sums. Result `[.., n]`: of I32 the sums (they wrap); of F32 `sum * scale + bias`; of U8 or I8 `round(sum * (scale / own) + bias / own)
    /// + zero` between `low` and `high`, ties to even. Each step is rounded to F32.
    pub struct IntegerLinear = "integer_linear" {
        /// The weight is `[k, n]`.
        transposed: bool,
        /// The weights have zero points.
        weight_zeros: bool,
        /// The last operand is a number for each output.
        bias: bool,
        /// The dtype of the result.
        to: DType,
        /// The zero point of a result of codes.
        zero: i64,
        /// The smallest code of the result.
        low: i64,
        /// The largest code of the result.
        high: i64,
    }
}

impl IntegerLinear {
    /// The sums alone, of x and `w [n, k]`.
    pub fn sums() -> Self {
        let (transposed, weight_zeros, bias) = (false, false, false);
        Self { transposed, weight_zeros, bias, to: DType::I32, zero: 0, low: 0, high: 0 }
    }

    /// The position of the zero points of the weights.
    pub fn weight_zeros_at(&self) -> Option<usize> {
        self.form().weight_zeros_at()
    }

    /// The position of the scales.
    pub fn scale_at(&self) -> Option<usize> {
        self.form().scale_at()
    }

    /// The position of the scale of a result of codes.
    pub fn result_scale_at(&self) -> Option<usize> {
        self.form().result_scale_at()
    }

    /// The position of the bias.
    pub fn bias_at(&self) -> Option<usize> {
        self.form().bias_at()
    }

    fn form(&self) -> Form {
        let Self { weight_zeros, bias, to, zero, low, high, .. } = *self;
        Form { weight_zeros, bias, to, zero, low, high }
    }

    /// `(n, k)` of a weight.
    fn outputs_inputs<'d, T>(&self, dims: &'d [T]) -> (&'d T, &'d T) {
        if self.transposed { (&dims[1], &dims[0]) } else { (&dims[0], &dims[1]) }
    }

    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let shape = to.graph.shape(inputs[0]).clone();
        let (lead, k) = shape.dims().split_at(shape.rank() - 1);
        let rows = lead.iter().fold(Dim::Known(1), |product, d| &product * d);
        let n = self.outputs_inputs(to.graph.shape(inputs[1]).dims()).0.clone();
        let x = Form::centred(&mut to, inputs[0], Some(inputs[2]), 0)?;
        let zeros = self.weight_zeros_at().map(|at| inputs[at]);
        let mut w = Form::centred(&mut to, inputs[1], zeros, usize::from(self.transposed))?;
        if self.transposed {
            w = to.graph.add_one(Transpose { perm: vec![1, 0] }, &[w])?;
        }
        // A product is a convolution over images of one element.
        let x = to.reshape(x, &[rows, k[0].clone(), Dim::Known(1)])?;
        let w = to.reshape(w, &[n.clone(), k[0].clone(), Dim::Known(1)])?;
        let sums = to.graph.add_one(Conv::plain(1), &[x, w])?;
        let sums = to.reshape(sums, &[lead, &[n]].concat())?;
        self.form().expand(&mut to, inputs, sums, lead.len())
    }
}

impl OpDef for IntegerLinear {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(self.form().arity(), inputs)?;
        let k = InferError::last(inputs, 0)?;
        InferError::rank(inputs, 1, 2)?;
        let (n, inner) = self.outputs_inputs(inputs[1].dims());
        cx.require_equal("inputs of x and of the weight", k, inner)?;
        self.form().infer(cx, inputs, n)?;
        let mut dims = inputs[0].dims().to_vec();
        dims.pop();
        dims.push(n.clone());
        Ok(vec![Shape::from_dims(dims, self.to)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (x, w, zero) = (to_i64(inputs[0])?, to_i64(inputs[1])?, to_i64(inputs[2])?);
        let (&n, &k) = self.outputs_inputs(inputs[1].dims());
        let zeros = self.weight_zeros_at().map(|at| to_i64(inputs[at])).transpose()?.unwrap_or_default();
        let zero_of = |column: usize| zeros.get(column).or(zeros.first()).copied().unwrap_or(0);
        let lead = &inputs[0].dims()[..inputs[0].dims().len() - 1];
        let rows = lead.iter().product::<usize>();
        let mut sums = Vec::with_capacity(rows * n);
        for row in 0..rows {
            for column in 0..n {
                let weight = |i: usize| if self.transposed { w[i * n + column] } else { w[column * k + i] };
                let term = |i: usize| (x[row * k + i] - zero[0]) * (weight(i) - zero_of(column));
                sums.push((0..k).map(term).sum());
            }
        }
        let dims = [lead, &[n]].concat();
        Ok(vec![self.form().finish(inputs, &dims, &sums, |index| index % n)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let k = inputs[0].last().cloned().unwrap_or(Dim::Known(1));
        Cost::with_flops(outputs[0].elements() * k * Dim::Known(2), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs).map(|y| vec![y]))
    }
}
