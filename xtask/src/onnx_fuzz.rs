//! `cargo xtask onnx-fuzz`: random models in several ways, see `crates/rlx-onnx/examples/onnx_fuzz`.

use crate::config::Config;
use crate::process;

const RUNNER: &str = "target/debug/examples/onnx_fuzz";

/// Builds the runner with the whole workspace, whose features the tests use too; arguments go to it.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    let build = ["build", "--workspace", "--locked", "--example", "onnx_fuzz", "--quiet"];
    process::run(&mut process::command("cargo", &build, &config.root))?;
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let runner = config.root.join(RUNNER);
    process::run(&mut process::command(&runner.to_string_lossy(), &args, &config.root))
}
