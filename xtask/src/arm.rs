//! Kernels of AArch64 on a machine that is none: built by a cross linker, run by an emulator in user mode.

use crate::config::Config;
use crate::process;

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";
const FOLDER: &str = "target/arm";

/// What is run where nothing is named: products of blocks, matrix products, vectors.
const FILTERS: &[&str] = &["quant_dot::", "gemm::", "isa::", "attention::"];

/// Runs the kernels' unit tests, or those whose names hold one of the arguments; the folder that was built is removed.
pub fn run(config: &Config, filters: &[String]) -> Result<(), String> {
    for program in [LINKER, EMULATOR] {
        process::capture(&mut process::command(program, &["--version"], &config.root))?;
    }
    let args = ["test", "--locked", "--package", "rlx-kernels", "--lib", "--target", TARGET];
    let mut command = process::command("cargo", &args, &config.root);
    command.args(["--target-dir", FOLDER, "--"]);
    match filters {
        [] => command.args(FILTERS),
        named => command.args(named),
    };
    command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER);
    command.env(
        "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
        format!("{EMULATOR} -cpu max -L /usr/aarch64-linux-gnu"),
    );
    let ran = process::run(&mut command);
    let folder = config.root.join(FOLDER);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    ran
}
