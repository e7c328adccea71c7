//! The model in the binary.

use rlx::import::hf::EmbeddedFiles;

macro_rules! files {
    ($($name:literal),+) => {
        &[$(($name, include_bytes!(concat!("../../../models/demo/", $name)))),+]
    };
}

/// The files of the demo model's folder.
pub const FILES: EmbeddedFiles = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json"
];

/// What the demo continues if nothing else is asked for.
pub const PROMPT: &str = "Once upon a time, Mia and her dog Rex";
