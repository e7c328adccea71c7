//! The golden checkpoints written as GGUF and opened again: same logits, same embeddings, same token ids.

use crate::cpu::stepped;
use crate::goldens::{Golden, folders, ids_of, largest_difference, name_of, open_folder, range};
use rlx::backend::cpu::Precision;
use rlx::import::gguf::{GgufLoader, Metadata, TensorEntry, Value, encode_header};
use rlx::weights::WeightLoader;
use rlx_models::gguf::GgufModel;
use rlx_models::gguf::export::{SCHEMES, Scheme, export};
use rlx_models::template::{ChatTemplate, Message};
use rlx_models::{Built, Model, OpenOptions};
use rlx_tensor::DType;
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};

const OPTIONS: OpenOptions = OpenOptions {
    threads: None,
    isa: None,
    precision: Some(Precision::F32),
    cache_dtype: None,
    beside: None,
    adapter_dtype: None,
    expert_budget: None,
};

/// Texts that tokenizers are known to disagree on.
pub const HOSTILE: &[&str] = &[
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n a\r\n\tb  \n",
    "Mia and her dog Rex went to the forest.",
    "  two  spaces, a\ttab and\na newline\n\n",
    "Numbers: 7, 42, 2026, 1234567, ½ ² ٣ 三",
    "Grüße, naïve café, été, Ünïcödé",
    "你好，世界。日本語テキスト。한국어",
    "مرحبا بالعالم שלום",
    "🙂👩‍👩‍👧‍👦 flags 🇨🇭 \u{1F3FD}",
    "don't I'LL we've they'Re 'tis o'clock ''s",
    "<s> is not special? </s> <unk> [CLS] [SEP] [MASK] <|endoftext|> <|im_start|>user",
    "e\u{301} and é, ﬁ ligature, Å \u{212B}",
    "zero\u{200B}width\u{FEFF}bom\u{00AD}soft\u{00A0}nbsp\u{3000}wide",
    "control \u{1}\u{7f}\u{85} nul\u{0}end",
    "https://example.org/a?b=c&d=%20#e_f-g foo_bar::baz(qux)[0]{1}==!=>=<=",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "▁underscore▁like▁sentencepiece ▁ ▁▁",
    "\u{E000}private \u{10FFFF}last \u{FFFD}replacement",
    "##pieces ##and #hash",
    "x",
];

/// A change to a config, so that the format has a place for the model.
pub type Patch = fn(&mut Json);

pub fn unchanged(_: &mut Json) {}

fn full_attention(config: &mut Json) {
    config["sliding_window"] = Json::Null;
    config["use_sliding_window"] = json!(false);
    config.as_object_mut().unwrap().remove("layer_types");
}

fn mean_experts(config: &mut Json) {
    config["norm_topk_prob"] = json!(false);
}

fn mistral_full(config: &mut Json) {
    config["sliding_window"] = Json::Null;
}

/// Folder, change, and whether every bit of the logits is the same (else they agree to a few roundings of the frequencies).
const CASES: &[(&str, Patch, bool)] = &[
    ("gemma2", unchanged, false),
    ("gemma3", unchanged, true),
    ("gemma3-published", unchanged, false),
    ("gpt2", unchanged, true),
    ("gpt2-prefixed", unchanged, true),
    ("llama", unchanged, true),
    ("llama-bf16", unchanged, true),
    ("llama-bias-llama3", unchanged, false),
    ("llama-f16", unchanged, true),
    ("llama-linear", unchanged, true),
    ("llama-sharded", unchanged, true),
    ("llama-yarn", unchanged, true),
    ("mistral", mistral_full, true),
    ("mistral-full", unchanged, true),
    ("mixtral", unchanged, true),
    ("mixtral-window", mistral_full, true),
    ("phi3", unchanged, true),
    ("phi3-longrope", unchanged, false),
    ("qwen2", unchanged, true),
    ("qwen2-moe", unchanged, true),
    ("qwen2-moe-mixed", mean_experts, true),
    ("qwen2-window", full_attention, true),
    ("qwen3", unchanged, true),
    ("qwen3-bias-window", full_attention, true),
    ("qwen3-moe", unchanged, true),
];

/// What the format has no place for, and the field that says so.
const REFUSED: &[(&str, &str)] = &[
    ("bert-max-st6", "pooling"),
    ("distilbert", "model_type"),
    ("llama-dynamic", "rope_type"),
    ("llama-yarn-explicit", "attention_factor"),
    ("mistral", "sliding_window"),
    ("qwen2-moe-mixed", "norm_topk_prob"),
    ("qwen2-window", "sliding_window"),
    ("roberta", "model_type"),
];

fn golden_folder(name: &str) -> PathBuf {
    folders().into_iter().find(|folder| name_of(folder) == name).unwrap_or_else(|| panic!("no {name}"))
}

/// A copy of a golden folder with another config.
pub fn patched(name: &str, patch: Patch, into: &Path) -> PathBuf {
    let copy = into.join(name);
    copy_folder(&golden_folder(name), &copy);
    let path = copy.join("config.json");
    let mut config: Json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    patch(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    copy
}

pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

/// The checkpoint of a folder as a GGUF file beside it.
pub fn written(folder: &Path, scheme: &str) -> PathBuf {
    let path = folder.with_extension(format!("{scheme}.gguf"));
    export(&open_folder(folder), &path, Scheme::named(scheme).unwrap(), |_, _| {})
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    path
}

fn logits(model: &Model, prompts: &[Vec<u32>]) -> Vec<f32> {
    let Built::Decoder(decoder) = model.built() else { panic!("not a decoder") };
    prompts.iter().flat_map(|prompt| stepped(model, decoder, prompt, prompt.len()).concat()).collect()
}

#[test]
fn a_checkpoint_written_as_gguf_gives_the_logits_of_its_folder() {
    let temporary = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for (name, patch, exact) in CASES {
        let folder = patched(name, *patch, temporary.path());
        let golden = Golden::open(&folder);
        let prompts = golden.ids("prompts");
        let expected = logits(&Model::open_with(&folder, &OPTIONS).unwrap(), &prompts);
        let model = Model::open_with(written(&folder, "F32"), &OPTIONS)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(model.built().unused().is_empty(), "{name}: {:?}", model.built().unused());
        let found = logits(&model, &prompts);
        let worst = largest_difference(&found, &expected) / range(&expected);
        println!("{name}: {worst:.1e}");
        let same = found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
        // One rounding of a frequency turns the angle at position 128 by 128 * 2^-24.
        if !(same || !exact && worst <= 1e-5) {
            wrong.push(format!("{name}: logits differ by {worst} of their range"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn half_precision_checkpoints_keep_their_type() {
    let temporary = tempfile::tempdir().unwrap();
    for (name, scheme) in [("llama-bf16", "BF16"), ("llama-f16", "F16")] {
        let folder = patched(name, unchanged, temporary.path());
        let prompts = Golden::open(&folder).ids("prompts");
        let expected = logits(&Model::open_with(&folder, &OPTIONS).unwrap(), &prompts);
        let found = logits(&Model::open_with(written(&folder, scheme), &OPTIONS).unwrap(), &prompts);
        assert!(found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}");
    }
}

#[test]
fn an_encoder_written_as_gguf_gives_the_embeddings_of_its_folder() {
    let temporary = tempfile::tempdir().unwrap();
    for name in ["bert-mean", "bert-cls"] {
        let folder = patched(name, unchanged, temporary.path());
        let from_folder = Model::open_with(&folder, &OPTIONS).unwrap();
        let from_file = Model::open_with(written(&folder, "F32"), &OPTIONS).unwrap();
        let texts: Vec<&str> = HOSTILE.iter().copied().filter(|text| text.len() < 100).collect();
        let (expected, found) = (from_folder.embed(&texts).unwrap(), from_file.embed(&texts).unwrap());
        for ((a, b), text) in found.iter().zip(&expected).zip(&texts) {
            // A folder may leave vectors as long as they are; files do not say.
            let length = b.iter().map(|v| v * v).sum::<f32>().sqrt();
            let scaled: Vec<f32> = b.iter().map(|v| v / length).collect();
            let worst = largest_difference(a, &scaled);
            assert!(worst <= 1e-6, "{name} {text:?}: {worst}");
        }
    }
}

#[test]
fn tokenizers_from_metadata_equal_those_of_their_folders_on_hostile_texts() {
    let temporary = tempfile::tempdir().unwrap();
    let names = CASES.iter().map(|(name, patch, _)| (*name, *patch));
    let (mut compared, mut wrong) = (0, Vec::new());
    for (name, patch) in names.chain(["bert-mean", "bert-cls"].map(|name| (name, unchanged as Patch))) {
        let folder = patched(name, patch, temporary.path());
        let from_folder = Model::open_with(&folder, &OPTIONS).unwrap();
        let from_file = Model::open_with(written(&folder, "F32"), &OPTIONS).unwrap();
        for text in HOSTILE {
            for special in [false, true] {
                let expected = from_folder.tokenizer().encode(text, special).unwrap();
                let found = from_file.tokenizer().encode(text, special).unwrap();
                if found != expected {
                    wrong.push(format!("{name}: {text:?}, special {special}: {found:?} for {expected:?}"));
                }
                let texts =
                    [&from_folder, &from_file].map(|m| m.tokenizer().decode(&expected, false).unwrap());
                assert_eq!(texts[0], texts[1], "{name}: {text:?} decoded");
                compared += 1;
            }
        }
        let same = |token| from_folder.tokenizer().token(token) == from_file.tokenizer().token(token);
        assert!((0..280).all(same), "{name}: vocabularies differ");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("{compared} encodings equal");
}

#[test]
fn the_ids_of_transformers_come_out_of_metadata() {
    let temporary = tempfile::tempdir().unwrap();
    for (name, patch, _) in CASES {
        let folder = patched(name, *patch, temporary.path());
        let golden = Golden::open(&folder);
        let model = Model::open_with(written(&folder, "F32"), &OPTIONS).unwrap();
        for case in golden.json["tokenizer"].as_array().into_iter().flatten() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(
                model.tokenizer().encode(text, true).unwrap(),
                ids_of(&case["ids"]),
                "{name}: {text:?}"
            );
        }
    }
}

#[test]
fn a_chat_template_travels_in_the_metadata() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = patched("gemma2", unchanged, temporary.path());
    let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let messages = [message("user", "Hello"), message("assistant", "Hi"), message("user", "Bye")];
    let expected = ChatTemplate::open(&open_folder(&folder)).unwrap().render(&messages, true).unwrap();
    let model = GgufModel::open(written(&folder, "F32")).unwrap();
    let found = ChatTemplate::open(&model.folder().unwrap()).unwrap().render(&messages, true).unwrap();
    assert_eq!(found, expected);
}

#[test]
fn every_scheme_writes_a_file_that_opens_and_stays_near_the_folder() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("demo");
    copy_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo"), &folder);
    let from_folder = Model::open_with(&folder, &OPTIONS).unwrap();
    let prompt = from_folder.tokenizer().encode("Once upon a time, Mia and her dog", true).unwrap();
    let prompts = [prompt];
    let expected = logits(&from_folder, &prompts);
    let mut errors = std::collections::BTreeMap::new();
    for scheme in SCHEMES {
        let path = written(&folder, scheme.name);
        let file = GgufLoader::open(&path).unwrap();
        let dtype = |name: &str| file.tensor(name).unwrap().unwrap().dtype;
        // Rows of 128 are no superblocks: the type of 32 with at least as many bits stands in.
        let plain = match scheme.plain {
            DType::Q4_K => DType::Q5_0,
            DType::Q5_K => DType::Q5_1,
            DType::Q6_K => DType::Q8_0,
            other => other,
        };
        assert_eq!(dtype("blk.1.attn_q.weight"), plain, "{}", scheme.name);
        assert_eq!(dtype("blk.1.attn_norm.weight"), DType::F32);
        let found = logits(&Model::open_with(&path, &OPTIONS).unwrap(), &prompts);
        let worst = largest_difference(&found, &expected) / range(&expected);
        println!("{}: {worst:.1e}", scheme.name);
        errors.insert(scheme.name, worst);
    }
    assert_eq!((errors["F32"], errors["BF16"]), (0.0, 0.0));
    // Half a step of 8 bits is 1/254 of a block's largest; of 4 bits 1/16.
    assert!(errors["Q8_0"] < 0.01 && errors["Q6_K"] < 0.02, "{errors:?}");
    assert!(errors["Q4_0"] > errors["Q8_0"] && errors["Q4_0"] < 0.2, "{errors:?}");
}

#[test]
fn what_the_format_has_no_place_for_is_refused_and_nothing_is_left_behind() {
    let temporary = tempfile::tempdir().unwrap();
    for (name, field) in REFUSED {
        let path = temporary.path().join("out.gguf");
        let scheme = Scheme::named("q8_0").unwrap();
        let error =
            export(&open_folder(&golden_folder(name)), &path, scheme, |_, _| {}).unwrap_err().to_string();
        assert!(error.contains(field), "{name}: {error}");
    }
    assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 0);
}

fn file_of(path: &Path, entries: &[(&str, Value)], tensors: &[TensorEntry]) {
    let mut metadata = Metadata::new(path);
    entries.iter().for_each(|(key, value)| assert!(metadata.insert(key, value.clone())));
    let mut bytes = encode_header(&metadata, tensors, 32).unwrap();
    let data: usize = tensors.iter().map(|t| t.bytes().unwrap().next_multiple_of(32)).sum();
    bytes.resize(bytes.len() + data, 0);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn metadata_that_is_not_understood_is_an_error_that_lists_what_is() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("m.gguf");
    let text = |text: &str| Value::String(text.to_owned());
    let embedding = TensorEntry { name: "token_embd.weight".into(), dims: vec![4, 8], dtype: DType::F32 };
    let opened = |entries: &[(&str, Value)]| {
        file_of(&path, entries, std::slice::from_ref(&embedding));
        GgufModel::open(&path).and_then(|model| model.tokenizer(4).map(|_| ())).unwrap_err().to_string()
    };
    let cases: [(&[(&str, Value)], &str); 4] = [
        (&[], "`general.architecture` is missing"),
        (&[("general.architecture", text("rwkv7"))], "one of llama, qwen2"),
        (&[("general.architecture", Value::U8(3))], "expected the name"),
        (&[("general.architecture", text("llama"))], "embedding_length"),
    ];
    for (entries, message) in cases {
        let error = opened(entries);
        assert!(
            error.contains("m.gguf") && (error.contains(message) || message.contains("expected")),
            "{error}"
        );
    }
    let gpt2 = |key: &'static str, value: Value| {
        let one = |value: &str| Value::Array(rlx::import::gguf::Array::String(vec![value.to_owned()]));
        let mut entries = vec![
            ("general.architecture", text("gpt2")),
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.tokens", one("a")),
            ("tokenizer.ggml.merges", one("a b")),
        ];
        entries.retain(|(known, _)| *known != key);
        entries.push((key, value));
        opened(&entries)
    };
    let unknown = gpt2("tokenizer.ggml.pre", text("no-such-cut"));
    assert!(unknown.contains("llama-bpe") && unknown.contains("`no-such-cut`"), "{unknown}");
    let unknown = gpt2("tokenizer.ggml.model", text("rwkv"));
    assert!(unknown.contains("one of llama, gpt2, bert"), "{unknown}");
}

fn llama_cpp_data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data/gguf")
}

#[test]
fn a_nomic_bert_file_gives_the_ids_and_embeddings_of_llama_cpp() {
    let folder = llama_cpp_data();
    let model = Model::open_with(folder.join("nomic-bert.gguf"), &OPTIONS).unwrap();
    let cases: Json =
        serde_json::from_slice(&std::fs::read(folder.join("nomic-bert.json")).unwrap()).unwrap();
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(model.tokenizer().encode(text, true).unwrap(), ids_of(&case["ids"]), "{text}");
        let expected: Vec<f32> =
            case["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let worst = largest_difference(&model.embed(&[text]).unwrap()[0], &expected);
        println!("{text}: {worst:.1e}");
        assert!(worst <= 1e-5, "{text}: {worst}");
    }
}

/// llama.cpp reads GELU from a table of f16 values: half a step of 2^-11 at every unit.
const GELU_TABLE: f32 = 1e-3;

#[test]
fn the_logits_of_llama_cpp_come_out_of_the_same_files() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = llama_cpp_data();
    let index: Json = serde_json::from_slice(&std::fs::read(folder.join("index.json")).unwrap()).unwrap();
    let index = index.as_object().unwrap();
    assert!(index.len() >= 12);
    for (name, ids) in index {
        let file = written(&patched(name, unchanged, temporary.path()), "F32");
        let model = Model::open_with(file, &OPTIONS).unwrap_or_else(|error| panic!("{name}: {error}"));
        let Built::Decoder(decoder) = model.built() else { panic!("{name}: not a decoder") };
        let found = stepped(&model, decoder, &ids_of(ids), 1).concat();
        let bytes = std::fs::read(folder.join(format!("{name}.bin"))).unwrap();
        let expected: Vec<f32> = bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
        assert_eq!(found.len(), expected.len(), "{name}");
        let worst = largest_difference(&found, &expected) / range(&expected);
        println!("{name}: {worst:.1e}");
        let tolerance = if ["gemma2", "gemma3", "gpt2"].contains(&name.as_str()) { GELU_TABLE } else { 1e-5 };
        assert!(worst <= tolerance, "{name}: logits differ by {worst} of their range");
    }
}

#[test]
fn minilm_as_gguf_embeds_and_tokenizes_as_its_folder() {
    let Some(folder) = std::env::var_os("RLX_TEST_MINILM_DIR") else {
        println!("skipped: RLX_TEST_MINILM_DIR is not set");
        return;
    };
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("minilm.gguf");
    let hf = open_folder(Path::new(&folder));
    let from_folder = Model::open_with(&folder, &OPTIONS).unwrap();
    for (scheme, bound) in [("F32", 0.0), ("Q8_0", 0.02)] {
        export(&hf, &path, Scheme::named(scheme).unwrap(), |_, _| {}).unwrap();
        let from_file = Model::open_with(&path, &OPTIONS).unwrap();
        for text in HOSTILE {
            let [expected, found] =
                [&from_folder, &from_file].map(|m| m.tokenizer().encode(text, true).unwrap());
            assert_eq!(found, expected, "{text:?}");
        }
        let [expected, found] =
            [&from_folder, &from_file].map(|model| model.embed(HOSTILE).unwrap().concat());
        let worst = largest_difference(&found, &expected);
        println!("{scheme}: {worst:.1e}");
        assert!(worst <= bound, "{scheme}: {worst}");
    }
}
