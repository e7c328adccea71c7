//! Shapes: dims with a dtype.

use crate::{DType, Dim, DimBinding, DimError, Symbol};
use std::collections::BTreeSet;
use std::fmt;

/// The dims and dtype of a value. A rank-0 shape is a scalar.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: Vec<Dim>,
    dtype: DType,
}

impl Shape {
    /// A shape of these dims: numbers, symbol names or expressions.
    pub fn new<D: Clone + Into<Dim>>(dims: &[D], dtype: DType) -> Self {
        Self { dims: dims.iter().cloned().map(Into::into).collect(), dtype }
    }

    /// A shape that takes over a list of dims.
    pub fn from_dims(dims: Vec<Dim>, dtype: DType) -> Self {
        Self { dims, dtype }
    }

    /// A scalar.
    pub fn scalar(dtype: DType) -> Self {
        Self { dims: Vec::new(), dtype }
    }

    /// The dims, outermost first.
    pub fn dims(&self) -> &[Dim] {
        &self.dims
    }

    /// The dtype.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of dims.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// The innermost dim, if there is one.
    pub fn last(&self) -> Option<&Dim> {
        self.dims.last()
    }

    /// The same dims with another dtype.
    #[must_use]
    pub fn with_dtype(&self, dtype: DType) -> Self {
        Self { dims: self.dims.clone(), dtype }
    }

    /// The dims as numbers, if all are known.
    pub fn known_dims(&self) -> Option<Vec<usize>> {
        self.dims.iter().map(Dim::known).collect()
    }

    /// The number of elements as an expression.
    pub fn elements(&self) -> Dim {
        self.dims.iter().fold(Dim::Known(1), |product, dim| &product * dim)
    }

    /// The dims under a binding.
    pub fn eval(&self, binding: &DimBinding) -> Result<Vec<usize>, DimError> {
        self.dims.iter().map(|d| d.eval(binding)).collect()
    }

    /// Adds every symbol of the dims to `into`.
    pub fn collect_symbols(&self, into: &mut BTreeSet<Symbol>) {
        self.dims.iter().for_each(|d| d.collect_symbols(into));
    }
}

/// The number of elements of these extents, `None` on overflow.
pub fn element_count(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))
}

/// The bytes of these extents, `None` on overflow or a partial block.
pub fn byte_count(dims: &[usize], dtype: DType) -> Option<usize> {
    dtype.bytes_for(element_count(dims)?)
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, dim) in self.dims.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{dim}")?;
        }
        write!(f, "]")
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_dtype_and_dims() {
        let shape = Shape::new(&[Dim::symbol("batch"), Dim::Known(384)], DType::F32);
        assert_eq!(shape.to_string(), "f32[batch, 384]");
        assert_eq!(shape.elements().to_string(), "384*batch");
        assert_eq!(Shape::scalar(DType::I64).to_string(), "i64[]");
    }

    #[test]
    fn counts_do_not_wrap() {
        assert_eq!(element_count(&[usize::MAX, 2]), None);
        assert_eq!(byte_count(&[3, 5], DType::F32), Some(60));
        assert_eq!(byte_count(&[33], DType::Q8_0), None);
    }
}
