//! Configs, checkpoints, tokenizers and requests that must be refused, each with a message that says what and where.

use crate::goldens::{folders, name_of, open, open_folder};
use crate::interpreter::InterpretedDecoder;
use rlx::import::hf::ConfigReader;
use rlx::weights::{BytesWeightLoader, WeightLoader};
use rlx_models::generate::{CancelToken, DecoderLimits, FinishReason, GenerateOptions, Generation, generate};
use rlx_models::sampling::SamplingOptions;
use rlx_models::tokenizer::TextTokenizer;
use rlx_models::{BuildOptions, Built, ModelError, build};
use rlx_tensor::DType;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

type Tensors = Vec<(String, Vec<usize>, DType, Vec<u8>)>;

fn folder(name: &str) -> PathBuf {
    folders().into_iter().find(|folder| name_of(folder) == name).unwrap()
}

/// Builds a golden folder after a change to its config and its tensors.
fn rebuilt(name: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> Result<Built, ModelError> {
    let folder = folder(name);
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let weights = open_folder(&folder).weights().unwrap();
    let mut tensors: Tensors = weights
        .names()
        .map(|name| {
            let view = weights.tensor(name).unwrap().unwrap();
            (name.to_owned(), view.dims.to_vec(), view.dtype, view.bytes.to_vec())
        })
        .collect();
    change(&mut config, &mut tensors);
    let cfg = ConfigReader::from_bytes("m/config.json", config.to_string().as_bytes()).unwrap();
    let loader = BytesWeightLoader::from_typed(tensors).unwrap();
    build(&cfg, &loader, None, &BuildOptions::default())
}

fn refusal(name: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> String {
    rebuilt(name, change).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn an_unknown_model_type_lists_the_known_ones() {
    let text = refusal("llama", |config, _| config["model_type"] = json!("mamba"));
    assert!(
        text.contains("m/config.json") && text.contains("`mamba`") && text.contains("bert, distilbert"),
        "{text}"
    );
    let text = refusal("llama", |config, _| drop(config.as_object_mut().unwrap().remove("model_type")));
    assert!(text.contains("model_type"), "{text}");
}

#[test]
fn a_field_that_may_matter_is_not_ignored() {
    let text = refusal("llama", |config, _| config["residual_scale"] = json!(0.5));
    assert!(text.contains("`residual_scale` = 0.5"), "{text}");
    let text = refusal("llama-yarn", |config, _| config["rope_scaling"]["beta"] = json!(3));
    assert!(text.contains("`rope_scaling.beta` = 3"), "{text}");
    let text = refusal("bert-mean", |config, _| config["position_embedding_type"] = json!("relative_key"));
    assert!(text.contains("position_embedding_type") && text.contains("relative_key"), "{text}");
    let text = refusal("gemma3", |config, _| config["use_bidirectional_attention"] = json!(true));
    assert!(text.contains("use_bidirectional_attention"), "{text}");
}

#[test]
fn fields_of_published_configs_that_do_not_matter_are_understood() {
    let cases = [
        (
            "llama",
            json!({"is_llama_config": true, "rope_interleaved": false, "transformers.js_config": {"dtype": "q4"},
                   "_name_or_path": "x", "unsloth_fixed": true}),
        ),
        (
            "bert-mean",
            json!({"gradient_checkpointing": false, "position_embedding_type": "absolute", "pooler_type": "first"}),
        ),
        (
            "gpt2",
            json!({"n_ctx": 80, "summary_type": "cls_index", "task_specific_params": {"text-generation": {"max_length": 50}}}),
        ),
        ("gemma2", json!({"hidden_act": "gelu", "cache_implementation": "hybrid"})),
        (
            "phi3",
            json!({"auto_map": {"AutoConfig": "x"}, "attention_bias": false, "lm_head_bias": false, "full_attn_mod": 1}),
        ),
        ("mixtral", json!({"router_jitter_noise": 0.0, "router_aux_loss_coef": 0.02})),
        ("qwen3-moe", json!({"max_window_layers": 48, "num_experts": 8})),
    ];
    for (name, extra) in cases {
        let built = rebuilt(name, |config, _| {
            config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        });
        assert!(built.is_ok(), "{name}: {}", built.unwrap_err());
    }
}

#[test]
fn a_config_that_contradicts_itself_names_the_field() {
    let cases: [(&str, &str, Value, &str); 8] = [
        ("llama", "num_key_value_heads", json!(3), "num_key_value_heads"),
        ("llama", "hidden_act", json!("relu6"), "relu6"),
        ("llama", "hidden_size", json!("48"), "hidden_size"),
        ("llama", "rope_theta", json!(0.0), "rope_theta"),
        ("llama-linear", "rope_scaling", json!({"type": "spiral", "factor": 2.0}), "spiral"),
        ("phi3-longrope", "partial_rotary_factor", json!(0.7), "partial_rotary_factor"),
        ("qwen3-bias-window", "layer_types", json!(["full_attention"]), "layer_types"),
        ("qwen2-moe", "num_experts_per_tok", json!(7), "num_experts_per_tok"),
    ];
    for (name, field, value, expected) in cases {
        let text = refusal(name, |config, _| config[field] = value);
        assert!(text.contains("m/config.json") && text.contains(expected), "{name}.{field}: {text}");
    }
}

#[test]
fn tensors_that_do_not_fit_the_config_are_named() {
    let text = refusal("llama", |_, tensors| tensors.retain(|(name, ..)| name != "model.norm.weight"));
    assert_eq!(text, "tensor `model.norm.weight` of shape [48] is missing from the checkpoint");
    let text = refusal("llama", |config, _| config["intermediate_size"] = json!(88));
    assert!(
        text.contains("mlp.gate_proj.weight") && text.contains("[88, 48]") && text.contains("[80, 48]"),
        "{text}"
    );
    let text = refusal("llama", |config, _| config["tie_word_embeddings"] = json!(false));
    assert!(text.contains("lm_head.weight"), "{text}");
    let text = refusal("llama-bias-llama3", |config, _| config["attention_bias"] = json!(false));
    assert!(text.contains("self_attn.q_proj.bias") || text.contains("_proj.bias"), "{text}");
    let text = refusal("llama", |_, tensors| {
        let norm = tensors.iter_mut().find(|(name, ..)| name == "model.norm.weight").unwrap();
        (norm.2, norm.3) = (DType::I32, vec![0; 48 * 4]);
    });
    assert!(text.contains("model.norm.weight") && text.contains("i32"), "{text}");
}

#[test]
fn tensors_that_are_not_used_are_reported() {
    let built = rebuilt("gpt2", |_, _| ()).unwrap();
    assert_eq!(built.unused(), ["h.0.attn.bias", "h.1.attn.bias"]);
    assert!(rebuilt("llama", |_, _| ()).unwrap().unused().is_empty());
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let path = folder("gemma2").join("tokenizer.json");
    let error = TextTokenizer::open(&path, 300).unwrap_err();
    assert!(matches!(error, ModelError::Vocabulary { vocab: 300, id, .. } if id >= 300), "{error}");
    let text = TextTokenizer::open(&folder("gemma2").join("absent.json"), 300).unwrap_err().to_string();
    assert!(text.contains("absent.json"), "{text}");
    let text = TextTokenizer::open(&folder("gemma2").join("config.json"), 300).unwrap_err().to_string();
    assert!(text.contains("config.json"), "{text}");
    let tokenizer = TextTokenizer::open(&folder("bert-mean").join("tokenizer.json"), 320).unwrap();
    assert!(tokenizer.for_sentences(2, false).is_err());
}

fn started(
    prompt: &[u32],
    limits: DecoderLimits,
    change: impl FnOnce(&mut GenerateOptions),
) -> Result<Generation<InterpretedDecoder>, ModelError> {
    let (built, weights) = open(&folder("llama"));
    let Built::Decoder(model) = built else { panic!("llama is a decoder") };
    let runtime = InterpretedDecoder::new(&model, &weights, limits);
    let mut options = GenerateOptions::greedy(4, Vec::new());
    change(&mut options);
    generate(runtime, &model.info, prompt, options)
}

const ROOMY: DecoderLimits = DecoderLimits { max_rows: 16, blocks: 4, table: 4, outs: 8, window: None };

#[test]
fn requests_that_do_not_fit_are_refused_before_anything_runs() {
    let refused = |prompt: &[u32], limits, change: fn(&mut GenerateOptions)| {
        started(prompt, limits, change).map(|_| ()).unwrap_err()
    };
    assert!(matches!(refused(&[], ROOMY, |_| ()), ModelError::EmptyPrompt));
    assert!(matches!(refused(&[288], ROOMY, |_| ()), ModelError::TokenId { id: 288, vocab: 288 }));
    let long = refused(&[5; 125], ROOMY, |_| ());
    assert!(
        matches!(long, ModelError::Context { prompt_tokens: 125, new_tokens: 4, limit: 128, .. }),
        "{long}"
    );
    assert!(started(&[5; 124], ROOMY, |_| ()).is_ok());
    let asked = refused(&[5; 9], ROOMY, |options| options.context = Some(12));
    assert!(matches!(asked, ModelError::Context { limit: 12, .. }), "{asked}");
    let small = refused(&[5; 62], DecoderLimits { blocks: 1, ..ROOMY }, |_| ());
    assert!(matches!(small, ModelError::Context { limit: 64, .. }), "{small}");
    let hot = refused(&[5], ROOMY, |options| {
        options.sampling = SamplingOptions { temperature: -1.0, ..SamplingOptions::greedy() };
    });
    assert!(matches!(hot, ModelError::Setting { setting: "temperature", .. }), "{hot}");
}

#[test]
fn a_text_ends_for_the_reason_it_says() {
    let mut text = started(&[90], ROOMY, |_| ()).unwrap();
    let tokens: Vec<u32> = text.by_ref().map(|token| token.unwrap()).collect();
    assert_eq!((tokens.len(), text.finish_reason()), (4, Some(FinishReason::Length)));
    let mut text = started(&[90], ROOMY, |options| options.stop = vec![tokens[2]]).unwrap();
    let stopped: Vec<u32> = text.by_ref().map(|token| token.unwrap()).collect();
    assert_eq!((stopped.as_slice(), text.finish_reason()), (&tokens[..2], Some(FinishReason::Stop)));
    assert_eq!((text.tokens()[0], text.new_tokens()), (90, &tokens[..2]));
}

#[test]
fn a_cancelled_or_late_generation_ends_with_that_error() {
    let cancel = CancelToken::new();
    let mut text = started(&[90], ROOMY, |options| options.cancel = cancel.clone()).unwrap();
    assert!(text.next().unwrap().is_ok());
    cancel.cancel();
    assert!(matches!(text.next(), Some(Err(ModelError::Cancelled))));
    assert!(text.next().is_none());
    let mut late = started(&[90], ROOMY, |options| options.deadline = Some(Instant::now())).unwrap();
    assert!(matches!(late.next(), Some(Err(ModelError::Deadline))));
}

#[test]
fn the_same_seed_gives_the_same_sampled_text() {
    let sampled = |seed| {
        let text = started(&[90], ROOMY, |options| {
            options.max_new_tokens = 12;
            options.sampling = SamplingOptions { temperature: 1.0, seed, ..SamplingOptions::greedy() };
        });
        text.unwrap().map(|token| token.unwrap()).collect::<Vec<u32>>()
    };
    assert_eq!(sampled(3), sampled(3));
    assert_ne!(sampled(3), sampled(4));
}
