//! `rlx compile`.

use super::onnx;
use super::sizes::Sizes;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Write a model as one file for this machine: plan, packed weights, tokenizer and config. Every verb that takes the model takes such a file as MODEL
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF or ONNX file, or hub name in the local cache [default: the built-in demo]
    model: Option<String>,
    /// File to write, named `.rlx`; one that is there is replaced when the new one is complete
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    sizes: Sizes,
}

/// What was made, and how long it took.
#[derive(Debug)]
pub struct Made {
    pub isa: String,
    pub load_ms: f64,
    pub write_ms: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    output: String,
    file_bytes: u64,
    isa: String,
    load_ms: f64,
    write_ms: f64,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        if self.output.extension().is_none_or(|extension| extension != "rlx") {
            let advice = "name the file with the ending `.rlx`, by which it is known as a compiled model";
            return Err(Failure::usage("the output is not named `.rlx`", self.output.display(), advice));
        }
        if let Some(file) = self.sizes.onnx_file(self.model.as_deref(), &[])? {
            let made = onnx::compile(&file, &self.sizes, &self.output, context)?;
            return self.told(file.display().to_string(), &made, context);
        }
        let mut engine = Engine::open(self.model.as_deref(), context)?;
        engine.load(context)?;
        let started = Instant::now();
        engine.model().write_artefact(&self.output, context.threads())?;
        let write_ms = started.elapsed().as_secs_f64() * 1e3;
        let made = Made { isa: engine.isa.to_string(), load_ms: engine.load_ms, write_ms };
        self.told(engine.source.name(), &made, context)
    }

    fn told(&self, model: String, made: &Made, context: &Context) -> Result<()> {
        let output: &Path = &self.output;
        let file_bytes = std::fs::metadata(output).map(|file| file.len()).unwrap_or(0);
        let Made { isa, load_ms, write_ms } = made;
        if context.shared.json {
            return output::print_json(&Report {
                model,
                output: output.display().to_string(),
                file_bytes,
                isa: isa.clone(),
                load_ms: *load_ms,
                write_ms: *write_ms,
            });
        }
        let mib = file_bytes as f64 / (1u64 << 20) as f64;
        context.note(format!("wrote {} ({mib:.1} MiB) for {isa} in {write_ms:.0} ms", output.display()));
        Ok(())
    }
}
