//! Name -> typed view of a weight in a file or in memory.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rlx_tensor::storage::mapped::MapError;
use rlx_tensor::{DType, Element, Shape, byte_count};

use super::bytes::{SharedBytes, WeightBytes};
use crate::import::gguf;
use crate::import::npz::parse_npz;
use crate::import::safetensors::parse_header;

/// Why weights cannot be loaded. Offsets are in bytes from the start of the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file cannot be mapped, or changed under its map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The operating system refused a file.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The header, or the index of shards, is not what its format says.
    #[error("{}: broken header at byte {offset}: expected {expected}, found {found}", file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// Where.
        offset: u64,
        /// What the format asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor's entry in the header is malformed.
    #[error("{}: tensor `{tensor}`: expected {expected}, found {found}", file.display())]
    Entry {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the format asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A dtype that this build does not know.
    #[error("{}: tensor `{tensor}` at byte {offset}: unknown dtype `{found}`, expected one of {expected}", file.display())]
    UnknownDType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where its bytes start.
        offset: u64,
        /// The dtypes of this format that are known.
        expected: String,
        /// The dtype as written.
        found: String,
    },
    /// Shape and dtype give no valid size: it overflows, or does not fill whole blocks.
    #[error("{}: tensor `{tensor}` at byte {offset}: shape {dims:?} of {dtype} has no valid size", file.display())]
    Size {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where its bytes start.
        offset: u64,
        /// The dtype.
        dtype: DType,
        /// The shape.
        dims: Vec<usize>,
    },
    /// The length of the bytes is not what shape and dtype need.
    #[error("{}: tensor `{tensor}` at byte {offset}: {dtype} {dims:?} needs {expected_bytes} bytes, found \
             {found_bytes}", file.display())]
    Length {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where its bytes start.
        offset: u64,
        /// The dtype.
        dtype: DType,
        /// The shape.
        dims: Vec<usize>,
        /// Bytes needed.
        expected_bytes: u64,
        /// Bytes given.
        found_bytes: u64,
    },
    /// A tensor reaches past the end of its file: the file is truncated or its header wrong.
    #[error("{}: tensor `{tensor}` at byte {offset} ends at byte {end}, but the file has {file_bytes} bytes; it may \
             be truncated, fetch it again", file.display())]
    OutOfFile {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where its bytes start.
        offset: u64,
        /// Where they end.
        end: u64,
        /// Size of the file.
        file_bytes: u64,
    },
    /// Two tensors claim the same bytes.
    #[error("{}: tensor `{tensor}` at byte {offset} overlaps `{other}`, which ends at byte {other_end}", file.display())]
    Overlap {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where its bytes start.
        offset: u64,
        /// The tensor before it.
        other: String,
        /// Where that one ends.
        other_end: u64,
    },
    /// Bytes that belong to no tensor, in a format that allows none.
    #[error("{}: {bytes} bytes at byte {offset} belong to no tensor", file.display())]
    Gap {
        /// The file.
        file: PathBuf,
        /// Where the gap starts.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
    /// A name occurs twice.
    #[error("{}: tensor `{tensor}` is there twice", file.display())]
    Duplicate {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A shard that the index names is absent.
    #[error("{}: shard `{shard}` is missing; it holds `{tensor}`", index.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard's file name.
        shard: String,
        /// A tensor that it holds.
        tensor: String,
    },
    /// The index promises a tensor that its shard does not hold.
    #[error("{}: tensor `{tensor}` is not in shard `{shard}`", index.display())]
    NotInShard {
        /// The index file.
        index: PathBuf,
        /// The shard's file name.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// A pickled checkpoint, which is a program and not data.
    #[error("{}: pickle files can run any code and are not read; convert it once where you trust it: python -c \
             \"from transformers import AutoModel; \
             AutoModel.from_pretrained('DIR').save_pretrained('OUT', safe_serialization=True)\" writes safetensors",
            file.display())]
    Pickle {
        /// The file.
        file: PathBuf,
    },
    /// A tensor was borrowed as a type whose alignment or size its bytes do not have.
    #[error("tensor `{tensor}`: its bytes are not aligned for {dtype}; copy them first")]
    Unaligned {
        /// The tensor.
        tensor: String,
        /// The dtype asked for.
        dtype: DType,
    },
    /// A tensor was borrowed as another dtype than its own.
    #[error("tensor `{tensor}`: expected {expected}, found {found}")]
    DType {
        /// The tensor.
        tensor: String,
        /// The dtype asked for.
        expected: DType,
        /// The tensor's dtype.
        found: DType,
    },
}

/// A tensor as it stands in its file: nothing is copied or converted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TensorView<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub dims: &'a [usize],
    /// Little-endian, row-major; may be unaligned for its dtype.
    pub bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// Extents and dtype.
    pub fn shape(&self) -> Shape {
        Shape::new(self.dims, self.dtype)
    }

    /// The elements, borrowed.
    ///
    /// # Errors
    /// [`LoadError::DType`] for another type than the tensor's (Bool reads as `u8`), [`LoadError::Unaligned`].
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T], LoadError> {
        if self.dtype != T::DTYPE && !(self.dtype == DType::Bool && T::DTYPE == DType::U8) {
            return Err(LoadError::DType {
                tensor: self.name.to_owned(),
                expected: T::DTYPE,
                found: self.dtype,
            });
        }
        bytemuck::try_cast_slice(self.bytes)
            .map_err(|_| LoadError::Unaligned { tensor: self.name.to_owned(), dtype: T::DTYPE })
    }
}

/// Weights by name. Every look-up is O(1) and borrows.
pub trait WeightLoader: Send + Sync {
    /// The tensor, or `Ok(None)` where there is none of that name.
    ///
    /// # Errors
    /// [`LoadError`] when the file cannot be read any more.
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>, LoadError>;

    /// Extents and dtype alone; of a tensor that is made on demand without making it.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    fn shape(&self, name: &str) -> Result<Option<Shape>, LoadError> {
        Ok(self.tensor(name)?.map(|view| view.shape()))
    }

    /// The tensor's bytes, or `Ok(None)`.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    fn tensor_bytes(&self, name: &str) -> Result<Option<&[u8]>, LoadError> {
        Ok(self.tensor(name)?.map(|view| view.bytes))
    }

    /// The bytes in a form that a registry can hold: a shared range, never a copy.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    fn storage(&self, name: &str) -> Result<Option<WeightBytes>, LoadError>;

    /// All names, in file order.
    fn names(&self) -> Box<dyn ExactSizeIterator<Item = &str> + '_>;

    /// Number of tensors.
    fn len(&self) -> usize {
        self.names().len()
    }

    /// True when there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Names in file order with a constant-time look-up.
#[derive(Debug)]
pub(crate) struct NameTable<T> {
    items: Vec<(Arc<str>, T)>,
    places: HashMap<Arc<str>, usize>,
}

impl<T> NameTable<T> {
    pub(crate) fn new() -> Self {
        NameTable { items: Vec::new(), places: HashMap::new() }
    }

    /// False, and nothing changed, where the name is taken.
    pub(crate) fn insert(&mut self, name: &str, item: T) -> bool {
        if self.places.contains_key(name) {
            return false;
        }
        let name: Arc<str> = name.into();
        self.places.insert(Arc::clone(&name), self.items.len());
        self.items.push((name, item));
        true
    }

    pub(crate) fn find(&self, name: &str) -> Option<(&str, &T)> {
        let (name, item) = &self.items[*self.places.get(name)?];
        Some((name, item))
    }

    pub(crate) fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.items.iter().map(|(name, _)| &**name)
    }
}

/// Weights in memory; needs no file system.
#[derive(Debug)]
pub struct BytesWeightLoader {
    tensors: NameTable<HeldTensor>,
}

#[derive(Debug)]
struct HeldTensor {
    dtype: DType,
    dims: Vec<usize>,
    bytes: SharedBytes,
}

impl BytesWeightLoader {
    /// Raw bytes by name, each of dtype U8 and shape `[len]`.
    ///
    /// # Errors
    /// [`LoadError::Duplicate`].
    pub fn from_pairs<N, B>(pairs: impl IntoIterator<Item = (N, B)>) -> Result<Self, LoadError>
    where
        N: AsRef<str>,
        B: Into<SharedBytes>,
    {
        Self::from_typed(pairs.into_iter().map(|(name, bytes)| {
            let bytes = bytes.into();
            (name, vec![bytes.len()], DType::U8, bytes)
        }))
    }

    /// Tensors as (name, extents, dtype, little-endian bytes).
    ///
    /// # Errors
    /// [`LoadError::Duplicate`], [`LoadError::Size`], [`LoadError::Length`].
    pub fn from_typed<N, D, B>(tensors: impl IntoIterator<Item = (N, D, DType, B)>) -> Result<Self, LoadError>
    where
        N: AsRef<str>,
        D: Into<Vec<usize>>,
        B: Into<SharedBytes>,
    {
        let mut table = NameTable::new();
        for (name, dims, dtype, bytes) in tensors {
            let (name, dims, bytes) = (name.as_ref(), dims.into(), bytes.into());
            check_length(in_memory(), name, 0, dtype, &dims, bytes.len() as u64)?;
            if !table.insert(name, HeldTensor { dtype, dims, bytes }) {
                return Err(LoadError::Duplicate { file: in_memory().into(), tensor: name.to_owned() });
            }
        }
        Ok(BytesWeightLoader { tensors: table })
    }

    /// A whole safetensors file in memory, checked like a mapped one.
    ///
    /// # Errors
    /// [`LoadError`] as for a mapped file; the file is named `(memory)`.
    pub fn from_safetensors(file: impl Into<SharedBytes>) -> Result<Self, LoadError> {
        let file = file.into();
        let header = parse_header(in_memory(), file.as_slice())?;
        Self::from_typed(header.tensors.into_iter().map(|tensor| {
            let bytes = file.slice(tensor.offset, tensor.bytes).unwrap_or_else(|| Vec::new().into());
            (tensor.name, tensor.dims, tensor.dtype, bytes)
        }))
    }

    /// A whole GGUF file in memory, checked like a mapped one.
    ///
    /// # Errors
    /// [`LoadError`] as for a mapped file; the file is named `(memory)`.
    pub fn from_gguf(file: impl Into<SharedBytes>) -> Result<Self, LoadError> {
        let file = file.into();
        let header = gguf::parse_header(in_memory(), file.as_slice())?;
        Self::from_typed(header.tensors.into_iter().map(|tensor| {
            let bytes = file.slice(tensor.offset, tensor.bytes).unwrap_or_else(|| Vec::new().into());
            (tensor.name, tensor.dims, tensor.dtype, bytes)
        }))
    }

    /// A whole `.npz` archive in memory, checked like a mapped one.
    ///
    /// # Errors
    /// [`LoadError`] as for a mapped archive; the file is named `(memory)`.
    pub fn from_npz(file: impl Into<SharedBytes>) -> Result<Self, LoadError> {
        let file = file.into();
        let arrays = parse_npz(in_memory(), file.as_slice())?;
        Self::from_typed(arrays.into_iter().map(|array| {
            let bytes = file.slice(array.offset, array.bytes).unwrap_or_else(|| Vec::new().into());
            (array.name, array.dims, array.dtype, bytes)
        }))
    }
}

fn in_memory() -> &'static Path {
    Path::new("(memory)")
}

/// Checks that `found_bytes` is exactly what `dims` of `dtype` need.
pub(crate) fn check_length(
    file: &Path,
    tensor: &str,
    offset: u64,
    dtype: DType,
    dims: &[usize],
    found_bytes: u64,
) -> Result<(), LoadError> {
    let (file, tensor, owned_dims) = (|| file.to_path_buf(), || tensor.to_owned(), || dims.to_vec());
    match byte_count(dims, dtype) {
        None => Err(LoadError::Size { file: file(), tensor: tensor(), offset, dtype, dims: owned_dims() }),
        Some(bytes) if bytes as u64 != found_bytes => Err(LoadError::Length {
            file: file(),
            tensor: tensor(),
            offset,
            dtype,
            dims: owned_dims(),
            expected_bytes: bytes as u64,
            found_bytes,
        }),
        Some(_) => Ok(()),
    }
}

impl WeightLoader for BytesWeightLoader {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>, LoadError> {
        Ok(self.tensors.find(name).map(|(name, held)| TensorView {
            name,
            dtype: held.dtype,
            dims: &held.dims,
            bytes: held.bytes.as_slice(),
        }))
    }

    fn storage(&self, name: &str) -> Result<Option<WeightBytes>, LoadError> {
        Ok(self.tensors.find(name).map(|(_, held)| WeightBytes::Owned(held.bytes.clone())))
    }

    fn names(&self) -> Box<dyn ExactSizeIterator<Item = &str> + '_> {
        Box::new(self.tensors.names())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_pairs_are_u8_of_their_length_in_the_order_given() {
        let loader =
            BytesWeightLoader::from_pairs([("z", vec![1u8, 2, 3]), ("a", vec![]), ("m", vec![9])]).unwrap();
        assert_eq!(loader.names().collect::<Vec<_>>(), ["z", "a", "m"]);
        assert_eq!((loader.len(), loader.is_empty()), (3, false));
        let view = loader.tensor("z").unwrap().unwrap();
        assert_eq!((view.dtype, view.dims, view.bytes), (DType::U8, &[3][..], &[1u8, 2, 3][..]));
        assert_eq!(loader.tensor_bytes("a").unwrap(), Some(&[][..]));
    }

    #[test]
    fn an_absent_name_is_none_and_not_an_error() {
        let loader = BytesWeightLoader::from_pairs([("a", vec![1u8])]).unwrap();
        assert!(loader.tensor("b").unwrap().is_none());
        assert!(loader.tensor_bytes("b").unwrap().is_none());
        assert!(loader.storage("b").unwrap().is_none());
    }

    #[test]
    fn typed_tensors_have_their_length_checked() {
        let typed = |dims: Vec<usize>, bytes: usize| {
            BytesWeightLoader::from_typed([("w", dims, DType::F32, vec![0u8; bytes])]).map(|_| ())
        };
        typed(vec![2, 3], 24).unwrap();
        let short = typed(vec![2, 3], 20);
        assert!(matches!(short, Err(LoadError::Length { expected_bytes: 24, found_bytes: 20, .. })));
        assert!(matches!(typed(vec![1 << 62, 8], 20), Err(LoadError::Size { .. })));
    }

    #[test]
    fn quantised_lengths_count_whole_blocks() {
        let typed = |dims: Vec<usize>, bytes: usize| {
            BytesWeightLoader::from_typed([("w", dims, DType::Q4_0, vec![0u8; bytes])]).map(|_| ())
        };
        typed(vec![2, 32], 36).unwrap();
        assert!(matches!(typed(vec![2, 32], 64), Err(LoadError::Length { expected_bytes: 36, .. })));
        assert!(matches!(typed(vec![31], 18), Err(LoadError::Size { .. })));
    }

    #[test]
    fn a_name_twice_is_refused() {
        let pairs = [("a", vec![1u8]), ("a", vec![1])];
        assert!(
            matches!(BytesWeightLoader::from_pairs(pairs), Err(LoadError::Duplicate { tensor, .. }) if tensor == "a")
        );
    }

    #[test]
    fn a_typed_borrow_checks_dtype_and_alignment_and_copies_nothing() {
        let bytes = SharedBytes::from(&[0u8, 0, 128, 63, 0, 0, 0, 64, 0][..]);
        let aligned = bytes.slice(0, 8).unwrap();
        let shifted = bytes.slice(1, 8).unwrap();
        let address = aligned.as_slice().as_ptr();
        let loader = BytesWeightLoader::from_typed([
            ("aligned", vec![2], DType::F32, aligned),
            ("shifted", vec![2], DType::F32, shifted),
        ])
        .unwrap();
        let view = loader.tensor("aligned").unwrap().unwrap();
        assert_eq!(view.as_slice::<f32>().unwrap(), [1.0, 2.0]);
        assert_eq!(view.bytes.as_ptr(), address);
        assert!(matches!(view.as_slice::<i32>(), Err(LoadError::DType { .. })));
        let shifted = loader.tensor("shifted").unwrap().unwrap();
        assert_eq!(shifted.bytes.len(), 8);
        assert!(matches!(shifted.as_slice::<f32>(), Err(LoadError::Unaligned { .. })));
    }
}
