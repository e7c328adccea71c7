//! Mixtral (Jiang et al., 2024): mistral with experts.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{DecoderSizes, FamilyDefaults};
use crate::blocks::experts::Experts;
use crate::blocks::llama::{self, FeedForward, LlamaSpec};
use crate::blocks::rope::Rope;
use crate::error::Result;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: None, max_positions: 4096 * 32, eps: 1e-5, tied: false };
    let sizes = DecoderSizes::read(cfg, defaults)?;
    // Noise of the router is for training only.
    cfg.ignore(&["router_jitter_noise"]);
    let feed = FeedForward::read(cfg, sizes.width)?;
    let count = cfg.optional_in("num_local_experts", 1..=1 << 16)?.unwrap_or(8);
    let experts = Experts {
        width: sizes.width,
        inner: feed.inner,
        count,
        top_k: cfg.optional_in("num_experts_per_tok", 1..=count)?.unwrap_or(2),
        renormalize: true,
        activation: feed.activation,
        names: ["w1", "w3", "w2"],
    };
    let spec = LlamaSpec {
        rope: Rope::read(cfg, sizes.rope_defaults())?,
        qkv_bias: false,
        output_bias: false,
        qk_norm: false,
        windows: vec![llama::window_or(cfg, None)?; sizes.layers],
        sizes,
    };
    llama::build(cx, &spec, |net, layer, x| experts.add(net, &format!("layers.{layer}.block_sparse_moe"), x))
}
