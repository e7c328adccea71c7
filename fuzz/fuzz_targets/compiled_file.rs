//! Any header under a right digest: either an error, or sections that lie in the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rlx::aot::container::{FORMAT, MAGIC, OpenContainer};

fuzz_target!(|input: &[u8]| {
    let at = input.first().map_or(0, |&byte| usize::from(byte) * 16).min(input.len());
    let (header, rest) = input.split_at(at);
    let mut file = [&MAGIC[..], &FORMAT.to_le_bytes(), &[0; 4], &(header.len() as u64).to_le_bytes()].concat();
    file.extend_from_slice(&[0; 32]);
    file.extend_from_slice(header);
    let digest = blake3::hash(&file);
    file[24..56].copy_from_slice(digest.as_bytes());
    file.extend_from_slice(rest);
    let path = std::env::temp_dir().join(format!("rlx-fuzz-{}", std::process::id()));
    std::fs::write(&path, &file).expect("the temporary folder can be written");
    if let Ok(opened) = OpenContainer::open(&path) {
        for section in opened.large().expect("sections were checked") {
            let range = section.content;
            assert!(range.offset() + range.len() <= file.len());
        }
        for name in opened.small_names() {
            assert!(opened.small(name).is_some());
        }
        drop(opened.verify_body(1));
    }
});
