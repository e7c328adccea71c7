//! The golden checkpoints on the CPU backend, on every instruction set of this machine, through the public path.

use crate::goldens::{Golden, folders, ids_of, largest_difference, name_of, open_folder, range};
use rlx::backend::Backend;
use rlx::backend::cpu::{CpuBackend, Precision};
use rlx_kernels::isa::Isa;
use rlx_models::embed::{EncoderInputs, EncoderRuntime, embed_tokens};
use rlx_models::generate::{DecoderRuntime, GenerateOptions, SequenceStep, StepInputs, generate};
use rlx_models::kv::{BlockPool, BlockTable};
use rlx_models::{Built, Decoder, Encoder, Model, OpenOptions};
use std::path::Path;
use std::sync::Arc;

const CONTEXT: usize = 128;

fn backends() -> Vec<(String, Arc<dyn Backend>)> {
    let mut backends: Vec<(String, Arc<dyn Backend>)> = Vec::new();
    for isa in Isa::available() {
        for threads in [1, 2] {
            backends.push((format!("{isa} x{threads}"), Arc::new(CpuBackend::new(isa, threads))));
        }
    }
    backends
}

pub fn open(folder: &Path, backend: &Arc<dyn Backend>) -> Model {
    Model::on_backend(open_folder(folder), &OpenOptions::default(), Arc::clone(backend)).unwrap()
}

/// Logits of each row of a prompt that is run in steps of `chunk` rows; only the last row of a step gives logits.
pub fn stepped(model: &Model, decoder: &Decoder, prompt: &[u32], chunk: usize) -> Vec<Vec<f32>> {
    let mut runner = model.decoder_runner(CONTEXT).unwrap();
    let (mut pool, mut table) = (BlockPool::of(&runner.limits()), BlockTable::new());
    pool.reserve(&mut table, prompt.len()).unwrap();
    let (mut inputs, mut rows) = (StepInputs::default(), Vec::new());
    for (i, tokens) in prompt.chunks(chunk).enumerate() {
        pool.advance(&mut table, i * chunk, i * chunk + tokens.len()).unwrap();
        inputs.clear(table.blocks().len());
        let length = prompt.len();
        inputs.push(
            &decoder.info,
            SequenceStep { tokens, past: i * chunk, length, table: &table, wants_logits: true },
        );
        let mut logits = vec![f32::NAN; decoder.info.vocab];
        runner.step(&inputs, &mut logits).unwrap();
        rows.push(logits);
    }
    rows
}

pub fn check_decoder(label: &str, model: &Model, decoder: &Decoder, golden: &Golden) -> Vec<u32> {
    let tolerance = golden.json["relative_tolerance"].as_f64().unwrap() as f32;
    let (mut worst, mut bits) = (0.0f32, Vec::new());
    for (i, prompt) in golden.ids("prompts").iter().enumerate() {
        let (_, expected) = golden.tensor(&format!("logits_{i}"));
        let decoded = stepped(model, decoder, prompt, 1);
        worst = worst.max(largest_difference(&decoded.concat(), &expected) / range(&expected));
        for chunk in [prompt.len(), 7] {
            let prefilled = stepped(model, decoder, prompt, chunk);
            let same = prefilled
                .last()
                .unwrap()
                .iter()
                .zip(decoded.last().unwrap())
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{label}: a row prefilled in steps of {chunk} differs from the same row decoded");
        }
        bits.extend(decoded.last().unwrap().iter().map(|v| v.to_bits()));
    }
    println!("{label}: largest logit difference {worst:.1e} of the range");
    assert!(worst <= tolerance, "{label}: logits differ by {worst} of their range, allowed {tolerance}");
    for (prompt, expected) in golden.ids("prompts").iter().zip(golden.ids("greedy")) {
        let mut runner = model.decoder_runner(CONTEXT).unwrap();
        let options = GenerateOptions::greedy(expected.len(), Vec::new());
        let found: Vec<u32> = generate(&mut runner, &decoder.info, prompt, options)
            .unwrap()
            .map(|token| token.unwrap())
            .collect();
        assert_eq!(found, expected, "{label}: greedy tokens after a prompt of {}", prompt.len());
    }
    bits
}

pub fn check_encoder(label: &str, model: &Model, encoder: &Encoder, golden: &Golden) -> Vec<u32> {
    let (_, expected) = golden.tensor("embeddings");
    let texts = golden.json["texts"].as_array().unwrap();
    let sequences: Vec<Vec<u32>> = texts.iter().map(|text| ids_of(&text["ids"])).collect();
    let mut runner = model.encoder_runner(1024).unwrap();
    let found = embed_tokens(&mut runner, &encoder.info, &sequences).unwrap().concat();
    let worst = largest_difference(&found, &expected);
    println!("{label}: largest difference {worst:.1e} in embeddings");
    assert!(worst <= 2e-6, "{label}: embeddings differ by {worst}");
    let mut inputs = EncoderInputs::default();
    for (tokens, packed) in sequences.iter().zip(found.chunks(encoder.info.embedding_dim)) {
        inputs.clear();
        inputs.push(&encoder.info, tokens);
        let mut alone = vec![f32::NAN; encoder.info.embedding_dim];
        runner.run(&inputs, &mut alone).unwrap();
        let same = alone.iter().zip(packed).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{label}: a text alone differs from the same text in a batch");
    }
    found.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_checkpoint_gives_the_answers_of_transformers_on_every_instruction_set() {
    let backends = backends();
    for folder in folders() {
        let golden = Golden::open(&folder);
        let mut last: Option<(String, Vec<u32>)> = None;
        for (backend_name, backend) in &backends {
            let label = format!("{} on {backend_name}", name_of(&folder));
            let model = open(&folder, backend);
            let bits = match model.built() {
                Built::Decoder(decoder) => check_decoder(&label, &model, decoder, &golden),
                Built::Encoder(encoder) => check_encoder(&label, &model, encoder, &golden),
                _ => unreachable!("a model is a decoder or an encoder"),
            };
            let isa = backend_name.split(' ').next().unwrap().to_owned();
            if let Some((_, before)) = last.as_ref().filter(|(before, _)| *before == isa) {
                assert_eq!(before, &bits, "{label}: other bits than with 1 thread");
            }
            last = Some((isa, bits));
        }
    }
}

#[test]
fn every_op_of_every_checkpoint_has_a_kernel() {
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(Isa::detect(), 1));
    for folder in folders() {
        let report = open(&folder, &backend).compiled().report().unwrap();
        let slow: Vec<_> = report.steps.iter().filter(|s| !s.native).map(|s| &s.op).collect();
        assert!(slow.is_empty(), "{}: without a kernel: {slow:?}", name_of(&folder));
    }
}

/// bf16 operands: equal bits however a prompt is cut and for any number of threads, and near the goldens, which are f32. A router may
/// choose other experts, so mixtures are only held to their own bits.
#[test]
fn bf16_precision_gives_a_prompt_equal_bits_in_every_phase() {
    for folder in folders() {
        let golden = Golden::open(&folder);
        let mut before: Option<Vec<f32>> = None;
        for threads in [1, 2] {
            let backend = CpuBackend::new(Isa::detect(), threads).with_precision(Precision::Bf16);
            let model = open(&folder, &(Arc::new(backend) as Arc<dyn Backend>));
            let Built::Decoder(decoder) = model.built() else { continue };
            let prompt = &golden.ids("prompts")[0];
            let decoded = stepped(&model, decoder, prompt, 1);
            for chunk in [prompt.len(), 3] {
                let prefilled = stepped(&model, decoder, prompt, chunk);
                assert_eq!(prefilled.last(), decoded.last(), "{} in steps of {chunk}", name_of(&folder));
            }
            let (_, expected) = golden.tensor("logits_0");
            let decoded = decoded.concat();
            let difference = largest_difference(&decoded, &expected) / range(&expected);
            println!("{} in bf16: {difference:.1e} of the range of logits", name_of(&folder));
            let routed = model.compiled().template().steps().iter().any(|s| s.op.def().name() == "moe");
            assert!(difference > 1e-6 && (routed || difference < 0.05), "{}: {difference}", name_of(&folder));
            if let Some(before) = &before {
                assert_eq!(before, &decoded, "{}: other bits with {threads} threads", name_of(&folder));
            }
            before = Some(decoded);
        }
    }
}

#[test]
fn minilm_embeds_as_sentence_transformers_does() {
    let Some(folder) = std::env::var_os("RLX_TEST_MINILM_DIR") else {
        println!("skipped: RLX_TEST_MINILM_DIR is not set");
        return;
    };
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data");
    let json = std::fs::read(data.join("minilm_embeddings.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let texts: Vec<&str> =
        json["texts"].as_array().unwrap().iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert!(texts.len() >= 30);
    let expected = Golden::tensor_of(&data.join("minilm_embeddings.safetensors"), "embeddings").1;
    let mut found = Vec::new();
    for (name, backend) in backends() {
        if name.starts_with("scalar") {
            continue;
        }
        let model =
            Model::on_backend(open_folder(Path::new(&folder)), &OpenOptions::default(), backend).unwrap();
        let embeddings = model.embed(&texts).unwrap().concat();
        let worst = largest_difference(&embeddings, &expected);
        println!("MiniLM on {name}: {} texts, largest difference {worst:.1e}", texts.len());
        assert!(worst <= 2e-6, "MiniLM on {name}: {worst}");
        found.push((name, embeddings));
    }
    for pair in found.chunks(2) {
        assert_eq!(pair[0].1, pair[1].1, "{} and {} differ", pair[0].0, pair[1].0);
    }
}
