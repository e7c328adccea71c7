//! Which backends a process has, and which devices they see.

use super::cpu::{CpuBackend, Precision};
use super::reference::ReferenceBackend;
use super::{Backend, BackendError, contain};
use crate::config::Config;
use crate::devices::{Device, DeviceError, DeviceId};
use crate::memory::{MemoryView, SystemProbe};
use crate::session::{SessionError, cpu_backend_of};
use rlx_kernels::isa::{CpuFeatures, Isa};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// What a backend sees of the devices of its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceProbe {
    /// This many devices, numbered from 0.
    Present(u32),
    /// None can be used now, and why: no driver, no such hardware.
    Absent(String),
}

/// Makes the backends of one kind of device. A crate outside this one adds a kind with [`register_backend`].
pub trait BackendProvider: Send + Sync {
    /// The kind.
    fn kind(&self) -> Device;

    /// The devices there are now. Called again whenever a report is made, so a device that was lost may come back.
    fn probe(&self) -> DeviceProbe;

    /// Whether the device is a program that computes on the CPU, as drivers for machines without a card are: it is never worth more than the
    /// CPU's own backend, so it is taken only where it is asked for.
    fn is_software(&self, index: u32) -> bool {
        let _ = index;
        false
    }

    /// Opens a device, set up as `config` says.
    ///
    /// # Errors
    /// Whatever keeps the device from being used; [`BackendError::Lost`] if it has gone since the last probe.
    fn open(&self, index: u32, config: &Config) -> Result<Arc<dyn Backend>, SessionError>;

    /// The precision of a checkpoint of bf16 where none is asked for: bf16 of a device that multiplies such operands faster.
    fn precision_of_bf16(&self, index: u32) -> Precision {
        let _ = index;
        Precision::F32
    }
}

/// The backends that can be opened, by kind.
#[derive(Clone)]
pub struct BackendRegistry {
    providers: Arc<RwLock<BTreeMap<Device, Arc<dyn BackendProvider>>>>,
}

impl Default for BackendRegistry {
    /// The backends of this crate: the CPU, and the reference evaluation.
    fn default() -> Self {
        let registry = BackendRegistry::empty();
        registry.replace(Arc::new(CpuProvider));
        registry.replace(Arc::new(ReferenceProvider));
        registry
    }
}

impl BackendRegistry {
    /// No backends.
    pub fn empty() -> Self {
        BackendRegistry { providers: Arc::default() }
    }

    /// The process's registry, to which [`register_backend`] adds.
    pub fn global() -> &'static BackendRegistry {
        static GLOBAL: OnceLock<BackendRegistry> = OnceLock::new();
        GLOBAL.get_or_init(BackendRegistry::default)
    }

    /// Adds a backend.
    ///
    /// # Errors
    /// [`DeviceError::AlreadyRegistered`] if the kind has one; [`BackendRegistry::replace`] is for that.
    pub fn register(&self, provider: Arc<dyn BackendProvider>) -> Result<(), DeviceError> {
        let mut providers = self.providers.write().unwrap_or_else(PoisonError::into_inner);
        let kind = provider.kind();
        if providers.contains_key(&kind) {
            return Err(DeviceError::AlreadyRegistered { kind });
        }
        providers.insert(kind, provider);
        Ok(())
    }

    /// Adds a backend, in place of the one that the kind had.
    pub fn replace(&self, provider: Arc<dyn BackendProvider>) {
        let mut providers = self.providers.write().unwrap_or_else(PoisonError::into_inner);
        providers.insert(provider.kind(), provider);
    }

    /// Kinds that have a backend, those for tests left out.
    pub fn kinds(&self) -> Vec<Device> {
        Device::ALL.into_iter().filter(|&kind| self.provider(kind).is_some()).collect()
    }

    /// Whether the kind has a backend.
    pub fn has(&self, kind: Device) -> bool {
        self.provider(kind).is_some()
    }

    fn provider(&self, kind: Device) -> Option<Arc<dyn BackendProvider>> {
        self.providers.read().unwrap_or_else(PoisonError::into_inner).get(&kind).cloned()
    }

    /// The devices of a kind, asked for now. A backend that panics while it looks has none.
    ///
    /// # Errors
    /// [`DeviceError::NotBuilt`] for a kind without a backend.
    pub fn probe(&self, kind: Device) -> Result<DeviceProbe, DeviceError> {
        let Some(provider) = self.provider(kind) else {
            return Err(DeviceError::NotBuilt { device: kind.into(), present: self.kinds() });
        };
        Ok(contain(|| Ok(provider.probe())).unwrap_or_else(|error| DeviceProbe::Absent(error.to_string())))
    }

    /// The devices beside the CPU that compute by themselves, asked for now: not those that [`BackendProvider::is_software`].
    pub fn accelerators(&self) -> Vec<DeviceId> {
        let mut found = Vec::new();
        for kind in self.kinds().into_iter().filter(|&kind| kind != Device::Cpu) {
            let (Ok(DeviceProbe::Present(count)), Some(provider)) = (self.probe(kind), self.provider(kind))
            else {
                continue;
            };
            let own = |index: &u32| contain(|| Ok(!provider.is_software(*index))).unwrap_or(false);
            found.extend((0..count).filter(own).map(|index| DeviceId { kind, index }));
        }
        found
    }

    /// The precision that a device has for a checkpoint of bf16 where none is asked for; f32 of one that cannot be used.
    pub fn precision_of_bf16(&self, device: DeviceId) -> Precision {
        let Some(provider) = self.provider(device.kind) else { return Precision::F32 };
        contain(|| Ok(provider.precision_of_bf16(device.index))).unwrap_or_default()
    }

    /// Opens a device.
    ///
    /// # Errors
    /// [`DeviceError::NotBuilt`], [`DeviceError::NoSuchIndex`], [`DeviceError::Absent`] (as [`SessionError::Device`]), and whatever
    /// the backend says.
    pub fn open(&self, device: DeviceId, config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
        let Some(provider) = self.provider(device.kind) else {
            return Err(DeviceError::NotBuilt { device, present: self.kinds() }.into());
        };
        match self.probe(device.kind)? {
            DeviceProbe::Present(count) if device.index < count => {}
            DeviceProbe::Present(count) => return Err(DeviceError::NoSuchIndex { device, count }.into()),
            DeviceProbe::Absent(reason) => return Err(DeviceError::Absent { device, reason }.into()),
        }
        let mut failure = None;
        let opened = contain(|| match provider.open(device.index, config) {
            Ok(backend) => Ok(Some(backend)),
            Err(error) => {
                failure = Some(error);
                Ok(None)
            }
        })?;
        match (opened, failure) {
            (Some(backend), _) => Ok(backend),
            (None, Some(error)) => Err(error),
            (None, None) => Err(BackendError::Lost { reason: format!("{device} did not open") }.into()),
        }
    }
}

/// Adds a backend to the process's registry: from then on `Session::new`, `GraphDevices` and the command line know it.
///
/// # Errors
/// [`DeviceError::AlreadyRegistered`].
pub fn register_backend(provider: Arc<dyn BackendProvider>) -> Result<(), DeviceError> {
    BackendRegistry::global().register(provider)
}

/// The CPU of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuProvider;

impl BackendProvider for CpuProvider {
    fn kind(&self) -> Device {
        Device::Cpu
    }

    fn probe(&self) -> DeviceProbe {
        DeviceProbe::Present(1)
    }

    fn open(&self, _index: u32, config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
        let backend: CpuBackend = cpu_backend_of(config)?;
        Ok(Arc::new(backend))
    }

    fn precision_of_bf16(&self, _index: u32) -> Precision {
        let has = CpuFeatures::detect().avx512_bf16;
        if Isa::detect() == Isa::Avx512 && has { Precision::Bf16 } else { Precision::F32 }
    }
}

/// The reference evaluation as a device, for tests and comparisons. It is never chosen unless it is asked for by name.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReferenceProvider;

impl BackendProvider for ReferenceProvider {
    fn kind(&self) -> Device {
        Device::Reference
    }

    fn probe(&self) -> DeviceProbe {
        DeviceProbe::Present(1)
    }

    fn open(&self, _index: u32, _config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
        Ok(Arc::new(ReferenceBackend::default()))
    }
}

/// Memory that a backend of the host may still take, as the process's settings limit it.
pub(super) fn host_headroom() -> Option<u64> {
    MemoryView::new(&SystemProbe, Config::global().ok()?).headroom_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken;

    impl BackendProvider for Broken {
        fn kind(&self) -> Device {
            Device::Rocm
        }

        fn probe(&self) -> DeviceProbe {
            panic!("the driver is of another version")
        }

        fn open(&self, _index: u32, _config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
            Ok(Arc::new(ReferenceBackend::default()))
        }
    }

    #[test]
    fn a_kind_has_one_backend_unless_it_is_replaced() {
        let registry = BackendRegistry::default();
        assert_eq!(registry.kinds(), [Device::Cpu]);
        let again = registry.register(Arc::new(CpuProvider));
        assert_eq!(again, Err(DeviceError::AlreadyRegistered { kind: Device::Cpu }));
        registry.replace(Arc::new(CpuProvider));
        assert!(registry.has(Device::Reference) && !registry.has(Device::Cuda));
    }

    struct Cards;

    impl BackendProvider for Cards {
        fn kind(&self) -> Device {
            Device::Gpu
        }

        fn probe(&self) -> DeviceProbe {
            DeviceProbe::Present(3)
        }

        fn is_software(&self, index: u32) -> bool {
            index == 1
        }

        fn open(&self, index: u32, _config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
            panic!("device {index} need not be opened")
        }
    }

    #[test]
    fn devices_that_compute_in_software_are_no_accelerators() {
        let registry = BackendRegistry::default();
        assert_eq!(registry.accelerators(), []);
        registry.register(Arc::new(Broken)).unwrap();
        registry.register(Arc::new(Cards)).unwrap();
        let gpu = |index| DeviceId { kind: Device::Gpu, index };
        assert_eq!(registry.accelerators(), [gpu(0), gpu(2)]);
    }

    #[test]
    fn a_backend_that_panics_while_it_looks_has_no_devices() {
        let registry = BackendRegistry::default();
        registry.register(Arc::new(Broken)).unwrap();
        let DeviceProbe::Absent(reason) = registry.probe(Device::Rocm).unwrap() else { panic!("present") };
        assert!(reason.contains("the driver is of another version"), "{reason}");
        let error = registry.open(Device::Rocm.into(), &Config::default()).map(drop).unwrap_err();
        assert!(error.to_string().contains("the driver is of another version"), "{error}");
        assert!(error.is_device_fault());
    }
}
