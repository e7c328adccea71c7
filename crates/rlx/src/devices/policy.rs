//! Which devices may be used, and which one is.

use super::id::{Device, DeviceId};
use crate::config::Config;

/// What the user allows. A preference never overrides a ban.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DevicePolicy {
    only: Option<Vec<Device>>,
    deny: Vec<Device>,
    prefer: Vec<Device>,
}

impl DevicePolicy {
    /// Every kind is allowed.
    pub fn all() -> DevicePolicy {
        DevicePolicy::default()
    }

    /// Only these kinds are allowed.
    pub fn only(kinds: impl IntoIterator<Item = Device>) -> DevicePolicy {
        DevicePolicy { only: Some(kinds.into_iter().collect()), ..DevicePolicy::default() }
    }

    /// Forbids `kind`.
    pub fn with_deny(mut self, kind: Device) -> DevicePolicy {
        self.deny.push(kind);
        self
    }

    /// Takes `kind` before others, after those preferred already.
    pub fn with_prefer(mut self, kind: Device) -> DevicePolicy {
        self.prefer.push(kind);
        self
    }

    /// The policy that `RLX_DEVICES`, `RLX_DENY_DEVICES` and `RLX_PREFER_DEVICES` describe.
    pub fn from_config(config: &Config) -> DevicePolicy {
        DevicePolicy {
            only: config.devices.clone(),
            deny: config.deny_devices.clone().unwrap_or_default(),
            prefer: config.prefer_devices.clone().unwrap_or_default(),
        }
    }

    /// Whether `kind` may be used.
    pub fn allows(&self, kind: Device) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&kind)) && !self.deny.contains(&kind)
    }

    /// The kinds in the order of preference.
    pub fn ranked(&self) -> Vec<Device> {
        let mut kinds = Device::ALL.to_vec();
        let rank = |kind: &Device| self.prefer.iter().position(|p| p == kind).unwrap_or(usize::MAX);
        kinds.sort_by_key(rank);
        kinds
    }
}

/// Why a device cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No backend of this build serves the kind.
    #[error("this build has no backend for {device}; it has: {}", list(present))]
    NotBuilt {
        /// The device asked for.
        device: DeviceId,
        /// The kinds of this build.
        present: Vec<Device>,
    },
    /// The machine has fewer devices of this kind.
    #[error("there is no device {device}: the only {} is {}", device.kind, DeviceId::from(device.kind))]
    NoSuchIndex {
        /// The device asked for.
        device: DeviceId,
    },
    /// The policy forbids the kind.
    #[error("{device} is forbidden by RLX_DEVICES or RLX_DENY_DEVICES")]
    Forbidden {
        /// The device asked for.
        device: DeviceId,
    },
    /// No device of the chain, or none at all, can be used.
    #[error("no device can be used; tried {}", list(tried))]
    NoneViable {
        /// What was tried.
        tried: Vec<DeviceId>,
    },
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// Whether `device` can be used: built in, present, allowed.
///
/// `present` are the kinds that this build has a backend for.
fn check(device: DeviceId, policy: &DevicePolicy, present: &[Device]) -> Result<(), DeviceError> {
    if !present.contains(&device.kind) {
        return Err(DeviceError::NotBuilt { device, present: present.to_vec() });
    }
    if device.kind == Device::Cpu && device.index > 0 {
        return Err(DeviceError::NoSuchIndex { device });
    }
    if policy.allows(device.kind) { Ok(()) } else { Err(DeviceError::Forbidden { device }) }
}

/// The device to run on: `hint`, else `RLX_DEVICE`, else the first viable of `RLX_DEVICE_CHAIN`, else the first viable kind in
/// the order of preference.
///
/// `present` are the kinds that this build has a backend for. A hint or setting that is not viable is an error, never a
/// fall-through.
pub fn resolve_device(
    hint: Option<DeviceId>,
    config: &Config,
    present: &[Device],
) -> Result<DeviceId, DeviceError> {
    let policy = DevicePolicy::from_config(config);
    if let Some(device) = hint.or(config.device) {
        return check(device, &policy, present).map(|()| device);
    }
    let ranked = || policy.ranked().into_iter().filter(|kind| present.contains(kind)).map(DeviceId::from);
    let tried = config.device_chain.clone().unwrap_or_else(|| ranked().collect());
    let viable = tried.iter().find(|&&device| check(device, &policy, present).is_ok());
    viable.copied().ok_or(DeviceError::NoneViable { tried })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUDA_1: DeviceId = DeviceId { kind: Device::Cuda, index: 1 };
    const BOTH: &[Device] = &[Device::Cpu, Device::Cuda];

    #[test]
    fn a_ban_beats_a_preference() {
        let policy = DevicePolicy::all().with_prefer(Device::Cuda).with_deny(Device::Cuda);
        assert!(!policy.allows(Device::Cuda) && policy.allows(Device::Cpu));
        assert_eq!(policy.ranked()[0], Device::Cuda);
        assert!(!DevicePolicy::only([Device::Cuda]).allows(Device::Cpu));
        let config = Config {
            prefer_devices: Some(vec![Device::Cuda]),
            deny_devices: Some(vec![Device::Cuda]),
            ..Config::default()
        };
        assert_eq!(resolve_device(None, &config, BOTH), Ok(DeviceId::CPU));
    }

    #[test]
    fn the_call_comes_before_the_setting_before_the_chain() {
        let mut config = Config { device_chain: Some(vec![CUDA_1, DeviceId::CPU]), ..Config::default() };
        assert_eq!(resolve_device(None, &config, &[Device::Cpu]), Ok(DeviceId::CPU));
        assert_eq!(resolve_device(None, &config, BOTH), Ok(CUDA_1));
        config.device = Some(DeviceId::CPU);
        assert_eq!(resolve_device(None, &config, BOTH), Ok(DeviceId::CPU));
        assert_eq!(resolve_device(Some(CUDA_1), &config, BOTH), Ok(CUDA_1));
    }

    #[test]
    fn a_choice_that_cannot_be_met_is_an_error() {
        let deny = |kind| Config { deny_devices: Some(vec![kind]), ..Config::default() };
        let only_cpu = &[Device::Cpu];
        let not_built = DeviceError::NotBuilt { device: CUDA_1, present: only_cpu.to_vec() };
        assert_eq!(resolve_device(Some(CUDA_1), &Config::default(), only_cpu), Err(not_built.clone()));
        let set = Config { device: Some(CUDA_1), ..Config::default() };
        assert_eq!(resolve_device(None, &set, only_cpu), Err(not_built));
        let forbidden = Err(DeviceError::Forbidden { device: DeviceId::CPU });
        assert_eq!(resolve_device(Some(DeviceId::CPU), &deny(Device::Cpu), only_cpu), forbidden);
        let none = Err(DeviceError::NoneViable { tried: vec![DeviceId::CPU] });
        assert_eq!(resolve_device(None, &deny(Device::Cpu), only_cpu), none);
        let second = DeviceId { kind: Device::Cpu, index: 1 };
        let error = resolve_device(Some(second), &Config::default(), only_cpu).expect_err("there is one CPU");
        assert_eq!(error.to_string(), "there is no device cpu:1: the only cpu is cpu");
    }
}
