//! GGUF files as models: the metadata becomes a config, the tensors get the names and the order that the architectures ask for,
//! tokenizer and chat template come from the metadata.

mod config;
pub mod export;
pub(crate) mod kept;
mod names;
mod tokenizer;
mod weights;

use crate::error::Result;
use crate::tokenizer::TextTokenizer;
use rlx::import::gguf::{GgufLoader, Metadata};
use rlx::import::hf::{ConfigReader, HfFolder, PoolingMode, SentenceTransformer};
use rlx::weights::WeightLoader;
use serde_json::{Map, Value as Json, json};
use std::path::Path;
use std::sync::Arc;

pub use config::{ARCHITECTURES, GgufArchitecture};
pub use names::{Place, gguf_name};
pub use tokenizer::PRE_TOKENIZERS;
pub use weights::GgufWeights;

/// A GGUF file, opened: nothing but its header was read.
#[derive(Debug, Clone)]
pub struct GgufModel {
    loader: Arc<GgufLoader>,
    config: Json,
    weights: GgufWeights,
    sentence: Option<SentenceTransformer>,
}

impl GgufModel {
    /// Opens a file; of a split model any part.
    ///
    /// # Errors
    /// A broken file; an architecture, key or tensor that is not understood.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let loader = Arc::new(GgufLoader::open(path)?);
        let architecture = config::architecture(loader.metadata())?;
        let config = config::read(&architecture, &loader)?;
        let weights = GgufWeights::new(Arc::clone(&loader), &architecture, &config)?;
        let sentence = sentence(&architecture, loader.metadata())?;
        Ok(Self { loader, config, weights, sentence })
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        self.loader.metadata()
    }

    /// The tensors as the file stores them.
    pub fn stored(&self) -> &dyn WeightLoader {
        self.loader.as_ref()
    }

    /// Everything before the tensors, which tells the tokenizer among other things; `None` of a model in several files.
    pub(crate) fn header(&self) -> Option<&[u8]> {
        let [file] = self.loader.files() else { return None };
        file.bytes().get(..self.loader.header_bytes())
    }

    /// Bytes of the files that were read: all but the tensors.
    pub fn header_bytes(&self) -> u64 {
        self.loader.header_bytes() as u64
    }

    /// The file as a folder of the files that it stands for: `config.json`, `generation_config.json`, `tokenizer_config.json`.
    ///
    /// # Errors
    /// Metadata of the wrong kind.
    pub fn folder(&self) -> Result<HfFolder> {
        let metadata = self.metadata();
        let files = vec![
            ("config.json".to_owned(), self.config.to_string().into_bytes()),
            ("generation_config.json".to_owned(), generation_config(metadata)?.to_string().into_bytes()),
            ("tokenizer_config.json".to_owned(), tokenizer_config(metadata)?.to_string().into_bytes()),
        ];
        Ok(HfFolder::bundled(metadata.path(), files))
    }

    /// The config that the architecture reads.
    ///
    /// # Errors
    /// Never for a file that was opened.
    pub fn config(&self) -> Result<ConfigReader> {
        Ok(ConfigReader::from_bytes(self.metadata().path(), self.config.to_string().as_bytes())?)
    }

    /// The tensors, under the names that the architecture asks for.
    pub fn weights(&self) -> Box<dyn WeightLoader> {
        Box::new(self.weights.clone())
    }

    /// How an encoder's rows become an embedding; none for a decoder.
    pub fn sentence(&self) -> Option<&SentenceTransformer> {
        self.sentence.as_ref()
    }

    /// The tokenizer, for a model of `vocab` entries.
    ///
    /// # Errors
    /// Metadata that is missing or of the wrong kind; a tokenizer that is not known.
    pub fn tokenizer(&self, vocab: usize) -> Result<TextTokenizer> {
        tokenizer::read(self.metadata(), vocab)
    }
}

fn sentence(architecture: &GgufArchitecture, metadata: &Metadata) -> Result<Option<SentenceTransformer>> {
    if !architecture.encoder {
        return Ok(None);
    }
    let key = architecture.key("pooling_type");
    let mode = match metadata.u64(&key)? {
        Some(2) => PoolingMode::Cls,
        Some(3) => PoolingMode::LastToken,
        Some(0 | 1) | None => PoolingMode::Mean,
        Some(other) => {
            let expected = "0 to 3 (none, mean, cls, last)";
            return Err(config::wrong(metadata, &key, expected, other.to_string()));
        }
    };
    // Files do not say whether embeddings are normalised; programs that read them do it.
    let longest = metadata.u64(&architecture.key(export::LONGEST_TEXT))?;
    let longest = longest.and_then(|tokens| usize::try_from(tokens).ok());
    Ok(Some(SentenceTransformer::of_pooling(mode, true, longest)))
}

const SPECIAL_TOKENS: &[(&str, &str)] = &[
    ("bos_token", "bos_token_id"),
    ("eos_token", "eos_token_id"),
    ("unk_token", "unknown_token_id"),
    ("sep_token", "seperator_token_id"),
    ("pad_token", "padding_token_id"),
    ("cls_token", "cls_token_id"),
    ("mask_token", "mask_token_id"),
];

fn tokenizer_config(metadata: &Metadata) -> Result<Json> {
    let mut config = Map::new();
    let tokens = metadata.strings("tokenizer.ggml.tokens")?.unwrap_or(&[]);
    for (name, key) in SPECIAL_TOKENS {
        let id = metadata.u64(&format!("tokenizer.ggml.{key}"))?;
        let token = id.and_then(|id| tokens.get(usize::try_from(id).ok()?));
        if let Some(token) = token {
            config.insert((*name).to_owned(), json!(token));
        }
    }
    if let Some(template) = metadata.string("tokenizer.chat_template")? {
        config.insert("chat_template".to_owned(), json!(template));
    }
    Ok(Json::Object(config))
}

/// Tokens that end an answer by their text, where the metadata names only one.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
];

fn generation_config(metadata: &Metadata) -> Result<Json> {
    let mut ends = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        ends.extend(metadata.u64(&format!("tokenizer.ggml.{key}"))?);
    }
    let tokens = metadata.strings("tokenizer.ggml.tokens")?.unwrap_or(&[]);
    let kinds = metadata.i32s("tokenizer.ggml.token_type")?.unwrap_or_default();
    for (id, token) in tokens.iter().enumerate() {
        let control = kinds.get(id).is_some_and(|&kind| kind == tokenizer::CONTROL);
        if control && END_OF_TURN.contains(&token.as_str()) {
            ends.push(id as u64);
        }
    }
    ends.sort_unstable();
    ends.dedup();
    Ok(json!({ "eos_token_id": ends }))
}
