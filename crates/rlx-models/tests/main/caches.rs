//! KV caches: of integers, of layers with a window, and of texts that outgrow the context.

use crate::cpu::stepped;
use crate::goldens::open_folder;
use rlx::backend::Backend;
use rlx::backend::cpu::{CpuBackend, Precision};
use rlx_kernels::isa::Isa;
use rlx_models::draft::PromptLookup;
use rlx_models::generate::{DecoderRuntime, GenerateOptions, SequenceStep, Shift, StepInputs, generate};
use rlx_models::kv::{BlockPool, BlockTable, WindowLimits};
use rlx_models::runtime::DecoderRunner;
use rlx_models::{
    Batch, BatchEvent, BatchOptions, BatchRequest, Built, Decoder, Model, ModelError, OpenOptions,
    PlanRequest, TextOptions,
};
use rlx_tensor::DType;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo");

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data/models").join(name)
}

fn decoder(model: &Model) -> &Decoder {
    let Built::Decoder(decoder) = model.built() else { panic!("a decoder") };
    decoder
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 3 + (i * i + 7 * i) % (vocab as u32 - 3)).collect()
}

fn integers(isa: Isa, threads: usize) -> Model {
    let options = OpenOptions { cache_dtype: Some(DType::Q8_0), ..OpenOptions::default() };
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(isa, threads));
    Model::on_backend(open_folder(Path::new(DEMO)), &options, backend).unwrap()
}

#[test]
fn a_cache_of_integers_gives_a_row_the_same_bits_in_every_phase_and_for_any_threads() {
    for isa in Isa::available() {
        let one = integers(isa, 1);
        let prompt = tokens(100, decoder(&one).info.vocab);
        let decoded = stepped(&one, decoder(&one), &prompt, 1);
        for (threads, chunk) in [(1, 100), (1, 7), (2, 1), (2, 65), (3, 33)] {
            let model = integers(isa, threads);
            let rows = stepped(&model, decoder(&model), &prompt, chunk);
            for (n, row) in rows.iter().enumerate() {
                let last = prompt.len().min((n + 1) * chunk) - 1;
                assert_eq!(bits(row), bits(&decoded[last]), "{isa} x{threads}, steps of {chunk}, row {last}");
            }
        }
        let precision = Some(Precision::F32);
        let options = OpenOptions { isa: Some(isa), precision, ..OpenOptions::default() };
        let plain = Model::open_with(DEMO, &options).unwrap();
        let exact = stepped(&plain, decoder(&plain), &prompt, 1);
        assert_ne!(bits(&exact[99]), bits(&decoded[99]));
        let states = |model: &Model| model.plan(PlanRequest::default(), 1).unwrap().estimate.state_bytes;
        assert_eq!(states(&one) * 128, states(&plain) * 34);
    }
}

#[test]
fn a_text_has_the_tokens_it_has_alone_in_a_batch_on_a_cache_of_integers() {
    let model = integers(Isa::detect(), 2);
    let prompt = tokens(90, decoder(&model).info.vocab);
    let prompts = [&prompt[..], &prompt[20..], &prompt[..3]];
    let wanted: Vec<Vec<u32>> = prompts.iter().map(|prompt| said(&model, prompt, 20)).collect();
    assert_eq!(said_together(&model, &prompts, 20).0, wanted);
}

#[test]
fn heads_that_blocks_do_not_divide_are_refused_by_name() {
    let options = OpenOptions { cache_dtype: Some(DType::Q8_0), ..OpenOptions::default() };
    let error = Model::open_with(golden("llama"), &options).err().unwrap().to_string();
    assert!(error.contains("cache_dtype") && error.contains("heads of 12"), "{error}");
}

/// A folder that goes when the test ends.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// A golden checkpoint whose config allows for longer texts.
fn long(name: &str, positions: usize) -> (Model, Scratch) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let from = golden(name);
    let files = std::fs::read_dir(&from).unwrap().map(|entry| entry.unwrap().path());
    let unique = format!("rlx-long-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let folder = std::env::temp_dir().join(unique);
    std::fs::create_dir_all(&folder).unwrap();
    for file in files.filter(|file| file.is_file()) {
        std::fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
    }
    let config = folder.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["max_position_embeddings"] = positions.into();
    std::fs::write(&config, json.to_string()).unwrap();
    let options = OpenOptions { threads: Some(2), ..OpenOptions::default() };
    (Model::open_with(&folder, &options).unwrap(), Scratch(folder))
}

const WINDOWED: [&str; 6] = ["gemma2", "gemma3", "mistral", "mixtral-window", "phi3", "qwen3-bias-window"];
const POSITIONS: usize = 1024;

/// Logits of the last row of each step: of `chunk` rows up to `prefilled`, of one row after.
fn rows_of(
    runner: &mut DecoderRunner,
    text: &[u32],
    chunk: usize,
    prefilled: usize,
) -> Vec<(usize, Vec<u32>)> {
    let (info, limits) = (runner.info().clone(), runner.limits());
    let (mut pool, mut table) = (BlockPool::of(&limits), BlockTable::new());
    pool.reserve(&mut table, text.len()).unwrap();
    let (mut inputs, mut rows, mut past) = (StepInputs::default(), Vec::new(), 0);
    while past < text.len() {
        let end = if past < prefilled { prefilled.min(past + chunk) } else { past + 1 };
        pool.advance(&mut table, past, end).unwrap();
        inputs.clear(table.blocks().len());
        let (tokens, length) = (&text[past..end], text.len());
        inputs.push(&info, SequenceStep { tokens, past, length, table: &table, wants_logits: true });
        let mut logits = vec![f32::NAN; info.vocab];
        runner.step(&inputs, &mut logits).unwrap();
        rows.push((end, bits(&logits)));
        past = end;
    }
    rows
}

#[test]
fn layers_with_a_window_keep_only_it_and_give_the_bits_of_a_full_cache() {
    for name in WINDOWED {
        let (model, _folder) = long(name, POSITIONS);
        let decoder = decoder(&model);
        let text = tokens(700, decoder.info.vocab);
        let window = decoder.info.window.unwrap();
        let runner =
            |rows| DecoderRunner::new(decoder, model.executables().clone(), POSITIONS, rows).unwrap();
        let mut full = runner(POSITIONS);
        assert_eq!(full.limits().window, Some(WindowLimits { positions: window, blocks: 16 }));
        let wanted = rows_of(&mut full, &text, 32, 672);
        for (rows, chunk) in [(64, 64), (32, 32), (1, 1)] {
            let mut short = runner(rows);
            let blocks = short.limits().window.unwrap().blocks;
            assert!(blocks <= 4, "{name}: {blocks} blocks");
            let (all, less) = (full.state_bytes(), short.state_bytes());
            let of_windows = decoder.info.layers - decoder.info.full_layers;
            assert_eq!(all - less, all * of_windows * (16 - blocks) / (decoder.info.layers * 16));
            for (end, row) in rows_of(&mut short, &text, chunk, 672) {
                if let Some((_, wanted)) = wanted.iter().find(|(at, _)| *at == end) {
                    assert_eq!(&row, wanted, "{name}: row {end} in steps of {chunk}");
                }
            }
        }
        let plan = model.plan(PlanRequest { context: Some(POSITIONS), batch: None }, 2).unwrap();
        let held = model.decoder_runner(POSITIONS).unwrap().state_bytes();
        assert!(held < full.state_bytes(), "{name}: prefill in steps of 512 needs 11 of 16 blocks");
        assert_eq!(plan.estimate.state_bytes, held as u64, "{name}");
    }
}

fn options(max_tokens: usize) -> TextOptions {
    TextOptions { max_tokens, ..TextOptions::default() }
}

fn said(model: &Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut text = model.generate_tokens(prompt, &options(count)).unwrap();
    text.by_ref().for_each(|piece| drop(piece.unwrap()));
    text.token_ids().to_vec()
}

/// Tokens of texts that are submitted one after another, each before the first one has ended; and how many tokens of prompts were
/// not run.
fn said_together(model: &Model, prompts: &[&[u32]], count: usize) -> (Vec<Vec<u32>>, usize) {
    let batch_options = BatchOptions { sequences: 4, context: POSITIONS, ..BatchOptions::default() };
    let mut batch = Batch::new(model, batch_options).unwrap();
    let (mut said, mut waiting, mut ids) = (vec![Vec::new(); prompts.len()], prompts.iter(), Vec::new());
    loop {
        if let Some(prompt) = waiting.next() {
            let (prompt, sampling) = (prompt.to_vec(), options(0).sampling);
            let request = BatchRequest { prompt, max_tokens: count, sampling, adapter: None };
            ids.push(batch.submit(request).unwrap());
        } else if batch.is_idle() {
            return (said, batch.reused());
        }
        for event in batch.step().unwrap() {
            if let BatchEvent::Token(id, token) = event {
                said[ids.iter().position(|known| *known == id).unwrap()].push(token);
            }
        }
    }
}

#[test]
fn a_turn_goes_on_from_a_window_that_is_there_and_starts_anew_from_one_that_is_not() {
    for name in ["gemma2", "mistral"] {
        let (model, _folder) = long(name, POSITIONS);
        let text = tokens(960, decoder(&model).info.vocab);
        let mut first = model.generate_after(None, &text[..900], &options(8)).unwrap();
        first.by_ref().for_each(|piece| drop(piece.unwrap()));
        let mut turn = first.prompt_ids().to_vec();
        turn.extend(first.token_ids());
        turn.extend(&text[900..920]);
        let mut second = model.generate_after(Some(first.into_held()), &turn, &options(8)).unwrap();
        second.by_ref().for_each(|piece| drop(piece.unwrap()));
        assert!(second.reused() >= 900, "{name}: {} tokens of the turn before", second.reused());
        assert_eq!(second.token_ids(), said(&model, &turn, 8), "{name}");
        // Position 100 sees what was given back at 900.
        let other = [&text[..100], &text[200..300]].concat();
        let mut third = model.generate_after(Some(second.into_held()), &other, &options(8)).unwrap();
        third.by_ref().for_each(|piece| drop(piece.unwrap()));
        assert_eq!(third.reused(), 0, "{name}");
        assert_eq!(third.token_ids(), said(&model, &other, 8), "{name}");
    }
}

#[test]
fn texts_of_a_batch_share_a_beginning_as_far_as_its_window_is_known() {
    for name in ["gemma3", "mistral"] {
        let (model, _folder) = long(name, POSITIONS);
        let text = tokens(700, decoder(&model).info.vocab);
        let other = [&text[..400], &text[500..650]].concat();
        let prompts = [&text[..], &other[..], &text[300..500], &text[..640]];
        let wanted: Vec<Vec<u32>> = prompts.iter().map(|prompt| said(&model, prompt, 12)).collect();
        let (found, reused) = said_together(&model, &prompts, 12);
        assert_eq!(found, wanted, "{name}");
        assert!(reused >= 384, "{name}: {reused} tokens");
    }
}

/// Greedy tokens and shifts.
fn shifted(
    model: &Model,
    prompt: &[u32],
    count: usize,
    context: usize,
    guess: bool,
) -> (Vec<u32>, Vec<Shift>) {
    let decoder = decoder(model);
    let executables = model.executables().clone();
    let runner =
        DecoderRunner::with_outs(decoder, executables, context, 16, if guess { 4 } else { 1 }).unwrap();
    let asked = GenerateOptions {
        context: Some(context),
        context_shift: Some(3),
        ..GenerateOptions::greedy(count, Vec::new())
    };
    let mut text = generate(runner, &decoder.info, prompt, asked).unwrap();
    if guess {
        text = text.with_drafter(Box::new(PromptLookup));
    }
    let (mut found, mut shifts) = (Vec::new(), Vec::new());
    while let Some(token) = text.next_token().unwrap() {
        found.push(token);
        shifts.extend(text.take_shift());
    }
    (found, shifts)
}

#[test]
fn a_text_that_shifts_goes_on_as_a_new_text_of_what_is_left_would() {
    const CONTEXT: usize = 40;
    for name in ["llama", "gemma2", "mistral", "phi3", "llama-dynamic", "gpt2"] {
        let options = OpenOptions { threads: Some(2), ..OpenOptions::default() };
        let model = Model::open_with(golden(name), &options).unwrap();
        let decoder = decoder(&model);
        let (prompt, count) = (tokens(20, decoder.info.vocab), 90);
        let (mut seen, mut forgotten) = (prompt.clone(), Vec::new());
        let mut wanted: Vec<u32> = Vec::new();
        while wanted.len() < count {
            let new = (count - wanted.len()).min(CONTEXT + 1 - seen.len());
            let runner = model.decoder_runner(CONTEXT + 1).unwrap();
            let text =
                generate(runner, &decoder.info, &seen, GenerateOptions::greedy(new, Vec::new())).unwrap();
            let new: Vec<u32> = text.map(|token| token.unwrap()).collect();
            wanted.extend(&new);
            seen.extend(&new);
            if seen.len() > CONTEXT && wanted.len() < count {
                let half = (seen.len() - 3) / 2;
                seen.drain(3..3 + half);
                forgotten.push(half);
            }
        }
        let (found, shifts) = shifted(&model, &prompt, count, CONTEXT, false);
        assert_eq!(found, wanted, "{name}");
        assert_eq!(shifts.iter().map(|shift| shift.forgotten).collect::<Vec<_>>(), forgotten, "{name}");
        assert!(shifts.len() >= 3 && shifts.iter().all(|shift| shift.kept == 3));
        assert_eq!(shifted(&model, &prompt, count, CONTEXT, true).0, wanted, "{name}, with guesses");
    }
}

#[test]
fn a_text_beyond_the_context_is_refused_unless_it_may_shift() {
    let model = Model::open(DEMO).unwrap();
    let prompt = tokens(10, 1000);
    let asked = TextOptions { context: Some(32), ..options(40) };
    let refused = model.generate_tokens(&prompt, &asked).err().unwrap();
    assert!(matches!(refused, ModelError::Context { limit: 32, .. }), "{refused}");
    assert!(refused.to_string().contains("context shift"), "{refused}");
    let shifting = TextOptions { context_shift: Some(4), ..asked };
    assert!(model.generate_tokens(&prompt, &shifting).is_ok());
    let keeps_all = TextOptions { context_shift: Some(31), ..shifting.clone() };
    let refused = model.generate_tokens(&prompt, &keeps_all).err().unwrap().to_string();
    assert!(refused.contains("context_shift") && refused.contains("31 tokens of 32"), "{refused}");
    let refused = model.generate_tokens(&tokens(32, 1000), &shifting).err().unwrap();
    assert!(
        matches!(refused, ModelError::Context { prompt_tokens: 32, .. }),
        "a prompt that fills it: {refused}"
    );
}
