//! Golden checkpoints through the public path, run by the reference interpreter.

mod adapters;
mod artefacts;
mod broken;
mod cpu;
mod experts;
mod gguf;
mod goldens;
mod interpreter;
mod pipeline;
mod plans;
mod text;
