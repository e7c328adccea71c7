//! Models in a web page: files come in as bytes, answers go out as text. `ffi` is what the page calls and is called by.

#[cfg(target_arch = "wasm32")]
mod ffi;

use rlx::backend::Backend;
use rlx::backend::cpu::Precision;
use rlx::import::hf::{EmbeddedFiles, HfFolder};
use rlx_kernels::isa::Isa;
use rlx_models::arch::Built;
use rlx_models::generate::FinishReason;
use rlx_models::sampling::SamplingOptions;
use rlx_models::{Model, ModelError, OpenOptions, TextOptions};
use rlx_tensor::storage::AlignedBytes;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

macro_rules! files {
    ($($name:literal),+) => {
        &[$(($name, include_bytes!(concat!("../../../models/demo/", $name)))),+]
    };
}

/// The files of the demo model's folder.
pub const DEMO: EmbeddedFiles = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json"
];

/// What a model runs on.
#[derive(Clone)]
pub enum Place {
    /// The processor, with one thread: the best instruction set of the build, if none is asked for.
    Cpu(Option<Isa>),
    /// A device.
    Device(Arc<dyn Backend>),
}

/// A model that is ready to run.
pub struct Loaded {
    model: Model,
    device: String,
}

/// What a model is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Description {
    /// What can be asked of it: `generate` or `embed`.
    pub task: &'static str,
    /// Its architecture, as its graph is called.
    pub name: String,
    /// What it runs on, in words.
    pub device: String,
    /// Elements of all weights.
    pub parameters: u64,
    /// Most tokens of a text.
    pub context: usize,
}

/// What to generate.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Request {
    /// The text to continue.
    pub prompt: String,
    /// Most new tokens.
    pub max_tokens: usize,
    /// 0 takes the likeliest token always.
    #[serde(default)]
    pub temperature: f32,
    /// Of the random stream.
    #[serde(default)]
    pub seed: u64,
}

/// What generating took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// New tokens.
    pub tokens: usize,
    /// Time to the first token in milliseconds.
    pub prefill_ms: f64,
    /// Time of all later tokens.
    pub decode_ms: f64,
    /// Why it ended.
    pub finish: &'static str,
}

impl Loaded {
    /// Opens the demo model.
    ///
    /// # Errors
    /// As [`Loaded::open`].
    pub fn demo(place: &Place) -> Result<Loaded, ModelError> {
        Self::on(HfFolder::embedded("demo", DEMO), place)
    }

    /// Opens a folder whose files were fetched: at least `config.json`, `model.safetensors` and `tokenizer.json`. The weights are not
    /// copied.
    ///
    /// # Errors
    /// Files that are missing or broken, a config that is not understood, weights that do not fit it or the module's memory.
    pub fn open(
        name: &str,
        files: impl IntoIterator<Item = (String, AlignedBytes)>,
        place: &Place,
    ) -> Result<Loaded, ModelError> {
        Self::on(HfFolder::bundled(Path::new(name), files), place)
    }

    fn on(folder: HfFolder, place: &Place) -> Result<Loaded, ModelError> {
        let (model, device) = match place {
            Place::Cpu(isa) => {
                let isa = isa.unwrap_or_else(Isa::detect);
                // Rounding operands to 16 bits gains nothing without an instruction for it.
                let (threads, precision) = (Some(1), Some(Precision::F32));
                let options = OpenOptions { threads, precision, isa: Some(isa), ..OpenOptions::default() };
                (Model::from_folder(folder, &options)?, format!("CPU, 1 thread, {isa}"))
            }
            Place::Device(backend) => {
                let options = OpenOptions::default();
                (Model::on_backend(folder, &options, Arc::clone(backend))?, backend.name().to_owned())
            }
        };
        model.load()?;
        Ok(Loaded { model, device })
    }

    /// What the model is.
    pub fn describe(&self) -> Description {
        let task = if matches!(self.model.built(), Built::Encoder(_)) { "embed" } else { "generate" };
        let context = self.model.context_limit();
        let graph = self.model.built().graph();
        let dims = graph.params().filter_map(|(_, value)| value.shape.known_dims());
        let parameters = dims.map(|dims| dims.iter().map(|dim| *dim as u64).product::<u64>()).sum();
        let (name, device) = (graph.name().to_owned(), self.device.clone());
        Description { task, name, device, parameters, context }
    }

    /// The vector of a text.
    ///
    /// # Errors
    /// [`ModelError::NotAnEncoder`]; of the tokenizer; of the run.
    pub fn embed(&self, text: &str) -> Result<Vec<f32>, ModelError> {
        Ok(self.model.embed(&[text])?.swap_remove(0))
    }

    /// Continues a text; `piece` takes each part as it comes and answers whether to go on.
    ///
    /// # Errors
    /// [`ModelError::NotADecoder`]; an empty prompt, or one beyond the context; of the run.
    pub fn generate(
        &self,
        request: &Request,
        mut piece: impl FnMut(&str) -> bool,
    ) -> Result<Report, ModelError> {
        let sampling = match request.temperature > 0.0 {
            true => SamplingOptions {
                temperature: request.temperature,
                seed: request.seed,
                ..SamplingOptions::default()
            },
            false => SamplingOptions::greedy(),
        };
        let options = TextOptions { max_tokens: request.max_tokens, sampling, ..TextOptions::default() };
        let mut text = self.model.generate(&request.prompt, &options)?;
        let mut stopped = false;
        for part in text.by_ref() {
            if !piece(&part?) {
                stopped = true;
                break;
            }
        }
        let finish = match text.finish_reason() {
            Some(FinishReason::Stop) => "the model ended the text",
            Some(FinishReason::Length) => "the limit of new tokens was reached",
            _ if stopped => "stopped",
            _ => "ended",
        };
        Ok(Report {
            prompt_tokens: text.prompt_ids().len(),
            tokens: text.token_ids().len(),
            prefill_ms: text.prefill_ms(),
            decode_ms: text.decode_ms(),
            finish,
        })
    }
}

#[cfg(test)]
mod tests;
