//! A cache of 8-bit integers, as bytes.

use super::{Attention, BLOCK};
use crate::op::EvalError;
use rlx_tensor::Tensor;
use rlx_tensor::quant::{CACHE_GROUP, CACHE_GROUP_BYTES, Q8Head};

/// Extents of key and value caches after the blocks; `None` where groups do not divide a head.
pub(super) fn extents(op: &Attention) -> Option<[usize; 3]> {
    let whole = op.head_dim.is_multiple_of(CACHE_GROUP);
    whole.then_some([op.kv_heads, BLOCK, op.head_dim / CACHE_GROUP * CACHE_GROUP_BYTES])
}

/// A key or value cache in which rows are stored before it is read.
pub(super) struct Bytes {
    layout: Q8Head,
    bytes: Vec<u8>,
}

impl Bytes {
    pub fn of(op: &Attention, cache: &Tensor, keys: bool) -> Bytes {
        let layout = Q8Head { dim: op.head_dim, positions: BLOCK, keys };
        Bytes { layout, bytes: cache.bytes().to_vec() }
    }

    fn head(&mut self, index: usize) -> &mut [u8] {
        let bytes = self.layout.bytes();
        &mut self.bytes[index * bytes..][..bytes]
    }

    /// Stores one head of a row in head `index`, counted over all blocks.
    pub fn store(&mut self, index: usize, position: usize, values: &[f64]) {
        let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        let layout = self.layout;
        layout.store(self.head(index), position, &values);
    }

    /// Every value, in the order that an `f32` cache has.
    pub fn values(&self) -> Vec<f64> {
        let Q8Head { dim, positions, keys } = self.layout;
        let of_head = |head: &[u8]| -> Vec<f64> {
            let value = |position, i| f64::from(self.layout.value(head, position, i));
            match keys {
                true => (0..dim * positions).map(|n| value(n % positions, n / positions)).collect(),
                false => (0..dim * positions).map(|n| value(n / dim, n % dim)).collect(),
            }
        };
        self.bytes.chunks_exact(self.layout.bytes()).flat_map(of_head).collect()
    }

    pub fn into_tensor(self, dims: &[usize]) -> Result<Tensor, EvalError> {
        Ok(Tensor::from_bytes(dims, rlx_tensor::DType::U8, &self.bytes)?)
    }
}
