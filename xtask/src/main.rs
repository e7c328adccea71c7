//! Project tasks: `cargo xtask <task>`. Each task is one module and one row of [`TASKS`].

mod arm;
mod build_figures;
mod ci;
mod config;
mod debian;
mod deny;
mod disassembly;
mod gpu_bench;
mod minilm;
mod nvrtc;
mod onnx_fuzz;
mod onnx_suite;
mod process;
mod soak;
mod tidy;
mod venv;
mod vulkan;
mod web;

use std::process::ExitCode;

use config::Config;

struct Task {
    name: &'static str,
    usage: &'static str,
    run: fn(&Config, &[String]) -> Result<(), String>,
}

const TASKS: &[Task] = &[
    Task { name: "ci", usage: "[--quick]  every stage, or the ones that fit in three minutes", run: ci::run },
    Task {
        name: "test",
        usage: "full CI, installing what it needs into .venv first",
        run: ci::run_installing,
    },
    Task { name: "tidy", usage: "the house rules that no compiler checks", run: tidy::run },
    Task {
        name: "deny",
        usage: "licences, sources, duplicates and native code of dependencies",
        run: deny::run,
    },
    Task {
        name: "onnx-suite",
        usage: "[OPTIONS]  the ONNX backend tests; installs the pinned onnx package into .venv",
        run: onnx_suite::run,
    },
    Task {
        name: "onnx-fuzz",
        usage: "[--graphs N] [--seed S] [--python PYTHON] [--corpus FOLDER]  random models, run in several ways",
        run: onnx_fuzz::run,
    },
    Task {
        name: "onnx-mutate",
        usage: "[--inputs N] [--seed S]  ONNX models with changed fields, imported and planned",
        run: onnx_fuzz::mutate,
    },
    Task {
        name: "arm",
        usage: "[FILTER]..  the kernels' tests as AArch64 code, by an emulator",
        run: arm::run,
    },
    Task {
        name: "nvrtc",
        usage: "[--write] [ARCHITECTURE..]  every kernel through NVIDIA's compiler, spills against the list",
        run: nvrtc::run,
    },
    Task {
        name: "web",
        usage: "[--quick | --build | --serve [PORT]]  the module of the web page, and the page in Chromium",
        run: web::run,
    },
    Task { name: "soak", usage: "faults in numbers that CI has no time for", run: soak::run },
    Task {
        name: "disassembly",
        usage: "hot loops of the kernels that keep operands on the stack",
        run: |config, _| disassembly::run(config),
    },
    Task {
        name: "gpu-bench",
        usage: "[--dry] [--device NAME] [--program FILE]  devices held to the op cases and timed, PyTorch beside",
        run: gpu_bench::run,
    },
    Task {
        name: "build-figures",
        usage: "[--warm] [FEATURES].. (`default` for none)  crates, CPU seconds and binary size of release builds",
        run: build_figures::run,
    },
];

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    let Some(task) = TASKS.iter().find(|task| task.name == name) else {
        eprintln!("error: no task named `{name}`\nusage: cargo xtask <task>");
        for task in TASKS {
            eprintln!("  {:14} {}", task.name, task.usage);
        }
        return ExitCode::from(2);
    };
    match Config::read().and_then(|config| (task.run)(&config, &rest)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}
