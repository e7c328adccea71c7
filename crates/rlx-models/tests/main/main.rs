//! Golden checkpoints through the public path, run by the reference interpreter.

mod broken;
mod cpu;
mod gguf;
mod goldens;
mod interpreter;
mod plans;
mod text;
