//! What lies behind the lock of a registry: slots, names, storages and what they count.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use rlx_tensor::{Shape, byte_count};

use super::super::bytes::{StorageKey, WeightBytes};
use super::super::lora::check_factor;
use super::super::slots::Slots;
use super::super::storage::{Storage, Streamer, lock};
use super::{RegistryError, WeightEntry, WeightHandle, WeightKind, WeightTotals};

pub(super) struct Slot {
    pub(super) generation: u32,
    pub(super) entry: Option<Entry>,
}

pub(super) struct Entry {
    pub(super) name: Arc<str>,
    pub(super) shape: Shape,
    pub(super) kind: WeightKind,
    pub(super) content: Content,
    // Slots of aliases and adapter weights that point here.
    pub(super) dependents: BTreeSet<u32>,
}

pub(super) enum Content {
    Own {
        storage: Arc<Storage>,
        version: u64,
        // Versions replaced while pinned by hand, oldest first.
        older: Mutex<Vec<Arc<Storage>>>,
    },
    Alias {
        root: u32,
    },
}

pub(super) struct Shared {
    pub(super) storage: Arc<Storage>,
    pub(super) base_entries: u32,
    pub(super) lora_entries: u32,
}

#[derive(Default)]
pub(super) struct Adapter {
    pub(super) handles: BTreeMap<Arc<str>, WeightHandle>,
    pub(super) storages: HashMap<u64, u32>,
    pub(super) bytes: u64,
}

#[derive(Default)]
pub(super) struct Entries {
    pub(super) slots: Slots<Slot>,
    pub(super) free: Vec<u32>,
    pub(super) names: HashMap<Arc<str>, u32>,
    pub(super) storages: HashMap<StorageKey, Shared>,
    pub(super) adapters: BTreeMap<Arc<str>, Adapter>,
    pub(super) totals: WeightTotals,
    pub(super) owned_bytes: u64,
    pub(super) next_storage: u64,
}

pub(super) struct Known {
    pub(super) handle: WeightHandle,
    pub(super) shape: Shape,
    pub(super) kind: WeightKind,
    pub(super) storage: Option<Arc<Storage>>,
}

impl Entries {
    pub(super) fn known(&self, registry: u32, name: &str) -> Option<Known> {
        let slot = *self.names.get(name)?;
        let entry = self.slots[slot as usize].entry.as_ref()?;
        let storage = match &entry.content {
            Content::Own { storage, .. } => Some(Arc::clone(storage)),
            Content::Alias { .. } => None,
        };
        let handle = self.handle(registry, slot);
        Some(Known { handle, shape: entry.shape.clone(), kind: entry.kind.clone(), storage })
    }

    pub(super) fn handle(&self, registry: u32, slot: u32) -> WeightHandle {
        WeightHandle { registry, slot, generation: self.slots[slot as usize].generation }
    }

    pub(super) fn slot_of(&self, registry: u32, handle: WeightHandle) -> Result<u32, RegistryError> {
        if handle.registry != registry {
            return Err(RegistryError::ForeignHandle { id: handle.id() });
        }
        match self.slots.get(handle.slot as usize) {
            Some(slot) if slot.generation == handle.generation && slot.entry.is_some() => Ok(handle.slot),
            _ => Err(RegistryError::StaleHandle { id: handle.id() }),
        }
    }

    pub(super) fn entry(&self, slot: u32, handle: WeightHandle) -> Result<&Entry, RegistryError> {
        let found = self.slots.get(slot as usize).and_then(|slot| slot.entry.as_ref());
        found.ok_or(RegistryError::StaleHandle { id: handle.id() })
    }

    pub(super) fn root(&self, slot: u32) -> u32 {
        match self.slots.get(slot as usize).and_then(|slot| slot.entry.as_ref()) {
            Some(Entry { content: Content::Alias { root }, .. }) => *root,
            _ => slot,
        }
    }

    pub(super) fn name_of(&self, slot: u32) -> String {
        let entry = self.slots.get(slot as usize).and_then(|slot| slot.entry.as_ref());
        entry.map(|entry| entry.name.to_string()).unwrap_or_default()
    }

    pub(super) fn snapshot(
        &self,
        slot: u32,
        handle: WeightHandle,
    ) -> Result<(WeightEntry, Arc<Storage>), RegistryError> {
        let entry = self.entry(self.root(slot), handle)?;
        let Content::Own { storage, version, .. } = &entry.content else {
            return Err(RegistryError::StaleHandle { id: handle.id() });
        };
        let snapshot = WeightEntry {
            name: Arc::clone(&entry.name),
            shape: entry.shape.clone(),
            kind: entry.kind.clone(),
            version: *version,
            view: None,
        };
        Ok((snapshot, Arc::clone(storage)))
    }

    /// The kind with its handle checked and pointed at the root of any alias chain.
    pub(super) fn resolved(&self, registry: u32, kind: WeightKind) -> Result<WeightKind, RegistryError> {
        let root = |handle| {
            let slot = self.root(self.slot_of(registry, handle)?);
            Ok::<_, RegistryError>(self.handle(registry, slot))
        };
        Ok(match kind {
            WeightKind::TiedAlias { target } => WeightKind::TiedAlias { target: root(target)? },
            WeightKind::LoraAdapter { adapter, base, side, rank, alpha } => {
                WeightKind::LoraAdapter { adapter, base: root(base)?, side, rank, alpha }
            }
            WeightKind::Base => WeightKind::Base,
        })
    }

    pub(super) fn check_adapter(
        &self,
        name: &str,
        shape: &Shape,
        kind: &WeightKind,
        own_slot: Option<u32>,
    ) -> Result<(), RegistryError> {
        let WeightKind::LoraAdapter { adapter, base, side, rank, alpha } = kind else { return Ok(()) };
        let base_entry = self.entry(base.slot, *base)?;
        let wrong = |(expected, found)| RegistryError::Adapter {
            adapter: adapter.to_string(),
            name: name.to_owned(),
            base: base_entry.name.to_string(),
            expected,
            found,
        };
        let mut other = None;
        for &slot in &base_entry.dependents {
            let Some(entry) = self.slots[slot as usize].entry.as_ref() else { continue };
            let WeightKind::LoraAdapter { adapter: its, side: its_side, rank: its_rank, .. } = &entry.kind
            else {
                continue;
            };
            if its != adapter || own_slot == Some(slot) {
                continue;
            }
            if its_side == side {
                return Err(wrong((format!("one factor {side}"), format!("`{}` beside it", entry.name))));
            }
            if its_rank != rank {
                return Err(wrong((
                    format!("rank {its_rank}, as `{}` has", entry.name),
                    format!("rank {rank}"),
                )));
            }
            other = Some(&entry.shape);
        }
        check_factor(*side, *rank, *alpha, shape, &base_entry.shape, other).map_err(wrong)
    }

    pub(super) fn adapter(&self, adapter: &str) -> Result<&Adapter, RegistryError> {
        self.adapters.get(adapter).ok_or_else(|| RegistryError::UnknownAdapter {
            adapter: adapter.to_owned(),
            known: self.adapters.keys().map(|name| name.to_string()).collect(),
        })
    }

    pub(super) fn in_use(&self, slot: u32) -> RegistryError {
        let entry = self.slots.get(slot as usize).and_then(|slot| slot.entry.as_ref());
        let mut by: Vec<String> = entry
            .map(|entry| entry.dependents.iter().map(|&slot| self.name_of(slot)).collect())
            .unwrap_or_default();
        by.sort_unstable();
        RegistryError::InUse { name: self.name_of(slot), by }
    }

    pub(super) fn pins(&self, slot: u32) -> u64 {
        match self.slots[self.root(slot) as usize].entry.as_ref().map(|entry| &entry.content) {
            Some(Content::Own { storage, older, .. }) => {
                storage.pins() + lock(older).iter().map(|version| version.pins()).sum::<u64>()
            }
            _ => 0,
        }
    }

    pub(super) fn next_slot(&self) -> u32 {
        self.free.last().copied().unwrap_or(self.slots.len() as u32)
    }

    pub(super) fn put(
        &mut self,
        registry: u32,
        slot: u32,
        name: &str,
        shape: Shape,
        kind: WeightKind,
        content: Content,
    ) -> WeightHandle {
        let name: Arc<str> = name.into();
        if slot as usize == self.slots.len() {
            self.slots.push(Slot { generation: 0, entry: None });
        } else {
            self.free.pop();
        }
        let handle = self.handle(registry, slot);
        match &kind {
            WeightKind::Base => {}
            WeightKind::TiedAlias { target: WeightHandle { slot: root, .. } } => {
                self.add_dependent(*root, slot);
            }
            WeightKind::LoraAdapter { adapter, base, .. } => {
                self.add_dependent(base.slot, slot);
                let held = self.adapters.entry(Arc::clone(adapter)).or_default();
                held.handles.insert(Arc::clone(&name), handle);
            }
        }
        self.names.insert(Arc::clone(&name), slot);
        self.slots[slot as usize].entry =
            Some(Entry { name, shape, kind, content, dependents: BTreeSet::new() });
        handle
    }

    pub(super) fn add_dependent(&mut self, root: u32, dependent: u32) {
        if let Some(entry) = self.slots[root as usize].entry.as_mut() {
            entry.dependents.insert(dependent);
        }
    }

    pub(super) fn forget_dependent(&mut self, root: u32, dependent: u32) {
        if let Some(entry) = self.slots[root as usize].entry.as_mut() {
            entry.dependents.remove(&dependent);
        }
    }

    /// The storage of `bytes`, new or known, counted for one entry of `kind`.
    pub(super) fn share(
        &mut self,
        streamer: &Streamer,
        packed_bytes: &Arc<AtomicU64>,
        bytes: WeightBytes,
        kind: &WeightKind,
    ) -> Arc<Storage> {
        let len = bytes.len() as u64;
        self.next_storage += 1;
        let id = self.next_storage;
        let key = match bytes.key() {
            StorageKey::Empty(_) => StorageKey::Empty(id),
            key => key,
        };
        let shared = self.storages.entry(key.clone()).or_insert_with(|| {
            self.totals.total_bytes += len;
            match &bytes {
                WeightBytes::Owned(_) => self.owned_bytes += len,
                WeightBytes::Mapped(_) => self.totals.mapped_bytes += len,
                WeightBytes::Lazy(_) => self.totals.lazy_bytes += len,
            }
            let storage = Arc::new(Storage::new(id, key, bytes, Arc::clone(packed_bytes)));
            streamer.enter(&storage);
            Shared { storage, base_entries: 0, lora_entries: 0 }
        });
        if let WeightKind::LoraAdapter { adapter, .. } = kind {
            shared.lora_entries += 1;
            self.totals.lora_bytes += if shared.lora_entries == 1 { len } else { 0 };
            let held = self.adapters.entry(Arc::clone(adapter)).or_default();
            let uses = held.storages.entry(shared.storage.id).or_insert(0);
            *uses += 1;
            held.bytes += if *uses == 1 { len } else { 0 };
        } else {
            shared.base_entries += 1;
            self.totals.base_bytes += if shared.base_entries == 1 { len } else { 0 };
        }
        Arc::clone(&shared.storage)
    }

    /// Uncounts one entry of `kind`; true when no entry is left and the storage leaves the registry.
    pub(super) fn unshare(&mut self, storage: &Storage, kind: &WeightKind) -> bool {
        let len = storage.len();
        let Some(shared) = self.storages.get_mut(&storage.key) else { return false };
        if let WeightKind::LoraAdapter { adapter, .. } = kind {
            shared.lora_entries -= 1;
            self.totals.lora_bytes -= if shared.lora_entries == 0 { len } else { 0 };
            if let Some(held) = self.adapters.get_mut(adapter)
                && let Some(uses) = held.storages.get_mut(&storage.id)
            {
                *uses -= 1;
                if *uses == 0 {
                    held.storages.remove(&storage.id);
                    held.bytes -= len;
                }
            }
        } else {
            shared.base_entries -= 1;
            self.totals.base_bytes -= if shared.base_entries == 0 { len } else { 0 };
        }
        if shared.base_entries + shared.lora_entries > 0 {
            return false;
        }
        self.storages.remove(&storage.key);
        self.totals.total_bytes -= len;
        match &storage.source {
            WeightBytes::Owned(_) => self.owned_bytes -= len,
            WeightBytes::Mapped(_) => self.totals.mapped_bytes -= len,
            WeightBytes::Lazy(_) => self.totals.lazy_bytes -= len,
        }
        true
    }
}

pub(super) fn check_size(name: &str, shape: &Shape, bytes: &WeightBytes) -> Result<(), RegistryError> {
    let expected = shape.known_dims().and_then(|dims| byte_count(&dims, shape.dtype()));
    match expected {
        None => Err(RegistryError::Shape { name: name.to_owned(), shape: shape.clone() }),
        Some(expected) if expected != bytes.len() => Err(RegistryError::Length {
            name: name.to_owned(),
            expected_bytes: expected as u64,
            found_bytes: bytes.len() as u64,
        }),
        Some(_) => Ok(()),
    }
}

pub(super) fn check_alias(
    entries: &Entries,
    name: &str,
    shape: &Shape,
    bytes: &WeightBytes,
    root: u32,
) -> Result<(), RegistryError> {
    let target = entries.slots[root as usize].entry.as_ref();
    let wrong = |expected: String, found: String| RegistryError::Alias {
        name: name.to_owned(),
        target: entries.name_of(root),
        expected,
        found,
    };
    if !bytes.is_empty() {
        return Err(wrong("no bytes".to_owned(), format!("{} bytes", bytes.len())));
    }
    match target {
        Some(target) if target.shape != *shape => Err(wrong(target.shape.to_string(), shape.to_string())),
        Some(_) => Ok(()),
        None => Err(wrong("a target".to_owned(), "none".to_owned())),
    }
}

/// Compares all that can be compared without reading bytes.
pub(super) fn check_same(
    name: &str,
    known: &Known,
    shape: &Shape,
    bytes: &WeightBytes,
    kind: &WeightKind,
) -> Result<(), RegistryError> {
    if known.kind != *kind {
        return Err(conflict(name, "kind", format!("{:?}", known.kind), format!("{kind:?}")));
    }
    if known.shape.dtype() != shape.dtype() {
        return Err(conflict(name, "dtype", known.shape.dtype().to_string(), shape.dtype().to_string()));
    }
    if known.shape != *shape {
        return Err(conflict(name, "shape", known.shape.to_string(), shape.to_string()));
    }
    match &known.storage {
        Some(_) => check_size(name, shape, bytes),
        None if bytes.is_empty() => Ok(()),
        None => Err(conflict(name, "content", "no bytes".to_owned(), format!("{} bytes", bytes.len()))),
    }
}

pub(super) fn conflict(name: &str, what: &'static str, registered: String, given: String) -> RegistryError {
    RegistryError::Conflict { name: name.to_owned(), what, registered, given }
}

pub(super) fn short(digest: &[u8; 32]) -> String {
    let hex: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("blake3 {hex}")
}
