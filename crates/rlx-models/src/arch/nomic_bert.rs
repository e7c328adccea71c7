//! Nomic BERT (Nussbaum et al., 2024): BERT with rotary positions, gated feed-forwards, one projection for query, key and value.

use crate::arch::{BuildCx, Built, Encoder, EncoderInfo};
use crate::blocks::decoder::ignore_irrelevant;
use crate::blocks::net::Net;
use crate::blocks::pooling;
use crate::blocks::rope::Rope;
use crate::error::Result;
use rlx_graph::ValueId;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::attention::Attention;
use rlx_graph::ops::embedding::Embedding;
use rlx_graph::ops::rope::{Rope as RopeOp, RopeStyle};
use rlx_graph::ops::rope_angles::RopeAngles;
use rlx_tensor::{DType, Dim, Shape, Tensor};

const WORDS: &str = "embeddings.word_embeddings.weight";

struct Spec {
    vocab: usize,
    width: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    positions: usize,
    token_types: usize,
    eps: f64,
    rope: Rope,
}

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let spec = read(cx)?;
    let mut net = Net::new(&cx.model_type, cx.weights, &["bert.", ""], WORDS)?;
    let mut input = |name: &str, dim: Dim| net.graph.input(name, Shape::from_dims(vec![dim], DType::I32));
    let ids = input("input_ids", Dim::symbol("rows"))?;
    let positions = input("positions", Dim::symbol("rows"))?;
    let seq_starts = input("seq_starts", Dim::symbol("batch") + Dim::Known(1))?;
    let frequencies = spec.rope.frequencies(0);
    let frequencies = net.graph.constant(Tensor::from_slice(&[frequencies.len()], &frequencies)?);
    let angles = net.graph.add_one(RopeAngles { scale: 1.0 }, &[positions, frequencies])?;
    let mut x = embeddings(&mut net, cx, &spec, ids)?;
    for layer in 0..spec.layers {
        x = encoder_layer(&mut net, &spec, layer, x, angles, seq_starts)?;
    }
    let (embedding, embedding_dim) = pooling::add(&mut net, cx, x, seq_starts, spec.width)?;
    net.graph.set_outputs(&[("last_hidden_state", x), ("embedding", embedding)])?;
    let asked = cx.sentence.and_then(|s| s.max_seq_length).unwrap_or(spec.positions);
    let info = EncoderInfo {
        model_type: cx.model_type.clone(),
        vocab: spec.vocab,
        width: spec.width,
        embedding_dim,
        first_position: 0,
        max_tokens: asked.min(spec.positions),
        pooling_assumed: cx.sentence.is_none(),
    };
    let (graph, unused) = net.finish()?;
    Ok(Built::Encoder(Encoder { graph, info, unused }))
}

fn read(cx: &BuildCx<'_>) -> Result<Spec> {
    let cfg = cx.cfg;
    ignore_irrelevant(cfg)?;
    cfg.ignore(&["attn_pdrop", "embd_pdrop", "resid_pdrop", "pad_vocab_size_multiple", "use_flash_attn"]);
    cfg.ignore(&["fused_bias_fc", "fused_dropout_add_ln", "max_trained_positions", "mlp_fc1_bias_fused"]);
    cfg.must_be("activation_function", "swiglu".to_owned())?;
    for off in
        ["qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "prenorm", "rotary_emb_interleaved", "causal"]
    {
        cfg.must_be(off, false)?;
    }
    let width = cfg.required_in("n_embd", 1..=1 << 20)?;
    let heads = cfg.required_in("n_head", 1..=1 << 16)?;
    if width % heads != 0 || (width / heads) % 2 != 0 {
        let expected = format!("a multiple of twice n_head ({heads})");
        return Err(cfg.wrong("n_embd", expected, width.to_string()).into());
    }
    cfg.must_be("rotary_emb_fraction", 1.0)?;
    Ok(Spec {
        vocab: cfg.required_in("vocab_size", 1..=1 << 28)?,
        width,
        inner: cfg.required_in("n_inner", 1..=1 << 24)?,
        layers: cfg.required_in("n_layer", 1..=4096)?,
        heads,
        positions: cfg.required_in("n_positions", 1..=1 << 24)?,
        token_types: cfg.optional_in("type_vocab_size", 1..=1 << 16)?.unwrap_or(2),
        eps: cfg.optional_in("layer_norm_epsilon", 0.0..=1.0)?.unwrap_or(1e-12),
        rope: Rope::plain(cfg.optional_in("rotary_emb_base", 1.5..=1e12)?.unwrap_or(10_000.0), width / heads),
    })
}

fn embeddings(net: &mut Net<'_>, cx: &BuildCx<'_>, spec: &Spec, ids: ValueId) -> Result<ValueId> {
    let words = net.embedding(ids, WORDS, (spec.vocab, spec.width))?;
    let table = net.weight("embeddings.token_type_embeddings.weight", &[spec.token_types, spec.width])?;
    let types = match cx.options.token_types {
        true => net.graph.input("token_types", Shape::from_dims(vec![Dim::symbol("rows")], DType::I32))?,
        false => net.graph.constant(Tensor::from_slice(&[1], &[0i32])?),
    };
    let types = net.graph.add_one(Embedding {}, &[types, table])?;
    let x = net.add(words, types)?;
    net.layer_norm(x, "emb_ln", spec.width, spec.eps)
}

fn encoder_layer(
    net: &mut Net<'_>,
    spec: &Spec,
    layer: usize,
    x: ValueId,
    angles: ValueId,
    seq_starts: ValueId,
) -> Result<ValueId> {
    let (width, head_dim) = (spec.width, spec.width / spec.heads);
    let at = |name: &str| format!("encoder.layers.{layer}.{name}");
    let qkv = net.linear(x, &at("attn.Wqkv"), (3 * width, width), false)?;
    let rope = RopeOp { heads: spec.heads, head_dim, rotary_dim: head_dim, style: RopeStyle::Neox };
    let q = net.columns(qkv, 0, width)?;
    let q = net.graph.add_one(rope.clone(), &[q, angles])?;
    let k = net.columns(qkv, width, 2 * width)?;
    let k = net.graph.add_one(rope, &[k, angles])?;
    let v = net.columns(qkv, 2 * width, 3 * width)?;
    let attention = Attention {
        heads: spec.heads,
        kv_heads: spec.heads,
        head_dim,
        scale: 1.0 / (head_dim as f64).sqrt(),
        causal: false,
        window: None,
        softcap: None,
        mask: false,
        cache: false,
    };
    let attended = net.graph.add_one(attention, &[q, k, v, seq_starts])?;
    let attended = net.linear(attended, &at("attn.out_proj"), (width, width), false)?;
    let x = net.add(x, attended)?;
    let x = net.layer_norm(x, &at("norm1"), width, spec.eps)?;
    let up = net.linear(x, &at("mlp.fc11"), (spec.inner, width), false)?;
    let gate = net.linear(x, &at("mlp.fc12"), (spec.inner, width), false)?;
    let inner = net.gated(gate, up, ActivationKind::Silu)?;
    let fed = net.linear(inner, &at("mlp.fc2"), (width, spec.inner), false)?;
    let x = net.add(x, fed)?;
    net.layer_norm(x, &at("norm2"), width, spec.eps)
}
