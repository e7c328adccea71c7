//! What is known of each kind of device, a row for each.

use super::id::{Device, DeviceId};
use super::policy::DevicePolicy;
use crate::backend::{BackendRegistry, DeviceProbe};
use crate::config::{ByteSize, Config};

/// One device, or one kind without any: whether it can be used, and what stands in the way.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceCandidate {
    /// The device; the first of its kind where there is none.
    pub device: DeviceId,
    /// This process has a backend for the kind.
    pub registered: bool,
    /// The device is there and answers.
    pub available: bool,
    /// The policy allows the kind.
    pub allowed: bool,
    /// Every op runs there, as it stands or decomposed. `None` without a graph, or where the device cannot be asked.
    pub supports_graph: Option<bool>,
    /// Memory that the graph would still take there, at the sizes the report is for.
    pub needed_bytes: Option<u64>,
    /// Free memory of the device; `None` is unknown, not enough.
    pub free_bytes: Option<u64>,
    /// Predicted time of a run at the sizes the report is for, in seconds.
    pub predicted_s: Option<f64>,
    /// The choice falls on it.
    pub recommended: bool,
    /// What the backend says of it.
    pub capabilities: Vec<String>,
    /// What stands in the way, in words; `None` if it can be used.
    pub blocker: Option<String>,
}

impl DeviceCandidate {
    /// Nothing stands in the way.
    pub fn is_viable(&self) -> bool {
        self.blocker.is_none()
    }

    pub(super) fn unknown(device: DeviceId, policy: &DevicePolicy) -> DeviceCandidate {
        DeviceCandidate {
            device,
            registered: false,
            available: false,
            allowed: policy.allows(device.kind),
            supports_graph: None,
            needed_bytes: None,
            free_bytes: None,
            predicted_s: None,
            recommended: false,
            capabilities: Vec::new(),
            blocker: None,
        }
    }

    /// Adds a blocker behind those that are there already: the first is the one to remove first.
    pub(super) fn block(&mut self, reason: String) {
        self.blocker.get_or_insert(reason);
    }

    /// Blocks the device if the graph needs more than is known to be free.
    pub(super) fn check_memory(&mut self) {
        if let (Some(needed), Some(free)) = (self.needed_bytes, self.free_bytes)
            && needed > free
        {
            self.block(format!("needs {}, {} are free", ByteSize(needed), ByteSize(free)));
        }
    }
}

/// The devices of each kind that a policy considers, in its order of preference, then the kinds it does not: every kind has a row.
pub(super) fn rows(backends: &BackendRegistry, policy: &DevicePolicy) -> Vec<DeviceCandidate> {
    let mut rows = Vec::new();
    for kind in policy.ranked() {
        let mut first = DeviceCandidate::unknown(kind.into(), policy);
        if !first.allowed {
            first.block("forbidden by the policy (RLX_DEVICES, RLX_DENY_DEVICES)".to_owned());
        }
        let probe = match backends.probe(kind) {
            Ok(probe) => probe,
            Err(_) => {
                first.block("this build has no backend for it".to_owned());
                rows.push(first);
                continue;
            }
        };
        first.registered = true;
        match probe {
            DeviceProbe::Present(count) => rows.extend((0..count.max(1)).map(|index| {
                let device = DeviceId { kind, index };
                let mut row = DeviceCandidate { device, available: count > 0, ..first.clone() };
                if count == 0 {
                    row.block("the machine has none".to_owned());
                }
                row
            })),
            DeviceProbe::Absent(reason) => {
                first.block(reason);
                rows.push(first);
            }
        }
    }
    rows
}

/// A row for every kind of device, without a graph: what is there, what it can do, what blocks it. The first that nothing blocks is
/// recommended, in the policy's order of preference.
pub fn device_report(
    backends: &BackendRegistry,
    policy: &DevicePolicy,
    config: &Config,
) -> Vec<DeviceCandidate> {
    let mut rows = rows(backends, policy);
    for row in rows.iter_mut().filter(|row| row.available && row.allowed) {
        match backends.open(row.device, config) {
            Ok(backend) => {
                row.capabilities = backend.capabilities();
                row.free_bytes = backend.free_bytes();
            }
            Err(error) => {
                row.available = false;
                row.block(error.to_string());
            }
        }
    }
    let kinds = |kind: Device| Device::ALL.iter().position(|&k| k == kind).unwrap_or(usize::MAX);
    if let Some(row) = rows.iter_mut().find(|row| row.is_viable()) {
        row.recommended = true;
    }
    rows.sort_by_key(|row| (kinds(row.device.kind), row.device.index));
    rows
}
