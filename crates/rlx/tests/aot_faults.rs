//! The cache under faults: writers killed at random moments, disks that fill up, bytes that change, many processes at once. Owns
//! processes. A short slice runs by default; `cargo xtask soak` asks for more through the variables below.
#![cfg(unix)]

use rlx::aot::AotCache;
use rlx::aot::container::Stamp;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const ROLE: &str = "RLX_TEST_AOT_ROLE";
const FOLDER: &str = "RLX_TEST_AOT_FOLDER";
const KEYS: u64 = 12;

/// How often a fault is made: as the variable says, else a short slice.
fn count(asked: Option<OsString>, slice: usize) -> usize {
    asked.and_then(|text| text.to_str()?.parse().ok()).unwrap_or(slice)
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        ((self.0 >> 33) as usize) % limit.max(1)
    }
}

fn stamp() -> Stamp {
    let [kind, version, device, isa, precision] = ["packed", "1", "cpu", "scalar", "f32"].map(str::to_owned);
    Stamp { kind, version, device, isa, precision, packing: [1; 32] }
}

/// What belongs to a key: 8 KiB to 1.3 MiB of bytes that no other key has.
fn content(key: u64) -> Vec<u8> {
    let mut random = Random(key + 1);
    (0..8192 + (key as usize * 120_000)).map(|at| (random.below(256) ^ at) as u8).collect()
}

fn store(cache: &AotCache, key: u64) -> bool {
    cache.store_packed(&stamp(), &key.to_le_bytes(), b"layout", &content(key), 1)
}

/// Whether the cache has the key; a bad entry that is given out fails the test.
fn found(cache: &AotCache, key: u64) -> bool {
    match cache.packed(&stamp(), &key.to_le_bytes(), 1) {
        None => false,
        Some(found) => {
            assert!(found.content.bytes() == content(key), "a bad entry was used for key {key}");
            assert_eq!(found.layout, b"layout");
            true
        }
    }
}

fn child(role: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "what_a_child_does", "--nocapture", "--test-threads", "1"]);
    command.env(ROLE, role).env(FOLDER, folder).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn what_a_child_does() {
    let (Some(role), Some(folder)) =
        (std::env::var_os("RLX_TEST_AOT_ROLE"), std::env::var_os("RLX_TEST_AOT_FOLDER"))
    else {
        return;
    };
    let cache = AotCache::new(folder, 1 << 30);
    let mut random = Random(u64::from(std::process::id()));
    match role.to_str() {
        Some("write") => loop {
            store(&cache, random.below(KEYS as usize) as u64);
        },
        Some("share") => {
            for _ in 0..20 {
                let key = random.below(KEYS as usize) as u64;
                if !found(&cache, key) {
                    store(&cache, key);
                }
            }
        }
        Some("once") => {
            for key in 0..KEYS {
                store(&cache, key);
            }
        }
        other => panic!("no such role: {other:?}"),
    }
}

#[test]
fn writers_killed_at_random_moments_leave_no_bad_entry() {
    let folder = tempfile::tempdir().unwrap();
    let cache = AotCache::new(folder.path(), 1 << 30);
    let mut random = Random(7);
    let kills = count(std::env::var_os("RLX_TEST_AOT_KILLS"), 25);
    let (mut hits, mut looks) = (0, 0);
    for _ in 0..kills {
        let mut writer = child("write", folder.path()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(2_000 + random.below(30_000) as u64));
        writer.kill().unwrap();
        writer.wait().unwrap();
        for _ in 0..3 {
            looks += 1;
            hits += usize::from(found(&cache, random.below(KEYS as usize) as u64));
        }
        // Unfinished files of the dead are young, so `collect` leaves them; the test would fill the disk.
        for entry in cache.entries().unwrap() {
            match entry.fault.as_deref() {
                Some("unfinished") => {
                    std::fs::remove_file(folder.path().join(entry.kind).join(entry.name)).unwrap();
                }
                fault => assert_eq!(fault, None, "a named entry is not whole"),
            }
        }
    }
    println!("{kills} kills, {looks} look-ups, {hits} hits, 0 bad entries used");
    assert!(hits > 0, "no entry was ever complete, so the test shows nothing");
}

/// A writer whose files may not grow beyond a limit: what a full disk does to it, without filling one.
fn limited(folder: &Path, blocks: usize) -> Child {
    let mut shell = Command::new("sh");
    let exe = std::env::current_exe().unwrap();
    // With the signal ignored, the write that exceeds the limit fails with an error.
    let script =
        format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" --exact what_a_child_does --test-threads 1");
    shell.args(["-c", &script]).arg(exe).env(ROLE, "once").env(FOLDER, folder);
    shell.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_disk_that_fills_up_costs_entries_and_nothing_else() {
    let mut random = Random(11);
    let times = count(std::env::var_os("RLX_TEST_AOT_FULL"), 6);
    let mut stored = 0;
    for _ in 0..times {
        let folder = tempfile::tempdir().unwrap();
        let status = limited(folder.path(), random.below(3000)).wait().unwrap();
        assert!(status.success(), "{status}");
        let cache = AotCache::new(folder.path(), 1 << 30);
        stored += (0..KEYS).filter(|&key| found(&cache, key)).count();
        assert!(
            cache.entries().unwrap().iter().all(|entry| entry.fault.is_none()),
            "nothing unfinished is left"
        );
    }
    println!("{times} full disks, {stored} of {} entries stored, 0 bad entries used", times * KEYS as usize);
}

/// The real thing, where a small file system is given.
#[test]
fn a_really_full_file_system_costs_entries_and_nothing_else() {
    let Some(folder) = std::env::var_os("RLX_TEST_AOT_FULL_FOLDER") else { return };
    let folder = Path::new(&folder);
    let times = count(std::env::var_os("RLX_TEST_AOT_FULL"), 6);
    let mut stored = 0;
    for at in 0..times {
        let cache = AotCache::new(folder.join(format!("{at}")), 1 << 30);
        let kept = (0..KEYS).filter(|&key| store(&cache, key)).count();
        assert!(kept < KEYS as usize, "the file system is large enough for all, so the test shows nothing");
        stored += (0..KEYS).filter(|&key| found(&cache, key)).count();
        assert!(
            cache.entries().unwrap().iter().all(|entry| entry.fault.is_none()),
            "nothing unfinished is left"
        );
        std::fs::remove_dir_all(cache.folder()).unwrap();
    }
    println!("{times} times a full file system, {stored} of {} entries stored", times * KEYS as usize);
}

#[test]
fn no_corruption_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let cache = AotCache::new(folder.path(), 1 << 30);
    assert!(store(&cache, 1));
    let entry = cache.entries().unwrap().remove(0);
    let path = folder.path().join(entry.kind).join(entry.name);
    let whole = std::fs::read(&path).unwrap();
    let mut random = Random(13);
    let times = count(std::env::var_os("RLX_TEST_AOT_FLIPS"), 200);
    for _ in 0..times {
        let mut bytes = whole.clone();
        match random.below(4) {
            0 => bytes.truncate(random.below(whole.len())),
            1 => bytes.extend_from_slice(&[0; 7][..1 + random.below(7)]),
            // Half of the flips hit the head, where the fields are.
            kind => {
                let at = random.below(if kind == 2 { 4096 } else { whole.len() });
                bytes[at] ^= 1 << random.below(8);
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        assert!(!found(&cache, 1), "a corrupted entry was used");
    }
    println!("{times} corruptions, 0 used");
    assert!(store(&cache, 1) && found(&cache, 1));
}

#[test]
fn sixteen_processes_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let children: Vec<Child> = (0..16).map(|_| child("share", folder.path()).spawn().unwrap()).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let cache = AotCache::new(folder.path(), 1 << 30);
    let entries = cache.entries().unwrap();
    assert!(!entries.is_empty() && entries.iter().all(|entry| entry.fault.is_none()));
}
