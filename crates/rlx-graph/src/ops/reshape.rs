//! The same elements under other dims.

use crate::attrs::op_struct;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// The elements of operand 0, in order, as `dims`. The number of elements must agree.
    pub struct Reshape = "reshape" {
        /// The new dims; symbols refer to the graph's symbols.
        dims: Vec<Dim>,
    }
}

impl OpDef for Reshape {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let result = Shape::from_dims(self.dims.clone(), inputs[0].dtype());
        cx.require_equal("element counts", &inputs[0].elements(), &result.elements())?;
        Ok(vec![result])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let dims: Option<Vec<usize>> = self.dims.iter().map(Dim::known).collect();
        let dims = dims.ok_or_else(|| EvalError::Value {
            operand: 0,
            reason: format!("dims {:?} hold unbound symbols", self.dims),
        })?;
        Ok(vec![inputs[0].reshaped(&dims)?])
    }

    fn props(&self) -> Props {
        Props { view: true, ..Props::default() }
    }

    fn cost(&self, _inputs: &[&Shape], _outputs: &[&Shape]) -> Cost {
        Cost { flops: Dim::Known(0), bytes: Dim::Known(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_counts_must_agree() {
        let mut cx = InferCx::default();
        let x = Shape::new(&[Dim::symbol("rows"), Dim::Known(6)], rlx_tensor::DType::F32);
        let halves = Reshape { dims: vec![Dim::symbol("rows") * 2, Dim::Known(3)] };
        assert_eq!(halves.infer(&mut cx, &[&x]).unwrap()[0].to_string(), "f32[2*rows, 3]");
        assert!(cx.into_checks().is_empty());
        let y = Shape::new(&[4usize], rlx_tensor::DType::F32);
        let five = Reshape { dims: vec![Dim::Known(5)] };
        assert!(five.infer(&mut InferCx::default(), &[&y]).is_err());
    }
}
