//! Building a graph at the level of blocks: what model architectures are written with.

use crate::graph::{Graph, GraphError, Source};
use crate::ids::ValueId;
use crate::ops::Op;
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::attention::Attention;
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::cast::Cast;
use crate::ops::concat::Concat;
use crate::ops::embedding::Embedding;
use crate::ops::gated::Gated;
use crate::ops::gather::Gather;
use crate::ops::l2_normalize::L2Normalize;
use crate::ops::layer_norm::LayerNorm;
use crate::ops::linear::Linear;
use crate::ops::moe::Moe;
use crate::ops::pool::{Pool, PoolKind};
use crate::ops::reduce::{Reduce, ReduceOp};
use crate::ops::reshape::Reshape;
use crate::ops::rms_norm::RmsNorm;
use crate::ops::rope::{Rope, RopeStyle};
use crate::ops::rope_angles::RopeAngles;
use crate::ops::select::Select;
use crate::ops::slice::Slice;
use crate::ops::softmax::Softmax;
use crate::ops::transpose::Transpose;
use crate::ops::unary::{Unary, UnaryOp};
use rlx_tensor::{DType, Dim, Shape, Tensor};
use std::panic::Location;

type Built = Result<ValueId, GraphError>;

/// A graph under construction.
#[derive(Debug, Clone)]
pub struct HirModule {
    graph: Graph,
}

impl HirModule {
    /// An empty module.
    pub fn new(name: impl Into<String>) -> Self {
        Self { graph: Graph::new(name) }
    }

    /// The builder of blocks.
    pub fn edit(&mut self) -> HirMut<'_> {
        HirMut { graph: &mut self.graph }
    }

    /// The graph so far.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The finished graph with its outputs named.
    #[track_caller]
    pub fn finish(mut self, outputs: &[(&str, ValueId)]) -> Result<Graph, GraphError> {
        self.graph.set_outputs(outputs)?;
        Ok(self.graph)
    }
}

/// Adds blocks to a graph. Weights are declared on first use, under their name in the checkpoint; errors show the caller's line.
#[derive(Debug)]
pub struct HirMut<'g> {
    graph: &'g mut Graph,
}

/// Weights and sizes of a gated feed-forward block.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedMlp {
    /// Weight of the gate, `[inner, width]`.
    pub gate: String,
    /// Weight of the value, `[inner, width]`.
    pub up: String,
    /// Weight of the result, `[width, inner]`.
    pub down: String,
    /// Elements of a row.
    pub width: usize,
    /// Elements between the two layers.
    pub inner: usize,
    /// Applied to the gate: silu makes it swiglu, gelu geglu.
    pub activation: ActivationKind,
    /// Dtype of the weights.
    pub dtype: DType,
}

/// The operands of attention over a paged cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOperands {
    /// `[batch]` I32.
    pub past: ValueId,
    /// `[batch, table]` I32.
    pub block_table: ValueId,
    /// State `[blocks, kv_heads, head_dim, 64]`.
    pub k_cache: ValueId,
    /// State `[blocks, kv_heads, 64, head_dim]`.
    pub v_cache: ValueId,
}

/// What attention reads besides its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionOperands {
    /// `[rows, heads * head_dim]`
    pub q: ValueId,
    /// `[rows, kv_heads * head_dim]`
    pub k: ValueId,
    /// `[rows, kv_heads * head_dim]`
    pub v: ValueId,
    /// `[batch + 1]` I32.
    pub seq_starts: ValueId,
    /// `[1 or batch, 1 or heads, max_q, max_k]`
    pub mask: Option<ValueId>,
    /// The cache, if there is one.
    pub cache: Option<CacheOperands>,
}

impl<'g> HirMut<'g> {
    /// A builder that adds to an existing graph.
    pub fn new(graph: &'g mut Graph) -> Self {
        Self { graph }
    }

    /// The graph so far.
    pub fn graph(&mut self) -> &mut Graph {
        self.graph
    }

    /// A value's shape.
    pub fn shape(&self, value: ValueId) -> &Shape {
        self.graph.shape(value)
    }

    /// Declares an input.
    #[track_caller]
    pub fn input(&mut self, name: &str, dims: &[Dim], dtype: DType) -> Built {
        self.graph.input(name, Shape::from_dims(dims.to_vec(), dtype))
    }

    /// Declares a state.
    #[track_caller]
    pub fn state(&mut self, name: &str, dims: &[Dim], dtype: DType) -> Built {
        self.graph.state(name, Shape::from_dims(dims.to_vec(), dtype))
    }

    /// A constant.
    pub fn constant(&mut self, tensor: Tensor) -> ValueId {
        self.graph.constant(tensor)
    }

    /// A weight by name. The same name again gives the same value (tied weights); with another shape it is an error.
    #[track_caller]
    pub fn param(&mut self, name: &str, dims: &[usize], dtype: DType) -> Built {
        let shape = Shape::new(dims, dtype);
        let Some(known) = self.graph.by_name(name) else { return self.graph.param(name, shape) };
        let value = self.graph.value(known);
        if matches!(value.source, Source::Param) && value.shape == shape {
            return Ok(known);
        }
        let location = Location::caller().to_string();
        Err(match value.source {
            Source::Param => {
                let reason = format!("{name:?} is declared as {} and as {shape}", value.shape);
                GraphError::Shape { op: "param".into(), reason, location }
            }
            _ => GraphError::DuplicateName { kind: "param", name: name.to_owned(), location },
        })
    }

    /// Any op with one result.
    #[track_caller]
    pub fn op(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> Built {
        self.graph.add_one(op, inputs)
    }

    /// `x W^T + b`: weight `[n, k]`, bias `[n]`.
    #[track_caller]
    pub fn linear(
        &mut self,
        x: ValueId,
        weight: &str,
        (n, k): (usize, usize),
        bias: Option<&str>,
        dtype: DType,
    ) -> Built {
        let mut operands = vec![x, self.param(weight, &[n, k], dtype)?];
        if let Some(bias) = bias {
            operands.push(self.param(bias, &[n], dtype)?);
        }
        self.graph.add_one(Linear { bias: bias.is_some(), ..Linear::plain() }, &operands)
    }

    /// `x W + b` where the checkpoint stores the weight as `[k, n]`.
    #[track_caller]
    pub fn linear_transposed(
        &mut self,
        x: ValueId,
        weight: &str,
        (k, n): (usize, usize),
        bias: Option<&str>,
        dtype: DType,
    ) -> Built {
        let mut operands = vec![x, self.param(weight, &[k, n], dtype)?];
        if let Some(bias) = bias {
            operands.push(self.param(bias, &[n], dtype)?);
        }
        self.graph.add_one(Linear { bias: bias.is_some(), transposed: true, ..Linear::plain() }, &operands)
    }

    /// Layer normalisation over the last dim, of extent `width`.
    #[track_caller]
    pub fn layer_norm(
        &mut self,
        x: ValueId,
        weight: &str,
        bias: Option<&str>,
        width: usize,
        eps: f64,
        dtype: DType,
    ) -> Built {
        let mut operands = vec![x, self.param(weight, &[width], dtype)?];
        if let Some(bias) = bias {
            operands.push(self.param(bias, &[width], dtype)?);
        }
        self.graph.add_one(LayerNorm { eps, bias: bias.is_some(), residual: false }, &operands)
    }

    /// Root-mean-square normalisation with a weight of `width` elements; `op` says the rest.
    #[track_caller]
    pub fn rms_norm(&mut self, op: RmsNorm, x: ValueId, weight: &str, width: usize, dtype: DType) -> Built {
        let weight = self.param(weight, &[width], dtype)?;
        self.graph.add_one(RmsNorm { residual: false, ..op }, &[x, weight])
    }

    /// Rows of a table `[vocab, width]`.
    #[track_caller]
    pub fn embedding(
        &mut self,
        ids: ValueId,
        table: &str,
        vocab: usize,
        width: usize,
        dtype: DType,
    ) -> Built {
        let table = self.param(table, &[vocab, width], dtype)?;
        self.graph.add_one(Embedding {}, &[ids, table])
    }

    /// Cosines and sines for positions `[rows]` I32.
    #[track_caller]
    pub fn rope_angles(&mut self, positions: ValueId, inv_freq: &[f32], scale: f64) -> Built {
        let table = Tensor::from_slice(&[inv_freq.len()], inv_freq).map_err(|e| GraphError::Shape {
            op: "rope_angles".into(),
            reason: e.to_string(),
            location: Location::caller().to_string(),
        })?;
        let table = self.graph.constant(table);
        self.graph.add_one(RopeAngles { scale }, &[positions, table])
    }

    /// Rotates every element of each head.
    #[track_caller]
    pub fn rope(
        &mut self,
        x: ValueId,
        angles: ValueId,
        heads: usize,
        head_dim: usize,
        style: RopeStyle,
    ) -> Built {
        self.graph.add_one(Rope { heads, head_dim, rotary_dim: head_dim, style }, &[x, angles])
    }

    /// Attention; `mask` and `cache` of the op follow from the operands.
    #[track_caller]
    pub fn attention(&mut self, op: Attention, operands: &AttentionOperands) -> Built {
        let AttentionOperands { q, k, v, seq_starts, mask, cache } = *operands;
        let mut inputs = vec![q, k, v, seq_starts];
        inputs.extend(mask);
        if let Some(cache) = cache {
            inputs.extend([cache.past, cache.block_table, cache.k_cache, cache.v_cache]);
        }
        self.graph.add_one(Attention { mask: mask.is_some(), cache: cache.is_some(), ..op }, &inputs)
    }

    /// `down (act(gate x) * up x)`
    #[track_caller]
    pub fn gated_mlp(&mut self, x: ValueId, mlp: &GatedMlp) -> Built {
        let gate = self.linear(x, &mlp.gate, (mlp.inner, mlp.width), None, mlp.dtype)?;
        let up = self.linear(x, &mlp.up, (mlp.inner, mlp.width), None, mlp.dtype)?;
        let inner = self.gated(gate, up, mlp.activation)?;
        self.linear(inner, &mlp.down, (mlp.width, mlp.inner), None, mlp.dtype)
    }

    /// `act(gate) * up`
    #[track_caller]
    pub fn gated(&mut self, gate: ValueId, up: ValueId, activation: ActivationKind) -> Built {
        self.graph.add_one(Gated { activation }, &[gate, up])
    }

    /// A mixture of experts, one [`GatedMlp`] each; its activation is the op's.
    #[track_caller]
    pub fn moe(&mut self, op: Moe, x: ValueId, logits: ValueId, experts: &[GatedMlp]) -> Built {
        let mut operands = vec![x, logits];
        for expert in experts {
            operands.push(self.param(&expert.gate, &[expert.inner, expert.width], expert.dtype)?);
            operands.push(self.param(&expert.up, &[expert.inner, expert.width], expert.dtype)?);
            operands.push(self.param(&expert.down, &[expert.width, expert.inner], expert.dtype)?);
        }
        self.graph.add_one(op, &operands)
    }

    /// One vector for each sequence.
    #[track_caller]
    pub fn pool(&mut self, x: ValueId, seq_starts: ValueId, kind: PoolKind) -> Built {
        self.graph.add_one(Pool { kind }, &[x, seq_starts])
    }

    /// Vectors scaled to length one.
    #[track_caller]
    pub fn l2_normalize(&mut self, x: ValueId, eps: f64) -> Built {
        self.graph.add_one(L2Normalize { eps }, &[x])
    }

    /// Softmax along an axis.
    #[track_caller]
    pub fn softmax(&mut self, x: ValueId, axis: usize) -> Built {
        self.graph.add_one(Softmax { axis }, &[x])
    }

    /// An activation function; the identity adds nothing.
    #[track_caller]
    pub fn activation(&mut self, x: ValueId, kind: ActivationKind) -> Built {
        match kind {
            ActivationKind::Identity => Ok(x),
            _ => self.graph.add_one(Activation { kind }, &[x]),
        }
    }

    /// An elementwise function of one value.
    #[track_caller]
    pub fn unary(&mut self, kind: UnaryOp, x: ValueId) -> Built {
        self.graph.add_one(Unary { kind }, &[x])
    }

    /// An elementwise function of two values.
    #[track_caller]
    pub fn binary(&mut self, kind: BinaryOp, a: ValueId, b: ValueId) -> Built {
        self.graph.add_one(Binary { kind }, &[a, b])
    }

    /// `a + b`
    #[track_caller]
    pub fn add(&mut self, a: ValueId, b: ValueId) -> Built {
        self.binary(BinaryOp::Add, a, b)
    }

    /// `a - b`
    #[track_caller]
    pub fn sub(&mut self, a: ValueId, b: ValueId) -> Built {
        self.binary(BinaryOp::Sub, a, b)
    }

    /// `a * b`
    #[track_caller]
    pub fn mul(&mut self, a: ValueId, b: ValueId) -> Built {
        self.binary(BinaryOp::Mul, a, b)
    }

    /// `a / b`
    #[track_caller]
    pub fn div(&mut self, a: ValueId, b: ValueId) -> Built {
        self.binary(BinaryOp::Div, a, b)
    }

    /// `x * factor`; the factor takes x's dtype.
    #[track_caller]
    pub fn scale(&mut self, x: ValueId, factor: f64) -> Built {
        self.scalar(BinaryOp::Mul, x, factor)
    }

    /// `f(x, number)`; the number takes x's dtype.
    #[track_caller]
    pub fn scalar(&mut self, kind: BinaryOp, x: ValueId, number: f64) -> Built {
        let dtype = self.graph.shape(x).dtype();
        let tensor = crate::eval::from_f64(&[], dtype, &[number]).map_err(|e| GraphError::Shape {
            op: "scalar".into(),
            reason: e.to_string(),
            location: Location::caller().to_string(),
        })?;
        let number = self.graph.constant(tensor);
        self.binary(kind, x, number)
    }

    /// `condition ? a : b`
    #[track_caller]
    pub fn select(&mut self, condition: ValueId, a: ValueId, b: ValueId) -> Built {
        self.graph.add_one(Select {}, &[condition, a, b])
    }

    /// The same elements under other dims.
    #[track_caller]
    pub fn reshape(&mut self, x: ValueId, dims: &[Dim]) -> Built {
        self.graph.add_one(Reshape { dims: dims.to_vec() }, &[x])
    }

    /// Axes in another order.
    #[track_caller]
    pub fn transpose(&mut self, x: ValueId, perm: &[usize]) -> Built {
        self.graph.add_one(Transpose { perm: perm.to_vec() }, &[x])
    }

    /// Elements `start .. start + len` along an axis.
    #[track_caller]
    pub fn slice(&mut self, x: ValueId, axis: usize, start: impl Into<Dim>, len: impl Into<Dim>) -> Built {
        let rank = self.graph.shape(x).rank();
        self.graph.add_one(Slice::range(axis, rank, start, len), &[x])
    }

    /// Values joined along an axis.
    #[track_caller]
    pub fn concat(&mut self, values: &[ValueId], axis: usize) -> Built {
        self.graph.add_one(Concat { axis }, values)
    }

    /// Slices picked by index along an axis.
    #[track_caller]
    pub fn gather(&mut self, x: ValueId, indices: ValueId, axis: usize) -> Built {
        self.graph.add_one(Gather { axis }, &[x, indices])
    }

    /// Elements along axes combined into one.
    #[track_caller]
    pub fn reduce(&mut self, kind: ReduceOp, x: ValueId, axes: &[usize], keep_dims: bool) -> Built {
        self.graph.add_one(Reduce { kind, axes: axes.to_vec(), keep_dims }, &[x])
    }

    /// As another dtype; nothing is added if it has it.
    #[track_caller]
    pub fn cast(&mut self, x: ValueId, to: DType) -> Built {
        if self.graph.shape(x).dtype() == to { Ok(x) } else { self.graph.add_one(Cast { to }, &[x]) }
    }
}

#[cfg(test)]
mod tests;
