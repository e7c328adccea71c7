//! Interleavings of a registry's callers, chosen by a model checker: every lock and every read of a pin count is a point at which
//! another thread may go on.

use super::super::bytes::{LazyBytes, SharedBytes};
use super::super::schedule::modelled;
use super::*;
use shuttle::thread::spawn;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicUsize;

/// Schedules tried of each scenario, half at random, half with few preemptions at the points that matter (Burckhardt et al., "A
/// Randomized Scheduler with Probabilistic Guarantees of Finding Bugs", 2010).
const SCHEDULES: usize = 1500;

fn explore(scenario: impl Fn() + Send + Sync + Copy + 'static) {
    shuttle::check_random(move || modelled(scenario), SCHEDULES);
    shuttle::check_pct(move || modelled(scenario), SCHEDULES, 3);
}

fn shape(len: usize) -> Shape {
    Shape::new(&[len], DType::U8)
}

fn registry() -> Arc<WeightRegistry> {
    Arc::new(WeightRegistry::new())
}

fn put(registry: &WeightRegistry, name: &str, value: u8) -> Result<WeightHandle, RegistryError> {
    registry.register(name, shape(8), vec![value; 8], WeightKind::Base)
}

fn value(guard: &PinGuard) -> u8 {
    let bytes = guard.bytes();
    assert!(bytes.len() == 8 && bytes.iter().all(|byte| *byte == bytes[0]), "a torn weight: {bytes:?}");
    bytes[0]
}

/// Made on demand, and counted.
#[derive(Debug)]
struct Made(AtomicUsize);

impl LazyBytes for Made {
    fn len(&self) -> usize {
        8
    }

    fn load(&self) -> std::io::Result<SharedBytes> {
        self.0.fetch_add(1, Relaxed);
        Ok(vec![7; 8].into())
    }
}

fn made() -> Arc<dyn LazyBytes> {
    Arc::new(Made(AtomicUsize::new(0)))
}

#[test]
fn one_of_two_contents_wins_a_name_and_the_other_is_a_conflict() {
    explore(|| {
        let registry = registry();
        let threads = [1u8, 2, 1].map(|value| {
            let registry = Arc::clone(&registry);
            spawn(move || {
                put(&registry, "w", value).map_err(|error| matches!(error, RegistryError::Conflict { .. }))
            })
        });
        let results = threads.map(|thread| thread.join().unwrap());
        let won: Vec<WeightHandle> = results.iter().filter_map(|result| result.ok()).collect();
        assert!(!won.is_empty() && won.iter().all(|handle| *handle == won[0]), "{results:?}");
        assert!(results.iter().all(|result| !matches!(result, Err(false))), "{results:?}");
        assert_eq!(results[0].is_ok(), results[2].is_ok(), "the same content gives the same answer");
        assert_eq!((registry.len(), registry.total_bytes()), (1, 8));
    });
}

#[test]
fn pins_find_a_whole_version_and_are_all_given_back_whatever_is_replaced_meanwhile() {
    explore(|| {
        let registry = registry();
        let handle = put(&registry, "w", 1).unwrap();
        let pinning = [(); 2].map(|()| {
            let registry = Arc::clone(&registry);
            spawn(move || {
                assert!(registry.pin(handle).unwrap() >= 1);
                let guard = registry.guard(handle).unwrap();
                assert!((1..=3).contains(&value(&guard)));
                drop(guard);
                registry.release(handle).unwrap();
            })
        });
        let replacing = {
            let registry = Arc::clone(&registry);
            spawn(move || {
                for value in [2, 3] {
                    registry.replace(handle, shape(8), vec![value; 8]).unwrap();
                }
            })
        };
        pinning.into_iter().for_each(|thread| thread.join().unwrap());
        replacing.join().unwrap();
        assert_eq!(registry.pin_count(handle).unwrap(), 0);
        assert!(matches!(registry.release(handle), Err(RegistryError::NotPinned { .. })));
        assert_eq!(registry.get(handle).unwrap().bytes().unwrap(), [3; 8]);
        assert_eq!((registry.get(handle).unwrap().version(), registry.total_bytes()), (2, 8));
        registry.unregister(handle).unwrap();
        assert_eq!(registry.totals(), WeightTotals::default());
    });
}

#[test]
fn a_weight_is_removed_or_pinned_never_both() {
    explore(|| {
        let registry = registry();
        let handle = put(&registry, "w", 1).unwrap();
        let pinning = {
            let registry = Arc::clone(&registry);
            spawn(move || match registry.pin(handle) {
                Ok(_) => {
                    let read = registry.get(handle).map(|entry| entry.bytes().map(|bytes| bytes[0]).unwrap());
                    assert_eq!(read.unwrap(), 1, "a pinned weight is there");
                    registry.release(handle).unwrap();
                }
                Err(RegistryError::StaleHandle { .. }) => {}
                Err(error) => panic!("{error}"),
            })
        };
        let removing = {
            let registry = Arc::clone(&registry);
            spawn(move || match registry.unregister(handle) {
                Ok(name) => {
                    assert_eq!(name, "w");
                    // The name is free: its next owner is another entry, which the old handle must not reach.
                    let next = put(&registry, "w", 9).unwrap();
                    assert!(next != handle && registry.get(handle).is_err());
                    true
                }
                Err(RegistryError::Pinned { pins, .. }) => {
                    assert!(pins >= 1);
                    false
                }
                Err(error) => panic!("{error}"),
            })
        };
        pinning.join().unwrap();
        let removed = removing.join().unwrap();
        assert_eq!(registry.lookup("w") == Some(handle), !removed);
        let now = registry.lookup("w").unwrap();
        assert_eq!((registry.pin_count(now).unwrap(), registry.total_bytes()), (0, 8));
    });
}

#[test]
fn an_alias_never_outlives_its_target_and_pins_its_storage() {
    explore(|| {
        let registry = registry();
        let target = put(&registry, "w", 1).unwrap();
        let tying = {
            let registry = Arc::clone(&registry);
            spawn(move || {
                let kind = WeightKind::TiedAlias { target };
                match registry.register("tied", shape(8), Vec::<u8>::new(), kind) {
                    Ok(tied) => {
                        let guard = registry.guard(tied).unwrap();
                        assert_eq!((value(&guard), registry.pin_count(target).unwrap()), (1, 1));
                        drop(guard);
                        registry.unregister(tied).unwrap();
                    }
                    Err(RegistryError::StaleHandle { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            })
        };
        let removing = {
            let registry = Arc::clone(&registry);
            spawn(move || match registry.unregister(target) {
                Ok(_) => true,
                Err(RegistryError::InUse { by, .. }) => {
                    assert_eq!(by, ["tied"]);
                    false
                }
                Err(RegistryError::Pinned { .. }) => false,
                Err(error) => panic!("{error}"),
            })
        };
        tying.join().unwrap();
        let left = u64::from(!removing.join().unwrap());
        assert_eq!((registry.len() as u64, registry.total_bytes()), (left, 8 * left));
    });
}

#[test]
fn a_version_is_packed_once_and_its_copy_goes_with_it() {
    explore(|| {
        let registry = registry();
        let handle = put(&registry, "w", 1).unwrap();
        let builds = Arc::new(AtomicUsize::new(0));
        let key = || PackedKey::new("layout", "isa", "f32");
        let packing = [(); 2].map(|()| {
            let (registry, builds) = (Arc::clone(&registry), Arc::clone(&builds));
            spawn(move || {
                let packed = registry.packed_or_insert_with(handle, &key(), |guard| {
                    builds.fetch_add(1, Relaxed);
                    Ok::<_, RegistryError>(Packed::new(value(guard), 100))
                });
                *packed.unwrap().downcast_ref::<u8>().unwrap()
            })
        });
        let replacing = {
            let registry = Arc::clone(&registry);
            spawn(move || registry.replace(handle, shape(8), vec![2; 8]).unwrap())
        };
        let found = packing.map(|thread| thread.join().unwrap());
        replacing.join().unwrap();
        let versions = found.iter().collect::<BTreeSet<_>>().len();
        assert_eq!(builds.load(Relaxed), versions, "once for each version that was asked for");
        let kept = registry.packed(handle, &key()).unwrap();
        let kept = kept.map(|packed| *packed.downcast_ref::<u8>().unwrap());
        assert_eq!(kept, found.contains(&2).then_some(2), "the copy of the old version is gone");
        assert_eq!(registry.packed_bytes(), 100 * u64::from(kept.is_some()));
    });
}

#[test]
fn the_byte_budget_holds_and_nobody_waits_for_ever() {
    explore(|| {
        let registry = registry();
        registry.set_stream_budget(Some(8));
        let handles =
            ["a", "b"].map(|name| registry.register(name, shape(8), made(), WeightKind::Base).unwrap());
        let threads = handles.map(|handle| {
            let registry = Arc::clone(&registry);
            spawn(move || match registry.guard(handle) {
                Ok(guard) => {
                    assert_eq!(value(&guard), 7);
                    assert!(registry.stream_stats().in_bytes <= 8);
                    true
                }
                Err(RegistryError::OverBudget { pinned_bytes, .. }) => {
                    assert_eq!(pinned_bytes, 8, "refused only while the other is pinned");
                    false
                }
                Err(error) => panic!("{error}"),
            })
        });
        let had = threads.map(|thread| thread.join().unwrap());
        assert!(had[0] || had[1]);
        assert!(registry.stream_stats().in_bytes <= 8);
        handles.into_iter().for_each(|handle| drop(registry.unregister(handle).unwrap()));
        assert_eq!((registry.stream_stats().in_bytes, registry.totals()), (0, WeightTotals::default()));
    });
}
