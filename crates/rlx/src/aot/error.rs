//! Why a compiled file cannot be written or used.

use super::wire::WireError;
use rlx_tensor::storage::mapped::MapError;
use std::io;
use std::path::PathBuf;

/// Why a compiled file cannot be written or used.
///
/// In the automatic cache all but [`AotCacheError::Io`] on a folder that was asked for are misses: the entry is made anew.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AotCacheError {
    /// The system refused to read or write.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file cannot be mapped, or it changed since.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The file is no compiled file.
    #[error("{}: not a compiled file: {found}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What stands there.
        found: String,
    },
    /// The file's bytes are not those that were written.
    #[error("{}: damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not agree.
        reason: String,
    },
    /// The file was made by or for something else.
    #[error("{}: made for {what} {found}, but here it is {expected}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Format, version, device, instruction set, precision, packing or key.
        what: &'static str,
        /// What the file says.
        found: String,
        /// What is needed.
        expected: String,
    },
    /// What a file holds makes no valid plan, whatever its checksum says.
    #[error("{}: refused: {reason}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Which rule it breaks.
        reason: String,
    },
    /// The program cannot be stored.
    #[error("this program cannot be stored: {reason}")]
    Unstorable {
        /// Why.
        reason: String,
    },
}

impl AotCacheError {
    pub(super) fn io(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| AotCacheError::Io { path, source }
    }

    pub(super) fn damaged(path: &std::path::Path, reason: impl ToString) -> Self {
        AotCacheError::Damaged { path: path.to_path_buf(), reason: reason.to_string() }
    }

    pub(super) fn wire(path: &std::path::Path) -> impl FnOnce(WireError) -> Self {
        let path = path.to_path_buf();
        move |error| AotCacheError::Damaged { path, reason: format!("the header, {error}") }
    }
}
