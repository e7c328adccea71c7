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
use super::json::{Json, JsonFault, read_json_file};
use super::safetensors::SafetensorsLoader;
use crate::weights::{BytesWeightLoader, SharedBytes, WeightLoader};

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
    Bundled(Arc<[(String, SharedBytes)]>),
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
        let folder = HfFolder { name: resolved.fetch_name, ..HfFolder::on_disk(&resolved.path) };
        folder.need(CONFIG_FILE)?;
        Ok(folder)
    }

    /// A path, whatever is there.
    fn on_disk(root: &Path) -> Self {
        HfFolder { root: root.to_path_buf(), name: root.display().to_string(), held: None }
    }

    /// A model whose files are part of the program; `name` stands for the folder in messages.
    pub fn embedded(name: &str, files: EmbeddedFiles) -> Self {
        HfFolder { root: PathBuf::from(name), name: name.to_owned(), held: Some(HeldFiles::Embedded(files)) }
    }

    /// A model whose files are in memory: those of another file, or fetched; `path` names the folder in messages. Files in folders
    /// of its own are named with `/`.
    pub fn bundled<B: Into<SharedBytes>>(path: &Path, files: impl IntoIterator<Item = (String, B)>) -> Self {
        let files = files.into_iter().map(|(name, bytes)| (name, bytes.into()));
        let held = Some(HeldFiles::Bundled(files.collect()));
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
        self.reader(CONFIG_FILE)?.ok_or_else(|| self.missing(CONFIG_FILE))
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

    /// Any JSON value of the folder, where there is one.
    ///
    /// # Errors
    /// As [`ConfigReader::open`].
    pub fn json(&self, file: &str) -> Result<Option<Json>, ImportError> {
        let path = self.root.join(file);
        match (&self.held, self.content(file)) {
            (None, _) if path.is_file() => read_json_file(&path, config::MAX_CONFIG_BYTES).map(Some),
            (_, Some(bytes)) => Json::parse(bytes)
                .map(Some)
                .map_err(|JsonFault { offset, message }| ImportError::Json { path, offset, message }),
            (_, None) => Ok(None),
        }
    }

    /// The content of a file that is in memory.
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
    /// As [`SentenceTransformer::of_folder`].
    pub fn sentence_transformer(&self) -> Result<Option<SentenceTransformer>, ImportError> {
        SentenceTransformer::of_folder(self)
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
        const FILE: &str = "model.safetensors";
        let bytes: SharedBytes = match &self.held {
            None => return Ok(Box::new(self.weights()?)),
            Some(HeldFiles::Bundled(files)) => match files.iter().find(|(name, _)| name == FILE) {
                Some((_, bytes)) => bytes.clone(),
                None => return Err(self.missing(FILE)),
            },
            Some(HeldFiles::Embedded(_)) => self.content(FILE).ok_or_else(|| self.missing(FILE))?.into(),
        };
        Ok(Box::new(BytesWeightLoader::from_safetensors(bytes)?))
    }

    fn need(&self, file: &str) -> Result<PathBuf, ImportError> {
        let path = self.root.join(file);
        if path.is_file() { Ok(path) } else { Err(self.missing(file)) }
    }

    fn missing(&self, file: &str) -> ImportError {
        ImportError::MissingFile { path: self.root.join(file), advice: self.advice() }
    }

    fn advice(&self) -> String {
        format!("fetch it with `hf download {}`", self.name)
    }
}
