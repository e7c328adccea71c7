//! A mixture of gated experts (Shazeer et al., 2017; Fedus et al., 2021).

use crate::attrs::op_struct;
use crate::eval::{from_f64, to_f64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate, shape_bytes};
use crate::ops::activation::ActivationKind;
use crate::ops::binary::BinaryOp;
use crate::ops::linear::Linear;
use crate::ops::reduce::{Reduce, ReduceOp};
use crate::ops::softmax::{Softmax, softmax_of};
use crate::ops::topk::{TopK, top_indices};
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// Each row goes to the `top_k` experts of largest router probability; the result is their outputs weighted by probability.
    ///
    /// Operands: `x [rows, width]` F32; router logits `[rows, experts]` F32; then for expert 0, 1, ..: gate `[inner, width]`, up
    /// `[inner, width]`, down `[width, inner]` of any float or block-quantised dtype. An expert is `down (act(gate x) * up x)`. Probabilities are the
    /// softmax over all experts; of equal ones the lower expert is taken. Outputs are summed from the most probable expert down.
    /// Result `[rows, width]` F32.
    pub struct Moe = "moe" {
        /// Number of experts.
        experts: usize,
        /// Experts per row.
        top_k: usize,
        /// The weights of a row's experts are divided by their sum.
        renormalize: bool,
        /// Applied to the gate.
        activation: ActivationKind,
    }
}

impl Moe {
    /// Position of an expert's gate; up and down follow it.
    pub fn expert_at(&self, expert: usize) -> usize {
        2 + 3 * expert
    }

    /// The experts of a row, most probable first, with their weights.
    fn route(&self, logits: &[f64]) -> Vec<(usize, f64)> {
        let probabilities = softmax_of(logits);
        let chosen = top_indices(&probabilities, self.top_k);
        let total: f64 = chosen.iter().map(|&e| probabilities[e]).sum();
        let scale = if self.renormalize { 1.0 / total } else { 1.0 };
        chosen.into_iter().map(|e| (e, probabilities[e] * scale)).collect()
    }
}

fn product(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len().max(1)).map(|row| row.iter().zip(x).map(|(w, v)| w * v).sum()).collect()
}

impl OpDef for Moe {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::positive("experts", self.experts)?;
        InferError::positive("top_k", self.top_k)?;
        if self.top_k > self.experts {
            let reason = format!("{} of {} experts", self.top_k, self.experts);
            return Err(InferError::Attribute { name: "top_k", reason });
        }
        if self.experts.checked_mul(3).and_then(|n| n.checked_add(2)) != Some(inputs.len()) {
            let expected = format!("2 + 3 * {}", self.experts);
            return Err(InferError::Arity { expected, found: inputs.len() });
        }
        for operand in 0..inputs.len() {
            InferError::rank(inputs, operand, 2)?;
            InferError::weight(inputs, operand)?;
        }
        InferError::dtype(inputs, 0, DType::F32)?;
        InferError::dtype(inputs, 1, DType::F32)?;
        let (rows, width) = (&inputs[0].dims()[0], &inputs[0].dims()[1]);
        cx.require_equal("rows of value and router logits", rows, &inputs[1].dims()[0])?;
        cx.require_equal("router logits and experts", &inputs[1].dims()[1], &Dim::Known(self.experts))?;
        for expert in 0..self.experts {
            let at = self.expert_at(expert);
            let inner = &inputs[at].dims()[0];
            cx.require_equal("width and gate", width, &inputs[at].dims()[1])?;
            cx.require_same("gate and up", at + 1, inputs[at + 1].dims(), inputs[at].dims())?;
            cx.require_equal("width and down", width, &inputs[at + 2].dims()[0])?;
            cx.require_equal("gate and down", inner, &inputs[at + 2].dims()[1])?;
        }
        Ok(vec![inputs[0].clone()])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (x, logits) = (to_f64(inputs[0])?, to_f64(inputs[1])?);
        let width = inputs[0].dims()[1];
        let weights = inputs[2..].iter().map(|t| to_f64(t)).collect::<Result<Vec<_>, _>>()?;
        let mut result = Vec::with_capacity(x.len());
        for (x, logits) in x.chunks(width.max(1)).zip(logits.chunks(self.experts)) {
            let mut sum = vec![0.0; width];
            for (expert, weight) in self.route(logits) {
                let matrices = &weights[3 * expert..3 * expert + 3];
                let (gate, up) = (product(&matrices[0], x), product(&matrices[1], x));
                let inner: Vec<f64> =
                    gate.iter().zip(&up).map(|(&g, &u)| self.activation.eval(g) * u).collect();
                let down = product(&matrices[2], &inner);
                sum.iter_mut().zip(down).for_each(|(s, d)| *s += weight * d);
            }
            result.extend(sum);
        }
        Ok(vec![from_f64(inputs[0].dims(), DType::F32, &result)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, ..Props::default() }
    }

    /// Every row runs `top_k` experts; every expert's weights are read.
    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let expert = inputs[2].elements() * Dim::Known(6 * self.top_k);
        let flops = inputs[0].dims()[0].clone() * expert;
        let weights = inputs[2..].iter().fold(Dim::Known(0), |sum, s| sum + shape_bytes(s));
        Cost {
            flops,
            bytes: weights + shape_bytes(inputs[0]) + shape_bytes(inputs[1]) + shape_bytes(outputs[0]),
        }
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs).map(|y| vec![y]))
    }
}

impl Moe {
    /// Every expert runs on every row and is weighted by zero where it was not chosen: `experts / top_k` times the work.
    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let probabilities = to.graph.add_one(Softmax { axis: 1 }, &[inputs[1]])?;
        let top = to.graph.add(TopK { k: self.top_k }, &[probabilities])?;
        let (mut weights, indices) = (top[0], top[1]);
        if self.renormalize {
            let total = to.reduce(ReduceOp::Sum, weights, 1)?;
            weights = to.binary(BinaryOp::Div, weights, total)?;
        }
        let zero = to.number(0.0, DType::F32)?;
        let mut sum = None;
        for expert in 0..self.experts {
            let at = self.expert_at(expert);
            let up = Linear { parts: 2, gated: true, activation: self.activation, ..Linear::plain() };
            let inner = to.graph.add_one(up, &[inputs[0], inputs[at], inputs[at + 1]])?;
            let y = to.graph.add_one(Linear::plain(), &[inner, inputs[at + 2]])?;
            let chosen = to.scalar(BinaryOp::Equal, indices, expert as f64)?;
            let weight = to.select(chosen, weights, zero)?;
            let weight = to
                .graph
                .add_one(Reduce { kind: ReduceOp::Sum, axes: vec![1], keep_dims: true }, &[weight])?;
            let weighted = to.binary(BinaryOp::Mul, y, weight)?;
            sum = Some(match sum {
                Some(sum) => to.binary(BinaryOp::Add, sum, weighted)?,
                None => weighted,
            });
        }
        match sum {
            Some(sum) => Ok(sum),
            None => to.scalar(BinaryOp::Mul, inputs[0], 0.0),
        }
    }
}
