//! The device of a result, and what failed before, in JSON objects.

use rlx_models::{Fallback, ModelDevices};
use serde::Serialize;

/// A result's device.
#[derive(Debug, Serialize)]
pub struct Devices {
    pub device: String,
    /// What devices that failed changed, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fallbacks: Vec<Row>,
}

/// One of them: from a device to the next, or without a draft model.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    what: &'static str,
    cause: String,
}

impl Devices {
    /// Where a model is now, and how it came there.
    pub fn of(devices: &ModelDevices) -> Self {
        let row = |fallback| match fallback {
            Fallback::Moved { from, to, cause } => {
                Row { from: Some(from.to_string()), to: Some(to.to_string()), what: "model", cause }
            }
            Fallback::Undrafted { cause } => Row { from: None, to: None, what: "draft model", cause },
            other => Row { from: None, to: None, what: "other", cause: other.to_string() },
        };
        Self {
            device: devices.device().to_string(),
            fallbacks: devices.fallbacks().into_iter().map(row).collect(),
        }
    }
}
