//! What a driver made of kernels, kept on disk, so that a later process need not have it made again.

use crate::ffi::trusted;
use rlx::aot::AotCache;
use rlx::aot::container::Stamp;
use std::sync::{Mutex, PoisonError};

/// The driver's cache of pipelines, with where it came from and goes to.
pub(super) struct Pipelines {
    pub cache: wgpu::PipelineCache,
    store: AotCache,
    stamp: Stamp,
    /// What is on disk.
    stored: Mutex<Vec<u8>>,
}

/// One entry holds all pipelines of an adapter.
const KEY: &[u8] = b"pipelines";

impl Pipelines {
    /// Whether the adapter has such caches.
    pub fn wanted(adapter: &wgpu::Adapter) -> wgpu::Features {
        adapter.features() & wgpu::Features::PIPELINE_CACHE
    }

    /// The pipelines that were kept for this adapter and version of its driver; `None` where it has no such caches.
    pub fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo, store: AotCache) -> Option<Self> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let driver = format!("{} {} {}", info.name, info.driver, info.driver_info);
        let stamp = Stamp {
            kind: "kernel".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            device: format!("gpu {:?} {driver}", info.backend),
            isa: wgpu::util::pipeline_cache_key(info).unwrap_or_default(),
            precision: String::new(),
            packing: [0; 32],
        };
        let known = store.kernel(&stamp, KEY);
        let cache = trusted::pipelines(device, known.as_deref());
        Some(Pipelines { cache, store, stamp, stored: Mutex::new(known.unwrap_or_default()) })
    }

    /// Writes what the driver has made since it was written last.
    pub fn keep(&self) {
        let Some(made) = self.cache.get_data() else { return };
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        if *stored != made && self.store.store_kernel(&self.stamp, KEY, &made) {
            *stored = made;
        }
    }
}
