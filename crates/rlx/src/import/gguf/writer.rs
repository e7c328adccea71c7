//! The front of a file: everything before the tensors' bytes.

use rlx_tensor::DType;

use super::header::{MAGIC, tensor_type_code};
use super::metadata::{Metadata, write_string};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Extents, outermost first.
    pub dims: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

impl TensorEntry {
    /// Bytes of the tensor; `None` if its rows are no whole blocks, or the size overflows.
    pub fn bytes(&self) -> Option<usize> {
        let (per_block, _) = self.dtype.block();
        let row = self.dims.last().copied().unwrap_or(1);
        (row.checked_rem(per_block) == Some(0)).then(|| rlx_tensor::byte_count(&self.dims, self.dtype))?
    }
}

/// The bytes of a version 3 file up to where its tensors begin, for tensors that follow in this order, each padded with zeros to a
/// multiple of `alignment` (a power of two that the metadata names unless it is 32). `None` for a type or a size that a file
/// cannot hold.
pub fn encode_header(metadata: &Metadata, tensors: &[TensorEntry], alignment: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&3u32.to_le_bytes());
    out.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.entries().len() as u64).to_le_bytes());
    for (key, value) in metadata.entries() {
        write_string(key, &mut out);
        out.extend_from_slice(&value.code().to_le_bytes());
        value.write(&mut out);
    }
    let mut offset = 0usize;
    for tensor in tensors {
        write_string(&tensor.name, &mut out);
        out.extend_from_slice(&u32::try_from(tensor.dims.len()).ok()?.to_le_bytes());
        for dim in tensor.dims.iter().rev() {
            out.extend_from_slice(&(*dim as u64).to_le_bytes());
        }
        out.extend_from_slice(&tensor_type_code(tensor.dtype)?.to_le_bytes());
        out.extend_from_slice(&(offset as u64).to_le_bytes());
        offset = offset.checked_add(tensor.bytes()?)?.checked_next_multiple_of(alignment)?;
    }
    out.resize(out.len().checked_next_multiple_of(alignment)?, 0);
    Some(out)
}
