//! Compile a model file once, know its memory, run it on the fastest device.

pub mod import;
pub mod plan;
pub mod weights;
