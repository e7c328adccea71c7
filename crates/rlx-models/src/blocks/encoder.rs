//! What every encoder has: its inputs, two-way attention, the outputs.

use crate::arch::{BuildCx, Built, Encoder, EncoderInfo};
use crate::blocks::net::Net;
use crate::blocks::pooling;
use crate::error::Result;
use rlx_graph::ValueId;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::attention::Attention;
use rlx_graph::ops::embedding::Embedding;
use rlx_tensor::{DType, Dim, Shape, Tensor};

/// Sizes and names of an encoder of BERT's kind.
#[derive(Debug, Clone)]
pub struct EncoderSpec {
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Elements of a row.
    pub width: usize,
    /// Elements between, in the feed-forward.
    pub inner: usize,
    /// Layers.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Rows of the position table.
    pub positions: usize,
    /// Rows of the token type table; 0 if there is none.
    pub token_types: usize,
    /// Position of a sequence's first token.
    pub first_position: usize,
    /// Added to variances.
    pub eps: f64,
    /// Of the feed-forward.
    pub activation: ActivationKind,
    /// Where the tensors are.
    pub names: EncoderNames,
}

/// Tensor names of a layer, after `layer.<i>.`; each has a weight and a bias.
#[derive(Debug, Clone, Copy)]
pub struct EncoderNames {
    /// What stands before tensor names, if anything does.
    pub prefixes: &'static [&'static str],
    /// Before the layer's number.
    pub layer: &'static str,
    /// Query, key and value.
    pub qkv: [&'static str; 3],
    /// The attention's output.
    pub output: &'static str,
    /// The norm after attention.
    pub attention_norm: &'static str,
    /// The feed-forward's two linears.
    pub feed_forward: [&'static str; 2],
    /// The norm after the feed-forward.
    pub output_norm: &'static str,
}

const WORDS: &str = "embeddings.word_embeddings.weight";

/// Builds the model with its outputs.
pub fn build(cx: &BuildCx<'_>, spec: &EncoderSpec) -> Result<Built> {
    let mut net = Net::new(&cx.model_type, cx.weights, spec.names.prefixes, WORDS)?;
    let mut input = |name: &str, dim: Dim| net.graph.input(name, Shape::from_dims(vec![dim], DType::I32));
    let ids = input("input_ids", Dim::symbol("rows"))?;
    let positions = input("positions", Dim::symbol("rows"))?;
    let seq_starts = input("seq_starts", Dim::symbol("batch") + Dim::Known(1))?;
    let mut x = embeddings(&mut net, cx, spec, ids, positions)?;
    for layer in 0..spec.layers {
        x = encoder_layer(&mut net, spec, layer, x, seq_starts)?;
    }
    let (embedding, embedding_dim) = pooling::add(&mut net, cx, x, seq_starts, spec.width)?;
    net.graph.set_outputs(&[("last_hidden_state", x), ("embedding", embedding)])?;
    let by_positions = spec.positions.saturating_sub(spec.first_position);
    let asked = cx.sentence.and_then(|s| s.max_seq_length).unwrap_or(by_positions);
    let info = EncoderInfo {
        model_type: cx.model_type.clone(),
        vocab: spec.vocab,
        width: spec.width,
        embedding_dim,
        first_position: spec.first_position,
        max_tokens: asked.min(by_positions),
        pooling_assumed: cx.sentence.is_none(),
    };
    let (graph, unused) = net.finish()?;
    Ok(Built::Encoder(Encoder { graph, info, unused }))
}

fn embeddings(
    net: &mut Net<'_>,
    cx: &BuildCx<'_>,
    spec: &EncoderSpec,
    ids: ValueId,
    positions: ValueId,
) -> Result<ValueId> {
    let width = spec.width;
    let mut x = net.embedding(ids, WORDS, (spec.vocab, width))?;
    if spec.token_types > 0 {
        let table = net.weight("embeddings.token_type_embeddings.weight", &[spec.token_types, width])?;
        let types = match cx.options.token_types {
            true => {
                let shape = Shape::from_dims(vec![Dim::symbol("rows")], DType::I32);
                net.graph.input("token_types", shape)?
            }
            false => net.graph.constant(Tensor::from_slice(&[1], &[0i32])?),
        };
        let types = net.graph.add_one(Embedding {}, &[types, table])?;
        x = net.add(x, types)?;
    }
    let places =
        net.embedding(positions, "embeddings.position_embeddings.weight", (spec.positions, width))?;
    x = net.add(x, places)?;
    net.layer_norm(x, "embeddings.LayerNorm", width, spec.eps)
}

fn encoder_layer(
    net: &mut Net<'_>,
    spec: &EncoderSpec,
    layer: usize,
    x: ValueId,
    seq_starts: ValueId,
) -> Result<ValueId> {
    let (names, width) = (&spec.names, spec.width);
    let at = |name: &str| format!("{}.{layer}.{name}", names.layer);
    let mut operands = Vec::with_capacity(4);
    for name in names.qkv {
        operands.push(net.linear(x, &at(name), (width, width), true)?);
    }
    operands.push(seq_starts);
    let head_dim = width / spec.heads;
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
    let attended = net.graph.add_one(attention, &operands)?;
    let attended = net.linear(attended, &at(names.output), (width, width), true)?;
    let x = net.add(x, attended)?;
    let x = net.layer_norm(x, &at(names.attention_norm), width, spec.eps)?;
    let [up, down] = names.feed_forward;
    let inner = net.linear(x, &at(up), (spec.inner, width), true)?;
    let inner = net.activation(inner, spec.activation)?;
    let fed = net.linear(inner, &at(down), (width, spec.inner), true)?;
    let x = net.add(x, fed)?;
    net.layer_norm(x, &at(names.output_norm), width, spec.eps)
}
