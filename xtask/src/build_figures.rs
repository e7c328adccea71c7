//! `cargo xtask build-figures`: what a clean release build of the binary costs, as one row for the README.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use crate::config::Config;
use crate::process;

/// Linux reports process times in hundredths of a second.
const TICKS_PER_SECOND: f64 = 100.0;
const TARGET: &str = "target/build-figures";

/// Builds `rlx-cli` in a scratch folder and prints crates, CPU seconds, wall seconds and bytes.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    if let Some(unknown) = args.first() {
        return Err(format!("build-figures takes no argument `{unknown}`"));
    }
    let target = config.root.join(TARGET);
    if target.exists() {
        std::fs::remove_dir_all(&target).map_err(|e| format!("cannot empty {TARGET}: {e}"))?;
    }
    process::run(&mut process::command("cargo", &["fetch", "--locked", "--quiet"], &config.root))?;
    let cpu_before = children_cpu_seconds()?;
    let started = Instant::now();
    let build = [
        "build",
        "--release",
        "--locked",
        "--package",
        "rlx-cli",
        "--message-format",
        "json-render-diagnostics",
    ];
    let messages =
        process::capture(process::command("cargo", &build, &config.root).env("CARGO_TARGET_DIR", &target))?;
    let wall = started.elapsed().as_secs_f64();
    let cpu = children_cpu_seconds()? - cpu_before;
    let crates = built_packages(&messages)?;
    let bytes = binary_bytes(&target)?;
    std::fs::remove_dir_all(&target).map_err(|e| format!("cannot empty {TARGET}: {e}"))?;
    println!("| crates | CPU s | wall s | binary MiB |");
    println!("|---|---|---|---|");
    println!("| {crates} | {cpu:.0} | {wall:.0} | {:.1} |", bytes as f64 / f64::from(1 << 20));
    Ok(())
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
