//! Convolutions, with their usual surroundings.

use crate::attrs::op_struct;
use crate::eval::{from_f64, known_dims, to_f64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::BinaryOp;
use crate::ops::transpose::Transpose;
use crate::window::{
    Axis, Layout, Windows, all_positive, divides, images, known_positions, per_axis, permuted,
};
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// `act(x * w + b + addend)`: each output is the sum over a window of all input channels of its group (cross-correlation).
    ///
    /// Operands: `x [batch, channels, spatial..]` (`[batch, spatial.., channels]` if `channels_last`); `w [outputs,
    /// channels / groups, window..]` of x's dtype; then, if `bias`, `[outputs]`; then, if `addend`, a value of the result's
    /// shape. Result `[batch, outputs, positions..]` in x's layout. Floats and I32. Elements outside x are zero.
    pub struct Conv = "conv" {
        /// Elements from one position of the window to the next, for each spatial axis.
        strides: Vec<usize>,
        /// Elements from one element of the window to the next, for each spatial axis.
        dilations: Vec<usize>,
        /// Zeros in front of each spatial axis.
        before: Vec<Dim>,
        /// Zeros behind each spatial axis.
        after: Vec<Dim>,
        /// Channels and outputs are in this many groups, which do not see each other.
        groups: usize,
        /// There is an operand of numbers for each output channel.
        bias: bool,
        /// The last operand is added before the activation.
        addend: bool,
        /// Applied last.
        activation: ActivationKind,
        /// Channels are the last axis rather than the second.
        channels_last: bool,
    }
}

impl Conv {
    /// Nothing but the sum: one group, channels in front, no zeros around, each position.
    pub fn plain(axes: usize) -> Self {
        Self {
            strides: vec![1; axes],
            dilations: vec![1; axes],
            before: vec![Dim::Known(0); axes],
            after: vec![Dim::Known(0); axes],
            groups: 1,
            bias: false,
            addend: false,
            activation: ActivationKind::Identity,
            channels_last: false,
        }
    }

    /// Number of operands.
    pub fn arity(&self) -> usize {
        2 + usize::from(self.bias) + usize::from(self.addend)
    }

    fn layout(&self) -> Layout {
        Layout { channels_last: self.channels_last }
    }

    fn axis<'a>(&'a self, axis: usize, size: &'a Dim) -> Axis<'a> {
        let (before, after) = (&self.before[axis], &self.after[axis]);
        let (stride, dilation) = (self.strides[axis], self.dilations[axis]);
        Axis { size, stride, dilation, before, after, ceil: false }
    }

    /// True where nothing is added to the sum and channels stand in front: what a decomposition ends with.
    pub fn is_plain(&self) -> bool {
        !self.bias && !self.addend && !self.channels_last && self.activation == ActivationKind::Identity
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

    /// The sums, channels in front.
    fn sums(&self, x: &[f64], channels: usize, w: &[f64], outputs: usize, windows: &Windows) -> Vec<f64> {
        let (elements, positions, taps) =
            (windows.extents.iter().product::<usize>(), windows.count(), windows.taps());
        let mut pairs = vec![Vec::new(); taps];
        windows.visit(|tap, position, element| pairs[tap].push((position, element)));
        let batch = x.len().checked_div(channels * elements).unwrap_or(0);
        let (each, outputs_each) = (channels / self.groups, outputs / self.groups);
        let mut sums = vec![0.0; batch * outputs * positions];
        for (index, sum) in sums.chunks_mut(positions.max(1)).enumerate() {
            let (image, output) = (index / outputs, index % outputs);
            let first = output / outputs_each * each;
            for channel in 0..each {
                let plane = &x[(image * channels + first + channel) * elements..][..elements];
                for (tap, pairs) in pairs.iter().enumerate() {
                    let weight = w[(output * each + channel) * taps + tap];
                    pairs.iter().for_each(|&(position, element)| sum[position] += weight * plane[element]);
                }
            }
        }
        sums
    }

    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let rank = to.graph.shape(inputs[0]).rank();
        let mut x = inputs[0];
        if self.channels_last {
            x = to.graph.add_one(Transpose { perm: self.layout().permutation(rank, true) }, &[x])?;
        }
        let plain = Conv { bias: false, addend: false, channels_last: false, ..self.clone() };
        let plain = Conv { activation: ActivationKind::Identity, ..plain };
        let mut y = to.graph.add_one(plain, &[x, inputs[1]])?;
        if self.channels_last {
            y = to.graph.add_one(Transpose { perm: self.layout().permutation(rank, false) }, &[y])?;
        }
        if self.bias {
            let outputs = to.graph.shape(inputs[2]).dims()[0].clone();
            let mut dims = vec![Dim::Known(1); rank];
            dims[self.layout().channels(rank)] = outputs;
            let bias = to.reshape(inputs[2], &dims)?;
            y = to.binary(BinaryOp::Add, y, bias)?;
        }
        if self.addend {
            y = to.binary(BinaryOp::Add, y, inputs[self.arity() - 1])?;
        }
        Activation::apply(to.graph, self.activation, y)
    }
}

impl OpDef for Conv {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(self.arity(), inputs)?;
        let axes = images(inputs, 0)?;
        let found = inputs[0].dtype();
        if !found.is_float() && found != DType::I32 {
            return Err(InferError::DType { operand: 0, expected: "a float or i32".into(), found });
        }
        if found == DType::I32 && self.activation != ActivationKind::Identity {
            return Err(InferError::DType { operand: 0, expected: "a float".into(), found });
        }
        all_positive("strides", &self.strides, axes)?;
        all_positive("dilations", &self.dilations, axes)?;
        per_axis("before", self.before.len(), axes)?;
        per_axis("after", self.after.len(), axes)?;
        InferError::rank(inputs, 1, axes + 2)?;
        InferError::dtype(inputs, 1, found)?;
        let (x, w) = (inputs[0].dims(), inputs[1].dims());
        let channels = &x[self.layout().channels(x.len())];
        let each = divides(cx, "channels and groups", self.groups, channels)?;
        cx.require_equal("channels of a group and of the weight", &each, &w[1])?;
        divides(cx, "outputs and groups", self.groups, &w[0])?;
        let spatial = self.layout().spatial(x).iter().zip(&w[2..]).enumerate();
        let positions = spatial.map(|(i, (extent, size))| self.axis(i, size).positions(extent));
        let positions: Vec<Dim> = positions.collect::<Result<_, _>>()?;
        let dims = self.layout().dims(&x[0], &w[0], &positions);
        if self.bias {
            InferError::rank(inputs, 2, 1)?;
            InferError::dtype(inputs, 2, found)?;
            cx.require_equal("bias and outputs", &inputs[2].dims()[0], &w[0])?;
        }
        if self.addend {
            let operand = self.arity() - 1;
            InferError::dtype(inputs, operand, found)?;
            cx.require_same("addend and result", operand, inputs[operand].dims(), &dims)?;
        }
        Ok(vec![Shape::from_dims(dims, found)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (x_dims, w_dims, layout) = (inputs[0].dims(), inputs[1].dims(), self.layout());
        let windows = self.windows(x_dims, w_dims)?;
        let (rank, outputs) = (x_dims.len(), w_dims[0]);
        let x = permuted(&to_f64(inputs[0])?, x_dims, &layout.permutation(rank, true));
        let sums = self.sums(&x, x_dims[layout.channels(rank)], &to_f64(inputs[1])?, outputs, &windows);
        let front = Layout { channels_last: false }.dims(&x_dims[0], &outputs, &windows.positions);
        let mut sums = permuted(&sums, &front, &layout.permutation(rank, false));
        let dims = layout.dims(&x_dims[0], &outputs, &windows.positions);
        if self.bias {
            let bias = to_f64(inputs[2])?;
            let inner = if self.channels_last { 1 } else { windows.count() };
            sums.iter_mut().enumerate().for_each(|(i, v)| *v += bias[i / inner % outputs]);
        }
        if self.addend {
            sums.iter_mut().zip(to_f64(inputs[self.arity() - 1])?).for_each(|(v, a)| *v += a);
        }
        sums.iter_mut().for_each(|v| *v = self.activation.eval(*v));
        Ok(vec![from_f64(&dims, inputs[0].dtype(), &sums)?])
    }

    fn props(&self) -> Props {
        let in_place = if self.addend { vec![self.arity() - 1] } else { vec![] };
        Props { composite: !self.is_plain(), in_place, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let taps = inputs[1].dims()[1..].iter().fold(Dim::Known(2), |product, d| &product * d);
        Cost::with_flops(outputs[0].elements() * taps, inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        (!self.is_plain()).then(|| self.expand(Expand { graph }, inputs).map(|y| vec![y]))
    }
}
