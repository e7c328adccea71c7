//! Mixture of experts: a router, experts with gated feed-forwards.

use crate::blocks::llama::FeedForward;
use crate::blocks::net::Net;
use crate::error::Result;
use rlx::import::hf::ConfigReader;
use rlx_graph::ValueId;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::moe::Moe;

/// A layer's experts.
#[derive(Debug, Clone, Copy)]
pub struct Experts {
    /// Elements of a row.
    pub width: usize,
    /// Elements between.
    pub inner: usize,
    /// Number of experts.
    pub count: usize,
    /// Experts a row goes through.
    pub top_k: usize,
    /// Weights of the chosen experts are scaled to sum to one.
    pub renormalize: bool,
    /// Applied to the gate.
    pub activation: ActivationKind,
    /// Names of gate, up and down within an expert.
    pub names: [&'static str; 3],
}

impl Experts {
    /// Adds the router `at.gate` and the experts `at.experts.<i>`.
    pub fn add(&self, net: &mut Net<'_>, at: &str, x: ValueId) -> Result<ValueId> {
        let router = net.linear(x, &format!("{at}.gate"), (self.count, self.width), false)?;
        let mut operands = vec![x, router];
        for expert in 0..self.count {
            let shapes = [[self.inner, self.width], [self.inner, self.width], [self.width, self.inner]];
            for (name, dims) in self.names.iter().zip(shapes) {
                operands.push(net.weight(&format!("{at}.experts.{expert}.{name}.weight"), &dims)?);
            }
        }
        let op = Moe {
            experts: self.count,
            top_k: self.top_k,
            renormalize: self.renormalize,
            activation: self.activation,
        };
        Ok(net.graph.add_one(op, &operands)?)
    }
}

/// Which layers of a qwen model have experts, and which.
#[derive(Debug, Clone)]
pub struct SparseLayers {
    /// The experts.
    pub experts: Experts,
    step: usize,
    dense: Vec<usize>,
}

impl SparseLayers {
    /// Reads the fields of Qwen2-MoE and Qwen3-MoE; `feed` is the feed-forward of layers without experts.
    pub fn read(cfg: &ConfigReader, feed: &FeedForward) -> Result<Self> {
        // transformers 5 writes the second name for the first.
        let renamed = cfg.optional_in("num_local_experts", 0..=1 << 16)?;
        let count = match (cfg.optional_in("num_experts", 0..=1 << 16)?, renamed) {
            (Some(count), None) | (None, Some(count)) => count,
            (Some(count), Some(renamed)) if count == renamed => count,
            (Some(_), Some(renamed)) => {
                let found = renamed.to_string();
                return Err(cfg.wrong("num_local_experts", "the same as num_experts", found).into());
            }
            (None, None) => cfg.required_in("num_experts", 0..=1 << 16)?,
        };
        let experts = Experts {
            width: feed.width,
            inner: cfg.required_in("moe_intermediate_size", 1..=1 << 24)?,
            count,
            top_k: cfg.required_in("num_experts_per_tok", 1..=count.max(1))?,
            renormalize: cfg.or("norm_topk_prob", false)?,
            activation: feed.activation,
            names: ["gate_proj", "up_proj", "down_proj"],
        };
        let step = cfg.optional_in("decoder_sparse_step", 1..=1 << 16)?.unwrap_or(1);
        Ok(Self { experts, step, dense: cfg.or("mlp_only_layers", Vec::new())? })
    }

    /// True if the layer has experts.
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.experts.count > 0 && !self.dense.contains(&layer) && (layer + 1).is_multiple_of(self.step)
    }
}
