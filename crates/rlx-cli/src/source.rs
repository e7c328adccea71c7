//! What MODEL means: a folder, a GGUF file, a hub name in the local cache, or the built-in model.

use crate::context::Context;
use crate::failure::{Failure, Result};
use rlx::import::hf::{HfFolder, resolve_model};
use rlx::import::{ModelSource, sniff};
use std::path::PathBuf;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The model in the binary.
    Demo,
    /// A folder.
    Folder(PathBuf),
    /// A file that `rlx compile` wrote.
    Compiled(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
}

impl Source {
    /// Finds MODEL and says on standard error what was found. A local path comes first.
    pub fn find(model: Option<&str>, context: &Context) -> Result<Source> {
        let Some(name) = model else {
            context.note("model: the built-in demo");
            return Ok(Source::Demo);
        };
        let dirs = context.config.hf_cache_dirs();
        let resolved = resolve_model(name, &dirs).map_err(|error| offline_advice(error.into(), context))?;
        if resolved.path.is_file() {
            let format = sniff(&resolved.path)?;
            let file = match format {
                ModelSource::Rlx => Some(Source::Compiled(resolved.path.clone())),
                _ if format.supported(&resolved.path)? == ModelSource::Gguf => {
                    Some(Source::Gguf(resolved.path.clone()))
                }
                _ => None,
            };
            if let Some(file) = file {
                context.note(format!("model: {}", resolved.path.display()));
                return Ok(file);
            }
        }
        HfFolder::open(name, &dirs).map_err(|error| offline_advice(error.into(), context))?;
        context.note(format!("model: {}", resolved.path.display()));
        Ok(Source::Folder(resolved.path))
    }

    /// The name in results.
    pub fn name(&self) -> String {
        match self {
            Source::Demo => "demo".to_owned(),
            Source::Folder(path) | Source::Gguf(path) | Source::Compiled(path) => path.display().to_string(),
        }
    }
}

/// Fetching is proposed only where it is allowed.
fn offline_advice(failure: Failure, context: &Context) -> Failure {
    if context.config.offline() { failure.with_offline_advice() } else { failure }
}
