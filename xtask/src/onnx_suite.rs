//! `cargo xtask onnx-suite`: the ONNX backend tests against the committed list of expected passes.

use crate::ci::FEATURES;
use crate::config::Config;
use crate::{process, venv};

const REQUIREMENTS: &str = "xtask/onnx-requirements.txt";
/// Only the package's data is read.
const DATA: &str = "onnx/backend/test/data";
const RUNNER: &str = "target/debug/examples/onnx_suite";
/// Names of the tests that must pass, one a line.
const EXPECTED: &str = "xtask/onnx-expected.txt";

/// Devices whose results the list is held against.
const DEVICES: [&str; 2] = ["cpu", "reference"];
/// The first graphics adapter is held to a list of its own: what passes there and takes little time on Mesa's driver.
const GPU_EXPECTED: &str = "xtask/onnx-gpu-expected.txt";

/// Runs the tests; arguments go to the runner. Without any, a test of the list that does not pass on one of the devices is an error.
///
/// The runner is built with the whole workspace, whose features the tests have built the kernels with already.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    let data = venv::install(&config.root, REQUIREMENTS, DATA)?;
    let build = ["build", "--workspace", "--locked", "--examples", "--quiet", "--features", FEATURES];
    process::run(&mut config.cargo(&build))?;
    let data = data.to_string_lossy();
    let runner = config.root.join(RUNNER);
    let run = |args: &[&str]| {
        let args: Vec<&str> = [&*data].into_iter().chain(args.iter().copied()).collect();
        process::run(&mut process::command(&runner.to_string_lossy(), &args, &config.root))
    };
    if !args.is_empty() {
        return run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    }
    DEVICES.iter().try_for_each(|device| run(&["--expect", EXPECTED, "--device", device]))?;
    run(&["--expect", GPU_EXPECTED, "--listed", "--device", "gpu"])
}
