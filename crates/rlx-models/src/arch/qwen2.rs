//! Qwen2 and Qwen2.5 (Yang et al., 2024): llama with biases on queries, keys and values.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{DecoderSizes, FamilyDefaults};
use crate::blocks::llama::{self, FeedForward, LlamaSpec};
use crate::blocks::rope::Rope;
use crate::error::Result;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: None, max_positions: 32768, eps: 1e-6, tied: false };
    let sizes = DecoderSizes::read(cfg, defaults)?;
    let feed = FeedForward::read(cfg, sizes.width)?;
    let first_window = cfg.or("max_window_layers", 28)?;
    let spec = LlamaSpec {
        rope: Rope::read(cfg, sizes.rope_defaults())?,
        qkv_bias: true,
        output_bias: false,
        qk_norm: false,
        windows: llama::qwen_windows(cfg, sizes.layers, |layer| layer >= first_window)?,
        sizes,
    };
    llama::build(cx, &spec, |net, layer, x| feed.add(net, &format!("layers.{layer}.mlp"), x))
}
