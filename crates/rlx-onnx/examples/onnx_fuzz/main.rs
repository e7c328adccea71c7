//! Random valid models, run in several ways that must agree within bounds of their rounding.
//!
//! `onnx_fuzz [--graphs N] [--seed S] [--python PYTHON] [--corpus FOLDER] [--minutes M]`
//!
//! Seeds are `S, S + 1, ..`. Each model is run by the reference evaluation, by the CPU optimised and unoptimised, with its extents
//! left open, and, with a Python that has it, by ONNX Runtime. What differs is made smaller and written to the folder.

mod coded;
mod control;
mod engines;
mod generate;
mod graph;
mod layers;
mod minimise;
mod motifs;
mod movement;
mod oracle;
mod random;

use engines::Engines;
use generate::Maker;
use oracle::Oracle;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

struct Choices {
    graphs: u64,
    seed: u64,
    python: Option<PathBuf>,
    corpus: Option<PathBuf>,
    minutes: Option<u64>,
}

fn choices() -> Result<Choices, String> {
    let mut args = std::env::args().skip(1);
    let mut choices = Choices { graphs: 200, seed: 1, python: None, corpus: None, minutes: None };
    while let Some(arg) = args.next() {
        let value = args.next().ok_or(format!("{arg} takes a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{arg} {value}: {e}"));
        match arg.as_str() {
            "--graphs" => choices.graphs = number()?,
            "--seed" => choices.seed = number()?,
            "--minutes" => choices.minutes = Some(number()?),
            "--python" => choices.python = Some(value.into()),
            "--corpus" => choices.corpus = Some(value.into()),
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(choices)
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

/// The number of models that differ.
fn run() -> Result<usize, String> {
    let choices = choices()?;
    let oracle = choices.python.as_ref().map(|python| Oracle::start(python)).transpose()?;
    let mut engines = Engines::new(oracle)?;
    let started = Instant::now();
    let limit = choices.minutes.map(|minutes| Duration::from_secs(60 * minutes));
    let (mut models, mut nodes, mut differences) = (0u64, 0usize, 0usize);
    let mut ops: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in choices.seed..choices.seed.saturating_add(choices.graphs) {
        if limit.is_some_and(|limit| started.elapsed() > limit) {
            break;
        }
        let model = Maker::model(seed);
        models += 1;
        nodes += model.nodes.len();
        model.nodes.iter().for_each(|node| *ops.entry(node.op).or_default() += 1);
        let found = engines.differ(&model);
        let difference = match found {
            Ok(None) => continue,
            Ok(Some(difference)) => difference,
            Err(reason) => {
                println!("seed {seed}: the reference evaluation: {reason}");
                differences += 1;
                continue;
            }
        };
        differences += 1;
        let small = minimise::minimise(&mut engines, &model, &difference);
        let after: Vec<&str> = small.nodes.iter().map(|node| node.op).collect();
        println!("seed {seed}: {:?} {}; {}", difference.way, difference.reason, after.join(" "));
        if let Some(folder) = &choices.corpus {
            let file = folder.join(format!("seed{seed}.onnx"));
            let written =
                std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&file, small.file(false, true)));
            written.map_err(|e| format!("{}: {e}", file.display()))?;
        }
    }
    report(models, nodes, differences, &ops, &engines, started.elapsed());
    Ok(differences)
}

fn report(
    models: u64,
    nodes: usize,
    differences: usize,
    ops: &BTreeMap<&str, usize>,
    engines: &Engines,
    time: Duration,
) {
    let list: Vec<String> = ops.iter().map(|(op, count)| format!("{op} {count}")).collect();
    println!("{}", list.join(", "));
    let mut refused: BTreeMap<String, usize> = BTreeMap::new();
    for message in &engines.refused {
        *refused.entry(message.chars().take(120).collect()).or_default() += 1;
    }
    for (message, count) in &refused {
        println!("ONNX Runtime does not take {count}: {message}");
    }
    let oracle = match engines.has_oracle() {
        true => format!("{} of them by ONNX Runtime too", models as usize - engines.refused.len()),
        false => "ONNX Runtime was not asked".to_owned(),
    };
    println!(
        "{models} models of {nodes} nodes, {differences} differences, {oracle}, {:.1} s",
        time.as_secs_f64()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seeds of CI.
    const SEEDS: std::ops::Range<u64> = 0..150;

    #[test]
    fn random_models_agree() {
        let mut engines = Engines::new(None).unwrap();
        for seed in SEEDS {
            let found = engines.differ(&Maker::model(seed));
            assert!(matches!(found, Ok(None)), "seed {seed}: {found:?}");
        }
    }

    #[test]
    fn a_seed_makes_the_same_model() {
        for seed in 0..20 {
            assert_eq!(Maker::model(seed).file(false, true), Maker::model(seed).file(false, true));
        }
    }

    #[test]
    fn every_step_is_reached() {
        let mut ops = std::collections::BTreeSet::new();
        for seed in 0..3000 {
            ops.extend(Maker::model(seed).nodes.iter().map(|node| node.op));
        }
        assert!(ops.len() >= 92, "{} ops: {ops:?}", ops.len());
    }
}
