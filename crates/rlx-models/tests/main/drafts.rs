//! Guessed tokens and texts that go on from earlier ones: the same tokens as without.

use crate::goldens::{Golden, folders, name_of};
use rlx::backend::cpu::Precision;
use rlx_models::sampling::SamplingOptions;
use rlx_models::{
    Batch, BatchEvent, BatchOptions, BatchRequest, Beside, Built, Draft, Model, OpenOptions, PlanRequest,
    TextOptions,
};
use std::sync::Arc;

const TOKENS: usize = 24;

fn decoders() -> Vec<(String, Arc<Model>, Vec<Vec<u32>>)> {
    let mut decoders = Vec::new();
    for folder in folders() {
        let options = OpenOptions { precision: Some(Precision::F32), threads: Some(2), ..Default::default() };
        let model = Model::open_with(&folder, &options).unwrap();
        if let Built::Decoder(decoder) = model.built() {
            let room = decoder.info.max_positions - TOKENS;
            let mut prompts = Golden::open(&folder).ids("prompts");
            prompts.retain(|prompt| prompt.len() <= room);
            prompts.truncate(2);
            decoders.push((name_of(&folder), Arc::new(model), prompts));
        }
    }
    assert!(decoders.len() > 20);
    decoders
}

fn options(sampling: &SamplingOptions, draft: Draft) -> TextOptions {
    TextOptions { max_tokens: TOKENS, sampling: sampling.clone(), draft, ..TextOptions::default() }
}

/// Tokens, and how many guesses were right.
fn said(model: &Model, prompt: &[u32], options: &TextOptions) -> (Vec<u32>, usize) {
    let mut text = model.generate_tokens(prompt, options).unwrap();
    text.by_ref().for_each(|piece| drop(piece.unwrap()));
    (text.token_ids().to_vec(), text.drafts().accepted)
}

#[test]
fn guesses_never_change_a_text() {
    let sampled = SamplingOptions { temperature: 0.7, seed: 3, ..SamplingOptions::greedy() };
    let penalised = SamplingOptions { repetition_penalty: 1.3, ..SamplingOptions::greedy() };
    let (mut right, mut texts) = ([0, 0], 0);
    for (name, model, prompts) in decoders() {
        for prompt in &prompts {
            // A prompt that repeats itself, so that there is something to look up.
            let twice = [&prompt[..], prompt].concat();
            let prompt = if twice.len() + TOKENS <= model.context_limit() { &twice } else { prompt };
            for sampling in [&SamplingOptions::greedy(), &sampled, &penalised] {
                let (plain, _) = said(&model, prompt, &options(sampling, Draft::Off));
                let lookup = Draft::Lookup { tokens: 5 };
                let itself = Draft::Model { model: Arc::clone(&model), tokens: 3 };
                let length_dependent = matches!(name.as_str(), "llama-dynamic" | "phi3-longrope");
                for (kind, draft) in [lookup, itself].into_iter().enumerate() {
                    if kind == 1 && length_dependent {
                        continue;
                    }
                    let (guessed, accepted) = said(&model, prompt, &options(sampling, draft));
                    assert_eq!(guessed, plain, "{name} {sampling:?} kind {kind}");
                    right[kind] += accepted;
                }
                texts += 1;
            }
        }
    }
    println!("{texts} texts; {right:?} guesses right");
    assert!(right.iter().all(|&right| right > texts / 2), "{right:?} of {texts} texts");
}

#[test]
fn a_text_that_goes_on_from_an_earlier_one_is_that_from_nothing() {
    let greedy = SamplingOptions::greedy();
    let mut reused = 0;
    for (name, model, prompts) in decoders() {
        let mut held = None;
        for prompt in &prompts {
            let asked = TextOptions { max_tokens: 8, ..options(&greedy, Draft::Off) };
            let mut turn = prompt.clone();
            for _ in 0..2 {
                let (expected, _) = said(&model, &turn, &asked);
                let mut text = model.generate_after(held.take(), &turn, &asked).unwrap();
                text.by_ref().for_each(|piece| drop(piece.unwrap()));
                assert_eq!(text.token_ids(), expected, "{name}");
                reused += text.reused();
                turn.extend_from_slice(text.token_ids());
                turn.extend_from_slice(&prompt[..1]);
                held = Some(text.into_held());
                if turn.len() + 8 > model.context_limit() {
                    break;
                }
            }
        }
    }
    println!("{reused} tokens not run again");
    assert!(reused > 200, "{reused}");
}

#[test]
fn requests_of_a_batch_that_begin_alike_share_blocks_and_say_the_same() {
    let mut reused = 0;
    for (name, model, prompts) in decoders() {
        if model.context_limit() < 110 {
            continue;
        }
        let options = BatchOptions { sequences: 2, context: 110, ..BatchOptions::default() };
        let mut batch = Batch::new(&model, options).unwrap();
        let long: Vec<u32> = prompts.concat().into_iter().cycle().take(80).collect();
        let other = [&long[..70], &long[..10]].concat();
        let mut expected = Vec::new();
        let mut submit = |batch: &mut Batch<'_>, prompt: &[u32]| {
            let sampling = SamplingOptions::greedy();
            let request = BatchRequest { prompt: prompt.to_vec(), max_tokens: 20, sampling, adapter: None };
            batch.submit(request).unwrap();
            let asked = TextOptions { max_tokens: 20, ..TextOptions::default() };
            expected.push(said(&model, prompt, &asked).0);
        };
        submit(&mut batch, &long);
        let mut found = vec![Vec::new(); 4];
        let mut first = None;
        for round in 0.. {
            // While the first runs, then when nothing does, then with all blocks needed.
            if round == 5 {
                submit(&mut batch, &other);
            }
            if round > 5 && batch.is_idle() {
                if first.is_some() {
                    break;
                }
                first = Some(());
                submit(&mut batch, &long);
                submit(&mut batch, &long[1..]);
            }
            for event in batch.step().unwrap() {
                if let BatchEvent::Token(id, token) = event {
                    found[id.index() as usize].push(token);
                }
            }
        }
        assert_eq!(found, expected, "{name}");
        reused += batch.reused();
    }
    println!("{reused} tokens not run again");
    assert!(reused > 500, "{reused}");
}

#[test]
fn a_draft_model_with_other_tokens_is_refused() {
    let decoders = decoders();
    let find = |wanted: &str| decoders.iter().find(|(name, ..)| name == wanted).unwrap();
    let ((_, model, prompts), (_, other, _)) = (find("llama"), find("llama-linear"));
    let draft = Draft::Model { model: Arc::clone(other), tokens: 3 };
    let asked = options(&SamplingOptions::greedy(), draft);
    let error = model.generate_tokens(&prompts[0], &asked).err().unwrap().to_string();
    assert!(error.contains("the draft model"), "{error}");
}

#[test]
fn a_draft_model_shares_the_registry_and_what_both_read_counts_once() {
    let folder = folders().into_iter().find(|folder| name_of(folder) == "llama").unwrap();
    let options_of = |beside| OpenOptions { beside, threads: Some(2), ..OpenOptions::default() };
    let model = Model::open_with(&folder, &options_of(None)).unwrap();
    let beside = Some(Beside::of(&model, "draft"));
    let draft = Arc::new(Model::open_with(&folder, &options_of(beside.clone())).unwrap());
    let registry = model.compiled().weights();
    assert!(Arc::ptr_eq(registry, draft.compiled().weights()));
    let of = |name: &str| registry.placement(registry.lookup(name).unwrap()).unwrap().storage;
    assert_eq!(of("draft/model.norm.weight"), of("model.norm.weight"));

    let request = PlanRequest { context: Some(64), batch: None };
    let alone = model.plan(request, 2).unwrap().estimate;
    let both = model.plan_with_draft(&draft, request, 2).unwrap().estimate;
    assert_eq!((both.state_bytes, both.packed_bytes), (2 * alone.state_bytes, 2 * alone.packed_bytes));
    assert!((alone.weight_bytes..2 * alone.weight_bytes).contains(&both.weight_bytes), "{both:?} {alone:?}");
    let apart = Model::open_with(&folder, &options_of(None)).unwrap();
    let twice = model.plan_with_draft(&apart, request, 2).unwrap().estimate;
    assert_eq!(twice.weight_bytes, 2 * alone.weight_bytes);

    let prompt = Golden::open(&folder).ids("prompts").remove(0);
    let greedy = SamplingOptions::greedy();
    let (plain, _) = said(&model, &prompt, &options(&greedy, Draft::Off));
    let guesses = Draft::by(Arc::clone(&draft), &model, 3).unwrap();
    let (guessed, right) = said(&model, &prompt, &options(&greedy, guesses));
    assert_eq!(guessed, plain);
    assert!(right > 0);

    let other = folders().into_iter().find(|folder| name_of(folder) == "gpt2").unwrap();
    let other = Arc::new(Model::open_with(&other, &options_of(beside)).unwrap());
    let refused = Draft::by(other, &model, 3).unwrap_err().to_string();
    assert!(refused.contains("the draft model") && refused.contains("token"), "{refused}");
}
