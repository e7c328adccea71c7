//! Model families: config and tensor names to graph, tokenizer, chat template, sampling, generation, embeddings.

pub mod arch;
mod artefact;
pub mod batch;
pub mod blocks;
mod devices;
pub mod draft;
pub mod embed;
mod error;
pub mod generate;
pub mod gguf;
#[cfg(feature = "grammar")]
pub mod grammar;
pub mod kv;
mod largest;
pub mod lora;
mod model;
pub mod plan;
mod precision;
pub mod runtime;
pub mod sampling;
pub mod template;
mod text;
pub mod tokenizer;

pub use arch::{
    BuildOptions, Built, Convention, Decoder, DecoderInfo, Encoder, EncoderInfo, build, build_folder,
};
pub use batch::{Batch, BatchEvent, BatchOptions, BatchRequest, RequestId};
pub use devices::{Fallback, ModelDevices};
pub use error::{ModelError, Result};
pub use lora::{Adapter, LoraScheduler};
pub use model::{Draft, HeldText, Model, OpenOptions, TextOptions};
pub use plan::{ModelPlan, PlanRequest};
pub use precision::precision_of;
pub use runtime::Beside;
pub use text::TextGeneration;
