//! A bounded cache in which a key is built once however many threads ask.

use super::key::CacheKey;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

enum Slot<V> {
    /// Some thread builds it; the bytes are those it has reserved.
    Building {
        bytes: u64,
    },
    Ready {
        value: Arc<V>,
        bytes: u64,
        used: u64,
    },
}

struct Entries<V> {
    slots: HashMap<CacheKey, Slot<V>>,
    bytes: u64,
    tick: u64,
}

/// Least recently used entries go first, when there are too many or they hold too many bytes, and before a new one is built. An entry that
/// somebody still holds lives on there.
pub(super) struct KeyedCache<V> {
    capacity: usize,
    budget_bytes: u64,
    entries: Mutex<Entries<V>>,
    built: Condvar,
}

/// A need that the whole budget does not cover.
pub(super) struct TooLarge {
    pub needed_bytes: u64,
    pub budget_bytes: u64,
}

impl<V> KeyedCache<V> {
    pub fn new(capacity: usize, budget_bytes: u64) -> Self {
        let entries = Entries { slots: HashMap::new(), bytes: 0, tick: 0 };
        Self { capacity, budget_bytes, entries: Mutex::new(entries), built: Condvar::new() }
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    fn lock(&self) -> MutexGuard<'_, Entries<V>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn contains(&self, key: &CacheKey) -> bool {
        matches!(self.lock().slots.get(key), Some(Slot::Ready { .. }))
    }

    pub fn len(&self) -> usize {
        self.lock().slots.values().filter(|slot| matches!(slot, Slot::Ready { .. })).count()
    }

    pub fn bytes(&self) -> u64 {
        self.lock().bytes
    }

    /// Drops all that is ready.
    pub fn clear(&self) {
        let dropped = self.lock().evict(0, 0);
        drop(dropped);
    }

    /// The entry, or the one that `plan` sizes and `build` makes of the plan: one call of each for a key at any time. A build that
    /// fails leaves nothing, and the next caller tries again.
    pub fn get_or_build<P, E: From<TooLarge>>(
        &self,
        key: &CacheKey,
        plan: impl FnOnce() -> Result<(P, u64), E>,
        build: impl FnOnce(P) -> Result<V, E>,
    ) -> Result<Arc<V>, E> {
        let mut entries = self.lock();
        loop {
            entries.tick += 1;
            let tick = entries.tick;
            match entries.slots.get_mut(key) {
                Some(Slot::Ready { value, used, .. }) => {
                    *used = tick;
                    return Ok(Arc::clone(value));
                }
                Some(Slot::Building { .. }) => {
                    entries = self.built.wait(entries).unwrap_or_else(PoisonError::into_inner);
                }
                None => break,
            }
        }
        entries.slots.insert(key.clone(), Slot::Building { bytes: 0 });
        drop(entries);
        let reservation = Reservation { cache: self, key };
        let (planned, bytes) = plan()?;
        if bytes > self.budget_bytes {
            return Err(TooLarge { needed_bytes: bytes, budget_bytes: self.budget_bytes }.into());
        }
        // What is evicted is dropped outside the lock, and before the build takes memory.
        drop(self.reserve(key, bytes));
        let value = Arc::new(build(planned)?);
        let mut entries = self.lock();
        entries.tick += 1;
        let used = entries.tick;
        entries.slots.insert(key.clone(), Slot::Ready { value: Arc::clone(&value), bytes, used });
        // Builds side by side may have gone beyond the number together.
        let building = entries.slots.values().filter(|slot| matches!(slot, Slot::Building { .. })).count();
        let surplus = entries.evict(self.capacity + building, self.budget_bytes);
        drop(entries);
        drop(surplus);
        std::mem::forget(reservation);
        self.built.notify_all();
        Ok(value)
    }

    /// Makes room for `bytes` under `key`; returns what was evicted.
    fn reserve(&self, key: &CacheKey, bytes: u64) -> Vec<Arc<V>> {
        let mut entries = self.lock();
        let evicted = entries.evict(self.capacity, self.budget_bytes.saturating_sub(bytes));
        entries.bytes += bytes;
        entries.slots.insert(key.clone(), Slot::Building { bytes });
        evicted
    }
}

impl<V> Entries<V> {
    /// Removes ready entries, the least recently used first, until these bounds hold or none is left.
    fn evict(&mut self, capacity: usize, bytes: u64) -> Vec<Arc<V>> {
        let mut evicted = Vec::new();
        while self.slots.len() > capacity || self.bytes > bytes {
            let ready = self.slots.iter().filter_map(|(key, slot)| match slot {
                Slot::Ready { used, .. } => Some((*used, key)),
                Slot::Building { .. } => None,
            });
            let Some((_, oldest)) = ready.min_by_key(|(used, _)| *used) else { break };
            let oldest = oldest.clone();
            if let Some(Slot::Ready { value, bytes, .. }) = self.slots.remove(&oldest) {
                self.bytes -= bytes;
                evicted.push(value);
            }
        }
        evicted
    }
}

/// Takes a build's place back if it fails or unwinds, so that those who wait try themselves.
struct Reservation<'c, V> {
    cache: &'c KeyedCache<V>,
    key: &'c CacheKey,
}

impl<V> Drop for Reservation<'_, V> {
    fn drop(&mut self) {
        let mut entries = self.cache.lock();
        if let Some(Slot::Building { bytes }) = entries.slots.remove(self.key) {
            entries.bytes -= bytes;
        }
        drop(entries);
        self.cache.built.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::key::KeyFields;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Debug, PartialEq)]
    struct Full(u64, u64);

    impl From<TooLarge> for Full {
        fn from(e: TooLarge) -> Self {
            Full(e.needed_bytes, e.budget_bytes)
        }
    }

    fn key(name: &str) -> CacheKey {
        KeyFields::new().with("name", name).key()
    }

    fn put(cache: &KeyedCache<String>, name: &str, bytes: u64) -> Result<Arc<String>, Full> {
        cache.get_or_build(&key(name), || Ok(((), bytes)), |()| Ok(name.to_owned()))
    }

    #[test]
    fn the_least_recently_used_goes_first_by_entries_and_by_bytes() {
        let cache = KeyedCache::new(3, 100);
        for name in ["a", "b", "c"] {
            put(&cache, name, 30).unwrap();
        }
        put(&cache, "a", 30).unwrap();
        put(&cache, "d", 5).unwrap();
        assert!(cache.contains(&key("a")) && !cache.contains(&key("b")) && cache.len() == 3);
        put(&cache, "e", 70).unwrap();
        assert_eq!((cache.len(), cache.bytes()), (2, 75), "c and a went for the bytes");
        assert!(cache.contains(&key("d")) && cache.contains(&key("e")));
    }

    #[test]
    fn it_evicts_before_it_builds() {
        let cache = KeyedCache::new(1, 100);
        let first = Arc::downgrade(&put(&cache, "a", 60).unwrap());
        cache
            .get_or_build::<(), Full>(
                &key("b"),
                || Ok(((), 60)),
                |()| {
                    assert!(
                        first.upgrade().is_none(),
                        "the old entry is gone before the new one takes memory"
                    );
                    Ok("b".to_owned())
                },
            )
            .unwrap();
    }

    #[test]
    fn what_the_budget_cannot_hold_is_an_error_and_evicts_nothing() {
        let cache = KeyedCache::new(4, 100);
        put(&cache, "a", 60).unwrap();
        assert_eq!(put(&cache, "b", 101).unwrap_err(), Full(101, 100));
        assert!(cache.contains(&key("a")) && cache.bytes() == 60);
    }

    #[test]
    fn a_build_that_fails_or_panics_leaves_nothing_and_the_next_caller_tries_again() {
        let cache: KeyedCache<String> = KeyedCache::new(4, 100);
        let failed = cache.get_or_build(&key("a"), || Ok(((), 10)), |()| Err(Full(1, 2)));
        assert_eq!((failed.unwrap_err(), cache.len(), cache.bytes()), (Full(1, 2), 0, 0));
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let build = |()| -> Result<String, Full> { panic!("a bug while building") };
            cache.get_or_build(&key("a"), || Ok(((), 10)), build)
        }));
        assert!(unwound.is_err() && cache.bytes() == 0);
        assert_eq!(*put(&cache, "a", 10).unwrap(), "a");
    }

    #[test]
    fn sixteen_threads_build_a_key_once() {
        let (cache, plans, builds) = (KeyedCache::new(4, 100), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let plan = || {
                        plans.fetch_add(1, Ordering::SeqCst);
                        Ok(((), 10))
                    };
                    let build = |()| {
                        builds.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                        Ok::<_, Full>("a".to_owned())
                    };
                    cache.get_or_build(&key("a"), plan, build).unwrap();
                });
            }
        });
        assert_eq!((plans.into_inner(), builds.into_inner(), cache.len()), (1, 1, 1));
    }
}
