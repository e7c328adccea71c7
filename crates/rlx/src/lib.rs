//! Compile a model file once, know its memory, run it on the fastest device.

pub mod backend;
pub mod import;
pub mod plan;
pub mod weights;
