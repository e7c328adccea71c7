//! Tensors of a checkpoint, read row by row in the order and with the values that files hold.

use super::super::weights::interleaved_rows;
use super::encode;
use crate::error::{ModelError, Result};
use rlx::import::gguf::TensorEntry;
use rlx::import::hf::ConfigReader;
use rlx::weights::{TensorView, WeightLoader};
use rlx_tensor::{DType, quant};

/// One tensor of the checkpoint.
pub(super) struct Source {
    name: String,
    /// Extents in the file.
    dims: Vec<usize>,
    order: Order,
    /// Added to every value.
    offset: f32,
    /// What every value is multiplied by then.
    pub(super) factor: f32,
}

enum Order {
    AsIs,
    /// Rows of this many heads, interleaved.
    Interleaved(usize),
    /// Columns are rows.
    Transposed,
}

impl Source {
    pub(super) fn of(
        model_type: &str,
        config: &ConfigReader,
        canonical: &str,
        name: &str,
        dims: &[usize],
    ) -> Result<Self> {
        let mut source = Source {
            name: name.to_owned(),
            dims: dims.to_vec(),
            order: Order::AsIs,
            offset: 0.0,
            factor: 1.0,
        };
        if ["llama", "mistral", "mixtral"].contains(&model_type) {
            let heads = config.optional::<usize>("num_attention_heads")?.unwrap_or(1);
            let kv_heads = config.optional::<usize>("num_key_value_heads")?.unwrap_or(heads);
            if canonical.contains(".q_proj.") {
                source.order = Order::Interleaved(heads);
            } else if canonical.contains(".k_proj.") {
                source.order = Order::Interleaved(kv_heads);
            }
        }
        let conv = ["c_attn.weight", "c_proj.weight", "c_fc.weight"];
        if model_type == "gpt2" && conv.iter().any(|end| canonical.ends_with(end)) {
            source.order = Order::Transposed;
            source.dims.reverse();
        }
        if model_type.starts_with("gemma") && canonical.ends_with("norm.weight") {
            source.offset = 1.0;
        }
        if canonical.ends_with("shared_expert_gate.weight") {
            source.dims.retain(|&dim| dim != 1);
        }
        Ok(source)
    }

    /// Rows `first ..` of the tensor as the file has them.
    fn read(&self, view: &TensorView<'_>, first: usize, width: usize, out: &mut [f32]) -> Result<()> {
        let rows = self.dims.iter().product::<usize>() / width.max(1);
        let element = view.dtype.element_bytes().unwrap_or(1);
        let decode = |from: usize, count: usize, out: &mut [f32]| {
            quant::decode(view.dtype, &view.bytes[from * element..(from + count) * element], out)
        };
        for (i, row_values) in out.chunks_exact_mut(width).enumerate() {
            let row = first + i;
            match self.order {
                Order::AsIs => decode(row * width, width, row_values)?,
                Order::Interleaved(heads) => {
                    // A bias is one row of as many heads.
                    if self.dims.len() == 1 {
                        for (at, value) in row_values.iter_mut().enumerate() {
                            decode(interleaved_rows(at, width, heads), 1, std::slice::from_mut(value))?;
                        }
                    } else {
                        decode(interleaved_rows(row, rows, heads) * width, width, row_values)?;
                    }
                }
                Order::Transposed => {
                    for (column, value) in row_values.iter_mut().enumerate() {
                        decode(column * rows + row, 1, std::slice::from_mut(value))?;
                    }
                }
            }
        }
        out.iter_mut().for_each(|value| *value = (*value + self.offset) * self.factor);
        Ok(())
    }
}

/// One tensor of the file.
pub(super) struct Tensor {
    pub(super) entry: TensorEntry,
    /// Of the checkpoint: one, or one for each expert.
    pub(super) sources: Vec<Source>,
    values: Vec<f32>,
    experts: bool,
}

impl Tensor {
    pub(super) fn new(name: String, source: Source, experts: bool) -> Self {
        let entry = TensorEntry { name, dims: Vec::new(), dtype: DType::F32 };
        Tensor { entry, sources: vec![source], values: Vec::new(), experts }
    }

    pub(super) fn of_values(name: String, values: Vec<f32>) -> Self {
        let entry = TensorEntry { name, dims: vec![values.len()], dtype: DType::F32 };
        Tensor { entry, sources: Vec::new(), values, experts: false }
    }

    /// Fixes extents and type, once all sources are there.
    pub(super) fn settle(&mut self, dtype: impl Fn(&str, &[usize]) -> DType) -> Result<()> {
        let mut dims = self.sources.first().map_or(Vec::new(), |source| source.dims.clone());
        if let Some(other) = self.sources.iter().find(|source| source.dims != dims) {
            let found = other.dims.clone();
            return Err(ModelError::TensorShape { name: other.name.clone(), expected: dims, found });
        }
        if self.experts {
            dims.insert(0, self.sources.len());
        }
        self.entry.dtype = dtype(&self.entry.name, &dims);
        self.entry.dims = dims;
        Ok(())
    }

    /// Hands the file's bytes to `put` in pieces of about `chunk` values, until it answers false; gives their number.
    pub(super) fn write(
        &self,
        weights: &dyn WeightLoader,
        chunk: usize,
        mut put: impl FnMut(&[u8]) -> bool,
    ) -> Result<usize> {
        let (dtype, mut bytes, mut total) = (self.entry.dtype, Vec::new(), 0);
        if !self.values.is_empty() {
            encode(&self.entry.name, dtype, &self.values, &mut bytes)?;
            put(&bytes);
            return Ok(bytes.len());
        }
        let width = self.entry.dims.last().copied().unwrap_or(1).max(1);
        let rows_at_once = (chunk / width).max(1);
        let mut values = Vec::new();
        for source in &self.sources {
            let missing =
                || ModelError::MissingTensor { name: source.name.clone(), expected: source.dims.clone() };
            let view = weights.tensor(&source.name)?.ok_or_else(missing)?;
            let rows = source.dims.iter().product::<usize>() / width;
            for first in (0..rows).step_by(rows_at_once) {
                values.resize(rows_at_once.min(rows - first) * width, 0.0);
                source.read(&view, first, width, &mut values)?;
                encode(&source.name, dtype, &values, &mut bytes)?;
                total += bytes.len();
                if !put(&bytes) {
                    return Ok(total);
                }
            }
        }
        Ok(total)
    }
}
