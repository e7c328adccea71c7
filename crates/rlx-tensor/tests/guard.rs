//! A mapped file that shrinks while it is read: the process ends with a message that names the file. Owns processes.
#![cfg(unix)]

use rlx_tensor::storage::guard;
use rlx_tensor::storage::mapped::MappedFile;
use std::process::Command;

/// What the child does: maps the file it is told, cuts it, reads past its end.
#[test]
fn child_that_reads_past_the_end() {
    let Some(path) = std::env::var_os("RLX_TEST_GUARD_FILE") else { return };
    guard::install().unwrap();
    let file = MappedFile::open(&path).unwrap();
    file.still_valid().unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert!(file.still_valid().is_err());
    let last = file.bytes()[file.len() - 1];
    panic!("read {last} past the end of the file");
}

#[test]
fn reading_past_the_end_of_a_cut_file_ends_with_its_name() {
    let path = std::env::temp_dir().join(format!("rlx-guard-{}.bin", std::process::id()));
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_reads_past_the_end", "--nocapture"])
        .env("RLX_TEST_GUARD_FILE", &path)
        .output()
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    let told = String::from_utf8_lossy(&child.stderr).into_owned();
    assert_eq!(child.status.code(), Some(1), "{told}");
    assert!(told.contains("shrank") && told.contains(path.to_str().unwrap()), "{told}");
}
