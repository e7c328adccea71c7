//! Tensors given to a run.

use rlx_tensor::{DType, Element, Tensor};

/// A tensor given to a run: borrowed bytes with a dtype and, unless the graph knows them, extents.
#[derive(Debug, Clone, Copy)]
pub struct TensorArg<'a> {
    pub(crate) dims: Option<&'a [usize]>,
    pub(crate) dtype: DType,
    pub(crate) bytes: &'a [u8],
}

impl<'a> TensorArg<'a> {
    /// A tensor of these extents.
    pub fn new(dims: &'a [usize], dtype: DType, bytes: &'a [u8]) -> Self {
        Self { dims: Some(dims), dtype, bytes }
    }

    /// A tensor of these extents over typed elements.
    pub fn typed<T: Element>(dims: &'a [usize], data: &'a [T]) -> Self {
        Self { dims: Some(dims), dtype: T::DTYPE, bytes: bytemuck::cast_slice(data) }
    }
}

impl<'a> From<&'a Tensor> for TensorArg<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self { dims: Some(tensor.dims()), dtype: tensor.dtype(), bytes: tensor.bytes() }
    }
}

/// Elements alone: the graph's extents apply, which then must be numbers (or a single symbol, for a vector).
impl<'a, T: Element> From<&'a [T]> for TensorArg<'a> {
    fn from(data: &'a [T]) -> Self {
        Self { dims: None, dtype: T::DTYPE, bytes: bytemuck::cast_slice(data) }
    }
}
