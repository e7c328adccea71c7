//! The layer of llama and its relatives: norm, attention, norm, feed-forward, each with a residual.

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{ACTIVATIONS, AttentionSpec, DecoderSizes, Frame};
use crate::blocks::net::{Net, RmsNormSpec};
use crate::blocks::rope::Rope;
use crate::error::Result;
use rlx::import::hf::ConfigReader;
use rlx_graph::ValueId;
use rlx_graph::ops::activation::ActivationKind;

/// Name of the embedding after the prefix.
pub const EMBEDDING: &str = "embed_tokens.weight";
/// What stands before tensor names, if anything does.
pub const PREFIXES: &[&str] = &["model.", ""];

/// What a family of this kind chooses.
#[derive(Debug, Clone)]
pub struct LlamaSpec {
    /// Sizes.
    pub sizes: DecoderSizes,
    /// Rotary frequencies.
    pub rope: Rope,
    /// Queries, keys and values have biases.
    pub qkv_bias: bool,
    /// The attention's output has a bias.
    pub output_bias: bool,
    /// Queries and keys are normed per head.
    pub qk_norm: bool,
    /// Window of each layer.
    pub windows: Vec<Option<usize>>,
}

/// Builds the model; `feed_forward` adds a layer's feed-forward to normed rows.
pub fn build(
    cx: &BuildCx<'_>,
    spec: &LlamaSpec,
    mut feed_forward: impl FnMut(&mut Net<'_>, usize, ValueId) -> Result<ValueId>,
) -> Result<Built> {
    let sizes = &spec.sizes;
    let mut frame = Frame::begin(cx, &cx.model_type, (sizes, &spec.windows), PREFIXES, EMBEDDING)?;
    let mut x = frame.net.embedding(frame.ids, EMBEDDING, (sizes.vocab, sizes.width))?;
    let angles = frame.angles(&spec.rope)?;
    for layer in 0..sizes.layers {
        let normed = frame.net.rms_norm(x, &format!("layers.{layer}.input_layernorm"), sizes.norm())?;
        let attended = attention(&mut frame, spec, layer, normed, angles)?;
        x = frame.net.add(x, attended)?;
        let normed =
            frame.net.rms_norm(x, &format!("layers.{layer}.post_attention_layernorm"), sizes.norm())?;
        let fed = feed_forward(&mut frame.net, layer, normed)?;
        x = frame.net.add(x, fed)?;
    }
    let x = frame.wanted_rows(x)?;
    let x = frame.net.rms_norm(x, "norm", sizes.norm())?;
    frame.finish(cx, x, sizes, EMBEDDING, None)
}

fn attention(
    frame: &mut Frame<'_>,
    spec: &LlamaSpec,
    layer: usize,
    x: ValueId,
    angles: ValueId,
) -> Result<ValueId> {
    let sizes = &spec.sizes;
    let at = format!("layers.{layer}.self_attn");
    let [mut q, mut k, v] = projections(&mut frame.net, &at, x, sizes, spec.qkv_bias)?;
    if spec.qk_norm {
        let norm = |groups| RmsNormSpec { width: sizes.head_dim, eps: sizes.eps, unit_offset: false, groups };
        q = frame.net.rms_norm(q, &format!("{at}.q_norm"), norm(sizes.heads))?;
        k = frame.net.rms_norm(k, &format!("{at}.k_norm"), norm(sizes.kv_heads))?;
    }
    let q = frame.rotate(q, angles, sizes.heads, sizes)?;
    let k = frame.rotate(k, angles, sizes.kv_heads, sizes)?;
    let scale = 1.0 / (sizes.head_dim as f64).sqrt();
    let attention = AttentionSpec { scale, softcap: None };
    let attended = frame.attend(layer, [q, k, v], sizes, attention)?;
    let (n, k) = (sizes.width, sizes.heads * sizes.head_dim);
    frame.net.linear(attended, &format!("{at}.o_proj"), (n, k), spec.output_bias)
}

/// Queries, keys and values from `q_proj`, `k_proj` and `v_proj`.
pub fn projections(
    net: &mut Net<'_>,
    at: &str,
    x: ValueId,
    sizes: &DecoderSizes,
    bias: bool,
) -> Result<[ValueId; 3]> {
    let (q, kv) = (sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim);
    Ok([
        net.linear(x, &format!("{at}.q_proj"), (q, sizes.width), bias)?,
        net.linear(x, &format!("{at}.k_proj"), (kv, sizes.width), bias)?,
        net.linear(x, &format!("{at}.v_proj"), (kv, sizes.width), bias)?,
    ])
}

/// A gated feed-forward: `down(activation(gate(x)) * up(x))`.
#[derive(Debug, Clone, Copy)]
pub struct FeedForward {
    /// Elements of a row.
    pub width: usize,
    /// Elements between.
    pub inner: usize,
    /// Applied to the gate.
    pub activation: ActivationKind,
    /// All three linears have biases.
    pub bias: bool,
}

impl FeedForward {
    /// Reads `intermediate_size` and `hidden_act`.
    pub fn read(cfg: &ConfigReader, width: usize) -> Result<Self> {
        let inner = cfg.required_in("intermediate_size", 1..=1 << 24)?;
        let activation = cfg.choice("hidden_act", ACTIVATIONS, Some(ActivationKind::Silu))?;
        Ok(Self { width, inner, activation, bias: false })
    }

    /// Adds it under `at.gate_proj`, `at.up_proj` and `at.down_proj`.
    pub fn add(&self, net: &mut Net<'_>, at: &str, x: ValueId) -> Result<ValueId> {
        let gate = net.linear(x, &format!("{at}.gate_proj"), (self.inner, self.width), self.bias)?;
        let up = net.linear(x, &format!("{at}.up_proj"), (self.inner, self.width), self.bias)?;
        let inner = net.gated(gate, up, self.activation)?;
        net.linear(inner, &format!("{at}.down_proj"), (self.width, self.inner), self.bias)
    }
}

/// Windows of qwen: `layer_types` if given, else `by_default(layer)` says which layers slide.
pub fn qwen_windows(
    cfg: &ConfigReader,
    layers: usize,
    by_default: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    let slides = cfg.or("use_sliding_window", false)?;
    let window = window_or(cfg, Some(4096))?.filter(|_| slides);
    layer_windows(cfg, layers, window, by_default)
}

/// Windows by `layer_types`, else by `by_default(layer)`.
pub fn layer_windows(
    cfg: &ConfigReader,
    layers: usize,
    window: Option<usize>,
    by_default: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    let kinds = cfg.optional::<Vec<String>>("layer_types")?;
    let Some(kinds) = kinds else {
        return Ok((0..layers).map(|layer| window.filter(|_| by_default(layer))).collect());
    };
    let expected = format!("{layers} of \"full_attention\" and \"sliding_attention\", and a sliding_window");
    let wrong = |found: String| cfg.wrong("layer_types", expected.clone(), found);
    if kinds.len() != layers {
        return Err(wrong(format!("{} entries", kinds.len())).into());
    }
    let of = |kind: &String| match (kind.as_str(), window) {
        ("full_attention", _) => Ok(None),
        ("sliding_attention", Some(window)) => Ok(Some(window)),
        ("sliding_attention", None) => Err(wrong("sliding_attention without a window".into()).into()),
        _ => Err(wrong(format!("\"{kind}\"")).into()),
    };
    kinds.iter().map(of).collect()
}

/// The one window of all layers: `sliding_window` as written (`null` and 0 are none), or the family's default where it is not.
pub fn window_or(cfg: &ConfigReader, default: Option<usize>) -> Result<Option<usize>> {
    let written = cfg.field_names().any(|name| name == "sliding_window");
    let window = cfg.optional_in("sliding_window", 0..=1 << 30)?;
    Ok(if written { window.filter(|&positions| positions > 0) } else { default })
}
