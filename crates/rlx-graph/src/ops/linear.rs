//! A linear layer over one or several stacked weights, with its usual surroundings.

use crate::attrs::op_struct;
use crate::eval::{from_f64, to_f64};
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::concat::Concat;
use crate::ops::matmul::MatMul;
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// `residual + act(x W^T + b)`, accumulated and returned as F32.
    ///
    /// Operands: `x [.., k]` F32; `parts` weights `[n_i, k]` (`[k, n_i]` if `transposed`) of any float or block-quantised dtype; then, if `bias`,
    /// `parts` biases `[n_i]`; then, if `residual`, a value of the result's shape. The weights stand side by side: the result is
    /// `[.., sum n_i]`. If `gated`, there are two parts of the same size, gate and up, and the result is
    /// `residual + act(x W_gate^T + b_gate) * (x W_up^T + b_up)`, `[.., n]`.
    pub struct Linear = "linear" {
        /// Number of weights.
        parts: usize,
        /// Weights are `[k, n]` rather than `[n, k]`.
        transposed: bool,
        /// Every part has a bias.
        bias: bool,
        /// Applied after the bias; to the gate if `gated`.
        activation: ActivationKind,
        /// Gate times up.
        gated: bool,
        /// The last operand is added to the result.
        residual: bool,
    }
}

impl Linear {
    /// One weight `[n, k]`, no bias, nothing after it.
    pub fn plain() -> Self {
        Self {
            parts: 1,
            transposed: false,
            bias: false,
            activation: ActivationKind::Identity,
            gated: false,
            residual: false,
        }
    }

    /// Number of operands.
    pub fn arity(&self) -> usize {
        1 + self.parts * (1 + usize::from(self.bias)) + usize::from(self.residual)
    }

    /// Position of the first bias.
    pub fn bias_at(&self) -> usize {
        1 + self.parts
    }

    fn n_k<'a, T>(&self, dims: &'a [T]) -> (&'a T, &'a T) {
        if self.transposed { (&dims[1], &dims[0]) } else { (&dims[0], &dims[1]) }
    }
}

impl OpDef for Linear {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        if self.parts == 0 || self.parts > 1 << 16 || (self.gated && self.parts != 2) {
            let reason = format!("{} does not fit gated={}", self.parts, self.gated);
            return Err(InferError::Attribute { name: "parts", reason });
        }
        InferError::arity(self.arity(), inputs)?;
        InferError::dtype(inputs, 0, DType::F32)?;
        let (k, lead) = inputs[0].dims().split_last().ok_or(InferError::Rank {
            operand: 0,
            expected: "at least 1".into(),
            found: 0,
        })?;
        let mut widths = Vec::with_capacity(self.parts);
        for operand in 1..=self.parts {
            InferError::rank(inputs, operand, 2)?;
            InferError::weight(inputs, operand)?;
            let (n, weight_k) = self.n_k(inputs[operand].dims());
            cx.require_equal("reduced dims", k, weight_k)?;
            widths.push(n.clone());
            if self.bias {
                InferError::rank(inputs, self.parts + operand, 1)?;
                cx.require_equal("bias and weight", &inputs[self.parts + operand].dims()[0], n)?;
            }
        }
        let n = if self.gated {
            cx.require_equal("gate and up", &widths[0], &widths[1])?;
            widths[0].clone()
        } else {
            widths.iter().fold(Dim::Known(0), |sum, n| &sum + n)
        };
        let result = Shape::from_dims([lead, &[n]].concat(), DType::F32);
        if self.residual {
            let operand = self.arity() - 1;
            InferError::dtype(inputs, operand, DType::F32)?;
            InferError::rank(inputs, operand, result.rank())?;
            for (a, b) in inputs[operand].dims().iter().zip(result.dims()) {
                cx.require_equal("residual and result", a, b)?;
            }
        }
        Ok(vec![result])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = to_f64(inputs[0])?;
        let (lead, k) = match inputs[0].dims().split_last() {
            Some((&k, lead)) => (lead, k),
            None => return Err(EvalError::Value { operand: 0, reason: "is a scalar".into() }),
        };
        let rows: usize = lead.iter().product();
        let mut columns: Vec<Vec<f64>> = vec![Vec::new(); rows];
        for part in 0..self.parts {
            let (&n, _) = self.n_k(inputs[1 + part].dims());
            let w = to_f64(inputs[1 + part])?;
            let b = match self.bias {
                true => to_f64(inputs[self.bias_at() + part])?,
                false => vec![0.0; n],
            };
            let weight = |j: usize, p: usize| if self.transposed { w[p * n + j] } else { w[j * k + p] };
            for (row, out) in columns.iter_mut().enumerate() {
                out.extend((0..n).map(|j| (0..k).map(|p| x[row * k + p] * weight(j, p)).sum::<f64>() + b[j]));
            }
        }
        let residual = match self.residual {
            true => Some(to_f64(inputs[self.arity() - 1])?),
            false => None,
        };
        let mut result = Vec::new();
        for row in &columns {
            if self.gated {
                let (gate, up) = row.split_at(row.len() / 2);
                result.extend(gate.iter().zip(up).map(|(&g, &u)| self.activation.eval(g) * u));
            } else {
                result.extend(row.iter().map(|&v| self.activation.eval(v)));
            }
        }
        if let Some(residual) = residual {
            result.iter_mut().zip(residual).for_each(|(v, r)| *v += r);
        }
        let width = result.len().checked_div(rows).unwrap_or_else(|| self.width(inputs));
        Ok(vec![from_f64(&[lead, &[width]].concat(), DType::F32, &result)?])
    }

    fn props(&self) -> Props {
        let in_place = if self.residual { vec![self.arity() - 1] } else { vec![] };
        Props { composite: true, in_place, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let rows = inputs[0].elements();
        let columns = inputs[1..=self.parts].iter().map(|w| self.n_k(w.dims()).0);
        let n = columns.fold(Dim::Known(0), |sum, n| &sum + n);
        Cost::with_flops(rows * n * Dim::Known(2), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(graph, inputs))
    }
}

impl Linear {
    fn width(&self, inputs: &[&Tensor]) -> usize {
        let total: usize = (1..=self.parts).map(|i| *self.n_k(inputs[i].dims()).0).sum();
        if self.gated { total / 2 } else { total }
    }

    fn expand(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Vec<ValueId>, GraphError> {
        let product = MatMul { transpose_a: false, transpose_b: !self.transposed };
        let mut parts = Vec::with_capacity(self.parts);
        for part in 0..self.parts {
            let weight = crate::ops::cast::to_dtype(graph, inputs[1 + part], DType::F32)?;
            let mut y = graph.add_one(product.clone(), &[inputs[0], weight])?;
            if self.bias {
                let bias = crate::ops::cast::to_dtype(graph, inputs[self.bias_at() + part], DType::F32)?;
                y = graph.add_one(Binary { kind: BinaryOp::Add }, &[y, bias])?;
            }
            parts.push(y);
        }
        let mut y = match (self.gated, parts.as_slice()) {
            (true, &[gate, up]) => {
                let gate = Activation::apply(graph, self.activation, gate)?;
                graph.add_one(Binary { kind: BinaryOp::Mul }, &[gate, up])?
            }
            (_, &[only]) => Activation::apply(graph, self.activation, only)?,
            (_, several) => {
                let axis = graph.shape(several[0]).rank().saturating_sub(1);
                let joined = graph.add_one(Concat { axis }, several)?;
                Activation::apply(graph, self.activation, joined)?
            }
        };
        if self.residual {
            y = graph.add_one(Binary { kind: BinaryOp::Add }, &[inputs[self.arity() - 1], y])?;
        }
        Ok(vec![y])
    }
}
