//! Calls whose safety the compiler cannot see.

#[cfg(feature = "cuda")]
pub(crate) mod blas;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(target_arch = "wasm32")]
pub(crate) mod page;
#[cfg(feature = "wgpu")]
pub(crate) mod trusted;
