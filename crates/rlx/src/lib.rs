//! Compile a model file once, know its memory, run it on the fastest device.

pub mod aot;
pub mod backend;
pub mod config;
pub mod devices;
pub mod import;
pub mod memory;
pub mod pipeline;
pub mod plan;
pub mod session;
pub mod weights;

pub use session::{CompileOptions, CompiledGraph, Session, SessionError, State, TensorArg};
