//! The automatic cache: plans and packed weights in a folder that many processes share.
//!
//! An entry is a [container](super::container) named by the digest of its stamp and key alone: `plans/<digest>`, `packed/<digest>`. The
//! key stands in the file too and is compared whole. Whatever is wrong with an entry makes it a miss with a warning: it is removed and
//! made anew. Whatever is wrong with the folder is a warning as well: nothing is stored then.

use super::container::{Container, LargeSection, OpenContainer, Section, Stamp, UNFINISHED};
use super::error::AotCacheError;
use super::hex;
use crate::config::Config;
use crate::plan::{Lir, parse_lir};
use rlx_tensor::storage::mapped::MappedRange;
use std::fs::{self, FileTimes};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, SystemTime};

/// Size limit of the folder unless a setting says otherwise.
pub const DEFAULT_CACHE_BYTES: u64 = 10 << 30;

/// Age from which an unfinished file is taken for abandoned.
const ABANDONED: Duration = Duration::from_secs(3600);

const KINDS: [&str; 3] = ["plans", "packed", "kernels"];
const PLAN: &str = "plan";
const PACKED: &str = "packed";
const KERNEL: &str = "kernel";

/// A folder of plans and packed weights.
#[derive(Debug)]
pub struct AotCache {
    folder: PathBuf,
    limit_bytes: u64,
    warned: Once,
}

/// A file of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheEntry {
    /// `plans`, `packed` or `kernels`.
    pub kind: &'static str,
    /// The digest that names it.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// When it was last used.
    pub used: SystemTime,
    /// Why it cannot be used; `None` for one whose header is whole.
    pub fault: Option<String>,
}

/// What a removal did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheRemoval {
    /// Files removed.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
}

impl CacheRemoval {
    fn count(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes += bytes;
    }
}

/// A packed weight of the cache.
#[derive(Debug)]
pub struct CachedPacked {
    /// Shape and layout, as the backend described them.
    pub layout: Vec<u8>,
    /// The content, verified.
    pub content: MappedRange,
}

impl AotCache {
    /// A cache in `folder`, kept below `limit_bytes`. Nothing is made before something is stored.
    pub fn new(folder: impl Into<PathBuf>, limit_bytes: u64) -> AotCache {
        AotCache { folder: folder.into(), limit_bytes, warned: Once::new() }
    }

    /// The cache that the settings ask for; `None` if they turn it off or lead to no folder.
    pub fn from_config(config: &Config) -> Option<AotCache> {
        let limit = config.cache_bytes.map_or(DEFAULT_CACHE_BYTES, |bytes| bytes.0);
        (limit > 0).then(|| Some(AotCache::new(config.cache_folder()?, limit)))?
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The size limit.
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    fn path(&self, kind: &str, stamp: &Stamp, key: &[u8]) -> PathBuf {
        let mut digest = blake3::Hasher::new();
        for part in [&stamp.kind, &stamp.version, &stamp.device, &stamp.isa, &stamp.precision] {
            digest.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        digest.update(&stamp.packing).update(key);
        self.folder.join(kind).join(hex(digest.finalize().as_bytes()))
    }

    /// Opens an entry; one that cannot be used is removed, with a warning.
    fn find<T>(
        &self,
        kind: &str,
        stamp: &Stamp,
        key: &[u8],
        read: impl FnOnce(&OpenContainer) -> Result<T, AotCacheError>,
    ) -> Option<T> {
        let path = self.path(kind, stamp, key);
        if !path.is_file() {
            return None;
        }
        let opened = OpenContainer::open(&path).and_then(|opened| {
            opened.expect(stamp)?;
            if opened.key() != key {
                let what = "the key";
                let [found, expected] =
                    [opened.key(), key].map(|key| hex(&blake3::hash(key).as_bytes()[..6]));
                return Err(AotCacheError::Mismatch { path: path.clone(), what, found, expected });
            }
            read(&opened)
        });
        match opened {
            Ok(found) => {
                touch(&path);
                Some(found)
            }
            Err(error) => {
                // What the system refuses now, as too many open files, it may grant later; and the entry may be gone by now.
                let refused = matches!(error, AotCacheError::Io { .. } | AotCacheError::Map(_));
                if path.exists() {
                    tracing::warn!("cache: {error}; it is made anew");
                }
                if !refused {
                    // Another process may have replaced it already: then its new entry is made once more.
                    let _ = fs::remove_file(&path);
                }
                None
            }
        }
    }

    /// A plan, verified as a fresh one is.
    pub fn plan(&self, stamp: &Stamp, key: &[u8]) -> Option<Lir> {
        self.find(KINDS[0], stamp, key, |opened| {
            let refused =
                |reason: String| AotCacheError::Refused { path: opened.path().to_path_buf(), reason };
            let bytes = opened.small(PLAN).ok_or_else(|| refused("it holds no plan".to_owned()))?;
            let text = std::str::from_utf8(bytes).map_err(|error| refused(error.to_string()))?;
            parse_lir(text).map_err(|error| refused(error.to_string()))
        })
    }

    /// Whether there is a plan; it may still turn out to be damaged. Reads nothing.
    pub fn has_plan(&self, stamp: &Stamp, key: &[u8]) -> bool {
        self.path(KINDS[0], stamp, key).is_file()
    }

    /// Removes a plan that turned out not to fit what asked for it.
    pub fn forget_plan(&self, stamp: &Stamp, key: &[u8]) {
        // One that cannot be removed is refused again, with the same warning.
        let _ = fs::remove_file(self.path(KINDS[0], stamp, key));
    }

    /// Stores a plan. What keeps it from being stored is a warning.
    pub fn store_plan(&self, stamp: &Stamp, key: &[u8], plan: &Lir) -> bool {
        let text = plan.to_string();
        let small = [Section { name: PLAN, about: &[], bytes: text.as_bytes() }];
        self.store(KINDS[0], &Container { stamp, key, small: &small, large: &[] }, 1)
    }

    /// Whether there is a packed weight; it may still turn out to be damaged. Reads nothing.
    pub fn has_packed(&self, stamp: &Stamp, key: &[u8]) -> bool {
        self.path(KINDS[1], stamp, key).is_file()
    }

    /// A packed weight, verified on `threads` threads.
    pub fn packed(&self, stamp: &Stamp, key: &[u8], threads: usize) -> Option<CachedPacked> {
        self.find(KINDS[1], stamp, key, |opened| {
            opened.verify_body(threads)?;
            let refused = || AotCacheError::Refused {
                path: opened.path().to_path_buf(),
                reason: "it holds no packed weight".to_owned(),
            };
            let large = opened.large()?;
            let LargeSection { about, content, .. } = large.into_iter().next().ok_or_else(refused)?;
            Ok(CachedPacked { layout: about.to_vec(), content })
        })
    }

    /// Stores a packed weight. What keeps it from being stored is a warning.
    pub fn store_packed(
        &self,
        stamp: &Stamp,
        key: &[u8],
        layout: &[u8],
        content: &[u8],
        threads: usize,
    ) -> bool {
        let large = [Section { name: PACKED, about: layout, bytes: content }];
        self.store(KINDS[1], &Container { stamp, key, small: &[], large: &large }, threads)
    }

    /// What a device's driver made of a kernel, or of several.
    pub fn kernel(&self, stamp: &Stamp, key: &[u8]) -> Option<Vec<u8>> {
        self.find(KINDS[2], stamp, key, |opened| {
            let reason = || "it holds no kernel".to_owned();
            let refused = || AotCacheError::Refused { path: opened.path().to_path_buf(), reason: reason() };
            opened.small(KERNEL).map(<[u8]>::to_vec).ok_or_else(refused)
        })
    }

    /// Stores what a device's driver made of a kernel. What keeps it from being stored is a warning.
    pub fn store_kernel(&self, stamp: &Stamp, key: &[u8], bytes: &[u8]) -> bool {
        let small = [Section { name: KERNEL, about: &[], bytes }];
        self.store(KINDS[2], &Container { stamp, key, small: &small, large: &[] }, 1)
    }

    fn store(&self, kind: &str, container: &Container<'_>, threads: usize) -> bool {
        let bytes: usize =
            container.small.iter().chain(container.large).map(|section| section.bytes.len()).sum();
        if bytes as u64 > self.limit_bytes {
            tracing::debug!("cache: {bytes} bytes are more than the limit of {}", self.limit_bytes);
            return false;
        }
        let path = self.path(kind, container.stamp, container.key);
        let written = self.make_room(bytes as u64).and_then(|()| {
            let folder = self.folder.join(kind);
            fs::create_dir_all(&folder).map_err(AotCacheError::io(&folder))?;
            container.write(&path, threads)
        });
        if let Err(error) = &written {
            self.warned.call_once(|| tracing::warn!("cache: {error}; nothing is stored there"));
        }
        written.is_ok()
    }

    /// Removes entries, the least recently used first, until `more` bytes fit.
    fn make_room(&self, more: u64) -> Result<(), AotCacheError> {
        let mut entries = self.files()?;
        let mut total = entries.iter().map(|entry| entry.bytes).sum::<u64>().saturating_add(more);
        entries.sort_by_key(|entry| entry.used);
        for entry in entries {
            if total <= self.limit_bytes {
                break;
            }
            self.remove(&entry)?;
            total = total.saturating_sub(entry.bytes);
        }
        Ok(())
    }

    fn remove(&self, entry: &CacheEntry) -> Result<(), AotCacheError> {
        let path = self.folder.join(entry.kind).join(&entry.name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(AotCacheError::io(&path)(error)),
            _ => Ok(()),
        }
    }

    /// Every file of the cache's folders, unread. Other files of theirs are left out.
    fn files(&self) -> Result<Vec<CacheEntry>, AotCacheError> {
        let mut entries = Vec::new();
        for kind in KINDS {
            let folder = self.folder.join(kind);
            let listed = match fs::read_dir(&folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                listed => listed.map_err(AotCacheError::io(&folder))?,
            };
            for file in listed {
                let file = file.map_err(AotCacheError::io(&folder))?;
                let name = file.file_name().to_string_lossy().into_owned();
                // A file that is gone by now was removed by another process.
                let Ok(metadata) = file.metadata() else { continue };
                if metadata.is_file() && is_ours(&name) {
                    let used = metadata.accessed().or_else(|_| metadata.modified());
                    let used = used.unwrap_or(SystemTime::UNIX_EPOCH);
                    entries.push(CacheEntry { kind, name, bytes: metadata.len(), used, fault: None });
                }
            }
        }
        Ok(entries)
    }

    /// The entries, each with what its header says: the most recently used first.
    ///
    /// # Errors
    /// [`AotCacheError::Io`] if the folder cannot be read.
    pub fn entries(&self) -> Result<Vec<CacheEntry>, AotCacheError> {
        let mut entries = self.files()?;
        for entry in &mut entries {
            let opened = OpenContainer::open(&self.folder.join(entry.kind).join(&entry.name));
            entry.fault = match opened {
                _ if is_unfinished(&entry.name) => Some("unfinished".to_owned()),
                Ok(_) => None,
                Err(error) => Some(error.to_string()),
            };
        }
        entries.sort_by(|a, b| b.used.cmp(&a.used).then_with(|| a.name.cmp(&b.name)));
        Ok(entries)
    }

    /// Removes what cannot be used: abandoned and broken files, entries of other versions, and what exceeds the limit.
    ///
    /// # Errors
    /// [`AotCacheError::Io`].
    pub fn collect(&self) -> Result<CacheRemoval, AotCacheError> {
        let mut removal = CacheRemoval::default();
        for entry in self.entries()? {
            let path = self.folder.join(entry.kind).join(&entry.name);
            let age = entry.used.elapsed().unwrap_or_default();
            let foreign = || {
                let opened = OpenContainer::open(&path);
                opened.is_ok_and(|opened| opened.stamp().version != env!("CARGO_PKG_VERSION"))
            };
            let useless = match entry.fault {
                Some(_) if is_unfinished(&entry.name) => age > ABANDONED,
                Some(_) => true,
                None => foreign(),
            };
            if useless {
                self.remove(&entry)?;
                removal.count(entry.bytes);
            }
        }
        let mut entries = self.files()?;
        let mut total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        entries.sort_by_key(|entry| entry.used);
        for entry in entries {
            if total <= self.limit_bytes {
                break;
            }
            self.remove(&entry)?;
            removal.count(entry.bytes);
            total -= entry.bytes;
        }
        Ok(removal)
    }

    /// Removes every entry. Files that are no cache entries stay.
    ///
    /// # Errors
    /// [`AotCacheError::Io`].
    pub fn clear(&self) -> Result<CacheRemoval, AotCacheError> {
        let mut removal = CacheRemoval::default();
        for entry in self.files()? {
            self.remove(&entry)?;
            removal.count(entry.bytes);
        }
        Ok(removal)
    }
}

/// Marks an entry as used. The time of access alone: maps of other processes watch the time of modification.
fn touch(path: &Path) {
    if let Ok(file) = fs::File::open(path) {
        // Where the system refuses, the entry merely looks older than it is.
        let _ = file.set_times(FileTimes::new().set_accessed(SystemTime::now()));
    }
}

fn is_unfinished(name: &str) -> bool {
    name.ends_with(&format!(".{UNFINISHED}"))
}

/// A digest, or a digest's unfinished file.
fn is_ours(name: &str) -> bool {
    let digest = name.split('.').next().unwrap_or("");
    let is_digest = digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_digest && (digest.len() == name.len() || is_unfinished(name))
}

#[cfg(test)]
mod tests;
