//! Devices: their names, and which of them may be used.

mod id;
mod policy;

pub use id::{Device, DeviceId, UnknownDevice};
pub use policy::{DeviceError, DevicePolicy, resolve_device};
