//! The short way in: open a model folder, embed texts, generate text.

use crate::arch::{BuildOptions, Built, Convention, Decoder, build, build_folder};
use crate::draft::{Drafter, ModelDrafter, PromptLookup};
use crate::embed::embed_texts;
use crate::error::{ModelError, Result};
use crate::generate::{CancelToken, DecoderLimits, DecoderRuntime as _, GenerateOptions, Held, generate};
use crate::gguf::GgufModel;
use crate::gguf::kept::{self, TableWriter};
use crate::kv::BLOCK_POSITIONS;
use crate::largest::{Largest, LargestGraphs};
use crate::lora::{ADAPTER_SLOTS, AdaptedGraph, Adapter, AdapterPlan, Adapters};
use crate::plan::{PlanRequest, admit_tokenizer};
use crate::precision::{has_precision, precision_asked, precision_on_cpu};
use crate::runtime::{
    Beside, DecoderRunner, ENCODER_ROWS, EncoderRunner, Executables, PREFILL_ROWS, of_registry, pipeline,
    with_weights,
};
use crate::sampling::SamplingOptions;
use crate::template::{ChatTemplate, Message};
use crate::text::TextGeneration;
use crate::tokenizer::{TextTokenizer, stop_tokens};
use rlx::CompiledGraph;
use rlx::aot::{AotCache, Artefact};
use rlx::backend::cpu::{CpuBackend, Precision};
use rlx::backend::{Backend, Program};
use rlx::config::Config;
use rlx::import::hf::{HfFolder, resolve_model};
use rlx::import::{ModelSource, sniff};
use rlx::memory::experts::{ExpertPolicy, ExpertPool};
use rlx::pipeline::{ModelCompilePipeline, PipelineError};
use rlx::session::cpu_backend;
use rlx::weights::WeightLoader;
use rlx_graph::adapters::rank_symbol;
use rlx_graph::passes::PassOptions;
use rlx_kernels::isa::Isa;
use rlx_tensor::time::Instant;
use rlx_tensor::{DType, DimBinding};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// How a model is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Worker threads; `RLX_THREADS`, else as many as the machine and its control group allow, if not given.
    pub threads: Option<usize>,
    /// Instruction set; `RLX_ISA`, else the best of this machine, if not given.
    pub isa: Option<Isa>,
    /// Precision of matrix products; if not given `RLX_PRECISION`, else a compiled file's own, else bf16 for a bf16 checkpoint where the
    /// CPU has `vdpbf16ps`, else f32. A model that is opened on a backend of the caller's has the backend's, and what is asked for must be it.
    pub precision: Option<Precision>,
    /// Element type of KV caches, F32, F16, BF16 or Q8_0 (8-bit integers, 32 elements of a head with one scale). If not given: F16
    /// for a GGUF file with weights in blocks, else F32.
    pub cache_dtype: Option<DType>,
    /// Element type that adapters are held in, F32 or BF16: F32 if not given, which keeps every stored value.
    pub adapter_dtype: Option<DType>,
    /// Experts of each layer that are in memory at once, the others being loaded as the router asks for them; all if not given.
    /// Heeded where the model makes its own backend.
    pub expert_budget: Option<usize>,
    /// Weights are registered beside those of another model, such as the one that this one guesses tokens for. Compiled files have a
    /// registry of their own in any case.
    pub beside: Option<Beside>,
}

/// A model opened from a folder: its graph compiled, its weights mapped, packed at first use.
pub struct Model {
    folder: HfFolder,
    weights: Box<dyn WeightLoader>,
    convention: Convention,
    header_bytes: u64,
    backend: Arc<dyn Backend>,
    precision: Option<Precision>,
    built: Built,
    pipeline: Arc<ModelCompilePipeline>,
    executables: Executables,
    tokenizer: Arc<TextTokenizer>,
    stop: Vec<u32>,
    encoder: Mutex<Option<EncoderRunner>>,
    artefact: Option<Arc<Artefact>>,
    threads: usize,
    adapters: Adapters,
    largest: LargestGraphs,
    experts: Option<Arc<ExpertPool>>,
    /// The last field: dropping it, after all else, writes the tables.
    tokenizer_writer: Option<TableWriter>,
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
    /// Where the text reaches the context: keep this many of its first tokens, forget half of those after them and go on. A text that may
    /// reach it is refused if not given. See [`GenerateOptions::context_shift`].
    pub context_shift: Option<usize>,
    /// The adapter to run with, by name; the plain model if none.
    pub adapter: Option<String>,
    /// Ends the generation from outside.
    pub cancel: CancelToken,
    /// Ends the generation at this time.
    pub deadline: Option<Instant>,
    /// Where guesses of several tokens at a time come from. They never change the text.
    pub draft: Draft,
    /// What the text has to be.
    #[cfg(feature = "grammar")]
    pub grammar: Option<crate::grammar::Grammar>,
}

/// Where guesses of the next tokens come from: see [`crate::draft`].
#[derive(Clone, Default)]
pub enum Draft {
    /// No guesses: a token at a time.
    #[default]
    Off,
    /// The text so far: see [`PromptLookup`].
    Lookup {
        /// Most tokens guessed at a time.
        tokens: usize,
    },
    /// A smaller model with the same tokens.
    Model {
        /// The smaller model.
        model: Arc<Model>,
        /// Most tokens guessed at a time.
        tokens: usize,
    },
}

impl std::fmt::Debug for Draft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Draft::Off => f.write_str("Off"),
            Draft::Lookup { tokens } => write!(f, "Lookup({tokens})"),
            Draft::Model { model, tokens } => write!(f, "Model({}, {tokens})", model.folder.root().display()),
        }
    }
}

impl Draft {
    /// Guesses by a smaller model.
    ///
    /// # Errors
    /// [`ModelError::Setting`] if its tokens are not those of the model it guesses for, naming the first that differs;
    /// [`ModelError::NotADecoder`].
    pub fn by(draft: Arc<Model>, model: &Model, tokens: usize) -> Result<Self> {
        let (of_draft, vocab) = (draft.decoder()?.info.vocab, model.decoder()?.info.vocab);
        let differs = |id: u32| {
            let (there, here) = (draft.tokenizer.token(id), model.tokenizer.token(id));
            (there != here).then(|| format!("token {id} is {there:?}, not {here:?}"))
        };
        let found = match of_draft == vocab {
            true => (0..vocab as u32).find_map(differs),
            false => Some(format!("{of_draft} tokens, not {vocab}")),
        };
        match found {
            None => Ok(Draft::Model { model: draft, tokens }),
            Some(found) => {
                let (setting, expected) = ("the draft model", "one with the tokens of the model");
                Err(ModelError::Setting { setting, expected, found })
            }
        }
    }

    /// Most tokens guessed at a time.
    fn tokens(&self) -> usize {
        match self {
            Draft::Off => 0,
            Draft::Lookup { tokens } | Draft::Model { tokens, .. } => *tokens,
        }
    }

    /// The draft model.
    fn model(&self) -> Option<&Model> {
        match self {
            Draft::Off | Draft::Lookup { .. } => None,
            Draft::Model { model, .. } => Some(model),
        }
    }

    /// `admitted`: the memory of the draft model's run has been asked for.
    fn drafter(&self, context: usize, vocab: usize, admitted: bool) -> Result<Option<Box<dyn Drafter>>> {
        Ok(match self {
            Draft::Off => None,
            Draft::Lookup { .. } => Some(Box::new(PromptLookup)),
            Draft::Model { model, .. } => {
                let mut runner = match admitted {
                    true => model.admitted_runner(context)?,
                    false => model.decoder_runner(context)?,
                };
                runner.choose_from(model.largest_of(&TextOptions::default())?)?;
                Some(Box::new(ModelDrafter::new(runner, &model.decoder()?.info, vocab)?))
            }
        })
    }
}

/// A text whose keys and values are still there: a text that begins alike goes on from them.
pub struct HeldText {
    pub(crate) runner: DecoderRunner,
    pub(crate) held: Held,
    pub(crate) adapter: Option<Arc<Adapter>>,
}

impl std::fmt::Debug for HeldText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HeldText({} tokens)", self.held.tokens().len())
    }
}

impl HeldText {
    /// True if a text of `needed` positions of this model with this adapter can go on from it.
    fn serves(&self, model: &Model, needed: usize, outs: usize, adapter: Option<&Arc<Adapter>>) -> bool {
        let same_model = Arc::ptr_eq(self.runner.compiled(), model.compiled());
        let limits = self.runner.limits();
        let room = limits.blocks.min(limits.table).saturating_mul(BLOCK_POSITIONS);
        let same_adapter = match (&self.adapter, adapter) {
            (None, None) => true,
            (Some(held), Some(asked)) => Arc::ptr_eq(held, asked),
            _ => false,
        };
        same_model && room >= needed && limits.outs >= outs && same_adapter
    }
}

impl Default for TextOptions {
    /// Up to 128 tokens, greedy.
    fn default() -> Self {
        Self {
            max_tokens: 128,
            sampling: SamplingOptions::greedy(),
            context: None,
            context_shift: None,
            adapter: None,
            cancel: CancelToken::new(),
            deadline: None,
            draft: Draft::Off,
            #[cfg(feature = "grammar")]
            grammar: None,
        }
    }
}

/// A pool that keeps `slots` experts of each layer.
fn expert_pool(slots: usize) -> Result<Arc<ExpertPool>> {
    let pool = ExpertPool::new(slots, ExpertPolicy::default()).map_err(|e| {
        let (setting, expected) = ("expert_budget", "at least 1 expert");
        ModelError::Setting { setting, expected, found: e.to_string() }
    })?;
    Ok(Arc::new(pool))
}

impl Model {
    /// Opens a model folder, or a hub name that is in the local cache, with default options.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// Opens a model folder, a GGUF file, or a file that `rlx compile` wrote. No weight is read before the model is used.
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
            let found = Artefact::precision_of(path).map_err(rlx::SessionError::from)?;
            let compiled_for = Precision::ALL.into_iter().find(|precision| precision.name() == found);
            let precision = precision_asked(options)?.or(compiled_for).unwrap_or_default();
            let backend = cpu_backend(options.isa, options.threads)?.with_precision(precision);
            let threads = backend.pool().threads();
            let model = Self::open_artefact(path, options, Arc::new(backend))?;
            return Ok(Self { precision: Some(precision), threads, ..model });
        }
        let path = path.to_string_lossy();
        let dirs = Config::global().map_err(rlx::SessionError::from)?.hf_cache_dirs();
        let resolved = resolve_model(&path, &dirs)?;
        if resolved.path.is_file() && sniff(&resolved.path)? == ModelSource::Gguf {
            return Self::from_gguf(&GgufModel::open(&resolved.path)?, options);
        }
        Self::from_folder(HfFolder::open(&path, &dirs)?, options)
    }

    /// Opens a model from a GGUF file already opened. Its products are in f32 unless asked otherwise: its weights are decoded to that.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn from_gguf(model: &GgufModel, options: &OpenOptions) -> Result<Self> {
        let backend = cpu_backend(options.isa, options.threads)?;
        let precision = precision_on_cpu(options, model.stored(), backend.isa())?;
        Self::on_cpu(backend, precision, options, |backend, cache| {
            Self::gguf_on(model, options, backend, cache)
        })
    }

    /// Opens a GGUF file for a backend, as [`Model::on_backend`] a folder.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn gguf_on_backend(
        model: &GgufModel,
        options: &OpenOptions,
        backend: Arc<dyn Backend>,
    ) -> Result<Self> {
        has_precision(options, &*backend)?;
        Self::gguf_on(model, options, backend, None)
    }

    fn gguf_on(
        model: &GgufModel,
        options: &OpenOptions,
        backend: Arc<dyn Backend>,
        cache: Option<AotCache>,
    ) -> Result<Self> {
        let weights = model.weights();
        let choices = build_options(options, Convention::Gguf, default_cache(weights.as_ref())?);
        let built = build(&model.config()?, weights.as_ref(), model.sentence(), &choices)?;
        let (tokenizer, writer) = kept::tokenizer(model, vocab_of(&built))?;
        let tokenizer = match &built {
            Built::Decoder(_) => tokenizer,
            Built::Encoder(encoder) => tokenizer.for_sentences(encoder.info.max_tokens, false)?,
        };
        let opened = Self::on_built(model.folder()?, weights, options, (backend, cache), built, tokenizer)?;
        let (convention, header_bytes) = (Convention::Gguf, model.header_bytes());
        let mut tokenizer_writer = writer;
        if let (Some(writer), Built::Decoder(_)) = (&mut tokenizer_writer, &opened.built) {
            writer.built = Some(Arc::clone(&opened.tokenizer));
        }
        Ok(Self { convention, header_bytes, tokenizer_writer, ..opened })
    }

    /// Opens a model from a folder already found.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn from_folder(folder: HfFolder, options: &OpenOptions) -> Result<Self> {
        let backend = cpu_backend(options.isa, options.threads)?;
        let weights = folder.loader()?;
        let precision = precision_on_cpu(options, weights.as_ref(), backend.isa())?;
        Self::on_cpu(backend, precision, options, |backend, cache| {
            Self::on_weights(folder, weights, options, backend, cache)
        })
    }

    fn on_cpu(
        backend: CpuBackend,
        precision: Precision,
        options: &OpenOptions,
        open: impl FnOnce(Arc<dyn Backend>, Option<AotCache>) -> Result<Self>,
    ) -> Result<Self> {
        let threads = backend.pool().threads();
        let backend = backend.with_precision(precision);
        let experts = options.expert_budget.map(expert_pool).transpose()?;
        let backend = match &experts {
            Some(pool) => backend.with_experts(Arc::clone(pool)),
            None => backend,
        };
        let cache = AotCache::from_config(Config::global().map_err(rlx::SessionError::from)?);
        let opened = open(Arc::new(backend), cache)?;
        Ok(Self { precision: Some(precision), threads, experts, ..opened })
    }

    /// Opens a model for a backend: the reference evaluation, say. Threads, instruction set and precision are the backend's; plans are
    /// not kept on disk.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn on_backend(folder: HfFolder, options: &OpenOptions, backend: Arc<dyn Backend>) -> Result<Self> {
        has_precision(options, &*backend)?;
        let weights = folder.loader()?;
        Self::on_weights(folder, weights, options, backend, None)
    }

    fn on_weights(
        folder: HfFolder,
        weights: Box<dyn WeightLoader>,
        options: &OpenOptions,
        backend: Arc<dyn Backend>,
        cache: Option<AotCache>,
    ) -> Result<Self> {
        let build = build_options(options, Convention::Hub, DType::F32);
        let built = build_folder(&folder, weights.as_ref(), &build)?;
        let tokenizer = open_tokenizer(&folder, &built)?;
        Self::on_built(folder, weights, options, (backend, cache), built, tokenizer)
    }

    fn on_built(
        folder: HfFolder,
        weights: Box<dyn WeightLoader>,
        options: &OpenOptions,
        (backend, cache): (Arc<dyn Backend>, Option<AotCache>),
        built: Built,
        tokenizer: TextTokenizer,
    ) -> Result<Self> {
        let beside = options.beside.as_ref().filter(|_| matches!(built, Built::Decoder(_)));
        let pipeline = Arc::new(pipeline(built.graph(), weights.as_ref(), &backend, cache, beside)?);
        let binding = plan_at(&built, PREFILL_ROWS);
        let required = with_weights(PassOptions::default());
        let label = built.graph().name();
        let template = pipeline.get_or_specialize_aot(label, built.graph(), &required, &binding)?;
        let template = pipeline.template_of(template.compiled()).ok_or(PipelineError::NoTemplate)?;
        let executables = Executables::of(Arc::clone(&pipeline), template)?;
        let stop = stop_tokens(&folder)?;
        let adapter_dtype = options.adapter_dtype.unwrap_or(DType::F32);
        if !matches!(adapter_dtype, DType::F32 | DType::BF16) {
            let (setting, found) = ("adapter_dtype", adapter_dtype.to_string());
            return Err(ModelError::Setting { setting, expected: "f32 or bf16", found });
        }
        let adapters = Adapters::of(built.graph(), adapter_dtype);
        let model = Self::assemble(folder, weights, backend, built, (pipeline, executables), tokenizer, stop);
        Ok(Self { adapters, ..model })
    }

    /// A pipeline with this one template, whose identity the caller knows.
    pub(crate) fn adopted(
        backend: &Arc<dyn Backend>,
        compiled: CompiledGraph,
        identity: &[u8],
    ) -> Result<(Arc<ModelCompilePipeline>, Executables)> {
        let pipeline = Arc::new(of_registry(backend, Arc::clone(compiled.weights()))?);
        let template = pipeline.adopt(Arc::new(compiled), identity);
        let executables = Executables::of(Arc::clone(&pipeline), template)?;
        Ok((pipeline, executables))
    }

    pub(crate) fn assemble(
        folder: HfFolder,
        weights: Box<dyn WeightLoader>,
        backend: Arc<dyn Backend>,
        built: Built,
        (pipeline, executables): (Arc<ModelCompilePipeline>, Executables),
        tokenizer: TextTokenizer,
        stop: Vec<u32>,
    ) -> Self {
        let encoder = Mutex::new(None);
        Self {
            folder,
            weights,
            convention: Convention::Hub,
            header_bytes: 0,
            backend,
            precision: None,
            adapters: Adapters::of(built.graph(), DType::F32),
            largest: LargestGraphs::default(),
            experts: None,
            tokenizer_writer: None,
            built,
            pipeline,
            executables,
            tokenizer: Arc::new(tokenizer),
            stop,
            encoder,
            artefact: None,
            threads: 1,
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
        Ok(self.compiled().program()?)
    }

    /// Says that the model is going to run, not only to be looked at.
    pub(crate) fn use_tokenizer_writer(&self) {
        if let Some(writer) = &self.tokenizer_writer {
            writer.use_model();
        }
    }

    /// Worker threads to count with.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Tokens that end a text, ascending.
    pub fn stop(&self) -> &[u32] {
        &self.stop
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
        self.executables.compiled()
    }

    /// What compiles the model's graphs, and keeps executables for the next run of the same capacities.
    pub fn pipeline(&self) -> &Arc<ModelCompilePipeline> {
        &self.pipeline
    }

    /// Where executables of the plain graph come from.
    pub fn executables(&self) -> &Executables {
        &self.executables
    }

    /// The device.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The precision of matrix products; `None` of a backend that has no choice of them, such as the reference evaluation.
    pub fn precision(&self) -> Option<Precision> {
        self.precision.or_else(|| self.backend.precision())
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
        embed_texts(runner, &model.info, &self.tokenizer, texts, self.threads)
    }

    /// A runner of the encoder for runs of up to `max_rows` rows.
    ///
    /// # Errors
    /// [`ModelError::NotAnEncoder`], [`ModelError::Session`].
    pub fn encoder_runner(&self, max_rows: usize) -> Result<EncoderRunner> {
        match &self.built {
            Built::Encoder(model) => {
                self.admit(max_rows.min(model.info.max_tokens).max(1))?;
                EncoderRunner::new(model, self.executables.clone(), max_rows)
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
        self.admitted_runner(context)
    }

    /// As [`Model::decoder_runner`], of a context whose memory has been asked for.
    fn admitted_runner(&self, context: usize) -> Result<DecoderRunner> {
        DecoderRunner::new(self.decoder()?, self.executables.clone(), context, PREFILL_ROWS)
    }

    /// Adds a low-rank adapter (a PEFT folder, or a GGUF file) under a name. Requests may use it at once.
    ///
    /// # Errors
    /// [`ModelError::AdapterExists`]; [`ModelError::NotADecoder`]; what the adapter has and this model cannot use.
    pub fn add_adapter(&self, name: &str, path: impl AsRef<Path>) -> Result<Arc<Adapter>> {
        let head_dim = self.decoder()?.info.head_dim;
        self.adapters.put(self.compiled().weights(), name, path.as_ref(), head_dim, false)
    }

    /// Replaces an adapter. Requests that run go on with the one they started with.
    ///
    /// # Errors
    /// [`ModelError::UnknownAdapter`]; as [`Model::add_adapter`]. The old one stays where the new one cannot be used.
    pub fn replace_adapter(&self, name: &str, path: impl AsRef<Path>) -> Result<Arc<Adapter>> {
        let head_dim = self.decoder()?.info.head_dim;
        self.adapters.put(self.compiled().weights(), name, path.as_ref(), head_dim, true)
    }

    /// Removes an adapter. Requests that run with it go on.
    ///
    /// # Errors
    /// [`ModelError::UnknownAdapter`].
    pub fn remove_adapter(&self, name: &str) -> Result<()> {
        self.adapters.remove(self.compiled().weights(), name)
    }

    /// The present generation of an adapter.
    ///
    /// # Errors
    /// [`ModelError::UnknownAdapter`].
    pub fn adapter(&self, name: &str) -> Result<Arc<Adapter>> {
        self.adapters.find(name)
    }

    /// Memory that an adapter on disk will take once it is added: its factors, and what a run with it needs besides. From headers only.
    ///
    /// # Errors
    /// [`ModelError::NotADecoder`]; what the adapter has and this model cannot use.
    pub fn adapter_plan(&self, path: impl AsRef<Path>, request: PlanRequest) -> Result<AdapterPlan> {
        let (rank, bytes) = self.adapters.expected(path.as_ref(), self.decoder()?.info.head_dim)?;
        let binding = (0..ADAPTER_SLOTS)
            .fold(self.plan_binding(request)?, |binding, slot| binding.with(rank_symbol(slot).name(), rank));
        let adapted = self.adapted_graph()?;
        let lir = adapted.executables.compiled().specialize(&binding)?;
        let workspace = self.backend.workspace_bytes(&lir).map_err(rlx::SessionError::from)?;
        let run_bytes = (lir.arena_bytes() as u64).saturating_add(workspace as u64);
        Ok(AdapterPlan { rank, adapter_bytes: bytes as u64, run_bytes })
    }

    /// Takes over the adapters of the same model on another device.
    pub(crate) fn adopt_adapters(&self, other: &Model) -> Result<()> {
        self.adapters.adopt(&other.adapters)
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
        self.adapters.graph(&self.pipeline, self.built.graph())
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
        let limit = options.context.unwrap_or(usize::MAX).min(self.decoder()?.info.max_positions);
        let needed = prompt.len().saturating_add(options.max_tokens);
        self.generate_in(None, needed.min(limit), prompt, options)
    }

    /// As [`Model::generate_tokens`], after a text whose start may be the prompt's, such as the turn of a conversation before this one.
    /// What they share is not run again; the text has the same bits as from nothing.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn generate_after(
        &self,
        held: Option<HeldText>,
        prompt: &[u32],
        options: &TextOptions,
    ) -> Result<TextGeneration<'_>> {
        let limit = options.context.unwrap_or(usize::MAX).min(self.decoder()?.info.max_positions);
        let needed = prompt.len().saturating_add(options.max_tokens);
        // Room for as much again, so that the next turn finds this one.
        self.generate_in(held, needed.saturating_mul(2).min(limit), prompt, options)
    }

    fn generate_in(
        &self,
        held: Option<HeldText>,
        room: usize,
        prompt: &[u32],
        options: &TextOptions,
    ) -> Result<TextGeneration<'_>> {
        let model = self.decoder()?;
        let adapter = options.adapter.as_deref().map(|name| self.adapter(name)).transpose()?;
        let limit = options.context.unwrap_or(usize::MAX).min(model.info.max_positions);
        let needed = prompt.len().saturating_add(options.max_tokens).min(limit);
        let outs = options.draft.tokens().saturating_add(1);
        let started = Instant::now();
        let held = held.filter(|held| held.serves(self, needed, outs, adapter.as_ref()));
        let largest = self.largest_of(options)?;
        let (mut runner, held) = match held {
            Some(HeldText { mut runner, held, .. }) => {
                runner.choose_from(largest)?;
                (runner, Some(held))
            }
            None => {
                self.admit_text(room, options.draft.model())?;
                (DecoderRunner::of_text(model, &self.executables, (room, outs), largest)?, None)
            }
        };
        let both_admitted = held.is_none();
        let adapter_slot = adapter.is_some().then_some(0);
        if let Some(adapter) = &adapter {
            runner.use_adapters(|| self.adapted_graph())?;
            runner.set_adapter(0, Some(Arc::clone(adapter)))?;
        }
        let loop_options = GenerateOptions {
            max_new_tokens: options.max_tokens,
            sampling: options.sampling.clone(),
            stop: self.stop.clone(),
            context: Some(limit),
            cancel: options.cancel.clone(),
            deadline: options.deadline,
            adapter_slot,
            held,
            context_shift: options.context_shift,
        };
        let mut inner = generate(runner, &model.info, prompt, loop_options)?;
        let drafter = options.draft.drafter(needed, model.info.vocab, both_admitted);
        if let Some(drafter) = drafter.map_err(ModelError::of_draft)? {
            inner = inner.with_drafter(drafter);
        }
        #[cfg(feature = "grammar")]
        if let Some(grammar) = &options.grammar {
            let (tokenizer, vocab) = (&self.tokenizer, model.info.vocab);
            let constraint = crate::grammar::GrammarConstraint::new(grammar, tokenizer, vocab, &self.stop)?;
            inner = inner.with_constraint(Box::new(constraint));
        }
        Ok(TextGeneration::new(inner, self.tokenizer.stream(prompt), adapter, started))
    }

    /// A runner that goes on with a text of another one, which had this room.
    pub(crate) fn runner_after(
        &self,
        limits: DecoderLimits,
        wanted: Option<usize>,
        adapter: Option<&Arc<Adapter>>,
    ) -> Result<DecoderRunner> {
        let model = self.decoder()?;
        let room = limits.table.saturating_mul(BLOCK_POSITIONS).min(model.info.max_positions);
        self.admit(room.max(1))?;
        let largest = self.largest_graph(wanted.filter(|_| adapter.is_none()))?;
        let mut runner = DecoderRunner::of_text(model, &self.executables, (room, limits.outs), largest)?;
        if let Some(adapter) = adapter {
            runner.use_adapters(|| self.adapted_graph())?;
            runner.set_adapter(0, Some(Arc::clone(adapter)))?;
        }
        Ok(runner)
    }

    fn admit_text(&self, context: usize, draft: Option<&Model>) -> Result<()> {
        let asked = context.clamp(1, self.decoder()?.info.max_positions.max(1));
        match draft {
            Some(draft) => self.admit_with_draft(asked, draft),
            None => self.admit(asked),
        }
    }

    /// The graph that gives the largest logits, where they are all that choosing needs.
    fn largest_of(&self, options: &TextOptions) -> Result<Option<Largest>> {
        #[cfg(feature = "grammar")]
        let constrained = options.grammar.is_some();
        #[cfg(not(feature = "grammar"))]
        let constrained = false;
        let wanted = options.sampling.decisive().filter(|_| !constrained && options.adapter.is_none());
        self.largest_graph(wanted)
    }

    /// The graph that gives so many of the largest logits, on a device with a memory of its own.
    pub(crate) fn largest_graph(&self, wanted: Option<usize>) -> Result<Option<Largest>> {
        self.largest.of(&self.pipeline, self.built.graph(), self.decoder()?.info.vocab, wanted)
    }
}

/// Capacities that a model's plan is kept under; the template is the same for all.
fn plan_at(built: &Built, tokens: usize) -> DimBinding {
    match built {
        Built::Encoder(model) => EncoderRunner::binding(&model.info, tokens).0,
        Built::Decoder(model) => DecoderRunner::binding(&model.info, tokens, tokens).0,
    }
}

/// F16 beside weights in blocks, whose error is far above a cache's; else F32.
fn default_cache(weights: &dyn WeightLoader) -> Result<DType> {
    for name in weights.names() {
        if weights.shape(name)?.is_some_and(|shape| shape.dtype().block().0 > 1) {
            return Ok(DType::F16);
        }
    }
    Ok(DType::F32)
}

fn build_options(options: &OpenOptions, convention: Convention, cache: DType) -> BuildOptions {
    let cache_dtype = options.cache_dtype.unwrap_or(cache);
    let namespace = options.beside.as_ref().map_or(String::new(), |beside| beside.namespace().to_owned());
    BuildOptions { cache_dtype, convention, namespace, ..BuildOptions::default() }
}

fn vocab_of(built: &Built) -> usize {
    match built {
        Built::Decoder(model) => model.info.vocab,
        Built::Encoder(model) => model.info.vocab,
    }
}

fn open_tokenizer(folder: &HfFolder, built: &Built) -> Result<TextTokenizer> {
    let vocab = vocab_of(built);
    admit_tokenizer(folder)?;
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
