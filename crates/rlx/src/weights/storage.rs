//! One storage: its bytes, its pins, its packed copies; and the byte budget that streams storages in and out.
//!
//! Lock order: the registry's entries, then [`Streamer`], then a storage's own locks.

use std::any::Any;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rlx_tensor::storage::mapped::{MappedFile, MappedRange};

use super::bytes::{SharedBytes, StorageKey, WeightBytes};
use super::registry::{RegistryError, WeightEntry};
use super::schedule::{point, take};

pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    take(|| mutex.try_lock().ok(), || mutex.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A packed copy of a weight: opaque to the registry, which only counts its bytes.
pub struct Packed {
    value: Arc<dyn Any + Send + Sync>,
    bytes: u64,
    file: Option<Arc<MappedFile>>,
}

impl Packed {
    /// Wraps `value`, which holds `bytes` bytes of memory.
    pub fn new<T: Any + Send + Sync>(value: T, bytes: u64) -> Self {
        Packed { value: Arc::new(value), bytes, file: None }
    }

    /// Wraps `value`, which reads `bytes` bytes of a mapped file.
    pub fn in_file<T: Any + Send + Sync>(value: T, bytes: u64, file: Arc<MappedFile>) -> Self {
        Packed { file: Some(file), ..Packed::new(value, bytes) }
    }

    /// The mapped file it reads; `None` if it is in memory of its own.
    pub fn file(&self) -> Option<&Arc<MappedFile>> {
        self.file.as_ref()
    }

    /// The packed value, or `None` when it is of another type.
    pub fn downcast_ref<T: Any>(&self) -> Option<&T> {
        self.value.downcast_ref()
    }

    /// The packed value to keep, or `None` when it is of another type.
    pub fn downcast<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.value).downcast().ok()
    }

    /// Memory it holds.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({} bytes)", self.bytes)
    }
}

/// What a packed copy depends on, besides the storage and its version: never batch, sequence or phase.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackedKey {
    /// The layout's name.
    pub layout: Cow<'static, str>,
    /// The instruction set.
    pub isa: Cow<'static, str>,
    /// The precision.
    pub precision: Cow<'static, str>,
}

impl PackedKey {
    /// A key of its three parts.
    pub fn new(
        layout: impl Into<Cow<'static, str>>,
        isa: impl Into<Cow<'static, str>>,
        precision: impl Into<Cow<'static, str>>,
    ) -> Self {
        PackedKey { layout: layout.into(), isa: isa.into(), precision: precision.into() }
    }
}

type PackSlot = Arc<Mutex<Option<Arc<Packed>>>>;

/// One version of a weight's bytes, shared by all names that have it.
pub(super) struct Storage {
    pub(super) id: u64,
    pub(super) key: StorageKey,
    pub(super) source: WeightBytes,
    digest: OnceLock<[u8; 32]>,
    packed: Mutex<HashMap<PackedKey, PackSlot>>,
    packed_bytes: AtomicU64,
    packed_total: Arc<AtomicU64>,
    loaded: Mutex<Option<SharedBytes>>,
    // The rest changes under the streamer's lock only.
    manual_pins: AtomicU64,
    guard_pins: AtomicU64,
    resident: AtomicBool,
    retired: AtomicBool,
    tick: AtomicU64,
}

impl Drop for Storage {
    fn drop(&mut self) {
        self.packed_total.fetch_sub(self.packed_bytes.load(Relaxed), Relaxed);
    }
}

/// Bytes that are in memory or in a map.
#[derive(Debug, Clone)]
pub(super) enum ByteView {
    Shared(SharedBytes),
    Mapped(MappedRange),
}

impl ByteView {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            ByteView::Shared(bytes) => bytes.as_slice(),
            ByteView::Mapped(range) => range.bytes(),
        }
    }
}

impl Storage {
    pub(super) fn new(id: u64, key: StorageKey, source: WeightBytes, packed_total: Arc<AtomicU64>) -> Self {
        Storage {
            id,
            key,
            source,
            digest: OnceLock::new(),
            packed: Mutex::new(HashMap::new()),
            packed_bytes: AtomicU64::new(0),
            packed_total,
            loaded: Mutex::new(None),
            manual_pins: AtomicU64::new(0),
            guard_pins: AtomicU64::new(0),
            resident: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            tick: AtomicU64::new(0),
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.source.len() as u64
    }

    pub(super) fn pins(&self) -> u64 {
        point();
        self.manual_pins.load(Relaxed) + self.guard_pins.load(Relaxed)
    }

    pub(super) fn manual_pins(&self) -> u64 {
        point();
        self.manual_pins.load(Relaxed)
    }

    fn is_streamed(&self) -> bool {
        !matches!(self.source, WeightBytes::Owned(_))
    }

    /// BLAKE3 of the bytes, computed once.
    pub(super) fn digest(&self, name: &str) -> Result<[u8; 32], RegistryError> {
        if let Some(digest) = self.digest.get() {
            return Ok(*digest);
        }
        let computed = digest_of(name, &self.source)?;
        Ok(*self.digest.get_or_init(|| computed))
    }

    /// The bytes as they can be had without loading; `None` when they are streamed out.
    pub(super) fn view(&self) -> Option<ByteView> {
        match &self.source {
            WeightBytes::Owned(bytes) => Some(ByteView::Shared(bytes.clone())),
            WeightBytes::Mapped(range) => {
                self.resident.load(Relaxed).then(|| ByteView::Mapped(range.clone()))
            }
            WeightBytes::Lazy(_) => lock(&self.loaded).clone().map(ByteView::Shared),
        }
    }

    fn bring_in(&self, name: &str) -> Result<ByteView, RegistryError> {
        match &self.source {
            WeightBytes::Owned(bytes) => Ok(ByteView::Shared(bytes.clone())),
            WeightBytes::Mapped(range) => {
                range.still_valid()?;
                Ok(ByteView::Mapped(range.clone()))
            }
            WeightBytes::Lazy(_) => {
                let mut loaded = lock(&self.loaded);
                let bytes = match &*loaded {
                    Some(bytes) => bytes.clone(),
                    None => load(name, &self.source)?,
                };
                *loaded = Some(bytes.clone());
                Ok(ByteView::Shared(bytes))
            }
        }
    }

    fn is_in(&self) -> bool {
        match self.source {
            WeightBytes::Lazy(_) => lock(&self.loaded).is_some(),
            _ => true,
        }
    }

    fn drop_bytes(&self) {
        match &self.source {
            WeightBytes::Owned(_) => {}
            // Advice only: where the system refuses it, the pages stay reclaimable.
            WeightBytes::Mapped(range) => drop(range.release_pages()),
            WeightBytes::Lazy(_) => *lock(&self.loaded) = None,
        }
    }
}

fn load(name: &str, source: &WeightBytes) -> Result<SharedBytes, RegistryError> {
    let WeightBytes::Lazy(lazy) = source else { return Ok(Vec::new().into()) };
    let bytes = lazy.load().map_err(|error| RegistryError::Load { name: name.to_owned(), source: error })?;
    if bytes.len() != lazy.len() {
        return Err(RegistryError::Length {
            name: name.to_owned(),
            expected_bytes: lazy.len() as u64,
            found_bytes: bytes.len() as u64,
        });
    }
    Ok(bytes)
}

pub(super) fn digest_of(name: &str, source: &WeightBytes) -> Result<[u8; 32], RegistryError> {
    let hash = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
    match source {
        WeightBytes::Owned(bytes) => Ok(hash(bytes.as_slice())),
        WeightBytes::Mapped(range) => {
            range.still_valid()?;
            Ok(hash(range.bytes()))
        }
        WeightBytes::Lazy(_) => Ok(hash(load(name, source)?.as_slice())),
    }
}

/// What streaming did since the registry was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct StreamStats {
    /// The byte budget; `None` = no limit.
    pub budget_bytes: Option<u64>,
    /// Bytes of mapped and lazy storages that are in now.
    pub in_bytes: u64,
    /// Times a storage was brought in by a pin.
    pub brought_in: u64,
    /// Times a storage was dropped to keep the budget.
    pub dropped: u64,
}

/// Keeps mapped and lazy storages within a byte budget.
#[derive(Default)]
pub(super) struct Streamer {
    state: Mutex<StreamState>,
}

#[derive(Default)]
struct StreamState {
    stats: StreamStats,
    idle_bytes: u64,
    lazy_in_bytes: u64,
    clock: u64,
    // Unpinned storages that are in, least recently used first.
    idle: BTreeMap<u64, Arc<Storage>>,
}

impl StreamState {
    fn admit(&mut self, storage: &Storage) {
        storage.resident.store(true, Relaxed);
        self.stats.in_bytes += storage.len();
        if matches!(storage.source, WeightBytes::Lazy(_)) {
            self.lazy_in_bytes += storage.len();
        }
    }

    fn expel(&mut self, storage: &Storage) {
        storage.resident.store(false, Relaxed);
        self.stats.in_bytes -= storage.len();
        if matches!(storage.source, WeightBytes::Lazy(_)) {
            self.lazy_in_bytes -= storage.len();
        }
        storage.drop_bytes();
    }

    fn set_idle(&mut self, storage: &Arc<Storage>) {
        self.clock += 1;
        storage.tick.store(self.clock, Relaxed);
        self.idle_bytes += storage.len();
        self.idle.insert(self.clock, Arc::clone(storage));
    }

    fn unset_idle(&mut self, storage: &Storage) {
        if self.idle.remove(&storage.tick.load(Relaxed)).is_some() {
            self.idle_bytes -= storage.len();
        }
    }

    /// Drops idle storages until `more` bytes fit, as far as there are any.
    fn make_room(&mut self, more: u64) {
        let Some(budget) = self.stats.budget_bytes else { return };
        while self.stats.in_bytes.saturating_add(more) > budget {
            let Some((_, oldest)) = self.idle.pop_first() else { return };
            self.idle_bytes -= oldest.len();
            self.stats.dropped += 1;
            self.expel(&oldest);
        }
    }

    /// Makes sure that a storage about to be pinned is in and not idle.
    fn hold(&mut self, name: &str, storage: &Storage) -> Result<(), RegistryError> {
        if !storage.is_streamed() {
            return Ok(());
        }
        if storage.resident.load(Relaxed) {
            self.unset_idle(storage);
            return Ok(());
        }
        let pinned_bytes = self.stats.in_bytes - self.idle_bytes;
        if let Some(budget_bytes) = self.stats.budget_bytes
            && pinned_bytes.saturating_add(storage.len()) > budget_bytes
        {
            return Err(RegistryError::OverBudget {
                name: name.to_owned(),
                needed_bytes: storage.len(),
                pinned_bytes,
                budget_bytes,
            });
        }
        self.make_room(storage.len());
        self.admit(storage);
        self.stats.brought_in += 1;
        Ok(())
    }

    fn let_go(&mut self, storage: &Arc<Storage>) {
        if !storage.is_streamed() || storage.pins() > 0 || !storage.resident.load(Relaxed) {
            return;
        }
        if storage.retired.load(Relaxed) || !storage.is_in() {
            self.expel(storage);
        } else {
            self.set_idle(storage);
            self.make_room(0);
        }
    }
}

impl Streamer {
    pub(super) fn set_budget(&self, budget_bytes: Option<u64>) {
        let mut state = lock(&self.state);
        state.stats.budget_bytes = budget_bytes;
        state.make_room(0);
    }

    pub(super) fn stats(&self) -> StreamStats {
        lock(&self.state).stats
    }

    pub(super) fn lazy_in_bytes(&self) -> u64 {
        lock(&self.state).lazy_in_bytes
    }

    /// A storage enters the registry: mapped bytes can be read at once, lazy ones after a pin.
    pub(super) fn enter(&self, storage: &Arc<Storage>) {
        if matches!(storage.source, WeightBytes::Mapped(_)) {
            let mut state = lock(&self.state);
            state.admit(storage);
            state.set_idle(storage);
            state.make_room(0);
        }
    }

    /// A storage leaves the registry; pinned bytes stay until the last pin goes.
    pub(super) fn retire(&self, storage: &Arc<Storage>) {
        let mut state = lock(&self.state);
        storage.retired.store(true, Relaxed);
        if storage.pins() == 0 && storage.resident.load(Relaxed) {
            state.unset_idle(storage);
            state.expel(storage);
        }
    }

    fn unpin(&self, storage: &Arc<Storage>, pins: &AtomicU64) -> u64 {
        let mut state = lock(&self.state);
        pins.fetch_sub(1, Relaxed);
        state.let_go(storage);
        storage.pins()
    }

    /// The new count, or `None` when no manual pin is left to release.
    pub(super) fn release(&self, storage: &Arc<Storage>) -> Option<u64> {
        let mut state = lock(&self.state);
        if storage.manual_pins() == 0 {
            return None;
        }
        storage.manual_pins.fetch_sub(1, Relaxed);
        state.let_go(storage);
        Some(storage.pins())
    }

    /// Frees what a packed copy made superfluous.
    fn drop_source(&self, storage: &Arc<Storage>) {
        let mut state = lock(&self.state);
        if let WeightBytes::Lazy(_) = storage.source
            && storage.pins() == 0
            && storage.resident.load(Relaxed)
        {
            state.unset_idle(storage);
            state.expel(storage);
        } else {
            storage.drop_bytes_if_mapped();
        }
    }
}

impl Storage {
    /// The packed copy under `key`, if it is built. Never waits for a build: the caller holds the entries' lock.
    pub(super) fn packed(&self, key: &PackedKey) -> Option<Arc<Packed>> {
        let slot = Arc::clone(lock(&self.packed).get(key)?);
        slot.try_lock().ok()?.clone()
    }

    pub(super) fn adopt_packed(&self, key: PackedKey, packed: Packed) {
        let slot = Arc::clone(lock(&self.packed).entry(key).or_default());
        let mut slot = lock(&slot);
        if slot.is_none() {
            self.packed_bytes.fetch_add(packed.bytes, Relaxed);
            self.packed_total.fetch_add(packed.bytes, Relaxed);
            *slot = Some(Arc::new(packed));
        }
    }

    fn drop_bytes_if_mapped(&self) {
        if matches!(self.source, WeightBytes::Mapped(_)) {
            self.drop_bytes();
        }
    }
}

/// A pin that is released when it is dropped. Keeps the version it was made from, whatever happens to the name.
pub struct PinGuard {
    pub(super) storage: Arc<Storage>,
    streamer: Arc<Streamer>,
    entry: WeightEntry,
}

impl PinGuard {
    /// Counts the pin at once (under the caller's lock on the entries); the bytes come with [`bring_in`].
    pub(super) fn hold(
        streamer: &Arc<Streamer>,
        storage: &Arc<Storage>,
        entry: WeightEntry,
    ) -> Result<PinGuard, RegistryError> {
        let mut state = lock(&streamer.state);
        state.hold(entry.name(), storage)?;
        storage.guard_pins.fetch_add(1, Relaxed);
        drop(state);
        Ok(PinGuard { storage: Arc::clone(storage), streamer: Arc::clone(streamer), entry })
    }

    pub(super) fn bring_in(mut self) -> Result<PinGuard, RegistryError> {
        let view = self.storage.bring_in(self.entry.name())?;
        self.entry.set_view(view);
        Ok(self)
    }

    /// Turns the guard into a pin that has to be released by hand; returns the count.
    pub(super) fn keep(self) -> u64 {
        let _state = lock(&self.streamer.state);
        self.storage.manual_pins.fetch_add(1, Relaxed);
        // Dropping `self` takes the guard's own pin, so the count is the same after.
        self.storage.pins() - 1
    }

    /// The entry, of the version that is pinned.
    pub fn entry(&self) -> &WeightEntry {
        &self.entry
    }

    /// The bytes. They stay in until the guard is dropped.
    pub fn bytes(&self) -> &[u8] {
        self.entry.bytes().unwrap_or(&[])
    }

    /// Checks that the file behind the bytes is still what was mapped; call it before a run.
    ///
    /// # Errors
    /// [`RegistryError::Map`].
    pub fn still_valid(&self) -> Result<(), RegistryError> {
        match &self.storage.source {
            WeightBytes::Mapped(range) => Ok(range.still_valid()?),
            _ => Ok(()),
        }
    }

    /// As [`WeightRegistry::packed_or_insert_with`](super::WeightRegistry::packed_or_insert_with), for the version
    /// that is pinned.
    ///
    /// # Errors
    /// Whatever `build` returns.
    pub fn packed_or_insert_with<E>(
        &self,
        key: &PackedKey,
        build: impl FnOnce(&PinGuard) -> Result<Packed, E>,
    ) -> Result<Arc<Packed>, E> {
        let slot = Arc::clone(lock(&self.storage.packed).entry(key.clone()).or_default());
        let mut packed = lock(&slot);
        if let Some(packed) = &*packed {
            return Ok(Arc::clone(packed));
        }
        let built = Arc::new(build(self)?);
        self.storage.packed_bytes.fetch_add(built.bytes, Relaxed);
        self.storage.packed_total.fetch_add(built.bytes, Relaxed);
        *packed = Some(Arc::clone(&built));
        drop(packed);
        self.storage.drop_bytes_if_mapped();
        Ok(built)
    }

    /// Where the bytes are mapped, if they are.
    pub fn mapped(&self) -> Option<&MappedRange> {
        match &self.storage.source {
            WeightBytes::Mapped(range) => Some(range),
            _ => None,
        }
    }

    /// Tells the system that a mapped storage is read soon, so that it reads ahead while others work.
    pub fn will_need(&self) {
        if let WeightBytes::Mapped(range) = &self.storage.source {
            // Advice only: without it the pages are read when they are touched.
            drop(range.will_need());
        }
    }

    /// Gives the pages of mapped bytes back: who reads them again waits for the file.
    pub fn release_pages(&self) {
        self.storage.drop_bytes_if_mapped();
    }

    pub(super) fn done_packing(self) {
        let (storage, streamer) = (Arc::clone(&self.storage), Arc::clone(&self.streamer));
        drop(self);
        streamer.drop_source(&storage);
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        self.streamer.unpin(&self.storage, &self.storage.guard_pins);
    }
}

impl fmt::Debug for PinGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinGuard({})", self.entry.name())
    }
}
