//! A digest of the sources that decide plans, so that plans kept on disk are read by the very compiler that wrote them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The compiler, its dims and the tables that say what a device runs. Those that are not there are pinned by version.
const SOURCES: [&str; 4] = ["src", "../rlx-graph/src", "../rlx-tensor/src", "../rlx-kernels/src"];

fn main() -> io::Result<()> {
    let mut digest = Digest(0xcbf2_9ce4_8422_2325);
    for folder in SOURCES.map(Path::new).into_iter().filter(|folder| folder.is_dir()) {
        println!("cargo:rerun-if-changed={}", folder.display());
        let mut files = Vec::new();
        list(folder, &mut files)?;
        files.sort();
        for file in files {
            digest.add(file.to_string_lossy().as_bytes());
            digest.add(&fs::read(&file)?);
        }
    }
    println!("cargo:rustc-env=SOURCES_DIGEST={:016x}", digest.0);
    Ok(())
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => list(&path, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}

/// FNV-1a of parts, each behind its length.
struct Digest(u64);

impl Digest {
    fn add(&mut self, part: &[u8]) {
        for byte in (part.len() as u64).to_le_bytes().iter().chain(part) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
