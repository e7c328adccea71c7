//! What a command works with: arguments laid over the environment, and standard error for what is no result.

use crate::args::Shared;
use crate::failure::{Failure, Result};
use rlx::backend::{BackendRegistry, DeviceProbe};
use rlx::config::Config;
use rlx::devices::{Device, DeviceError, DeviceId, DevicePolicy, resolve_device};
use rlx::memory::ResidentBytes;
use rlx_kernels::isa::Isa;
use rlx_kernels::pool::default_threads;
use std::io::IsTerminal as _;
use std::path::Path;

/// Kinds of device that this process has a backend for, the reference evaluation included.
pub fn present() -> Vec<Device> {
    let mut kinds = BackendRegistry::global().kinds();
    kinds.push(Device::Reference);
    kinds
}

/// Whether the machine has the device now.
fn is_found(device: DeviceId) -> bool {
    match BackendRegistry::global().probe(device.kind) {
        Ok(DeviceProbe::Present(count)) => device.index < count,
        Ok(_) => false,
        Err(_) => device == Device::Reference.into(),
    }
}

/// Arguments and settings of one invocation.
#[derive(Clone)]
pub struct Context {
    /// Arguments of every verb.
    pub shared: Shared,
    /// The environment's settings, the flags laid over them.
    pub config: Config,
    /// What was resident when the program began, where the system tells.
    pub started: Option<ResidentBytes>,
}

impl Context {
    /// Reads the environment. A setting that does not parse is bad use.
    pub fn new(shared: Shared, started: Option<ResidentBytes>) -> Result<Context> {
        let mut config = Config::global()?.clone();
        config.threads = shared.threads.or(config.threads);
        config.device = shared.device.or(config.device);
        config.precision = shared.precision.map(Into::into).or(config.precision);
        if shared.offline {
            config.set_offline();
        }
        Ok(Context { shared, config, started })
    }

    /// The device to run on.
    pub fn device(&self) -> Result<DeviceId> {
        Ok(self.choose_device()?)
    }

    /// The device to run on, or why the one that is asked for cannot be used. Of a chain, or of no device asked for, the first that
    /// the machine has.
    pub fn choose_device(&self) -> std::result::Result<DeviceId, DeviceError> {
        let (mut config, mut kinds) = (self.config.clone(), present());
        loop {
            let device = match resolve_device(None, &config, &kinds) {
                Err(DeviceError::NoneViable { tried }) => {
                    let tried = self.config.device_chain.clone().unwrap_or(tried);
                    return Err(DeviceError::NoneViable { tried });
                }
                other => other?,
            };
            if config.device.is_some() || is_found(device) {
                return Ok(device);
            }
            match &mut config.device_chain {
                Some(chain) => chain.retain(|&other| other != device),
                None => kinds.retain(|&kind| kind != device.kind),
            }
        }
    }

    /// The devices to go on with where the one to run on fails: those of the chain behind it, as far as the machine has them; the CPU, where another was
    /// taken by itself. None if one device is asked for.
    pub fn later_devices(&self, first: DeviceId) -> Vec<DeviceId> {
        let policy = DevicePolicy::from_config(&self.config);
        match (self.config.device, &self.config.device_chain) {
            (Some(_), _) => Vec::new(),
            (None, Some(chain)) => {
                let behind = chain.iter().skip_while(|device| **device != first).skip(1).copied();
                behind.filter(|&device| is_found(device) && policy.allows(device.kind)).collect()
            }
            (None, None) if first == DeviceId::CPU || !policy.considers(Device::Cpu) => Vec::new(),
            (None, None) => vec![DeviceId::CPU],
        }
    }

    /// Whether a device is to be chosen: none is asked for or preferred, and the machine has others than the CPU that are allowed and compute
    /// by themselves.
    pub fn has_choice(&self) -> bool {
        let config = &self.config;
        let asked =
            config.device.is_some() || config.device_chain.is_some() || config.prefer_devices.is_some();
        let policy = DevicePolicy::from_config(config);
        let allowed = |device: &DeviceId| policy.allows(device.kind);
        let chosen = !asked && BackendRegistry::global().accelerators().iter().any(allowed);
        if !asked && !chosen {
            let others =
                present().into_iter().filter(|kind| !matches!(kind, Device::Cpu | Device::Reference));
            for device in others.map(DeviceId::from).filter(|device| allowed(device) && is_found(*device)) {
                self.detail(format!(
                    "not on {device}: its driver computes in software; --device {device} takes it"
                ));
            }
        }
        chosen
    }

    /// The same invocation on these devices, the first that can.
    pub fn on_chain(&self, chain: Vec<DeviceId>) -> Context {
        let mut config = self.config.clone();
        (config.device, config.device_chain) = (None, Some(chain));
        Context { shared: self.shared.clone(), config, started: self.started }
    }

    /// Of the chain, devices before the one that was taken which the machine does not have, and why.
    pub fn passed_over(&self, taken: DeviceId) -> Vec<String> {
        let chain = self.config.device_chain.iter().flatten().filter(|_| self.config.device.is_none());
        let why = |device: &DeviceId| match BackendRegistry::global().probe(device.kind) {
            Ok(DeviceProbe::Present(count)) if device.index < count => None,
            Ok(DeviceProbe::Present(count)) => Some(format!("not on {device}: the machine has {count}")),
            Ok(DeviceProbe::Absent(reason)) => Some(format!("not on {device}: {reason}")),
            Err(_) => Some(format!("not on {device}: this build has no backend for it")),
        };
        chain.take_while(|device| **device != taken).filter_map(why).collect()
    }

    /// The same invocation, with no device asked for.
    pub fn without_device(&self) -> Context {
        let mut config = self.config.clone();
        (config.device, config.device_chain) = (Some(DeviceId::CPU), None);
        (config.devices, config.deny_devices) = (None, None);
        Context { shared: self.shared.clone(), config, started: self.started }
    }

    /// Worker threads of a run.
    pub fn threads(&self) -> usize {
        self.config.threads.map_or_else(|| default_threads(Path::new("/")), usize::from)
    }

    /// The instruction set of the CPU kernels. One that this machine lacks is bad use.
    pub fn isa(&self) -> Result<Isa> {
        let isa = self.config.isa.unwrap_or_else(Isa::detect);
        if isa.is_available() {
            return Ok(isa);
        }
        let names: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
        let advice = format!("unset it, or choose one of: {}", names.join(", "));
        Err(Failure::usage(format!("this machine has no {isa}"), "the variable RLX_ISA", advice))
    }

    /// Says something about the work on standard error.
    pub fn note(&self, text: impl AsRef<str>) {
        eprintln!("{}", text.as_ref());
    }

    /// Says something that only `-v` asks for.
    pub fn detail(&self, text: impl AsRef<str>) {
        if self.shared.verbose > 0 {
            self.note(text);
        }
    }

    /// Says something that only `-vv` asks for.
    pub fn trace(&self, text: impl FnOnce() -> String) {
        if self.shared.verbose > 1 {
            self.note(text());
        }
    }

    /// Whether a person watches standard error.
    pub fn watched(&self) -> bool {
        std::io::stderr().is_terminal()
    }
}
