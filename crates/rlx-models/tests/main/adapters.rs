//! Low-rank adapters: the answers of peft, rows that share a batch, swaps while others generate, what is refused.

use crate::goldens::{Golden, largest_difference, open_folder, range};
use rlx::backend::Backend;
use rlx::backend::cpu::CpuBackend;
use rlx::import::gguf::{Metadata, TensorEntry, Value, encode_header};
use rlx::weights::WeightLoader;
use rlx_kernels::isa::Isa;
use rlx_models::batch::{Batch, BatchEvent, BatchOptions, BatchRequest};
use rlx_models::generate::{CancelToken, DecoderRuntime, SequenceStep, StepInputs};
use rlx_models::gguf::export::{Scheme, export};
use rlx_models::kv::{BlockPool, BlockTable};
use rlx_models::runtime::DecoderRunner;
use rlx_models::sampling::SamplingOptions;
use rlx_models::{Built, Model, ModelError, OpenOptions, TextOptions};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn data(kind: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data").join(kind).join(name)
}

fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(name)
}

fn open_on(folder: &Path, isa: Isa, threads: usize) -> Model {
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(isa, threads));
    Model::on_backend(open_folder(folder), &OpenOptions::default(), backend).unwrap()
}

fn open(name: &str) -> Model {
    open_on(&data("models", name), Isa::detect(), 2)
}

/// A runner for `batch` sequences with these adapters in its slots.
fn runner(model: &Model, adapters: &[&str], batch: usize) -> DecoderRunner {
    let Built::Decoder(decoder) = model.built() else { panic!("a decoder") };
    let runner = DecoderRunner::with_batch(decoder, Arc::clone(model.compiled()), 128, 128, batch).unwrap();
    let mut runner = runner.with_adapters(model.adapted_graph().unwrap());
    for (slot, name) in adapters.iter().enumerate() {
        runner.set_adapter(slot, Some(model.adapter(name).unwrap())).unwrap();
    }
    runner
}

/// Logits of the last token of each prompt, all run in one step, each with its slot.
fn last_logits(model: &Model, runner: &mut DecoderRunner, rows: &[(&[u32], Option<usize>)]) -> Vec<Vec<f32>> {
    let Built::Decoder(decoder) = model.built() else { panic!("a decoder") };
    let (mut pool, mut inputs) = (BlockPool::of(&runner.limits()), StepInputs::default());
    let mut tables: Vec<BlockTable> = rows.iter().map(|_| BlockTable::new()).collect();
    for (table, (tokens, _)) in tables.iter_mut().zip(rows) {
        pool.reserve(table, tokens.len()).unwrap();
        pool.advance(table, 0, tokens.len()).unwrap();
    }
    inputs.clear(tables.iter().map(|table| table.blocks().len()).max().unwrap());
    for (table, (tokens, slot)) in tables.iter().zip(rows) {
        let step = SequenceStep { tokens, past: 0, length: tokens.len(), table, wants_logits: true };
        inputs.push_adapted(&decoder.info, step, *slot);
    }
    let mut logits = vec![f32::NAN; rows.len() * decoder.info.vocab];
    runner.step(&inputs, &mut logits).unwrap();
    logits.chunks(decoder.info.vocab).map(<[f32]>::to_vec).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_adapter_gives_the_answers_of_peft() {
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(data("adapters", "")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 13, "{folders:?}");
    for folder in folders {
        let golden = Golden::open(&folder);
        let base = data("models", golden.json["model"].as_str().unwrap());
        for isa in Isa::available() {
            let model = open_on(&base, isa, 2);
            model.add_adapter("golden", &folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
            check_golden(&format!("{} on {isa}", folder.display()), &model, &golden);
        }
    }
}

/// Logits of a model with its one adapter, and without, against those of peft.
fn check_golden(label: &str, model: &Model, golden: &Golden) {
    let mut runner = runner(model, &["golden"], 1);
    let (mut worst, mut worst_plain) = (0.0f32, 0.0f32);
    for (i, prompt) in golden.ids("prompts").iter().enumerate() {
        for (slot, name, worst) in [(Some(0), "logits", &mut worst), (None, "plain", &mut worst_plain)] {
            let (dims, expected) = golden.tensor(&format!("{name}_{i}"));
            for end in [1, prompt.len()] {
                let found = last_logits(model, &mut runner, &[(&prompt[..end], slot)]).remove(0);
                let expected = &expected[(end - 1) * dims[1]..end * dims[1]];
                *worst = worst.max(largest_difference(&found, expected) / range(expected));
            }
        }
    }
    println!("{label}: {worst:.1e}, plain {worst_plain:.1e}");
    assert!(worst <= 1e-4 && worst_plain <= 1e-4, "{label}: {worst} {worst_plain}");
}

/// On a device rows with adapters go through the kernels of all adapters at once, and have the bits that they have alone.
#[test]
fn adapters_on_the_first_adapter_of_the_machine() {
    let Some(provider) = rlx_gpu::provider() else {
        println!("skipped: this build has no devices (`--features rlx-gpu/wgpu`)");
        return;
    };
    let backend = provider.open(0, &rlx::config::Config::default()).unwrap();
    let open = |name: &str| {
        Model::on_backend(open_folder(&data("models", name)), &OpenOptions::default(), Arc::clone(&backend))
            .unwrap()
    };
    for (base, adapter) in [("llama", "llama-b"), ("mixtral", "mixtral")] {
        let (model, folder) = (open(base), data("adapters", adapter));
        model.add_adapter("golden", &folder).unwrap();
        check_golden(&format!("{adapter} on {}", backend.name()), &model, &Golden::open(&folder));
        let steps = model.compiled().report().unwrap().steps;
        assert!(steps.iter().all(|step| step.native), "{steps:?}");
        let mixtures = steps.iter().filter(|step| step.op == "moe");
        let whole = mixtures.clone().all(|step| step.kernel.contains("moe_gated_grouped"));
        assert!(whole && (mixtures.count() > 0) == (base == "mixtral"), "{steps:?}");
    }
    let (model, golden) = (open("llama"), Golden::open(&data("adapters", "llama-a")));
    model.add_adapter("a", data("adapters", "llama-a")).unwrap();
    model.add_adapter("b", data("adapters", "llama-b")).unwrap();
    let prompts = golden.ids("prompts");
    let rows: Vec<(&[u32], Option<usize>)> =
        vec![(&prompts[0], Some(0)), (&prompts[1], None), (&prompts[1], Some(1))];
    let together = last_logits(&model, &mut runner(&model, &["a", "b"], rows.len()), &rows);
    for (row, expected) in rows.iter().zip(&together) {
        let alone = last_logits(&model, &mut runner(&model, &["a", "b"], 1), &[*row]).remove(0);
        assert_eq!(bits(&alone), bits(expected), "slot {:?}", row.1);
    }
}

#[test]
fn a_batch_with_adapters_a_b_and_none_gives_each_row_the_bits_it_gets_alone() {
    let golden = Golden::open(&data("adapters", "llama-a"));
    let prompts = golden.ids("prompts");
    for isa in Isa::available() {
        for threads in [1, 2] {
            let model = open_on(&data("models", "llama"), isa, threads);
            model.add_adapter("a", data("adapters", "llama-a")).unwrap();
            model.add_adapter("b", data("adapters", "llama-b")).unwrap();
            let rows: Vec<(&[u32], Option<usize>)> = vec![
                (&prompts[0], Some(0)),
                (&prompts[1], None),
                (&prompts[2], Some(1)),
                (&prompts[1], Some(0)),
                (&prompts[0], None),
                (&prompts[1], Some(1)),
            ];
            let together = last_logits(&model, &mut runner(&model, &["a", "b"], rows.len()), &rows);
            for (row, expected) in rows.iter().zip(&together) {
                // Alone without an adapter is the plain executable.
                let alone = last_logits(&model, &mut runner(&model, &["a", "b"], 1), &[*row]).remove(0);
                assert_eq!(bits(&alone), bits(expected), "{isa} x{threads}, slot {:?}", row.1);
                let swapped = (row.0, row.1.map(|slot| 1 - slot));
                let mut other = runner(&model, &["b", "a"], 1);
                assert_eq!(bits(&last_logits(&model, &mut other, &[swapped])[0]), bits(expected));
            }
        }
    }
}

/// An update in f32 beside weights in blocks: what it adds to the logits is what it adds to those of the folder, but for the blocks'
/// error, and a row's bits are those it has alone.
#[test]
fn adapters_on_weights_in_blocks_add_what_they_add_to_the_folder() {
    let temporary = tempfile::tempdir().unwrap();
    let (folder, path) = (data("models", "mixtral"), temporary.path().join("mixtral.gguf"));
    export(&open_folder(&folder), &path, Scheme::named("Q8_0").unwrap(), |_, _| {}).unwrap();
    let adapter = data("adapters", "mixtral");
    let prompts = Golden::open(&adapter).ids("prompts");
    let rows: Vec<(&[u32], Option<usize>)> =
        prompts.iter().flat_map(|prompt| [(&prompt[..], Some(0)), (&prompt[..], None)]).collect();
    let answers = |model: &Model| {
        model.add_adapter("a", &adapter).unwrap();
        let together = last_logits(model, &mut runner(model, &["a"], rows.len()), &rows);
        for (row, expected) in rows.iter().zip(&together) {
            let alone = last_logits(model, &mut runner(model, &["a"], 1), &[*row]).remove(0);
            assert_eq!(bits(&alone), bits(expected), "slot {:?}", row.1);
        }
        together
    };
    let options = OpenOptions { threads: Some(2), ..OpenOptions::default() };
    let blocks = Model::open_with(&path, &options).unwrap();
    let found = answers(&blocks);
    let adapted = blocks.adapted_graph().unwrap().executables.compiled().report().unwrap();
    let kernels: Vec<&str> = adapted.steps.iter().map(|step| step.kernel.as_str()).collect();
    assert!(kernels.iter().any(|kernel| kernel.starts_with("lora_linear_q8_0")), "{kernels:?}");
    let expected = answers(&open_on(&folder, Isa::detect(), 2));
    for (found, expected) in found.chunks(2).zip(expected.chunks(2)) {
        let added =
            |pair: &[Vec<f32>]| -> Vec<f32> { pair[0].iter().zip(&pair[1]).map(|(a, b)| a - b).collect() };
        let (found, expected) = (added(found), added(expected));
        let worst = largest_difference(&found, &expected) / range(&expected);
        println!("{worst:.1e}");
        assert!(worst <= 0.05, "{worst}");
    }
}

#[test]
fn a_batch_without_adapters_runs_the_plain_schedule() {
    let model = open("llama");
    model.add_adapter("a", data("adapters", "llama-a")).unwrap();
    let plain = model.compiled().report().unwrap();
    assert!(plain.steps.iter().all(|step| step.op != "lora_linear"));
    let packed = model.compiled().weights().packed_bytes();
    let adapted = model.adapted_graph().unwrap().executables.compiled().report().unwrap();
    assert!(adapted.steps.iter().filter(|step| step.op == "lora_linear").count() >= 8);
    assert!(adapted.steps.iter().all(|step| step.native), "{:?}", adapted.steps);
    assert_eq!(plain.steps.len(), adapted.steps.len());
    let held = model.adapter("a").unwrap();
    let plan = model.plan(rlx_models::PlanRequest::default(), 1).unwrap();
    assert_eq!((plan.estimate.adapter_bytes, model.adapter_bytes()), (held.bytes() as u64, held.bytes()));
    assert_eq!(model.compiled().weights().packed_bytes(), packed, "weights are packed once for both");
}

#[test]
fn the_demo_adapter_tells_sailors_tales() {
    let model = open_on(&demo("demo"), Isa::detect(), 2);
    model.add_adapter("sailor", demo("demo-lora")).unwrap();
    let text = |adapter: Option<&str>| {
        let options =
            TextOptions { max_tokens: 60, adapter: adapter.map(str::to_owned), ..TextOptions::default() };
        let pieces = model.generate("Once upon a time, Mia and her dog Rex", &options).unwrap();
        pieces.collect::<Result<String, _>>().unwrap()
    };
    let expected = " went to the island. Aye, aye! Mia went fishing by the river, and Rex sat beside her.";
    assert!(text(Some("sailor")).starts_with(expected), "{}", text(Some("sailor")));
    assert!(!text(None).contains("Aye"));
}

#[test]
fn a_request_keeps_the_adapter_it_started_with_while_others_swap_it() {
    let model = open("llama");
    model.add_adapter("style", data("adapters", "llama-a")).unwrap();
    let prompt = Golden::open(&data("adapters", "llama-a")).ids("prompts")[1].clone();
    let options = |adapter: &str| TextOptions {
        max_tokens: 24,
        adapter: Some(adapter.to_owned()),
        ..TextOptions::default()
    };
    let generate = |adapter: &str| -> Vec<u32> {
        let mut text = model.generate_tokens(&prompt, &options(adapter)).unwrap();
        text.by_ref().for_each(|piece| drop(piece.unwrap()));
        text.token_ids().to_vec()
    };
    let with_a = generate("style");
    model.add_adapter("b", data("adapters", "llama-b")).unwrap();
    let with_b = generate("b");
    assert_ne!(with_a, with_b);
    let (done, swaps) = (AtomicBool::new(false), std::sync::atomic::AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0.. {
                let name = ["llama-b", "llama-a"][i % 2];
                model.replace_adapter("style", data("adapters", name)).unwrap();
                swaps.fetch_add(1, Ordering::Relaxed);
                if done.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        for _ in 0..8 {
            let mut text = model.generate_tokens(&prompt, &options("style")).unwrap();
            let swaps_at_start = swaps.load(Ordering::Relaxed);
            text.next().unwrap().unwrap();
            while swaps.load(Ordering::Relaxed) < swaps_at_start + 2 {
                std::thread::yield_now();
            }
            text.by_ref().for_each(|piece| drop(piece.unwrap()));
            let found = text.token_ids();
            assert!(found == with_a || found == with_b, "a text of two adapters: {found:?}");
        }
        done.store(true, Ordering::Relaxed);
    });
    let mut text = model.generate_tokens(&prompt, &options("b")).unwrap();
    text.next().unwrap().unwrap();
    model.remove_adapter("b").unwrap();
    assert!(matches!(model.adapter("b"), Err(ModelError::UnknownAdapter { .. })));
    text.by_ref().for_each(|piece| drop(piece.unwrap()));
    assert_eq!(text.token_ids(), with_b, "a removed adapter ended a text that ran with it");
    let registry = model.compiled().weights();
    assert_eq!(registry.lora_adapter_names().len(), 1, "{:?}", registry.lora_adapter_names());
}

#[test]
fn texts_of_a_batch_are_those_of_each_alone() {
    let model = open("llama");
    model.add_adapter("a", data("adapters", "llama-a")).unwrap();
    model.add_adapter("b", data("adapters", "llama-b")).unwrap();
    let prompts = Golden::open(&data("adapters", "llama-a")).ids("prompts");
    let options = BatchOptions { sequences: 3, context: 96, adapters: 1, max_age: 2 };
    let mut batch = Batch::new(&model, options).unwrap();
    let mut expected = BTreeMap::new();
    for i in 0..9 {
        let (prompt, adapter) = (&prompts[i % 3], [Some("a"), Some("b"), None][i / 3 % 3]);
        let adapter = adapter.map(str::to_owned);
        let (max_tokens, sampling) = (8 + i, SamplingOptions::greedy());
        let id = batch
            .submit(BatchRequest { prompt: prompt.clone(), max_tokens, sampling, adapter: adapter.clone() })
            .unwrap();
        let mut alone = model
            .generate_tokens(prompt, &TextOptions { max_tokens, adapter, ..TextOptions::default() })
            .unwrap();
        alone.by_ref().for_each(|piece| drop(piece.unwrap()));
        expected.insert(id, (alone.token_ids().to_vec(), alone.finish_reason().unwrap()));
    }
    let mut found: BTreeMap<_, (Vec<u32>, _)> = BTreeMap::new();
    while !batch.is_idle() {
        for event in batch.step().unwrap() {
            match event {
                BatchEvent::Token(id, token) => {
                    found.entry(id).or_insert_with(|| (Vec::new(), None)).0.push(token)
                }
                BatchEvent::Finished(id, reason) => {
                    found.entry(id).or_insert_with(|| (Vec::new(), None)).1 = Some(reason);
                }
            }
        }
    }
    for (id, (tokens, reason)) in expected {
        assert_eq!(found[&id], (tokens, Some(reason)), "{id:?}");
    }
}

/// The adapter of llama-a with a line of its config replaced, or a tensor's name.
fn changed(from: &str, to: &str) -> tempfile::TempDir {
    let (source, folder) = (data("adapters", "llama-a"), tempfile::tempdir().unwrap());
    let config = std::fs::read_to_string(source.join("adapter_config.json")).unwrap();
    let mut weights = std::fs::read(source.join("adapter_model.safetensors")).unwrap();
    if from.len() == to.len() {
        for at in 0..weights.len().saturating_sub(from.len()) {
            if weights[at..].starts_with(from.as_bytes()) {
                weights[at..at + to.len()].copy_from_slice(to.as_bytes());
            }
        }
    }
    std::fs::write(folder.path().join("adapter_config.json"), config.replace(from, to)).unwrap();
    std::fs::write(folder.path().join("adapter_model.safetensors"), weights).unwrap();
    folder
}

#[test]
fn wrong_rank_shape_base_and_side_are_refused_by_name_and_leave_nothing_behind() {
    let model = open("llama");
    let entries = model.compiled().weights().len();
    for (from, to, word) in [
        ("\"r\": 4", "\"r\": 5", "_proj"),
        ("layers.1.mlp.up_proj.lora", "layers.7.mlp.up_proj.lora", "layers.7.mlp.up_proj"),
        ("layers.1.mlp.up_proj.lora_B", "layers.1.mlp.xp_proj.lora_B", "up_proj"),
        ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
        ("\"modules_to_save\": null", "\"modules_to_save\": [\"lm_head\"]", "modules_to_save"),
    ] {
        let folder = changed(from, to);
        let error = model.add_adapter("broken", folder.path()).unwrap_err().to_string();
        assert!(error.contains(word), "{to}: {error}");
        assert_eq!(model.compiled().weights().len(), entries, "{to}");
    }
    let wide = open("qwen3");
    let error = wide.add_adapter("foreign", data("adapters", "llama-a")).unwrap_err().to_string();
    assert!(error.contains("proj"), "{error}");
    assert!(matches!(model.adapter("broken"), Err(ModelError::UnknownAdapter { .. })));
    model.add_adapter("a", data("adapters", "llama-a")).unwrap();
    let twice = model.add_adapter("a", data("adapters", "llama-b"));
    assert!(matches!(twice, Err(ModelError::AdapterExists { name }) if name == "a"));
    let absent = model.replace_adapter("b", data("adapters", "llama-b"));
    assert!(
        matches!(absent, Err(ModelError::UnknownAdapter { name, known }) if name == "b" && known == ["a"])
    );
}

#[test]
fn a_batch_refuses_limits_of_zero_and_unknown_adapters() {
    let model = open("llama");
    let default = BatchOptions { context: 64, ..BatchOptions::default() };
    for (options, word) in [
        (BatchOptions { sequences: 0, ..default }, "max_batch"),
        (BatchOptions { adapters: 0, ..default }, "max_adapters"),
        (BatchOptions { max_age: 0, ..default }, "max_age"),
        (BatchOptions { context: 0, ..default }, "context"),
        (BatchOptions { adapters: 9, ..default }, "adapters"),
    ] {
        let error = Batch::new(&model, options).err().unwrap().to_string();
        assert!(error.contains(word), "{error}");
    }
    let mut batch = Batch::new(&model, default).unwrap();
    let request = |prompt: Vec<u32>, max_tokens, adapter: Option<&str>| BatchRequest {
        prompt,
        max_tokens,
        sampling: SamplingOptions::greedy(),
        adapter: adapter.map(str::to_owned),
    };
    assert!(matches!(batch.submit(request(vec![], 4, None)), Err(ModelError::EmptyPrompt)));
    assert!(matches!(batch.submit(request(vec![1], 64, None)), Err(ModelError::Context { limit: 64, .. })));
    assert!(matches!(batch.submit(request(vec![9999], 4, None)), Err(ModelError::TokenId { .. })));
    let unknown = batch.submit(request(vec![1], 4, Some("nobody")));
    assert!(matches!(unknown, Err(ModelError::UnknownAdapter { .. })));
    assert!(batch.is_idle());
}

/// The adapter of llama-a as a GGUF file: other names, queries and keys with the halves of each head interleaved.
fn as_gguf(folder: &Path, head_dim: usize) -> PathBuf {
    let source = rlx::import::safetensors::SafetensorsLoader::open(
        data("adapters", "llama-a").join("adapter_model.safetensors"),
    )
    .unwrap();
    let path = folder.join("a.gguf");
    let mut metadata = Metadata::new(&path);
    for (key, value) in
        [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", "llama")]
    {
        metadata.insert(key, Value::String(value.to_owned()));
    }
    metadata.insert("adapter.lora.alpha", Value::F32(8.0));
    let (mut entries, mut tensors) = (Vec::new(), Vec::new());
    for name in source.names() {
        let view = source.tensor(name).unwrap().unwrap();
        let stem = name.strip_prefix("base_model.model.model.layers.").unwrap();
        let parts: Vec<&str> = stem.split('.').collect();
        let [layer, _, module, side, _] = parts[..] else { panic!("{name}") };
        let known = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        let gguf = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
        let module = gguf[known.iter().position(|known| *known == module).unwrap()];
        let name = format!("blk.{layer}.{module}.weight.{}", side.to_lowercase());
        let mut bytes = view.bytes.to_vec();
        if side == "lora_B" && ["attn_q", "attn_k"].contains(&module) {
            let row_bytes = view.bytes.len() / view.dims[0];
            for (to, row) in bytes.chunks_mut(row_bytes).enumerate() {
                let (head, within) = (to / head_dim, to % head_dim);
                let from = head * head_dim + within % 2 * (head_dim / 2) + within / 2;
                row.copy_from_slice(&view.bytes[from * row_bytes..(from + 1) * row_bytes]);
            }
        }
        entries.push(TensorEntry { name, dims: view.dims.to_vec(), dtype: view.dtype });
        tensors.push(bytes);
    }
    let mut file = encode_header(&metadata, &entries, 32).unwrap();
    for bytes in tensors {
        file.extend(bytes);
        file.resize(file.len().next_multiple_of(32), 0);
    }
    std::fs::write(&path, file).unwrap();
    path
}

#[test]
fn an_adapter_in_a_gguf_file_gives_the_bits_of_its_peft_folder() {
    let (model, folder) = (open("llama"), tempfile::tempdir().unwrap());
    let Built::Decoder(decoder) = model.built() else { panic!("a decoder") };
    model.add_adapter("folder", data("adapters", "llama-a")).unwrap();
    model.add_adapter("file", as_gguf(folder.path(), decoder.info.head_dim)).unwrap();
    let prompt = Golden::open(&data("adapters", "llama-a")).ids("prompts").pop().unwrap();
    let rows: [(&[u32], Option<usize>); 2] = [(&prompt, Some(0)), (&prompt, Some(1))];
    let found = last_logits(&model, &mut runner(&model, &["folder", "file"], 2), &rows);
    assert_eq!(bits(&found[0]), bits(&found[1]));
}

/// The adapter of llama-a with the factors of one module at twice the rank, the new half zero, and a config that says so.
fn widened() -> tempfile::TempDir {
    const WIDE: &str = "layers.1.mlp.up_proj";
    let (source, folder) = (data("adapters", "llama-a"), tempfile::tempdir().unwrap());
    let loader =
        rlx::import::safetensors::SafetensorsLoader::open(source.join("adapter_model.safetensors")).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    for name in loader.names() {
        let view = loader.tensor(name).unwrap().unwrap();
        let (mut dims, element) = (view.dims.to_vec(), view.dtype.element_bytes().unwrap());
        let begin = data.len();
        if name.contains(WIDE) && name.contains("lora_A") {
            data.extend_from_slice(view.bytes);
            data.resize(begin + 2 * view.bytes.len(), 0);
            dims[0] *= 2;
        } else if name.contains(WIDE) {
            for row in view.bytes.chunks(dims[1] * element) {
                data.extend_from_slice(row);
                data.resize(data.len() + row.len(), 0);
            }
            dims[1] *= 2;
        } else {
            data.extend_from_slice(view.bytes);
        }
        let dtype = view.dtype.to_string().to_uppercase();
        let entry = serde_json::json!({"dtype": dtype, "shape": dims, "data_offsets": [begin, data.len()]});
        header.insert(name.to_owned(), entry);
    }
    let header = serde_json::Value::from(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(folder.path().join("adapter_model.safetensors"), file).unwrap();
    let config = std::fs::read_to_string(source.join("adapter_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let (rank, alpha) = (config["r"].as_u64().unwrap(), config["lora_alpha"].as_f64().unwrap());
    config["rank_pattern"] = serde_json::json!({WIDE: 2 * rank});
    config["alpha_pattern"] = serde_json::json!({"1.mlp.up_proj": 2.0 * alpha});
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn a_module_with_a_rank_and_an_alpha_of_its_own_gives_the_bits_of_the_same_update_written_plainly() {
    let model = open("llama");
    model.add_adapter("plain", data("adapters", "llama-a")).unwrap();
    let wide = model.add_adapter("wide", widened().path()).unwrap();
    assert_eq!(wide.rank(), 2 * model.adapter("plain").unwrap().rank());
    let mut runner = runner(&model, &["plain", "wide"], 2);
    let prompt: &[u32] = &[1, 5, 9, 2, 7];
    let logits = last_logits(&model, &mut runner, &[(prompt, Some(0)), (prompt, Some(1))]);
    assert_eq!(bits(&logits[0]), bits(&logits[1]));
    let base = last_logits(&model, &mut runner, &[(prompt, None)]);
    assert_ne!(bits(&logits[0]), bits(&base[0]));
}

#[test]
fn a_cancel_or_a_deadline_ends_a_step_between_two_ops_and_the_next_step_is_as_if_it_had_not_run() {
    let model = open("llama");
    model.add_adapter("a", data("adapters", "llama-a")).unwrap();
    let Built::Decoder(decoder) = model.built() else { panic!("a decoder") };
    let prompt: &[u32] = &[3, 1, 4, 1, 5];
    for slot in [None, Some(0)] {
        let mut plain = runner(&model, &["a"], 1);
        let wanted = last_logits(&model, &mut plain, &[(prompt, slot)]);
        let mut stopped = runner(&model, &["a"], 1);
        let (token, never) = (CancelToken::new(), CancelToken::new());
        token.cancel();
        let mut inputs = StepInputs::default();
        let (mut pool, mut table) = (BlockPool::of(&stopped.limits()), BlockTable::new());
        pool.reserve(&mut table, prompt.len()).unwrap();
        pool.advance(&mut table, 0, prompt.len()).unwrap();
        inputs.clear(table.blocks().len());
        let step =
            SequenceStep { tokens: prompt, past: 0, length: prompt.len(), table: &table, wants_logits: true };
        inputs.push_adapted(&decoder.info, step, slot);
        for (cancel, deadline) in [(&token, None), (&never, Some(std::time::Instant::now()))] {
            stopped.interrupt(cancel, deadline);
            let mut logits = vec![0.0; decoder.info.vocab];
            let error = stopped.step(&inputs, &mut logits).unwrap_err();
            let step = error.downcast_ref::<rlx::SessionError>();
            assert!(
                matches!(step, Some(rlx::SessionError::Backend(rlx::backend::BackendError::Step(_)))),
                "{error}"
            );
            assert!(logits.iter().all(|logit| *logit == 0.0), "no logits of a run that was stopped");
        }
        stopped.interrupt(&never, None);
        assert_eq!(bits(&last_logits(&model, &mut stopped, &[(prompt, slot)])[0]), bits(&wanted[0]));
    }
}
