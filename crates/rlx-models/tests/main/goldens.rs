//! Every folder of golden checkpoints: logits, greedy tokens, embeddings. A new folder is tested because it is there.

use crate::interpreter::{InterpretedDecoder, InterpretedEncoder};
use rlx::import::hf::{HfCacheDirs, HfFolder};
use rlx::import::safetensors::SafetensorsLoader;
use rlx::weights::{BytesWeightLoader, WeightLoader};
use rlx_models::embed::{EncoderInputs, EncoderLimits, embed_tokens};
use rlx_models::generate::{DecoderLimits, GenerateOptions, SequenceStep, StepInputs, generate};
use rlx_models::kv::{BlockPool, BlockTable, WindowLimits, blocks_for};
use rlx_models::{BuildOptions, Built, Decoder, Encoder, build_folder};
use rlx_tensor::Tensor;
use serde_json::Value;
use std::path::{Path, PathBuf};

const WINDOW: WindowLimits = WindowLimits { positions: 8, blocks: 4 };
const LIMITS: DecoderLimits =
    DecoderLimits { max_rows: 128, blocks: 4, table: 4, outs: 8, window: Some(WINDOW) };

/// Folders of golden checkpoints, by name.
pub fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data/models");
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.join("golden.json").is_file());
    folders.sort();
    assert!(folders.len() >= 14, "golden checkpoints are missing: {folders:?}");
    folders
}

pub fn name_of(folder: &Path) -> String {
    folder.file_name().unwrap().to_string_lossy().into_owned()
}

pub struct Golden {
    pub json: Value,
    tensors: BytesWeightLoader,
}

impl Golden {
    pub fn open(folder: &Path) -> Self {
        let json = serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
        let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
        Self { json, tensors: BytesWeightLoader::from_safetensors(bytes).unwrap() }
    }

    pub fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let view = self.tensors.tensor(name).unwrap().unwrap();
        let tensor = Tensor::from_bytes(view.dims, view.dtype, view.bytes).unwrap();
        (view.dims.to_vec(), tensor.as_slice::<f32>().unwrap().to_vec())
    }

    /// A tensor of a safetensors file: extents and values.
    pub fn tensor_of(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensors = BytesWeightLoader::from_safetensors(std::fs::read(path).unwrap()).unwrap();
        Self { json: Value::Null, tensors }.tensor(name)
    }

    pub fn ids(&self, list: &str) -> Vec<Vec<u32>> {
        self.json[list].as_array().unwrap().iter().map(ids_of).collect()
    }
}

pub fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

pub fn open_folder(folder: &Path) -> HfFolder {
    HfFolder::open(folder.to_str().unwrap(), &HfCacheDirs::default()).unwrap()
}

pub fn open(folder: &Path) -> (Built, SafetensorsLoader) {
    let hf = open_folder(folder);
    let weights = hf.weights().unwrap();
    let built = build_folder(&hf, &weights, &BuildOptions::default());
    (built.unwrap_or_else(|error| panic!("{}: {error}", name_of(folder))), weights)
}

pub fn range(values: &[f32]) -> f32 {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    max - values.iter().copied().fold(f32::INFINITY, f32::min)
}

pub fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).fold(0.0, |worst, (a, b)| {
        assert!(a.is_finite());
        worst.max((a - b).abs())
    })
}

/// The logits of every row of a prompt, run in one step.
fn logits_of(runtime: &mut InterpretedDecoder, model: &Decoder, prompt: &[u32]) -> Vec<f32> {
    let (mut pool, mut table, mut inputs) =
        (BlockPool::of(&LIMITS), BlockTable::new(), StepInputs::default());
    pool.reserve(&mut table, prompt.len()).unwrap();
    pool.advance(&mut table, 0, prompt.len()).unwrap();
    inputs.clear(blocks_for(prompt.len()));
    let length = prompt.len();
    let sequence = SequenceStep { tokens: prompt, past: 0, length, table: &table, wants_logits: false };
    inputs.push(&model.info, sequence);
    inputs.logit_rows = (0..prompt.len() as i32).collect();
    runtime.run(&inputs).unwrap()
}

fn check_decoder(name: &str, model: &Decoder, weights: &dyn WeightLoader, golden: &Golden) {
    let tolerance = golden.json["relative_tolerance"].as_f64().unwrap() as f32;
    let mut runtime = InterpretedDecoder::new(model, weights, LIMITS);
    let mut worst = 0.0f32;
    for (i, prompt) in golden.ids("prompts").iter().enumerate() {
        let (_, expected) = golden.tensor(&format!("logits_{i}"));
        let found = logits_of(&mut runtime, model, prompt);
        worst = worst.max(largest_difference(&found, &expected) / range(&expected));
    }
    println!("{name}: largest logit difference {worst:.1e} of the range");
    assert!(worst <= tolerance, "{name}: logits differ by {worst} of their range, allowed {tolerance}");
    for (prompt, expected) in golden.ids("prompts").iter().zip(golden.ids("greedy")) {
        let options = GenerateOptions::greedy(expected.len(), Vec::new());
        let found: Vec<u32> = generate(&mut runtime, &model.info, prompt, options)
            .unwrap()
            .map(|token| token.unwrap())
            .collect();
        assert_eq!(found, expected, "{name}: greedy tokens after a prompt of {}", prompt.len());
    }
}

fn check_encoder(name: &str, model: &Encoder, weights: &dyn WeightLoader, golden: &Golden) {
    let mut runtime = InterpretedEncoder::new(model, weights);
    let (dims, expected) = golden.tensor("embeddings");
    let texts = golden.json["texts"].as_array().unwrap();
    let sequences: Vec<Vec<u32>> = texts.iter().map(|text| ids_of(&text["ids"])).collect();
    let mut rows = Vec::new();
    (0..texts.len()).for_each(|i| rows.extend(golden.tensor(&format!("hidden_{i}")).1));
    let mut inputs = EncoderInputs::default();
    inputs.clear();
    sequences.iter().for_each(|tokens| inputs.push(&model.info, tokens));
    let found = runtime.run_all(&inputs).unwrap();
    let hidden = largest_difference(&found["last_hidden_state"], &rows);
    let pooled = largest_difference(&found["embedding"], &expected);
    println!("{name}: largest difference {hidden:.1e} in rows, {pooled:.1e} in embeddings");
    assert_eq!((texts.len(), model.info.embedding_dim), (dims[0], dims[1]));
    assert!(hidden <= 1e-5 && pooled <= 2e-6, "{name}: rows {hidden}, embeddings {pooled}");
    for limits in
        [EncoderLimits { max_rows: 60, max_batch: 3 }, EncoderLimits { max_rows: 48, max_batch: 100 }]
    {
        runtime.limits = limits;
        let packed = embed_tokens(&mut runtime, &model.info, &sequences).unwrap().concat();
        assert_eq!(packed, found["embedding"], "{name}: the batch a text runs in changes its embedding");
    }
}

#[test]
fn every_checkpoint_gives_the_answers_of_transformers() {
    for folder in folders() {
        let (name, golden) = (name_of(&folder), Golden::open(&folder));
        let (built, weights) = open(&folder);
        rlx_graph::verify(built.graph(), rlx_graph::Stage::Hir).unwrap();
        match &built {
            Built::Decoder(model) => check_decoder(&name, model, &weights, &golden),
            Built::Encoder(model) => check_encoder(&name, model, &weights, &golden),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn prompts_read_in_chunks_give_the_same_bits() {
    for name in ["llama", "mistral", "gemma3", "phi3-longrope", "llama-dynamic", "gpt2"] {
        let folder = folders().into_iter().find(|folder| name_of(folder) == name).unwrap();
        let (Built::Decoder(model), weights) = open(&folder) else { panic!("{name} is a decoder") };
        let prompt = Golden::open(&folder).ids("prompts").pop().unwrap();
        let logits_in_chunks_of = |max_rows| {
            let mut runtime = InterpretedDecoder::new(&model, &weights, DecoderLimits { max_rows, ..LIMITS });
            let options = GenerateOptions::greedy(2, Vec::new());
            generate(&mut runtime, &model.info, &prompt, options)
                .unwrap()
                .for_each(|token| assert!(token.is_ok()));
            runtime.last_logits
        };
        assert_eq!(logits_in_chunks_of(128), logits_in_chunks_of(7), "{name}");
    }
}
