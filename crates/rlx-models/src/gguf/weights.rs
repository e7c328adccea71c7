//! Tensors of a GGUF file under the names, in the row order and in the dtypes that the graphs ask for.
//!
//! A tensor that is right as it stands stays mapped. Two things are made on demand, at pack: rows of queries and keys that llama's
//! files keep in the order of interleaved rotation are put back, and blocks of a type that no kernel reads become f32.

use super::config::GgufArchitecture;
use super::names::{Place, hub_place};
use crate::error::{ModelError, Result};
use rlx::import::gguf::GgufLoader;
use rlx::weights::{LazyBytes, LoadError, SharedBytes, TensorView, WeightBytes, WeightLoader};
use rlx_kernels::quant_dot;
use rlx_tensor::storage::mapped::MappedRange;
use rlx_tensor::{DType, DTypeClass, Shape, quant};
use serde_json::Value as Json;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, OnceLock};

/// The tensors of a GGUF file as the hub's names.
#[derive(Debug, Clone)]
pub struct GgufWeights {
    table: Arc<Table>,
}

#[derive(Debug, Default)]
struct Table {
    names: Vec<String>,
    tensors: HashMap<String, Tensor>,
}

#[derive(Debug)]
struct Tensor {
    dtype: DType,
    dims: Vec<usize>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Mapped(MappedRange),
    Made(Arc<Made>, OnceLock<SharedBytes>),
}

/// Bytes made from a file's bytes.
#[derive(Debug)]
struct Made {
    range: MappedRange,
    stored: DType,
    dtype: DType,
    rows: usize,
    /// Heads whose rows stand in the order of interleaved rotation.
    interleaved_heads: Option<usize>,
    len: usize,
}

impl LazyBytes for Made {
    fn len(&self) -> usize {
        self.len
    }

    fn load(&self) -> io::Result<SharedBytes> {
        let source = self.range.bytes();
        let ordered = self.interleaved_heads.map(|heads| deinterleaved(source, self.rows, heads));
        let source = ordered.as_deref().unwrap_or(source);
        if self.stored == self.dtype {
            return Ok(source.to_vec().into());
        }
        let mut values = vec![0.0f32; self.len / size_of::<f32>()];
        quant::decode(self.stored, source, &mut values).map_err(io::Error::other)?;
        Ok(bytemuck::cast_slice::<f32, u8>(&values).into())
    }
}

/// Whether graphs take a tensor in the dtype it is stored in: blocks only as matrices, and only of types that have kernels.
fn is_readable(stored: DType, dims: &[usize]) -> bool {
    stored.class() != DTypeClass::Quant
        || (dims.len() == 2 && quant_dot::dtypes().any(|dtype| dtype == stored))
}

/// Puts rows in the order of halves: the file has row `2 i + half` of a head where the graph has row `half * size / 2 + i`.
pub(super) fn deinterleaved(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / rows.max(1);
    let size = rows / heads.max(1);
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, at) = (row / size, row % size);
        let (half, i) = (at / (size / 2), at % (size / 2));
        let from = (head * size + 2 * i + half) * row_bytes;
        out.extend_from_slice(&bytes[from..from + row_bytes]);
    }
    out
}

/// The other way round, for writers: the row of the graph that is row `row` of the file.
pub(super) fn interleaved_rows(row: usize, rows: usize, heads: usize) -> usize {
    let size = rows / heads.max(1);
    let (head, at) = (row / size, row % size);
    head * size + at % 2 * (size / 2) + at / 2
}

/// Heads of a tensor whose rows files keep interleaved: queries and keys of the `llama` architecture.
pub(super) fn interleaved_heads(model_type: &str, config: &Json, name: &str) -> Option<usize> {
    if !["llama", "mistral", "mixtral"].contains(&model_type) {
        return None;
    }
    let heads = |field: &str| config[field].as_u64().and_then(|heads| usize::try_from(heads).ok());
    let queries = heads("num_attention_heads");
    if name.contains(".self_attn.q_proj.") {
        queries
    } else if name.contains(".self_attn.k_proj.") {
        heads("num_key_value_heads").or(queries)
    } else {
        None
    }
}

impl GgufWeights {
    pub(super) fn new(
        loader: Arc<GgufLoader>,
        architecture: &GgufArchitecture,
        config: &Json,
    ) -> Result<Self> {
        let mut weights = Table::default();
        for name in loader.names() {
            let (Some(view), Some(range)) = (loader.tensor(name)?, loader.range(name)) else { continue };
            match hub_place(architecture.model_type, name) {
                Place::Config => {}
                Place::One(hub) => {
                    let heads = interleaved_heads(architecture.model_type, config, &hub);
                    let mut dims = view.dims.to_vec();
                    if hub.ends_with("shared_expert_gate.weight") && dims.len() == 1 {
                        dims.insert(0, 1);
                    }
                    weights.add(hub, view.dtype, dims, range.clone(), heads)?;
                }
                Place::Experts(before, after) => weights.add_experts(&view, range, &before, &after)?,
                // Listed as unused under its own name.
                Place::Unknown => {
                    weights.add(name.to_owned(), view.dtype, view.dims.to_vec(), range.clone(), None)?
                }
            }
        }
        Ok(GgufWeights { table: Arc::new(weights) })
    }
}

impl Table {
    fn add_experts(
        &mut self,
        view: &TensorView<'_>,
        range: &MappedRange,
        before: &str,
        after: &str,
    ) -> Result<()> {
        let [count, dims @ ..] = view.dims else { return Ok(()) };
        let bytes = range.len() / (*count).max(1);
        for expert in 0..*count {
            let part = range.file().range(range.offset() + expert * bytes, bytes).map_err(LoadError::from)?;
            self.add(format!("{before}{expert}{after}"), view.dtype, dims.to_vec(), part, None)?;
        }
        Ok(())
    }

    fn add(
        &mut self,
        name: String,
        stored: DType,
        dims: Vec<usize>,
        range: MappedRange,
        interleaved_heads: Option<usize>,
    ) -> Result<()> {
        let dtype = if is_readable(stored, &dims) { stored } else { DType::F32 };
        let rows = dims.first().copied().unwrap_or(1);
        if interleaved_heads.is_some_and(|heads| heads == 0 || rows % heads != 0 || rows / heads % 2 != 0) {
            let expected = vec![interleaved_heads.unwrap_or(0) * 2];
            return Err(ModelError::TensorShape { name, expected, found: dims });
        }
        let source = if dtype != stored || interleaved_heads.is_some() {
            let len = rlx_tensor::byte_count(&dims, dtype).ok_or_else(|| ModelError::TensorShape {
                name: name.clone(),
                expected: vec![],
                found: dims.clone(),
            })?;
            Source::Made(
                Arc::new(Made { range, stored, dtype, rows, interleaved_heads, len }),
                OnceLock::new(),
            )
        } else {
            Source::Mapped(range)
        };
        if self.tensors.insert(name.clone(), Tensor { dtype, dims, source }).is_none() {
            self.names.push(name);
        }
        Ok(())
    }
}

impl WeightLoader for GgufWeights {
    /// The tensor. One that is made on demand is made by this call and kept; [`WeightLoader::shape`] does not make it.
    fn tensor(&self, name: &str) -> std::result::Result<Option<TensorView<'_>>, LoadError> {
        let Some((name, tensor)) = self.table.tensors.get_key_value(name) else { return Ok(None) };
        let bytes = match &tensor.source {
            Source::Mapped(range) => {
                range.still_valid()?;
                range.bytes()
            }
            Source::Made(made, kept) => {
                made.range.still_valid()?;
                if kept.get().is_none() {
                    let file = made.range.file().path().to_path_buf();
                    let bytes = made.load().map_err(|source| LoadError::Io { file, source })?;
                    kept.get_or_init(|| bytes);
                }
                kept.get().map_or(&[][..], SharedBytes::as_slice)
            }
        };
        Ok(Some(TensorView { name, dtype: tensor.dtype, dims: &tensor.dims, bytes }))
    }

    fn shape(&self, name: &str) -> std::result::Result<Option<Shape>, LoadError> {
        Ok(self.table.tensors.get(name).map(|tensor| Shape::new(&tensor.dims, tensor.dtype)))
    }

    fn storage(&self, name: &str) -> std::result::Result<Option<WeightBytes>, LoadError> {
        Ok(self.table.tensors.get(name).map(|tensor| match &tensor.source {
            Source::Mapped(range) => WeightBytes::Mapped(range.clone()),
            Source::Made(made, _) => WeightBytes::Lazy(Arc::clone(made) as Arc<dyn LazyBytes>),
        }))
    }

    fn names(&self) -> Box<dyn ExactSizeIterator<Item = &str> + '_> {
        Box::new(self.table.names.iter().map(String::as_str))
    }
}
