//! `cargo xtask build-figures`: what a clean release build of the binary costs, a row for the README for each set of features.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use crate::config::Config;
use crate::process;

/// Linux reports process times in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;
const SCRATCH: &str = "target/build-figures";
/// The name of the set without features.
const DEFAULT: &str = "default";

/// Builds `rlx-cli` in a scratch folder for each set of features, the default one if none is given, and prints crates, CPU seconds, wall
/// seconds and bytes. `--warm` builds in the workspace's own folder, whatever is there already, and prints no seconds.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    let (flags, sets): (Vec<&str>, Vec<&str>) =
        args.iter().map(String::as_str).partition(|arg| arg.starts_with('-'));
    if let Some(unknown) = flags.iter().find(|flag| **flag != "--warm") {
        return Err(format!("build-figures takes `--warm` and sets of features, not `{unknown}`"));
    }
    let sets = if sets.is_empty() { vec![DEFAULT] } else { sets };
    process::run(&mut process::command("cargo", &["fetch", "--locked", "--quiet"], &config.root))?;
    let rows: Vec<String> = match flags.is_empty() {
        true => sets.iter().map(|set| clean(config, set)).collect::<Result<_, _>>()?,
        false => sets.iter().map(|set| warm(config, set)).collect::<Result<_, _>>()?,
    };
    println!("| features | crates | CPU s | wall s | binary MiB |");
    println!("|---|---|---|---|---|");
    rows.iter().for_each(|row| println!("{row}"));
    Ok(())
}

fn row(set: &str, crates: usize, seconds: Option<(f64, f64)>, bytes: u64) -> String {
    let seconds = seconds
        .map_or_else(|| "not timed | not timed".to_owned(), |(cpu, wall)| format!("{cpu:.0} | {wall:.0}"));
    format!("| {set} | {crates} | {seconds} | {:.1} |", bytes as f64 / f64::from(1 << 20))
}

fn clean(config: &Config, set: &str) -> Result<String, String> {
    let target = config.root.join(SCRATCH);
    empty(&target)?;
    let cpu_before = children_cpu_seconds()?;
    let started = Instant::now();
    let messages = build(config, set, &target)?;
    let wall = started.elapsed().as_secs_f64();
    let cpu = children_cpu_seconds()? - cpu_before;
    let figures = row(set, built_packages(&messages)?, Some((cpu, wall)), binary_bytes(&target)?);
    empty(&target)?;
    Ok(figures)
}

fn warm(config: &Config, set: &str) -> Result<String, String> {
    let target = config.root.join("target");
    let messages = build(config, set, &target)?;
    Ok(row(set, built_packages(&messages)?, None, binary_bytes(&target)?))
}

fn empty(target: &Path) -> Result<(), String> {
    match target.exists() {
        true => std::fs::remove_dir_all(target).map_err(|e| format!("cannot empty {SCRATCH}: {e}")),
        false => Ok(()),
    }
}

/// Builds the binary; cargo's messages, which name every package that was built or was there.
fn build(config: &Config, set: &str, target: &Path) -> Result<String, String> {
    let mut args = vec!["build", "--release", "--locked", "--package", "rlx-cli"];
    args.extend(["--message-format", "json-render-diagnostics"]);
    if set != DEFAULT {
        args.extend(["--features", set]);
    }
    process::capture(process::command("cargo", &args, &config.root).env("CARGO_TARGET_DIR", target))
}

fn binary_bytes(target: &Path) -> Result<u64, String> {
    let binary = target.join("release/rlx");
    let metadata =
        std::fs::metadata(&binary).map_err(|e| format!("no binary at {}: {e}", binary.display()))?;
    Ok(metadata.len())
}

/// Distinct packages among cargo's `compiler-artifact` messages.
fn built_packages(messages: &str) -> Result<usize, String> {
    let mut packages = BTreeSet::new();
    for line in messages.lines() {
        let message: serde_json::Value =
            serde_json::from_str(line).map_err(|e| format!("cargo's build message does not parse: {e}"))?;
        if message["reason"] == "compiler-artifact" {
            packages.insert(message["package_id"].as_str().unwrap_or_default().to_string());
        }
    }
    Ok(packages.len())
}

/// User and system time of all children that ended, from `/proc/self/stat`.
fn children_cpu_seconds() -> Result<f64, String> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|e| format!("needs Linux's /proc: {e}"))?;
    children_ticks(&stat)
        .map(|ticks| ticks as f64 / TICKS_PER_SECOND)
        .ok_or_else(|| "cannot read /proc/self/stat".into())
}

/// Fields 16 and 17, counted after the program name in parentheses, which may hold anything.
fn children_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(13).map(str::parse::<u64>);
    Some(fields.next()?.ok()? + fields.next()?.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn child_times_are_the_sixteenth_and_seventeenth_field() {
        let stat = "7 (a) b) S 4 5 6 7 8 9 10 11 12 13 14 15 100 23 18 19";
        assert_eq!(children_ticks(stat), Some(123));
        assert_eq!(children_ticks("7 (a) S 4"), None);
    }

    #[test]
    fn a_package_counts_once() {
        let messages = "{\"reason\":\"compiler-artifact\",\"package_id\":\"a\"}\n{\"reason\":\"compiler-artifact\",\
                        \"package_id\":\"a\"}\n{\"reason\":\"build-script-executed\",\"package_id\":\"b\"}";
        assert_eq!(built_packages(messages), Ok(1));
    }
}
