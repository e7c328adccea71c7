//! A linear layer whose rows may each have a low-rank update of their own (Hu et al., 2021; Chen et al., "Punica", 2023).

use crate::attrs::op_struct;
use crate::eval::{from_f64, to_f64, to_i64};
use crate::expand::Expand;
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::BinaryOp;
use crate::ops::linear::Linear;
use crate::ops::matmul::MatMul;
use rlx_tensor::{DType, Dim, Shape, Tensor};

op_struct! {
    /// [`Linear`] with `scale_s (x A_s^T) B_s^T` added before the activation, where `s` is the row's adapter; nothing is added to rows
    /// without one.
    ///
    /// Operands: those of [`Linear`] with `x [rows, k]`; then `slots [rows]` I32, each row's adapter or -1 for none; `scales
    /// [slots, sites]` F32; then for adapter 0, 1, ..: `[rank, width]` of a float dtype, each of a rank of its own. Part `i` has
    /// its factors in the `k + n_i` columns from `columns[i]` on, `A [rank, k]` and then `B` transposed, and its scale in column
    /// `sites[i]`. A scale of 0 says that the adapter leaves this part alone.
    pub struct LoraLinear = "lora_linear" {
        /// Number of weights.
        parts: usize,
        /// Weights are `[k, n]` rather than `[n, k]`.
        transposed: bool,
        /// Every part has a bias.
        bias: bool,
        /// Applied after bias and update; to the gate if `gated`.
        activation: ActivationKind,
        /// Gate times up.
        gated: bool,
        /// The last of the linear layer's operands is added to the result.
        residual: bool,
        /// Number of adapters.
        slots: usize,
        /// Column of `scales`, part by part.
        sites: Vec<usize>,
        /// First column of the factors, part by part.
        columns: Vec<usize>,
    }
}

impl LoraLinear {
    /// `linear` with room for `slots` adapters.
    pub fn over(linear: &Linear, slots: usize, sites: Vec<usize>, columns: Vec<usize>) -> Self {
        let Linear { parts, transposed, bias, activation, gated, residual } = *linear;
        Self { parts, transposed, bias, activation, gated, residual, slots, sites, columns }
    }

    /// The layer without updates, over the first operands.
    pub fn linear(&self) -> Linear {
        let Self { parts, transposed, bias, activation, gated, residual, .. } = *self;
        Linear { parts, transposed, bias, activation, gated, residual }
    }

    /// Position of the rows' adapters; scales and adapters follow.
    pub fn slots_at(&self) -> usize {
        self.linear().arity()
    }

    /// Position of an adapter.
    pub fn adapter_at(&self, slot: usize) -> usize {
        self.slots_at() + 2 + slot
    }

    /// Number of operands.
    pub fn arity(&self) -> usize {
        self.adapter_at(self.slots)
    }

    /// Output columns of a part.
    fn part_dim<'a, T>(&self, weight: &'a [T]) -> &'a T {
        &weight[usize::from(self.transposed)]
    }

    /// The layer up to the bias: what updates are added to.
    fn products(&self) -> Linear {
        Linear { activation: ActivationKind::Identity, gated: false, residual: false, ..self.linear() }
    }

    fn check_attributes(&self) -> Result<(), InferError> {
        InferError::positive("slots", self.slots)?;
        for (name, list) in [("sites", &self.sites), ("columns", &self.columns)] {
            if list.len() != self.parts {
                let reason = format!("{} entries for {} parts", list.len(), self.parts);
                return Err(InferError::Attribute { name, reason });
            }
        }
        Ok(())
    }
}

impl OpDef for LoraLinear {
    op_boilerplate!();

    fn infer(&self, cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        self.check_attributes()?;
        InferError::arity(self.arity(), inputs)?;
        InferError::rank(inputs, 0, 2)?;
        let result = self.linear().infer(cx, &inputs[..self.slots_at()])?;
        let (slots, scales) = (self.slots_at(), self.slots_at() + 1);
        InferError::rank(inputs, slots, 1)?;
        InferError::dtype(inputs, slots, DType::I32)?;
        cx.require_equal("rows of value and adapters", &inputs[0].dims()[0], &inputs[slots].dims()[0])?;
        InferError::rank(inputs, scales, 2)?;
        InferError::dtype(inputs, scales, DType::F32)?;
        cx.require_equal("adapters and scales", &inputs[scales].dims()[0], &Dim::Known(self.slots))?;
        let k = inputs[0].dims()[1].known();
        let widths = inputs[1..=self.parts].iter().map(|w| self.part_dim(w.dims()).known());
        let ends = widths.zip(&self.columns).map(|(n, &at)| at.checked_add(n?)?.checked_add(k?));
        let end = ends.max().flatten();
        let sites = inputs[scales].dims()[1].known();
        if self.sites.iter().max().is_some_and(|&site| sites.is_none_or(|sites| site >= sites)) {
            let reason = format!("scales have {} columns", inputs[scales].dims()[1]);
            return Err(InferError::Attribute { name: "sites", reason });
        }
        for operand in self.adapter_at(0)..self.arity() {
            InferError::rank(inputs, operand, 2)?;
            InferError::float(inputs, operand)?;
            let width = inputs[operand].dims()[1].known();
            if end.is_none() || width < end {
                let reason = format!("factors reach past operand {operand}, {}", inputs[operand]);
                return Err(InferError::Attribute { name: "columns", reason });
            }
        }
        Ok(result)
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let products = self.products().reference(&inputs[..self.products().arity()])?;
        let (mut y, x) = (to_f64(&products[0])?, to_f64(inputs[0])?);
        let (rows, k) = (inputs[0].dims()[0], inputs[0].dims()[1]);
        let (slots, scales) = (to_i64(inputs[self.slots_at()])?, to_f64(inputs[self.slots_at() + 1])?);
        let sites = inputs[self.slots_at() + 1].dims()[1];
        let adapters =
            inputs[self.adapter_at(0)..].iter().map(|t| to_f64(t)).collect::<Result<Vec<_>, _>>()?;
        let total = y.len().checked_div(rows).unwrap_or(0);
        for (row, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot != -1) {
            let slot = usize::try_from(slot).ok().filter(|&s| s < self.slots).ok_or_else(|| {
                let reason = format!("adapter {slot} of row {row} is outside -1..{}", self.slots);
                EvalError::Value { operand: self.slots_at(), reason }
            })?;
            let (x, mut out) = (&x[row * k..(row + 1) * k], row * total);
            let width = inputs[self.adapter_at(slot)].dims()[1];
            for part in 0..self.parts {
                let (scale, at) = (scales[slot * sites + self.sites[part]], self.columns[part]);
                let n = *self.part_dim(inputs[1 + part].dims());
                for factors in adapters[slot].chunks(width.max(1)) {
                    let inner: f64 = x.iter().zip(&factors[at..]).map(|(x, a)| x * a).sum();
                    let updated = y[out..out + n].iter_mut().zip(&factors[at + k..]);
                    updated.for_each(|(y, b)| *y += scale * inner * b);
                }
                out += n;
            }
        }
        let mut result = Vec::new();
        for row in y.chunks(total.max(1)) {
            match (self.gated, row.split_at(row.len() / 2)) {
                (true, (gate, up)) => {
                    result.extend(gate.iter().zip(up).map(|(&g, &u)| self.activation.eval(g) * u));
                }
                (false, _) => result.extend(row.iter().map(|&v| self.activation.eval(v))),
            }
        }
        if self.residual {
            let residual = to_f64(inputs[self.slots_at() - 1])?;
            result.iter_mut().zip(residual).for_each(|(v, r)| *v += r);
        }
        let width = if self.gated { total / 2 } else { total };
        Ok(vec![from_f64(&[rows, width], DType::F32, &result)?])
    }

    fn props(&self) -> Props {
        let in_place = if self.residual { vec![self.slots_at() - 1] } else { vec![] };
        Props { composite: true, in_place, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        self.linear().cost(&inputs[..self.slots_at()], outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        Some(self.expand(Expand { graph }, inputs).map(|y| vec![y]))
    }
}

impl LoraLinear {
    /// Every adapter runs on every row; what is not a row's own is left out.
    fn expand(&self, mut to: Expand<'_>, inputs: &[ValueId]) -> Result<ValueId, GraphError> {
        let products = self.products();
        let whole = to.graph.add_one(products.clone(), &inputs[..products.arity()])?;
        let mut start = Dim::Known(0);
        let mut parts = Vec::with_capacity(self.parts);
        for part in 0..self.parts {
            let n = self.part_dim(to.graph.shape(inputs[1 + part]).dims()).clone();
            let mut y = to.slice(whole, 1, start.clone(), n.clone())?;
            for slot in 0..self.slots {
                y = self.add_update(&mut to, inputs, (part, slot), y, &n)?;
            }
            start = &start + &n;
            parts.push(y);
        }
        let mut y = match (self.gated, parts.as_slice()) {
            (true, &[gate, up]) => {
                let gate = Activation::apply(to.graph, self.activation, gate)?;
                to.binary(BinaryOp::Mul, gate, up)?
            }
            (_, &[only]) => Activation::apply(to.graph, self.activation, only)?,
            (_, several) => {
                let joined = to.graph.add_one(crate::ops::concat::Concat { axis: 1 }, several)?;
                Activation::apply(to.graph, self.activation, joined)?
            }
        };
        if self.residual {
            y = to.binary(BinaryOp::Add, inputs[self.slots_at() - 1], y)?;
        }
        Ok(y)
    }

    fn add_update(
        &self,
        to: &mut Expand<'_>,
        inputs: &[ValueId],
        (part, slot): (usize, usize),
        y: ValueId,
        n: &Dim,
    ) -> Result<ValueId, GraphError> {
        let (slots, scales) = (inputs[self.slots_at()], inputs[self.slots_at() + 1]);
        let dims = to.graph.shape(inputs[0]).dims().to_vec();
        let at = self.columns[part];
        let adapter = to.float(inputs[self.adapter_at(slot)])?;
        let a = to.slice(adapter, 1, at, dims[1].clone())?;
        let b = to.slice(adapter, 1, &dims[1] + &Dim::Known(at), n.clone())?;
        let inner = to.graph.add_one(MatMul { transpose_a: false, transpose_b: true }, &[inputs[0], a])?;
        let update = to.graph.add_one(MatMul::plain(), &[inner, b])?;
        let scale = to.slice(scales, 0, slot, 1usize)?;
        let scale = to.slice(scale, 1, self.sites[part], 1usize)?;
        let update = to.binary(BinaryOp::Mul, update, scale)?;
        let own = to.scalar(BinaryOp::Equal, slots, slot as f64)?;
        let own = to.reshape(own, &[dims[0].clone(), Dim::Known(1)])?;
        let updated = to.binary(BinaryOp::Add, y, update)?;
        to.select(own, updated, y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dims: &[usize], values: &[f32]) -> Tensor {
        Tensor::from_slice(dims, values).unwrap()
    }

    #[test]
    fn each_row_gets_its_own_update_and_a_row_without_adapter_none() {
        let op = LoraLinear::over(&Linear::plain(), 2, vec![0], vec![1]);
        let x = tensor(&[3, 2], &[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
        let w = tensor(&[1, 2], &[1.0, 1.0]);
        let slots = Tensor::from_slice(&[3], &[1i32, -1, 0]).unwrap();
        let scales = tensor(&[2, 1], &[1.0, 0.5]);
        let first = tensor(&[1, 4], &[9.0, 1.0, 0.0, 10.0]);
        let second = tensor(&[2, 4], &[9.0, 0.0, 1.0, 10.0, 9.0, 1.0, 1.0, 1.0]);
        let y = op.reference(&[&x, &w, &slots, &scales, &first, &second]).unwrap();
        assert_eq!(y[0].as_slice::<f32>().unwrap(), [3.0 + 0.5 * 23.0, 3.0, 3.0 + 10.0]);
        let outside = Tensor::from_slice(&[3], &[2i32, -1, 0]).unwrap();
        let error = op.reference(&[&x, &w, &outside, &scales, &first, &second]).unwrap_err();
        assert!(error.to_string().contains("outside -1..2"), "{error}");
    }
}
