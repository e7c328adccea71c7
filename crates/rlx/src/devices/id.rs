//! Names of devices, read by one parser.

use std::fmt;
use std::str::FromStr;

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Device {
    /// The processor and its memory.
    Cpu,
    /// Any graphics device through a portable interface (Vulkan, Metal, DX12, WebGPU).
    Gpu,
    /// NVIDIA through CUDA.
    Cuda,
    /// AMD through ROCm.
    Rocm,
    /// Apple through Metal.
    Metal,
    /// The reference evaluation of every op: slow, the oracle of tests. No report lists it and no choice falls on it unless it
    /// is named.
    Reference,
}

impl Device {
    /// Every kind of hardware, in the order of reports.
    pub const ALL: [Device; 5] = [Device::Cpu, Device::Gpu, Device::Cuda, Device::Rocm, Device::Metal];

    /// The name that reports and settings use.
    pub const fn name(self) -> &'static str {
        self.names()[0]
    }

    /// The name and its aliases, the name first.
    pub const fn names(self) -> &'static [&'static str] {
        match self {
            Device::Cpu => &["cpu", "host"],
            Device::Gpu => &["gpu", "wgpu", "vulkan", "dx12", "webgpu"],
            Device::Cuda => &["cuda", "nvidia"],
            Device::Rocm => &["rocm", "hip", "amd"],
            Device::Metal => &["metal", "mps", "apple"],
            Device::Reference => &["reference"],
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Device {
    type Err = UnknownDevice;

    /// Reads a name or an alias; case and surrounding blanks do not matter.
    fn from_str(text: &str) -> Result<Device, UnknownDevice> {
        let lower = text.trim().to_ascii_lowercase();
        let named = Device::ALL.into_iter().chain([Device::Reference]);
        named
            .into_iter()
            .find(|kind| kind.names().contains(&lower.as_str()))
            .ok_or_else(|| UnknownDevice { text: text.to_owned() })
    }
}

/// One device: a kind and its position among the devices of that kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId {
    /// The kind.
    pub kind: Device,
    /// Position among the devices of that kind, from 0.
    pub index: u32,
}

impl DeviceId {
    /// The processor.
    pub const CPU: DeviceId = DeviceId { kind: Device::Cpu, index: 0 };
}

impl From<Device> for DeviceId {
    fn from(kind: Device) -> DeviceId {
        DeviceId { kind, index: 0 }
    }
}

impl fmt::Display for DeviceId {
    /// `cpu`, `cuda:1`: the index is shown where it is not 0.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.index == 0 {
            return self.kind.fmt(f);
        }
        f.pad(&format!("{}:{}", self.kind.name(), self.index))
    }
}

impl FromStr for DeviceId {
    type Err = UnknownDevice;

    /// Reads `KIND` or `KIND:INDEX`.
    fn from_str(text: &str) -> Result<DeviceId, UnknownDevice> {
        let unknown = || UnknownDevice { text: text.to_owned() };
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => (kind, index.trim()),
            None => (text, "0"),
        };
        if !index.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(unknown());
        }
        let kind = kind.parse().map_err(|_| unknown())?;
        Ok(DeviceId { kind, index: index.parse().map_err(|_| unknown())? })
    }
}

/// A text that names no device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownDevice {
    /// The text.
    pub text: String,
}

impl fmt::Display for UnknownDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown device {:?}: expected", self.text)?;
        for (at, kind) in Device::ALL.into_iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma} {kind}")?;
            write!(f, " ({})", kind.names()[1..].join(", "))?;
        }
        f.write_str(", with :INDEX for another than the first of its kind")
    }
}

impl std::error::Error for UnknownDevice {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_reads_as_its_kind_and_names_are_unique() {
        let mut seen = std::collections::BTreeSet::new();
        for kind in Device::ALL {
            for name in kind.names() {
                assert!(seen.insert(*name), "{name} names two kinds");
                assert_eq!(name.parse(), Ok(kind));
                assert_eq!(format!(" {} ", name.to_uppercase()).parse(), Ok(kind));
            }
        }
    }

    #[test]
    fn what_is_shown_is_read_back() {
        for kind in Device::ALL {
            for index in [0, 1, 17] {
                let id = DeviceId { kind, index };
                assert_eq!(id.to_string().parse(), Ok(id));
            }
        }
        assert_eq!("nvidia:1".parse(), Ok(DeviceId { kind: Device::Cuda, index: 1 }));
        assert_eq!(DeviceId::CPU, Device::Cpu.into());
    }

    #[test]
    fn what_is_no_device_is_refused_with_the_names() {
        for text in ["", "tpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:1:2", ":1", "cuda:4294967296"]
        {
            let error = text.parse::<DeviceId>().expect_err(text).to_string();
            assert!(error.contains(&format!("{text:?}")) && error.contains("cuda (nvidia)"), "{error}");
        }
    }
}
