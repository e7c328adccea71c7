//! Safetensors: an 8-byte little-endian header length, a JSON header, and the tensors' bytes without gaps.
//! The format is described at <https://github.com/huggingface/safetensors#format>.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rlx_tensor::DType;
use rlx_tensor::storage::mapped::{MapError, MappedFile, MappedRange};

use super::ImportError;
use super::json::{Json, read_json_file};
use crate::weights::{LoadError, TensorView, WeightBytes, WeightLoader};

/// Largest header the format allows.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Largest `*.safetensors.index.json` that is read.
pub const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Name of the index in a folder of shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of the file when there is only one.
pub const SINGLE_FILE: &str = "model.safetensors";

const DTYPES: &[(&str, DType)] = &[
    ("BOOL", DType::Bool),
    ("U8", DType::U8),
    ("I8", DType::I8),
    ("F8_E5M2", DType::F8E5M2),
    ("F8_E4M3", DType::F8E4M3),
    ("I16", DType::I16),
    ("U16", DType::U16),
    ("F16", DType::F16),
    ("BF16", DType::BF16),
    ("I32", DType::I32),
    ("U32", DType::U32),
    ("F32", DType::F32),
    ("C64", DType::C64),
    ("F64", DType::F64),
    ("I64", DType::I64),
    ("U64", DType::U64),
];

/// What a header says, checked against its file.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Header {
    /// The tensors, in header order.
    pub tensors: Vec<HeaderTensor>,
    /// The free text under `__metadata__`, in file order.
    pub metadata: Vec<(String, String)>,
}

/// One tensor of a [`Header`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct HeaderTensor {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub dims: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset: usize,
    /// Length in bytes: exactly what `dims` of `dtype` need.
    pub bytes: usize,
}

/// Reads and checks the header of a whole file; the tensors' bytes are not touched. Allocates in proportion to
/// the header that is really there, never to a number in it.
///
/// # Errors
/// [`LoadError`] naming `file`, the tensor and the offset: bad length, bad JSON, unknown dtype, a name twice,
/// sizes that overflow or do not match, ranges that leave the file or overlap, and (as the format rules) gaps.
pub fn parse_header(file: &Path, bytes: &[u8]) -> Result<Header, LoadError> {
    let json_bytes = header_bytes(file, bytes)?;
    let data_start = 8 + json_bytes.len();
    let fault = |offset: usize, expected: &str, found: String| LoadError::Header {
        file: file.to_path_buf(),
        offset: offset as u64,
        expected: expected.to_owned(),
        found,
    };
    if json_bytes.first() != Some(&b'{') {
        let found = json_bytes.first().map_or("nothing".to_owned(), |byte| format!("byte {byte:#04x}"));
        return Err(fault(8, "a JSON object, `{`", found));
    }
    let json = Json::parse(json_bytes).map_err(|json_fault| {
        match json_fault.message.strip_prefix("duplicate key `") {
            Some(name) => LoadError::Duplicate {
                file: file.to_path_buf(),
                tensor: name.trim_end_matches('`').to_owned(),
            },
            None => fault(8 + json_fault.offset, "JSON", json_fault.message),
        }
    })?;
    let Json::Object(fields) = json else {
        return Err(fault(8, "a JSON object", json.kind().to_owned()));
    };
    let mut header = Header { tensors: Vec::with_capacity(fields.len()), metadata: Vec::new() };
    for (name, value) in fields {
        if name == "__metadata__" {
            header.metadata = metadata(file, value)?;
        } else {
            header.tensors.push(entry(file, bytes.len(), data_start, name, &value)?);
        }
    }
    check_cover(file, data_start, bytes.len(), &header.tensors)?;
    Ok(header)
}

fn header_bytes<'a>(file: &Path, bytes: &'a [u8]) -> Result<&'a [u8], LoadError> {
    let fault = |expected: String, found: String| LoadError::Header {
        file: file.to_path_buf(),
        offset: 0,
        expected,
        found,
    };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(fault("8 bytes of header length".to_owned(), format!("a file of {} bytes", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(fault(
            format!("a header of at most {MAX_HEADER_BYTES} bytes"),
            format!("{length} bytes"),
        ));
    }
    usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or_else(|| {
        let expected = format!("a header of at most {} bytes, which is what the file holds", rest.len());
        fault(expected, format!("{length} bytes; the file may be truncated, fetch it again"))
    })
}

fn metadata(file: &Path, value: Json) -> Result<Vec<(String, String)>, LoadError> {
    let wrong = |found: &Json| LoadError::Entry {
        file: file.to_path_buf(),
        tensor: "__metadata__".to_owned(),
        expected: "an object of strings".to_owned(),
        found: found.brief(60),
    };
    let Json::Object(fields) = value else { return Err(wrong(&value)) };
    fields
        .into_iter()
        .map(|(name, value)| match value {
            Json::String(text) => Ok((name, text)),
            other => Err(wrong(&other)),
        })
        .collect()
}

fn entry(
    file: &Path,
    file_bytes: usize,
    data_start: usize,
    name: String,
    value: &Json,
) -> Result<HeaderTensor, LoadError> {
    let wrong = |expected: &str, found: String| LoadError::Entry {
        file: file.to_path_buf(),
        tensor: name.clone(),
        expected: expected.to_owned(),
        found,
    };
    let Json::Object(fields) = value else {
        return Err(wrong("an object with dtype, shape and data_offsets", value.brief(60)));
    };
    if let Some((extra, _)) =
        fields.iter().find(|(key, _)| !["dtype", "shape", "data_offsets"].contains(&key.as_str()))
    {
        return Err(wrong("only dtype, shape and data_offsets", format!("`{extra}`")));
    }
    let describe = |value: Option<&Json>| value.map_or("nothing".to_owned(), |value| value.brief(60));
    let offsets = value.field("data_offsets");
    let Some([begin, end]) = offsets.and_then(numbers).and_then(|pair| <[u64; 2]>::try_from(pair).ok())
    else {
        return Err(wrong("data_offsets [begin, end]", describe(offsets)));
    };
    let Some(found_bytes) = end.checked_sub(begin) else {
        return Err(wrong("data_offsets with begin <= end", describe(offsets)));
    };
    let (offset, end) = (begin.saturating_add(data_start as u64), end.saturating_add(data_start as u64));
    let dtype = match value.field("dtype") {
        Some(Json::String(text)) => match DTYPES.iter().find(|(spelled, _)| spelled == text) {
            Some((_, dtype)) => *dtype,
            None => {
                let known: Vec<&str> = DTYPES.iter().map(|(spelled, _)| *spelled).collect();
                return Err(LoadError::UnknownDType {
                    file: file.to_path_buf(),
                    tensor: name,
                    offset,
                    expected: known.join(", "),
                    found: Json::String(text.clone()).brief(40).trim_matches('"').to_owned(),
                });
            }
        },
        other => return Err(wrong("a dtype", describe(other))),
    };
    let shape = value.field("shape");
    let dims: Option<Vec<usize>> = shape
        .and_then(numbers)
        .and_then(|dims| dims.into_iter().map(|dim| usize::try_from(dim).ok()).collect());
    let Some(dims) = dims else {
        return Err(wrong("a shape, an array of whole numbers below 2^64", describe(shape)));
    };
    crate::weights::check_length(file, &name, offset, dtype, &dims, found_bytes)?;
    if end > file_bytes as u64 {
        return Err(LoadError::OutOfFile {
            file: file.to_path_buf(),
            tensor: name,
            offset,
            end,
            file_bytes: file_bytes as u64,
        });
    }
    // Both are at most `file_bytes`, a usize.
    Ok(HeaderTensor { name, dtype, dims, offset: offset as usize, bytes: found_bytes as usize })
}

fn numbers(value: &Json) -> Option<Vec<u64>> {
    match value {
        Json::Array(values) => values
            .iter()
            .map(|value| match value {
                Json::Number(number) => number.as_u64(),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}

fn check_cover(
    file: &Path,
    data_start: usize,
    file_bytes: usize,
    tensors: &[HeaderTensor],
) -> Result<(), LoadError> {
    let mut order: Vec<&HeaderTensor> = tensors.iter().collect();
    order.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    let mut covered = data_start;
    let mut before = "";
    for tensor in order {
        if tensor.offset < covered {
            return Err(LoadError::Overlap {
                file: file.to_path_buf(),
                tensor: tensor.name.clone(),
                offset: tensor.offset as u64,
                other: before.to_owned(),
                other_end: covered as u64,
            });
        }
        check_gap(file, covered, tensor.offset)?;
        covered = tensor.offset + tensor.bytes;
        before = &tensor.name;
    }
    check_gap(file, covered, file_bytes)
}

fn check_gap(file: &Path, covered: usize, next: usize) -> Result<(), LoadError> {
    if next > covered {
        let (offset, bytes) = (covered as u64, (next - covered) as u64);
        return Err(LoadError::Gap { file: file.to_path_buf(), offset, bytes });
    }
    Ok(())
}

/// Safetensors in mapped files: one, or the shards of an index.
#[derive(Debug)]
pub struct SafetensorsLoader {
    tensors: crate::weights::NameTable<MappedTensor>,
    files: Vec<Arc<MappedFile>>,
    metadata: Vec<(String, String)>,
    unlisted: Vec<String>,
}

#[derive(Debug)]
struct MappedTensor {
    dtype: DType,
    dims: Vec<usize>,
    range: MappedRange,
}

impl SafetensorsLoader {
    /// Opens one `.safetensors` file, an index (`*.index.json`), or a folder that holds one or the other.
    ///
    /// # Errors
    /// [`ImportError::Load`] for the first fault found, [`ImportError::MissingFile`] for a folder without weights.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImportError> {
        let path = path.as_ref();
        if path.is_dir() {
            return Self::open_folder(path);
        }
        refuse_pickle(path)?;
        if path.extension().is_some_and(|extension| extension == "json") {
            return Self::open_index(path);
        }
        let mut loader = Self::empty();
        loader.add_file(path, |_| true)?;
        Ok(loader)
    }

    fn empty() -> Self {
        SafetensorsLoader {
            tensors: crate::weights::NameTable::new(),
            files: Vec::new(),
            metadata: Vec::new(),
            unlisted: Vec::new(),
        }
    }

    fn open_folder(folder: &Path) -> Result<Self, ImportError> {
        for name in [SINGLE_FILE, INDEX_FILE] {
            let path = folder.join(name);
            if path.is_file() {
                return Self::open(path);
            }
        }
        for name in ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth"] {
            if folder.join(name).is_file() {
                return Err(LoadError::Pickle { file: folder.join(name) }.into());
            }
        }
        Err(ImportError::MissingFile {
            path: folder.join(SINGLE_FILE),
            advice: format!("expected it, or {INDEX_FILE} and its shards"),
        })
    }

    fn open_index(index: &Path) -> Result<Self, ImportError> {
        let by_shard = read_index(index)?;
        let folder = index.parent().unwrap_or(Path::new(""));
        let mut loader = Self::empty();
        for (shard, names) in &by_shard {
            let path = folder.join(shard);
            if !path.is_file() {
                return Err(LoadError::MissingShard {
                    index: index.to_path_buf(),
                    shard: shard.clone(),
                    tensor: names.first().cloned().unwrap_or_default(),
                }
                .into());
            }
            let listed: std::collections::HashSet<&str> = names.iter().map(String::as_str).collect();
            loader.add_file(&path, |name| listed.contains(name))?;
            if let Some(absent) = names.iter().find(|name| loader.tensors.find(name).is_none()) {
                return Err(LoadError::NotInShard {
                    index: index.to_path_buf(),
                    shard: shard.clone(),
                    tensor: absent.clone(),
                }
                .into());
            }
        }
        Ok(loader)
    }

    fn add_file(&mut self, path: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), LoadError> {
        let file = MappedFile::open(path)?;
        let header = parse_header(path, file.bytes())?;
        self.metadata.extend(header.metadata);
        for HeaderTensor { name, dtype, dims, offset, bytes } in header.tensors {
            if !wanted(&name) {
                self.unlisted.push(name);
                continue;
            }
            let range = file.range(offset, bytes)?;
            if !self.tensors.insert(&name, MappedTensor { dtype, dims, range }) {
                return Err(LoadError::Duplicate { file: path.to_path_buf(), tensor: name });
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// The mapped files, in the order their tensors are listed.
    pub fn files(&self) -> &[Arc<MappedFile>] {
        &self.files
    }

    /// The free text under `__metadata__` of all files.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// Tensors that a shard holds and the index does not list there; they cannot be looked up.
    pub fn unlisted(&self) -> &[String] {
        &self.unlisted
    }

    /// Checks every file as CORE asks before a run.
    ///
    /// # Errors
    /// [`MapError::Shrank`], [`MapError::Changed`].
    pub fn still_valid(&self) -> Result<(), MapError> {
        self.files.iter().try_for_each(|file| file.still_valid())
    }
}

impl WeightLoader for SafetensorsLoader {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>, LoadError> {
        let Some((name, tensor)) = self.tensors.find(name) else { return Ok(None) };
        tensor.range.still_valid()?;
        Ok(Some(TensorView { name, dtype: tensor.dtype, dims: &tensor.dims, bytes: tensor.range.bytes() }))
    }

    fn storage(&self, name: &str) -> Result<Option<WeightBytes>, LoadError> {
        Ok(self.tensors.find(name).map(|(_, tensor)| WeightBytes::Mapped(tensor.range.clone())))
    }

    fn names(&self) -> Box<dyn ExactSizeIterator<Item = &str> + '_> {
        Box::new(self.tensors.names())
    }
}

/// Shard -> the tensors that the index places there, shards sorted by name.
fn read_index(index: &Path) -> Result<BTreeMap<String, Vec<String>>, ImportError> {
    let json = read_json_file(index, MAX_INDEX_BYTES)?;
    let field = |field: String, expected: &str, found: String| ImportError::Field {
        path: index.to_path_buf(),
        field,
        expected: expected.to_owned(),
        found,
    };
    let Some(Json::Object(weight_map)) = json.field("weight_map") else {
        let found = json.field("weight_map").map_or("nothing", Json::kind);
        return Err(field("weight_map".to_owned(), "an object from tensor to shard", found.to_owned()));
    };
    let mut by_shard: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let named = match shard {
            Json::String(shard) if is_plain_name(shard) => shard,
            other => {
                let expected = "the name of a .safetensors file in the same folder";
                return Err(field(format!("weight_map.{tensor}"), expected, other.brief(80)));
            }
        };
        by_shard.entry(named.clone()).or_default().push(tensor.clone());
    }
    Ok(by_shard)
}

fn is_plain_name(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0']) && name != ".." && !name.contains(':')
}

/// Refuses a checkpoint that only a pickle reader could open.
///
/// # Errors
/// [`LoadError::Pickle`].
pub fn refuse_pickle(path: &Path) -> Result<(), LoadError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
    let pickled = [".pt", ".pth", ".ckpt", ".pkl", ".pickle"].iter().any(|end| name.ends_with(end))
        || (name.starts_with("pytorch_model") && name.ends_with(".bin"))
        || name.ends_with("adapter_model.bin");
    if pickled { Err(LoadError::Pickle { file: PathBuf::from(path) }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
