//! Model families: config and tensor names to graph, tokenizer, sampling, generation.

pub mod arch;
pub mod blocks;
mod error;
pub mod generate;
pub mod kv;
pub mod sampling;

pub use arch::{BuildOptions, Built, Decoder, DecoderInfo, Encoder, EncoderInfo, build, build_folder};
pub use error::{ModelError, Result};
