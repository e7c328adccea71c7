//! `cargo xtask nvrtc`: the CUDA text of every kernel through NVIDIA's compiler, which needs no card.

use std::path::Path;

use crate::ci::FEATURES;
use crate::config::Config;
use crate::{process, venv};

const REQUIREMENTS: &str = "xtask/nvrtc-requirements.txt";
/// The folder of the compiler's library, as the package has it.
const LIBRARY: &str = "nvidia/cu13/lib";
/// What kernels spill, `architecture kernel bytes` a line.
const EXPECTED: &str = "xtask/nvrtc-spills.txt";
const SCRIPT: &str = "scripts/gpu/nvrtc.py";
/// Where the test writes the texts.
const TEXTS: &str = "target/cuda";
const TESTS: [&str; 2] = [
    "tests::kernels::every_kernel_as_cuda",
    "cuda::tests::a_text_becomes_machine_code_and_a_wrong_one_a_log",
];

/// Architectures of CI's stage: the first with matrix units and the one that spills most. All four take four minutes.
pub const IN_CI: [&str; 2] = ["sm_80", "sm_90a"];

/// Writes the texts, compiles them and holds spills to the list; `--write` makes a new list. Other arguments are architectures.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    let library = venv::install(&config.root, REQUIREMENTS, LIBRARY)?;
    let texts = config.root.join(TEXTS);
    if texts.exists() {
        std::fs::remove_dir_all(&texts).map_err(|error| format!("cannot empty {TEXTS}: {error}"))?;
    }
    write_texts(config, &library)?;
    let python = venv::python(&config.root);
    let args: Vec<&str> =
        [SCRIPT, "--expect", EXPECTED].into_iter().chain(args.iter().map(String::as_str)).collect();
    process::run(&mut process::command(&python.to_string_lossy(), &args, &config.root))
}

/// Runs the test that writes the texts, and the one that asks the compiler through the crate that devices use.
fn write_texts(config: &Config, library: &Path) -> Result<(), String> {
    // Set for the tests alone: a change of what cargo itself sees would have packages built anew.
    let runner = format!("target.'cfg(all())'.runner=[\"env\", \"LD_LIBRARY_PATH={}\"]", library.display());
    let mut args = vec!["test", "--workspace", "--locked", "--quiet", "--features", FEATURES, "--lib"];
    args.extend(["--config", &runner, "--", "--include-ignored", "--exact"]);
    args.extend(TESTS);
    process::run(&mut config.cargo(&args))
}
