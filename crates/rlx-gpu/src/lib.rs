//! GPU backends: kernels from one description, printed for what drivers compile, checked by an interpreter.
//!
//! With the feature `wgpu`, [`register`] adds the devices that Vulkan sees to the process, as `gpu:0`, `gpu:1`, ..

#[cfg(feature = "wgpu")]
mod adapter;
mod device;
mod emulate;
#[cfg(feature = "wgpu")]
mod ffi;
pub mod ir;
mod lower;
pub mod print;

pub use emulate::emulated;

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

/// Adds the devices to the process, if this build has any: from then on sessions, `GraphDevices` and the command line know `gpu`.
///
/// # Errors
/// [`DeviceError::AlreadyRegistered`].
pub fn register() -> Result<(), DeviceError> {
    provider().map_or(Ok(()), register_backend)
}

#[cfg(test)]
mod tests;
