//! Weights: [`WeightLoader`] reads them from a file, [`WeightRegistry`] holds each once for every executable.

mod bytes;
mod loader;
mod lora;
mod registry;
mod schedule;
mod slots;
mod storage;

pub use bytes::{LazyBytes, SharedBytes, WeightBytes};
pub use loader::{BytesWeightLoader, LoadError, TensorView, WeightLoader};
pub(crate) use loader::{NameTable, check_length};
pub use lora::LoraSide;
pub use registry::{
    Packed, PackedKey, PinGuard, RegistryError, StreamStats, WeightEntry, WeightHandle, WeightKind,
    WeightPlacement, WeightRegistry, WeightTotals,
};
