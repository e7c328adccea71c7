//! GPU backends: kernels from one description, printed for what drivers compile, checked by an interpreter.
//!
//! [`register`] adds devices to the process: with the feature `wgpu` those that Vulkan sees, as `gpu:0`, `gpu:1`, .., with the feature
//! `cuda` those that CUDA's driver sees, as `cuda:0`, `cuda:1`, ..

#[cfg(feature = "wgpu")]
mod adapter;
#[cfg(target_arch = "wasm32")]
pub mod browser;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod emulate;
mod ffi;
pub mod ir;
mod lower;
pub mod print;

pub use emulate::{emulated, emulated_by_library, emulated_within};

use rlx::backend::{BackendProvider, register_backend};
use rlx::devices::DeviceError;
use std::sync::Arc;

/// The devices that the process's graphics drivers show; `None` if this build has none of the features for devices.
pub fn provider() -> Option<Arc<dyn BackendProvider>> {
    #[cfg(feature = "wgpu")]
    return Some(Arc::new(adapter::GpuProvider));
    #[cfg(not(feature = "wgpu"))]
    None
}

/// NVIDIA's cards; `None` if this build has no CUDA. A build that has it starts without a driver too, and says what is missing.
pub fn cuda_provider() -> Option<Arc<dyn BackendProvider>> {
    #[cfg(feature = "cuda")]
    return Some(Arc::new(cuda::CudaProvider));
    #[cfg(not(feature = "cuda"))]
    None
}

/// Adds the devices to the process, if this build has any: from then on sessions, `GraphDevices` and the command line know them.
///
/// # Errors
/// [`DeviceError::AlreadyRegistered`].
pub fn register() -> Result<(), DeviceError> {
    let providers = provider().into_iter().chain(cuda_provider());
    providers.into_iter().try_for_each(register_backend)
}

#[cfg(test)]
mod tests;
