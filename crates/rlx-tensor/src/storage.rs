//! Memory that tensors stand in.

mod aligned;
pub mod guard;
pub mod mapped;

pub use aligned::AlignedBytes;
