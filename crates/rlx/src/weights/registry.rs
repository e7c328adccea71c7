//! The registry: each weight once, shared by every executable and thread.

mod entries;
mod error;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rlx_tensor::storage::mapped::MappedRange;
use rlx_tensor::{DType, Shape};

use super::bytes::WeightBytes;
use super::loader::WeightLoader;
use super::lora::LoraSide;
use super::schedule::take;
use super::storage::{ByteView, Streamer, digest_of, lock};
pub use super::storage::{Packed, PackedKey, PinGuard, StreamStats};
use entries::{Content, Entries, check_alias, check_same, check_size, conflict, short};
pub use error::RegistryError;

/// Names an entry of one registry. Stays valid through [`WeightRegistry::replace`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightHandle {
    registry: u32,
    slot: u32,
    generation: u32,
}

impl WeightHandle {
    /// Unique in its registry, for all time.
    pub fn id(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }
}

/// What a weight is for.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum WeightKind {
    /// A weight of the model.
    Base,
    /// One factor of a low-rank update.
    LoraAdapter {
        /// The adapter's name.
        adapter: Arc<str>,
        /// The weight it updates.
        base: WeightHandle,
        /// Which factor.
        side: LoraSide,
        /// Inner dim of the factors.
        rank: usize,
        /// The update is scaled by `alpha / rank`.
        alpha: f32,
    },
    /// Another name of `target`, with its shape and dtype and no bytes of its own.
    TiedAlias {
        /// What it names; an alias resolves to that alias's target.
        target: WeightHandle,
    },
}

/// A weight as it is now: a snapshot that later changes to the registry do not touch.
#[derive(Debug, Clone)]
pub struct WeightEntry {
    name: Arc<str>,
    shape: Shape,
    kind: WeightKind,
    version: u64,
    view: Option<ByteView>,
}

impl WeightEntry {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Extents and dtype; every dim is known.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.shape.dtype()
    }

    /// What it is for.
    pub fn kind(&self) -> &WeightKind {
        &self.kind
    }

    /// Counts replacements, from 0.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The bytes, borrowed.
    ///
    /// # Errors
    /// [`RegistryError::StreamedOut`] when only a pin can bring them.
    pub fn bytes(&self) -> Result<&[u8], RegistryError> {
        match &self.view {
            Some(view) => Ok(view.bytes()),
            None => Err(RegistryError::StreamedOut { name: self.name.to_string() }),
        }
    }

    pub(super) fn set_view(&mut self, view: ByteView) {
        self.view = Some(view);
    }
}

/// Bytes held, each storage counted once per line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct WeightTotals {
    /// All storages.
    pub total_bytes: u64,
    /// Storages of [`WeightKind::Base`].
    pub base_bytes: u64,
    /// Storages of [`WeightKind::LoraAdapter`].
    pub lora_bytes: u64,
    /// Storages in mapped files, read or not.
    pub mapped_bytes: u64,
    /// Storages in anonymous memory: owned, and lazy ones that are in.
    pub resident_bytes: u64,
    /// Lazy storages, in or not.
    pub lazy_bytes: u64,
    /// Packed copies, beside `total_bytes`.
    pub packed_bytes: u64,
}

/// Where a weight's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct WeightPlacement {
    /// The storage: weights with the same number share their bytes.
    pub storage: u64,
    /// Bytes of the storage.
    pub bytes: u64,
    /// Whether they are pages of a mapped file.
    pub mapped: bool,
    /// Whether they are made on demand.
    pub lazy: bool,
    /// Whether they belong to an adapter.
    pub adapter: bool,
}

/// Weights by name. Every call takes `&self` and may come from any thread.
///
/// Weights with the same bytes in memory or the same range of the same file are one storage: counted once, packed
/// once, pinned together.
pub struct WeightRegistry {
    id: u32,
    entries: RwLock<Entries>,
    streamer: Arc<Streamer>,
    packed_bytes: Arc<AtomicU64>,
    revision: AtomicU64,
}

static NEXT_REGISTRY: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);

impl Default for WeightRegistry {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for WeightRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WeightRegistry({} entries, {} bytes)", self.len(), self.total_bytes())
    }
}

impl WeightRegistry {
    /// An empty registry without a byte budget.
    pub fn new() -> Self {
        WeightRegistry {
            id: NEXT_REGISTRY.fetch_add(1, Relaxed),
            entries: RwLock::default(),
            streamer: Arc::default(),
            packed_bytes: Arc::default(),
            revision: AtomicU64::new(0),
        }
    }

    /// Grows whenever a weight is registered, replaced or removed: while it is the same, so is every weight.
    pub fn revision(&self) -> u64 {
        self.revision.load(Relaxed)
    }

    /// Registers a weight, or finds it registered with the same content. Content is compared by digest, and only
    /// when shape, dtype and kind are equal and the bytes are not the very same storage.
    ///
    /// # Errors
    /// [`RegistryError::Conflict`] naming what differs; [`RegistryError::Shape`] and [`RegistryError::Length`];
    /// for an alias [`RegistryError::Alias`], for an adapter [`RegistryError::Adapter`]; a foreign or stale handle
    /// in `kind`.
    pub fn register(
        &self,
        name: &str,
        shape: Shape,
        bytes: impl Into<WeightBytes>,
        kind: WeightKind,
    ) -> Result<WeightHandle, RegistryError> {
        let bytes = bytes.into();
        loop {
            let known = self.read().known(self.id, name);
            let Some(known) = known else {
                let mut entries = self.write();
                if entries.names.contains_key(name) {
                    continue;
                }
                return self.insert(&mut entries, name, shape, bytes, kind);
            };
            let kind = self.read().resolved(self.id, kind)?;
            check_same(name, &known, &shape, &bytes, &kind)?;
            let Some(storage) = known.storage else { return Ok(known.handle) };
            if storage.key == bytes.key() {
                return Ok(known.handle);
            }
            let (registered, given) = (storage.digest(name)?, digest_of(name, &bytes)?);
            if registered != given {
                return Err(conflict(name, "content", short(&registered), short(&given)));
            }
            return Ok(known.handle);
        }
    }

    /// Registers a loader's tensor under its own name, sharing its bytes.
    ///
    /// # Errors
    /// [`RegistryError::Absent`], [`RegistryError::Loader`], and as [`register`](Self::register).
    pub fn register_from(
        &self,
        loader: &dyn WeightLoader,
        name: &str,
        kind: WeightKind,
    ) -> Result<WeightHandle, RegistryError> {
        match (loader.shape(name)?, loader.storage(name)?) {
            (Some(shape), Some(bytes)) => self.register(name, shape, bytes, kind),
            _ => Err(RegistryError::Absent { name: name.to_owned() }),
        }
    }

    /// Where a weight's bytes are, an alias's where its target's are. Reads none of them.
    ///
    /// # Errors
    /// [`RegistryError::ForeignHandle`], [`RegistryError::StaleHandle`].
    pub fn placement(&self, handle: WeightHandle) -> Result<WeightPlacement, RegistryError> {
        let entries = self.read();
        let slot = entries.slot_of(self.id, handle)?;
        let (entry, storage) = entries.snapshot(slot, handle)?;
        Ok(WeightPlacement {
            storage: storage.id,
            bytes: storage.len(),
            mapped: matches!(storage.source, WeightBytes::Mapped(_)),
            lazy: matches!(storage.source, WeightBytes::Lazy(_)),
            adapter: matches!(entry.kind, WeightKind::LoraAdapter { .. }),
        })
    }

    /// Changes a weight's content: the handle names the new version from now on; pins and snapshots keep theirs.
    ///
    /// # Errors
    /// [`RegistryError::Shape`], [`RegistryError::Length`]; [`RegistryError::Alias`] for an alias, whose target has
    /// to be replaced instead; [`RegistryError::InUse`] for another shape while aliases or adapters point at it.
    pub fn replace(
        &self,
        handle: WeightHandle,
        shape: Shape,
        bytes: impl Into<WeightBytes>,
    ) -> Result<(), RegistryError> {
        let bytes = bytes.into();
        let mut entries = self.write();
        let slot = entries.slot_of(self.id, handle)?;
        let entry = entries.entry(slot, handle)?;
        check_size(&entry.name, &shape, &bytes)?;
        let Content::Own { storage: old, version, .. } = &entry.content else {
            return Err(RegistryError::Alias {
                name: entry.name.to_string(),
                target: entries.name_of(entries.root(slot)),
                expected: "its target to be replaced".to_owned(),
                found: "bytes for the alias".to_owned(),
            });
        };
        if shape != entry.shape && !entry.dependents.is_empty() {
            return Err(entries.in_use(slot));
        }
        if let WeightKind::LoraAdapter { .. } = entry.kind {
            entries.check_adapter(&entry.name, &shape, &entry.kind, Some(slot))?;
        }
        let (old, version, kind) = (Arc::clone(old), version + 1, entry.kind.clone());
        let storage = entries.share(&self.streamer, &self.packed_bytes, bytes, &kind);
        let retired = entries.unshare(&old, &kind);
        let Some(entry) = entries.slots[slot as usize].entry.as_mut() else {
            return Err(RegistryError::StaleHandle { id: handle.id() });
        };
        entry.shape = shape;
        let mut older = match &mut entry.content {
            Content::Own { older, .. } => {
                std::mem::take(older.get_mut().unwrap_or_else(PoisonError::into_inner))
            }
            Content::Alias { .. } => Vec::new(),
        };
        older.retain(|version| version.manual_pins() > 0);
        if old.manual_pins() > 0 && !Arc::ptr_eq(&old, &storage) {
            older.push(Arc::clone(&old));
        }
        entry.content = Content::Own { storage, version, older: Mutex::new(older) };
        if retired {
            self.streamer.retire(&old);
        }
        Ok(())
    }

    /// The handle of a name.
    pub fn lookup(&self, name: &str) -> Option<WeightHandle> {
        let entries = self.read();
        entries.names.get(name).map(|&slot| entries.handle(self.id, slot))
    }

    /// The entry; for a tied alias its target's.
    ///
    /// # Errors
    /// [`RegistryError::ForeignHandle`], [`RegistryError::StaleHandle`].
    pub fn get(&self, handle: WeightHandle) -> Result<WeightEntry, RegistryError> {
        let entries = self.read();
        let slot = entries.slot_of(self.id, handle)?;
        let (mut entry, storage) = entries.snapshot(slot, handle)?;
        entry.view = storage.view();
        Ok(entry)
    }

    /// The handle's own kind and name: for an alias the alias's, not its target's.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn describe(&self, handle: WeightHandle) -> Result<(Arc<str>, WeightKind), RegistryError> {
        let entries = self.read();
        let entry = entries.entry(entries.slot_of(self.id, handle)?, handle)?;
        Ok((Arc::clone(&entry.name), entry.kind.clone()))
    }

    /// Pins the storage, bringing its bytes in; returns the new count of pins on it.
    ///
    /// # Errors
    /// A bad handle, [`RegistryError::OverBudget`], [`RegistryError::Load`], [`RegistryError::Map`].
    pub fn pin(&self, handle: WeightHandle) -> Result<u64, RegistryError> {
        let guard = self.guard(handle)?;
        // The version may have been replaced while its bytes came in: then it must be found again by `release`.
        let entries = self.read();
        let root = entries.root(entries.slot_of(self.id, handle)?);
        let Content::Own { storage, older, .. } = &entries.entry(root, handle)?.content else {
            return Err(RegistryError::StaleHandle { id: handle.id() });
        };
        let mut older = lock(older);
        let held = Arc::clone(&guard.storage);
        let count = guard.keep();
        if !Arc::ptr_eq(&held, storage) && !older.iter().any(|version| Arc::ptr_eq(version, &held)) {
            older.push(held);
        }
        Ok(count)
    }

    /// Pins until the guard is dropped.
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn guard(&self, handle: WeightHandle) -> Result<PinGuard, RegistryError> {
        let held = {
            let entries = self.read();
            let slot = entries.slot_of(self.id, handle)?;
            let (entry, storage) = entries.snapshot(slot, handle)?;
            PinGuard::hold(&self.streamer, &storage, entry)?
        };
        held.bring_in()
    }

    /// Takes back one [`pin`](Self::pin), of the oldest version that has one; returns the new count on that storage.
    /// Zero pins do not remove the weight.
    ///
    /// # Errors
    /// A bad handle, [`RegistryError::NotPinned`].
    pub fn release(&self, handle: WeightHandle) -> Result<u64, RegistryError> {
        let entries = self.read();
        let root = entries.root(entries.slot_of(self.id, handle)?);
        let entry = entries.entry(root, handle)?;
        let Content::Own { storage, older, .. } = &entry.content else {
            return Err(RegistryError::StaleHandle { id: handle.id() });
        };
        let mut older = lock(older);
        older.retain(|version| version.manual_pins() > 0);
        let oldest = older.first().map_or_else(|| Arc::clone(storage), Arc::clone);
        let count = self.streamer.release(&oldest);
        count.ok_or_else(|| RegistryError::NotPinned { name: entry.name.to_string() })
    }

    /// Pins on the storage of the newest version.
    ///
    /// # Errors
    /// A bad handle.
    pub fn pin_count(&self, handle: WeightHandle) -> Result<u64, RegistryError> {
        let entries = self.read();
        let (_, storage) = entries.snapshot(entries.slot_of(self.id, handle)?, handle)?;
        Ok(storage.pins())
    }

    /// Removes an entry and returns its name.
    ///
    /// # Errors
    /// A bad handle; [`RegistryError::InUse`] while aliases or adapters point at it; [`RegistryError::Pinned`] while
    /// any version of its storage is pinned, under whatever name.
    pub fn unregister(&self, handle: WeightHandle) -> Result<String, RegistryError> {
        let mut entries = self.write();
        let slot = entries.slot_of(self.id, handle)?;
        let entry = entries.entry(slot, handle)?;
        if !entry.dependents.is_empty() {
            return Err(entries.in_use(slot));
        }
        let pins = entries.pins(slot);
        if pins > 0 {
            return Err(RegistryError::Pinned { name: entry.name.to_string(), pins });
        }
        let place = &mut entries.slots[slot as usize];
        let Some(entry) = place.entry.take() else {
            return Err(RegistryError::StaleHandle { id: handle.id() });
        };
        if let Some(next) = place.generation.checked_add(1) {
            place.generation = next;
            entries.free.push(slot);
        }
        entries.names.remove(&entry.name);
        match &entry.content {
            Content::Alias { root } => entries.forget_dependent(*root, slot),
            Content::Own { storage, .. } => {
                let retired = entries.unshare(storage, &entry.kind);
                if let WeightKind::LoraAdapter { adapter, base, .. } = &entry.kind {
                    let base = entries.root(base.slot);
                    entries.forget_dependent(base, slot);
                    if let Some(held) = entries.adapters.get_mut(adapter) {
                        held.handles.remove(&entry.name);
                        if held.handles.is_empty() {
                            entries.adapters.remove(adapter);
                        }
                    }
                }
                if retired {
                    self.streamer.retire(storage);
                }
            }
        }
        Ok(entry.name.to_string())
    }

    /// The packed copy of the newest version under `key`, built at most once however many threads ask; after it is
    /// built the source's pages are given back. `build` reads the bytes from the guard and must not ask for the same
    /// key. A build that fails leaves nothing, and the next caller tries again.
    ///
    /// # Errors
    /// Whatever `build` returns; as [`pin`](Self::pin).
    pub fn packed_or_insert_with<E: From<RegistryError>>(
        &self,
        handle: WeightHandle,
        key: &PackedKey,
        build: impl FnOnce(&PinGuard) -> Result<Packed, E>,
    ) -> Result<Arc<Packed>, E> {
        let held = {
            let entries = self.read();
            let slot = entries.slot_of(self.id, handle)?;
            let (entry, storage) = entries.snapshot(slot, handle)?;
            if let Some(packed) = storage.packed(key) {
                return Ok(packed);
            }
            PinGuard::hold(&self.streamer, &storage, entry)?
        };
        let guard = held.bring_in()?;
        let packed = guard.packed_or_insert_with(key, build)?;
        guard.done_packing();
        Ok(packed)
    }

    /// The packed copy of the newest version under `key`, if there is one. Reads no bytes.
    ///
    /// # Errors
    /// [`RegistryError::ForeignHandle`], [`RegistryError::StaleHandle`].
    pub fn packed(
        &self,
        handle: WeightHandle,
        key: &PackedKey,
    ) -> Result<Option<Arc<Packed>>, RegistryError> {
        let entries = self.read();
        let (_, storage) = entries.snapshot(entries.slot_of(self.id, handle)?, handle)?;
        Ok(storage.packed(key))
    }

    /// Where the newest version's bytes are mapped, if they are. Reads no bytes.
    ///
    /// # Errors
    /// [`RegistryError::ForeignHandle`], [`RegistryError::StaleHandle`].
    pub fn mapped(&self, handle: WeightHandle) -> Result<Option<MappedRange>, RegistryError> {
        let entries = self.read();
        let (_, storage) = entries.snapshot(entries.slot_of(self.id, handle)?, handle)?;
        Ok(match &storage.source {
            WeightBytes::Mapped(range) => Some(range.clone()),
            _ => None,
        })
    }

    /// Gives the newest version a packed copy that was made before, unless it has one under `key`. Reads no bytes.
    ///
    /// # Errors
    /// [`RegistryError::ForeignHandle`], [`RegistryError::StaleHandle`].
    pub fn adopt_packed(
        &self,
        handle: WeightHandle,
        key: PackedKey,
        packed: Packed,
    ) -> Result<(), RegistryError> {
        let entries = self.read();
        let (_, storage) = entries.snapshot(entries.slot_of(self.id, handle)?, handle)?;
        storage.adopt_packed(key, packed);
        Ok(())
    }

    /// Sets the byte budget for mapped and lazy storages; `None` = no limit. Unpinned ones are dropped at once, least
    /// recently used first, until it holds; pinned ones stay.
    pub fn set_stream_budget(&self, budget_bytes: Option<u64>) {
        self.streamer.set_budget(budget_bytes);
    }

    /// What streaming did so far.
    pub fn stream_stats(&self) -> StreamStats {
        self.streamer.stats()
    }

    /// Bytes of all storages, each once. Constant time.
    pub fn total_bytes(&self) -> u64 {
        self.read().totals.total_bytes
    }

    /// Bytes by kind and by place. Constant time.
    pub fn totals(&self) -> WeightTotals {
        let entries = self.read();
        let lazy_in = self.streamer.lazy_in_bytes();
        WeightTotals {
            resident_bytes: entries.owned_bytes + lazy_in,
            packed_bytes: self.packed_bytes(),
            ..entries.totals
        }
    }

    /// Bytes of packed copies that are held by storages. Constant time.
    pub fn packed_bytes(&self) -> u64 {
        self.packed_bytes.load(Relaxed)
    }

    /// Bytes of one adapter, each storage once.
    ///
    /// # Errors
    /// [`RegistryError::UnknownAdapter`].
    pub fn lora_adapter_bytes(&self, adapter: &str) -> Result<u64, RegistryError> {
        self.read().adapter(adapter).map(|adapter| adapter.bytes)
    }

    /// The adapters, sorted.
    pub fn lora_adapter_names(&self) -> Vec<String> {
        self.read().adapters.keys().map(|name| name.to_string()).collect()
    }

    /// An adapter's weights, sorted by name.
    ///
    /// # Errors
    /// [`RegistryError::UnknownAdapter`].
    pub fn lora_adapter_handles(&self, adapter: &str) -> Result<Vec<WeightHandle>, RegistryError> {
        self.read().adapter(adapter).map(|adapter| adapter.handles.values().copied().collect())
    }

    /// Number of entries, aliases included.
    pub fn len(&self) -> usize {
        self.read().names.len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.read().names.keys().map(|name| name.to_string()).collect();
        names.sort_unstable();
        names
    }

    fn read(&self) -> RwLockReadGuard<'_, Entries> {
        take(|| self.entries.try_read().ok(), || self.entries.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self) -> RwLockWriteGuard<'_, Entries> {
        let entries = take(
            || self.entries.try_write().ok(),
            || self.entries.write().unwrap_or_else(PoisonError::into_inner),
        );
        self.revision.fetch_add(1, Relaxed);
        entries
    }

    fn insert(
        &self,
        entries: &mut Entries,
        name: &str,
        shape: Shape,
        bytes: WeightBytes,
        kind: WeightKind,
    ) -> Result<WeightHandle, RegistryError> {
        let kind = entries.resolved(self.id, kind)?;
        let slot = entries.next_slot();
        if let WeightKind::TiedAlias { target } = &kind {
            check_alias(entries, name, &shape, &bytes, target.slot)?;
            let content = Content::Alias { root: target.slot };
            return Ok(entries.put(self.id, slot, name, shape, kind, content));
        }
        check_size(name, &shape, &bytes)?;
        entries.check_adapter(name, &shape, &kind, None)?;
        let storage = entries.share(&self.streamer, &self.packed_bytes, bytes, &kind);
        let content = Content::Own { storage, version: 0, older: Mutex::default() };
        Ok(entries.put(self.id, slot, name, shape, kind, content))
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
