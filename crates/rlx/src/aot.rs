//! Compiled files: the artefact that `rlx compile` writes, and the automatic cache.
//!
//! Both are [containers](container): a header with its digest, small sections with theirs, and large ones whose checksums are compared
//! on all threads before anything reads them. What a file holds is made for one version, device, instruction set, precision and
//! way of packing; any other is refused (an artefact) or made anew (the cache).

pub mod artefact;
pub mod cache;
pub mod container;
mod error;
pub mod wire;

pub use artefact::{Artefact, ArtefactKind, ArtefactParts};
pub use cache::{AotCache, CacheEntry, CacheRemoval};
pub use error::AotCacheError;

/// Digits of bytes, for names and messages.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
