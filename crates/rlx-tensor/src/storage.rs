//! Memory that tensors stand in.

mod aligned;
pub mod mapped;

pub use aligned::AlignedBytes;
