//! A model folder as a GGUF file: metadata from its config and tokenizer, tensors converted piece by piece.

mod keys;
mod source;
mod tokens;

use super::names::gguf_name;
use crate::arch::{BuildOptions, Built, build_folder};
use crate::error::{ModelError, Result};
use rlx::import::ImportError;
use rlx::import::gguf::{DEFAULT_ALIGNMENT, TensorEntry, encode_header};
use rlx::import::hf::HfFolder;
use rlx::weights::WeightLoader;
use rlx_tensor::{DType, quant};
use source::{Source, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Values converted at a time.
const CHUNK_VALUES: usize = 1 << 18;

/// Key of our own, which others do not read: the length at which sentence-transformers cuts texts.
pub(super) const LONGEST_TEXT: &str = "max_sequence_length";

/// What a file's matrices are stored as. The mixes take more bits where they help most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// As users write it.
    pub name: &'static str,
    /// Most matrices.
    pub plain: DType,
    /// The head, or an embedding that is also the head.
    pub head: DType,
    /// Values and the way down, in layers at both ends and every third between.
    pub important: DType,
    /// `general.file_type`.
    pub file_type: u32,
}

const fn scheme(name: &'static str, plain: DType, head: DType, important: DType, file_type: u32) -> Scheme {
    Scheme { name, plain, head, important, file_type }
}

/// Every scheme.
pub const SCHEMES: &[Scheme] = &[
    scheme("F32", DType::F32, DType::F32, DType::F32, 0),
    scheme("F16", DType::F16, DType::F16, DType::F16, 1),
    scheme("BF16", DType::BF16, DType::BF16, DType::BF16, 32),
    scheme("Q8_0", DType::Q8_0, DType::Q8_0, DType::Q8_0, 7),
    scheme("Q4_0", DType::Q4_0, DType::Q6_K, DType::Q4_0, 2),
    scheme("Q4_K_M", DType::Q4_K, DType::Q6_K, DType::Q6_K, 15),
    scheme("Q5_K_M", DType::Q5_K, DType::Q6_K, DType::Q6_K, 17),
    scheme("Q6_K", DType::Q6_K, DType::Q6_K, DType::Q6_K, 18),
];

impl Scheme {
    /// The scheme of this name, whatever its case.
    pub fn named(name: &str) -> Option<Scheme> {
        SCHEMES.iter().find(|scheme| scheme.name.eq_ignore_ascii_case(name)).copied()
    }

    /// The type of a tensor.
    fn dtype(&self, name: &str, dims: &[usize], layers: usize, tied: bool) -> DType {
        let router = name.contains(".ffn_gate_inp");
        let table = name.starts_with("position_embd") || name.starts_with("token_types");
        if dims.len() < 2 || router || table || name.starts_with("rope_") {
            return DType::F32;
        }
        let head = name == "output.weight" || (tied && name == "token_embd.weight");
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        let more = |layer: usize| {
            let eighth = layers / 8;
            layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
        };
        let helps = [".attn_v.", ".ffn_down.", ".ffn_down_exps."].iter().any(|part| name.contains(part));
        let wanted = match layer {
            _ if head => self.head,
            Some(layer) if helps && more(layer) => self.important,
            _ => self.plain,
        };
        fitting(wanted, dims.last().copied().unwrap_or(0))
    }
}

/// The type itself, or for rows that are no whole blocks of it the nearest of smaller blocks that has at least its bits.
fn fitting(wanted: DType, row: usize) -> DType {
    let smaller = match wanted {
        DType::Q4_K => DType::Q5_0,
        DType::Q5_K => DType::Q5_1,
        DType::Q6_K => DType::Q8_0,
        _ => DType::F16,
    };
    if row.is_multiple_of(wanted.block().0) {
        wanted
    } else if row.is_multiple_of(smaller.block().0) {
        smaller
    } else {
        DType::F16
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Size of the file.
    pub bytes: u64,
    /// Number of tensors of each type.
    pub types: BTreeMap<&'static str, usize>,
    /// Tensors of the checkpoint that the model does not use, and that were left out.
    pub unused: Vec<String>,
}

/// Writes a folder's model to `path`, which appears only when it is complete. `progress` is told how many bytes of how many are
/// written. Memory is bounded by a piece of a tensor, whatever the model's size.
///
/// # Errors
/// Those of opening the folder; a config or a tokenizer that the format has no keys for; a weight that is not finite, or that the
/// wanted type cannot hold; of the file system.
pub fn export(
    folder: &HfFolder,
    path: &Path,
    scheme: Scheme,
    mut progress: impl FnMut(u64, u64),
) -> Result<Exported> {
    let weights = folder.loader()?;
    let built = build_folder(folder, weights.as_ref(), &BuildOptions::default())?;
    let (mut metadata, extra) = keys::metadata(folder, &built, scheme)?;
    tokens::add(folder, vocab_of(&built), &mut metadata)?;
    let tensors = plan(folder, &built, weights.as_ref(), scheme, extra)?;
    let entries: Vec<TensorEntry> = tensors.iter().map(|tensor| tensor.entry.clone()).collect();
    let alignment = DEFAULT_ALIGNMENT as usize;
    let header = encode_header(&metadata, &entries, alignment).ok_or_else(|| ModelError::Tokenizer {
        path: path.to_path_buf(),
        reason: "the tensors' sizes overflow".to_owned(),
    })?;
    let data: u64 =
        entries.iter().filter_map(TensorEntry::bytes).map(|b| b.next_multiple_of(alignment) as u64).sum();
    let total = header.len() as u64 + data;
    let partial = Partial::create(path)?;
    let mut out = BufWriter::with_capacity(1 << 20, &partial.file);
    let io_error = |source| ModelError::Import(ImportError::Io { path: partial.path.clone(), source });
    out.write_all(&header).map_err(io_error)?;
    let mut written = header.len() as u64;
    for tensor in &tensors {
        let mut failed = None;
        let bytes = tensor.write(weights.as_ref(), CHUNK_VALUES, |bytes| {
            written += bytes.len() as u64;
            progress(written, total);
            out.write_all(bytes).map_err(|error| failed = Some(error)).is_ok()
        })?;
        if let Some(source) = failed {
            return Err(io_error(source));
        }
        let padding = bytes.next_multiple_of(alignment) - bytes;
        out.write_all(&vec![0; padding]).map_err(io_error)?;
        written += padding as u64;
    }
    out.flush().map_err(io_error)?;
    drop(out);
    partial.finish(path)?;
    let mut types = BTreeMap::new();
    for entry in &entries {
        *types.entry(entry.dtype.name()).or_insert(0) += 1;
    }
    Ok(Exported { bytes: total, types, unused: built.unused().to_vec() })
}

/// Bytes of the tensors in a file that [`export`] would write, from headers only.
///
/// # Errors
/// As [`export`], but for those of writing.
pub fn exported_bytes(folder: &HfFolder, scheme: Scheme) -> Result<u64> {
    let weights = folder.loader()?;
    let built = build_folder(folder, weights.as_ref(), &BuildOptions::default())?;
    let (_, extra) = keys::metadata(folder, &built, scheme)?;
    let tensors = plan(folder, &built, weights.as_ref(), scheme, extra)?;
    Ok(tensors.iter().filter_map(|tensor| tensor.entry.bytes()).map(|bytes| bytes as u64).sum())
}

fn vocab_of(built: &Built) -> usize {
    match built {
        Built::Decoder(model) => model.info.vocab,
        Built::Encoder(model) => model.info.vocab,
    }
}

/// The tensors to write, in the order of the graph's params, experts of a layer together.
fn plan(
    folder: &HfFolder,
    built: &Built,
    weights: &dyn WeightLoader,
    scheme: Scheme,
    extra: Vec<(String, Vec<f32>)>,
) -> Result<Vec<Tensor>> {
    let model_type = keys::model_type(built);
    let config = folder.config()?;
    let mut tensors: Vec<Tensor> = Vec::new();
    let (scaled, factor) = keys::query_factor(built, &config)?;
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for (_, param) in built.graph().params() {
        let Some(name) = &param.name else { continue };
        let canonical = keys::canonical(model_type, name);
        let (gguf, expert) = gguf_name(model_type, &canonical)
            .ok_or_else(|| keys::no_place(folder, "tensors", format!("`{name}`")))?;
        let shape = weights.shape(name)?.and_then(|shape| shape.known_dims()).unwrap_or_default();
        let mut source = Source::of(model_type, &config, &canonical, name, &shape)?;
        if !scaled.is_empty() && canonical.ends_with(scaled) {
            source.factor = factor;
        }
        match (places.get(&gguf), expert) {
            (Some(&at), Some(_)) => tensors[at].sources.push(source),
            _ => {
                places.insert(gguf.clone(), tensors.len());
                tensors.push(Tensor::new(gguf, source, expert.is_some()));
            }
        }
    }
    let layers = tensors.iter().filter(|tensor| tensor.entry.name.ends_with("attn_output.weight")).count();
    let tied = !places.contains_key("output.weight");
    for tensor in &mut tensors {
        tensor.settle(|name, dims| scheme.dtype(name, dims, layers, tied))?;
    }
    tensors.extend(extra.into_iter().map(|(name, values)| Tensor::of_values(name, values)));
    Ok(tensors)
}

/// A file beside the wanted one, removed unless it is finished.
struct Partial {
    path: PathBuf,
    file: File,
    finished: bool,
}

impl Partial {
    fn create(wanted: &Path) -> Result<Self> {
        let name = wanted.file_name().unwrap_or_default().to_string_lossy();
        let path = wanted.with_file_name(format!(".{name}.{}.partial", std::process::id()));
        let made = File::options().write(true).create_new(true).open(&path);
        let file = made.map_err(|source| ImportError::Io { path: path.clone(), source })?;
        Ok(Partial { path, file, finished: false })
    }

    fn finish(mut self, wanted: &Path) -> Result<()> {
        let moved = self.file.sync_all().and_then(|()| std::fs::rename(&self.path, wanted));
        moved.map_err(|source| ImportError::Io { path: wanted.to_path_buf(), source })?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing more can be done about a file that cannot be removed.
            let _: io::Result<()> = std::fs::remove_file(&self.path);
        }
    }
}

/// Beyond this, an f16 that stands for a value or scales a block may overflow.
const LARGEST_SURE: f32 = 65_504.0;

/// Encodes values, which have to be finite and have to stay so.
fn encode(name: &str, dtype: DType, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    if let Some(found) = values.iter().find(|value| !value.is_finite()) {
        return Err(ModelError::WeightValue { name: name.to_owned(), found: *found });
    }
    let bytes = dtype.bytes_for(values.len()).unwrap_or(0);
    out.resize(bytes, 0);
    quant::encode(dtype, values, out)?;
    if values.iter().any(|value| value.abs() > LARGEST_SURE) {
        let mut stored = vec![0.0; values.len()];
        quant::decode(dtype, out, &mut stored)?;
        if let Some(at) = stored.iter().position(|value| !value.is_finite()) {
            // Of a block that is lost as a whole, the value that is to blame.
            let block = at / dtype.block().0 * dtype.block().0;
            let of_block = values[block..].iter().take(dtype.block().0);
            let found =
                of_block.fold(0.0f32, |most, &value| if value.abs() > most.abs() { value } else { most });
            return Err(ModelError::WeightRange { name: name.to_owned(), found, dtype });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row of small values but for one.
    fn with(value: f32) -> Vec<f32> {
        (0..256).map(|i| if i == 137 { value } else { 0.01 * i as f32 }).collect()
    }

    #[test]
    fn a_value_that_a_type_cannot_hold_is_refused_with_its_tensor_and_the_type() {
        let refused = [
            (DType::F16, 70_000.0),
            (DType::Q8_0, 1e7),
            (DType::Q4_0, -1e6),
            (DType::Q6_K, 1e9),
            (DType::Q4_K, 1e9),
            (DType::Q5_1, 3e6),
        ];
        for (dtype, value) in refused {
            let error = encode("layers.3.w", dtype, &with(value), &mut Vec::new()).unwrap_err();
            assert!(
                matches!(&error, ModelError::WeightRange { name, found, .. } if name == "layers.3.w" && *found == value),
                "{dtype}: {error}"
            );
            assert!(error.to_string().contains(dtype.name()), "{error}");
        }
        for (dtype, value) in
            [(DType::F32, 1e30), (DType::BF16, -1e30), (DType::Q8_0, 1e6), (DType::Q4_0, 4e5)]
        {
            encode("w", dtype, &with(value), &mut Vec::new()).unwrap();
        }
        for value in [f32::NAN, f32::INFINITY] {
            let error = encode("w", DType::F32, &with(value), &mut Vec::new()).unwrap_err();
            assert!(matches!(error, ModelError::WeightValue { .. }), "{error}");
        }
    }
}
