//! A model as one compiled file: what `rlx compile` writes and every verb opens.

use crate::arch::{Built, Convention, Decoder, DecoderInfo, Encoder, EncoderInfo};
use crate::blocks::rope::Rope;
use crate::error::{ModelError, Result};
use crate::model::{Model, OpenOptions};
use crate::plan::PlanRequest;
use crate::precision::has_precision;
use crate::template::TEMPLATE_FILE;
use crate::tokenizer::{StoredTokenizer, TextTokenizer};
use rlx::aot::wire::{WireError, WireReader, WireWriter};
use rlx::aot::{AotCacheError, Artefact, ArtefactKind, ArtefactParts};
use rlx::backend::Backend;
use rlx::import::hf::{HfFolder, TOKENIZER_FILE};
use rlx::weights::BytesWeightLoader;
use rlx_graph::Graph;
use rlx_tensor::DType;
use std::path::Path;
use std::sync::Arc;

/// Sizes and limits, stop tokens, how sentences are cut.
const MODEL: &str = "model";
pub(crate) const TABLES: &str = "tokenizer-tables";
pub(crate) const REST: &str = "tokenizer-rest";
/// Files of the folder that are read only when something asks for them.
const KEPT: &[&str] = &["config.json", "generation_config.json", "tokenizer_config.json", TEMPLATE_FILE];

impl Model {
    /// Writes the model as one file for this machine's instruction set: plan, weights as the kernels read them, tokenizer and config. A
    /// reader sees all of it or none.
    ///
    /// # Errors
    /// [`rlx::SessionError::Aot`] if the file cannot be written; of packing the weights.
    pub fn write_artefact(&self, path: &Path, threads: usize) -> Result<()> {
        let tokenizer = self.stored_tokenizer()?;
        let mut files = vec![
            (MODEL.to_owned(), self.facts()),
            (TABLES.to_owned(), tokenizer.tables),
            (REST.to_owned(), tokenizer.rest),
        ];
        for &name in KEPT {
            if let Some(bytes) = self.folder().content(name) {
                files.push((name.to_owned(), bytes.to_vec()));
            } else if self.folder().is_on_disk() && self.folder().root().join(name).is_file() {
                files.push((name.to_owned(), self.read_file(name)?));
            }
        }
        let context = self.context_limit().min(crate::runtime::PREFILL_ROWS);
        let binding = self.plan_binding(PlanRequest { context: Some(context), batch: None })?;
        let parts = ArtefactParts {
            kind: ArtefactKind::Model,
            compiled: self.compiled(),
            binding: &binding,
            files: &files,
        };
        Ok(parts.write(path, threads).map_err(rlx::SessionError::from)?)
    }

    fn stored_tokenizer(&self) -> Result<StoredTokenizer> {
        let json = match (self.folder().content(TOKENIZER_FILE), self.convention()) {
            (Some(bytes), _) => bytes.to_vec(),
            (None, Convention::Gguf) => return self.tokenizer().stored(),
            (None, Convention::Hub) => self.read_file(TOKENIZER_FILE)?,
        };
        let vocab = match self.built() {
            Built::Decoder(model) => model.info.vocab,
            Built::Encoder(model) => model.info.vocab,
        };
        StoredTokenizer::new(&self.folder().root().join(TOKENIZER_FILE), &json, vocab)
    }

    fn read_file(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.folder().root().join(name);
        std::fs::read(&path).map_err(|source| rlx::import::ImportError::Io { path, source }.into())
    }

    fn facts(&self) -> Vec<u8> {
        let mut out = WireWriter::new();
        match self.built() {
            Built::Decoder(model) => write_decoder(out.u8(0), &model.info),
            Built::Encoder(model) => write_encoder(out.u8(1), &model.info),
        }
        out.u64(self.stop().len() as u64);
        self.stop().iter().for_each(|&id| {
            out.u32(id);
        });
        let limit = self.tokenizer().max_tokens().map_or(u64::MAX, |limit| limit as u64);
        out.u64(limit).u8(u8::from(self.tokenizer().lower_case()));
        out.finish()
    }

    /// Opens a compiled file on a backend. Weights are mapped, and verified before they are first read.
    ///
    /// # Errors
    /// [`rlx::SessionError::Aot`] for a file that is damaged, or made for another version, device, instruction set or precision.
    pub fn open_artefact(path: &Path, options: &OpenOptions, backend: Arc<dyn Backend>) -> Result<Self> {
        has_precision(options, &*backend)?;
        let refused = |error: WireError| {
            let reason = format!("the model's sizes, {error}");
            rlx::SessionError::from(AotCacheError::Refused { path: path.to_path_buf(), reason })
        };
        let artefact =
            Arc::new(Artefact::open(path, ArtefactKind::Model, &*backend).map_err(rlx::SessionError::from)?);
        let threads = options.threads.unwrap_or_else(|| rlx_kernels::pool::default_threads(Path::new("/")));
        let compiled = artefact.compiled(&backend, threads).map_err(rlx::SessionError::from)?;
        let file = |name: &str| artefact.file(name).map_err(rlx::SessionError::from);
        let facts = file(MODEL)?;
        let mut from = WireReader::new(facts.bytes());
        let (built, stop, limit, lower) = read_facts(&mut from, compiled.graph()).map_err(refused)?;
        if let (Built::Decoder(model), Some(asked)) = (&built, options.cache_dtype)
            && asked != model.info.cache_dtype
        {
            let expected = "the type it was compiled with";
            let found = format!("{asked}, compiled with {}", model.info.cache_dtype);
            return Err(ModelError::Setting { setting: "cache_dtype", expected, found });
        }
        let vocab = match &built {
            Built::Decoder(model) => model.info.vocab,
            Built::Encoder(model) => model.info.vocab,
        };
        let tokenizer_path = path.join(TOKENIZER_FILE);
        let rest = file(REST)?;
        let tokenizer = TextTokenizer::from_stored(&tokenizer_path, file(TABLES)?, rest.bytes(), vocab)?;
        let tokenizer = match usize::try_from(limit) {
            Ok(limit) if limit != usize::MAX => tokenizer.for_sentences(limit, lower)?,
            _ => tokenizer,
        };
        let kept = artefact.files().filter(|(name, _)| KEPT.contains(name));
        let folder = HfFolder::bundled(path, kept.map(|(name, bytes)| (name.to_owned(), bytes.to_vec())));
        let weights = Box::new(BytesWeightLoader::from_typed::<&str, Vec<usize>, &[u8]>([])?);
        let pipeline = Self::adopted(&backend, compiled, path.as_os_str().as_encoded_bytes())?;
        let model = Model::assemble(folder, weights, backend, built, pipeline, tokenizer, stop);
        Ok(model.with_artefact(artefact))
    }
}

type Facts = (Built, Vec<u32>, u64, bool);

fn read_facts(from: &mut WireReader<'_>, graph: &Graph) -> std::result::Result<Facts, WireError> {
    let (graph, unused) = (graph.clone(), Vec::new());
    let built = match from.u8()? {
        0 => Built::Decoder(Decoder { graph, info: read_decoder(from)?, unused }),
        1 => Built::Encoder(Encoder { graph, info: read_encoder(from)?, unused }),
        _ => return Err(from.fault("an unknown kind of model")),
    };
    let stop = (0..from.count(4)?).map(|_| from.u32()).collect::<std::result::Result<_, _>>()?;
    let (limit, lower) = (from.u64()?, from.u8()? != 0);
    from.end()?;
    Ok((built, stop, limit, lower))
}

fn write_decoder(out: &mut WireWriter, info: &DecoderInfo) {
    out.text(&info.model_type);
    for size in [info.vocab, info.layers, info.kv_heads, info.head_dim, info.max_positions] {
        out.u64(size as u64);
    }
    out.u64(info.full_layers as u64).u64(info.window.unwrap_or(0) as u64);
    out.text(&info.cache_dtype.to_string()).u8(u8::from(info.rope.is_some()));
    if let Some(rope) = &info.rope {
        rope.write(out);
    }
}

fn read_decoder(from: &mut WireReader<'_>) -> std::result::Result<DecoderInfo, WireError> {
    let model_type = from.text()?.to_owned();
    let [vocab, layers, kv_heads, head_dim, max_positions] = sizes(from)?;
    let (full_layers, window) = (from.size()?, Some(from.size()?).filter(|&positions| positions > 0));
    let cache_dtype = from.text()?.parse::<DType>().map_err(|_| from.fault("an unknown dtype"))?;
    let rope = if from.u8()? != 0 { Some(Rope::read_back(from)?) } else { None };
    Ok(DecoderInfo {
        model_type,
        vocab,
        layers,
        kv_heads,
        head_dim,
        max_positions,
        cache_dtype,
        full_layers,
        window,
        rope,
    })
}

fn write_encoder(out: &mut WireWriter, info: &EncoderInfo) {
    out.text(&info.model_type);
    for size in [info.vocab, info.width, info.embedding_dim, info.first_position, info.max_tokens] {
        out.u64(size as u64);
    }
    out.u8(u8::from(info.pooling_assumed));
}

fn read_encoder(from: &mut WireReader<'_>) -> std::result::Result<EncoderInfo, WireError> {
    let model_type = from.text()?.to_owned();
    let [vocab, width, embedding_dim, first_position, max_tokens] = sizes(from)?;
    let pooling_assumed = from.u8()? != 0;
    Ok(EncoderInfo { model_type, vocab, width, embedding_dim, first_position, max_tokens, pooling_assumed })
}

/// Sizes that no model exceeds, so that sums of them cannot overflow.
fn sizes<const N: usize>(from: &mut WireReader<'_>) -> std::result::Result<[usize; N], WireError> {
    let mut sizes = [0; N];
    for size in &mut sizes {
        *size = from.size()?;
        if *size as u64 > 1 << 40 {
            return Err(from.fault("a size is out of range"));
        }
    }
    Ok(sizes)
}

impl From<AotCacheError> for ModelError {
    fn from(error: AotCacheError) -> Self {
        ModelError::Session(error.into())
    }
}
