//! Model families: config and tensor names to graph, tokenizer, chat template, sampling, generation, embeddings.

pub mod arch;
pub mod blocks;
pub mod embed;
mod error;
pub mod generate;
pub mod gguf;
pub mod kv;
mod model;
pub mod plan;
pub mod runtime;
pub mod sampling;
pub mod template;
pub mod tokenizer;

pub use arch::{
    BuildOptions, Built, Convention, Decoder, DecoderInfo, Encoder, EncoderInfo, build, build_folder,
};
pub use error::{ModelError, Result};
pub use model::{Model, OpenOptions, TextGeneration, TextOptions};
pub use plan::{ModelPlan, PlanRequest};
