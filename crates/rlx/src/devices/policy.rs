//! Which devices may be used, and which one is.

use super::id::{Device, DeviceId};
use crate::config::{Config, ConfigError};
use std::fmt;
use std::num::NonZeroUsize;

/// How a device is picked among several that would do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DevicePickStrategy {
    /// By the time the cost model predicts.
    #[default]
    CostModel,
    /// By the median of this many measured runs, where inputs to measure with are given.
    Benchmark {
        /// Measured runs on each device.
        runs: NonZeroUsize,
    },
}

/// What the user allows. A preference never overrides a ban.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DevicePolicy {
    only: Option<Vec<Device>>,
    deny: Vec<Device>,
    prefer: Vec<Device>,
    pick: DevicePickStrategy,
}

impl fmt::Display for DevicePolicy {
    /// One line that differs wherever two policies differ: part of keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sorted = |kinds: &[Device]| {
            let mut kinds = kinds.to_vec();
            kinds.sort();
            kinds.dedup();
            list(&kinds)
        };
        let only = self.only.as_deref().map_or("all".to_owned(), sorted);
        write!(f, "only [{only}] deny [{}] prefer [{}] ", sorted(&self.deny), list(&self.prefer))?;
        match self.pick {
            DevicePickStrategy::CostModel => f.write_str("by cost"),
            DevicePickStrategy::Benchmark { runs } => write!(f, "by {runs} runs"),
        }
    }
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

    /// Picks by measured runs where inputs are given; the cost model else.
    pub fn with_benchmark_pick(mut self, runs: NonZeroUsize) -> DevicePolicy {
        self.pick = DevicePickStrategy::Benchmark { runs };
        self
    }

    /// How a device is picked among those allowed.
    pub fn pick_strategy(&self) -> DevicePickStrategy {
        self.pick
    }

    /// The policy that the process's environment describes, see [`DevicePolicy::from_config`].
    ///
    /// # Errors
    /// A variable that does not parse, named with its text.
    pub fn from_env() -> Result<DevicePolicy, ConfigError> {
        Ok(Self::from_config(Config::global()?))
    }

    /// The policy that `RLX_DEVICES`, `RLX_DENY_DEVICES`, `RLX_PREFER_DEVICES` and `RLX_BENCHMARK_PICK` describe.
    pub fn from_config(config: &Config) -> DevicePolicy {
        DevicePolicy {
            only: config.devices.clone(),
            deny: config.deny_devices.clone().unwrap_or_default(),
            prefer: config.prefer_devices.clone().unwrap_or_default(),
            pick: match config.benchmark_pick {
                Some(runs) => DevicePickStrategy::Benchmark { runs },
                None => DevicePickStrategy::CostModel,
            },
        }
    }

    /// Place of `kind` among the preferred ones; `None` if it is not preferred.
    pub fn prefers(&self, kind: Device) -> Option<usize> {
        self.prefer.iter().position(|&k| k == kind)
    }

    /// Whether `kind` may be used.
    pub fn allows(&self, kind: Device) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&kind)) && !self.deny.contains(&kind)
    }

    /// Whether a choice may fall on `kind` without its being asked for: the reference evaluation only where the policy names it.
    pub fn considers(&self, kind: Device) -> bool {
        let named = || self.only.iter().flatten().chain(&self.prefer).any(|&k| k == kind);
        self.allows(kind) && (kind != Device::Reference || named())
    }

    /// The kinds in the order of preference.
    pub fn ranked(&self) -> Vec<Device> {
        let hidden = [Device::Reference].into_iter().filter(|&kind| self.considers(kind));
        let mut kinds: Vec<Device> = Device::ALL.into_iter().chain(hidden).collect();
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
    #[error("there is no device {device}: {}", how_many(*device, *count))]
    NoSuchIndex {
        /// The device asked for.
        device: DeviceId,
        /// How many there are.
        count: u32,
    },
    /// The machine has no device of this kind that can be used now.
    #[error("{device} cannot be used: {reason}")]
    Absent {
        /// The device asked for.
        device: DeviceId,
        /// Why.
        reason: String,
    },
    /// The kind has a backend already.
    #[error("{kind} has a backend already; replace it in the registry if that is meant")]
    AlreadyRegistered {
        /// The kind.
        kind: Device,
    },
    /// The device cannot run this graph.
    #[error("{device} is no candidate: {reason}; viable: {}", list_or_none(viable))]
    NotViable {
        /// The device asked for.
        device: DeviceId,
        /// Why.
        reason: String,
        /// The devices that can run it.
        viable: Vec<DeviceId>,
    },
    /// A list of devices to try has no entry.
    #[error("the chain of devices is empty: name at least one device")]
    EmptyChain,
    /// The policy forbids the kind.
    #[error("{device} is forbidden by the policy (RLX_DEVICES, RLX_DENY_DEVICES)")]
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

fn how_many(device: DeviceId, count: u32) -> String {
    match count {
        0 => format!("there is no {}", device.kind),
        1 => format!("the only {} is {}", device.kind, DeviceId::from(device.kind)),
        _ => format!("the machine has {count} of kind {}", device.kind),
    }
}

fn list_or_none(devices: &[DeviceId]) -> String {
    if devices.is_empty() { "none".to_owned() } else { list(devices) }
}

pub(super) fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// The devices that `RLX_DEVICE_CHAIN` of the process's environment names, in order; `None` where it is unset.
///
/// # Errors
/// A variable that does not parse, named with its text.
pub fn device_chain_from_env() -> Result<Option<Vec<DeviceId>>, ConfigError> {
    Ok(Config::global()?.device_chain.clone())
}

/// Whether `device` can be used: built in, present, allowed.
///
/// `present` are the kinds that this build has a backend for.
fn check(device: DeviceId, policy: &DevicePolicy, present: &[Device]) -> Result<(), DeviceError> {
    if !present.contains(&device.kind) {
        let present = present.iter().copied().filter(|&kind| kind != Device::Reference).collect();
        return Err(DeviceError::NotBuilt { device, present });
    }
    if device.kind == Device::Cpu && device.index > 0 {
        return Err(DeviceError::NoSuchIndex { device, count: 1 });
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
