//! Llama (Touvron et al., 2023; Grattafiori et al., 2024).

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{DecoderSizes, FamilyDefaults};
use crate::blocks::llama::{self, FeedForward, LlamaSpec};
use crate::blocks::rope::Rope;
use crate::error::Result;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: None, max_positions: 2048, eps: 1e-6, tied: false };
    let sizes = DecoderSizes::read(cfg, defaults)?;
    let bias = cfg.or("attention_bias", false)?;
    let feed = FeedForward { bias: cfg.or("mlp_bias", false)?, ..FeedForward::read(cfg, sizes.width)? };
    let spec = LlamaSpec {
        rope: Rope::read(cfg, sizes.rope_defaults())?,
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: false,
        windows: vec![None; sizes.layers],
        sizes,
    };
    llama::build(cx, &spec, |net, layer, x| feed.add(net, &format!("layers.{layer}.mlp"), x))
}
