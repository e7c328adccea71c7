//! A window onto one axis.

use crate::attrs::op_struct;
use crate::eval::{gather_elements, strides};
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate, shape_bytes};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// Elements `start, start + step, ..` along `axis`, `len` of them.
    pub struct Slice = "slice" {
        /// The axis.
        axis: usize,
        /// First element; symbols refer to the graph's symbols.
        start: Dim,
        /// Number of elements.
        len: Dim,
        /// Distance between elements, at least 1.
        step: usize,
    }
}

impl Slice {
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
        InferError::axis(self.axis, inputs[0].rank())?;
        InferError::positive("step", self.step)?;
        if inputs[0].dtype().element_bytes().is_none() {
            let (expected, found) = ("a dtype of whole bytes".into(), inputs[0].dtype());
            return Err(InferError::DType { operand: 0, expected, found });
        }
        let extent = &inputs[0].dims()[self.axis];
        cx.require_equal("slice end and extent", &self.reach().maximum(extent), extent)?;
        let mut dims = inputs[0].dims().to_vec();
        dims[self.axis] = self.len.clone();
        Ok(vec![Shape::from_dims(dims, inputs[0].dtype())])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let own = strides(inputs[0].dims());
        let window = crate::eval::known_dims(&[self.start.clone(), self.len.clone()])?;
        let mut dims = inputs[0].dims().to_vec();
        dims[self.axis] = window[1];
        let mut steps = own.clone();
        steps[self.axis] *= self.step;
        let offset = window[0] * own[self.axis];
        let at = |at: &[usize]| offset + at.iter().zip(&steps).map(|(c, s)| c * s).sum::<usize>();
        Ok(vec![gather_elements(inputs[0], &dims, at)?])
    }

    fn props(&self) -> Props {
        Props { strided_view: true, ..Props::default() }
    }

    fn cost(&self, _inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost { flops: Dim::Known(0), bytes: shape_bytes(outputs[0]) * 2 }
    }
}
