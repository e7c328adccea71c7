//! Gemma 2 (Riviere et al., 2024): a window on every other layer, caps on scores and logits.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{DecoderSizes, FamilyDefaults};
use crate::blocks::gemma::{self, GemmaSpec};
use crate::blocks::llama::{layer_windows, window_or};
use crate::blocks::rope::Rope;
use crate::error::Result;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: Some(256), max_positions: 8192, eps: 1e-6, tied: true };
    let sizes = DecoderSizes::read(cfg, defaults)?;
    cfg.must_be("use_bidirectional_attention", false)?;
    let rope = Rope::read(cfg, sizes.rope_defaults())?;
    let window = window_or(cfg, Some(4096))?;
    let spec = GemmaSpec {
        ropes: [rope.clone(), rope],
        windows: layer_windows(cfg, sizes.layers, window, |layer| layer % 2 == 0)?,
        qk_norm: false,
        bias: cfg.or("attention_bias", false)?,
        query_scalar: cfg.optional_in("query_pre_attn_scalar", 1e-6..=1e9)?.unwrap_or(256.0),
        attention_cap: gemma::cap(cfg, "attn_logit_softcapping", Some(50.0))?,
        logit_cap: gemma::cap(cfg, "final_logit_softcapping", Some(30.0))?,
        feed: gemma::read_feed(cfg, sizes.width)?,
        sizes,
    };
    gemma::build(cx, &spec)
}
