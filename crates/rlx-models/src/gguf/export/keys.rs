//! Metadata of the architecture: the way back of `gguf/config.rs`. What the format has no key for is refused.

use super::super::config::{HIDDEN_ACTIVATION, SLIDING_LAYERS, query_scalar};
use super::{LONGEST_TEXT, Scheme};
use crate::arch::Built;
use crate::blocks::rope::{Rope, RopeDefaults};
use crate::error::{ModelError, Result};
use rlx::import::ImportError;
use rlx::import::gguf::{Array, Metadata, Value};
use rlx::import::hf::{ConfigReader, HfFolder, PoolingMode};
use rlx_graph::ops::attention::Attention;

pub(super) fn model_type(built: &Built) -> &str {
    match built {
        Built::Decoder(model) => &model.info.model_type,
        Built::Encoder(model) => &model.info.model_type,
    }
}

/// An error about what the format cannot say.
pub(super) fn no_place(folder: &HfFolder, field: &str, found: String) -> ModelError {
    ModelError::Import(ImportError::Field {
        path: folder.root().join("config.json"),
        field: field.to_owned(),
        expected: "something that GGUF has a place for".to_owned(),
        found,
    })
}

/// A tensor of each layer that scales its queries, and the factor that makes up for the scale of scores that readers of a file take:
/// gemma's configs may say another one, for which there is no key.
pub(super) fn query_factor(built: &Built, cfg: &ConfigReader) -> Result<(&'static str, f32)> {
    let Built::Decoder(model) = built else { return Ok(("", 1.0)) };
    let info = &model.info;
    let (ending, stem) = match info.model_type.as_str() {
        "gemma2" => (".self_attn.q_proj.weight", "gemma2"),
        "gemma3_text" => (".self_attn.q_norm.weight", "gemma3_text"),
        _ => return Ok(("", 1.0)),
    };
    let heads = cfg.optional::<u64>("num_attention_heads")?.unwrap_or(1);
    let width = cfg.optional::<u64>("hidden_size")?.unwrap_or(0);
    let taken = query_scalar(stem, info.layers as u64, width / heads.max(1), info.head_dim as u64);
    let meant = cfg.or("query_pre_attn_scalar", 256.0)?;
    Ok((ending, (taken as f64 / meant).sqrt() as f32))
}

/// The name as checkpoints with the head have it.
pub(super) fn canonical(model_type: &str, name: &str) -> String {
    match model_type {
        "gpt2" => name.strip_prefix("transformer.").unwrap_or(name).to_owned(),
        "bert" => {
            let name = name.strip_prefix("bert.").unwrap_or(name);
            name.replace(".gamma", ".weight").replace(".beta", ".bias")
        }
        _ if name.starts_with("model.") || name.starts_with("lm_head.") => name.to_owned(),
        _ => format!("model.{name}"),
    }
}

/// (`model_type`, architecture of files).
const NAMES: &[(&str, &str)] = &[
    ("llama", "llama"),
    ("mistral", "llama"),
    ("mixtral", "llama"),
    ("qwen2", "qwen2"),
    ("qwen2_moe", "qwen2moe"),
    ("qwen3", "qwen3"),
    ("qwen3_moe", "qwen3moe"),
    ("gemma2", "gemma2"),
    ("gemma3_text", "gemma3"),
    ("phi3", "phi3"),
    ("gpt2", "gpt2"),
    ("bert", "bert"),
];

struct Writer<'a> {
    folder: &'a HfFolder,
    cfg: ConfigReader,
    architecture: &'static str,
    metadata: Metadata,
    tensors: Vec<(String, Vec<f32>)>,
    /// The part of each head that is rotated.
    partial: Option<f64>,
}

impl Writer<'_> {
    fn put(&mut self, key: &str, value: Value) {
        let full = format!("{}.{key}", self.architecture);
        self.metadata.insert(&full, value);
    }

    fn count(&mut self, key: &str, value: usize) -> Result<()> {
        let narrow = u32::try_from(value).map_err(|_| no_place(self.folder, key, value.to_string()))?;
        self.put(key, Value::U32(narrow));
        Ok(())
    }

    fn copy(&mut self, pairs: &[(&str, &str)]) -> Result<()> {
        for (field, key) in pairs {
            if let Some(value) = self.cfg.optional::<usize>(field)? {
                self.count(key, value)?;
            }
        }
        Ok(())
    }

    fn number(&mut self, field: &str, key: &str, default: Option<f64>) -> Result<()> {
        if let Some(value) = self.cfg.optional::<f64>(field)?.or(default) {
            self.put(key, Value::F32(value as f32));
        }
        Ok(())
    }

    fn refuse(&self, field: &str, found: impl ToString) -> Result<()> {
        Err(no_place(self.folder, field, found.to_string()))
    }
}

/// Tensors that stand for parts of the config: name and values.
pub(super) type ConfigTensors = Vec<(String, Vec<f32>)>;

/// The metadata, and tensors that stand for parts of the config.
pub(super) fn metadata(
    folder: &HfFolder,
    built: &Built,
    scheme: Scheme,
) -> Result<(Metadata, ConfigTensors)> {
    let model_type = model_type(built);
    let Some((_, architecture)) = NAMES.iter().find(|(known, _)| *known == model_type) else {
        return Err(no_place(folder, "model_type", format!("`{model_type}`")));
    };
    let mut metadata = Metadata::new(folder.root());
    let name =
        folder.root().file_name().map_or("model".to_owned(), |name| name.to_string_lossy().into_owned());
    metadata.insert("general.architecture", Value::String((*architecture).to_owned()));
    metadata.insert("general.name", Value::String(name));
    metadata.insert("general.file_type", Value::U32(scheme.file_type));
    metadata.insert("general.quantization_version", Value::U32(2));
    let cfg = folder.config()?;
    let mut writer = Writer { folder, cfg, architecture, metadata, tensors: Vec::new(), partial: None };
    match model_type {
        "gpt2" => gpt2(&mut writer)?,
        "bert" => bert(&mut writer)?,
        _ => decoder(&mut writer, built)?,
    }
    Ok((writer.metadata, writer.tensors))
}

fn gpt2(w: &mut Writer<'_>) -> Result<()> {
    w.copy(&[
        ("n_embd", "embedding_length"),
        ("n_layer", "block_count"),
        ("n_head", "attention.head_count"),
        ("n_positions", "context_length"),
    ])?;
    let width = w.cfg.required::<usize>("n_embd")?;
    let inner = w.cfg.or("n_inner", 4 * width)?;
    w.count("feed_forward_length", inner)?;
    if w.cfg.or("scale_attn_by_inverse_layer_idx", false)? || !w.cfg.or("scale_attn_weights", true)? {
        w.refuse("scale_attn_by_inverse_layer_idx", "scores scaled in another way")?;
    }
    w.number("layer_norm_epsilon", "attention.layer_norm_epsilon", Some(1e-5))
}

fn bert(w: &mut Writer<'_>) -> Result<()> {
    w.copy(&[
        ("hidden_size", "embedding_length"),
        ("num_hidden_layers", "block_count"),
        ("num_attention_heads", "attention.head_count"),
        ("intermediate_size", "feed_forward_length"),
        ("max_position_embeddings", "context_length"),
    ])?;
    let activation = w.cfg.or("hidden_act", "gelu".to_owned())?;
    match activation.as_str() {
        "gelu" => {}
        // llama.cpp computes every BERT with this approximation.
        "gelu_new" | "gelu_pytorch_tanh" => w.put(HIDDEN_ACTIVATION, Value::String(activation)),
        _ => w.refuse("hidden_act", activation)?,
    }
    w.number("layer_norm_eps", "attention.layer_norm_epsilon", Some(1e-12))?;
    w.put("attention.causal", Value::Bool(false));
    let sentence = w.folder.sentence_transformer()?;
    let modes = sentence.as_ref().map_or(&[PoolingMode::Mean][..], |sentence| &sentence.pooling.modes);
    let pooling = match modes {
        [PoolingMode::Mean] => 1,
        [PoolingMode::Cls] => 2,
        [PoolingMode::LastToken] => 3,
        other => return w.refuse("pooling", format!("{other:?}")),
    };
    w.put("pooling_type", Value::U32(pooling));
    let limit = sentence.as_ref().and_then(|sentence| sentence.max_seq_length);
    if let Some(limit) = limit {
        w.count(LONGEST_TEXT, limit)?;
    }
    Ok(())
}

fn decoder(w: &mut Writer<'_>, built: &Built) -> Result<()> {
    let Built::Decoder(model) = built else { return Ok(()) };
    let (info, model_type) = (&model.info, model.info.model_type.as_str());
    w.copy(&[
        ("hidden_size", "embedding_length"),
        ("num_attention_heads", "attention.head_count"),
        ("intermediate_size", "feed_forward_length"),
    ])?;
    w.count("block_count", info.layers)?;
    w.count("attention.head_count_kv", info.kv_heads)?;
    w.count("attention.key_length", info.head_dim)?;
    w.count("attention.value_length", info.head_dim)?;
    w.count("vocab_size", info.vocab)?;
    w.count("context_length", w.cfg.or("max_position_embeddings", info.max_positions)?)?;
    let eps = if ["mixtral", "phi3"].contains(&model_type) { 1e-5 } else { 1e-6 };
    w.number("rms_norm_eps", "attention.layer_norm_rms_epsilon", Some(eps))?;
    let activation = w.cfg.optional::<String>("hidden_act")?;
    match activation.as_deref() {
        Some(other) if other != "silu" && !model_type.starts_with("gemma") => {
            w.refuse("hidden_act", other)?
        }
        _ => {}
    }
    rope(w, info.head_dim, info.max_positions, model_type)?;
    windows(w, built, model_type)?;
    family(w, model_type)
}

fn rope(w: &mut Writer<'_>, head_dim: usize, max_positions: usize, model_type: &str) -> Result<()> {
    let section = match w.cfg.section("rope_parameters")? {
        Some(section) => Some(section),
        None => w.cfg.section("rope_scaling")?,
    };
    // Gemma 3 keeps one object for each kind of layer.
    let local = section.as_ref().map_or(Ok(None), |section| section.section("sliding_attention"))?;
    let full = section.as_ref().map_or(Ok(None), |section| section.section("full_attention"))?;
    let section = full.or(section);
    let default = if model_type == "gemma3_text" { 1_000_000.0 } else { 10_000.0 };
    let top = w.cfg.optional::<f64>("rope_theta")?;
    let inner = section.as_ref().map_or(Ok(None), |section| section.optional::<f64>("rope_theta"))?;
    let theta = inner.or(top).unwrap_or(default);
    w.put("rope.freq_base", Value::F32(theta as f32));
    if model_type == "gemma3_text" {
        let inner = local.as_ref().map_or(Ok(None), |section| section.optional::<f64>("rope_theta"))?;
        let theta = inner.or(w.cfg.optional::<f64>("rope_local_base_freq")?).unwrap_or(10_000.0);
        w.put("rope.freq_base_swa", Value::F32(theta as f32));
    }
    let partial = match &section {
        Some(section) => section.optional::<f64>("partial_rotary_factor")?,
        None => None,
    };
    let partial = partial.or(w.cfg.optional::<f64>("partial_rotary_factor")?).unwrap_or(1.0);
    w.count("rope.dimension_count", (head_dim as f64 * partial) as usize)?;
    let Some(section) = section else { return Ok(()) };
    w.partial = Some(partial);
    let old = section.optional::<String>("type")?;
    let kind = section.optional::<String>("rope_type")?.or(old).unwrap_or_else(|| "default".to_owned());
    scaling(w, &section, &kind, RopeDefaults { head_dim, theta, max_positions, longrope_aliases: LONGROPE })
}

const LONGROPE: &[&str] = &["su"];

fn scaling(w: &mut Writer<'_>, section: &ConfigReader, kind: &str, defaults: RopeDefaults) -> Result<()> {
    let original = section.optional::<usize>("original_max_position_embeddings")?;
    let original = original.or(w.cfg.optional("original_max_position_embeddings")?);
    match kind {
        "default" => Ok(()),
        "linear" => {
            w.put("rope.scaling.type", Value::String("linear".to_owned()));
            let factor = section.required::<f64>("factor")?;
            w.put("rope.scaling.factor", Value::F32(factor as f32));
            Ok(())
        }
        "yarn" => {
            for field in
                ["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"]
            {
                if section.has(field) {
                    return w.refuse(&format!("rope_scaling.{field}"), "a value of its own");
                }
            }
            w.put("rope.scaling.type", Value::String("yarn".to_owned()));
            let factor = section.required::<f64>("factor")?;
            w.put("rope.scaling.factor", Value::F32(factor as f32));
            w.count("rope.scaling.original_context_length", original.unwrap_or(defaults.max_positions))
        }
        "llama3" => {
            let rope = Rope::from_section(section, defaults, w.partial, original)?;
            let plain = Rope::plain(defaults.theta, rope.rotary_dim);
            let pairs = plain.frequencies(0).into_iter().zip(rope.frequencies(0));
            let factors = pairs.map(|(plain, scaled)| plain / scaled).collect();
            w.tensors.push(("rope_freqs.weight".to_owned(), factors));
            Ok(())
        }
        "longrope" | "su" => {
            let rope = Rope::from_section(section, defaults, w.partial, original)?;
            for (field, name) in [("long_factor", "long"), ("short_factor", "short")] {
                let factors = section.required::<Vec<f64>>(field)?.iter().map(|&f| f as f32).collect();
                w.tensors.push((format!("rope_factors_{name}.weight"), factors));
            }
            w.put("rope.scaling.attn_factor", Value::F32(rope.scale as f32));
            w.count("rope.scaling.original_context_length", original.unwrap_or(defaults.max_positions))
        }
        other => w.refuse("rope_scaling.rope_type", other),
    }
}

/// Windows: gemma and phi3 have a key, gemma's with the layers that slide where they are not those of its generation; elsewhere a file
/// means full attention.
fn windows(w: &mut Writer<'_>, built: &Built, model_type: &str) -> Result<()> {
    let nodes = built.graph().nodes().filter_map(|(_, node)| node.op.downcast::<Attention>());
    let found: Vec<Option<usize>> = nodes.map(|attention| attention.window).collect();
    let Some(window) = found.iter().copied().flatten().next() else { return Ok(()) };
    let period = match model_type {
        "gemma2" => Some(2),
        "gemma3_text" => Some(6),
        _ => None,
    };
    let slides: Vec<bool> = found.iter().map(Option::is_some).collect();
    let usual = |layer: usize| period.is_none_or(|period| !(layer + 1).is_multiple_of(period));
    let as_usual = slides.iter().enumerate().all(|(layer, &slides)| slides == usual(layer));
    let keyed = period.is_some() || model_type == "phi3";
    if !keyed || period.is_none() && !as_usual || found.iter().flatten().any(|&other| other != window) {
        return w.refuse("sliding_window", format!("windows {found:?}"));
    }
    if !as_usual {
        w.put(SLIDING_LAYERS, Value::Array(Array::Bool(slides)));
    }
    w.count("attention.sliding_window", window)
}

fn family(w: &mut Writer<'_>, model_type: &str) -> Result<()> {
    match model_type {
        "mixtral" => {
            let (count, used) = (w.cfg.or("num_local_experts", 8)?, w.cfg.or("num_experts_per_tok", 2)?);
            w.count("expert_count", count)?;
            w.count("expert_used_count", used)
        }
        "qwen2_moe" | "qwen3_moe" => {
            w.copy(&[
                ("num_experts", "expert_count"),
                ("num_local_experts", "expert_count"),
                ("num_experts_per_tok", "expert_used_count"),
                ("moe_intermediate_size", "expert_feed_forward_length"),
                ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
            ])?;
            let renormalised = w.cfg.or("norm_topk_prob", false)?;
            if renormalised != (model_type == "qwen3_moe") {
                w.refuse("norm_topk_prob", renormalised)?;
            }
            Ok(())
        }
        "gemma2" | "gemma3_text" => {
            let caps = if model_type == "gemma2" { [Some(50.0), Some(30.0)] } else { [None, None] };
            w.number("attn_logit_softcapping", "attn_logit_softcapping", caps[0])?;
            w.number("final_logit_softcapping", "final_logit_softcapping", caps[1])
        }
        _ => Ok(()),
    }
}
