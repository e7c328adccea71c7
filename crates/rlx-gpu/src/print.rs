//! Kernels as the text of a language that a driver compiles.

#![forbid(unsafe_code)]

pub mod cuda;
pub mod wgsl;
