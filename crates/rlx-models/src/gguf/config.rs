//! From metadata to the config that an architecture reads.

use crate::error::{ModelError, Result};
use rlx::import::ImportError;
use rlx::import::gguf::{Array, GgufLoader, Metadata, Value};
use rlx::weights::WeightLoader;
use rlx_tensor::DType;
use serde_json::{Map, Value as Json, json};

/// Key of the activation of a BERT, where it is not GELU by the error function.
pub(super) const HIDDEN_ACTIVATION: &str = "hidden_activation";

/// Key of the layers that slide.
pub(super) const SLIDING_LAYERS: &str = "attention.sliding_window_pattern";

/// More layers than a file can have tensors for are not asked after.
const MAX_LAYERS: u64 = 4096;

/// An architecture as files name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufArchitecture {
    /// `general.architecture`; keys start with it.
    pub name: &'static str,
    /// The `model_type` that builds it.
    pub model_type: &'static str,
    /// It turns text into vectors.
    pub encoder: bool,
}

impl GgufArchitecture {
    /// The full key of one of the architecture's own.
    pub fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }
}

const fn decoder(name: &'static str, model_type: &'static str) -> GgufArchitecture {
    GgufArchitecture { name, model_type, encoder: false }
}

/// Every architecture that is read. `llama` with experts is mixtral; mistral is written as `llama`.
pub const ARCHITECTURES: &[GgufArchitecture] = &[
    decoder("llama", "llama"),
    decoder("qwen2", "qwen2"),
    decoder("qwen2moe", "qwen2_moe"),
    decoder("qwen3", "qwen3"),
    decoder("qwen3moe", "qwen3_moe"),
    decoder("gemma2", "gemma2"),
    decoder("gemma3", "gemma3_text"),
    decoder("phi3", "phi3"),
    decoder("gpt2", "gpt2"),
    GgufArchitecture { name: "bert", model_type: "bert", encoder: true },
    GgufArchitecture { name: "nomic-bert", model_type: "nomic_bert", encoder: true },
];

pub(super) fn wrong(metadata: &Metadata, key: &str, expected: &str, found: String) -> ModelError {
    ModelError::Import(ImportError::Field {
        path: metadata.path().to_path_buf(),
        field: key.to_owned(),
        expected: expected.to_owned(),
        found,
    })
}

pub(super) fn architecture(metadata: &Metadata) -> Result<GgufArchitecture> {
    let key = "general.architecture";
    let name = metadata.required(key, "the name of an architecture", Metadata::string)?;
    let Some(known) = ARCHITECTURES.iter().find(|known| known.name == name) else {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
        return Err(wrong(metadata, key, &format!("one of {}", known.join(", ")), format!("`{name}`")));
    };
    let mixtral = name == "llama" && metadata.u64("llama.expert_count")?.unwrap_or(0) > 0;
    Ok(GgufArchitecture { model_type: if mixtral { "mixtral" } else { known.model_type }, ..known.clone() })
}

/// The config under construction.
struct Reader<'a> {
    metadata: &'a Metadata,
    loader: &'a GgufLoader,
    architecture: &'a GgufArchitecture,
    config: Map<String, Json>,
}

/// The decimal that was meant: an f32 of 1e-6 is 1e-6, not 9.99999997e-7.
fn decimal(value: f64) -> f64 {
    let short = value as f32;
    if f64::from(short) == value { short.to_string().parse().unwrap_or(value) } else { value }
}

impl Reader<'_> {
    fn put(&mut self, field: &str, value: impl Into<Json>) {
        self.config.insert(field.to_owned(), value.into());
    }

    fn count(&self, key: &str) -> Result<Option<u64>> {
        Ok(self.metadata.u64(&self.architecture.key(key))?)
    }

    fn needed(&self, key: &str) -> Result<u64> {
        Ok(self.metadata.required(&self.architecture.key(key), "a whole number", Metadata::u64)?)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        Ok(self.metadata.f64(&self.architecture.key(key))?.map(decimal))
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        Ok(self.metadata.string(&self.architecture.key(key))?)
    }

    /// Copies numbers from keys to fields, where they are there.
    fn copy(&mut self, pairs: &[(&str, &str)]) -> Result<()> {
        for (key, field) in pairs {
            if let Some(value) = self.count(key)? {
                self.put(field, value);
            }
        }
        Ok(())
    }

    fn copy_numbers(&mut self, pairs: &[(&str, &str)]) -> Result<()> {
        for (key, field) in pairs {
            if let Some(value) = self.number(key)? {
                self.put(field, value);
            }
        }
        Ok(())
    }

    fn has(&self, tensor: &str) -> Result<bool> {
        Ok(self.loader.tensor(tensor)?.is_some())
    }

    fn dims(&self, tensor: &str) -> Result<Vec<usize>> {
        match self.loader.tensor(tensor)? {
            Some(view) => Ok(view.dims.to_vec()),
            None => Err(ModelError::MissingTensor { name: tensor.to_owned(), expected: Vec::new() }),
        }
    }

    fn factors(&self, tensor: &str) -> Result<Option<Vec<f64>>> {
        let Some(view) = self.loader.tensor(tensor)? else { return Ok(None) };
        if view.dtype != DType::F32 {
            return Err(ModelError::TensorDType { name: tensor.to_owned(), found: view.dtype });
        }
        let floats = view.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        Ok(Some(floats.map(|f| decimal(f64::from(f))).collect()))
    }
}

pub(super) fn read(architecture: &GgufArchitecture, loader: &GgufLoader) -> Result<Json> {
    let metadata = loader.metadata();
    let mut reader = Reader { metadata, loader, architecture, config: Map::new() };
    reader.put("model_type", architecture.model_type);
    let vocab = reader.dims("token_embd.weight")?.first().copied().unwrap_or(0);
    reader.put("vocab_size", vocab);
    match architecture.name {
        "gpt2" => gpt2(&mut reader)?,
        "bert" => bert(&mut reader)?,
        "nomic-bert" => nomic_bert(&mut reader)?,
        _ => rotary_decoder(&mut reader)?,
    }
    Ok(Json::Object(reader.config))
}

fn gpt2(reader: &mut Reader<'_>) -> Result<()> {
    reader.copy(&[
        ("embedding_length", "n_embd"),
        ("block_count", "n_layer"),
        ("attention.head_count", "n_head"),
        ("context_length", "n_positions"),
        ("feed_forward_length", "n_inner"),
    ])?;
    let tied = !reader.has("output.weight")?;
    reader.put("tie_word_embeddings", tied);
    reader.copy_numbers(&[("attention.layer_norm_epsilon", "layer_norm_epsilon")])
}

fn bert(reader: &mut Reader<'_>) -> Result<()> {
    reader.copy(&[
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("feed_forward_length", "intermediate_size"),
    ])?;
    let positions = reader.dims("position_embd.weight")?.first().copied().unwrap_or(0);
    reader.put("max_position_embeddings", positions);
    let kinds = reader.dims("token_types.weight")?.first().copied().unwrap_or(0);
    reader.put("type_vocab_size", kinds);
    if let Some(activation) = reader.text(HIDDEN_ACTIVATION)?.map(str::to_owned) {
        reader.put("hidden_act", activation);
    }
    reader.copy_numbers(&[("attention.layer_norm_epsilon", "layer_norm_eps")])
}

fn nomic_bert(reader: &mut Reader<'_>) -> Result<()> {
    if reader.count("expert_count")?.unwrap_or(0) > 0 {
        let key = reader.architecture.key("expert_count");
        return Err(wrong(reader.metadata, &key, "no experts", "some".to_owned()));
    }
    reader.copy(&[
        ("embedding_length", "n_embd"),
        ("block_count", "n_layer"),
        ("attention.head_count", "n_head"),
        ("feed_forward_length", "n_inner"),
        ("context_length", "n_positions"),
    ])?;
    let kinds = reader.dims("token_types.weight")?.first().copied().unwrap_or(0);
    reader.put("type_vocab_size", kinds);
    reader.copy_numbers(&[
        ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
        ("rope.freq_base", "rotary_emb_base"),
    ])
}

fn rotary_decoder(reader: &mut Reader<'_>) -> Result<()> {
    reader.copy(&[
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("context_length", "max_position_embeddings"),
        ("feed_forward_length", "intermediate_size"),
    ])?;
    reader.copy_numbers(&[("attention.layer_norm_rms_epsilon", "rms_norm_eps")])?;
    let (width, heads) = (reader.needed("embedding_length")?, reader.needed("attention.head_count")?);
    let head_dim = reader.count("attention.key_length")?.unwrap_or(width / heads.max(1));
    let values = reader.count("attention.value_length")?.unwrap_or(head_dim);
    if values != head_dim {
        let key = reader.architecture.key("attention.value_length");
        let expected = format!("the same as the keys' ({head_dim})");
        return Err(wrong(reader.metadata, &key, &expected, values.to_string()));
    }
    // The width over the heads is what a config without the field means; gemma's means something else.
    reader.put("head_dim", head_dim);
    if reader.architecture.model_type == "phi3" {
        reader.config.remove("head_dim");
    }
    let tied = !reader.has("output.weight")?;
    reader.put("tie_word_embeddings", tied);
    rope(reader, head_dim)?;
    family(reader, width, heads, head_dim)
}

fn rope(reader: &mut Reader<'_>, head_dim: u64) -> Result<()> {
    reader.copy_numbers(&[("rope.freq_base", "rope_theta")])?;
    if let Some(rotated) = reader.count("rope.dimension_count")?.filter(|&rotated| rotated != head_dim) {
        reader.put("partial_rotary_factor", rotated as f64 / head_dim.max(1) as f64);
    }
    let original = reader.count("rope.scaling.original_context_length")?;
    let factor = reader.number("rope.scaling.factor")?;
    if let Some(factors) = reader.factors("rope_freqs.weight")? {
        reader.put(
            "rope_scaling",
            json!({ "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0 }),
        );
        return Ok(());
    }
    if let (Some(short), Some(long)) =
        (reader.factors("rope_factors_short.weight")?, reader.factors("rope_factors_long.weight")?)
    {
        let mut section = json!({ "rope_type": "longrope", "short_factor": short, "long_factor": long });
        section["attention_factor"] = json!(reader.number("rope.scaling.attn_factor")?.unwrap_or(1.0));
        reader.put("rope_scaling", section);
        if let Some(original) = original {
            reader.put("original_max_position_embeddings", original);
        }
        return Ok(());
    }
    match reader.text("rope.scaling.type")? {
        None | Some("none") => Ok(()),
        Some("linear") => {
            reader.put("rope_scaling", json!({ "rope_type": "linear", "factor": factor.unwrap_or(1.0) }));
            Ok(())
        }
        Some("yarn") => {
            let mut section = json!({ "rope_type": "yarn", "factor": factor.unwrap_or(1.0) });
            if let Some(original) = original {
                section["original_max_position_embeddings"] = json!(original);
            }
            reader.put("rope_scaling", section);
            Ok(())
        }
        Some(other) => {
            let key = reader.architecture.key("rope.scaling.type");
            Err(wrong(
                reader.metadata,
                &key,
                "none, linear, yarn, or factors as tensors",
                format!("`{other}`"),
            ))
        }
    }
}

/// What gemma's scores are divided by the root of. The largest of both generations takes the width of a head as it would be without a
/// key length of its own.
pub(super) fn query_scalar(model_type: &str, layers: u64, width_of_head: u64, head_dim: u64) -> u64 {
    let largest = [("gemma2", 46), ("gemma3_text", 62)];
    if largest.contains(&(model_type, layers)) { width_of_head } else { head_dim }
}

/// Which layers slide, or after how many one does not.
fn sliding_layers(reader: &mut Reader<'_>, layers: u64) -> Result<()> {
    let key = reader.architecture.key(SLIDING_LAYERS);
    let kind = |slides: bool| if slides { "sliding_attention" } else { "full_attention" };
    let kinds: Vec<&str> = match reader.metadata.value(&key) {
        None => return Ok(()),
        Some(Value::Array(Array::Bool(slides))) => slides.iter().map(|&slides| kind(slides)).collect(),
        Some(other) => match other.as_u64() {
            Some(period) => {
                let of = |layer: u64| kind(period == 0 || !(layer + 1).is_multiple_of(period));
                (0..layers.min(MAX_LAYERS)).map(of).collect()
            }
            None => {
                let expected = "a whole number, or true or false for each layer";
                return Err(wrong(reader.metadata, &key, expected, other.kind()));
            }
        },
    };
    reader.put("layer_types", kinds);
    Ok(())
}

/// What only some families say.
fn family(reader: &mut Reader<'_>, width: u64, heads: u64, head_dim: u64) -> Result<()> {
    match reader.architecture.model_type {
        "mixtral" => {
            reader.copy(&[
                ("expert_count", "num_local_experts"),
                ("expert_used_count", "num_experts_per_tok"),
            ])?;
        }
        "qwen2_moe" | "qwen3_moe" => {
            reader.copy(&[
                ("expert_count", "num_experts"),
                ("expert_used_count", "num_experts_per_tok"),
                ("expert_feed_forward_length", "moe_intermediate_size"),
                ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
            ])?;
            if !reader.config.contains_key("moe_intermediate_size") {
                let inner = reader.dims("blk.0.ffn_gate_exps.weight")?.get(1).copied().unwrap_or(0);
                reader.put("moe_intermediate_size", inner);
            }
            if let Some(inner) = reader
                .loader
                .tensor("blk.0.ffn_gate_shexp.weight")?
                .and_then(|view| view.dims.first().copied())
            {
                reader.put("shared_expert_intermediate_size", inner);
            }
            let layers = reader.needed("block_count")?;
            let mut dense = Vec::new();
            for layer in 0..layers.min(MAX_LAYERS) {
                if !reader.has(&format!("blk.{layer}.ffn_gate_inp.weight"))? {
                    dense.push(layer);
                }
            }
            reader.put("mlp_only_layers", dense);
            let renormalised = reader.architecture.model_type == "qwen3_moe";
            reader.put("norm_topk_prob", renormalised);
            if reader.architecture.model_type == "qwen3_moe" {
                let bias = reader.has("blk.0.attn_q.bias")?;
                reader.put("attention_bias", bias);
            } else {
                let bias = reader.has("blk.0.attn_q.bias")?;
                reader.put("qkv_bias", bias);
            }
        }
        "gemma2" | "gemma3_text" => {
            let layers = reader.needed("block_count")?;
            let model_type = reader.architecture.model_type;
            reader.put(
                "query_pre_attn_scalar",
                query_scalar(model_type, layers, width / heads.max(1), head_dim),
            );
            sliding_layers(reader, layers)?;
            reader.copy(&[("attention.sliding_window", "sliding_window")])?;
            reader.copy_numbers(&[
                ("attn_logit_softcapping", "attn_logit_softcapping"),
                ("final_logit_softcapping", "final_logit_softcapping"),
            ])?;
            if reader.architecture.model_type == "gemma3_text" {
                reader.copy_numbers(&[("rope.freq_base_swa", "rope_local_base_freq")])?;
            }
        }
        "phi3" => reader.copy(&[("attention.sliding_window", "sliding_window")])?,
        "llama" | "qwen3" => {
            let bias = reader.has("blk.0.attn_q.bias")?;
            reader.put("attention_bias", bias);
            if reader.architecture.model_type == "llama" {
                let bias = reader.has("blk.0.ffn_up.bias")?;
                reader.put("mlp_bias", bias);
            }
        }
        _ => {}
    }
    Ok(())
}
