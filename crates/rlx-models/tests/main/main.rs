//! Golden checkpoints through the public path, run by the reference interpreter.

mod broken;
mod goldens;
mod interpreter;
mod text;
