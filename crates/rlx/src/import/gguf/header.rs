//! What comes before the tensors' bytes, checked against the file.

use std::collections::HashSet;
use std::path::Path;

use rlx_tensor::DType;

use super::DEFAULT_ALIGNMENT;
use super::cursor::Cursor;
use super::metadata::{self, Metadata};
use crate::weights::LoadError;

/// First bytes of every file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// Longest tensor name.
const MAX_NAME_BYTES: usize = 1024;
/// Most dims of a tensor.
const MAX_DIMS: usize = 4;
/// Bytes of the shortest key with its value: lengths and types, an empty key, one byte.
const LEAST_ENTRY_BYTES: usize = 13;
/// Bytes of the shortest tensor entry: an empty name, no dims, type, offset.
const LEAST_TENSOR_BYTES: usize = 24;

/// The numbers of tensor types in files. Types with other numbers are withdrawn, or of activations only.
pub const TENSOR_TYPES: &[(u32, DType)] = &[
    (0, DType::F32),
    (1, DType::F16),
    (2, DType::Q4_0),
    (3, DType::Q4_1),
    (6, DType::Q5_0),
    (7, DType::Q5_1),
    (8, DType::Q8_0),
    (10, DType::Q2_K),
    (11, DType::Q3_K),
    (12, DType::Q4_K),
    (13, DType::Q5_K),
    (14, DType::Q6_K),
    (16, DType::IQ2_XXS),
    (17, DType::IQ2_XS),
    (18, DType::IQ3_XXS),
    (19, DType::IQ1_S),
    (20, DType::IQ4_NL),
    (21, DType::IQ3_S),
    (22, DType::IQ2_S),
    (23, DType::IQ4_XS),
    (24, DType::I8),
    (25, DType::I16),
    (26, DType::I32),
    (27, DType::I64),
    (28, DType::F64),
    (29, DType::IQ1_M),
    (30, DType::BF16),
    (39, DType::MXFP4),
];

/// The number of a tensor type in files.
pub fn tensor_type_code(dtype: DType) -> Option<u32> {
    TENSOR_TYPES.iter().find(|(_, known)| *known == dtype).map(|(code, _)| *code)
}

/// What a file says before its tensors' bytes.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Header {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Keys and values.
    pub metadata: Metadata,
    /// The tensors, in file order.
    pub tensors: Vec<HeaderTensor>,
    /// Tensors start at multiples of this from [`Header::data_start`]: a power of two.
    pub alignment: usize,
    /// Where the tensors' bytes begin, from the start of the file.
    pub data_start: usize,
}

/// One tensor of a [`Header`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct HeaderTensor {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first (files have them the other way round).
    pub dims: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset: usize,
    /// Length in bytes: exactly what `dims` of `dtype` need.
    pub bytes: usize,
}

/// Reads and checks everything before the tensors' bytes, which are not touched. Allocates in proportion to the bytes that are
/// really there, never to a number in them.
///
/// # Errors
/// [`LoadError`] naming `file`, the tensor and the offset: another magic, version or byte order; counts beyond the file; broken
/// strings; unknown types; keys or names twice; arrays of arrays; a bad alignment; rows that are no whole blocks; sizes that
/// overflow; ranges that are misaligned, overlap or leave the file.
pub fn parse_header(file: &Path, bytes: &[u8]) -> Result<Header, LoadError> {
    let mut cursor = Cursor::new(file, bytes);
    let magic = cursor.array::<4>("magic")?;
    if magic != MAGIC {
        return Err(cursor.fault(0, "`GGUF`", format!("bytes {magic:02x?}")));
    }
    let version = version(&mut cursor)?;
    let tensor_count = cursor.count(LEAST_TENSOR_BYTES, "tensor count")?;
    let entry_count = cursor.count(LEAST_ENTRY_BYTES, "metadata count")?;
    let metadata = metadata::read(&mut cursor, entry_count, file)?;
    let alignment = alignment(&cursor, &metadata)?;
    let mut entries = Vec::new();
    for _ in 0..tensor_count {
        entries.push(entry(&mut cursor, file)?);
    }
    let data_start = cursor.at().checked_next_multiple_of(alignment);
    let data_start =
        data_start.ok_or_else(|| cursor.fault(cursor.at(), "room for tensors", "an overflow"))?;
    let mut tensors = Vec::with_capacity(entries.len());
    let mut names = HashSet::new();
    for entry in entries {
        if !names.insert(entry.name.clone()) {
            return Err(LoadError::Duplicate { file: file.to_path_buf(), tensor: entry.name });
        }
        tensors.push(placed(file, entry, data_start, alignment, bytes.len())?);
    }
    check_overlap(file, &tensors)?;
    Ok(Header { version, metadata, tensors, alignment, data_start })
}

fn version(cursor: &mut Cursor<'_>) -> Result<u32, LoadError> {
    let at = cursor.at();
    let version = cursor.u32("version")?;
    match version {
        2 | 3 => Ok(version),
        _ if matches!(version.swap_bytes(), 1..=3) => Err(cursor.fault(at, "little-endian", "big-endian")),
        _ => Err(cursor.fault(at, "version 2 or 3", version.to_string())),
    }
}

fn alignment(cursor: &Cursor<'_>, metadata: &Metadata) -> Result<usize, LoadError> {
    let key = "general.alignment";
    let expected = "a power of two from 8 to 65536";
    let found = match metadata.value(key) {
        None => return Ok(DEFAULT_ALIGNMENT as usize),
        Some(value) => match value.as_u64() {
            Some(n) if n.is_power_of_two() && (8..=65_536).contains(&n) => return Ok(n as usize),
            _ => value.kind(),
        },
    };
    Err(cursor.fault(0, format!("{key}: {expected}"), found))
}

struct Entry {
    name: String,
    dtype: DType,
    dims: Vec<usize>,
    offset: u64,
}

fn entry(cursor: &mut Cursor<'_>, file: &Path) -> Result<Entry, LoadError> {
    let name = cursor.string(MAX_NAME_BYTES, "a tensor's name")?.to_owned();
    let wrong = |expected: String, found: String| LoadError::Entry {
        file: file.to_path_buf(),
        tensor: name.clone(),
        expected,
        found,
    };
    let rank = cursor.u32("number of dims")?;
    let rank = usize::try_from(rank)
        .ok()
        .filter(|&rank| rank <= MAX_DIMS)
        .ok_or_else(|| wrong(format!("at most {MAX_DIMS} dims"), rank.to_string()))?;
    let mut dims = Vec::with_capacity(rank);
    for _ in 0..rank {
        let dim = cursor.u64("a dim")?;
        let dim = i64::try_from(dim).ok().and_then(|dim| usize::try_from(dim).ok());
        dims.push(dim.ok_or_else(|| wrong("dims below 2^63".to_owned(), "a larger one".to_owned()))?);
    }
    dims.reverse();
    let code = cursor.u32("type of a tensor")?;
    let offset = cursor.u64("offset of a tensor")?;
    let Some((_, dtype)) = TENSOR_TYPES.iter().find(|(known, _)| *known == code) else {
        let known: Vec<String> =
            TENSOR_TYPES.iter().map(|(code, dtype)| format!("{dtype} ({code})")).collect();
        return Err(LoadError::UnknownDType {
            file: file.to_path_buf(),
            tensor: name,
            offset,
            expected: known.join(", "),
            found: code.to_string(),
        });
    };
    let (per_block, _) = dtype.block();
    let row = dims.last().copied().unwrap_or(1);
    if row.checked_rem(per_block) != Some(0) {
        return Err(wrong(
            format!("rows of whole blocks of {per_block} for {dtype}"),
            format!("{row} elements"),
        ));
    }
    Ok(Entry { name, dtype: *dtype, dims, offset })
}

fn placed(
    file: &Path,
    entry: Entry,
    data_start: usize,
    alignment: usize,
    file_bytes: usize,
) -> Result<HeaderTensor, LoadError> {
    let Entry { name, dtype, dims, offset: relative } = entry;
    if relative.checked_rem(alignment as u64) != Some(0) {
        return Err(LoadError::Entry {
            file: file.to_path_buf(),
            tensor: name,
            expected: format!("an offset that is a multiple of {alignment}"),
            found: relative.to_string(),
        });
    }
    let offset = relative.saturating_add(data_start as u64);
    let Some(bytes) = rlx_tensor::byte_count(&dims, dtype) else {
        return Err(LoadError::Size { file: file.to_path_buf(), tensor: name, offset, dtype, dims });
    };
    let end = offset.saturating_add(bytes as u64);
    let offset_in_file = usize::try_from(offset).ok().filter(|_| end <= file_bytes as u64);
    match offset_in_file {
        Some(offset) => Ok(HeaderTensor { name, dtype, dims, offset, bytes }),
        None => Err(LoadError::OutOfFile {
            file: file.to_path_buf(),
            tensor: name,
            offset,
            end,
            file_bytes: file_bytes as u64,
        }),
    }
}

fn check_overlap(file: &Path, tensors: &[HeaderTensor]) -> Result<(), LoadError> {
    let mut order: Vec<&HeaderTensor> = tensors.iter().filter(|tensor| tensor.bytes > 0).collect();
    order.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    let mut before: Option<(&HeaderTensor, usize)> = None;
    for tensor in order {
        if let Some((other, end)) = before.filter(|(_, end)| tensor.offset < *end) {
            return Err(LoadError::Overlap {
                file: file.to_path_buf(),
                tensor: tensor.name.clone(),
                offset: tensor.offset as u64,
                other: other.name.clone(),
                other_end: end as u64,
            });
        }
        before = Some((tensor, tensor.offset.saturating_add(tensor.bytes)));
    }
    Ok(())
}
