//! The layer of Gemma 2 and 3: a norm before and after each part, `1 + weight` norms, a scaled embedding.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{ACTIVATIONS, AttentionSpec, DecoderSizes, Frame};
use crate::blocks::llama::{EMBEDDING, FeedForward, PREFIXES, projections};
use crate::blocks::net::RmsNormSpec;
use crate::blocks::rope::Rope;
use crate::error::{ModelError, Result};
use rlx::import::hf::ConfigReader;
use rlx_graph::ValueId;
use rlx_graph::ops::activation::ActivationKind;

/// What the two versions choose.
#[derive(Debug, Clone)]
pub struct GemmaSpec {
    /// Sizes.
    pub sizes: DecoderSizes,
    /// Frequencies of layers without a window, and of those with one.
    pub ropes: [Rope; 2],
    /// Window of each layer.
    pub windows: Vec<Option<usize>>,
    /// Queries and keys are normed per head.
    pub qk_norm: bool,
    /// Projections have biases.
    pub bias: bool,
    /// Scores are divided by the root of this.
    pub query_scalar: f64,
    /// Cap of scores.
    pub attention_cap: Option<f64>,
    /// Cap of logits.
    pub logit_cap: Option<f64>,
    /// The feed-forward.
    pub feed: FeedForward,
}

/// The feed-forward of a Gemma config; older files say `hidden_act` beside `hidden_activation`, and the latter counts.
pub fn read_feed(cfg: &ConfigReader, width: usize) -> Result<FeedForward> {
    cfg.ignore(&["hidden_act"]);
    let activation = cfg.choice("hidden_activation", ACTIVATIONS, Some(ActivationKind::GeluTanh))?;
    let inner = cfg.required_in("intermediate_size", 1..=1 << 24)?;
    Ok(FeedForward { width, inner, activation, bias: false })
}

/// Builds the model.
pub fn build(cx: &BuildCx<'_>, spec: &GemmaSpec) -> Result<Built> {
    let sizes = &spec.sizes;
    let norm = RmsNormSpec { unit_offset: true, ..sizes.norm() };
    let mut frame = Frame::begin(cx, &cx.model_type, (sizes, &spec.windows), PREFIXES, EMBEDDING)?;
    let x = frame.net.embedding(frame.ids, EMBEDDING, (sizes.vocab, sizes.width))?;
    let mut x = frame.net.scale(x, (sizes.width as f64).sqrt() as f32)?;
    let angles = all_angles(&mut frame, cx, spec)?;
    for layer in 0..sizes.layers {
        let at = |name: &str| format!("layers.{layer}.{name}");
        let normed = frame.net.rms_norm(x, &at("input_layernorm"), norm)?;
        let attended =
            attention(&mut frame, spec, layer, normed, angles[usize::from(spec.windows[layer].is_some())])?;
        let attended = frame.net.rms_norm(attended, &at("post_attention_layernorm"), norm)?;
        x = frame.net.add(x, attended)?;
        let normed = frame.net.rms_norm(x, &at("pre_feedforward_layernorm"), norm)?;
        let fed = spec.feed.add(&mut frame.net, &at("mlp"), normed)?;
        let fed = frame.net.rms_norm(fed, &at("post_feedforward_layernorm"), norm)?;
        x = frame.net.add(x, fed)?;
    }
    let x = frame.wanted_rows(x)?;
    let x = frame.net.rms_norm(x, "norm", norm)?;
    frame.finish(cx, x, sizes, EMBEDDING, spec.logit_cap)
}

fn all_angles(frame: &mut Frame<'_>, cx: &BuildCx<'_>, spec: &GemmaSpec) -> Result<[ValueId; 2]> {
    let [global, local] = &spec.ropes;
    if global == local {
        let both = frame.angles(global)?;
        return Ok([both, both]);
    }
    if global.fixed().is_none() || local.fixed().is_none() {
        let expected = "frequencies that do not depend on the length (this family has two sets)";
        let error = cx.cfg.wrong("rope_parameters", expected, "a scaling that does");
        return Err(ModelError::Import(error));
    }
    Ok([frame.angles(global)?, frame.angles(local)?])
}

fn attention(
    frame: &mut Frame<'_>,
    spec: &GemmaSpec,
    layer: usize,
    x: ValueId,
    angles: ValueId,
) -> Result<ValueId> {
    let sizes = &spec.sizes;
    let at = format!("layers.{layer}.self_attn");
    let [mut q, mut k, v] = projections(&mut frame.net, &at, x, sizes, spec.bias)?;
    if spec.qk_norm {
        let norm = |groups| RmsNormSpec { width: sizes.head_dim, eps: sizes.eps, unit_offset: true, groups };
        q = frame.net.rms_norm(q, &format!("{at}.q_norm"), norm(sizes.heads))?;
        k = frame.net.rms_norm(k, &format!("{at}.k_norm"), norm(sizes.kv_heads))?;
    }
    let q = frame.rotate(q, angles, sizes.heads, sizes)?;
    let k = frame.rotate(k, angles, sizes.kv_heads, sizes)?;
    let attention = AttentionSpec { scale: 1.0 / spec.query_scalar.sqrt(), softcap: spec.attention_cap };
    let attended = frame.attend(layer, [q, k, v], sizes, attention)?;
    let (n, k) = (sizes.width, sizes.heads * sizes.head_dim);
    frame.net.linear(attended, &format!("{at}.o_proj"), (n, k), spec.bias)
}

/// A cap as written (`null` is none), or the family's default where it is not.
pub fn cap(cfg: &ConfigReader, field: &str, default: Option<f64>) -> Result<Option<f64>> {
    let written = cfg.field_names().any(|name| name == field);
    let cap = cfg.optional_in(field, 1e-6..=1e9)?;
    Ok(if written { cap } else { default })
}
