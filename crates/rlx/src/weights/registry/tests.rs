use super::super::slots::visits;
use super::*;
use std::io;
use std::sync::atomic::AtomicUsize;
use std::thread;

use rlx_tensor::byte_count;
use rlx_tensor::storage::mapped::{MapError, MappedFile};

use crate::weights::{LazyBytes, SharedBytes};

fn u8s(len: usize) -> Shape {
    Shape::new(&[len], DType::U8)
}

fn base(registry: &WeightRegistry, name: &str, bytes: &[u8]) -> Result<WeightHandle, RegistryError> {
    registry.register(name, u8s(bytes.len()), bytes, WeightKind::Base)
}

fn alias(
    registry: &WeightRegistry,
    name: &str,
    target: WeightHandle,
    len: usize,
) -> Result<WeightHandle, RegistryError> {
    registry.register(name, u8s(len), &[][..], WeightKind::TiedAlias { target })
}

fn factor(adapter: &str, base: WeightHandle, side: LoraSide, rank: usize) -> WeightKind {
    WeightKind::LoraAdapter { adapter: adapter.into(), base, side, rank, alpha: 16.0 }
}

#[derive(Debug)]
struct Made {
    len: usize,
    value: u8,
    loads: AtomicUsize,
}

impl Made {
    fn new(len: usize, value: u8) -> Arc<Made> {
        Arc::new(Made { len, value, loads: AtomicUsize::new(0) })
    }
}

impl LazyBytes for Made {
    fn len(&self) -> usize {
        self.len
    }

    fn load(&self) -> io::Result<SharedBytes> {
        self.loads.fetch_add(1, Relaxed);
        Ok(vec![self.value; self.len].into())
    }
}

fn lazy(registry: &WeightRegistry, name: &str, made: &Arc<Made>) -> WeightHandle {
    let source: Arc<dyn LazyBytes> = made.clone();
    registry.register(name, u8s(made.len), source, WeightKind::Base).unwrap()
}

fn mapped(bytes: &[u8]) -> (tempfile::TempDir, Arc<MappedFile>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w");
    std::fs::write(&path, bytes).unwrap();
    let file = MappedFile::open(&path).unwrap();
    (folder, file)
}

#[test]
fn same_content_gives_the_same_handle() {
    let registry = WeightRegistry::new();
    let first = base(&registry, "w", b"abc").unwrap();
    assert_eq!(base(&registry, "w", b"abc").unwrap(), first);
    assert_eq!((registry.len(), registry.total_bytes()), (1, 3));
    assert_eq!(registry.lookup("w"), Some(first));
    assert_eq!(registry.lookup("v"), None);
    let entry = registry.get(first).unwrap();
    assert_eq!((entry.name(), entry.bytes().unwrap(), entry.version()), ("w", &b"abc"[..], 0));
    assert_eq!((entry.shape(), entry.kind()), (&u8s(3), &WeightKind::Base));
}

#[test]
fn other_content_is_a_conflict_that_names_what_differs() {
    let registry = WeightRegistry::new();
    let w =
        registry.register("w", Shape::new(&[2usize, 2], DType::U8), &b"abcd"[..], WeightKind::Base).unwrap();
    let differs =
        |shape: Shape, bytes: &[u8], kind: WeightKind| match registry.register("w", shape, bytes, kind) {
            Err(RegistryError::Conflict { what, .. }) => what,
            other => panic!("{other:?}"),
        };
    let square = || Shape::new(&[2usize, 2], DType::U8);
    assert_eq!(differs(square(), b"abcx", WeightKind::Base), "content");
    assert_eq!(differs(u8s(4), b"abcd", WeightKind::Base), "shape");
    assert_eq!(differs(Shape::new(&[2usize, 2], DType::I8), b"abcd", WeightKind::Base), "dtype");
    assert_eq!(differs(square(), b"", WeightKind::TiedAlias { target: w }), "kind");
    assert_eq!(registry.get(w).unwrap().bytes().unwrap(), b"abcd");
}

#[test]
fn length_is_checked_with_checked_arithmetic_and_quantised_blocks() {
    let registry = WeightRegistry::new();
    let register = |shape: Shape, len: usize| registry.register("w", shape, vec![0u8; len], WeightKind::Base);
    let short = register(Shape::new(&[3usize], DType::F32), 11);
    assert!(matches!(short, Err(RegistryError::Length { expected_bytes: 12, found_bytes: 11, .. })));
    let wraps = register(Shape::new(&[1usize << 62, 8], DType::F32), 0);
    assert!(matches!(wraps, Err(RegistryError::Shape { .. })));
    assert!(matches!(register(Shape::new(&[33usize], DType::Q4_0), 18), Err(RegistryError::Shape { .. })));
    let symbolic = Shape::new(&[rlx_tensor::Dim::symbol("batch")], DType::U8);
    assert!(matches!(register(symbolic, 1), Err(RegistryError::Shape { .. })));
    assert!(registry.is_empty() && registry.total_bytes() == 0);
    register(Shape::new(&[64usize], DType::Q4_0), 36).unwrap();
}

#[test]
fn replace_keeps_the_handle_and_leaves_pins_and_snapshots_their_version() {
    let registry = WeightRegistry::new();
    let w = base(&registry, "w", b"old").unwrap();
    let (snapshot, guard) = (registry.get(w).unwrap(), registry.guard(w).unwrap());
    registry.replace(w, u8s(5), &b"newer"[..]).unwrap();
    assert_eq!((snapshot.bytes().unwrap(), guard.bytes()), (&b"old"[..], &b"old"[..]));
    let entry = registry.get(w).unwrap();
    assert_eq!((entry.bytes().unwrap(), entry.version()), (&b"newer"[..], 1));
    assert_eq!((registry.total_bytes(), registry.pin_count(w).unwrap()), (5, 0));
    assert!(registry.replace(w, u8s(4), &b"12345"[..]).is_err());
    assert_eq!(registry.get(w).unwrap().bytes().unwrap(), b"newer");
}

#[test]
fn a_pin_by_hand_made_before_a_replacement_is_released_first() {
    let registry = WeightRegistry::new();
    let w = base(&registry, "w", b"old").unwrap();
    assert_eq!(registry.pin(w).unwrap(), 1);
    registry.replace(w, u8s(3), &b"new"[..]).unwrap();
    assert_eq!(registry.pin(w).unwrap(), 1);
    assert_eq!(registry.pin(w).unwrap(), 2);
    assert!(matches!(registry.unregister(w), Err(RegistryError::Pinned { pins: 3, .. })));
    assert_eq!(registry.release(w).unwrap(), 0);
    assert_eq!(registry.release(w).unwrap(), 1);
    assert_eq!(registry.release(w).unwrap(), 0);
    assert!(matches!(registry.release(w), Err(RegistryError::NotPinned { .. })));
    assert_eq!(registry.unregister(w).unwrap(), "w");
}

#[test]
fn release_at_zero_is_an_error_and_never_takes_a_guards_pin() {
    let registry = WeightRegistry::new();
    let w = base(&registry, "w", b"abc").unwrap();
    assert!(matches!(registry.release(w), Err(RegistryError::NotPinned { .. })));
    let guard = registry.guard(w).unwrap();
    assert!(matches!(registry.release(w), Err(RegistryError::NotPinned { .. })));
    assert_eq!((registry.pin(w).unwrap(), registry.release(w).unwrap()), (2, 1));
    drop(guard);
    assert_eq!(registry.pin_count(w).unwrap(), 0);
    assert_eq!(registry.lookup("w"), Some(w));
}

#[test]
fn unregister_is_refused_while_pinned_or_aliased_before_anything_changes() {
    let registry = WeightRegistry::new();
    let w = base(&registry, "w", b"abc").unwrap();
    let tied = alias(&registry, "head", w, 3).unwrap();
    match registry.unregister(w) {
        Err(RegistryError::InUse { by, .. }) => assert_eq!(by, ["head"]),
        other => panic!("{other:?}"),
    }
    assert_eq!(registry.pin(tied).unwrap(), 1);
    assert!(matches!(registry.unregister(tied), Err(RegistryError::Pinned { pins: 1, .. })));
    assert_eq!((registry.len(), registry.total_bytes()), (2, 3));
    assert_eq!(registry.release(w).unwrap(), 0);
    assert_eq!(registry.unregister(tied).unwrap(), "head");
    assert_eq!(registry.unregister(w).unwrap(), "w");
    assert_eq!((registry.len(), registry.total_bytes()), (0, 0));
}

#[test]
fn alias_chains_resolve_to_the_root_and_pins_land_on_its_storage() {
    let registry = WeightRegistry::new();
    let w = base(&registry, "w", b"abc").unwrap();
    let first = alias(&registry, "first", w, 3).unwrap();
    let second = alias(&registry, "second", first, 3).unwrap();
    assert_eq!(registry.get(second).unwrap().name(), "w");
    assert_eq!(registry.get(second).unwrap().bytes().unwrap(), b"abc");
    assert_eq!((registry.pin(second).unwrap(), registry.pin_count(w).unwrap()), (1, 1));
    assert_eq!(registry.release(first).unwrap(), 0);
    let (name, kind) = registry.describe(second).unwrap();
    assert_eq!((&*name, kind), ("second", WeightKind::TiedAlias { target: w }));
    assert_eq!(registry.unregister(first).unwrap(), "first");
    assert_eq!(registry.get(second).unwrap().name(), "w");
    assert_eq!((registry.len(), registry.total_bytes()), (2, 3));
    assert_eq!(alias(&registry, "second", w, 3).unwrap(), second);
}

#[test]
fn an_alias_has_no_bytes_and_its_targets_shape_and_dtype() {
    let registry = WeightRegistry::new();
    let w = base(&registry, "w", b"abc").unwrap();
    let kind = || WeightKind::TiedAlias { target: w };
    let wrong = |result| assert!(matches!(result, Err(RegistryError::Alias { .. })));
    wrong(registry.register("a", u8s(3), &b"abc"[..], kind()));
    wrong(registry.register("a", u8s(4), &b""[..], kind()));
    wrong(registry.register("a", Shape::new(&[3usize], DType::I8), &b""[..], kind()));
    assert_eq!(registry.len(), 1);
    let tied = registry.register("a", u8s(3), &b""[..], kind()).unwrap();
    wrong(registry.replace(tied, u8s(3), &b"xyz"[..]).map(|()| tied));
    assert!(matches!(registry.replace(w, u8s(2), &b"xy"[..]), Err(RegistryError::InUse { .. })));
    registry.replace(w, u8s(3), &b"xyz"[..]).unwrap();
    assert_eq!(registry.get(tied).unwrap().bytes().unwrap(), b"xyz");
}

#[test]
fn foreign_and_stale_handles_are_errors_everywhere() {
    let (registry, other) = (WeightRegistry::new(), WeightRegistry::new());
    let w = base(&registry, "w", b"abc").unwrap();
    assert!(matches!(other.get(w), Err(RegistryError::ForeignHandle { .. })));
    assert!(matches!(alias(&other, "a", w, 3), Err(RegistryError::ForeignHandle { .. })));
    registry.unregister(w).unwrap();
    let again = base(&registry, "v", b"xyz").unwrap();
    assert_ne!(again.id(), w.id());
    let stale = |result: Result<(), RegistryError>| {
        assert!(matches!(result, Err(RegistryError::StaleHandle { .. })));
    };
    stale(registry.get(w).map(|_| ()));
    stale(registry.pin(w).map(|_| ()));
    stale(registry.release(w).map(|_| ()));
    stale(registry.unregister(w).map(|_| ()));
    stale(registry.replace(w, u8s(3), &b"new"[..]));
    stale(alias(&registry, "a", w, 3).map(|_| ()));
    stale(registry.register("l", u8s(3), &b"abc"[..], factor("x", w, LoraSide::A, 1)).map(|_| ()));
    assert_eq!(registry.get(again).unwrap().bytes().unwrap(), b"xyz");
}

#[test]
fn one_storage_under_two_names_counts_once() {
    let registry = WeightRegistry::new();
    let shared = SharedBytes::from(vec![7u8; 100]);
    let register = |name: &str, bytes: SharedBytes| {
        registry.register(name, u8s(bytes.len()), bytes, WeightKind::Base).unwrap()
    };
    let (a, b) = (register("a", shared.clone()), register("b", shared.clone()));
    register("part", shared.slice(0, 50).unwrap());
    assert_ne!(a, b);
    assert_eq!((registry.len(), registry.total_bytes()), (3, 150));
    assert_eq!((registry.pin(a).unwrap(), registry.pin(b).unwrap()), (1, 2));
    registry.release(a).unwrap();
    registry.release(a).unwrap();
    registry.unregister(a).unwrap();
    assert_eq!(registry.total_bytes(), 150);
    registry.unregister(b).unwrap();
    assert_eq!(registry.total_bytes(), 50);
}

#[test]
fn one_mapped_range_through_two_maps_is_one_storage() {
    let (folder, file) = mapped(&[3; 300]);
    let again = MappedFile::open(folder.path().join("w")).unwrap();
    let registry = WeightRegistry::new();
    let register = |name: &str, file: &Arc<MappedFile>, at: usize| {
        registry.register(name, u8s(100), file.range(at, 100).unwrap(), WeightKind::Base)
    };
    let a = register("a", &file, 0).unwrap();
    assert_eq!(register("a", &again, 0).unwrap(), a);
    register("b", &again, 0).unwrap();
    register("c", &file, 100).unwrap();
    let totals = registry.totals();
    assert_eq!((totals.total_bytes, totals.mapped_bytes, totals.resident_bytes), (200, 200, 0));
    assert_eq!(register("a", &file, 200).unwrap(), a, "other range, equal bytes: equal by digest");
}

#[test]
fn totals_tell_kinds_adapters_and_places_apart() {
    let registry = WeightRegistry::new();
    let w =
        registry.register("w", Shape::new(&[4usize, 6], DType::U8), vec![0u8; 24], WeightKind::Base).unwrap();
    let matrix = |rows: usize, columns: usize| Shape::new(&[rows, columns], DType::U8);
    let a =
        registry.register("w.A", matrix(2, 6), vec![1u8; 12], factor("style", w, LoraSide::A, 2)).unwrap();
    let b = registry.register("w.B", matrix(4, 2), vec![2u8; 8], factor("style", w, LoraSide::B, 2)).unwrap();
    lazy(&registry, "lazy", &Made::new(10, 1));
    let totals = registry.totals();
    assert_eq!((totals.total_bytes, totals.base_bytes, totals.lora_bytes), (54, 34, 20));
    assert_eq!((totals.lazy_bytes, totals.resident_bytes, totals.packed_bytes), (10, 44, 0));
    assert_eq!(registry.lora_adapter_bytes("style").unwrap(), 20);
    assert_eq!(registry.lora_adapter_names(), ["style"]);
    assert_eq!(registry.lora_adapter_handles("style").unwrap(), [a, b]);
    match registry.lora_adapter_handles("other") {
        Err(RegistryError::UnknownAdapter { known, .. }) => assert_eq!(known, ["style"]),
        other => panic!("{other:?}"),
    }
    assert!(matches!(registry.unregister(w), Err(RegistryError::InUse { by, .. }) if by == ["w.A", "w.B"]));
    registry.unregister(a).unwrap();
    registry.unregister(b).unwrap();
    assert!(registry.lora_adapter_names().is_empty());
    assert_eq!(registry.totals().lora_bytes, 0);
    registry.unregister(w).unwrap();
}

#[test]
fn adapters_are_checked_against_their_base() {
    let registry = WeightRegistry::new();
    let w =
        registry.register("w", Shape::new(&[4usize, 6], DType::U8), vec![0u8; 24], WeightKind::Base).unwrap();
    let register = |name: &str, dims: [usize; 2], side, rank| {
        let shape = Shape::new(&dims, DType::U8);
        registry.register(name, shape, vec![0u8; dims[0] * dims[1]], factor("x", w, side, rank))
    };
    let wrong = |result| assert!(matches!(result, Err(RegistryError::Adapter { .. })), "{result:?}");
    wrong(register("a", [2, 5], LoraSide::A, 2));
    wrong(register("a", [3, 6], LoraSide::A, 2));
    wrong(register("a", [0, 6], LoraSide::A, 0));
    register("a", [2, 6], LoraSide::A, 2).unwrap();
    wrong(register("b", [4, 3], LoraSide::B, 3));
    wrong(register("again", [2, 6], LoraSide::A, 2));
    wrong(register("b", [6, 2], LoraSide::B, 2));
    assert_eq!(registry.lora_adapter_handles("x").unwrap().len(), 1);
    register("b", [4, 2], LoraSide::B, 2).unwrap();
}

#[test]
fn totals_and_adapter_look_ups_visit_as_few_entries_in_a_large_registry_as_in_a_small_one() {
    let visited = |weights: u64| {
        let registry = WeightRegistry::new();
        let square = || Shape::new(&[8usize, 8], DType::U8);
        for i in 0..weights {
            let bytes = i.to_le_bytes().repeat(8);
            let handle = registry.register(&format!("w{i}"), square(), bytes, WeightKind::Base).unwrap();
            if i < 2 {
                let (kind, shape) =
                    (factor("style", handle, LoraSide::A, 2), Shape::new(&[2usize, 8], DType::U8));
                registry.register(&format!("a{i}"), shape, vec![i as u8; 16], kind).unwrap();
            }
        }
        let handle = registry.lookup("w1").unwrap();
        let count = |look: &dyn Fn()| {
            let before = visits();
            look();
            visits() - before
        };
        [
            count(&|| assert!(registry.totals().total_bytes > 0)),
            count(&|| assert_eq!(registry.total_bytes(), registry.totals().total_bytes)),
            count(&|| assert_eq!(registry.packed_bytes(), 0)),
            count(&|| assert_eq!(registry.lora_adapter_names(), ["style"])),
            count(&|| assert_eq!(registry.lora_adapter_handles("style").unwrap().len(), 2)),
            count(&|| assert_eq!(registry.lora_adapter_bytes("style").unwrap(), 32)),
            count(&|| assert_eq!(registry.lookup("w1"), Some(handle))),
            count(&|| assert_eq!(registry.get(handle).unwrap().name(), "w1")),
            count(&|| assert_eq!(registry.guard(handle).unwrap().bytes().len(), 64)),
            count(&|| registry.replace(handle, square(), vec![3u8; 64]).unwrap()),
            count(&|| assert_eq!(registry.pin(handle).and_then(|_| registry.release(handle)).unwrap(), 0)),
            count(&|| assert!(registry.unregister(registry.lookup("w7").unwrap()).is_ok())),
        ]
    };
    let small = visited(8);
    assert_eq!(small, visited(4_000));
    assert_eq!(small[..2], [0, 0], "totals are kept, not summed");
    assert!(small.iter().all(|visits| *visits <= 12), "{small:?}");
}

#[test]
fn a_streamed_out_weight_is_read_only_through_a_pin() {
    let registry = WeightRegistry::new();
    let made = Made::new(4, 9);
    let w = lazy(&registry, "w", &made);
    assert!(matches!(registry.get(w).unwrap().bytes(), Err(RegistryError::StreamedOut { .. })));
    assert_eq!(made.loads.load(Relaxed), 0);
    let guard = registry.guard(w).unwrap();
    assert_eq!(guard.bytes(), [9; 4]);
    assert_eq!(registry.get(w).unwrap().bytes().unwrap(), [9; 4]);
    assert_eq!(registry.totals().resident_bytes, 4);
    drop(guard);
    registry.set_stream_budget(Some(0));
    assert_eq!((registry.totals().resident_bytes, registry.stream_stats().dropped), (0, 1));
    assert!(registry.get(w).unwrap().bytes().is_err());
}

#[test]
fn the_byte_budget_drops_the_least_recently_used_and_pins_bring_back() {
    let registry = WeightRegistry::new();
    registry.set_stream_budget(Some(20));
    let made: Vec<_> = (0..4).map(|i| Made::new(10, i)).collect();
    let handles: Vec<_> =
        made.iter().enumerate().map(|(i, made)| lazy(&registry, &format!("w{i}"), made)).collect();
    for &handle in &handles[..2] {
        drop(registry.guard(handle).unwrap());
    }
    drop(registry.guard(handles[0]).unwrap());
    drop(registry.guard(handles[2]).unwrap());
    let is_in = |i: usize| registry.get(handles[i]).unwrap().bytes().is_ok();
    assert_eq!([is_in(0), is_in(1), is_in(2), is_in(3)], [true, false, true, false]);
    assert_eq!(registry.guard(handles[1]).unwrap().bytes(), [1; 10]);
    assert_eq!(made[1].loads.load(Relaxed), 2);
    assert!(registry.stream_stats().in_bytes <= 20);
    let (_a, _b) = (registry.guard(handles[2]).unwrap(), registry.guard(handles[1]).unwrap());
    match registry.guard(handles[3]) {
        Err(RegistryError::OverBudget { needed_bytes, pinned_bytes, budget_bytes, .. }) => {
            assert_eq!((needed_bytes, pinned_bytes, budget_bytes), (10, 20, 20));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(registry.pin_count(handles[3]).unwrap(), 0);
}

#[test]
fn mapped_weights_stream_under_the_budget_and_come_back_unchanged() {
    let bytes: Vec<u8> = (0..30_000u32).map(|i| (i % 251) as u8).collect();
    let (_folder, file) = mapped(&bytes);
    let registry = WeightRegistry::new();
    let handles: Vec<_> = (0..3)
        .map(|i| {
            let range = file.range(i * 10_000, 10_000).unwrap();
            registry.register(&format!("w{i}"), u8s(10_000), range, WeightKind::Base).unwrap()
        })
        .collect();
    assert!(handles.iter().all(|&handle| registry.get(handle).unwrap().bytes().is_ok()));
    registry.set_stream_budget(Some(10_000));
    let is_in = |i: usize| registry.get(handles[i]).unwrap().bytes().is_ok();
    assert_eq!([is_in(0), is_in(1), is_in(2)], [false, false, true]);
    assert_eq!(registry.guard(handles[0]).unwrap().bytes(), &bytes[..10_000]);
    assert_eq!([is_in(0), is_in(1), is_in(2)], [true, false, false]);
}

#[test]
fn a_file_that_shrinks_is_an_error_at_pin_and_at_run() {
    let (folder, file) = mapped(&[5; 9_000]);
    let registry = WeightRegistry::new();
    let w = registry.register("w", u8s(9_000), file.range(0, 9_000).unwrap(), WeightKind::Base).unwrap();
    let guard = registry.guard(w).unwrap();
    guard.still_valid().unwrap();
    std::fs::OpenOptions::new().write(true).open(folder.path().join("w")).unwrap().set_len(10).unwrap();
    assert!(matches!(guard.still_valid(), Err(RegistryError::Map(MapError::Shrank { .. }))));
    assert!(matches!(registry.pin(w), Err(RegistryError::Map(MapError::Shrank { .. }))));
    drop(guard);
    assert_eq!(registry.pin_count(w).unwrap(), 0);
}

#[test]
fn a_lazy_source_that_fails_or_lies_about_its_length_pins_nothing() {
    #[derive(Debug)]
    struct Bad(bool);
    impl LazyBytes for Bad {
        fn len(&self) -> usize {
            8
        }
        fn load(&self) -> io::Result<SharedBytes> {
            if self.0 { Ok(vec![0; 7].into()) } else { Err(io::Error::other("disk on fire")) }
        }
    }
    let registry = WeightRegistry::new();
    for (name, lies) in [("lies", true), ("fails", false)] {
        let source: Arc<dyn LazyBytes> = Arc::new(Bad(lies));
        let w = registry.register(name, u8s(8), source, WeightKind::Base).unwrap();
        match registry.pin(w) {
            Err(RegistryError::Length { found_bytes: 7, .. }) if lies => {}
            Err(RegistryError::Load { .. }) if !lies => {}
            other => panic!("{other:?}"),
        }
        assert_eq!((registry.pin_count(w).unwrap(), registry.stream_stats().in_bytes), (0, 0));
    }
}

fn key(layout: &'static str) -> PackedKey {
    PackedKey::new(layout, "avx512", "f32")
}

fn sum(guard: &PinGuard) -> Result<Packed, RegistryError> {
    let total: u64 = guard.bytes().iter().map(|&byte| u64::from(byte)).sum();
    Ok(Packed::new(total, 8))
}

#[test]
fn a_packed_copy_is_built_once_under_16_threads() {
    let (_folder, file) = mapped(&[1; 5_000]);
    let registry = WeightRegistry::new();
    let w = registry.register("w", u8s(5_000), file.range(0, 5_000).unwrap(), WeightKind::Base).unwrap();
    let builds = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let packed = registry
                    .packed_or_insert_with(w, &key("n16"), |guard| {
                        builds.fetch_add(1, Relaxed);
                        thread::sleep(std::time::Duration::from_millis(20));
                        sum(guard)
                    })
                    .unwrap();
                assert_eq!(packed.downcast_ref::<u64>(), Some(&5_000));
            });
        }
    });
    assert_eq!(builds.load(Relaxed), 1);
    assert_eq!((registry.packed_bytes(), registry.pin_count(w).unwrap()), (8, 0));
    assert_eq!(registry.get(w).unwrap().bytes().unwrap(), [1; 5_000]);
}

#[test]
fn packed_copies_are_kept_per_layout_and_version_and_go_with_their_storage() {
    let registry = WeightRegistry::new();
    let w = base(&registry, "w", &[1; 10]).unwrap();
    let tied = alias(&registry, "t", w, 10).unwrap();
    let old = registry.packed_or_insert_with(w, &key("a"), sum).unwrap();
    registry.packed_or_insert_with(w, &key("b"), sum).unwrap();
    assert!(Arc::ptr_eq(&old, &registry.packed_or_insert_with(tied, &key("a"), sum).unwrap()));
    assert_eq!(registry.packed_bytes(), 16);
    registry.replace(w, u8s(10), vec![2u8; 10]).unwrap();
    assert_eq!(registry.packed_bytes(), 0);
    let new = registry.packed_or_insert_with(w, &key("a"), sum).unwrap();
    assert_eq!((old.downcast_ref(), new.downcast_ref()), (Some(&10u64), Some(&20u64)));
    assert!(old.downcast_ref::<u32>().is_none());
    assert_eq!(*old.downcast::<u64>().unwrap(), 10);
}

#[test]
fn a_pack_that_fails_leaves_nothing_and_is_tried_again() {
    let registry = WeightRegistry::new();
    let w = base(&registry, "w", &[1; 10]).unwrap();
    let failed = registry
        .packed_or_insert_with(w, &key("a"), |_| Err(RegistryError::Absent { name: "scale".to_owned() }));
    assert!(failed.is_err());
    assert_eq!((registry.packed_bytes(), registry.pin_count(w).unwrap()), (0, 0));
    assert_eq!(registry.packed_or_insert_with(w, &key("a"), sum).unwrap().downcast_ref(), Some(&10u64));
}

#[test]
fn packing_a_lazy_weight_gives_its_source_back() {
    let registry = WeightRegistry::new();
    let w = lazy(&registry, "w", &Made::new(100, 1));
    registry.packed_or_insert_with(w, &key("a"), sum).unwrap();
    assert_eq!((registry.totals().resident_bytes, registry.packed_bytes()), (0, 8));
    let guard = registry.guard(w).unwrap();
    registry.packed_or_insert_with(w, &key("b"), sum).unwrap();
    assert_eq!(guard.bytes(), [1; 100]);
    assert_eq!(registry.totals().resident_bytes, 100);
}

#[test]
fn a_build_may_use_the_registry_while_it_packs() {
    let registry = WeightRegistry::new();
    let w = base(&registry, "w", &[1; 10]).unwrap();
    let packed = registry.packed_or_insert_with(w, &key("a"), |guard| {
        base(&registry, "scale", b"s")?;
        registry.packed_or_insert_with(w, &key("inner"), sum)?;
        sum(guard)
    });
    assert_eq!(packed.unwrap().downcast_ref(), Some(&10u64));
    assert_eq!(registry.packed_bytes(), 16);
}

#[test]
fn tensors_of_a_loader_are_registered_without_a_copy() {
    let loader = crate::weights::BytesWeightLoader::from_pairs([("w", vec![4u8; 6])]).unwrap();
    let registry = WeightRegistry::new();
    let w = registry.register_from(&loader, "w", WeightKind::Base).unwrap();
    let held = registry.get(w).unwrap();
    assert_eq!(held.bytes().unwrap().as_ptr(), loader.tensor_bytes("w").unwrap().unwrap().as_ptr());
    let absent = registry.register_from(&loader, "v", WeightKind::Base);
    assert!(matches!(absent, Err(RegistryError::Absent { .. })));
}

#[test]
fn empty_weights_of_different_names_share_no_pins() {
    let registry = WeightRegistry::new();
    let (a, b) = (base(&registry, "a", b"").unwrap(), base(&registry, "b", b"").unwrap());
    registry.pin(a).unwrap();
    assert_eq!(registry.pin_count(b).unwrap(), 0);
    assert_eq!(base(&registry, "a", b"").unwrap(), a);
    registry.unregister(b).unwrap();
}

/// A generator of its own, so that a failing seed can be run again.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

#[test]
fn eight_threads_registering_pinning_replacing_and_removing_keep_every_invariant() {
    const NAMES: u64 = 6;
    let registry = WeightRegistry::new();
    registry.set_stream_budget(Some(4_000));
    thread::scope(|scope| {
        for seed in 0..8 {
            let registry = &registry;
            scope.spawn(move || stress(registry, Random(seed), NAMES));
        }
    });
    let mut total = 0;
    for name in registry.names() {
        let handle = registry.lookup(&name).unwrap();
        assert_eq!(registry.pin_count(handle).unwrap(), 0, "{name}");
        if matches!(registry.describe(handle).unwrap().1, WeightKind::Base) {
            total += byte_count(&registry.get(handle).unwrap().shape().known_dims().unwrap(), DType::U8)
                .unwrap() as u64;
        }
    }
    assert_eq!(registry.total_bytes(), total);
    assert!(registry.stream_stats().in_bytes <= 4_000);
    let (aliases, bases): (Vec<_>, Vec<_>) =
        registry.names().into_iter().partition(|name| name.starts_with("alias"));
    for name in aliases.iter().chain(&bases) {
        registry.unregister(registry.lookup(name).unwrap()).unwrap();
    }
    assert!(registry.is_empty());
    let totals = registry.totals();
    assert_eq!((totals, registry.stream_stats().in_bytes), (WeightTotals::default(), 0));
}

fn stress(registry: &WeightRegistry, mut random: Random, names: u64) {
    let mut pinned = Vec::new();
    for _ in 0..2_000 {
        let i = random.below(names);
        let name = format!("w{i}");
        let handle = registry.lookup(&name);
        match (random.below(7), handle) {
            (0, _) => {
                let made = Made::new(1_000 + i as usize, i as u8);
                let source: Arc<dyn LazyBytes> = made;
                match registry.register(&name, u8s(1_000 + i as usize), source, WeightKind::Base) {
                    Ok(_) | Err(RegistryError::Conflict { .. }) => {}
                    other => panic!("{other:?}"),
                }
            }
            (1, Some(handle)) => {
                let value = random.below(250) as u8;
                match registry.replace(handle, u8s(1_000 + i as usize), vec![value; 1_000 + i as usize]) {
                    Ok(()) | Err(RegistryError::StaleHandle { .. }) => {}
                    other => panic!("{other:?}"),
                }
            }
            (2, Some(handle)) => match registry.guard(handle) {
                Ok(guard) => {
                    let bytes = guard.bytes();
                    assert_eq!(bytes.len(), 1_000 + i as usize);
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "torn {name}");
                }
                Err(RegistryError::StaleHandle { .. } | RegistryError::OverBudget { .. }) => {}
                Err(other) => panic!("{other}"),
            },
            (3, Some(handle)) => match registry.pin(handle) {
                Ok(count) => {
                    assert!(count >= 1);
                    pinned.push(handle);
                }
                Err(RegistryError::StaleHandle { .. } | RegistryError::OverBudget { .. }) => {}
                Err(other) => panic!("{other}"),
            },
            (4, _) => {
                if let Some(handle) = pinned.pop() {
                    registry.release(handle).unwrap();
                }
            }
            (5, Some(handle)) => match registry.unregister(handle) {
                Ok(removed) => assert_eq!(removed, name),
                Err(
                    RegistryError::Pinned { .. }
                    | RegistryError::InUse { .. }
                    | RegistryError::StaleHandle { .. },
                ) => {}
                Err(other) => panic!("{other}"),
            },
            (_, Some(handle)) => match alias(registry, &format!("alias{i}"), handle, 1_000 + i as usize) {
                Ok(tied) => drop(registry.unregister(tied)),
                Err(RegistryError::StaleHandle { .. } | RegistryError::Conflict { .. }) => {}
                Err(other) => panic!("{other}"),
            },
            _ => {}
        }
    }
    for handle in pinned {
        registry.release(handle).unwrap();
    }
}
