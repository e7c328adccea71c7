//! What a setting's value may be, and how its text is read.

use super::ConfigError;
use crate::devices::{Device, DeviceId};
use rlx_kernels::gemm::Precision;
use rlx_kernels::isa::Isa;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

/// What is wrong with a value, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct InvalidValue {
    /// What was expected.
    pub reason: String,
}

impl From<String> for InvalidValue {
    fn from(reason: String) -> Self {
        InvalidValue { reason }
    }
}

pub(super) trait SettingValue: Sized {
    /// What a value looks like, for help.
    const KIND: &'static str;

    fn read(text: &OsStr) -> Result<Self, InvalidValue>;
}

pub(super) fn read<T: SettingValue>(
    variable: &dyn Fn(&str) -> Option<OsString>,
    name: &str,
) -> Result<Option<T>, ConfigError> {
    match variable(name).filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => T::read(&text).map(Some).map_err(|invalid| ConfigError {
            variable: name.to_owned(),
            text: text.to_string_lossy().into_owned(),
            invalid,
        }),
    }
}

/// A number of bytes.
///
/// Read as a number and a unit: `B` or none, binary `KiB MiB GiB TiB`, decimal `kB MB GB TB`; case does not matter, a
/// fraction may have a unit (`1.5GiB`). A unit such as `12G` is refused, because programs disagree on its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteSize(pub u64);

const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
];

impl FromStr for ByteSize {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let text = text.trim();
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let unit = unit.trim().to_ascii_lowercase();
        let expected = || "expected a number of bytes with a unit: B, KiB, MiB, GiB, TiB, kB, MB, GB or TB";
        let Some(&(_, factor)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("unknown unit {unit:?}; {}", expected()).into());
        };
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(factor),
            Err(_) if factor > 1 && number.contains('.') => {
                let value = number.parse::<f64>().map_err(|_| InvalidValue::from(expected().to_owned()))?;
                let bytes = value * factor as f64;
                (bytes < u64::MAX as f64).then_some(bytes as u64)
            }
            Err(_) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => None,
            Err(_) => return Err(expected().to_owned().into()),
        };
        bytes.map(ByteSize).ok_or_else(|| "more than 2^64 bytes".to_owned().into())
    }
}

impl fmt::Display for ByteSize {
    /// In MiB with two decimals, or in bytes below a tenth of a MiB.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / (1u64 << 20) as f64;
        let text = if mib < 0.1 { format!("{} B", self.0) } else { format!("{mib:.2} MiB") };
        f.pad(&text)
    }
}

/// A share above 0 and at most 1.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Fraction(f64);

impl Fraction {
    /// `value` if it is above 0 and at most 1.
    pub fn new(value: f64) -> Option<Fraction> {
        (value > 0.0 && value <= 1.0).then_some(Fraction(value))
    }

    /// The number.
    pub fn value(self) -> f64 {
        self.0
    }
}

impl FromStr for Fraction {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let parsed = text.trim().parse().ok().and_then(Fraction::new);
        parsed.ok_or_else(|| "expected a number above 0 and at most 1".to_owned().into())
    }
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch(pub bool);

impl FromStr for Switch {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        match text.trim().to_ascii_lowercase().as_str() {
            "1" | "true" | "yes" | "on" => Ok(Switch(true)),
            "0" | "false" | "no" | "off" => Ok(Switch(false)),
            _ => Err("expected 1, true, yes, on or 0, false, no, off".to_owned().into()),
        }
    }
}

fn utf8(text: &OsStr) -> Result<&str, InvalidValue> {
    text.to_str().ok_or_else(|| "not valid UTF-8".to_owned().into())
}

macro_rules! from_text {
    ($($kind:ty: $shape:literal;)+) => {$(
        impl SettingValue for $kind {
            const KIND: &'static str = $shape;

            fn read(text: &OsStr) -> Result<Self, InvalidValue> {
                utf8(text)?.parse().map_err(|error| InvalidValue::from(format!("{error}")))
            }
        }
    )+};
}

from_text! {
    ByteSize: "bytes, such as 12GiB";
    Fraction: "number in (0, 1]";
    Switch: "0 or 1";
    DeviceId: "device";
    Precision: "f32 or bf16";
    Isa: "scalar, simd128, neon, avx2 or avx512";
}

impl SettingValue for PathBuf {
    const KIND: &'static str = "path";

    fn read(text: &OsStr) -> Result<Self, InvalidValue> {
        Ok(text.into())
    }
}

impl SettingValue for NonZeroUsize {
    const KIND: &'static str = "whole number from 1";

    fn read(text: &OsStr) -> Result<Self, InvalidValue> {
        let parsed = utf8(text)?.trim().parse();
        parsed.map_err(|_| format!("expected a {}", Self::KIND).into())
    }
}

impl SettingValue for Vec<Device> {
    const KIND: &'static str = "kinds of device, separated by commas";

    fn read(text: &OsStr) -> Result<Self, InvalidValue> {
        list(text)
    }
}

impl SettingValue for Vec<DeviceId> {
    const KIND: &'static str = "devices, separated by commas";

    fn read(text: &OsStr) -> Result<Self, InvalidValue> {
        list(text)
    }
}

fn list<T: FromStr<Err: fmt::Display>>(text: &OsStr) -> Result<Vec<T>, InvalidValue> {
    let items = utf8(text)?.split(',').map(|item| item.trim().parse());
    items.map(|item| item.map_err(|error: T::Err| InvalidValue::from(error.to_string()))).collect()
}
