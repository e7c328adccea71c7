//! The settings: one table, from which environment names, help and documentation derive.
//!
//! Precedence is call argument, flag, environment, default. The environment is read once, here. Code takes values from the
//! [`Config`] it is given; a program lays its flags over [`Config::global`].

mod value;

use crate::devices::{Device, DeviceId};
use crate::import::hf::HfCacheDirs;
use rlx_kernels::gemm::Precision;
use rlx_kernels::isa::Isa;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::OnceLock;
use value::SettingValue;
pub use value::{ByteSize, Fraction, InvalidValue, Switch};

/// One row of the settings table.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The field of [`Config`].
    pub field: &'static str,
    /// The environment variable.
    pub variable: &'static str,
    /// What a value looks like.
    pub kind: &'static str,
    /// What holds where the variable is unset or empty.
    pub default: &'static str,
    /// What it decides.
    pub doc: &'static str,
}

macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $field:ident: $kind:ty, $variable:literal, default $default:literal;)+) => {
        /// The values of all settings. `None`: unset, so the default that the table names holds.
        #[derive(Debug, Clone, Default, PartialEq)]
        #[non_exhaustive]
        pub struct Config {
            $($(#[doc = $doc])+ pub $field: Option<$kind>,)+
        }

        /// The settings table.
        pub const SETTINGS: &[Setting] = &[$(Setting {
            field: stringify!($field),
            variable: $variable,
            kind: <$kind as SettingValue>::KIND,
            default: $default,
            doc: concat!($($doc),+),
        }),+];

        impl Config {
            /// Reads every setting through `variable`, which gives an environment variable's value. An empty value is unset.
            pub fn from_env(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Config, ConfigError> {
                Ok(Config { $($field: value::read(variable, $variable)?,)+ })
            }
        }
    };
}

settings! {
    /// Device to run on. One that cannot run the model is an error, never a fall-through.
    device: DeviceId, "RLX_DEVICE", default "chosen by cost";
    /// Kinds of device that may be used at all.
    devices: Vec<Device>, "RLX_DEVICES", default "all";
    /// Kinds of device that must not be used.
    deny_devices: Vec<Device>, "RLX_DENY_DEVICES", default "none";
    /// Kinds of device to take first where several would do.
    prefer_devices: Vec<Device>, "RLX_PREFER_DEVICES", default "none";
    /// Devices to try in turn; the first that can run the model is taken, and where it fails, in mid-run too, the next goes on.
    device_chain: Vec<DeviceId>, "RLX_DEVICE_CHAIN", default "none";
    /// Choose devices by this many measured runs instead of by the cost model.
    benchmark_pick: NonZeroUsize, "RLX_BENCHMARK_PICK", default "off";
    /// Share of the memory, physical or the control group's, that may be used.
    soft_memory_fraction: Fraction, "RLX_SOFT_MEMORY_FRACTION", default "0.80";
    /// Memory that may be used, instead of a fraction.
    soft_memory_budget_bytes: ByteSize, "RLX_SOFT_MEMORY_BUDGET_BYTES", default "the fraction";
    /// Peak to assume for a decoder compiled for one length bucket, instead of the plan's.
    decode_bucket_peak_bytes: ByteSize, "RLX_DECODE_BUCKET_PEAK_BYTES", default "from the plan";
    /// Peak to assume for a decoder compiled for its full length, instead of the plan's.
    decode_oneshot_peak_bytes: ByteSize, "RLX_DECODE_ONESHOT_PEAK_BYTES", default "from the plan";
    /// Worker threads of a run.
    threads: NonZeroUsize, "RLX_THREADS", default "the CPUs granted to the process";
    /// Instruction set of the CPU kernels.
    isa: Isa, "RLX_ISA", default "the best this CPU has";
    /// Precision of matrix products.
    precision: Precision, "RLX_PRECISION", default "bf16 for a bf16 checkpoint where the device has it, else f32";
    /// Time schedules of products, attention and experts on a GPU when a model is loaded, once for each kind; the cache folder keeps what was found.
    gpu_tune: Switch, "RLX_GPU_TUNE", default "off";
    /// Leave products of many rows on an NVIDIA card to cuBLASLt. It is fast, and gives a row other bits among other numbers of rows.
    cuda_blas: Switch, "RLX_CUDA_BLAS", default "off";
    /// Folder of packed weights and plans that later runs map.
    cache_dir: PathBuf, "RLX_CACHE_DIR", default "rlx in the user's cache folder";
    /// Size limit of that folder; 0 turns the cache off.
    cache_bytes: ByteSize, "RLX_CACHE_BYTES", default "10GiB";
    /// Hugging Face cache: the folder that holds the repositories.
    hf_hub_cache: PathBuf, "HF_HUB_CACHE", default "hub in HF_HOME";
    /// Hugging Face folder.
    hf_home: PathBuf, "HF_HOME", default "huggingface in the user's cache folder";
    /// Never fetch, and never suggest that something could be fetched now.
    hf_hub_offline: Switch, "HF_HUB_OFFLINE", default "off";
    /// The user's cache folder.
    xdg_cache_home: PathBuf, "XDG_CACHE_HOME", default ".cache in HOME";
    /// The user's folder.
    home: PathBuf, "HOME", default "USERPROFILE";
    /// The user's folder on Windows.
    user_profile: PathBuf, "USERPROFILE", default "none";
}

/// An environment variable whose value does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}={text:?}: {invalid}")]
pub struct ConfigError {
    /// The variable.
    pub variable: String,
    /// Its value.
    pub text: String,
    /// What is wrong with it.
    pub invalid: InvalidValue,
}

impl Config {
    /// The settings of the process's environment, read at the first call.
    pub fn global() -> Result<&'static Config, ConfigError> {
        static GLOBAL: OnceLock<Result<Config, ConfigError>> = OnceLock::new();
        GLOBAL.get_or_init(|| Config::from_env(&|name| std::env::var_os(name))).as_ref().map_err(Clone::clone)
    }

    /// Variables of the process's environment that are named `RLX_*` and are no setting: most likely misspelt.
    pub fn unknown_variables() -> Vec<String> {
        unknown_among(std::env::vars_os().map(|(name, _)| name))
    }

    /// Where the Hugging Face cache may be.
    pub fn hf_cache_dirs(&self) -> HfCacheDirs {
        HfCacheDirs {
            hf_hub_cache: self.hf_hub_cache.clone(),
            hf_home: self.hf_home.clone(),
            xdg_cache_home: self.xdg_cache_home.clone(),
            home: self.home.clone().or_else(|| self.user_profile.clone()),
        }
    }

    /// Whether fetching is out of the question.
    pub fn offline(&self) -> bool {
        self.hf_hub_offline.is_some_and(|switch| switch.0)
    }

    /// Rules fetching out.
    pub fn set_offline(&mut self) {
        self.hf_hub_offline = Some(Switch(true));
    }

    /// The folder of compiled artefacts; `None` where no variable leads to one.
    pub fn cache_folder(&self) -> Option<PathBuf> {
        let home = || self.home.as_ref().or(self.user_profile.as_ref());
        let user_cache = || self.xdg_cache_home.clone().or_else(|| Some(home()?.join(".cache")));
        self.cache_dir.clone().or_else(|| Some(user_cache()?.join("rlx")))
    }

    /// The table as help text: the settings of this program, one paragraph each.
    pub fn help() -> String {
        let mut text = String::new();
        for setting in SETTINGS.iter().filter(|setting| setting.variable.starts_with("RLX_")) {
            let Setting { variable, kind, default, doc, .. } = setting;
            let _ = writeln!(text, "  {variable}\n         {} [{kind}; default: {default}]", doc.trim());
        }
        text
    }

    /// The table as Markdown.
    pub fn markdown() -> String {
        let mut text = "| variable | value | default | decides |\n|---|---|---|---|\n".to_owned();
        for Setting { variable, kind, default, doc, .. } in SETTINGS {
            let _ = writeln!(text, "| `{variable}` | {kind} | {default} | {} |", doc.trim());
        }
        text
    }
}

fn unknown_among(names: impl Iterator<Item = OsString>) -> Vec<String> {
    let known = |name: &str| SETTINGS.iter().any(|setting| setting.variable == name);
    let names = names.map(|name| name.to_string_lossy().into_owned());
    let mut unknown: Vec<String> =
        names.filter(|n| n.starts_with("RLX_") && !n.starts_with("RLX_TEST_") && !known(n)).collect();
    unknown.sort();
    unknown
}

#[cfg(test)]
mod tests;
