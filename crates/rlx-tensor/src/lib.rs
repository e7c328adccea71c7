//! Data: dtypes, shapes with symbolic dims, host tensors, aligned storage, quantised blocks. Knows nothing of graphs.

mod dim;
mod dtype;
pub mod quant;
pub mod rounding;
mod shape;
mod sizes;
pub mod storage;
mod tensor;
pub mod time;

pub use dim::{Dim, DimBinding, DimError, DimOrder, Poly, Symbol};
pub use dtype::{DType, DTypeClass, UnknownDType};
pub use shape::{Shape, byte_count, element_count};
pub use sizes::{SizeId, SizeTable};
pub use tensor::{Element, Tensor, TensorError};
