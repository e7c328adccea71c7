//! BERT (Devlin et al., 2018).

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{ACTIVATIONS, ignore_irrelevant};
use crate::blocks::encoder::{self, EncoderNames, EncoderSpec};
use crate::error::Result;
use rlx_graph::ops::activation::ActivationKind;

/// Names of BERT's tensors.
pub const NAMES: EncoderNames = EncoderNames {
    prefixes: &["bert.", ""],
    layer: "encoder.layer",
    qkv: ["attention.self.query", "attention.self.key", "attention.self.value"],
    output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    feed_forward: ["intermediate.dense", "output.dense"],
    output_norm: "output.LayerNorm",
};

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    encoder::build(cx, &read(cx)?)
}

/// Reads the fields of BERT and RoBERTa.
pub fn read(cx: &BuildCx<'_>) -> Result<EncoderSpec> {
    let cfg = cx.cfg;
    ignore_irrelevant(cfg)?;
    cfg.ignore(&[
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "directionality",
        "hidden_dropout_prob",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
        "tie_word_embeddings",
    ]);
    cfg.must_be("position_embedding_type", "absolute".to_owned())?;
    cfg.must_be("is_decoder", false)?;
    let width = cfg.required_in("hidden_size", 1..=1 << 20)?;
    let heads = cfg.required_in("num_attention_heads", 1..=1 << 16)?;
    if width % heads != 0 {
        let expected = format!("a multiple of num_attention_heads ({heads})");
        return Err(cfg.wrong("hidden_size", expected, width.to_string()).into());
    }
    Ok(EncoderSpec {
        vocab: cfg.required_in("vocab_size", 1..=1 << 28)?,
        width,
        inner: cfg.required_in("intermediate_size", 1..=1 << 24)?,
        layers: cfg.required_in("num_hidden_layers", 1..=4096)?,
        heads,
        positions: cfg.required_in("max_position_embeddings", 1..=1 << 24)?,
        token_types: cfg.optional_in("type_vocab_size", 1..=1 << 16)?.unwrap_or(2),
        first_position: 0,
        eps: cfg.optional_in("layer_norm_eps", 0.0..=1.0)?.unwrap_or(1e-12),
        activation: cfg.choice("hidden_act", ACTIVATIONS, Some(ActivationKind::Gelu))?,
        names: NAMES,
    })
}
