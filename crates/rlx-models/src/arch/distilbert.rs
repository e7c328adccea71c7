//! DistilBERT (Sanh et al., 2019).

use crate::arch::{BuildCx, Built};
use crate::blocks::decoder::{ACTIVATIONS, ignore_irrelevant};
use crate::blocks::encoder::{self, EncoderNames, EncoderSpec};
use crate::error::Result;
use rlx_graph::ops::activation::ActivationKind;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let cfg = cx.cfg;
    ignore_irrelevant(cfg)?;
    // The position table is stored whether it was computed or learnt.
    cfg.ignore(&["sinusoidal_pos_embds", "tie_weights_", "tie_word_embeddings"]);
    cfg.ignore(&["dropout", "qa_dropout", "seq_classif_dropout"]);
    let width = cfg.required_in("dim", 1..=1 << 20)?;
    let heads = cfg.required_in("n_heads", 1..=1 << 16)?;
    if width % heads != 0 {
        return Err(cfg.wrong("dim", format!("a multiple of n_heads ({heads})"), width.to_string()).into());
    }
    let spec = EncoderSpec {
        vocab: cfg.required_in("vocab_size", 1..=1 << 28)?,
        width,
        inner: cfg.required_in("hidden_dim", 1..=1 << 24)?,
        layers: cfg.required_in("n_layers", 1..=4096)?,
        heads,
        positions: cfg.required_in("max_position_embeddings", 1..=1 << 24)?,
        token_types: 0,
        first_position: 0,
        eps: 1e-12,
        activation: cfg.choice("activation", ACTIVATIONS, Some(ActivationKind::Gelu))?,
        names: EncoderNames {
            prefixes: &["distilbert.", ""],
            layer: "transformer.layer",
            qkv: ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
            output: "attention.out_lin",
            attention_norm: "sa_layer_norm",
            feed_forward: ["ffn.lin1", "ffn.lin2"],
            output_norm: "output_layer_norm",
        },
    };
    encoder::build(cx, &spec)
}
