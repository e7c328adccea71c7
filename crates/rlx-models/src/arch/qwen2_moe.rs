//! Qwen2-MoE (Yang et al., 2024): qwen2 with experts and a gated expert that all rows share.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{DecoderSizes, FamilyDefaults};
use crate::blocks::experts::SparseLayers;
use crate::blocks::llama::{self, FeedForward, LlamaSpec};
use crate::blocks::rope::Rope;
use crate::error::Result;
use rlx_graph::ops::activation::ActivationKind;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: None, max_positions: 32768, eps: 1e-6, tied: false };
    let sizes = DecoderSizes::read(cfg, defaults)?;
    let feed = FeedForward::read(cfg, sizes.width)?;
    let sparse = SparseLayers::read(cfg, &feed)?;
    let shared_inner = cfg.optional_in("shared_expert_intermediate_size", 1..=1 << 24)?.unwrap_or(5632);
    let shared = FeedForward { inner: shared_inner, ..feed };
    let last_window = cfg.or("max_window_layers", 28)?;
    let spec = LlamaSpec {
        rope: Rope::read(cfg, sizes.rope_defaults())?,
        qkv_bias: cfg.or("qkv_bias", true)?,
        output_bias: false,
        qk_norm: false,
        windows: llama::qwen_windows(cfg, sizes.layers, |layer| layer % 2 == 0 && layer < last_window)?,
        sizes,
    };
    let width = spec.sizes.width;
    llama::build(cx, &spec, |net, layer, x| {
        let at = format!("layers.{layer}.mlp");
        if !sparse.is_sparse(layer) {
            return feed.add(net, &at, x);
        }
        let routed = sparse.experts.add(net, &at, x)?;
        let common = shared.add(net, &format!("{at}.shared_expert"), x)?;
        let gate = net.linear(x, &format!("{at}.shared_expert_gate"), (1, width), false)?;
        let gate = net.activation(gate, ActivationKind::Sigmoid)?;
        let common = net.mul(common, gate)?;
        net.add(routed, common)
    })
}
