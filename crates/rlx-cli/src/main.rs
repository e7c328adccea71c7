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

use std::process::ExitCode;

fn main() -> ExitCode {
    let outcome = args::parse().and_then(|cli| {
        let context = context::Context::new(cli.shared)?;
        cli.verb.run(&context)
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
