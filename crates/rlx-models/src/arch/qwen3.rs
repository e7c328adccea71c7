//! Qwen3 (Yang et al., 2025): llama with norms on queries and keys.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{DecoderSizes, FamilyDefaults};
use crate::blocks::llama::{self, FeedForward, LlamaSpec};
use crate::blocks::rope::Rope;
use crate::error::Result;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: Some(128), max_positions: 32768, eps: 1e-6, tied: false };
    let sizes = DecoderSizes::read(cfg, defaults)?;
    let feed = FeedForward::read(cfg, sizes.width)?;
    let bias = cfg.or("attention_bias", false)?;
    let first_window = cfg.or("max_window_layers", 28)?;
    let spec = LlamaSpec {
        rope: Rope::read(cfg, sizes.rope_defaults())?,
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: true,
        windows: llama::qwen_windows(cfg, sizes.layers, |layer| layer >= first_window)?,
        sizes,
    };
    llama::build(cx, &spec, |net, layer, x| feed.add(net, &format!("layers.{layer}.mlp"), x))
}
