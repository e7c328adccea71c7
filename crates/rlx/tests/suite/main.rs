//! The crate through its public face: every op case on every backend, and the promises about bits.

mod agreement;
mod backends;
mod blocks;
mod conformance;
mod determinism;
mod frames;
mod gguf_inputs;
mod models;
