//! Mistral (Jiang et al., 2023): llama with a window on every layer.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{DecoderSizes, FamilyDefaults};
use crate::blocks::llama::{self, FeedForward, LlamaSpec};
use crate::blocks::rope::Rope;
use crate::error::Result;

const WINDOW: usize = 4096;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: None, max_positions: 4096 * 32, eps: 1e-6, tied: false };
    let sizes = DecoderSizes::read(cfg, defaults)?;
    let feed = FeedForward::read(cfg, sizes.width)?;
    let spec = LlamaSpec {
        rope: Rope::read(cfg, sizes.rope_defaults())?,
        qkv_bias: false,
        output_bias: false,
        qk_norm: false,
        windows: vec![llama::window_or(cfg, Some(WINDOW))?; sizes.layers],
        sizes,
    };
    llama::build(cx, &spec, |net, layer, x| feed.add(net, &format!("layers.{layer}.mlp"), x))
}
