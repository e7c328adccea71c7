//! One file of named sections: a header with its digest, small sections with theirs, and large ones in chunks that are verified on
//! all threads.
//!
//! ```text
//! magic 8 | format 4 | zero 4 | header bytes 8 | BLAKE3 of all of it, this field as zeros 32 | header
//! small sections, one after the other
//! padding to a page
//! body: large sections, each from a page's start
//! ```
//!
//! The header holds what the file was made for ([`Stamp`]), its key, the list of sections, and a checksum (XXH3) for each MiB of
//! the body. The file ends where the body ends. A file is written beside its name, synced and renamed.

use super::error::AotCacheError;
use super::wire::{WireReader, WireWriter};
use rlx_tensor::storage::mapped::{MappedFile, MappedRange};
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The first bytes of every compiled file.
pub const MAGIC: &[u8; 8] = b"RLX\x1aaot\n";
/// The layout of the bytes.
pub const FORMAT: u32 = 1;
/// Large sections start at multiples of this.
pub const PAGE_BYTES: u64 = 4096;
/// Bytes under one checksum.
pub const CHUNK_BYTES: usize = 1 << 20;

const FIXED_BYTES: usize = 56;
const DIGEST_AT: usize = 24;
/// Largest header that is read: checksums of 16 TiB.
const MAX_HEADER_BYTES: u64 = 256 << 20;

/// What a file was made for. Another stamp is another file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    /// What it holds: `model`, `onnx`, `plan`, `packed` or `kernel`.
    pub kind: String,
    /// Version of the crate.
    pub version: String,
    /// Device.
    pub device: String,
    /// Instruction set.
    pub isa: String,
    /// Precision.
    pub precision: String,
    /// Digest of how weights are packed.
    pub packing: [u8; 32],
}

impl Stamp {
    fn write(&self, out: &mut WireWriter) {
        for text in [&self.kind, &self.version, &self.device, &self.isa, &self.precision] {
            out.text(text);
        }
        out.raw(&self.packing);
    }

    fn read(from: &mut WireReader<'_>) -> Result<Stamp, super::wire::WireError> {
        let mut text = || from.text().map(str::to_owned);
        let [kind, version, device, isa, precision] = [text()?, text()?, text()?, text()?, text()?];
        Ok(Stamp { kind, version, device, isa, precision, packing: from.digest()? })
    }

    /// The first field in which a file's stamp differs from this one.
    fn differs(&self, found: &Stamp) -> Option<(&'static str, String, String)> {
        let fields = [
            ("the kind", &self.kind, &found.kind),
            ("version", &self.version, &found.version),
            ("device", &self.device, &found.device),
            ("instruction set", &self.isa, &found.isa),
            ("precision", &self.precision, &found.precision),
        ];
        let differs = fields.into_iter().find(|(_, expected, found)| expected != found);
        let short = |digest: &[u8; 32]| super::hex(&digest[..6]);
        match differs {
            Some((what, expected, found)) => Some((what, found.clone(), expected.clone())),
            None if self.packing != found.packing => {
                Some(("the packing", short(&found.packing), short(&self.packing)))
            }
            None => None,
        }
    }
}

/// A section to write.
#[derive(Debug, Clone, Copy)]
pub struct Section<'b> {
    /// Its name.
    pub name: &'b str,
    /// What the reader must know of it.
    pub about: &'b [u8],
    /// Its content.
    pub bytes: &'b [u8],
}

/// A file to write.
#[derive(Debug)]
pub struct Container<'b> {
    /// What it is made for.
    pub stamp: &'b Stamp,
    /// What its content depends on.
    pub key: &'b [u8],
    /// Sections that are read whole when the file is opened.
    pub small: &'b [Section<'b>],
    /// Sections that are mapped.
    pub large: &'b [Section<'b>],
}

fn checksum(chunk: usize, bytes: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot_with_seed(chunk as u64, bytes)
}

const ZEROS: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];

/// Gives every byte of the body in order: the sections, and zeros up to the next page between them.
struct Body<'b> {
    sections: &'b [Section<'b>],
}

impl Body<'_> {
    fn offsets(&self, start: u64) -> Vec<u64> {
        let mut at = start;
        let place = |section: &Section<'_>| {
            let offset = at;
            at = (at + section.bytes.len() as u64).next_multiple_of(PAGE_BYTES);
            offset
        };
        self.sections.iter().map(place).collect()
    }

    fn len(&self) -> u64 {
        let pages = self.sections.iter().map(|s| (s.bytes.len() as u64).next_multiple_of(PAGE_BYTES));
        pages.sum()
    }

    /// The bytes of one chunk, in pieces.
    fn pieces(&self, chunk: usize, take: &mut dyn FnMut(&[u8])) {
        let (mut start, end) = (chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES);
        let mut at = 0usize;
        for section in self.sections {
            let padded = section.bytes.len().next_multiple_of(PAGE_BYTES as usize);
            if start < (at + padded).min(end) && start >= at {
                let from = start - at;
                let to = section.bytes.len().min(end - at);
                if from < to {
                    take(&section.bytes[from..to]);
                }
                let zeros = (at + padded).min(end) - (at + section.bytes.len()).max(start).min(end);
                take(&ZEROS[..zeros]);
                start = (at + padded).min(end);
            }
            at += padded;
        }
    }

    fn checksum(&self, chunk: usize) -> u64 {
        let mut hasher = twox_hash::XxHash3_64::with_seed(chunk as u64);
        self.pieces(chunk, &mut |piece| std::hash::Hasher::write(&mut hasher, piece));
        std::hash::Hasher::finish(&hasher)
    }
}

/// Checksums of all chunks, on `threads` threads.
fn checksums(body: &Body<'_>, threads: usize) -> Vec<u64> {
    let chunks = (body.len() as usize).div_ceil(CHUNK_BYTES);
    let sums: Vec<AtomicU64> = (0..chunks).map(|_| AtomicU64::new(0)).collect();
    each_chunk(chunks, threads, &|chunk| {
        sums[chunk].store(body.checksum(chunk), Ordering::Relaxed);
        true
    });
    sums.into_iter().map(AtomicU64::into_inner).collect()
}

/// Does `work` for every chunk on `threads` threads, until one returns false.
fn each_chunk(chunks: usize, threads: usize, work: &(dyn Fn(usize) -> bool + Sync)) {
    let next = AtomicUsize::new(0);
    let worker = || {
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            if chunk >= chunks {
                return;
            }
            if !work(chunk) {
                next.store(chunks, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(chunks) {
            // A thread that cannot be had leaves its chunks to the others.
            let _ = std::thread::Builder::new().spawn_scoped(scope, worker);
        }
        worker();
    });
}

impl Container<'_> {
    fn header(&self, body: &Body<'_>, threads: usize) -> Vec<u8> {
        let sums = checksums(body, threads);
        let mut bytes = self.laid_out(body, &sums, 0);
        for _ in 0..2 {
            // Offsets are of fixed width, so the length does not depend on them.
            bytes = self.laid_out(body, &sums, bytes.len() as u64);
        }
        let mut fixed = Vec::with_capacity(FIXED_BYTES + bytes.len());
        fixed.extend_from_slice(MAGIC);
        fixed.extend_from_slice(&FORMAT.to_le_bytes());
        fixed.extend_from_slice(&[0; 4]);
        fixed.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        fixed.extend_from_slice(&[0; 32]);
        fixed.extend_from_slice(&bytes);
        let digest = blake3::hash(&fixed);
        fixed[DIGEST_AT..FIXED_BYTES].copy_from_slice(digest.as_bytes());
        fixed
    }

    fn laid_out(&self, body: &Body<'_>, sums: &[u64], header_bytes: u64) -> Vec<u8> {
        let mut out = WireWriter::new();
        self.stamp.write(&mut out);
        out.bytes(self.key).u64(self.small.len() as u64);
        let mut at = FIXED_BYTES as u64 + header_bytes;
        for section in self.small {
            out.text(section.name).bytes(section.about).u64(at).u64(section.bytes.len() as u64);
            out.raw(blake3::hash(section.bytes).as_bytes());
            at += section.bytes.len() as u64;
        }
        let start = at.next_multiple_of(PAGE_BYTES);
        out.u64(self.large.len() as u64);
        for (section, at) in self.large.iter().zip(body.offsets(start)) {
            out.text(section.name).bytes(section.about).u64(at).u64(section.bytes.len() as u64);
        }
        out.u64(start).u64(body.len()).u64(sums.len() as u64);
        for &sum in sums {
            out.u64(sum);
        }
        out.finish()
    }

    /// Writes all of it.
    fn write_to(&self, file: &File, threads: usize) -> io::Result<()> {
        let body = Body { sections: self.large };
        let header = self.header(&body, threads);
        let mut out = BufWriter::with_capacity(CHUNK_BYTES, file);
        out.write_all(&header)?;
        for section in self.small {
            out.write_all(section.bytes)?;
        }
        let at = out.stream_position()?;
        out.seek(SeekFrom::Start(at.next_multiple_of(PAGE_BYTES)))?;
        for section in self.large {
            // A section at once: large writes let the system keep the file in large pages.
            out.write_all(section.bytes)?;
            let len = section.bytes.len() as u64;
            out.write_all(&ZEROS[..(len.next_multiple_of(PAGE_BYTES) - len) as usize])?;
        }
        let end = out.stream_position()?;
        out.flush()?;
        file.set_len(end)?;
        file.sync_all()
    }

    /// Writes the file beside `path`, syncs it and gives it that name: a reader sees all of it or none.
    ///
    /// # Errors
    /// [`AotCacheError::Io`]; what was written is removed.
    pub fn write(&self, path: &Path, threads: usize) -> Result<(), AotCacheError> {
        let beside = temporary_beside(path);
        let file = File::create_new(&beside).map_err(AotCacheError::io(&beside))?;
        let written = self.write_to(&file, threads).and_then(|()| {
            drop(file);
            fs::rename(&beside, path)
        });
        if let Err(source) = written {
            // The name is this call's own; nothing is lost with it.
            let _ = fs::remove_file(&beside);
            return Err(AotCacheError::Io { path: path.to_path_buf(), source });
        }
        sync_folder(path);
        Ok(())
    }
}

/// Ending of files that are being written.
pub const UNFINISHED: &str = "part";

fn temporary_beside(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.map_or(0, |now| now.subsec_nanos());
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}-{count}-{nanos}.{UNFINISHED}", std::process::id()));
    path.with_file_name(name)
}

/// Makes the new name last. Systems that cannot sync a folder keep the file's content safe all the same.
fn sync_folder(path: &Path) {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty())
        && let Ok(folder) = File::open(folder)
    {
        drop(folder.sync_all());
    }
}

/// A large section of a file that was opened.
#[derive(Debug, Clone)]
pub struct LargeSection<'c> {
    /// Its name.
    pub name: &'c str,
    /// What the writer said of it.
    pub about: &'c [u8],
    /// Its content, verified once the body is.
    pub content: MappedRange,
}

#[derive(Debug, Clone)]
struct Placed {
    name: String,
    about: Vec<u8>,
    offset: usize,
    len: usize,
}

/// A file that was opened: header and small sections are verified, the body is when it is asked for.
#[derive(Debug)]
pub struct OpenContainer {
    file: Arc<MappedFile>,
    stamp: Stamp,
    key: Vec<u8>,
    small: Vec<Placed>,
    large: Vec<Placed>,
    body: (usize, usize),
    sums: Vec<u64>,
}

impl OpenContainer {
    /// Maps a file and verifies its header and small sections; what it was made for is for the caller to compare.
    ///
    /// # Errors
    /// [`AotCacheError::Foreign`], [`AotCacheError::Mismatch`] of the format, [`AotCacheError::Damaged`], [`AotCacheError::Map`].
    pub fn open(path: &Path) -> Result<OpenContainer, AotCacheError> {
        let file = MappedFile::open(path)?;
        let bytes = file.bytes();
        let foreign =
            |found: &str| AotCacheError::Foreign { path: path.to_path_buf(), found: found.to_owned() };
        let damaged = |reason: &str| AotCacheError::damaged(path, reason);
        if !bytes.starts_with(MAGIC) {
            return Err(foreign(if bytes.is_empty() { "it is empty" } else { "it starts with other bytes" }));
        }
        let mut fixed = WireReader::new(bytes);
        let wire = || AotCacheError::wire(path);
        fixed.raw(MAGIC.len()).map_err(wire())?;
        let format = fixed.u32().map_err(wire())?;
        if format != FORMAT {
            let (what, found, expected) = ("format", format.to_string(), FORMAT.to_string());
            return Err(AotCacheError::Mismatch { path: path.to_path_buf(), what, found, expected });
        }
        let zero = fixed.u32().map_err(wire())?;
        let header_bytes = fixed.u64().map_err(wire())?;
        let digest = fixed.digest().map_err(wire())?;
        if zero != 0 || header_bytes > MAX_HEADER_BYTES {
            return Err(damaged("the header's length makes no sense"));
        }
        let header = fixed.raw(header_bytes as usize).map_err(wire())?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes[..DIGEST_AT]).update(&[0; 32]).update(header);
        if *hasher.finalize().as_bytes() != digest {
            return Err(damaged("the header's digest differs"));
        }
        let opened = Self::parse(&file, header).map_err(wire())?;
        opened.check_bounds(FIXED_BYTES + header.len()).map_err(damaged)?;
        for (section, digest) in &opened.1 {
            let range = &bytes[section.offset..section.offset + section.len];
            if blake3::hash(range).as_bytes() != digest {
                return Err(AotCacheError::damaged(
                    path,
                    format!("the digest of {:?} differs", section.name),
                ));
            }
        }
        Ok(opened.0)
    }

    /// The header's fields and the digests of the small sections.
    fn parse(file: &Arc<MappedFile>, header: &[u8]) -> Result<Parsed, super::wire::WireError> {
        let mut from = WireReader::new(header);
        let stamp = Stamp::read(&mut from)?;
        let key = from.bytes()?.to_vec();
        let placed = |from: &mut WireReader<'_>| -> Result<Placed, super::wire::WireError> {
            let (name, about) = (from.text()?.to_owned(), from.bytes()?.to_vec());
            Ok(Placed { name, about, offset: from.size()?, len: from.size()? })
        };
        let mut small = Vec::new();
        for _ in 0..from.count(64)? {
            small.push((placed(&mut from)?, from.digest()?));
        }
        let mut large = Vec::new();
        for _ in 0..from.count(32)? {
            large.push(placed(&mut from)?);
        }
        let body = (from.size()?, from.size()?);
        let sums = (0..from.count(8)?).map(|_| from.u64()).collect::<Result<Vec<_>, _>>()?;
        from.end()?;
        let names = small.iter().map(|(section, _)| section.clone()).collect();
        Ok(Parsed(
            OpenContainer { file: Arc::clone(file), stamp, key, small: names, large, body, sums },
            small,
        ))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What the file was made for.
    pub fn stamp(&self) -> &Stamp {
        &self.stamp
    }

    /// What its content depends on.
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file.len() as u64
    }

    /// Bytes before the body: what opening reads.
    pub fn opened_bytes(&self) -> u64 {
        self.body.0 as u64
    }

    /// Refuses a file that was made for something else.
    ///
    /// # Errors
    /// [`AotCacheError::Mismatch`].
    pub fn expect(&self, stamp: &Stamp) -> Result<(), AotCacheError> {
        match stamp.differs(&self.stamp) {
            None => Ok(()),
            Some((what, found, expected)) => {
                Err(AotCacheError::Mismatch { path: self.path().to_path_buf(), what, found, expected })
            }
        }
    }

    /// A small section.
    pub fn small(&self, name: &str) -> Option<&[u8]> {
        let section = self.small.iter().find(|section| section.name == name)?;
        Some(&self.file.bytes()[section.offset..section.offset + section.len])
    }

    /// A small section, to be kept.
    pub fn small_range(&self, name: &str) -> Option<MappedRange> {
        let section = self.small.iter().find(|section| section.name == name)?;
        self.file.range(section.offset, section.len).ok()
    }

    /// Names of the small sections, in order.
    pub fn small_names(&self) -> impl Iterator<Item = &str> {
        self.small.iter().map(|section| section.name.as_str())
    }

    /// The large sections, in order.
    ///
    /// # Errors
    /// [`AotCacheError::Map`].
    pub fn large(&self) -> Result<Vec<LargeSection<'_>>, AotCacheError> {
        let mapped = |section: &Placed| self.file.range(section.offset, section.len);
        let each = self.large.iter().map(|section| {
            let content = mapped(section)?;
            Ok(LargeSection { name: &section.name, about: &section.about, content })
        });
        each.collect()
    }

    /// Reads every byte of the body once, on `threads` threads, and compares its checksums. The pages are in memory after.
    ///
    /// # Errors
    /// [`AotCacheError::Damaged`] naming the first chunk found to differ; [`AotCacheError::Map`] if the file changed.
    pub fn verify_body(&self, threads: usize) -> Result<(), AotCacheError> {
        self.file.still_valid()?;
        let (start, len) = self.body;
        let body = &self.file.bytes()[start..start + len];
        let bad = AtomicUsize::new(usize::MAX);
        each_chunk(self.sums.len(), threads, &|chunk| {
            let from = chunk * CHUNK_BYTES;
            let to = (from + CHUNK_BYTES).min(len);
            // Advice only: without it the pages come in as they are touched.
            let _ = self.file.range(start + from, to - from).and_then(|range| range.populate());
            let same = checksum(chunk, &body[from..to]) == self.sums[chunk];
            if !same {
                bad.fetch_min(chunk, Ordering::Relaxed);
            }
            same
        });
        match bad.into_inner() {
            usize::MAX => Ok(()),
            chunk => {
                let at = start + chunk * CHUNK_BYTES;
                Err(AotCacheError::damaged(
                    self.path(),
                    format!("the MiB from byte {at} on has another checksum"),
                ))
            }
        }
    }
}

/// An opened file with the digests of its small sections, not yet compared.
struct Parsed(OpenContainer, Vec<(Placed, [u8; 32])>);

impl Parsed {
    /// Every section lies where a writer puts it, and the file ends where the body does.
    fn check_bounds(&self, header_end: usize) -> Result<(), &'static str> {
        let Parsed(opened, small) = self;
        let mut at = header_end;
        for (section, _) in small {
            if section.offset != at {
                return Err("a section does not follow the one before it");
            }
            at = at
                .checked_add(section.len)
                .filter(|&end| end <= opened.file.len())
                .ok_or("a section ends outside")?;
        }
        let (start, len) = opened.body;
        let page = PAGE_BYTES as usize;
        if at.checked_next_multiple_of(page) != Some(start) {
            return Err("the body does not start at the next page");
        }
        let end = start.checked_add(len).ok_or("the body's length makes no sense")?;
        if end != opened.file.len() || len.div_ceil(CHUNK_BYTES) != opened.sums.len() {
            return Err("the file does not end where its body does");
        }
        if opened.file.bytes()[at..start].iter().any(|&byte| byte != 0) {
            return Err("the padding before the body is not zero");
        }
        let mut at = start;
        for section in &opened.large {
            let room = end.checked_sub(section.offset).ok_or("a section starts outside the body")?;
            if section.offset != at || section.len > room {
                return Err("a section of the body is misplaced");
            }
            at = (at + section.len).next_multiple_of(page);
        }
        if at == end { Ok(()) } else { Err("the body is longer than its sections") }
    }
}

#[cfg(test)]
mod tests;
