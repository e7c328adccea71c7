//! Golden checkpoints through the public path, run by the reference interpreter.

mod goldens;
mod interpreter;
