//! `rlx compile`.

use super::sizes::Sizes;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// Write a model as one file for this machine: plan, packed weights, tokenizer and config. Every verb takes such a file as MODEL
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF file, or hub name in the local cache [default: the built-in demo]
    model: Option<String>,
    /// File to write, named `.rlx`; one that is there is replaced when the new one is complete
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
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
        if Sizes::default().onnx_file(self.model.as_deref(), &[])?.is_some() {
            let what = "a `.rlx` file holds one plan; an ONNX model may be many graphs, made for the extents it meets";
            let advice = "give the ONNX file itself to `rlx run`, `rlx plan`, `rlx explain` or `rlx bench`";
            return Err(Failure::usage(what, self.model.unwrap_or_default(), advice));
        }
        let mut engine = Engine::open(self.model.as_deref(), context)?;
        engine.load(context)?;
        let started = Instant::now();
        engine.model.write_artefact(&self.output, context.threads())?;
        let write_ms = started.elapsed().as_secs_f64() * 1e3;
        let file_bytes = std::fs::metadata(&self.output).map(|file| file.len()).unwrap_or(0);
        if context.shared.json {
            return output::print_json(&Report {
                model: engine.source.name(),
                output: self.output.display().to_string(),
                file_bytes,
                isa: engine.isa.to_string(),
                load_ms: engine.load_ms,
                write_ms,
            });
        }
        let mib = file_bytes as f64 / (1u64 << 20) as f64;
        context.note(format!(
            "wrote {} ({mib:.1} MiB) for {} in {write_ms:.0} ms",
            self.output.display(),
            engine.isa
        ));
        Ok(())
    }
}
