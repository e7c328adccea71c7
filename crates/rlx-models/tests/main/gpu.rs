//! Golden checkpoints on GPU backends: by the interpreter of kernels, and on the first adapter if this build has devices.

use crate::cpu::{check_decoder, check_encoder, open, stepped};
use crate::gguf::{copy_folder, written};
use crate::goldens::{Golden, folders, ids_of, largest_difference, name_of, open_folder, range};
use rlx::backend::cpu::Precision;
use rlx::backend::reference::ReferenceBackend;
use rlx::backend::{Backend, DeviceProbe, Traffic};
use rlx::config::{ByteSize, Config};
use rlx_models::embed::embed_tokens;
use rlx_models::gguf::GgufModel;
use rlx_models::sampling::SamplingOptions;
use rlx_models::{Built, Model, OpenOptions, TextOptions};
use rlx_tensor::DType;
use std::path::Path;
use std::sync::Arc;

#[test]
fn an_encoder_by_the_interpreter_of_kernels() {
    let folder = folders().into_iter().find(|folder| name_of(folder) == "bert-mean").unwrap();
    let model = open(&folder, &rlx_gpu::emulated());
    let Built::Encoder(encoder) = model.built() else { panic!("bert-mean is an encoder") };
    check_encoder("bert-mean by the interpreter", &model, encoder, &Golden::open(&folder));
}

/// Whether a product of this name is left to a library.
fn is_left(model: &Model, product: &str) -> bool {
    let report = model.compiled().report().unwrap();
    report.steps.iter().any(|step| step.kernel.contains(product))
}

/// Whole graphs through a library's products, for which the interpreter stands: an encoder in f32, and a prompt in bf16.
#[test]
fn models_with_products_left_to_a_library() {
    let folder = folders().into_iter().find(|folder| name_of(folder) == "bert-mean").unwrap();
    let model = open(&folder, &rlx_gpu::emulated_by_library(Precision::F32));
    let Built::Encoder(encoder) = model.built() else { panic!("bert-mean is an encoder") };
    check_encoder("bert-mean by a library", &model, encoder, &Golden::open(&folder));
    assert!(is_left(&model, "cublaslt_f32"));
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let prompt: Vec<u32> = (0..5).map(|i| 3 + (i * i + 7 * i) % 200).collect();
    let logits = |backend: Arc<dyn Backend>, left: bool| {
        let model = open(&demo, &backend);
        assert_eq!(is_left(&model, "cublaslt_bf16"), left);
        let Built::Decoder(decoder) = model.built() else { panic!("the demo is a decoder") };
        stepped(&model, decoder, &prompt, prompt.len()).concat()
    };
    let expected = logits(Arc::new(ReferenceBackend::default()), false);
    let found = logits(rlx_gpu::emulated_by_library(Precision::Bf16), true);
    let difference = largest_difference(&found, &expected) / range(&expected);
    assert!(difference > 1e-6 && difference < 0.05, "{difference}");
}

/// Bits of the first texts' tokens, a prompt cut in two, by the interpreter of kernels with bindings of so many bytes.
fn within(folder: &Path, bytes: usize) -> Vec<u32> {
    let model = open(folder, &rlx_gpu::emulated_within(bytes));
    let golden = Golden::open(folder);
    let found = match model.built() {
        Built::Decoder(decoder) => {
            let prompts = golden.ids("prompts");
            let prompt = prompts.iter().max_by_key(|prompt| prompt.len()).unwrap();
            stepped(&model, decoder, &prompt[..prompt.len().min(6)], 4).concat()
        }
        Built::Encoder(encoder) => {
            let texts = golden.json["texts"].as_array().unwrap();
            let sequences: Vec<Vec<u32>> = texts[..2].iter().map(|text| ids_of(&text["ids"])).collect();
            embed_tokens(&mut model.encoder_runner(64).unwrap(), &encoder.info, &sequences).unwrap().concat()
        }
        _ => unreachable!("a model is a decoder or an encoder"),
    };
    found.iter().map(|x| x.to_bits()).collect()
}

/// Arenas in several segments and weights in bands.
#[test]
fn small_bindings_give_what_large_ones_give() {
    for (name, bytes) in [("bert-mean", 256 << 10), ("mistral", 448 << 10), ("mixtral", 448 << 10)] {
        let folder = folders().into_iter().find(|folder| name_of(folder) == name).unwrap();
        assert_eq!(within(&folder, bytes), within(&folder, usize::MAX), "{name}");
    }
}

#[test]
fn every_family_on_the_first_adapter() {
    let Some(provider) = rlx_gpu::provider() else {
        println!("skipped: this build has no devices (`--features rlx-gpu/wgpu`)");
        return;
    };
    let found = provider.probe();
    assert!(matches!(found, DeviceProbe::Present(count) if count > 0), "{found:?}");
    let mut config = Config::default();
    // Nothing is kept of this run.
    config.cache_bytes = Some(ByteSize(0));
    let backend: Arc<dyn Backend> = provider.open(0, &config).unwrap();
    for folder in folders() {
        let (golden, label) = (Golden::open(&folder), format!("{} on {}", name_of(&folder), backend.name()));
        let model = open(&folder, &backend);
        match model.built() {
            Built::Decoder(decoder) => drop(check_decoder(&label, &model, decoder, &golden)),
            Built::Encoder(encoder) => drop(check_encoder(&label, &model, encoder, &golden)),
            _ => unreachable!("a model is a decoder or an encoder"),
        }
        assert!(model.compiled().report().unwrap().steps.iter().all(|step| step.native), "{label}");
    }
}

/// Operands are rounded on a device too: equal bits however a prompt is cut, near the goldens and not as near as in f32. A model that asks for
/// another precision than its backend's is refused.
#[test]
fn bf16_precision_on_the_first_adapter() {
    let Some(provider) = rlx_gpu::provider() else {
        println!("skipped: this build has no devices (`--features rlx-gpu/wgpu`)");
        return;
    };
    let mut config = Config::default();
    config.precision = Some(Precision::Bf16);
    let backend: Arc<dyn Backend> = provider.open(0, &config).unwrap();
    let folder = folders().into_iter().find(|folder| name_of(folder) == "qwen2").unwrap();
    let (golden, model) = (Golden::open(&folder), open(&folder, &backend));
    let Built::Decoder(decoder) = model.built() else { panic!("qwen2 is a decoder") };
    assert_eq!(model.precision(), Some(Precision::Bf16));
    let prompt = &golden.ids("prompts")[0];
    let decoded = stepped(&model, decoder, prompt, 1);
    for chunk in [prompt.len(), 3] {
        let prefilled = stepped(&model, decoder, prompt, chunk);
        assert_eq!(prefilled.last(), decoded.last(), "in steps of {chunk}");
    }
    let (_, expected) = golden.tensor("logits_0");
    let difference = largest_difference(&decoded.concat(), &expected) / range(&expected);
    println!("{} in bf16: {difference:.1e} of the range of logits", name_of(&folder));
    assert!(difference > 1e-6 && difference < 0.05, "{difference}");
    let reference: Arc<dyn Backend> = Arc::new(ReferenceBackend::default());
    for (backend, asked) in [(backend, Precision::F32), (reference, Precision::Bf16)] {
        let options = OpenOptions { precision: Some(asked), ..OpenOptions::default() };
        let error = Model::on_backend(open_folder(&folder), &options, backend).map(drop).unwrap_err();
        assert!(error.to_string().contains("precision = "), "{error}");
    }
}

/// Quantised files, whose rows are too short for larger blocks. Rows are
/// quantised before packed weights as on the host, so the logits are as far as there from those of rows that are not. They are not held to
/// the host's: a code that a last bit rounds the other way moves those of all layers behind it. `rlx-gpu` compares bits of products.
#[test]
fn quantised_files_on_the_first_adapter() {
    let Some(provider) = rlx_gpu::provider() else {
        println!("skipped: this build has no devices (`--features rlx-gpu/wgpu`)");
        return;
    };
    let backend: Arc<dyn Backend> = provider.open(0, &Config::default()).unwrap();
    let host: Arc<dyn Backend> = Arc::new(rlx::session::cpu_backend(None, Some(1)).unwrap());
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("demo");
    // Rows of 128: packed blocks of 32 elements.
    copy_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo"), &folder);
    let prompt: Vec<u32> = (0..19).map(|i| 3 + (i * i + 7 * i) % 200).collect();
    for scheme in ["Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M"] {
        let file = GgufModel::open(written(&folder, scheme)).unwrap();
        let logits = |backend: &Arc<dyn Backend>, chunks: &[usize]| -> Vec<Vec<f32>> {
            // A cache of f16 would turn a rounding into a unit of f16.
            let options = OpenOptions { cache_dtype: Some(rlx_tensor::DType::F32), ..OpenOptions::default() };
            let model = Model::gguf_on_backend(&file, &options, Arc::clone(backend)).unwrap();
            let Built::Decoder(decoder) = model.built() else { panic!("qwen2 is a decoder") };
            assert!(model.compiled().report().unwrap().steps.iter().all(|step| step.native));
            let last = |&chunk: &usize| stepped(&model, decoder, &prompt, chunk).pop().unwrap_or_default();
            chunks.iter().map(last).collect()
        };
        let reference: Arc<dyn Backend> = Arc::new(ReferenceBackend::default());
        let (floats, expected) = (logits(&reference, &[6]).concat(), logits(&host, &[6]).concat());
        let found = logits(&backend, &[6, 64]);
        let apart = |a: &[f32], b: &[f32]| largest_difference(a, b) / range(&floats);
        let (own, hosts) = (apart(&found[0], &floats), apart(&expected, &floats));
        println!("{scheme}: {own:.1e}, the host {hosts:.1e}");
        assert!(hosts > 1e-4 && own <= 2.0 * hosts, "{scheme}: {own} of the range, {hosts} on the host");
        let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found[0]), bits(&found[1]), "{scheme}: a prompt in one piece");
    }
}

/// A text of so many tokens after a prompt, and the bytes that came back from the device for each step after the first.
fn continued(
    model: &Model,
    prompt: &[u32],
    sampling: SamplingOptions,
) -> (Vec<u32>, Option<usize>, Option<Traffic>) {
    const TOKENS: usize = 12;
    let options = TextOptions { max_tokens: TOKENS, sampling, ..TextOptions::default() };
    let mut text = model.generate_tokens(prompt, &options).unwrap();
    let moved = || model.backend().traffic();
    let mut step = None;
    loop {
        let (before, count) = (moved(), text.token_ids().len());
        let Some(piece) = text.next() else { break };
        piece.unwrap();
        let own = before.zip(moved()).map(|(a, b)| Traffic { up: b.up - a.up, down: b.down - a.down });
        if count > 1 && text.token_ids().len() == count + 1 {
            assert!(step.is_none() || step == own, "a step moved {own:?}, the one before it {step:?}");
            step = own;
        }
    }
    (text.token_ids().to_vec(), text.largest(), step)
}

/// Tokens chosen from what the device found largest are those that all logits give, there and on the CPU, and of a step's logits nothing
/// else comes back.
#[test]
fn tokens_are_chosen_on_the_first_adapter() {
    let Some(provider) = rlx_gpu::provider() else {
        println!("skipped: this build has no devices (`--features rlx-gpu/wgpu`)");
        return;
    };
    let backend: Arc<dyn Backend> = provider.open(0, &Config::default()).unwrap();
    let sampled = SamplingOptions { temperature: 0.9, top_k: 5, seed: 11, ..SamplingOptions::greedy() };
    let last = SamplingOptions { temperature_last: true, top_p: 0.95, ..sampled.clone() };
    for name in ["gemma2", "llama", "qwen2-moe"] {
        let folder = folders().into_iter().find(|folder| name_of(folder) == name).unwrap();
        let prompt = &Golden::open(&folder).ids("prompts")[0];
        let (device, host) = (open(&folder, &backend), Model::open(&folder).unwrap());
        let Built::Decoder(decoder) = device.built() else { panic!("{name} is a decoder") };
        for (sampling, count) in [(SamplingOptions::greedy(), 1), (sampled.clone(), 6), (last.clone(), 6)] {
            // A bias of nothing needs all logits.
            let whole = SamplingOptions { logit_bias: vec![(0, 0.0)], ..sampling.clone() };
            let (tokens, largest, step) = continued(&device, prompt, sampling.clone());
            let (expected, all, whole_step) = continued(&device, prompt, whole);
            assert_eq!((tokens.clone(), largest, all), (expected, Some(count), None), "{name} {sampling:?}");
            assert_eq!(continued(&host, prompt, sampling), (tokens, None, None), "{name} on the CPU");
            let (step, whole_step) = (step.unwrap(), whole_step.unwrap());
            let (logits, found) = (decoder.info.vocab as u64 * 4, count as u64 * 8);
            assert_eq!(whole_step.down - logits, step.down - found, "{name}: words of checks");
            println!("{name}, {count} largest: {} bytes up, {} down a token", step.up, step.down);
        }
    }
}

/// A cache of 8-bit integers on a device: the same bits however a prompt is cut, and what the reference gives, but for integers that rounding
/// makes others.
#[test]
fn a_cache_of_integers_on_the_first_adapter() {
    let Some(provider) = rlx_gpu::provider() else {
        println!("skipped: this build has no devices (`--features rlx-gpu/wgpu`)");
        return;
    };
    let backend: Arc<dyn Backend> = provider.open(0, &Config::default()).unwrap();
    let options = OpenOptions { cache_dtype: Some(DType::Q8_0), ..OpenOptions::default() };
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let open = |backend| Model::on_backend(open_folder(&demo), &options, backend).unwrap();
    let (device, reference) = (open(backend), open(Arc::new(ReferenceBackend::default())));
    let Built::Decoder(decoder) = device.built() else { panic!("the demo is a decoder") };
    let vocab = decoder.info.vocab as u32;
    let prompt: Vec<u32> = (0..70).map(|i| 3 + (i * i + 7 * i) % (vocab - 3)).collect();
    let (long, short) = (stepped(&device, decoder, &prompt, 35), stepped(&device, decoder, &prompt, 7));
    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&long[1]), bits(&short[9]));
    let expected = stepped(&reference, decoder, &prompt, 35).concat();
    let worst = largest_difference(&long.concat(), &expected) / range(&expected);
    println!("a cache of integers: {worst:.1e}");
    assert!(worst <= 1e-3, "logits differ by {worst} of their range");
}
