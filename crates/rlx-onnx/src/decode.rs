//! Tensors of a file: raw bytes, typed fields, external data.

use crate::coding::Coding;
use crate::error::OnnxError;
use crate::proto::{EntryProto, OptionalProto, SequenceProto, SparseTensorProto, TensorProto};
use crate::value::{CodedTensor, ElementType, StoredTensor, TextTensor, Value};
use rlx::weights::WeightBytes;
use rlx_graph::eval::{from_i64, strides, to_i64};
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::storage::mapped::{MappedFile, MappedRange};
use rlx_tensor::{DType, Tensor, element_count};
use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Where external data may be, and the files mapped so far.
#[derive(Debug, Default)]
pub struct ExternalData {
    folder: Option<PathBuf>,
    files: HashMap<PathBuf, Arc<MappedFile>>,
    model: Option<Arc<MappedFile>>,
    bytes_read: u64,
}

impl ExternalData {
    /// Data beside the model, in this folder or below.
    pub fn within(folder: &Path) -> Self {
        Self { folder: Some(folder.to_owned()), ..Self::default() }
    }

    /// The same, for a model that is decoded where it is mapped: large initialisers stay in the file.
    pub fn beside(mut self, model: &Arc<MappedFile>) -> Self {
        self.bytes_read = model.len() as u64;
        self.model = Some(Arc::clone(model));
        self
    }

    /// Bytes of the model's files that were read so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// The place in the model's file of bytes that were decoded from it.
    fn in_model(&self, bytes: &[u8]) -> Option<MappedRange> {
        let file = self.model.as_ref()?;
        let offset = (bytes.as_ptr() as usize).checked_sub(file.bytes().as_ptr() as usize)?;
        file.range(offset, bytes.len()).ok()
    }

    fn file(&mut self, location: &str) -> Result<Arc<MappedFile>, String> {
        let folder = self.folder.clone().ok_or("external data without a folder of the model")?;
        let relative = Path::new(location);
        let plain = relative.components().all(|c| matches!(c, Component::Normal(_)));
        if !plain || location.is_empty() {
            return Err(format!("location {location:?} leads out of the model's folder"));
        }
        if let Some(file) = self.files.get(relative) {
            return Ok(Arc::clone(file));
        }
        let mut path = folder;
        for part in relative.components() {
            path.push(part);
            let facts = path.symlink_metadata().map_err(|e| format!("{}: {e}", path.display()))?;
            if facts.file_type().is_symlink() {
                return Err(format!("{} is a symbolic link", path.display()));
            }
        }
        if !path.is_file() {
            return Err(format!("{} is no regular file", path.display()));
        }
        let file = MappedFile::open(&path).map_err(|e| e.to_string())?;
        self.files.insert(relative.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    fn read(&mut self, entries: &[EntryProto], expected: usize) -> Result<Vec<u8>, String> {
        self.bytes_read += expected as u64;
        Ok(self.range(entries, expected)?.bytes().to_vec())
    }

    fn range(&mut self, entries: &[EntryProto], expected: usize) -> Result<MappedRange, String> {
        let entry = |key: &str| entries.iter().find(|e| e.key == key).map(|e| e.value.as_str());
        let number = |key: &str| match entry(key) {
            None => Ok(None),
            Some(text) => text.parse::<usize>().map(Some).map_err(|_| format!("{key} {text:?} is no size")),
        };
        let location = entry("location").ok_or("external data without a location")?;
        let (offset, length) = (number("offset")?.unwrap_or(0), number("length")?.unwrap_or(expected));
        if length != expected {
            return Err(format!("external data of {length} bytes, dims and type need {expected}"));
        }
        let file = self.file(location)?;
        file.range(offset, length).map_err(|e| e.to_string())
    }
}

/// Initialisers of more bytes than this stay where they are.
const STORED_BYTES: usize = 1 << 16;
/// The value of an initialiser: a large one is held once, as the registry will hold it.
pub fn initialiser(proto: &TensorProto, external: &mut ExternalData) -> Result<Value, OnnxError> {
    let stored = stored(proto, external);
    let stored = stored.map_err(|reason| OnnxError::Tensor { name: proto.name.clone(), reason })?;
    stored.map_or_else(|| tensor(proto, external), |stored| Ok(Value::Stored(stored)))
}

fn stored(proto: &TensorProto, external: &mut ExternalData) -> Result<Option<StoredTensor>, String> {
    let Some(ElementType::Plain(dtype)) = ElementType::from_onnx(proto.data_type) else { return Ok(None) };
    let (dims, count) = sizes(&proto.dims)?;
    let needed = dtype.bytes_for(count).ok_or("too large")?;
    if needed <= STORED_BYTES {
        return Ok(None);
    }
    let content: WeightBytes = if proto.data_location == 1 {
        external.range(&proto.external_data, needed)?.into()
    } else {
        let Some(raw) = proto.raw_data.as_ref().filter(|raw| raw.len() == needed) else { return Ok(None) };
        match external.in_model(raw) {
            Some(range) => {
                external.bytes_read = external.bytes_read.saturating_sub(needed as u64);
                range.into()
            }
            None => AlignedBytes::copied_from(raw).into(),
        }
    };
    Ok(Some(StoredTensor { dtype, dims, content }))
}

/// The value of a tensor message.
pub fn tensor(proto: &TensorProto, external: &mut ExternalData) -> Result<Value, OnnxError> {
    decode(proto, external).map_err(|reason| OnnxError::Tensor { name: proto.name.clone(), reason })
}

/// Extents that are sizes, with their number of elements.
pub fn sizes(dims: &[i64]) -> Result<(Vec<usize>, usize), String> {
    let known: Option<Vec<usize>> = dims.iter().map(|&d| usize::try_from(d).ok()).collect();
    let known = known.ok_or_else(|| format!("dims {dims:?} hold a negative extent"))?;
    let count = element_count(&known).filter(|&n| n <= 1 << 40);
    Ok((known, count.ok_or_else(|| format!("dims {dims:?} are too large"))?))
}

fn decode(proto: &TensorProto, external: &mut ExternalData) -> Result<Value, String> {
    let (dims, count) = sizes(&proto.dims)?;
    let element = ElementType::from_onnx(proto.data_type)
        .ok_or_else(|| format!("element type {} is unknown", proto.data_type))?;
    match element {
        ElementType::Text => text(proto, dims, count),
        ElementType::Coded(coding) => coded(proto, coding, dims, count, external),
        ElementType::Plain(dtype) => plain(proto, dtype, &dims, count, external),
    }
}

fn text(proto: &TensorProto, dims: Vec<usize>, count: usize) -> Result<Value, String> {
    if proto.string_data.len() != count {
        return Err(format!("{} strings for dims {dims:?}", proto.string_data.len()));
    }
    let item = |bytes: &bytes::Bytes| String::from_utf8(bytes.to_vec()).map_err(|_| "a string is no UTF-8");
    let items = proto.string_data.iter().map(item).collect::<Result<Vec<_>, _>>()?;
    Ok(Value::Text(TextTensor { dims, items }))
}

fn coded(
    proto: &TensorProto,
    coding: Coding,
    dims: Vec<usize>,
    count: usize,
    external: &mut ExternalData,
) -> Result<Value, String> {
    let per_byte = 8 / coding.bits();
    let needed = count.div_ceil(per_byte);
    let packed: Vec<u8> = if proto.data_location == 1 {
        external.read(&proto.external_data, needed)?
    } else if let Some(raw) = &proto.raw_data {
        raw.to_vec()
    } else {
        proto.int32_data.iter().map(|&v| v as u8).collect()
    };
    if packed.len() != needed {
        return Err(format!("{} bytes for dims {dims:?}, {needed} are needed", packed.len()));
    }
    let mask = (1u32 << coding.bits()) - 1;
    let code = |i: usize| (u32::from(packed[i / per_byte]) >> (i % per_byte * coding.bits()) & mask) as u8;
    Ok(Value::Coded(CodedTensor { coding, codes: (0..count).map(code).collect(), dims }))
}

fn plain(
    proto: &TensorProto,
    dtype: DType,
    dims: &[usize],
    count: usize,
    external: &mut ExternalData,
) -> Result<Value, String> {
    let needed = dtype.bytes_for(count).ok_or("too large")?;
    let bytes: Vec<u8> = if proto.data_location == 1 {
        external.read(&proto.external_data, needed)?
    } else if let Some(raw) = proto.raw_data.as_ref().filter(|raw| !raw.is_empty() || needed == 0) {
        if raw.len() != needed {
            return Err(format!("{} bytes for dims {dims:?}, {needed} are needed", raw.len()));
        }
        return Tensor::from_bytes(dims, dtype, raw).map(Value::Tensor).map_err(|e| e.to_string());
    } else {
        typed_bytes(proto, dtype)
    };
    Tensor::from_bytes(dims, dtype, &bytes).map(Value::Tensor).map_err(|e| e.to_string())
}

/// The bytes of what stands in typed fields.
fn typed_bytes(proto: &TensorProto, dtype: DType) -> Vec<u8> {
    let ints = || proto.int32_data.iter();
    match dtype {
        DType::F32 | DType::C64 => bytemuck::cast_slice(&proto.float_data).to_vec(),
        DType::F64 | DType::C128 => bytemuck::cast_slice(&proto.double_data).to_vec(),
        DType::I64 => bytemuck::cast_slice(&proto.int64_data).to_vec(),
        DType::U64 => bytemuck::cast_slice(&proto.uint64_data).to_vec(),
        DType::U32 => proto.uint64_data.iter().flat_map(|&v| (v as u32).to_le_bytes()).collect(),
        DType::I32 => bytemuck::cast_slice(&proto.int32_data).to_vec(),
        dtype if dtype.element_bytes() == Some(2) => ints().flat_map(|&v| (v as u16).to_le_bytes()).collect(),
        _ => ints().map(|&v| v as u8).collect(),
    }
}

/// A sparse tensor as a dense one.
pub fn sparse(proto: &SparseTensorProto, external: &mut ExternalData) -> Result<(String, Value), OnnxError> {
    let values = proto.values.clone().unwrap_or_default();
    let name = values.name.clone();
    let fail = |reason: String| OnnxError::Tensor { name: name.clone(), reason };
    let (dims, count) = sizes(&proto.dims).map_err(&fail)?;
    if count > 1 << 28 {
        return Err(fail(format!("a dense form of dims {dims:?} is too large")));
    }
    let given = tensor(&values, external)?;
    let indices = tensor(&proto.indices.clone().unwrap_or_default(), external)?;
    let (Value::Tensor(given), Value::Tensor(at)) = (&given, &indices) else {
        return Err(fail("only numbers can be sparse".to_owned()));
    };
    let own = strides(&dims);
    let flat = to_i64(at).map_err(|e| fail(e.to_string()))?;
    let linear = |i: usize| -> Option<usize> {
        if at.dims().len() < 2 {
            return usize::try_from(*flat.get(i)?).ok();
        }
        let row = flat.get(i * dims.len()..(i + 1) * dims.len())?;
        let inside = row.iter().zip(&dims).all(|(&v, &d)| usize::try_from(v).is_ok_and(|v| v < d));
        inside.then(|| row.iter().zip(&own).map(|(&v, s)| v as usize * s).sum())
    };
    let mut dense = Tensor::zeros(&dims, given.dtype()).map_err(|e| fail(e.to_string()))?;
    let element = given.dtype().element_bytes().unwrap_or(1);
    for i in 0..given.len() {
        let target = linear(i).filter(|&t| t < count);
        let target = target.ok_or_else(|| fail(format!("index {i} is outside dims {dims:?}")))?;
        dense.bytes_mut()[target * element..][..element]
            .copy_from_slice(&given.bytes()[i * element..][..element]);
    }
    Ok((name, Value::Tensor(dense)))
}

/// The value of a sequence message.
pub fn sequence(proto: &SequenceProto, external: &mut ExternalData) -> Result<Value, OnnxError> {
    let mut items = Vec::new();
    for item in &proto.tensors {
        items.push(tensor(item, external)?);
    }
    for item in &proto.sequences {
        items.push(sequence(item, external)?);
    }
    for item in &proto.optionals {
        items.push(optional(item, external)?);
    }
    Ok(Value::Sequence(items))
}

/// The value of an optional message.
pub fn optional(proto: &OptionalProto, external: &mut ExternalData) -> Result<Value, OnnxError> {
    let inner = match (&proto.tensor, &proto.sequence, &proto.optional) {
        (Some(inner), _, _) => Some(tensor(inner, external)?),
        (_, Some(inner), _) => Some(sequence(inner, external)?),
        (_, _, Some(inner)) => Some(optional(inner, external)?),
        _ => None,
    };
    Ok(Value::Optional(inner.map(Box::new)))
}

/// A vector of I64.
pub fn int_vector(values: &[i64]) -> Value {
    Value::Tensor(from_i64(&[values.len()], DType::I64, values).unwrap_or_else(|_| Tensor::scalar(0i64)))
}
