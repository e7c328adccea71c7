//! Memory that tensors stand in.

mod aligned;

pub use aligned::AlignedBytes;
