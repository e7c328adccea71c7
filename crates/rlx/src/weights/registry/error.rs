//! What a registry refuses.

use std::io;

use rlx_tensor::Shape;
use rlx_tensor::storage::mapped::MapError;

use super::super::loader::LoadError;

/// What a registry refuses, and why. Nothing has changed when one is returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The name is taken by other content.
    #[error(
        "weight `{name}` is registered with another {what}: registered {registered}, given {given}; use \
             `replace` to change it"
    )]
    Conflict {
        /// The name.
        name: String,
        /// What differs: shape, dtype, kind or content.
        what: &'static str,
        /// What is registered.
        registered: String,
        /// What was given.
        given: String,
    },
    /// The bytes are not as many as shape and dtype need.
    #[error("weight `{name}`: expected {expected_bytes} bytes, found {found_bytes}")]
    Length {
        /// The name.
        name: String,
        /// What shape and dtype need.
        expected_bytes: u64,
        /// What was given.
        found_bytes: u64,
    },
    /// The shape has symbols, overflows, or does not fill whole blocks.
    #[error("weight `{name}`: shape {shape} has no fixed size")]
    Shape {
        /// The name.
        name: String,
        /// The shape.
        shape: Shape,
    },
    /// The handle was made by another registry.
    #[error("handle {id} belongs to another registry")]
    ForeignHandle {
        /// The handle's id.
        id: u64,
    },
    /// The handle's entry was removed.
    #[error("handle {id} names an entry that was removed")]
    StaleHandle {
        /// The handle's id.
        id: u64,
    },
    /// Released more often than pinned.
    #[error("weight `{name}` is released but not pinned")]
    NotPinned {
        /// The name.
        name: String,
    },
    /// Still pinned.
    #[error("weight `{name}` cannot be removed: {pins} pins are held")]
    Pinned {
        /// The name.
        name: String,
        /// How many.
        pins: u64,
    },
    /// Aliases or adapters point at it.
    #[error("weight `{name}` cannot be changed or removed: {} point at it", by.join(", "))]
    InUse {
        /// The name.
        name: String,
        /// The entries that point at it, sorted.
        by: Vec<String>,
    },
    /// An alias does not match its target, or brings bytes of its own.
    #[error("alias `{name}` of `{target}`: expected {expected}, found {found}")]
    Alias {
        /// The alias.
        name: String,
        /// Its target.
        target: String,
        /// What the target has.
        expected: String,
        /// What was given.
        found: String,
    },
    /// An adapter weight does not fit its base.
    #[error("adapter `{adapter}`, weight `{name}` for `{base}`: expected {expected}, found {found}")]
    Adapter {
        /// The adapter.
        adapter: String,
        /// The weight.
        name: String,
        /// The base weight.
        base: String,
        /// What fits.
        expected: String,
        /// What was given.
        found: String,
    },
    /// No adapter of that name.
    #[error("no adapter `{adapter}`; known: {}", known.join(", "))]
    UnknownAdapter {
        /// The name asked for.
        adapter: String,
        /// The adapters there are, sorted.
        known: Vec<String>,
    },
    /// The loader has no tensor of that name.
    #[error("no tensor `{name}` in the file")]
    Absent {
        /// The name.
        name: String,
    },
    /// The bytes are streamed out: pin the weight to read them.
    #[error("weight `{name}` is streamed out; pin it to read its bytes")]
    StreamedOut {
        /// The name.
        name: String,
    },
    /// Pinning would break the byte budget, and nothing unpinned is left to drop.
    #[error(
        "weight `{name}` needs {needed_bytes} bytes, but {pinned_bytes} are pinned of a budget of {budget_bytes}"
    )]
    OverBudget {
        /// The name.
        name: String,
        /// Its size.
        needed_bytes: u64,
        /// What cannot be dropped.
        pinned_bytes: u64,
        /// The budget.
        budget_bytes: u64,
    },
    /// A lazy storage could not be loaded.
    #[error("weight `{name}` cannot be loaded: {source}")]
    Load {
        /// The name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The file behind the weight shrank or changed.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The loader failed.
    #[error(transparent)]
    Loader(#[from] LoadError),
}
