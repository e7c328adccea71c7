use super::*;
use std::collections::HashSet;

fn stamp() -> Stamp {
    Stamp {
        kind: "packed".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        device: "cpu".into(),
        isa: "scalar".into(),
        precision: "f32".into(),
        packing: [0; 32],
    }
}

fn content(seed: u8) -> Vec<u8> {
    (0..50_000).map(|at: usize| (at * 7) as u8 ^ seed).collect()
}

fn store(cache: &AotCache, key: &[u8]) -> bool {
    cache.store_packed(&stamp(), key, b"layout", &content(key[0]), 1)
}

fn found(cache: &AotCache, key: &[u8]) -> bool {
    match cache.packed(&stamp(), key, 1) {
        None => false,
        Some(found) => {
            assert_eq!(
                (found.layout.as_slice(), found.content.bytes()),
                (&b"layout"[..], &content(key[0])[..])
            );
            true
        }
    }
}

fn only_file(cache: &AotCache) -> PathBuf {
    let entries = cache.files().unwrap();
    assert_eq!(entries.len(), 1);
    cache.folder().join(entries[0].kind).join(&entries[0].name)
}

#[test]
fn an_entry_is_found_by_its_whole_key_and_named_by_a_digest() {
    let folder = tempfile::tempdir().unwrap();
    let cache = AotCache::new(folder.path(), 1 << 30);
    assert!(!found(&cache, b"a") && store(&cache, b"a") && found(&cache, b"a"));
    assert!(!found(&cache, b"b"));
    let names: Vec<String> = cache.entries().unwrap().into_iter().map(|entry| entry.name).collect();
    assert!(names.iter().all(|name| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit())));
    let other = Stamp { isa: "avx2".into(), ..stamp() };
    assert!(cache.packed(&other, b"a", 1).is_none());
}

#[test]
fn a_swapped_file_is_a_miss_that_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let cache = AotCache::new(folder.path(), 1 << 30);
    store(&cache, b"a");
    let a = only_file(&cache);
    let b = cache.path(KINDS[1], &stamp(), b"b");
    fs::copy(&a, &b).unwrap();
    assert!(!found(&cache, b"b") && !b.exists());
    assert!(store(&cache, b"b") && found(&cache, b"b") && found(&cache, b"a"));
}

#[test]
fn truncated_and_flipped_entries_are_misses_and_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let cache = AotCache::new(folder.path(), 1 << 30);
    store(&cache, b"a");
    let path = only_file(&cache);
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(997).chain([whole.len() - 1]) {
        fs::write(&path, &whole[..at]).unwrap();
        assert!(!found(&cache, b"a"), "cut to {at}");
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        fs::write(&path, &flipped).unwrap();
        assert!(!found(&cache, b"a"), "flip at {at}");
    }
    assert!(store(&cache, b"a") && found(&cache, b"a"));
}

#[test]
fn a_plan_with_a_right_checksum_passes_the_verifier_or_is_a_miss() {
    let folder = tempfile::tempdir().unwrap();
    let cache = AotCache::new(folder.path(), 1 << 30);
    let text = "lir \"none\" {\n  arena 7\n  step\n}\n";
    let small = [Section { name: PLAN, about: &[], bytes: text.as_bytes() }];
    let stamp = stamp();
    let container = Container { stamp: &stamp, key: b"k", small: &small, large: &[] };
    assert!(cache.store(KINDS[0], &container, 1));
    assert!(cache.plan(&stamp, b"k").is_none());
    assert!(cache.files().unwrap().is_empty(), "the forged plan is removed");
}

#[test]
fn the_least_recently_used_entries_go_first_and_the_limit_holds() {
    let folder = tempfile::tempdir().unwrap();
    let one = {
        let cache = AotCache::new(folder.path().join("one"), 1 << 30);
        store(&cache, b"a");
        cache.files().unwrap()[0].bytes
    };
    let cache = AotCache::new(folder.path().join("lru"), 3 * one + one / 2);
    let set_age = |key: &[u8], seconds: u64| {
        let file = fs::File::open(cache.path(KINDS[1], &stamp(), key)).unwrap();
        file.set_times(FileTimes::new().set_accessed(SystemTime::now() - Duration::from_secs(seconds)))
            .unwrap();
    };
    for (key, age) in [(b"a", 30), (b"b", 20), (b"c", 10)] {
        assert!(store(&cache, key));
        set_age(key, age);
    }
    assert!(found(&cache, b"a"), "use makes it the most recent");
    assert!(store(&cache, b"d"));
    assert!(found(&cache, b"a") && !found(&cache, b"b") && found(&cache, b"c") && found(&cache, b"d"));
    let total: u64 = cache.files().unwrap().iter().map(|entry| entry.bytes).sum();
    assert!(total <= cache.limit_bytes());
    let tiny = AotCache::new(folder.path().join("tiny"), 100);
    assert!(!store(&tiny, b"a") && tiny.files().unwrap().is_empty());
}

#[test]
fn collecting_removes_what_is_broken_and_clearing_only_what_is_ours() {
    let folder = tempfile::tempdir().unwrap();
    let cache = AotCache::new(folder.path(), 1 << 30);
    store(&cache, b"a");
    store(&cache, b"b");
    let broken = cache.path(KINDS[1], &stamp(), b"b");
    fs::write(&broken, b"none").unwrap();
    let foreign = folder.path().join("packed/notes.txt");
    fs::write(&foreign, b"mine").unwrap();
    let part = folder.path().join(format!("packed/{}.1-0-0.{UNFINISHED}", "0".repeat(64)));
    fs::write(&part, b"half").unwrap();
    assert_eq!(cache.collect().unwrap().files, 1);
    assert!(part.exists(), "a young unfinished file may be someone's work");
    fs::File::open(&part)
        .unwrap()
        .set_times(FileTimes::new().set_accessed(SystemTime::now() - 2 * ABANDONED))
        .unwrap();
    assert_eq!(cache.collect().unwrap().files, 1);
    assert!(!part.exists() && found(&cache, b"a"));
    assert_eq!(cache.clear().unwrap().files, 1);
    assert!(foreign.exists() && !found(&cache, b"a"));
}

#[test]
fn a_folder_that_cannot_be_written_costs_a_warning_only() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a-file");
    fs::write(&file, b"").unwrap();
    let cache = AotCache::new(&file, 1 << 30);
    assert!(!store(&cache, b"a") && !found(&cache, b"a"));
}

#[test]
fn many_threads_store_and_find_the_same_entries() {
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let cache = AotCache::new(folder.path(), 1 << 30);
                for key in [b"a", b"b", b"c", b"a"] {
                    assert!(found(&cache, key) || store(&cache, key));
                }
            });
        }
    });
    let cache = AotCache::new(folder.path(), 1 << 30);
    let names: HashSet<String> = cache.entries().unwrap().into_iter().map(|entry| entry.name).collect();
    assert_eq!(names.len(), 3);
    assert!(cache.entries().unwrap().iter().all(|entry| entry.fault.is_none()));
}
