//! The cache under faults: writers killed at random moments, disks that fill up, bytes that change, many processes at once. Owns
//! processes. A short slice runs by default; `cargo xtask soak` asks for more through the variables below.
#![cfg(unix)]

use rlx::Session;
use rlx::aot::AotCache;
use rlx::aot::container::{FORMAT, MAGIC, OpenContainer, Stamp};
use rlx::plan::parse_lir;
use rlx_tensor::DimBinding;
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
        Some("read only") => {
            assert!(
                std::fs::write(cache.folder().join("packed/any"), b"").is_err(),
                "the folder may be written"
            );
            for key in 0..KEYS {
                assert_eq!(found(&cache, key), key % 2 == 0, "what is there is found");
                assert!(!store(&cache, key + KEYS), "nothing can be stored");
                assert!(!found(&cache, key + KEYS));
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

/// Folder and files that only their owner may write.
fn write_protect(folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => write_protect(&path),
            false => std::fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap(),
        }
    }
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o555)).unwrap();
}

/// Modes do not bind a superuser, so a child then runs as nobody.
#[test]
fn a_folder_that_may_only_be_read_is_read_and_costs_a_warning_only() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
    use std::os::unix::process::CommandExt as _;
    const NOBODY: u32 = 65534;
    let folder = tempfile::tempdir().unwrap();
    let (kept, exe) = (folder.path().join("cache"), folder.path().join("exe"));
    let cache = AotCache::new(&kept, 1 << 30);
    assert!((0..KEYS).filter(|key| key % 2 == 0).all(|key| store(&cache, key)));
    write_protect(&kept);
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let own = std::env::current_exe().unwrap();
    std::fs::hard_link(&own, &exe).or_else(|_| std::fs::copy(&own, &exe).map(drop)).unwrap();
    let mut command = Command::new(&exe);
    command.args(["--exact", "what_a_child_does", "--test-threads", "1"]).current_dir("/");
    command.env(ROLE, "read only").env(FOLDER, &kept);
    if std::fs::metadata("/proc/self").map_or(0, |process| process.uid()) == 0 {
        command.uid(NOBODY).gid(NOBODY);
    }
    let output = command.output().unwrap();
    let modes = |folder: &Path| std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).unwrap();
    [kept.clone(), kept.join("packed")].iter().for_each(|folder| modes(folder));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// A folder in which no process can make a file, whoever it runs as.
#[test]
fn a_file_system_that_cannot_be_written_costs_a_warning_only() {
    if !Path::new("/proc/self").is_dir() {
        return;
    }
    let cache = AotCache::new("/proc/self/rlx", 1 << 30);
    assert!(!store(&cache, 1) && !found(&cache, 1));
    assert!(cache.entries().unwrap().is_empty());
}

/// One small change, as a decoder's author fears it: a length, a count, a cut, a piece twice.
fn mutated(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(7) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            2 => {
                let extreme = [0, 1, u64::MAX, 1 << 63, 1 << 32, 0xffff_fff8][random.below(6)].to_le_bytes();
                let len = extreme.len().min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&extreme[..len]);
            }
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, piece));
            }
            5 => bytes.truncate(at),
            _ => bytes.extend((0..random.below(64)).map(|_| random.below(256) as u8)),
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    bytes
}

/// Where a header begins, and its digest and length.
const HEADER: usize = 56;

#[test]
fn any_header_under_a_right_digest_is_an_error_or_describes_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let cache = AotCache::new(folder.path().join("whole"), 1 << 30);
    assert!(store(&cache, 0));
    let entry = cache.entries().unwrap().remove(0);
    let whole = std::fs::read(cache.folder().join(entry.kind).join(entry.name)).unwrap();
    assert!(whole.starts_with(MAGIC) && whole[8..12] == FORMAT.to_le_bytes());
    let header = u64::from_le_bytes(whole[16..24].try_into().unwrap()) as usize;
    let (header, rest) = (&whole[HEADER..HEADER + header], &whole[HEADER + header..]);
    let path = folder.path().join("changed");
    let (mut random, mut opened, mut verified) = (Random(17), 0, 0);
    let times = count(std::env::var_os("RLX_TEST_AOT_HEADERS"), 2000);
    for _ in 0..times {
        let header = mutated(header, &mut random);
        let mut file = whole[..HEADER].to_vec();
        file[16..24].copy_from_slice(&(header.len() as u64).to_le_bytes());
        file[24..HEADER].fill(0);
        file.extend_from_slice(&header);
        let digest = blake3::hash(&file);
        file[24..HEADER].copy_from_slice(digest.as_bytes());
        file.extend_from_slice(rest);
        // A file that is written over would change under a map.
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, &file).unwrap();
        let Ok(container) = OpenContainer::open(&path) else { continue };
        opened += 1;
        for section in container.large().unwrap() {
            assert!(section.content.offset() + section.content.len() <= file.len());
        }
        assert!(container.small_names().all(|name| container.small(name).is_some()));
        verified += usize::from(container.verify_body(1).is_ok());
    }
    println!("{times} headers, {opened} opened, {verified} of them with a body that verifies");
    assert!(opened > 0, "no header was sound, so the test shows little");
}

#[test]
fn any_text_of_a_plan_is_an_error_or_a_plan_that_the_verifier_passes() {
    let text = r#"graph "two" {
  input @x : f32[rows, 8]
  param @w : f32[8, 8]
  %2 : f32[rows, 8] = matmul(@x, @w) {transpose_a=false, transpose_b=false}
  %3 : f32[rows, 8] = softmax(%2) {axis=1}
  %4 : f32[rows, 8] = binary(%3, @x) {kind=add}
  return "y": %4
}
"#;
    let session =
        Session::with_backend(std::sync::Arc::new(rlx::backend::reference::ReferenceBackend::default()));
    let compiled = session.compile(&text.parse().unwrap()).unwrap();
    let plan = compiled.specialize(&DimBinding::new().with("rows", 5)).unwrap().to_string();
    assert!(parse_lir(&plan).is_ok());
    let (mut random, mut passed) = (Random(19), 0);
    let times = count(std::env::var_os("RLX_TEST_AOT_HEADERS"), 2000);
    for _ in 0..times {
        let changed = mutated(plan.as_bytes(), &mut random);
        if let Ok(plan) = parse_lir(&String::from_utf8_lossy(&changed)) {
            passed += 1;
            plan.verify().unwrap();
        }
    }
    println!("{times} plans, {passed} passed");
}
