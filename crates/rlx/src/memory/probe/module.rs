//! The memory of a WebAssembly module: what 32-bit addresses reach, of which it has grown to a part.

use super::{CgroupMemory, MemoryProbe};

const PAGE_BYTES: u64 = 64 << 10;
const ADDRESS_BYTES: u64 = 1 << 32;

/// The module that this code is part of. What its host would refuse earlier is unknown to it.
#[derive(Debug, Clone, Copy, Default)]
pub struct ModuleProbe;

impl MemoryProbe for ModuleProbe {
    fn physical_bytes(&self) -> Option<u64> {
        Some(ADDRESS_BYTES)
    }

    fn available_bytes(&self) -> Option<u64> {
        self.rss_bytes().map(|held| ADDRESS_BYTES.saturating_sub(held))
    }

    fn cgroup(&self) -> Option<CgroupMemory> {
        None
    }

    fn rss_bytes(&self) -> Option<u64> {
        Some(std::arch::wasm32::memory_size(0) as u64 * PAGE_BYTES)
    }

    /// A module's memory never shrinks.
    fn peak_rss_bytes(&self) -> Option<u64> {
        self.rss_bytes()
    }
}
