//! Architectures by `model_type`, one line each, and what building one gives.

use crate::blocks::rope::Rope;
use crate::error::{ModelError, Result};
use rlx::import::hf::{ConfigReader, HfFolder, SentenceTransformer};
use rlx::weights::WeightLoader;
use rlx_graph::Graph;
use rlx_tensor::DType;

mod bert;
mod distilbert;
mod gemma2;
mod gemma3;
mod gpt2;
mod llama;
mod mistral;
mod mixtral;
mod nomic_bert;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod roberta;

/// Builds the graph of one architecture.
pub type BuildFn = fn(&BuildCx<'_>) -> Result<Built>;

/// Every supported `model_type`.
pub const ARCHITECTURES: &[(&str, BuildFn)] = &[
    ("bert", bert::build),
    ("distilbert", distilbert::build),
    ("gemma2", gemma2::build),
    ("gemma3_text", gemma3::build),
    ("gpt2", gpt2::build),
    ("llama", llama::build),
    ("mistral", mistral::build),
    ("mixtral", mixtral::build),
    ("nomic_bert", nomic_bert::build),
    ("phi3", phi3::build),
    ("qwen2", qwen2::build),
    ("qwen2_moe", qwen2_moe::build),
    ("qwen3", qwen3::build),
    ("qwen3_moe", qwen3_moe::build),
    ("roberta", roberta::build),
];

/// Whose habits a checkpoint's tensors follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Convention {
    /// Those of the Hugging Face hub: norms of Gemma are offsets from one, linears of GPT-2 are `[in, out]`.
    #[default]
    Hub,
    /// Those of GGUF: every norm is the factor itself, every linear is `[out, in]`.
    Gguf,
}

/// Choices that a config leaves open.
#[derive(Debug, Clone, PartialEq)]
pub struct BuildOptions {
    /// Element type of KV caches: F32, F16, BF16 or Q8_0.
    pub cache_dtype: DType,
    /// Encoders take `token_types [rows]` I32 as an input; else every token is of type 0.
    pub token_types: bool,
    /// Habits of the checkpoint.
    pub convention: Convention,
    /// Stands before the names of params, so that several models fit one registry; empty for the checkpoint's own.
    pub namespace: String,
}

impl Default for BuildOptions {
    fn default() -> Self {
        let (cache_dtype, convention) = (DType::F32, Convention::Hub);
        Self { cache_dtype, token_types: false, convention, namespace: String::new() }
    }
}

/// What an architecture is built from.
pub struct BuildCx<'a> {
    /// `config.json`.
    pub cfg: &'a ConfigReader,
    /// The checkpoint: names, extents and dtypes are read, bytes are not.
    pub weights: &'a dyn WeightLoader,
    /// What sentence-transformers adds.
    pub sentence: Option<&'a SentenceTransformer>,
    /// Choices.
    pub options: &'a BuildOptions,
    /// The config's `model_type`.
    pub model_type: String,
}

/// A model as a graph.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Built {
    /// Continues text.
    Decoder(Decoder),
    /// Turns text into vectors.
    Encoder(Encoder),
}

impl Built {
    /// The graph.
    pub fn graph(&self) -> &Graph {
        match self {
            Built::Decoder(model) => &model.graph,
            Built::Encoder(model) => &model.graph,
        }
    }

    /// Tensors of the checkpoint that the graph does not use, in file order.
    pub fn unused(&self) -> &[String] {
        match self {
            Built::Decoder(model) => &model.unused,
            Built::Encoder(model) => &model.unused,
        }
    }
}

/// A model that continues text.
///
/// Inputs, all I32: `input_ids [rows]`, `positions [rows]`, `seq_starts [batch + 1]`, `past [batch]`, `block_table [batch, table]` where
/// some layer has no window, `window_table [batch, table]` where some layer has one, `logit_rows [outs]`; also `angles [rows, rotary_dim]` F32 where [`DecoderInfo::rope`] is there. States: `layers.<i>.k_cache
/// [blocks, kv_heads, head_dim, 64]` and `layers.<i>.v_cache [blocks, kv_heads, 64, head_dim]`. Output: `logits [outs, vocab]` F32 of
/// the rows that `logit_rows` names. Caches of Q8_0 are states of U8, `[blocks, kv_heads, 64, head_dim / 32 * 34]`. Those of
/// layers with a window have `window_blocks` blocks.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// The graph.
    pub graph: Graph,
    /// Sizes and limits.
    pub info: DecoderInfo,
    /// Tensors of the checkpoint that the graph does not use, in file order.
    pub unused: Vec<String>,
}

/// Sizes and limits of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderInfo {
    /// The config's `model_type`.
    pub model_type: String,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Layers, each with a pair of caches.
    pub layers: usize,
    /// Key and value heads of a layer.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Most positions of a sequence.
    pub max_positions: usize,
    /// Element type of the caches.
    pub cache_dtype: DType,
    /// Layers that see all positions before their own.
    pub full_layers: usize,
    /// The widest window of the other layers; `None` if there are none.
    pub window: Option<usize>,
    /// Rotary frequencies that depend on a sequence's length: the caller computes the input `angles` with them.
    pub rope: Option<Rope>,
}

/// A model that turns text into vectors.
///
/// Inputs, all I32: `input_ids [rows]`, `positions [rows]` (from [`EncoderInfo::first_position`] in each sequence), `seq_starts
/// [batch + 1]`; `token_types [rows]` if asked for. Outputs, F32: `last_hidden_state [rows, width]`, `embedding [batch, dim]`.
#[derive(Debug, Clone)]
pub struct Encoder {
    /// The graph.
    pub graph: Graph,
    /// Sizes and limits.
    pub info: EncoderInfo,
    /// Tensors of the checkpoint that the graph does not use, in file order.
    pub unused: Vec<String>,
}

/// Sizes and limits of an encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderInfo {
    /// The config's `model_type`.
    pub model_type: String,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Elements of a row.
    pub width: usize,
    /// Elements of an embedding.
    pub embedding_dim: usize,
    /// Position of a sequence's first token.
    pub first_position: usize,
    /// Most tokens of a sequence, special tokens included.
    pub max_tokens: usize,
    /// The folder does not say how to pool, so the mean was taken, as sentence-transformers does.
    pub pooling_assumed: bool,
}

/// Builds the graph that a config describes, with params named and typed as in the checkpoint.
///
/// # Errors
/// [`ModelError::UnknownModelType`]; a config field that is missing, out of range or not understood; a tensor that is missing or
/// of another shape than the config says.
pub fn build(
    cfg: &ConfigReader,
    weights: &dyn WeightLoader,
    sentence: Option<&SentenceTransformer>,
    options: &BuildOptions,
) -> Result<Built> {
    let model_type = cfg.required::<String>("model_type")?;
    let Some((_, build)) = ARCHITECTURES.iter().find(|(name, _)| *name == model_type) else {
        let known = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        return Err(ModelError::UnknownModelType {
            path: cfg.path().to_path_buf(),
            found: model_type,
            known,
        });
    };
    let built = build(&BuildCx { cfg, weights, sentence, options, model_type })?;
    cfg.finish()?;
    Ok(built)
}

/// Builds the model of a folder.
///
/// # Errors
/// As [`build`], and for files that are missing or broken.
pub fn build_folder(folder: &HfFolder, weights: &dyn WeightLoader, options: &BuildOptions) -> Result<Built> {
    let sentence = folder.sentence_transformer()?;
    build(&folder.config()?, weights, sentence.as_ref(), options)
}
