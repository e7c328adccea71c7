//! Which verbs take an ONNX file, and the sizes of its open dims.

use crate::failure::{Failure, Result, aot_failure};
use rlx::aot::{Artefact, ArtefactKind};
use rlx::import::{ModelSource, sniff};
use std::path::{Path, PathBuf};

/// Sizes of dims that an ONNX file leaves open.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Sizes {
    /// Size of a dim of an ONNX model's inputs that the file leaves open, INPUT.AXIS for one without a name; once for each
    #[arg(long = "dim", value_name = "NAME=N", value_parser = named_size)]
    pub dims: Vec<(String, usize)>,
}

fn named_size(text: &str) -> std::result::Result<(String, usize), String> {
    let wrong = || "expected NAME=N, such as batch=8".to_owned();
    let (name, size) = text.rsplit_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong)?;
    Ok((name.to_owned(), size.parse().map_err(|_| wrong())?))
}

impl Sizes {
    /// The file of an ONNX model that MODEL is, as it is or compiled, if it is one. `given` names arguments that only other models take.
    pub fn onnx_file(&self, model: Option<&str>, given: &[(&str, bool)]) -> Result<Option<PathBuf>> {
        let file = model.map(Path::new).filter(|path| path.is_file());
        let onnx = match file {
            Some(path) if path.extension().is_some_and(|extension| extension == "onnx") => {
                sniff(path)? == ModelSource::Onnx
            }
            Some(path) if path.extension().is_some_and(|extension| extension == "rlx") => {
                Artefact::is_kind(path, ArtefactKind::Onnx).map_err(|error| aot_failure(&error))?
            }
            _ => false,
        };
        let wrong = |what: String, argument: &str, advice: &str| Err(Failure::usage(what, argument, advice));
        match (onnx, given.iter().find(|(_, given)| *given)) {
            (false, _) if !self.dims.is_empty() => {
                wrong("this model is no ONNX file".into(), "--dim", "use --ctx and --batch")
            }
            (true, Some((argument, _))) => {
                let what = format!("{argument} has no meaning for an ONNX file");
                wrong(what, argument, "leave it out; sizes of open dims are given as --dim NAME=N")
            }
            (true, None) => Ok(file.map(Path::to_path_buf)),
            (false, _) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_has_a_name_and_a_number() {
        assert_eq!(named_size("x.0=8"), Ok(("x.0".to_owned(), 8)));
        assert_eq!(named_size("a=b=2"), Ok(("a=b".to_owned(), 2)));
        assert!(named_size("=8").is_err() && named_size("n=-1").is_err() && named_size("n").is_err());
    }
}
