//! Bytes of a weight and who owns them.

use std::fmt;
use std::io;
use std::sync::Arc;

use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::storage::mapped::{FileIdentity, MappedRange};

/// Bytes in memory that several holders share; a clone or a slice copies none of them.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn Bytes>,
    offset: usize,
    len: usize,
}

trait Bytes: Send + Sync {
    fn bytes(&self) -> &[u8];
}

impl Bytes for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

impl Bytes for Arc<[u8]> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

impl Bytes for AlignedBytes {
    fn bytes(&self) -> &[u8] {
        self.as_slice()
    }
}

impl SharedBytes {
    fn of(owner: impl Bytes + 'static) -> Self {
        let len = owner.bytes().len();
        SharedBytes { owner: Arc::new(owner), offset: 0, len }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.owner.bytes()[self.offset..self.offset + self.len]
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part `offset .. offset + len`, or `None` when it reaches past the end.
    pub fn slice(&self, offset: usize, len: usize) -> Option<SharedBytes> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| SharedBytes {
            owner: Arc::clone(&self.owner),
            offset: self.offset + offset,
            len,
        })
    }
}

impl fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBytes({} bytes)", self.len)
    }
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        SharedBytes::of(bytes)
    }
}

impl From<&[u8]> for SharedBytes {
    fn from(bytes: &[u8]) -> Self {
        SharedBytes::of(AlignedBytes::copied_from(bytes))
    }
}

impl From<Arc<[u8]>> for SharedBytes {
    fn from(bytes: Arc<[u8]>) -> Self {
        SharedBytes::of(bytes)
    }
}

impl From<AlignedBytes> for SharedBytes {
    fn from(bytes: AlignedBytes) -> Self {
        SharedBytes::of(bytes)
    }
}

/// Bytes that are made on demand, and again after they were dropped.
pub trait LazyBytes: Send + Sync + fmt::Debug {
    /// Length in bytes, known before loading.
    fn len(&self) -> usize;

    /// True when there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Loads exactly [`len`](Self::len) bytes, the same every time.
    ///
    /// # Errors
    /// Whatever kept them from being read.
    fn load(&self) -> io::Result<SharedBytes>;
}

/// The bytes of a weight: owned, mapped or lazy.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum WeightBytes {
    /// In memory.
    Owned(SharedBytes),
    /// In a mapped file.
    Mapped(MappedRange),
    /// Made on demand.
    Lazy(Arc<dyn LazyBytes>),
}

/// What makes two storages one, without reading a byte.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum StorageKey {
    Memory { address: usize, len: usize },
    File { identity: FileIdentity, offset: usize, len: usize },
    Source { address: usize },
    // No address tells empty storages apart; the registry puts the storage's id.
    Empty(u64),
}

impl WeightBytes {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            WeightBytes::Owned(bytes) => bytes.len(),
            WeightBytes::Mapped(range) => range.len(),
            WeightBytes::Lazy(source) => source.len(),
        }
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Valid as long as the storage itself is held: addresses are reused after.
    pub(super) fn key(&self) -> StorageKey {
        match self {
            _ if self.is_empty() => StorageKey::Empty(0),
            WeightBytes::Owned(bytes) => {
                StorageKey::Memory { address: bytes.as_slice().as_ptr() as usize, len: bytes.len() }
            }
            WeightBytes::Mapped(range) => StorageKey::File {
                identity: range.file().identity().clone(),
                offset: range.offset(),
                len: range.len(),
            },
            WeightBytes::Lazy(source) => {
                StorageKey::Source { address: Arc::as_ptr(source).cast::<()>() as usize }
            }
        }
    }
}

impl<T: Into<SharedBytes>> From<T> for WeightBytes {
    fn from(bytes: T) -> Self {
        WeightBytes::Owned(bytes.into())
    }
}

impl From<MappedRange> for WeightBytes {
    fn from(range: MappedRange) -> Self {
        WeightBytes::Mapped(range)
    }
}

impl From<Arc<dyn LazyBytes>> for WeightBytes {
    fn from(source: Arc<dyn LazyBytes>) -> Self {
        WeightBytes::Lazy(source)
    }
}
