//! What can go wrong between a model folder and its answer.

use rlx::SessionError;
use rlx::import::ImportError;
use rlx::weights::LoadError;
use rlx_graph::GraphError;
use rlx_tensor::{DType, TensorError};
use std::path::PathBuf;

/// Why a model cannot be built, or a request cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file of the model folder cannot be used.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// A weight file cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The graph cannot be compiled or run.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// An executable cannot be had from the pipeline that keeps them.
    #[error(transparent)]
    Pipeline(Box<rlx::pipeline::PipelineError>),
    /// Loading would take more memory than may be used.
    #[error(transparent)]
    Memory(Box<rlx::memory::MemoryRefusal>),
    /// A decoder was asked for embeddings.
    #[error("{}: this model continues text, it does not embed; use `generate`", path.display())]
    NotAnEncoder {
        /// The folder.
        path: PathBuf,
    },
    /// An encoder was asked for text.
    #[error("{}: this model embeds text, it does not continue it; use `embed`", path.display())]
    NotADecoder {
        /// The folder.
        path: PathBuf,
    },
    /// The config describes a graph that does not fit together.
    #[error("the config describes no valid graph: {0}")]
    Graph(#[from] GraphError),
    /// A table of the graph has no valid size.
    #[error(transparent)]
    Table(#[from] TensorError),
    /// No architecture of this name.
    #[error("{}: model_type `{found}` is not supported; supported: {}", path.display(), known.join(", "))]
    UnknownModelType {
        /// The config file.
        path: PathBuf,
        /// The `model_type` found.
        found: String,
        /// Every supported `model_type`.
        known: Vec<&'static str>,
    },
    /// The checkpoint lacks a tensor that the config calls for.
    #[error("tensor `{name}` of shape {expected:?} is missing from the checkpoint")]
    MissingTensor {
        /// The tensor.
        name: String,
        /// Its extents by the config.
        expected: Vec<usize>,
    },
    /// A tensor's extents are not what the config says.
    #[error("tensor `{name}`: the config says {expected:?}, the checkpoint has {found:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Extents by the config.
        expected: Vec<usize>,
        /// Extents in the checkpoint.
        found: Vec<usize>,
    },
    /// A tensor's dtype cannot serve as a weight.
    #[error("tensor `{name}` is {found}, expected f32, f16 or bf16")]
    TensorDType {
        /// The tensor.
        name: String,
        /// Its dtype.
        found: DType,
    },
    /// Blocks of a quantised tensor cannot be read or written.
    #[error(transparent)]
    Quant(#[from] rlx_tensor::quant::QuantError),
    /// A weight that is no finite number.
    #[error("tensor `{name}` holds {found}; a file of it would be broken too")]
    WeightValue {
        /// The tensor.
        name: String,
        /// The value.
        found: f32,
    },
    /// A weight that the wanted type cannot hold.
    #[error(
        "tensor `{name}` holds {found}, which {dtype} cannot: its scales are f16; write it as F32 or BF16"
    )]
    WeightRange {
        /// The tensor.
        name: String,
        /// The value.
        found: f32,
        /// The type.
        dtype: DType,
    },
    /// The checkpoint has a tensor that belongs to a layer in use, and the config does not ask for it.
    #[error(
        "tensor `{name}` is in the checkpoint, but the config does not use it; the result would differ from the trained model"
    )]
    UnusedTensor {
        /// The tensor.
        name: String,
    },
    /// The model is of a kind that cannot do this.
    #[error("a `{model_type}` model cannot {task}; {advice}")]
    WrongKind {
        /// The model's type.
        model_type: String,
        /// What was asked.
        task: &'static str,
        /// What to do instead.
        advice: &'static str,
    },
    /// The tokenizer file is broken or cannot be used.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer has ids that the model has no embedding for.
    #[error(
        "{}: token {token:?} has id {id}, but the model's vocabulary has {vocab} entries; the tokenizer is of another model",
        path.display()
    )]
    Vocabulary {
        /// The tokenizer file.
        path: PathBuf,
        /// The token with the highest id.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// The chat template is broken, or fails on these messages.
    #[error("{}: chat template, line {line}: {reason}", path.display())]
    Template {
        /// The file that holds the template.
        path: PathBuf,
        /// Line of the template, from 1; 0 where it is not known.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The folder has no chat template.
    #[error("{}: no chat template in this model folder; give a plain prompt instead", path.display())]
    NoTemplate {
        /// The file where it would be.
        path: PathBuf,
    },
    /// A sampling setting is out of range.
    #[error("{setting} = {found}: expected {expected}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// What is allowed.
        expected: &'static str,
        /// What was given.
        found: String,
    },
    /// The model's logits cannot be sampled from.
    #[error("the logit of token {token} is {found}; the weights or the input are broken")]
    Logits {
        /// The token.
        token: usize,
        /// The value: NaN or plus infinity.
        found: f32,
    },
    /// Nothing to continue.
    #[error("the prompt has no tokens; give some text")]
    EmptyPrompt,
    /// A token id outside the model's vocabulary.
    #[error("token id {id} is outside the model's vocabulary of {vocab} entries")]
    TokenId {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// The request does not fit the context.
    #[error("{prompt_tokens} prompt tokens and {new_tokens} new ones need a context of {needed}, the limit is {limit}; {advice}",
            needed = prompt_tokens.saturating_add(*new_tokens))]
    Context {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// New tokens asked for.
        new_tokens: usize,
        /// The most positions there are.
        limit: usize,
        /// What to do.
        advice: &'static str,
    },
    /// No free cache blocks.
    #[error("the KV cache has {free} free blocks of {block} positions, {needed} are needed", block = crate::kv::BLOCK_POSITIONS)]
    CacheFull {
        /// Blocks needed.
        needed: usize,
        /// Blocks free.
        free: usize,
    },
    /// No adapter of this name.
    #[error("no adapter is called `{name}`; {}", adapters(known))]
    UnknownAdapter {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// An adapter of this name is there already.
    #[error("an adapter called `{name}` is loaded; replace it, or choose another name")]
    AdapterExists {
        /// The name.
        name: String,
    },
    /// The adapter does not fit the model.
    #[error("adapter `{name}`: {reason}")]
    Adapter {
        /// The adapter.
        name: String,
        /// What does not fit.
        reason: String,
    },
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The caller's deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// The draft model's device failed; the model's own may not have.
    #[error("guessing tokens: {0}")]
    Draft(#[source] Box<ModelError>),
    /// The runtime failed to run a step.
    #[error("running the model: {0}")]
    Run(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl ModelError {
    /// A fault of the device that the draft model is on, apart from one of the model's.
    pub(crate) fn of_draft(error: ModelError) -> ModelError {
        if error.is_device_fault() { ModelError::Draft(Box::new(error)) } else { error }
    }

    /// The session's error, where it is one.
    pub(crate) fn into_session(self) -> std::result::Result<SessionError, ModelError> {
        match self {
            ModelError::Session(error) => Ok(error),
            ModelError::Run(error) => error.downcast().map(|error| *error).map_err(ModelError::Run),
            other => Err(other),
        }
    }

    /// Whether another device may do better, as [`SessionError::is_device_fault`] says, when a model is opened or in the middle of a run.
    pub fn is_device_fault(&self) -> bool {
        match self {
            ModelError::Session(error) => error.is_device_fault(),
            ModelError::Run(error) => {
                error.downcast_ref::<SessionError>().is_some_and(SessionError::is_device_fault)
            }
            _ => false,
        }
    }
}

fn adapters(known: &[String]) -> String {
    if known.is_empty() { "none is loaded".to_owned() } else { format!("loaded: {}", known.join(", ")) }
}

/// A result with [`ModelError`].
pub type Result<T> = std::result::Result<T, ModelError>;

impl From<rlx::pipeline::PipelineError> for ModelError {
    fn from(error: rlx::pipeline::PipelineError) -> Self {
        match error {
            rlx::pipeline::PipelineError::Session(error) => ModelError::Session(error),
            rlx::pipeline::PipelineError::Plan(error) => ModelError::Session(error.into()),
            other => ModelError::Pipeline(Box::new(other)),
        }
    }
}
