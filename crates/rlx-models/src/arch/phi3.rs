//! Phi-3 (Abdin et al., 2024): llama with fused projections, part of each head rotated, LongRoPE.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{AttentionSpec, DecoderSizes, FamilyDefaults, Frame};
use crate::blocks::llama::{self, EMBEDDING, FeedForward, PREFIXES};
use crate::blocks::rope::{Rope, RopeDefaults};
use crate::error::Result;
use rlx_graph::ValueId;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    let defaults = FamilyDefaults { head_dim: None, max_positions: 4096, eps: 1e-5, tied: false };
    let sizes = &DecoderSizes::read(cfg, defaults)?;
    cfg.ignore(&["embd_pdrop", "resid_pdrop"]);
    for absent in ["attention_bias", "lm_head_bias", "mlp_bias"] {
        cfg.must_be(absent, false)?;
    }
    for off in ["full_attn_mod", "interpolate_factor"] {
        cfg.must_be(off, 1usize)?;
    }
    let feed = FeedForward::read(cfg, sizes.width)?;
    let aliases = &["su", "yarn"];
    let rope = Rope::read(cfg, RopeDefaults { longrope_aliases: aliases, ..sizes.rope_defaults() })?;
    let window = llama::window_or(cfg, None)?;
    let windows = vec![window; sizes.layers];
    let mut frame = Frame::begin(cx, &cx.model_type, (sizes, &windows), PREFIXES, EMBEDDING)?;
    let mut x = frame.net.embedding(frame.ids, EMBEDDING, (sizes.vocab, sizes.width))?;
    let angles = frame.angles(&rope)?;
    for layer in 0..sizes.layers {
        let normed = frame.net.rms_norm(x, &format!("layers.{layer}.input_layernorm"), sizes.norm())?;
        let attended = attention(&mut frame, sizes, layer, normed, angles)?;
        x = frame.net.add(x, attended)?;
        let normed =
            frame.net.rms_norm(x, &format!("layers.{layer}.post_attention_layernorm"), sizes.norm())?;
        let fed = feed_forward(&mut frame, &feed, layer, normed)?;
        x = frame.net.add(x, fed)?;
    }
    let x = frame.wanted_rows(x)?;
    let x = frame.net.rms_norm(x, "norm", sizes.norm())?;
    frame.finish(cx, x, sizes, EMBEDDING, None)
}

fn attention(
    frame: &mut Frame<'_>,
    sizes: &DecoderSizes,
    layer: usize,
    x: ValueId,
    angles: ValueId,
) -> Result<ValueId> {
    let at = format!("layers.{layer}.self_attn");
    let (q_width, kv_width) = (sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim);
    let all = q_width + 2 * kv_width;
    let qkv = frame.net.linear(x, &format!("{at}.qkv_proj"), (all, sizes.width), false)?;
    let q = frame.net.columns(qkv, 0, q_width)?;
    let k = frame.net.columns(qkv, q_width, q_width + kv_width)?;
    let v = frame.net.columns(qkv, q_width + kv_width, all)?;
    let q = frame.rotate(q, angles, sizes.heads, sizes)?;
    let k = frame.rotate(k, angles, sizes.kv_heads, sizes)?;
    let scale = 1.0 / (sizes.head_dim as f64).sqrt();
    let attended = frame.attend(layer, [q, k, v], sizes, AttentionSpec { scale, softcap: None })?;
    frame.net.linear(attended, &format!("{at}.o_proj"), (sizes.width, q_width), false)
}

fn feed_forward(frame: &mut Frame<'_>, feed: &FeedForward, layer: usize, x: ValueId) -> Result<ValueId> {
    let at = format!("layers.{layer}.mlp");
    let both = frame.net.linear(x, &format!("{at}.gate_up_proj"), (2 * feed.inner, feed.width), false)?;
    let gate = frame.net.columns(both, 0, feed.inner)?;
    let up = frame.net.columns(both, feed.inner, 2 * feed.inner)?;
    let inner = frame.net.gated(gate, up, feed.activation)?;
    frame.net.linear(inner, &format!("{at}.down_proj"), (feed.width, feed.inner), false)
}
