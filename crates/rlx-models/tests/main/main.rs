//! Golden checkpoints through the public path, run by the reference interpreter.

mod artefacts;
mod broken;
mod cpu;
mod goldens;
mod interpreter;
mod plans;
mod text;
