//! The rlx command line.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod context;
mod demo;
mod engine;
mod failure;
mod interrupt;
mod output;
mod source;
mod warnings;

use std::process::ExitCode;

fn main() -> ExitCode {
    let started = rlx::memory::ProcProbe { root: "/".into() }.rss_apart();
    // Without the guard the process ends all the same, by a bare signal.
    let _ = rlx_tensor::storage::guard::install();
    // The process registers its backends here and nowhere else, so that the kind is free.
    #[cfg(any(feature = "gpu", feature = "cuda"))]
    let _ = rlx_gpu::register();
    let outcome = args::parse().and_then(|cli| {
        warnings::show(cli.shared.verbose);
        let context = context::Context::new(cli.shared, started)?;
        cli.verb.run(&context)
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
