//! Read-only mapped files.
//!
//! A [`MappedFile`] is one file mapped whole; a [`MappedRange`] is a checked part of it that keeps the map alive.
//! A file that shrinks under its map turns reads past the new end into a bus fault, which no library can catch
//! without owning the process's signal handlers. So the size is checked when the file is mapped and again through
//! [`MappedFile::still_valid`], which callers use at pin and at run. The window that remains is a shrink
//! between that check and the read.

use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use memmap2::Mmap;

use super::guard::Watched;

/// Why a file could not be mapped, or a map can no longer be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The operating system refused to open, stat or map the file.
    #[error("{}: cannot map: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The path is a folder, a pipe or a device.
    #[error("{}: not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file does not fit the address space of this machine.
    #[error("{}: {file_bytes} bytes do not fit this machine's address space", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        file_bytes: u64,
    },
    /// A range reaches past the end of the file.
    #[error("{}: range at byte {offset} of {range_bytes} bytes, but the file has {file_bytes} bytes", path.display())]
    OutOfRange {
        /// The file.
        path: PathBuf,
        /// First byte of the range.
        offset: u64,
        /// Length of the range.
        range_bytes: u64,
        /// Size of the file when it was mapped.
        file_bytes: u64,
    },
    /// The file is now shorter than its map: reading on would be a bus fault.
    #[error("{}: the file shrank while it was in use: mapped {mapped_bytes} bytes, now {found_bytes}; do not \
             truncate or overwrite a model in place, write a new file and rename it", path.display())]
    Shrank {
        /// The file.
        path: PathBuf,
        /// Size at map.
        mapped_bytes: u64,
        /// Size now.
        found_bytes: u64,
    },
    /// The file was written to since it was mapped.
    #[error("{}: the file changed while it was in use; do not write to a model in place, write a new file and \
             rename it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

/// What tells one version of a file from another: equal identities mean equal bytes, short of a tool that
/// rewrites a file in place and resets its times.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Device and inode; both zero where the system has none, and then the path decides.
    pub device_inode: (u64, u64),
    /// The path, where there is no inode.
    pub path: Option<PathBuf>,
    /// Size in bytes.
    pub file_bytes: u64,
    /// Time of the last write.
    pub modified: Option<SystemTime>,
}

impl FileIdentity {
    fn of(path: &Path, metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let device_inode = {
            use std::os::unix::fs::MetadataExt;
            (metadata.dev(), metadata.ino())
        };
        #[cfg(not(unix))]
        let device_inode = (0, 0);
        let path = (device_inode == (0, 0)).then(|| path.to_path_buf());
        FileIdentity { device_inode, path, file_bytes: metadata.len(), modified: metadata.modified().ok() }
    }
}

/// One file, mapped whole and read-only.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    identity: FileIdentity,
    // Before the map, so that it is dropped first.
    _watched: Watched,
    // None for an empty file, which systems refuse to map.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps `path`. No byte is read; the size is taken from the open file.
    ///
    /// # Errors
    /// [`MapError::Io`], [`MapError::NotAFile`], [`MapError::TooLarge`].
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>, MapError> {
        let path = path.as_ref();
        let io_error = |source| MapError::Io { path: path.to_path_buf(), source };
        // Opening a pipe would block, so the kind is asked before.
        if !std::fs::metadata(path).map_err(io_error)?.is_file() {
            return Err(MapError::NotAFile { path: path.to_path_buf() });
        }
        let file = File::open(path).map_err(io_error)?;
        let metadata = file.metadata().map_err(io_error)?;
        if !metadata.is_file() {
            return Err(MapError::NotAFile { path: path.to_path_buf() });
        }
        let file_bytes = metadata.len();
        let len = usize::try_from(file_bytes)
            .ok()
            .filter(|&len| isize::try_from(len).is_ok())
            .ok_or_else(|| MapError::TooLarge { path: path.to_path_buf(), file_bytes })?;
        let map = if len == 0 { None } else { Some(map_read_only(&file, len).map_err(io_error)?) };
        Ok(Arc::new(MappedFile {
            path: path.to_path_buf(),
            identity: FileIdentity::of(path, &metadata),
            file,
            _watched: Watched::new(map.as_deref().unwrap_or(&[]), path),
            map,
        }))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes when it was mapped.
    pub fn len(&self) -> usize {
        self.map.as_ref().map_or(0, |map| map.len())
    }

    /// True for an empty file.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Identity of the file when it was mapped.
    pub fn identity(&self) -> &FileIdentity {
        &self.identity
    }

    /// All bytes. Call [`still_valid`](Self::still_valid) before a long read.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// Asks the open file whether it still is what was mapped.
    ///
    /// # Errors
    /// [`MapError::Shrank`] when reading would fault, [`MapError::Changed`] when the bytes are not those that were
    /// checked at open, [`MapError::Io`] when the file cannot be asked.
    pub fn still_valid(&self) -> Result<(), MapError> {
        let path = || self.path.clone();
        let metadata = self.file.metadata().map_err(|source| MapError::Io { path: path(), source })?;
        let mapped_bytes = self.identity.file_bytes;
        if metadata.len() < mapped_bytes {
            return Err(MapError::Shrank { path: path(), mapped_bytes, found_bytes: metadata.len() });
        }
        if FileIdentity::of(&self.path, &metadata) != self.identity {
            return Err(MapError::Changed { path: path() });
        }
        Ok(())
    }

    /// The part `offset .. offset + range_bytes`.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`].
    pub fn range(self: &Arc<Self>, offset: usize, range_bytes: usize) -> Result<MappedRange, MapError> {
        match offset.checked_add(range_bytes) {
            Some(end) if end <= self.len() => {
                Ok(MappedRange { file: Arc::clone(self), offset, len: range_bytes })
            }
            _ => Err(MapError::OutOfRange {
                path: self.path.clone(),
                offset: offset as u64,
                range_bytes: range_bytes as u64,
                file_bytes: self.len() as u64,
            }),
        }
    }
}

/// A part of a [`MappedFile`], checked when it was made; cloning it copies no bytes.
#[derive(Debug, Clone)]
pub struct MappedRange {
    file: Arc<MappedFile>,
    offset: usize,
    len: usize,
}

impl MappedRange {
    /// The file this range is of.
    pub fn file(&self) -> &Arc<MappedFile> {
        &self.file
    }

    /// First byte, from the start of the file.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when it holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, read from disk as they are touched.
    pub fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.offset..self.offset + self.len]
    }

    /// See [`MappedFile::still_valid`].
    ///
    /// # Errors
    /// As [`MappedFile::still_valid`].
    pub fn still_valid(&self) -> Result<(), MapError> {
        self.file.still_valid()
    }

    /// True when both name the same bytes of the same version of the same file, even through two maps.
    pub fn same_bytes_as(&self, other: &MappedRange) -> bool {
        self.offset == other.offset
            && self.len == other.len
            && (Arc::ptr_eq(&self.file, &other.file) || self.file.identity == other.file.identity)
    }

    /// The part `offset .. offset + range_bytes` of this range.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`].
    pub fn slice(&self, offset: usize, range_bytes: usize) -> Result<MappedRange, MapError> {
        match offset.checked_add(range_bytes) {
            Some(end) if end <= self.len => self.file.range(self.offset + offset, range_bytes),
            _ => Err(MapError::OutOfRange {
                path: self.file.path.clone(),
                offset: (self.offset as u64).saturating_add(offset as u64),
                range_bytes: range_bytes as u64,
                file_bytes: self.file.len() as u64,
            }),
        }
    }

    /// Tells the system that these pages are not needed now: resident memory goes down, and a later read
    /// brings them back from the file. Pages shared with a neighbouring range go too. Does nothing where the
    /// system has no such call.
    ///
    /// # Errors
    /// [`MapError::Io`] when the system refuses.
    pub fn release_pages(&self) -> Result<(), MapError> {
        match &self.file.map {
            Some(map) if self.len > 0 => release(map, self.offset, self.len)
                .map_err(|source| MapError::Io { path: self.file.path.clone(), source }),
            _ => Ok(()),
        }
    }

    /// Tells the system that these pages will be read soon, so that it may read ahead. Does nothing where the
    /// system has no such call.
    ///
    /// # Errors
    /// [`MapError::Io`] when the system refuses.
    pub fn will_need(&self) -> Result<(), MapError> {
        #[cfg(unix)]
        if let (Some(map), true) = (&self.file.map, self.len > 0) {
            return map
                .advise_range(memmap2::Advice::WillNeed, self.offset, self.len)
                .map_err(|source| MapError::Io { path: self.file.path.clone(), source });
        }
        Ok(())
    }
}

impl MappedRange {
    /// Brings the pages in and maps them at once, which costs less than a fault for each. Does nothing where the system has no such
    /// call.
    ///
    /// # Errors
    /// [`MapError::Io`] when the system refuses, as older Linux does.
    pub fn populate(&self) -> Result<(), MapError> {
        #[cfg(target_os = "linux")]
        if let (Some(map), true) = (&self.file.map, self.len > 0) {
            return map
                .advise_range(memmap2::Advice::PopulateRead, self.offset, self.len)
                .map_err(|source| MapError::Io { path: self.file.path.clone(), source });
        }
        Ok(())
    }
}

#[expect(unsafe_code, reason = "mapping a file is one of the named places for unsafe")]
fn map_read_only(file: &File, len: usize) -> io::Result<Mmap> {
    // SAFETY: the map is read-only, so Rust never writes through it. That no other process truncates or rewrites
    // the file cannot be proven; `still_valid` is checked at map, pin and run, and the module names what remains.
    let map = unsafe { memmap2::MmapOptions::new().len(len).map(file) }?;
    // What is not in memory yet is then read in huge pages, which weights are walked through faster; a refusal changes nothing else.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

#[cfg(unix)]
#[expect(unsafe_code, reason = "mapped storage is one of the named places for unsafe")]
fn release(map: &Mmap, offset: usize, len: usize) -> io::Result<()> {
    // SAFETY: `map` is a shared, read-only map of a file: after MADV_DONTNEED the same file bytes are read again,
    // so every borrow of them stays true. `MappedFile::range` checked that offset + len lies in the map.
    unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, len) }
}

#[cfg(not(unix))]
fn release(_map: &Mmap, _offset: usize, _len: usize) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn file_with(name: &str, bytes: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("rlx-mapped-{}-{name}", std::process::id()));
        fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn a_range_borrows_the_files_bytes_and_its_length_is_checked() {
        let path = file_with("range", b"0123456789");
        let file = MappedFile::open(&path).unwrap();
        let range = file.range(2, 3).unwrap();
        assert_eq!(range.bytes(), b"234");
        assert_eq!(range.bytes().as_ptr(), file.bytes()[2..].as_ptr());
        assert_eq!(range.slice(1, 2).unwrap().bytes(), b"34");
        assert!(matches!(range.slice(1, 3), Err(MapError::OutOfRange { .. })));
        assert!(matches!(file.range(8, 3), Err(MapError::OutOfRange { file_bytes: 10, .. })));
        assert!(matches!(file.range(usize::MAX, 2), Err(MapError::OutOfRange { .. })));
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn an_empty_file_maps_to_no_bytes() {
        let path = file_with("empty", b"");
        let file = MappedFile::open(&path).unwrap();
        assert!(file.is_empty() && file.bytes().is_empty());
        assert!(file.range(0, 0).unwrap().release_pages().is_ok());
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_folder_or_absent_path_is_refused() {
        assert!(matches!(MappedFile::open(std::env::temp_dir()), Err(MapError::NotAFile { .. })));
        assert!(matches!(MappedFile::open("/no/such/file"), Err(MapError::Io { .. })));
    }

    #[test]
    fn a_file_that_shrinks_is_seen_before_it_is_read() {
        let path = file_with("shrink", &[7; 10_000]);
        let range = MappedFile::open(&path).unwrap().range(0, 10_000).unwrap();
        range.still_valid().unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
        assert!(matches!(
            range.still_valid(),
            Err(MapError::Shrank { mapped_bytes: 10_000, found_bytes: 100, .. })
        ));
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn two_maps_of_one_file_hold_the_same_bytes() {
        let path = file_with("same", &[1; 64]);
        let other = file_with("same-other", &[1; 64]);
        let a = MappedFile::open(&path).unwrap().range(0, 8).unwrap();
        let b = MappedFile::open(&path).unwrap().range(0, 8).unwrap();
        assert!(a.same_bytes_as(&b));
        assert!(!a.same_bytes_as(&a.slice(0, 4).unwrap()));
        assert!(!a.same_bytes_as(&MappedFile::open(&other).unwrap().range(0, 8).unwrap()));
        fs::remove_file(path).unwrap();
        fs::remove_file(other).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn released_pages_leave_memory_and_come_back_unchanged() {
        let bytes: Vec<u8> = (0..4 << 20).map(|i| (i % 251) as u8).collect();
        let path = file_with("release", &bytes);
        let range = MappedFile::open(&path).unwrap().range(5, bytes.len() - 9).unwrap();
        let resident = || {
            let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            smaps
                .lines()
                .skip_while(|line| !line.ends_with(&name))
                .find_map(|line| line.strip_prefix("Rss:"))
                .map(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap())
                .unwrap()
        };
        assert_eq!(range.bytes(), &bytes[5..bytes.len() - 4]);
        assert!(resident() >= 4_000, "{} kB after reading", resident());
        range.release_pages().unwrap();
        assert!(resident() < 100, "{} kB after release", resident());
        assert_eq!(range.bytes(), &bytes[5..bytes.len() - 4]);
        fs::remove_file(path).unwrap();
    }
}
