//! `cargo xtask onnx-fuzz`: random models in several ways; `cargo xtask onnx-mutate`: models with changed fields. See the runners in
//! `crates/rlx-onnx/examples`.

use crate::config::Config;
use crate::process;

/// Random valid models.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    runner("onnx_fuzz", config, args)
}

/// Models that are hardly valid.
pub fn mutate(config: &Config, args: &[String]) -> Result<(), String> {
    runner("onnx_mutate", config, args)
}

/// Builds a runner with the whole workspace, whose features the tests use too; arguments go to it.
fn runner(name: &str, config: &Config, args: &[String]) -> Result<(), String> {
    let build = ["build", "--workspace", "--locked", "--example", name, "--quiet"];
    process::run(&mut process::command("cargo", &build, &config.root))?;
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let runner = config.root.join("target/debug/examples").join(name);
    process::run(&mut process::command(&runner.to_string_lossy(), &args, &config.root))
}
