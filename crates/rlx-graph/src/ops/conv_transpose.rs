//! Transposed convolutions: each element adds a window to the result.

use crate::attrs::op_struct;
use crate::eval::{from_f64, strides, to_f64};
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, op_boilerplate};
use crate::window::{all_positive, divides, images, per_axis};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// Element `x[i]` of an image adds `x[i] * w` to the result at `i * stride`, for all outputs of its channel's group.
    ///
    /// Operands: `x [batch, channels, spatial..]`; `w [channels, outputs / groups, window..]` of x's dtype; then, if `bias`,
    /// `[outputs]`. Result `[batch, outputs, extents..]`: all that windows reach, less `before` elements in front of each axis and
    /// `after` behind it. Floats.
    pub struct ConvTranspose = "conv_transpose" {
        /// Elements of the result from one element of x to the next, for each spatial axis.
        strides: Vec<usize>,
        /// Elements from one element of the window to the next.
        dilations: Vec<usize>,
        /// Elements cut in front of each spatial axis.
        before: Vec<i64>,
        /// Elements cut behind each spatial axis; fewer than none are zeros added.
        after: Vec<i64>,
        /// Channels and outputs are in this many groups, which do not see each other.
        groups: usize,
        /// There is an operand of numbers for each output channel.
        bias: bool,
    }
}

fn less(extent: Dim, cut: i64) -> Dim {
    let size = Dim::Known(usize::try_from(cut.unsigned_abs()).unwrap_or(usize::MAX));
    if cut < 0 { &extent + &size } else { &extent - &size }
}

impl ConvTranspose {
    fn extent(&self, axis: usize, extent: &Dim, size: &Dim) -> Dim {
        let one = Dim::Known(1);
        let reach = &(extent - &one) * &Dim::Known(self.strides[axis]);
        let span = &(size - &one) * &Dim::Known(self.dilations[axis]) + 1;
        less(less(&reach + &span, self.before[axis]), self.after[axis])
    }
}

impl OpDef for ConvTranspose {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2 + usize::from(self.bias), inputs)?;
        let axes = images(inputs, 0)?;
        InferError::float(inputs, 0)?;
        let dtype = inputs[0].dtype();
        all_positive("strides", &self.strides, axes)?;
        all_positive("dilations", &self.dilations, axes)?;
        per_axis("before", self.before.len(), axes)?;
        per_axis("after", self.after.len(), axes)?;
        InferError::rank(inputs, 1, axes + 2)?;
        InferError::dtype(inputs, 1, dtype)?;
        let (x, w) = (inputs[0].dims(), inputs[1].dims());
        divides(cx, "channels and groups", self.groups, &x[1])?;
        cx.require_equal("channels and weight", &x[1], &w[0])?;
        let outputs = &w[1] * &Dim::Known(self.groups);
        if self.bias {
            InferError::rank(inputs, 2, 1)?;
            InferError::dtype(inputs, 2, dtype)?;
            cx.require_equal("bias and outputs", &inputs[2].dims()[0], &outputs)?;
        }
        let spatial = (0..axes).map(|axis| self.extent(axis, &x[2 + axis], &w[2 + axis]));
        let dims: Vec<Dim> = [x[0].clone(), outputs].into_iter().chain(spatial).collect();
        if let Some(axis) = (0..axes).find(|&axis| {
            let numbers = x[2 + axis].known().is_some() && w[2 + axis].known().is_some();
            numbers && dims[2 + axis].known().is_none()
        }) {
            let reason = format!("more is cut than axis {axis} of the result has");
            return Err(InferError::Attribute { name: "before", reason });
        }
        Ok(vec![Shape::from_dims(dims, dtype)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (x_dims, w_dims) = (inputs[0].dims(), inputs[1].dims());
        let axes = x_dims.len() - 2;
        let (batch, channels, each) = (x_dims[0], x_dims[1], w_dims[1]);
        let outputs = each * self.groups;
        let mut dims = vec![batch, outputs];
        for axis in 0..axes {
            let extent = self.extent(axis, &Dim::Known(x_dims[2 + axis]), &Dim::Known(w_dims[2 + axis]));
            let reason = || format!("an axis of {} is less than is cut", x_dims[2 + axis]);
            dims.push(extent.known().ok_or_else(|| EvalError::Value { operand: 0, reason: reason() })?);
        }
        let (x, w) = (to_f64(inputs[0])?, to_f64(inputs[1])?);
        let (elements, taps): (usize, usize) = (x_dims[2..].iter().product(), w_dims[2..].iter().product());
        let positions: usize = dims[2..].iter().product();
        let (x_strides, w_strides, y_strides) =
            (strides(&x_dims[2..]), strides(&w_dims[2..]), strides(&dims[2..]));
        let place = |element: usize, tap: usize| {
            (0..axes).try_fold(0, |at, axis| {
                let i = element / x_strides[axis] % x_dims[2 + axis] * self.strides[axis];
                let t = tap / w_strides[axis] % w_dims[2 + axis] * self.dilations[axis];
                let y = usize::try_from((i + t) as i64 - self.before[axis]).ok()?;
                (y < dims[2 + axis]).then_some(at + y * y_strides[axis])
            })
        };
        let mut y = vec![0.0; batch * outputs * positions];
        if self.bias {
            let bias = to_f64(inputs[2])?;
            y.iter_mut().enumerate().for_each(|(i, v)| *v = bias[i / positions % outputs]);
        }
        let channels_each = channels / self.groups;
        for tap in 0..taps {
            for element in 0..elements {
                let Some(at) = place(element, tap) else { continue };
                for (plane, value) in x.iter().skip(element).step_by(elements.max(1)).enumerate() {
                    let (image, channel) = (plane / channels, plane % channels);
                    let first = image * outputs + channel / channels_each * each;
                    for output in 0..each {
                        y[(first + output) * positions + at] +=
                            value * w[(channel * each + output) * taps + tap];
                    }
                }
            }
        }
        Ok(vec![from_f64(&dims, inputs[0].dtype(), &y)?])
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let each = inputs[1].dims()[1..].iter().fold(Dim::Known(2), |product, d| &product * d);
        Cost::with_flops(inputs[0].elements() * each, inputs, outputs)
    }
}
