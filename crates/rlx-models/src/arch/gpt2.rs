//! GPT-2 (Radford et al., 2019).

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{ACTIVATIONS, AttentionSpec, DecoderSizes, Frame, ignore_irrelevant};
use crate::error::Result;
use rlx_graph::ValueId;
use rlx_graph::ops::activation::ActivationKind;

const EMBEDDING: &str = "wte.weight";

struct Gpt2 {
    sizes: DecoderSizes,
    inner: usize,
    activation: ActivationKind,
    scaled: bool,
    scaled_by_layer: bool,
}

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let model = read(cx)?;
    let sizes = &model.sizes;
    let windows = vec![None; sizes.layers];
    let mut frame = Frame::begin(cx, &cx.model_type, (sizes, &windows), &["transformer.", ""], EMBEDDING)?;
    let words = frame.net.embedding(frame.ids, EMBEDDING, (sizes.vocab, sizes.width))?;
    let places = frame.net.embedding(frame.positions, "wpe.weight", (sizes.max_positions, sizes.width))?;
    let mut x = frame.net.add(words, places)?;
    for layer in 0..sizes.layers {
        x = add_layer(&mut frame, &model, layer, x)?;
    }
    let x = frame.wanted_rows(x)?;
    let x = frame.net.layer_norm(x, "ln_f", sizes.width, sizes.eps)?;
    frame.finish(cx, x, sizes, EMBEDDING, None)
}

fn read(cx: &BuildCx<'_>) -> Result<Gpt2> {
    let cfg = cx.cfg;
    ignore_irrelevant(cfg)?;
    cfg.ignore(&["attn_pdrop", "embd_pdrop", "n_ctx", "reorder_and_upcast_attn", "resid_pdrop"]);
    cfg.ignore(&["summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"]);
    cfg.ignore(&["summary_use_proj"]);
    let width = cfg.required_in("n_embd", 1..=1 << 20)?;
    let heads = cfg.required_in("n_head", 1..=1 << 16)?;
    if width % heads != 0 {
        return Err(cfg.wrong("n_embd", format!("a multiple of n_head ({heads})"), width.to_string()).into());
    }
    let sizes = DecoderSizes {
        vocab: cfg.required_in("vocab_size", 1..=1 << 28)?,
        width,
        layers: cfg.required_in("n_layer", 1..=4096)?,
        heads,
        kv_heads: heads,
        head_dim: width / heads,
        max_positions: cfg.optional_in("n_positions", 1..=1 << 24)?.unwrap_or(1024),
        eps: cfg.optional_in("layer_norm_epsilon", 0.0..=1.0)?.unwrap_or(1e-5),
        tied: cfg.or("tie_word_embeddings", true)?,
    };
    Ok(Gpt2 {
        sizes,
        inner: cfg.optional_in("n_inner", 1..=1 << 24)?.unwrap_or(4 * width),
        activation: cfg.choice("activation_function", ACTIVATIONS, Some(ActivationKind::GeluTanh))?,
        scaled: cfg.or("scale_attn_weights", true)?,
        scaled_by_layer: cfg.or("scale_attn_by_inverse_layer_idx", false)?,
    })
}

fn add_layer(frame: &mut Frame<'_>, model: &Gpt2, layer: usize, x: ValueId) -> Result<ValueId> {
    let (sizes, width) = (&model.sizes, model.sizes.width);
    let at = |name: &str| format!("h.{layer}.{name}");
    let normed = frame.net.layer_norm(x, &at("ln_1"), width, sizes.eps)?;
    let qkv = frame.net.transposed_linear(normed, &at("attn.c_attn"), (3 * width, width))?;
    let q = frame.net.columns(qkv, 0, width)?;
    let k = frame.net.columns(qkv, width, 2 * width)?;
    let v = frame.net.columns(qkv, 2 * width, 3 * width)?;
    let by_width = if model.scaled { 1.0 / (sizes.head_dim as f64).sqrt() } else { 1.0 };
    let by_layer = if model.scaled_by_layer { (layer + 1) as f64 } else { 1.0 };
    let attention = AttentionSpec { scale: by_width / by_layer, softcap: None };
    let attended = frame.attend(layer, [q, k, v], sizes, attention)?;
    let attended = frame.net.transposed_linear(attended, &at("attn.c_proj"), (width, width))?;
    let x = frame.net.add(x, attended)?;
    let normed = frame.net.layer_norm(x, &at("ln_2"), width, sizes.eps)?;
    let inner = frame.net.transposed_linear(normed, &at("mlp.c_fc"), (model.inner, width))?;
    let inner = frame.net.activation(inner, model.activation)?;
    let fed = frame.net.transposed_linear(inner, &at("mlp.c_proj"), (width, model.inner))?;
    frame.net.add(x, fed)
}
