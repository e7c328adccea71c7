//! Devices: their names, and which of them may be used.

mod id;

pub use id::{Device, DeviceId, UnknownDevice};
