//! Devices: their names, which of them may be used, and which one is.

mod calibrate;
mod candidate;
mod cost;
mod fallback;
mod graph_devices;
mod id;
mod policy;
mod store;

pub use calibrate::{calibrate, cpu_model};
pub use candidate::{DeviceCandidate, device_report};
pub use cost::{DeviceRates, Prediction, StepPrediction, predict};
pub use fallback::{DeviceAttempt, DeviceFallbackError};
pub use graph_devices::{
    DECISION_LIFETIME, DeviceBenchResult, DevicePick, DeviceTimes, GraphDevices, GraphDevicesOptions,
    NOMINAL_EXTENT, graph_param_names,
};
pub use id::{Device, DeviceId, UnknownDevice};
pub use policy::{DeviceError, DevicePickStrategy, DevicePolicy, device_chain_from_env, resolve_device};
pub use store::Clock;
