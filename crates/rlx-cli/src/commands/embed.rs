//! `rlx embed`.

use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output::{self, Devices};
use clap::ValueEnum;
use serde::Serialize;
use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};

/// Embed texts as vectors, pooled and normalised as the model folder says
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF file, or hub name in the local cache
    model: String,
    /// Texts, one vector each
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,
    /// File of texts, one a line; - for standard input
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// How vectors are printed [default: text, or json with --json]
    #[arg(long)]
    format: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One vector a line, values separated by blanks.
    Text,
    /// One JSON object.
    Json,
    /// A NumPy file of float32, one row a text.
    Npy,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    embeddings: Vec<Vec<f32>>,
    #[serde(flatten)]
    devices: Devices,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let format = match (self.format, context.shared.json) {
            (Some(Format::Text | Format::Npy), true) => {
                let advice = "give only one of them";
                return Err(Failure::usage("--json and --format disagree", "rlx embed", advice));
            }
            (format, json) => format.unwrap_or(if json { Format::Json } else { Format::Text }),
        };
        if format == Format::Npy && std::io::stdout().is_terminal() {
            let advice = "send it to a file: > embeddings.npy";
            return Err(Failure::usage("a NumPy file is no text for a terminal", "standard output", advice));
        }
        let texts = self.all_texts()?;
        let mut engine = Engine::open_fastest(Some(&self.model), context)?;
        engine.load(context)?;
        let embeddings = engine.devices.embed(&texts)?;
        match format {
            Format::Json => output::print_json(&Report {
                model: engine.source.name(),
                embeddings,
                devices: Devices::of(&engine.devices),
            }),
            Format::Npy => output::print_bytes(&output::npy(&embeddings)),
            Format::Text => output::print(&lines(&embeddings)),
        }
    }

    fn all_texts(&self) -> Result<Vec<String>> {
        let mut texts = self.texts.clone();
        if let Some(file) = &self.file {
            texts.extend(read_lines(file)?);
        }
        if texts.is_empty() && self.file.is_none() {
            let advice = "give texts as arguments, or --file F with one a line";
            return Err(Failure::usage("there is no text to embed", "rlx embed MODEL [TEXT]...", advice));
        }
        Ok(texts)
    }
}

fn lines(embeddings: &[Vec<f32>]) -> String {
    let line = |row: &Vec<f32>| row.iter().map(f32::to_string).collect::<Vec<_>>().join(" ") + "\n";
    embeddings.iter().map(line).collect()
}

fn read_lines(path: &Path) -> Result<Vec<String>> {
    let fail =
        |error: std::io::Error| Failure::new(error, path.display(), "check the file's name and rights");
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().lock().read_to_end(&mut bytes).map_err(fail)?;
    } else {
        bytes = std::fs::read(path).map_err(fail)?;
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..offset].iter().filter(|&&byte| byte == b'\n').count();
        let what = format!("not valid UTF-8 at byte {offset}, line {line}");
        Failure::new(what, path.display(), "save the file as UTF-8")
    })?;
    Ok(text.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_text_and_bad_utf8_is_placed() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("texts");
        std::fs::write(&path, "one\r\n\nthree\n").expect("temporary file");
        assert_eq!(read_lines(&path).expect("valid text"), ["one", "", "three"]);
        std::fs::write(&path, b"one\nt\xffo\n").expect("temporary file");
        let failure = format!("{:?}", read_lines(&path).expect_err("invalid text"));
        assert!(failure.contains("byte 5, line 2"), "{failure}");
    }
}
