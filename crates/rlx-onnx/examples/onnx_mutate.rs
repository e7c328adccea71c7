//! Imports and plans models with changed fields, any number of them.
//!
//! `onnx_mutate [--inputs N] [--seed S] [--keep FILE] [--mib M] [--seconds T]`
//!
//! Input `i` follows from seed `S + i` alone. A panic, memory that grows by more than M MiB while one input is imported and planned, or one that
//! takes longer than T seconds, is told with its seed and counted. `--keep` leaves each input in a file before it is tried, for what ends the process.

#[path = "../../../fuzz/recipes/onnx.rs"]
mod recipe;

use recipe::{Corpus, Outcome, Random, check, mutated};
use rlx::Session;
use rlx::memory::{MemoryProbe, SystemProbe};
use rlx::session::cpu_backend;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

struct Choices {
    inputs: u64,
    seed: u64,
    keep: Option<PathBuf>,
    mib: u64,
    seconds: u64,
}

fn choices() -> Result<Choices, String> {
    let mut choices = Choices { inputs: 1_000_000, seed: 1, keep: None, mib: 256, seconds: 10 };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().ok_or(format!("{arg} takes a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{arg} {value}: {e}"));
        match arg.as_str() {
            "--inputs" => choices.inputs = number()?,
            "--seed" => choices.seed = number()?,
            "--mib" => choices.mib = number()?,
            "--seconds" => choices.seconds = number()?,
            "--keep" => choices.keep = Some(value.into()),
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(choices)
}

/// The models to change, and where they are planned.
fn prepared() -> Result<(Corpus, Session), String> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    let corpus = Corpus::of(&[&data.join("weights"), &data.join("contrib")]);
    let backend = cpu_backend(None, Some(1)).map_err(|e| e.to_string())?;
    Ok((corpus, Session::with_backend(Arc::new(backend))))
}

fn run() -> Result<u64, String> {
    let choices = choices()?;
    let (corpus, session) = prepared()?;
    println!("{} models to change", corpus.len());
    let peak = || SystemProbe.peak_rss_bytes().unwrap_or(0);
    let (mut counts, mut faults) = ([0u64; 3], 0u64);
    let (started, mut slowest, mut before) = (Instant::now(), (0, 0), peak());
    for (done, seed) in (choices.seed..choices.seed.saturating_add(choices.inputs)).enumerate() {
        let input = mutated(&mut Random::new(seed), &corpus);
        if let Some(file) = &choices.keep {
            std::fs::write(file, &input).map_err(|e| e.to_string())?;
        }
        let began = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| check(&input, &session))) {
            Ok(Outcome::Refused) => counts[0] += 1,
            Ok(Outcome::Imported) => counts[1] += 1,
            Ok(Outcome::Planned) => counts[2] += 1,
            Err(_) => {
                faults += 1;
                println!("seed {seed}: panic");
            }
        }
        let (took, now) = (began.elapsed(), peak());
        slowest = slowest.max((took.as_millis(), seed));
        if took.as_secs() >= choices.seconds {
            faults += 1;
            println!("seed {seed}: {:.1} s", took.as_secs_f64());
        }
        if (now - before.min(now)) >> 20 > choices.mib {
            faults += 1;
            println!("seed {seed}: {} MiB", (now - before) >> 20);
        }
        before = now;
        if (done + 1) % 10_000 == 0 {
            println!("{} inputs, {faults} faults, {:.0} s", done + 1, started.elapsed().as_secs_f64());
        }
    }
    let [refused, imported, planned] = counts;
    println!("refused {refused}, imported {imported}, planned {planned}, faults {faults}");
    println!("slowest: {} ms (seed {}); peak memory {} MiB", slowest.0, slowest.1, peak() >> 20);
    Ok(faults)
}

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::from(2)
        }
    }
}

#[test]
fn changed_models_are_refused_or_planned() -> Result<(), String> {
    const ONCE_FAULTS: [u64; 16] = [
        2974, 6454, 6611, 12193, 13280, 14010, 16661, 16872, 17391, 17911, 18564, 124_986, 181_154,
        1_026_645, 1_208_555, 1_634_725,
    ];
    let (corpus, session) = prepared()?;
    let mut counts = [0; 3];
    for seed in (1..2_000).chain(ONCE_FAULTS) {
        counts[check(&mutated(&mut Random::new(seed), &corpus), &session) as usize] += 1;
    }
    assert!(counts.iter().all(|&count| count > 100), "refused, imported, planned: {counts:?}");
    Ok(())
}
