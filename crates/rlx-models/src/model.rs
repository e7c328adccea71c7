//! The short way in: open a model folder, embed texts, generate text.

use crate::arch::{BuildOptions, Built, Decoder, build_folder};
use crate::embed::embed_texts;
use crate::error::{ModelError, Result};
use crate::generate::{CancelToken, FinishReason, GenerateOptions, Generation, generate};
use crate::lora::{AdaptedGraph, Adapter, Adapters};
use crate::runtime::{DecoderRunner, ENCODER_ROWS, EncoderRunner, PREFILL_ROWS, compile};
use crate::sampling::SamplingOptions;
use crate::template::{ChatTemplate, Message};
use crate::tokenizer::{Detokenizer, TextTokenizer, stop_tokens};
use rlx::CompiledGraph;
use rlx::aot::Artefact;
use rlx::backend::{Backend, Program};
use rlx::config::Config;
use rlx::import::hf::HfFolder;
use rlx::import::{ModelSource, sniff};
use rlx::memory::experts::{ExpertPolicy, ExpertPool};
use rlx::session::cpu_backend;
use rlx::weights::WeightLoader;
use rlx_kernels::isa::Isa;
use rlx_kernels::pool::default_threads;
use rlx_tensor::DType;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// How a model is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Worker threads; `RLX_THREADS`, else as many as the machine and its control group allow, if not given.
    pub threads: Option<usize>,
    /// Instruction set; `RLX_ISA`, else the best of this machine, if not given.
    pub isa: Option<Isa>,
    /// Element type of KV caches: F32 if not given.
    pub cache_dtype: Option<DType>,
    /// Element type that adapters are held in, F32 or BF16: F32 if not given, which keeps every stored value.
    pub adapter_dtype: Option<DType>,
    /// Experts of each layer that are in memory at once, the others being loaded as the router asks for them; all if not given.
    /// Heeded where the model makes its own backend.
    pub expert_budget: Option<usize>,
}

/// A model opened from a folder: its graph compiled, its weights mapped, packed at first use.
pub struct Model {
    folder: HfFolder,
    weights: Box<dyn WeightLoader>,
    backend: Arc<dyn Backend>,
    built: Built,
    compiled: Arc<CompiledGraph>,
    tokenizer: TextTokenizer,
    stop: Vec<u32>,
    encoder: Mutex<Option<EncoderRunner>>,
    adapters: Adapters,
    experts: Option<Arc<ExpertPool>>,
    artefact: Option<Arc<Artefact>>,
}

/// What to generate from a text.
#[derive(Debug, Clone)]
pub struct TextOptions {
    /// Most new tokens.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Most positions of prompt and text together; the model's own limit if not given.
    pub context: Option<usize>,
    /// The adapter to run with, by name; the plain model if none.
    pub adapter: Option<String>,
    /// Ends the generation from outside.
    pub cancel: CancelToken,
    /// Ends the generation at this time.
    pub deadline: Option<Instant>,
}

impl Default for TextOptions {
    /// Up to 128 tokens, greedy.
    fn default() -> Self {
        Self {
            max_tokens: 128,
            sampling: SamplingOptions::greedy(),
            context: None,
            adapter: None,
            cancel: CancelToken::new(),
            deadline: None,
        }
    }
}

impl Model {
    /// Opens a model folder, or a hub name that is in the local cache, with default options.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// Opens a model folder, or a file that `rlx compile` wrote. No weight is read before the model is used.
    ///
    /// # Errors
    /// Files that are missing or broken, a config that is not understood, weights that do not fit it.
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        if path.is_file() && sniff(path)? == ModelSource::Rlx {
            if let Some(experts) = options.expert_budget {
                let expected = "no budget: a compiled file holds all experts as mapped pages";
                let found = experts.to_string();
                return Err(ModelError::Setting { setting: "expert_budget", expected, found });
            }
            let backend = cpu_backend(options.isa, options.threads)?;
            return Self::open_artefact(path, options, Arc::new(backend));
        }
        let path = path.to_string_lossy();
        let dirs = Config::global().map_err(rlx::SessionError::from)?.hf_cache_dirs();
        Self::from_folder(HfFolder::open(&path, &dirs)?, options)
    }

    /// Opens a model from a folder already found.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn from_folder(folder: HfFolder, options: &OpenOptions) -> Result<Self> {
        let backend = cpu_backend(options.isa, options.threads)?;
        let Some(slots) = options.expert_budget else {
            return Self::on_backend(folder, options, Arc::new(backend));
        };
        let pool = ExpertPool::new(slots, ExpertPolicy::default());
        let pool = Arc::new(pool.map_err(|e| {
            let (setting, expected) = ("expert_budget", "at least 1 expert");
            ModelError::Setting { setting, expected, found: e.to_string() }
        })?);
        let backend = Arc::new(backend.with_experts(Arc::clone(&pool)));
        let mut model = Self::on_backend(folder, options, backend)?;
        model.experts = Some(pool);
        Ok(model)
    }

    /// Opens a model for a backend: the reference evaluation, say.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn on_backend(folder: HfFolder, options: &OpenOptions, backend: Arc<dyn Backend>) -> Result<Self> {
        let weights = folder.loader()?;
        let cache_dtype = options.cache_dtype.unwrap_or(DType::F32);
        let build = BuildOptions { cache_dtype, ..BuildOptions::default() };
        let built = build_folder(&folder, weights.as_ref(), &build)?;
        let compiled = Arc::new(compile(built.graph(), weights.as_ref(), &backend)?);
        let tokenizer = open_tokenizer(&folder, &built)?;
        let stop = stop_tokens(&folder)?;
        let mut model = Self::assemble(folder, weights, backend, built, compiled, tokenizer, stop);
        let adapter_dtype = options.adapter_dtype.unwrap_or(DType::F32);
        if !matches!(adapter_dtype, DType::F32 | DType::BF16) {
            let (setting, found) = ("adapter_dtype", adapter_dtype.to_string());
            return Err(ModelError::Setting { setting, expected: "f32 or bf16", found });
        }
        model.adapters = Adapters::of(model.built.graph(), adapter_dtype);
        Ok(model)
    }

    pub(crate) fn assemble(
        folder: HfFolder,
        weights: Box<dyn WeightLoader>,
        backend: Arc<dyn Backend>,
        built: Built,
        compiled: Arc<CompiledGraph>,
        tokenizer: TextTokenizer,
        stop: Vec<u32>,
    ) -> Self {
        let encoder = Mutex::new(None);
        let adapters = Adapters::of(built.graph(), DType::F32);
        Self {
            folder,
            weights,
            backend,
            built,
            compiled,
            tokenizer,
            stop,
            encoder,
            adapters,
            experts: None,
            artefact: None,
        }
    }

    pub(crate) fn with_artefact(self, artefact: Arc<Artefact>) -> Self {
        Self { artefact: Some(artefact), ..self }
    }

    /// The compiled file it was opened from.
    pub fn artefact(&self) -> Option<&Artefact> {
        self.artefact.as_deref()
    }

    /// Binds and packs the weights, or maps packed ones, unless that is done already.
    ///
    /// # Errors
    /// [`ModelError::Memory`] before anything is allocated if they do not fit; [`ModelError::Session`].
    pub fn load(&self) -> Result<Arc<dyn Program>> {
        self.admit(1)?;
        Ok(self.compiled.program()?)
    }

    /// Worker threads to count with.
    pub(crate) fn threads(&self) -> usize {
        default_threads(Path::new("/"))
    }

    /// Tokens that end a text, ascending.
    pub fn stop(&self) -> &[u32] {
        &self.stop
    }

    /// The folder.
    pub fn folder(&self) -> &HfFolder {
        &self.folder
    }

    /// The graph with its sizes.
    pub fn built(&self) -> &Built {
        &self.built
    }

    /// The compiled graph.
    pub fn compiled(&self) -> &Arc<CompiledGraph> {
        &self.compiled
    }

    /// The device.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The checkpoint.
    pub fn weights(&self) -> &dyn WeightLoader {
        self.weights.as_ref()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// One vector for each text, in order; pooled and normalised as the folder says.
    ///
    /// # Errors
    /// [`ModelError::NotAnEncoder`]; of the tokenizer; of the run.
    pub fn embed(&self, texts: &[impl AsRef<str>]) -> Result<Vec<Vec<f32>>> {
        let Built::Encoder(model) = &self.built else {
            return Err(ModelError::NotAnEncoder { path: self.folder.root().to_path_buf() });
        };
        let mut runner = self.encoder.lock().unwrap_or_else(PoisonError::into_inner);
        let runner = match &mut *runner {
            Some(runner) => runner,
            none => none.insert(self.encoder_runner(ENCODER_ROWS)?),
        };
        embed_texts(runner, &model.info, &self.tokenizer, texts)
    }

    /// A runner of the encoder for runs of up to `max_rows` rows.
    ///
    /// # Errors
    /// [`ModelError::NotAnEncoder`], [`ModelError::Session`].
    pub fn encoder_runner(&self, max_rows: usize) -> Result<EncoderRunner> {
        match &self.built {
            Built::Encoder(model) => {
                self.admit(max_rows.min(model.info.max_tokens).max(1))?;
                EncoderRunner::new(model, Arc::clone(&self.compiled), max_rows)
            }
            Built::Decoder(_) => Err(ModelError::NotAnEncoder { path: self.folder.root().to_path_buf() }),
        }
    }

    /// A runner of the decoder with caches for one sequence of up to `context` positions.
    ///
    /// # Errors
    /// [`ModelError::NotADecoder`], [`ModelError::Session`].
    pub fn decoder_runner(&self, context: usize) -> Result<DecoderRunner> {
        let model = self.decoder()?;
        self.admit(context.clamp(1, model.info.max_positions.max(1)))?;
        DecoderRunner::new(model, Arc::clone(&self.compiled), context, PREFILL_ROWS)
    }

    /// Adds a low-rank adapter (a PEFT folder, or a GGUF file) under a name. Requests may use it at once.
    ///
    /// # Errors
    /// [`ModelError::AdapterExists`]; [`ModelError::NotADecoder`]; what the adapter has and this model cannot use.
    pub fn add_adapter(&self, name: &str, path: impl AsRef<Path>) -> Result<Arc<Adapter>> {
        if let Some(artefact) = &self.artefact {
            let expected = "a model opened from its folder: a compiled file takes no adapters";
            let found = artefact.path().display().to_string();
            return Err(ModelError::Setting { setting: "adapter", expected, found });
        }
        let head_dim = self.decoder()?.info.head_dim;
        self.adapters.put(self.compiled.weights(), name, path.as_ref(), head_dim, false)
    }

    /// Replaces an adapter. Requests that run go on with the one they started with.
    ///
    /// # Errors
    /// [`ModelError::UnknownAdapter`]; as [`Model::add_adapter`]. The old one stays where the new one cannot be used.
    pub fn replace_adapter(&self, name: &str, path: impl AsRef<Path>) -> Result<Arc<Adapter>> {
        let head_dim = self.decoder()?.info.head_dim;
        self.adapters.put(self.compiled.weights(), name, path.as_ref(), head_dim, true)
    }

    /// Removes an adapter. Requests that run with it go on.
    ///
    /// # Errors
    /// [`ModelError::UnknownAdapter`].
    pub fn remove_adapter(&self, name: &str) -> Result<()> {
        self.adapters.remove(self.compiled.weights(), name)
    }

    /// The present generation of an adapter.
    ///
    /// # Errors
    /// [`ModelError::UnknownAdapter`].
    pub fn adapter(&self, name: &str) -> Result<Arc<Adapter>> {
        self.adapters.find(name)
    }

    /// Names of the adapters, sorted.
    pub fn adapter_names(&self) -> Vec<String> {
        self.adapters.names()
    }

    /// Bytes of the factors of all adapters.
    pub fn adapter_bytes(&self) -> usize {
        self.adapters.bytes()
    }

    /// The graph with room for adapters, compiled at first use. It shares packed weights with the plain one.
    ///
    /// # Errors
    /// [`ModelError::Session`].
    pub fn adapted_graph(&self) -> Result<AdaptedGraph> {
        self.adapters.graph(&self.compiled, self.built.graph())
    }

    /// The pool of experts, where the model was opened with a budget for them.
    pub fn experts(&self) -> Option<&Arc<ExpertPool>> {
        self.experts.as_ref()
    }

    /// The model's decoder.
    pub(crate) fn decoder(&self) -> Result<&Decoder> {
        match &self.built {
            Built::Decoder(model) => Ok(model),
            Built::Encoder(_) => Err(ModelError::NotADecoder { path: self.folder.root().to_path_buf() }),
        }
    }

    /// Tokens that end a text.
    pub(crate) fn stop_tokens(&self) -> &[u32] {
        &self.stop
    }

    /// Continues a prompt. The result is an iterator of text pieces.
    ///
    /// # Errors
    /// [`ModelError::NotADecoder`]; an empty prompt; prompt and new tokens beyond the context; of the tokenizer.
    pub fn generate(&self, prompt: &str, options: &TextOptions) -> Result<TextGeneration<'_>> {
        self.generate_tokens(&self.tokenizer.encode(prompt, true)?, options)
    }

    /// Answers a conversation, rendered by the folder's chat template.
    ///
    /// # Errors
    /// As [`Model::generate`], and of the template.
    pub fn chat(&self, messages: &[Message], options: &TextOptions) -> Result<TextGeneration<'_>> {
        let text = ChatTemplate::open(&self.folder)?.render(messages, true)?;
        self.generate_tokens(&self.tokenizer.encode(&text, false)?, options)
    }

    /// Continues a prompt given as token ids.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn generate_tokens(&self, prompt: &[u32], options: &TextOptions) -> Result<TextGeneration<'_>> {
        let model = self.decoder()?;
        let adapter = options.adapter.as_deref().map(|name| self.adapter(name)).transpose()?;
        let limit = options.context.unwrap_or(usize::MAX).min(model.info.max_positions);
        let needed = prompt.len().saturating_add(options.max_tokens);
        let started = Instant::now();
        let mut runner = self.decoder_runner(needed.min(limit))?;
        let adapter_slot = adapter.is_some().then_some(0);
        if let Some(adapter) = adapter {
            runner = runner.with_adapters(self.adapted_graph()?);
            runner.set_adapter(0, Some(adapter))?;
        }
        let loop_options = GenerateOptions {
            max_new_tokens: options.max_tokens,
            sampling: options.sampling.clone(),
            stop: self.stop.clone(),
            context: Some(limit),
            cancel: options.cancel.clone(),
            deadline: options.deadline,
            adapter_slot,
        };
        let inner = generate(runner, &model.info, prompt, loop_options)?;
        let load_ms = millis(started);
        Ok(TextGeneration {
            prompt_tokens: prompt.len(),
            pieces: Some(self.tokenizer.stream(prompt)),
            inner,
            load_ms,
            prefill_ms: None,
            decode_ms: 0.0,
        })
    }
}

fn open_tokenizer(folder: &HfFolder, built: &Built) -> Result<TextTokenizer> {
    let vocab = match built {
        Built::Decoder(model) => model.info.vocab,
        Built::Encoder(model) => model.info.vocab,
    };
    let tokenizer = match folder.content("tokenizer.json") {
        Some(bytes) => TextTokenizer::from_bytes(&folder.root().join("tokenizer.json"), bytes, vocab)?,
        None => TextTokenizer::open(&folder.tokenizer()?, vocab)?,
    };
    match built {
        Built::Decoder(_) => Ok(tokenizer),
        Built::Encoder(model) => {
            let sentence = folder.sentence_transformer()?;
            let lower_case = sentence.is_some_and(|s| s.do_lower_case);
            tokenizer.for_sentences(model.info.max_tokens, lower_case)
        }
    }
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// A text being generated: an iterator of pieces, each complete UTF-8.
pub struct TextGeneration<'m> {
    inner: Generation<DecoderRunner>,
    pieces: Option<Detokenizer<'m>>,
    prompt_tokens: usize,
    load_ms: f64,
    prefill_ms: Option<f64>,
    decode_ms: f64,
}

impl TextGeneration<'_> {
    fn piece(&mut self) -> Result<Option<String>> {
        let started = Instant::now();
        let token = self.inner.next_token()?;
        match self.prefill_ms {
            None => self.prefill_ms = Some(millis(started)),
            Some(_) => self.decode_ms += millis(started),
        }
        let Some(pieces) = &mut self.pieces else { return Ok(None) };
        match token {
            Some(token) => pieces.push(token).map(Some),
            None => match self.pieces.take() {
                Some(pieces) => pieces.finish().map(Some),
                None => Ok(None),
            },
        }
    }

    /// Ids of the prompt.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.inner.tokens()[..self.prompt_tokens]
    }

    /// Ids generated so far.
    pub fn token_ids(&self) -> &[u32] {
        self.inner.new_tokens()
    }

    /// Why the text ended, once it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.inner.finish_reason()
    }

    /// Time to bind weights (packed at first use) and make the caches, in milliseconds.
    pub fn load_ms(&self) -> f64 {
        self.load_ms
    }

    /// Time from the first request for a piece to the first token, in milliseconds.
    pub fn prefill_ms(&self) -> f64 {
        self.prefill_ms.unwrap_or(0.0)
    }

    /// Time of all later tokens, in milliseconds.
    pub fn decode_ms(&self) -> f64 {
        self.decode_ms
    }
}

impl Iterator for TextGeneration<'_> {
    type Item = Result<String>;

    /// The next piece, never empty; after an error or the end, nothing.
    fn next(&mut self) -> Option<Result<String>> {
        loop {
            match self.piece() {
                Ok(Some(piece)) if piece.is_empty() && self.pieces.is_some() => {}
                Ok(Some(piece)) if piece.is_empty() => return None,
                Ok(Some(piece)) => return Some(Ok(piece)),
                Ok(None) => return None,
                Err(error) => {
                    self.pieces = None;
                    return Some(Err(error));
                }
            }
        }
    }
}
