//! A window onto one axis.

use crate::attrs::op_struct;
use crate::eval::{gather_elements, strides};
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate, shape_bytes};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// Elements `start, start + step, ..` along `axis`, `len` of them.
    pub struct Slice = "slice" {
        /// The axis; the last one if none is given.
        axis: Option<usize>,
        /// First element; symbols refer to the graph's symbols.
        start: Dim,
        /// Number of elements.
        len: Dim,
        /// Distance between elements, at least 1.
        step: usize,
    }
}

impl Slice {
    /// `start .. start + len` along an axis of an operand of this rank.
    pub fn range(axis: usize, rank: usize, start: impl Into<Dim>, len: impl Into<Dim>) -> Self {
        let axis = (axis + 1 != rank).then_some(axis);
        Self { axis, start: start.into(), len: len.into(), step: 1 }
    }

    fn axis_of(&self, rank: usize) -> usize {
        self.axis.unwrap_or(rank.saturating_sub(1))
    }

    /// The extent the operand's axis must have at least.
    fn reach(&self) -> Dim {
        match self.len.known() {
            Some(0) => self.start.clone(),
            _ => &(&self.start + &(self.len.clone() * self.step)) - &Dim::Known(self.step - 1),
        }
    }
}

impl OpDef for Slice {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let axis = self.axis_of(inputs[0].rank());
        InferError::axis(axis, inputs[0].rank())?;
        InferError::positive("step", self.step)?;
        if inputs[0].dtype().element_bytes().is_none() {
            let (expected, found) = ("a dtype of whole bytes".into(), inputs[0].dtype());
            return Err(InferError::DType { operand: 0, expected, found });
        }
        let extent = &inputs[0].dims()[axis];
        cx.require_equal("slice end and extent", &self.reach().maximum(extent), extent)?;
        let mut dims = inputs[0].dims().to_vec();
        dims[axis] = self.len.clone();
        Ok(vec![Shape::from_dims(dims, inputs[0].dtype())])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let axis = self.axis_of(inputs[0].dims().len());
        let own = strides(inputs[0].dims());
        let window = crate::eval::known_dims(&[self.start.clone(), self.len.clone()])?;
        let mut dims = inputs[0].dims().to_vec();
        dims[axis] = window[1];
        let mut steps = own.clone();
        steps[axis] *= self.step;
        let offset = window[0] * own[axis];
        let at = |at: &[usize]| offset + at.iter().zip(&steps).map(|(c, s)| c * s).sum::<usize>();
        Ok(vec![gather_elements(inputs[0], &dims, at)?])
    }

    fn props(&self) -> Props {
        let columns = self.start.known().filter(|_| self.axis.is_none() && self.step == 1);
        Props { strided_view: true, columns, ..Props::default() }
    }

    fn cost(&self, _inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost { flops: Dim::Known(0), bytes: shape_bytes(outputs[0]) * 2 }
    }
}
