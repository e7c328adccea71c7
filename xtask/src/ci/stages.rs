//! The stages of CI. A new one is a row here and a line in `xtask/stage-minutes.txt`.

use std::process::Command;

use super::Run;
use crate::{deny, nvrtc, onnx_suite, process, tidy, web};

pub struct Stage {
    pub name: &'static str,
    /// Part of `--quick`.
    pub quick: bool,
    pub run: fn(&Run) -> Result<(), String>,
}

pub const STAGES: &[Stage] = &[
    Stage { name: "fmt", quick: true, run: fmt },
    Stage { name: "tidy", quick: true, run: |run| tidy::run(run.config, &[]) },
    Stage { name: "deny", quick: false, run: |run| deny::run(run.config, &[]) },
    Stage { name: "clippy", quick: true, run: clippy },
    Stage { name: "tests", quick: true, run: tests },
    Stage { name: "doctests", quick: false, run: doctests },
    Stage { name: "onnx-suite", quick: false, run: |run| onnx_suite::run(run.config, &[]) },
    Stage {
        name: "nvrtc",
        quick: false,
        run: |run| nvrtc::run(run.config, &nvrtc::IN_CI.map(str::to_owned)),
    },
    Stage { name: "web", quick: false, run: |run| web::check(run.config, run.minilm_dir.as_deref()) },
    Stage { name: "docs", quick: false, run: docs },
];

fn fmt(run: &Run) -> Result<(), String> {
    process::run(&mut cargo(run, &["fmt", "--all", "--check"]))
}

/// Features that the default build leaves out, tested all the same; one set for all stages, so that nothing is built twice.
pub const FEATURES: &str = "rlx-cli/gpu,rlx-cli/cuda,rlx-gpu/translate";

fn clippy(run: &Run) -> Result<(), String> {
    let args = ["clippy", "--workspace", "--all-targets", "--locked", "--features", FEATURES];
    process::run(cargo(run, &args).args(["--", "--deny", "warnings"]))
}

/// Every test binary and example; `--quick` keeps unit tests, where the goldens of passes live.
fn tests(run: &Run) -> Result<(), String> {
    let targets: &[&str] =
        if run.quick { &["--lib", "--bins"] } else { &["--lib", "--bins", "--tests", "--examples"] };
    let args = ["test", "--workspace", "--locked", "--no-fail-fast", "--features", FEATURES];
    process::run(cargo(run, &args).args(targets))
}

fn doctests(run: &Run) -> Result<(), String> {
    process::run(&mut cargo(run, &["test", "--workspace", "--locked", "--doc", "--features", FEATURES]))
}

fn docs(run: &Run) -> Result<(), String> {
    let mut command =
        cargo(run, &["doc", "--workspace", "--lib", "--no-deps", "--locked", "--features", FEATURES]);
    process::run(command.env("RUSTDOCFLAGS", "--deny warnings"))
}

fn cargo(run: &Run, args: &[&str]) -> Command {
    let mut command = run.config.cargo(args);
    if let Some(folder) = &run.minilm_dir {
        command.env("RLX_TEST_MINILM_DIR", folder);
    }
    command
}
