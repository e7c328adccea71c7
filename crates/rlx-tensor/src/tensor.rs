//! A host tensor: dtype, extents and owned bytes, row-major.

use crate::storage::AlignedBytes;
use crate::{DType, byte_count};
use bytemuck::Pod;
use half::{bf16, f16};
use std::sync::Arc;

/// A Rust type that a tensor's elements can be viewed as.
pub trait Element: Pod {
    /// The dtype with this representation.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),*) => { $(impl Element for $ty { const DTYPE: DType = DType::$dtype; })* };
}
elements!(f64 => F64, f32 => F32, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, i16 => I16, i8 => I8,
    u64 => U64, u32 => U32, u16 => U16, u8 => U8);

/// Why a tensor cannot be made or viewed as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The data's length does not match dims and dtype.
    #[error("{dtype} tensor of dims {dims:?} needs {expected} bytes, found {found}")]
    Length {
        /// The dtype.
        dtype: DType,
        /// The extents.
        dims: Vec<usize>,
        /// Bytes that dims and dtype need.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The extents overflow, or do not fill whole blocks.
    #[error("dims {dims:?} are no valid size for dtype {dtype}")]
    Size {
        /// The dtype.
        dtype: DType,
        /// The extents.
        dims: Vec<usize>,
    },
    /// Viewed as a type of another dtype.
    #[error("tensor holds {found}, asked for {expected}")]
    DType {
        /// The dtype asked for.
        expected: DType,
        /// The tensor's dtype.
        found: DType,
    },
}

/// A row-major tensor in host memory. Clones share the bytes; writing copies them first if they are shared.
#[derive(Debug, Clone)]
pub struct Tensor {
    dims: Vec<usize>,
    dtype: DType,
    bytes: Arc<AlignedBytes>,
}

impl Tensor {
    /// A tensor of zeros.
    pub fn zeros(dims: &[usize], dtype: DType) -> Result<Self, TensorError> {
        let len = Self::byte_len(dims, dtype)?;
        Ok(Self { dims: dims.to_vec(), dtype, bytes: Arc::new(AlignedBytes::zeroed(len)) })
    }

    /// A tensor with a copy of `data`, row-major.
    pub fn from_slice<T: Element>(dims: &[usize], data: &[T]) -> Result<Self, TensorError> {
        Self::from_bytes(dims, T::DTYPE, bytemuck::cast_slice(data))
    }

    /// A tensor with a copy of little-endian `bytes`.
    pub fn from_bytes(dims: &[usize], dtype: DType, bytes: &[u8]) -> Result<Self, TensorError> {
        Self::from_aligned(dims, dtype, AlignedBytes::copied_from(bytes))
    }

    /// A tensor that takes over a buffer.
    pub fn from_aligned(dims: &[usize], dtype: DType, bytes: AlignedBytes) -> Result<Self, TensorError> {
        let expected = Self::byte_len(dims, dtype)?;
        if expected != bytes.len() {
            let found = bytes.len();
            return Err(TensorError::Length { dtype, dims: dims.to_vec(), expected, found });
        }
        Ok(Self { dims: dims.to_vec(), dtype, bytes: Arc::new(bytes) })
    }

    /// A scalar.
    pub fn scalar<T: Element>(value: T) -> Self {
        let bytes = Arc::new(AlignedBytes::copied_from(bytemuck::bytes_of(&value)));
        Self { dims: Vec::new(), dtype: T::DTYPE, bytes }
    }

    fn byte_len(dims: &[usize], dtype: DType) -> Result<usize, TensorError> {
        byte_count(dims, dtype)
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| TensorError::Size { dtype, dims: dims.to_vec() })
    }

    /// The extents, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// The dtype.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// The elements as bytes, writable; copies first where the bytes are shared.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        Arc::make_mut(&mut self.bytes).as_mut_slice()
    }

    /// The elements. Bool tensors are viewed as `u8`.
    pub fn as_slice<T: Element>(&self) -> Result<&[T], TensorError> {
        self.check::<T>()?;
        Ok(bytemuck::cast_slice(self.bytes()))
    }

    /// The elements, writable; copies first where the bytes are shared.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T], TensorError> {
        self.check::<T>()?;
        Ok(bytemuck::cast_slice_mut(self.bytes_mut()))
    }

    fn check<T: Element>(&self) -> Result<(), TensorError> {
        let same = self.dtype == T::DTYPE || (self.dtype == DType::Bool && T::DTYPE == DType::U8);
        if same { Ok(()) } else { Err(TensorError::DType { expected: T::DTYPE, found: self.dtype }) }
    }

    /// The same elements under other extents with the same count.
    pub fn reshaped(&self, dims: &[usize]) -> Result<Self, TensorError> {
        let expected = Self::byte_len(dims, self.dtype)?;
        if expected != self.bytes.len() {
            let found = self.bytes.len();
            return Err(TensorError::Length { dtype: self.dtype, dims: dims.to_vec(), expected, found });
        }
        Ok(Self { dims: dims.to_vec(), dtype: self.dtype, bytes: Arc::clone(&self.bytes) })
    }

    /// True if dtype, extents and every byte are equal (NaN equals the same NaN, -0 differs from 0).
    pub fn bits_eq(&self, other: &Tensor) -> bool {
        self.dtype == other.dtype && self.dims == other.dims && self.bytes() == other.bytes()
    }

    /// A copy marked as another dtype of the same element size, bits unchanged (U8 to Bool, say).
    pub fn bitcast(&self, dtype: DType) -> Result<Self, TensorError> {
        Self::byte_len(&self.dims, dtype)
            .ok()
            .filter(|&len| len == self.bytes.len())
            .map(|_| Self { dims: self.dims.clone(), dtype, bytes: Arc::clone(&self.bytes) })
            .ok_or(TensorError::DType { expected: dtype, found: self.dtype })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_typed() {
        let tensor = Tensor::from_slice(&[2, 2], &[1i64, 2, 3, (1 << 53) + 1]).unwrap();
        assert_eq!(tensor.as_slice::<i64>().unwrap()[3], (1 << 53) + 1);
        assert_eq!(
            tensor.as_slice::<f32>(),
            Err(TensorError::DType { expected: DType::F32, found: DType::I64 })
        );
    }

    #[test]
    fn lengths_are_checked() {
        assert!(matches!(Tensor::from_slice(&[3], &[1f32, 2.0]), Err(TensorError::Length { .. })));
        assert!(matches!(Tensor::zeros(&[usize::MAX, 2], DType::F32), Err(TensorError::Size { .. })));
        assert!(Tensor::zeros(&[4], DType::F32).unwrap().reshaped(&[2, 3]).is_err());
    }

    #[test]
    fn clones_share_until_written() {
        let first = Tensor::from_slice(&[2], &[1f32, 2.0]).unwrap();
        let mut second = first.clone();
        second.as_mut_slice::<f32>().unwrap()[0] = 9.0;
        assert_eq!(first.as_slice::<f32>().unwrap(), [1.0, 2.0]);
        assert_eq!(second.as_slice::<f32>().unwrap(), [9.0, 2.0]);
    }
}
