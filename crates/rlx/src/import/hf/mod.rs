//! A Hugging Face model folder: where it is, and its JSON files as checked, typed values.

pub mod config;
mod generation;
mod gguf_adapter;
mod hub;
mod peft;
mod sentence;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use config::{ConfigReader, FromConfig, OneOrMany};
pub use generation::GenerationConfig;
pub use hub::{HfCacheDirs, HubName, ResolvedModel, resolve_model};
pub use peft::PeftAdapter;
pub use sentence::{
    PoolingConfig, PoolingMode, SentenceModule, SentenceModuleKind, SentencePrompts, SentenceTransformer,
};

use super::ImportError;
use super::safetensors::SafetensorsLoader;
use crate::weights::{BytesWeightLoader, WeightLoader};

/// The architecture's description.
pub const CONFIG_FILE: &str = "config.json";
/// The tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// A folder with `config.json`.
#[derive(Debug, Clone)]
pub struct HfFolder {
    root: PathBuf,
    name: String,
    held: Option<HeldFiles>,
}

/// Files that are not on disk by themselves.
#[derive(Debug, Clone)]
enum HeldFiles {
    Embedded(EmbeddedFiles),
    Bundled(Arc<[(String, Vec<u8>)]>),
}

/// Files of a model that is part of a program: names and contents.
pub type EmbeddedFiles = &'static [(&'static str, &'static [u8])];

impl HfFolder {
    /// Opens a path, or a hub name that is in the local cache.
    ///
    /// # Errors
    /// As [`resolve_model`]; [`ImportError::MissingFile`] without `config.json`.
    pub fn open(model: &str, dirs: &HfCacheDirs) -> Result<Self, ImportError> {
        let resolved = resolve_model(model, dirs)?;
        if resolved.path.is_file() {
            let format = super::sniff(&resolved.path)?.supported(&resolved.path)?;
            let found = format!("a {format} file, expected a folder");
            return Err(ImportError::UnknownFormat { path: resolved.path, found });
        }
        let folder = HfFolder { root: resolved.path, name: resolved.fetch_name, held: None };
        folder.need(CONFIG_FILE)?;
        Ok(folder)
    }

    /// A model whose files are part of the program; `name` stands for the folder in messages.
    pub fn embedded(name: &str, files: EmbeddedFiles) -> Self {
        HfFolder { root: PathBuf::from(name), name: name.to_owned(), held: Some(HeldFiles::Embedded(files)) }
    }

    /// A model whose files are part of another file, which `path` names.
    pub fn bundled(path: &Path, files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let held = Some(HeldFiles::Bundled(files.into_iter().collect()));
        HfFolder { root: path.to_path_buf(), name: path.display().to_string(), held }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `config.json`, for the architecture to read.
    ///
    /// # Errors
    /// As [`ConfigReader::open`].
    pub fn config(&self) -> Result<ConfigReader, ImportError> {
        let missing =
            || ImportError::MissingFile { path: self.root.join(CONFIG_FILE), advice: self.advice() };
        self.reader(CONFIG_FILE)?.ok_or_else(missing)
    }

    /// `generation_config.json`, where there is one.
    ///
    /// # Errors
    /// As [`GenerationConfig::read`].
    pub fn generation_config(&self) -> Result<Option<GenerationConfig>, ImportError> {
        self.reader("generation_config.json")?.as_ref().map(GenerationConfig::read).transpose()
    }

    /// `tokenizer_config.json`, where there is one.
    ///
    /// # Errors
    /// As [`ConfigReader::open`].
    pub fn tokenizer_config(&self) -> Result<Option<ConfigReader>, ImportError> {
        self.reader("tokenizer_config.json")
    }

    /// Any other JSON object of the folder, where there is one.
    ///
    /// # Errors
    /// As [`ConfigReader::open`].
    pub fn reader(&self, file: &str) -> Result<Option<ConfigReader>, ImportError> {
        let path = self.root.join(file);
        match self.held {
            Some(_) => self.content(file).map(|bytes| ConfigReader::from_bytes(path, bytes)).transpose(),
            None if path.is_file() => ConfigReader::open(path).map(Some),
            None => Ok(None),
        }
    }

    /// The content of a file that is part of the program, or of another file.
    pub fn content(&self, file: &str) -> Option<&[u8]> {
        match self.held.as_ref()? {
            HeldFiles::Embedded(files) => {
                files.iter().find(|(name, _)| *name == file).map(|(_, bytes)| *bytes)
            }
            HeldFiles::Bundled(files) => {
                files.iter().find(|(name, _)| name == file).map(|(_, bytes)| bytes.as_slice())
            }
        }
    }

    /// Whether the files are on disk by themselves.
    pub fn is_on_disk(&self) -> bool {
        self.held.is_none()
    }

    /// The path of `tokenizer.json`.
    ///
    /// # Errors
    /// [`ImportError::MissingFile`].
    pub fn tokenizer(&self) -> Result<PathBuf, ImportError> {
        self.need(TOKENIZER_FILE)
    }

    /// What sentence-transformers adds, where `modules.json` is there.
    ///
    /// # Errors
    /// As [`SentenceTransformer::open`].
    pub fn sentence_transformer(&self) -> Result<Option<SentenceTransformer>, ImportError> {
        if self.held.is_some() {
            return Ok(None);
        }
        SentenceTransformer::open(&self.root)
    }

    /// The weights, mapped.
    ///
    /// # Errors
    /// As [`SafetensorsLoader::open`].
    pub fn weights(&self) -> Result<SafetensorsLoader, ImportError> {
        SafetensorsLoader::open(&self.root).map_err(|error| match error {
            ImportError::MissingFile { path, advice } => {
                ImportError::MissingFile { path, advice: format!("{advice}; {}", self.advice()) }
            }
            other => other,
        })
    }

    /// The weights: mapped, or part of the program.
    ///
    /// # Errors
    /// As [`HfFolder::weights`].
    pub fn loader(&self) -> Result<Box<dyn WeightLoader>, ImportError> {
        match (&self.held, self.content("model.safetensors")) {
            (None, _) => Ok(Box::new(self.weights()?)),
            (_, Some(bytes)) => Ok(Box::new(BytesWeightLoader::from_safetensors(bytes)?)),
            (_, None) => {
                let path = self.root.join("model.safetensors");
                Err(ImportError::MissingFile { path, advice: self.advice() })
            }
        }
    }

    fn need(&self, file: &str) -> Result<PathBuf, ImportError> {
        let path = self.root.join(file);
        if path.is_file() { Ok(path) } else { Err(ImportError::MissingFile { path, advice: self.advice() }) }
    }

    fn advice(&self) -> String {
        format!("fetch it with `hf download {}`", self.name)
    }
}
