//! Golden checkpoints through the public path, run by the reference interpreter.

mod adapters;
mod artefacts;
mod broken;
mod caches;
mod cpu;
mod devices;
mod drafts;
mod experts;
mod gguf;
mod goldens;
mod gpu;
#[cfg(feature = "grammar")]
mod grammar;
mod interpreter;
mod pipeline;
mod plans;
mod text;
