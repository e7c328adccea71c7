//! Qwen3-MoE (Yang et al., 2025): qwen3 with experts.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{DecoderSizes, FamilyDefaults};
use crate::blocks::experts::SparseLayers;
use crate::blocks::llama::{self, FeedForward, LlamaSpec};
use crate::blocks::rope::Rope;
use crate::error::Result;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: None, max_positions: 32768, eps: 1e-6, tied: false };
    let sizes = DecoderSizes::read(cfg, defaults)?;
    // This family has one window for all layers or none, whatever these say.
    cfg.ignore(&["max_window_layers"]);
    let feed = FeedForward::read(cfg, sizes.width)?;
    let sparse = SparseLayers::read(cfg, &feed)?;
    let bias = cfg.or("attention_bias", false)?;
    let slides = cfg.or("use_sliding_window", false)?;
    let window = llama::window_or(cfg, Some(4096))?.filter(|_| slides);
    let spec = LlamaSpec {
        rope: Rope::read(cfg, sizes.rope_defaults())?,
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: true,
        windows: vec![window; sizes.layers],
        sizes,
    };
    llama::build(cx, &spec, |net, layer, x| {
        let at = format!("layers.{layer}.mlp");
        if sparse.is_sparse(layer) { sparse.experts.add(net, &at, x) } else { feed.add(net, &at, x) }
    })
}
