//! `cargo xtask onnx-suite`: the ONNX backend tests against the committed list of expected passes.

use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::process;

const REQUIREMENTS: &str = "xtask/onnx-requirements.txt";
const DATA: &str = "onnx/backend/test/data";
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

/// Runs the tests; arguments go to the runner. Without any, a test of the list that does not pass is an error.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    let data = install(&config.root)?;
    let data = data.to_string_lossy();
    let mut all =
        vec!["run", "--quiet", "--locked", "-p", "rlx-onnx", "--example", "onnx_suite", "--", &*data];
    match args {
        [] => all.extend(["--expect", EXPECTED]),
        args => all.extend(args.iter().map(String::as_str)),
    }
    process::run(&mut process::command("cargo", &all, &config.root))
}
