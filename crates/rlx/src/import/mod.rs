//! From a model on disk to something that can be built: formats are told apart here, each is read in its module.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub mod gguf;
pub mod hf;
pub mod json;
pub mod npz;
pub mod safetensors;

use crate::weights::LoadError;

/// Why a model could not be imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A text file is larger than anything of its kind is.
    #[error("{}: {found_bytes} bytes, expected at most {limit_bytes}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// The limit for this kind of file.
        limit_bytes: u64,
    },
    /// A file is not the JSON that is accepted.
    #[error("{}: invalid JSON at byte {offset}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Byte offset of the fault.
        offset: usize,
        /// What is wrong there.
        message: String,
    },
    /// A field that the model needs is absent.
    #[error("{}: field `{field}` is missing, expected {expected}", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// Dotted path of the field.
        field: String,
        /// What it should hold.
        expected: String,
    },
    /// A field holds something else than it should.
    #[error("{}: field `{field}`: expected {expected}, found {found}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Dotted path of the field.
        field: String,
        /// What it should hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// Fields that may change the result are not understood.
    #[error("{}: {} not supported and may change the result: {}", path.display(),
            if fields.len() == 1 { "this field is" } else { "these fields are" }, list_fields(fields))]
    UnreadFields {
        /// The file.
        path: PathBuf,
        /// Dotted path and value (shortened) of each.
        fields: Vec<(String, String)>,
    },
    /// A file that the model needs is absent.
    #[error("{}: file is missing; {advice}", path.display())]
    MissingFile {
        /// The file.
        path: PathBuf,
        /// What to do, such as the command that fetches it.
        advice: String,
    },
    /// The name is neither a path nor a hub name in the local cache.
    #[error(
        "`{name}` is neither a file or folder here nor in the local Hugging Face cache ({}); fetch it with \
             `{command}`",
        list_paths(searched)
    )]
    NotFound {
        /// The name as given.
        name: String,
        /// Cache folders that were searched.
        searched: Vec<PathBuf>,
        /// The command that would fetch it.
        command: String,
    },
    /// The text is not a hub name, and no such path exists.
    #[error("`{name}`: no such file or folder, and not a hub name: {reason}")]
    BadName {
        /// The name as given.
        name: String,
        /// Which rule it breaks.
        reason: String,
    },
    /// The file or folder is of no known format.
    #[error("{}: not a model of a known format: {found}", path.display())]
    UnknownFormat {
        /// The path.
        path: PathBuf,
        /// What was found there.
        found: String,
    },
    /// The format is known, and its models are none of weights that a config describes.
    #[error("{}: a model of the format {format} is opened otherwise", path.display())]
    NotSupported {
        /// The path.
        path: PathBuf,
        /// The format.
        format: ModelSource,
    },
    /// A weight file cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
}

fn list_fields(fields: &[(String, String)]) -> String {
    let parts: Vec<String> = fields.iter().map(|(name, value)| format!("`{name}` = {value}")).collect();
    parts.join(", ")
}

fn list_paths(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "no cache folder is known".to_owned();
    }
    let parts: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    parts.join(", ")
}

/// What a path holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ModelSource {
    /// A Hugging Face folder: `config.json` and safetensors.
    HfFolder,
    /// A GGUF file.
    Gguf,
    /// An ONNX file.
    Onnx,
    /// A compiled `.rlx` bundle.
    Rlx,
}

impl std::fmt::Display for ModelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ModelSource::HfFolder => "hf",
            ModelSource::Gguf => "gguf",
            ModelSource::Onnx => "onnx",
            ModelSource::Rlx => "rlx",
        })
    }
}

impl ModelSource {
    /// Passes only for the formats whose models are weights that a config describes.
    ///
    /// # Errors
    /// [`ImportError::NotSupported`] naming the format.
    pub fn supported(self, path: &Path) -> Result<Self, ImportError> {
        match self {
            ModelSource::HfFolder | ModelSource::Gguf => Ok(self),
            format => Err(ImportError::NotSupported { path: path.to_path_buf(), format }),
        }
    }
}

/// Tells the format of a file or folder by its content, not by its name alone.
///
/// # Errors
/// [`ImportError::Io`] when it cannot be read, [`LoadError::Pickle`] for a pickled checkpoint,
/// [`ImportError::UnknownFormat`] for anything else.
pub fn sniff(path: &Path) -> Result<ModelSource, ImportError> {
    let io_error = |source| ImportError::Io { path: path.to_path_buf(), source };
    let unknown = |found: String| ImportError::UnknownFormat { path: path.to_path_buf(), found };
    let metadata = std::fs::metadata(path).map_err(io_error)?;
    if metadata.is_dir() {
        return sniff_folder(path);
    }
    if !metadata.is_file() {
        return Err(unknown("neither a file nor a folder".to_owned()));
    }
    safetensors::refuse_pickle(path)?;
    let mut head = Vec::with_capacity(16);
    File::open(path).map_err(io_error)?.take(16).read_to_end(&mut head).map_err(io_error)?;
    let extension = path.extension().and_then(|text| text.to_str()).unwrap_or("");
    match extension {
        _ if head.starts_with(b"GGUF") => Ok(ModelSource::Gguf),
        "rlx" => Ok(ModelSource::Rlx),
        // An ONNX file starts with protobuf field 1 (ir_version, a varint).
        "onnx" if head.first() == Some(&0x08) => Ok(ModelSource::Onnx),
        "onnx" => Err(unknown("named .onnx, but it does not start as an ONNX model does".to_owned())),
        "gguf" => Err(unknown("named .gguf, but it does not start with `GGUF`".to_owned())),
        "safetensors" => Err(unknown(
            "safetensors hold weights only; give the folder that holds `config.json` beside it".to_owned(),
        )),
        _ if head.is_empty() => Err(unknown("the file is empty".to_owned())),
        _ => Err(unknown(format!(
            "expected a folder with `config.json`, or a .gguf, .onnx or .rlx file; it starts with {:02x?}",
            &head[..head.len().min(8)]
        ))),
    }
}

fn sniff_folder(path: &Path) -> Result<ModelSource, ImportError> {
    if path.join(hf::CONFIG_FILE).is_file() {
        return Ok(ModelSource::HfFolder);
    }
    let io_error = |source| ImportError::Io { path: path.to_path_buf(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io_error)?.take(8) {
        names.push(entry.map_err(io_error)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let found = if names.is_empty() {
        "the folder is empty, expected `config.json`".to_owned()
    } else {
        format!("the folder has no `config.json`; it holds {}", names.join(", "))
    };
    Err(ImportError::UnknownFormat { path: path.to_path_buf(), found })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_content() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        assert!(matches!(sniff(folder.path()), Err(ImportError::UnknownFormat { .. })));
        assert_eq!(sniff(&write("model.bin2", b"GGUF\x03\0\0\0")).unwrap(), ModelSource::Gguf);
        assert_eq!(sniff(&write("m.onnx", &[0x08, 0x07, 0x12])).unwrap(), ModelSource::Onnx);
        assert_eq!(sniff(&write("m.rlx", b"anything")).unwrap(), ModelSource::Rlx);
        for (name, bytes) in
            [("w.onnx", &b"PK"[..]), ("w.gguf", b"none"), ("w.safetensors", b"x"), ("empty", b"")]
        {
            assert!(matches!(sniff(&write(name, bytes)), Err(ImportError::UnknownFormat { .. })), "{name}");
        }
        write("config.json", b"{}");
        assert_eq!(sniff(folder.path()).unwrap(), ModelSource::HfFolder);
        assert!(matches!(sniff(&folder.path().join("absent")), Err(ImportError::Io { .. })));
    }

    #[test]
    fn a_format_of_whole_graphs_is_a_typed_error() {
        let error = ModelSource::Rlx.supported(Path::new("m.rlx")).unwrap_err();
        assert_eq!(error.to_string(), "m.rlx: a model of the format rlx is opened otherwise");
        assert!(ModelSource::Gguf.supported(Path::new("m")).is_ok());
        assert!(ModelSource::HfFolder.supported(Path::new("m")).is_ok());
    }

    #[test]
    fn a_pickled_checkpoint_is_refused_with_the_way_to_convert() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pytorch_model.bin");
        std::fs::write(&path, b"PK\x03\x04").unwrap();
        let text = sniff(&path).unwrap_err().to_string();
        assert!(text.contains("pickle") && text.contains("safetensors"), "{text}");
    }
}
