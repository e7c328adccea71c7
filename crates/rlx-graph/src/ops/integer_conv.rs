//! Convolutions of images of codes of eight bits.

use crate::attrs::op_struct;
use crate::eval::{known_dims, to_i64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::integer::Form;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::conv::Conv;
use crate::ops::transpose::Transpose;
use crate::window::{Axis, Layout, Windows, all_positive, images, known_positions, per_axis, permuted};
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// Whole sums of `(x - x zero) * (w - w zero)` over windows, as numbers or codes.
    ///
    /// Operands: `x [batch, channels, spatial..]` of U8 or I8 (`[batch, spatial.., channels]` if `channels_last`); `w [outputs, channels, window..]` of
    /// U8 or I8; then as those of `integer_linear`, n being the outputs. Result `[batch, outputs, positions..]` in x's layout, made of the sums as
    /// that of `integer_linear`. Elements outside x are its zero point.
    pub struct IntegerConv = "integer_conv" {
        /// Elements from one position of the window to the next, for each spatial axis.
        strides: Vec<usize>,
        /// Elements from one element of the window to the next, for each spatial axis.
        dilations: Vec<usize>,
        /// Elements in front of each spatial axis.
        before: Vec<Dim>,
        /// Elements behind each spatial axis.
        after: Vec<Dim>,
        /// Channels are the last axis rather than the second.
        channels_last: bool,
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

impl IntegerConv {
    /// The sums alone of a convolution of one group; its surroundings are not taken over.
    pub fn sums(conv: &Conv) -> Self {
        Self {
            strides: conv.strides.clone(),
            dilations: conv.dilations.clone(),
            before: conv.before.clone(),
            after: conv.after.clone(),
            channels_last: conv.channels_last,
            weight_zeros: false,
            bias: false,
            to: DType::I32,
            zero: 0,
            low: 0,
            high: 0,
        }
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

    fn layout(&self) -> Layout {
        Layout { channels_last: self.channels_last }
    }

    fn axis<'a>(&'a self, axis: usize, size: &'a Dim) -> Axis<'a> {
        let (before, after) = (&self.before[axis], &self.after[axis]);
        Axis { size, stride: self.strides[axis], dilation: self.dilations[axis], before, after, ceil: false }
    }

    fn windows(&self, x: &[usize], w: &[usize]) -> Result<Windows, EvalError> {
        let extents = self.layout().spatial(x).to_vec();
        let sizes: Vec<Dim> = w[2..].iter().map(|&d| Dim::Known(d)).collect();
        let axes: Vec<(Axis<'_>, usize)> =
            sizes.iter().enumerate().map(|(i, size)| (self.axis(i, size), extents[i])).collect();
        Ok(Windows {
            positions: known_positions(&axes)?,
            extents,
            sizes: w[2..].to_vec(),
            strides: self.strides.clone(),
            dilations: self.dilations.clone(),
            before: known_dims(&self.before)?,
            after: known_dims(&self.after)?,
        })
    }

    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let (rank, layout) = (to.graph.shape(inputs[0]).rank(), self.layout());
        let mut x = Form::centred(&mut to, inputs[0], Some(inputs[2]), 0)?;
        let zeros = self.weight_zeros_at().map(|at| inputs[at]);
        let w = Form::centred(&mut to, inputs[1], zeros, 0)?;
        if self.channels_last {
            x = to.graph.add_one(Transpose { perm: layout.permutation(rank, true) }, &[x])?;
        }
        let plain = Conv {
            strides: self.strides.clone(),
            dilations: self.dilations.clone(),
            before: self.before.clone(),
            after: self.after.clone(),
            ..Conv::plain(rank - 2)
        };
        let mut y = to.graph.add_one(plain, &[x, w])?;
        if self.channels_last {
            y = to.graph.add_one(Transpose { perm: layout.permutation(rank, false) }, &[y])?;
        }
        self.form().expand(&mut to, inputs, y, layout.channels(rank))
    }
}

impl OpDef for IntegerConv {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(self.form().arity(), inputs)?;
        let axes = images(inputs, 0)?;
        all_positive("strides", &self.strides, axes)?;
        all_positive("dilations", &self.dilations, axes)?;
        per_axis("before", self.before.len(), axes)?;
        per_axis("after", self.after.len(), axes)?;
        InferError::rank(inputs, 1, axes + 2)?;
        let (x, w) = (inputs[0].dims(), inputs[1].dims());
        cx.require_equal("channels of x and of the weight", &x[self.layout().channels(x.len())], &w[1])?;
        self.form().infer(cx, inputs, &w[0])?;
        let spatial = self.layout().spatial(x).iter().zip(&w[2..]).enumerate();
        let positions = spatial.map(|(i, (extent, size))| self.axis(i, size).positions(extent));
        let positions: Vec<Dim> = positions.collect::<Result<_, _>>()?;
        Ok(vec![Shape::from_dims(self.layout().dims(&x[0], &w[0], &positions), self.to)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (x_dims, w_dims, layout) = (inputs[0].dims(), inputs[1].dims(), self.layout());
        let windows = self.windows(x_dims, w_dims)?;
        let (rank, outputs, channels) = (x_dims.len(), w_dims[0], w_dims[1]);
        let zero = to_i64(inputs[2])?[0];
        let zeros = self.weight_zeros_at().map(|at| to_i64(inputs[at])).transpose()?.unwrap_or_default();
        let x = permuted(&to_i64(inputs[0])?, x_dims, &layout.permutation(rank, true));
        let w = to_i64(inputs[1])?;
        let (elements, positions, taps) =
            (windows.extents.iter().product::<usize>(), windows.count(), windows.taps());
        let mut sums = vec![0i64; x_dims[0] * outputs * positions];
        for (index, sum) in sums.chunks_mut(positions.max(1)).enumerate() {
            let (image, output) = (index / outputs, index % outputs);
            let weight_zero = zeros.get(output).or(zeros.first()).copied().unwrap_or(0);
            for channel in 0..channels {
                let plane = &x[(image * channels + channel) * elements..][..elements];
                let weights = &w[(output * channels + channel) * taps..][..taps];
                windows.visit(|tap, position, element| {
                    sum[position] += (weights[tap] - weight_zero) * (plane[element] - zero);
                });
            }
        }
        let front = Layout { channels_last: false }.dims(&x_dims[0], &outputs, &windows.positions);
        let sums = permuted(&sums, &front, &layout.permutation(rank, false));
        let dims = layout.dims(&x_dims[0], &outputs, &windows.positions);
        let inner = if self.channels_last { 1 } else { positions };
        Ok(vec![self.form().finish(inputs, &dims, &sums, |index| index / inner.max(1) % outputs)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let taps = inputs[1].dims()[1..].iter().fold(Dim::Known(2), |product, d| &product * d);
        Cost::with_flops(outputs[0].elements() * taps, inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs).map(|y| vec![y]))
    }
}
