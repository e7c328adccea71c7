//! A graph under construction whose weights are looked up, and checked, in a checkpoint.

use crate::arch::Convention;
use crate::error::{ModelError, Result};
use rlx::weights::WeightLoader;
use rlx_graph::ops::activation::{Activation, ActivationKind};
use rlx_graph::ops::binary::{Binary, BinaryOp};
use rlx_graph::ops::embedding::Embedding;
use rlx_graph::ops::gated::Gated;
use rlx_graph::ops::layer_norm::LayerNorm;
use rlx_graph::ops::linear::Linear;
use rlx_graph::ops::rms_norm::RmsNorm;
use rlx_graph::ops::slice::Slice;
use rlx_graph::{Graph, ValueId};
use rlx_tensor::{DType, DTypeClass, Dim, Tensor};
use std::collections::BTreeSet;

/// A graph, the checkpoint its params come from, and the names used so far.
pub struct Net<'a> {
    /// The graph.
    pub graph: Graph,
    weights: &'a dyn WeightLoader,
    prefix: &'static str,
    convention: Convention,
    namespace: String,
    used: BTreeSet<String>,
}

impl<'a> Net<'a> {
    /// An empty graph. The first of `prefixes` under which the checkpoint has `probe` goes before every [`Net::weight`] name:
    /// a model saved without its head, or before a rename, lacks it.
    pub fn new(
        name: &str,
        weights: &'a dyn WeightLoader,
        prefixes: &[&'static str],
        probe: &str,
    ) -> Result<Self> {
        let mut prefix = prefixes.first().copied().unwrap_or("");
        for candidate in prefixes {
            if weights.shape(&format!("{candidate}{probe}"))?.is_some() {
                prefix = candidate;
                break;
            }
        }
        let (convention, namespace) = (Convention::Hub, String::new());
        Ok(Self { graph: Graph::new(name), weights, prefix, convention, namespace, used: BTreeSet::new() })
    }

    /// The same with names of params that begin with a namespace.
    #[must_use]
    pub fn in_namespace(self, namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), ..self }
    }

    /// The same for a checkpoint of other habits.
    #[must_use]
    pub fn with_convention(self, convention: Convention) -> Self {
        Self { convention, ..self }
    }

    /// The checkpoint's tensor of this name (after the prefix) as a param in the checkpoint's dtype.
    pub fn weight(&mut self, name: &str, dims: &[usize]) -> Result<ValueId> {
        self.exact_weight(&format!("{}{name}", self.prefix), dims)
    }

    /// The checkpoint's tensor of this full name. Asked for twice, it is one param.
    pub fn exact_weight(&mut self, name: &str, dims: &[usize]) -> Result<ValueId> {
        let shape = self.weights.shape(name)?;
        let shape = shape
            .ok_or_else(|| ModelError::MissingTensor { name: name.to_owned(), expected: dims.to_vec() })?;
        let found = shape.known_dims().unwrap_or_default();
        if found != dims {
            let expected = dims.to_vec();
            return Err(ModelError::TensorShape { name: name.to_owned(), expected, found });
        }
        let blocks = shape.dtype().class() == DTypeClass::Quant && dims.len() == 2;
        if !blocks && !matches!(shape.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(ModelError::TensorDType { name: name.to_owned(), found: shape.dtype() });
        }
        let param = format!("{}{name}", self.namespace);
        if let Some(value) = self.graph.by_name(&param) {
            return Ok(value);
        }
        self.used.insert(name.to_owned());
        Ok(self.graph.param(&param, shape)?)
    }

    /// True if the checkpoint has this tensor (after the prefix).
    pub fn has(&self, name: &str) -> Result<bool> {
        Ok(self.weights.shape(&format!("{}{name}", self.prefix))?.is_some())
    }

    /// `x W^T + b` with `name.weight [n, k]` and, if `bias`, `name.bias [n]`.
    pub fn linear(&mut self, x: ValueId, name: &str, (n, k): (usize, usize), bias: bool) -> Result<ValueId> {
        let mut operands = vec![x, self.weight(&format!("{name}.weight"), &[n, k])?];
        if bias {
            operands.push(self.weight(&format!("{name}.bias"), &[n])?);
        }
        Ok(self.graph.add_one(Linear { bias, ..Linear::plain() }, &operands)?)
    }

    /// `x W + b` with `name.weight [k, n]` and `name.bias [n]`, as GPT-2 stores them on the hub.
    pub fn transposed_linear(&mut self, x: ValueId, name: &str, (n, k): (usize, usize)) -> Result<ValueId> {
        if self.convention == Convention::Gguf {
            return self.linear(x, name, (n, k), true);
        }
        let weight = self.weight(&format!("{name}.weight"), &[k, n])?;
        let bias = self.weight(&format!("{name}.bias"), &[n])?;
        let op = Linear { bias: true, transposed: true, ..Linear::plain() };
        Ok(self.graph.add_one(op, &[x, weight, bias])?)
    }

    /// Root-mean-square norm of each of `groups` slices of `width`, with `name.weight`.
    pub fn rms_norm(&mut self, x: ValueId, name: &str, norm: RmsNormSpec) -> Result<ValueId> {
        let weight = self.weight(&format!("{name}.weight"), &[norm.width])?;
        let RmsNormSpec { eps, groups, .. } = norm;
        let unit_offset = norm.unit_offset && self.convention == Convention::Hub;
        Ok(self.graph.add_one(RmsNorm { eps, unit_offset, groups, residual: false }, &[x, weight])?)
    }

    /// Layer norm with `name.weight` and `name.bias`, or `gamma` and `beta` as the first BERT files call them.
    pub fn layer_norm(&mut self, x: ValueId, name: &str, width: usize, eps: f64) -> Result<ValueId> {
        let old_names = self.has(&format!("{name}.gamma"))?;
        let [weight, bias] = if old_names { ["gamma", "beta"] } else { ["weight", "bias"] };
        let weight = self.weight(&format!("{name}.{weight}"), &[width])?;
        let bias = self.weight(&format!("{name}.{bias}"), &[width])?;
        Ok(self.graph.add_one(LayerNorm { eps, bias: true, residual: false }, &[x, weight, bias])?)
    }

    /// Rows of `name [vocab, width]` for the ids.
    pub fn embedding(&mut self, ids: ValueId, name: &str, (vocab, width): (usize, usize)) -> Result<ValueId> {
        let table = self.weight(name, &[vocab, width])?;
        Ok(self.graph.add_one(Embedding {}, &[ids, table])?)
    }

    /// `a + b`.
    pub fn add(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        Ok(self.graph.add_one(Binary { kind: BinaryOp::Add }, &[a, b])?)
    }

    /// `a * b`.
    pub fn mul(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        Ok(self.graph.add_one(Binary { kind: BinaryOp::Mul }, &[a, b])?)
    }

    /// `x * factor`.
    pub fn scale(&mut self, x: ValueId, factor: f32) -> Result<ValueId> {
        let factor = self.graph.constant(Tensor::scalar(factor));
        self.mul(x, factor)
    }

    /// `kind(x)`.
    pub fn activation(&mut self, x: ValueId, kind: ActivationKind) -> Result<ValueId> {
        Ok(self.graph.add_one(Activation { kind }, &[x])?)
    }

    /// `cap * tanh(x / cap)`.
    pub fn soft_cap(&mut self, x: ValueId, cap: f64) -> Result<ValueId> {
        let shrunk = self.scale(x, (1.0 / cap) as f32)?;
        let bent = self.activation(shrunk, ActivationKind::Tanh)?;
        self.scale(bent, cap as f32)
    }

    /// `activation(gate) * up`.
    pub fn gated(&mut self, gate: ValueId, up: ValueId, activation: ActivationKind) -> Result<ValueId> {
        Ok(self.graph.add_one(Gated { activation }, &[gate, up])?)
    }

    /// Columns `start .. end` of `x [rows, width]`.
    pub fn columns(&mut self, x: ValueId, start: usize, end: usize) -> Result<ValueId> {
        let op = Slice { axis: None, start: Dim::Known(start), len: Dim::Known(end - start), step: 1 };
        Ok(self.graph.add_one(op, &[x])?)
    }

    /// The graph, and the checkpoint's tensors it does not use, in file order.
    ///
    /// # Errors
    /// [`ModelError::UnusedTensor`] for a bias whose weight is used: the config and the checkpoint disagree.
    pub fn finish(self) -> Result<(Graph, Vec<String>)> {
        let unused: Vec<String> =
            self.weights.names().filter(|name| !self.used.contains(*name)).map(str::to_owned).collect();
        let stray = unused.iter().find(|name| {
            let stem = name.strip_suffix(".bias");
            stem.is_some_and(|stem| self.used.contains(&format!("{stem}.weight")))
        });
        match stray {
            Some(name) => Err(ModelError::UnusedTensor { name: name.clone() }),
            None => Ok((self.graph, unused)),
        }
    }
}

/// What a root-mean-square norm needs to know.
#[derive(Debug, Clone, Copy)]
pub struct RmsNormSpec {
    /// Elements normalised together.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f64,
    /// The factor is `1 + weight`.
    pub unit_offset: bool,
    /// Slices of a row normalised on their own.
    pub groups: usize,
}

impl RmsNormSpec {
    /// A norm over whole rows.
    pub fn whole(width: usize, eps: f64) -> Self {
        Self { width, eps, unit_offset: false, groups: 1 }
    }
}
