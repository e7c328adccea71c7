//! Experts that are loaded as the router asks: the bits of all in memory, memory as estimated, decisions that repeat.

use crate::goldens::{Golden, open_folder};
use rlx::memory::experts::{ExpertPolicy, ExpertStats, ExpertTrace, replay};
use rlx_models::generate::{DecoderRuntime, SequenceStep, StepInputs};
use rlx_models::gguf::export::{Scheme, export};
use rlx_models::kv::{BlockPool, BlockTable};
use rlx_models::{Built, Model, ModelError, OpenOptions, PlanRequest};
use std::path::{Path, PathBuf};

const CHECKPOINTS: [&str; 4] = ["mixtral", "qwen2-moe", "qwen2-moe-mixed", "qwen3-moe"];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data/models").join(name)
}

fn open(folder: &Path, threads: usize, expert_budget: Option<usize>) -> Model {
    let options = OpenOptions { threads: Some(threads), expert_budget, ..OpenOptions::default() };
    Model::from_folder(open_folder(folder), &options).unwrap()
}

/// Bits of the logits after each step: the prompt's first tokens at once, then one by one.
fn bits(model: &Model, prompt: &[u32]) -> Vec<u32> {
    let Built::Decoder(decoder) = model.built() else { panic!("a decoder") };
    let mut runner = model.decoder_runner(128).unwrap();
    let (mut pool, mut table) = (BlockPool::of(&runner.limits()), BlockTable::new());
    pool.reserve(&mut table, prompt.len()).unwrap();
    let (mut inputs, mut found, mut past) = (StepInputs::default(), Vec::new(), 0);
    while past < prompt.len() {
        let end = if past == 0 { prompt.len().div_ceil(2) } else { past + 1 };
        pool.advance(&mut table, past, end).unwrap();
        inputs.clear(table.blocks().len());
        let (tokens, length) = (&prompt[past..end], prompt.len());
        inputs.push(&decoder.info, SequenceStep { tokens, past, length, table: &table, wants_logits: true });
        let mut logits = vec![f32::NAN; decoder.info.vocab];
        runner.step(&inputs, &mut logits).unwrap();
        found.extend(logits.iter().map(|v| v.to_bits()));
        past = end;
    }
    found
}

fn prompt(folder: &Path) -> Vec<u32> {
    Golden::open(folder).ids("prompts").pop().unwrap()
}

fn experts_of(model: &Model) -> usize {
    model.experts_in_all().unwrap().num_experts
}

#[test]
fn every_budget_from_one_expert_up_gives_the_bits_of_all_in_memory() {
    for name in CHECKPOINTS {
        let (folder, prompt) = (data(name), prompt(&data(name)));
        let resident = open(&folder, 2, None);
        let expected = bits(&resident, &prompt);
        for budget in 1..=experts_of(&resident) {
            for threads in [1, 2] {
                let model = open(&folder, threads, Some(budget));
                assert_eq!(bits(&model, &prompt), expected, "{name}, {budget} experts, {threads} threads");
                assert_eq!(bits(&model, &prompt), expected, "{name}, {budget} experts, again");
            }
        }
    }
}

/// Q8_0 blocks where rows are whole ones: gate and up of these checkpoints, and attention.
#[test]
fn experts_of_blocks_give_the_bits_of_all_in_memory_within_any_budget() {
    let temporary = tempfile::tempdir().unwrap();
    for name in ["mixtral", "qwen3-moe"] {
        let path = temporary.path().join(format!("{name}.gguf"));
        export(&open_folder(&data(name)), &path, Scheme::named("Q8_0").unwrap(), |_, _| {}).unwrap();
        let open = |threads, expert_budget| {
            let options = OpenOptions { threads: Some(threads), expert_budget, ..OpenOptions::default() };
            Model::open_with(&path, &options).unwrap()
        };
        let prompt = prompt(&data(name));
        let resident = open(2, None);
        let experts = experts_of(&resident);
        let expected = bits(&resident, &prompt);
        let report = resident.compiled().report().unwrap();
        let kernels: Vec<&str> = report.steps.iter().map(|step| step.kernel.as_str()).collect();
        assert!(kernels.iter().any(|kernel| kernel.starts_with("moe_linear_q8_0")), "{name}: {kernels:?}");
        for budget in 1..=experts {
            for threads in [1, 2] {
                let model = open(threads, Some(budget));
                assert_eq!(bits(&model, &prompt), expected, "{name}, {budget} experts, {threads} threads");
            }
        }
    }
}

#[test]
fn memory_goes_down_by_what_the_estimate_says() {
    for name in CHECKPOINTS {
        let folder = data(name);
        let resident = open(&folder, 1, None);
        let all = resident.experts_in_all().unwrap();
        let request = PlanRequest { context: Some(64), batch: None };
        let base = resident.plan(request, 1).unwrap().estimate;
        resident.compiled().program().unwrap();
        let packed = |model: &Model| model.compiled().weights().packed_bytes();
        for budget in 1..=all.num_experts {
            let model = open(&folder, 1, Some(budget));
            let estimate = model.plan(request, 1).unwrap().estimate;
            let held = all.with_budget(budget);
            assert_eq!(estimate.peak_bytes(), held.peak_with_offload(&base), "{name} {budget}");
            bits(&model, &prompt(&folder));
            let pool = model.experts().unwrap();
            assert_eq!(pool.estimate(), Some(held), "{name} {budget}");
            let measured = pool.stats().resident_bytes;
            let loaded = pool.stats().misses * held.expert_param_bytes;
            let expected = held.resident_expert_weight_bytes.min(loaded);
            assert!(measured <= held.resident_expert_weight_bytes, "{name} {budget}: {measured}");
            if budget <= 2 {
                assert_eq!(measured, expected, "{name}: slots stay empty though experts were needed");
            }
            assert_eq!(packed(&model) + all.all_expert_weight_bytes, packed(&resident), "{name} {budget}");
        }
    }
}

fn without_time(stats: ExpertStats) -> ExpertStats {
    ExpertStats { stall_nanos: 0, ..stats }
}

#[test]
fn decisions_repeat_and_a_replay_of_the_trace_moves_the_same_bytes() {
    let (folder, prompt) = (data("qwen3-moe"), prompt(&data("qwen3-moe")));
    let run = |threads| {
        let model = open(&folder, threads, Some(2));
        let pool = model.experts().unwrap();
        model.compiled().program().unwrap();
        pool.start_trace();
        bits(&model, &prompt);
        (without_time(pool.stats()), pool.take_trace().unwrap())
    };
    let (stats, trace) = run(1);
    assert_eq!((stats, trace.clone()), run(2));
    let replayed = replay(&trace, ExpertPolicy::default(), 2, false);
    assert_eq!((replayed.hits, replayed.misses), (stats.hits, stats.misses));
    assert_eq!((replayed.bytes_moved, replayed.stalls), (stats.bytes_moved, stats.stalls));
    assert_eq!(ExpertTrace::parse(&trace.to_text()).unwrap(), trace);
}

#[test]
fn layer_ids_are_those_of_the_model() {
    let model = open(&data("qwen2-moe-mixed"), 1, Some(1));
    model.compiled().program().unwrap();
    let ids = model.experts().unwrap().layer_ids();
    let names = model.compiled().weights().names();
    let expected: std::collections::BTreeSet<usize> = names
        .iter()
        .filter(|name| name.contains(".experts."))
        .map(|name| name.split("layers.").nth(1).unwrap().split('.').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(ids, expected.into_iter().collect::<Vec<_>>());
}

#[test]
fn a_budget_of_no_expert_is_refused() {
    let options = OpenOptions { expert_budget: Some(0), ..OpenOptions::default() };
    let error = Model::from_folder(open_folder(&data("mixtral")), &options).err().unwrap();
    assert!(matches!(error, ModelError::Setting { setting: "expert_budget", .. }), "{error}");
}

#[test]
fn the_demo_mixture_writes_the_same_text_with_one_expert_in_memory() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo-moe");
    let text = |budget| {
        let model = open(&folder, 2, budget);
        let options = rlx_models::TextOptions { max_tokens: 48, ..Default::default() };
        let pieces = model.generate("Once upon a time", &options).unwrap();
        pieces.collect::<Result<String, _>>().unwrap()
    };
    let expected = text(None);
    assert!(expected.len() > 40, "{expected}");
    assert_eq!(text(Some(1)), expected);
}
