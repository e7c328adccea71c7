//! The short way in: open a model folder, embed texts, generate text.

use crate::arch::{BuildOptions, Built, Convention, build, build_folder};
use crate::embed::embed_texts;
use crate::error::{ModelError, Result};
use crate::generate::{CancelToken, FinishReason, GenerateOptions, Generation, generate};
use crate::gguf::GgufModel;
use crate::runtime::{DecoderRunner, ENCODER_ROWS, EncoderRunner, PREFILL_ROWS, compile};
use crate::sampling::SamplingOptions;
use crate::template::{ChatTemplate, Message};
use crate::tokenizer::{Detokenizer, TextTokenizer, stop_tokens};
use rlx::CompiledGraph;
use rlx::backend::Backend;
use rlx::config::Config;
use rlx::import::hf::{HfFolder, resolve_model};
use rlx::import::{ModelSource, sniff};
use rlx::session::cpu_backend;
use rlx::weights::WeightLoader;
use rlx_kernels::isa::Isa;
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
}

/// A model opened from a folder: its graph compiled, its weights mapped, packed at first use.
pub struct Model {
    folder: HfFolder,
    weights: Box<dyn WeightLoader>,
    convention: Convention,
    header_bytes: u64,
    backend: Arc<dyn Backend>,
    built: Built,
    compiled: Arc<CompiledGraph>,
    tokenizer: TextTokenizer,
    stop: Vec<u32>,
    encoder: Mutex<Option<EncoderRunner>>,
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

    /// Opens a model folder. No weight is read before the model is used.
    ///
    /// # Errors
    /// Files that are missing or broken, a config that is not understood, weights that do not fit it.
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref().to_string_lossy();
        let dirs = Config::global().map_err(rlx::SessionError::from)?.hf_cache_dirs();
        let resolved = resolve_model(&path, &dirs)?;
        if resolved.path.is_file() && sniff(&resolved.path)? == ModelSource::Gguf {
            return Self::from_gguf(&GgufModel::open(&resolved.path)?, options);
        }
        Self::from_folder(HfFolder::open(&path, &dirs)?, options)
    }

    /// Opens a model from a GGUF file already opened.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn from_gguf(model: &GgufModel, options: &OpenOptions) -> Result<Self> {
        let backend: Arc<dyn Backend> = Arc::new(cpu_backend(options.isa, options.threads)?);
        let weights = model.weights();
        let choices = build_options(options, Convention::Gguf);
        let built = build(&model.config()?, weights.as_ref(), model.sentence(), &choices)?;
        let tokenizer = model.tokenizer(vocab_of(&built))?;
        let tokenizer = match &built {
            Built::Decoder(_) => tokenizer,
            Built::Encoder(encoder) => tokenizer.for_sentences(encoder.info.max_tokens, false)?,
        };
        let opened = Self::assemble(model.folder()?, weights, Convention::Gguf, built, tokenizer, backend)?;
        Ok(Self { header_bytes: model.header_bytes(), ..opened })
    }

    /// Opens a model from a folder already found.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn from_folder(folder: HfFolder, options: &OpenOptions) -> Result<Self> {
        let backend = cpu_backend(options.isa, options.threads)?;
        Self::on_backend(folder, options, Arc::new(backend))
    }

    /// Opens a model for a backend: the reference evaluation, say.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn on_backend(folder: HfFolder, options: &OpenOptions, backend: Arc<dyn Backend>) -> Result<Self> {
        let weights = folder.loader()?;
        let build = build_options(options, Convention::Hub);
        let built = build_folder(&folder, weights.as_ref(), &build)?;
        let tokenizer = open_tokenizer(&folder, &built)?;
        Self::assemble(folder, weights, Convention::Hub, built, tokenizer, backend)
    }

    fn assemble(
        folder: HfFolder,
        weights: Box<dyn WeightLoader>,
        convention: Convention,
        built: Built,
        tokenizer: TextTokenizer,
        backend: Arc<dyn Backend>,
    ) -> Result<Self> {
        let compiled = Arc::new(compile(built.graph(), weights.as_ref(), &backend)?);
        let stop = stop_tokens(&folder)?;
        let encoder = Mutex::new(None);
        let header_bytes = 0;
        Ok(Self {
            folder,
            weights,
            convention,
            header_bytes,
            backend,
            built,
            compiled,
            tokenizer,
            stop,
            encoder,
        })
    }

    /// The folder.
    pub fn folder(&self) -> &HfFolder {
        &self.folder
    }

    /// Habits of the checkpoint.
    pub fn convention(&self) -> Convention {
        self.convention
    }

    /// Bytes before the tensors in a GGUF file, which holds config and tokenizer there; zero for a folder.
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
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
            Built::Encoder(model) => EncoderRunner::new(model, Arc::clone(&self.compiled), max_rows),
            Built::Decoder(_) => Err(ModelError::NotAnEncoder { path: self.folder.root().to_path_buf() }),
        }
    }

    /// A runner of the decoder with caches for one sequence of up to `context` positions.
    ///
    /// # Errors
    /// [`ModelError::NotADecoder`], [`ModelError::Session`].
    pub fn decoder_runner(&self, context: usize) -> Result<DecoderRunner> {
        match &self.built {
            Built::Decoder(model) => {
                DecoderRunner::new(model, Arc::clone(&self.compiled), context, PREFILL_ROWS)
            }
            Built::Encoder(_) => Err(ModelError::NotADecoder { path: self.folder.root().to_path_buf() }),
        }
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
        let Built::Decoder(model) = &self.built else {
            return Err(ModelError::NotADecoder { path: self.folder.root().to_path_buf() });
        };
        let limit = options.context.unwrap_or(usize::MAX).min(model.info.max_positions);
        let needed = prompt.len().saturating_add(options.max_tokens);
        let started = Instant::now();
        let runner = self.decoder_runner(needed.min(limit))?;
        let loop_options = GenerateOptions {
            max_new_tokens: options.max_tokens,
            sampling: options.sampling.clone(),
            stop: self.stop.clone(),
            context: Some(limit),
            cancel: options.cancel.clone(),
            deadline: options.deadline,
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

fn build_options(options: &OpenOptions, convention: Convention) -> BuildOptions {
    let cache_dtype = options.cache_dtype.unwrap_or(DType::F32);
    BuildOptions { cache_dtype, convention, ..BuildOptions::default() }
}

fn vocab_of(built: &Built) -> usize {
    match built {
        Built::Decoder(model) => model.info.vocab,
        Built::Encoder(model) => model.info.vocab,
    }
}

fn open_tokenizer(folder: &HfFolder, built: &Built) -> Result<TextTokenizer> {
    let vocab = vocab_of(built);
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
