//! `rlx plan` against what a fresh process really takes: each model runs at its full capacities in a process of its own. The estimate is
//! never under, and at most the larger of 2% and 32 MiB over.
#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

fn footprint(model: &str, ctx: &str) -> serde_json::Value {
    let output = Command::new(env!("CARGO_BIN_EXE_rlx"))
        .args(["footprint", model, "--ctx", ctx, "--threads", "2"])
        .env_clear()
        .env("RLX_CACHE_BYTES", "0")
        .output()
        .expect("the binary starts");
    assert!(output.status.success(), "{model}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn check(model: &str, ctx: &str) {
    let told = footprint(model, ctx);
    println!("{model} at {ctx}: {told}");
    assert_eq!(told["under"], false, "{model}: {told}");
    assert_eq!(told["within"], true, "{model}: {told}");
}

fn tiny_models() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data/models");
    let entries = std::fs::read_dir(root).expect("the golden models are there");
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.expect("it can be read").path()).collect();
    folders.sort();
    folders
}

#[test]
fn the_estimate_holds_for_every_golden_model() {
    for folder in tiny_models() {
        check(folder.to_str().expect("the path is UTF-8"), "32");
    }
}

#[test]
fn the_estimate_holds_for_minilm() {
    if let Some(folder) = std::env::var_os("RLX_TEST_MINILM_DIR") {
        check(folder.to_str().expect("the path is UTF-8"), "128");
    }
}
