//! GGUF, versions 2 and 3, little-endian: metadata, tensor entries, the tensors' bytes, in one file or split over several.
//! The format is described at <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! Nothing in a file is trusted: every count is held against the bytes that are there before anything is allocated, all
//! arithmetic is checked, and no byte is reached by an index.
#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod cursor;
mod header;
mod metadata;
mod split;
mod writer;

use std::path::Path;
use std::sync::Arc;

use rlx_tensor::DType;
use rlx_tensor::storage::mapped::{MapError, MappedFile, MappedRange};

use super::ImportError;
use crate::weights::{LoadError, NameTable, TensorView, WeightBytes, WeightLoader};

pub use header::{Header, HeaderTensor, TENSOR_TYPES, parse_header, tensor_type_code};
pub use metadata::{Array, Metadata, Value};
pub use split::split_name;
pub use writer::{TensorEntry, encode_header};

/// Where tensors start when the file does not say: multiples of this.
pub const DEFAULT_ALIGNMENT: u32 = 32;
/// Most files of a split model.
pub const MAX_SPLITS: u16 = 1024;

/// GGUF in mapped files.
#[derive(Debug)]
pub struct GgufLoader {
    metadata: Metadata,
    tensors: NameTable<MappedTensor>,
    files: Vec<Arc<MappedFile>>,
    header_bytes: usize,
}

#[derive(Debug)]
struct MappedTensor {
    dtype: DType,
    dims: Vec<usize>,
    range: MappedRange,
}

impl GgufLoader {
    /// Opens a file; of a split model any part, and the others beside it. Metadata is that of the first part.
    ///
    /// # Errors
    /// [`ImportError::Load`] for the first fault found, [`ImportError::MissingFile`] for a part that is not there.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImportError> {
        let path = path.as_ref();
        let (file, header) = open_part(path)?;
        let parts = split::parts_of(path, &header.metadata)?;
        let mut loader = GgufLoader {
            metadata: Metadata::default(),
            tensors: NameTable::new(),
            files: Vec::new(),
            header_bytes: 0,
        };
        if parts.is_empty() {
            loader.add(path, file, header)?;
            return Ok(loader);
        }
        let total = split::tensor_total(path, &header.metadata)?;
        for (number, part) in parts.iter().enumerate() {
            if !part.is_file() {
                let advice = format!("it is part {} of {}", number.saturating_add(1), parts.len());
                return Err(ImportError::MissingFile { path: part.clone(), advice });
            }
            let (file, header) = open_part(part)?;
            split::check_part(part, &header.metadata, number, parts.len())?;
            loader.add(part, file, header)?;
        }
        split::check_total(path, total, loader.len())?;
        Ok(loader)
    }

    fn add(&mut self, path: &Path, file: Arc<MappedFile>, header: Header) -> Result<(), LoadError> {
        self.header_bytes = self.header_bytes.saturating_add(header.data_start);
        if self.files.is_empty() {
            self.metadata = header.metadata;
        }
        for HeaderTensor { name, dtype, dims, offset, bytes } in header.tensors {
            let range = file.range(offset, bytes)?;
            if !self.tensors.insert(&name, MappedTensor { dtype, dims, range }) {
                return Err(LoadError::Duplicate { file: path.to_path_buf(), tensor: name });
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Bytes before the tensors, of all files: what opening reads.
    pub fn header_bytes(&self) -> usize {
        self.header_bytes
    }

    /// The mapped files, in the order of their parts.
    pub fn files(&self) -> &[Arc<MappedFile>] {
        &self.files
    }

    /// Checks every file as CORE asks before a run.
    ///
    /// # Errors
    /// [`MapError::Shrank`], [`MapError::Changed`].
    pub fn still_valid(&self) -> Result<(), MapError> {
        self.files.iter().try_for_each(|file| file.still_valid())
    }

    /// The mapped bytes of a tensor.
    pub fn range(&self, name: &str) -> Option<&MappedRange> {
        self.tensors.find(name).map(|(_, tensor)| &tensor.range)
    }
}

fn open_part(path: &Path) -> Result<(Arc<MappedFile>, Header), LoadError> {
    let file = MappedFile::open(path)?;
    let header = parse_header(path, file.bytes())?;
    Ok((file, header))
}

impl WeightLoader for GgufLoader {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>, LoadError> {
        let Some((name, tensor)) = self.tensors.find(name) else { return Ok(None) };
        tensor.range.still_valid()?;
        Ok(Some(TensorView { name, dtype: tensor.dtype, dims: &tensor.dims, bytes: tensor.range.bytes() }))
    }

    fn storage(&self, name: &str) -> Result<Option<WeightBytes>, LoadError> {
        Ok(self.tensors.find(name).map(|(_, tensor)| WeightBytes::Mapped(tensor.range.clone())))
    }

    fn names(&self) -> Box<dyn ExactSizeIterator<Item = &str> + '_> {
        Box::new(self.tensors.names())
    }
}

#[cfg(test)]
mod tests;
