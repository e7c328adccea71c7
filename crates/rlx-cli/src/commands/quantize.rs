//! `rlx quantize`.

use crate::context::Context;
use crate::engine::folder;
use crate::failure::{Failure, Result};
use crate::output;
use crate::source::Source;
use rlx::config::ByteSize;
use rlx_models::gguf::export::{SCHEMES, Scheme, export};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Write a model folder as a GGUF file
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF file, or hub name in the local cache
    model: String,
    /// The file to write; it appears when it is complete, and replaces one that is there
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Type of the weights: F32, F16, BF16, Q8_0, Q4_0, Q4_K_M, Q5_K_M, Q6_K
    #[arg(long, value_name = "TYPE")]
    r#type: String,
}

#[derive(Serialize)]
struct Report {
    model: String,
    output: String,
    r#type: &'static str,
    bytes: u64,
    types: BTreeMap<&'static str, usize>,
    ms: f64,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let Some(scheme) = Scheme::named(&self.r#type) else {
            let names: Vec<&str> = SCHEMES.iter().map(|scheme| scheme.name).collect();
            let advice = format!("choose one of {}", names.join(", "));
            return Err(Failure::usage(format!("no type `{}`", self.r#type), "--type", advice));
        };
        let source = Source::find(Some(&self.model), context)?;
        let refused = match source {
            Source::Gguf(_) => Some("a GGUF file is not quantised again"),
            Source::Compiled(_) => Some("a compiled file is not quantised"),
            Source::Demo | Source::Folder(_) => None,
        };
        if let Some(refused) = refused {
            let advice = "give the folder with config.json and safetensors that it was made from";
            return Err(Failure::usage(refused, source.name(), advice));
        }
        let (started, mut line) = (Instant::now(), Line::new(context.watched()));
        let done = export(&folder(&source, context)?, &self.output, scheme, |at, of| line.show(at, of));
        line.clear();
        let done = done?;
        for name in &done.unused {
            context.detail(format!("not part of the model, left out: {name}"));
        }
        let ms = started.elapsed().as_secs_f64() * 1e3;
        if context.shared.json {
            return output::print_json(&Report {
                model: source.name(),
                output: self.output.display().to_string(),
                r#type: scheme.name,
                bytes: done.bytes,
                types: done.types,
                ms,
            });
        }
        let types: Vec<String> = done.types.iter().map(|(name, count)| format!("{count} {name}")).collect();
        let (path, size) = (self.output.display(), ByteSize(done.bytes));
        output::print(&format!("{path}: {size}, tensors: {}, {:.1} s\n", types.join(", "), ms / 1e3))
    }
}

/// A line on the terminal that says how far the work is; nothing where nobody watches.
struct Line {
    watched: bool,
    shown: Option<Instant>,
}

const BAR: usize = 30;

impl Line {
    fn new(watched: bool) -> Self {
        Line { watched, shown: None }
    }

    fn show(&mut self, at: u64, of: u64) {
        let recent = self.shown.is_some_and(|shown| shown.elapsed() < Duration::from_millis(100));
        if !self.watched || recent {
            return;
        }
        self.shown = Some(Instant::now());
        let share = at as f64 / of.max(1) as f64;
        let filled = (share * BAR as f64) as usize;
        let bar = format!("{}{}", "#".repeat(filled), " ".repeat(BAR.saturating_sub(filled)));
        eprint!("\r[{bar}] {:3.0}% {} of {}", share * 100.0, ByteSize(at), ByteSize(of));
    }

    fn clear(&self) {
        if self.shown.is_some() {
            eprint!("\r\x1b[2K");
        }
    }
}
