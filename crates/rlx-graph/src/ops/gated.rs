//! A gate times a value (Shazeer, 2020).

use crate::attrs::op_struct;
use crate::eval::{from_f64, to_f64};
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::{Binary, BinaryOp};
use rlx_tensor::{Dim, Shape, Tensor};

op_struct! {
    /// `activation(gate) * up`, elementwise over two floats of one shape: swiglu with silu, geglu with gelu.
    pub struct Gated = "gated" {
        /// Applied to the gate.
        activation: ActivationKind,
    }
}

impl OpDef for Gated {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2, inputs)?;
        InferError::float(inputs, 0)?;
        InferError::dtype(inputs, 1, inputs[0].dtype())?;
        cx.require_same("gate and up", 1, inputs[1].dims(), inputs[0].dims())?;
        Ok(vec![inputs[0].clone()])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (gate, up) = (to_f64(inputs[0])?, to_f64(inputs[1])?);
        let result: Vec<f64> = gate.iter().zip(&up).map(|(&g, &u)| self.activation.eval(g) * u).collect();
        Ok(vec![from_f64(inputs[0].dims(), inputs[0].dtype(), &result)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, elementwise: true, in_place: vec![0, 1], ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        Cost::with_flops(inputs[0].elements() * Dim::Known(2), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        let gate = Activation::apply(graph, self.activation, inputs[0]);
        let product = gate.and_then(|g| graph.add_one(Binary { kind: BinaryOp::Mul }, &[g, inputs[1]]));
        Some(product.map(|y| vec![y]))
    }
}
