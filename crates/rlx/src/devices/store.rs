//! What is remembered of devices: measured rates and decisions, in memory and in a file of the cache folder.

use super::cost::DeviceRates;
use super::id::DeviceId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// Where the time comes from.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Version of the file; another one is not read.
const FORMAT: u32 = 1;
/// Decisions kept in the file; the oldest go first.
const DECISIONS: usize = 1024;
/// A file that is larger was not written here.
const FILE_BYTES: u64 = 4 << 20;

/// A device chosen earlier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Decision {
    #[serde(with = "as_text")]
    pub device: DeviceId,
    /// Seconds since 1970.
    pub made_at: u64,
    /// By measured runs rather than by the cost model.
    pub measured: bool,
    /// The result agreed with the CPU's; `None` if it was not compared.
    pub verified: Option<bool>,
}

mod as_text {
    use super::DeviceId;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub fn serialize<S: Serializer>(device: &DeviceId, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(device)
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<DeviceId, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    format: u32,
    #[serde(default)]
    rates: BTreeMap<String, DeviceRates>,
    #[serde(default)]
    decisions: BTreeMap<String, Decision>,
}

/// Rates and decisions, shared by every user of one folder. A file that is damaged, foreign or cannot be written is no error: what it
/// would have held is measured again.
pub(super) struct DeviceStore {
    file: Option<PathBuf>,
    lifetime: Duration,
    clock: Clock,
    content: Mutex<Content>,
}

impl DeviceStore {
    pub fn open(folder: Option<&Path>, lifetime: Duration, clock: Clock) -> DeviceStore {
        let file = folder.map(|folder| folder.join("devices.json"));
        let content = file.as_deref().map(read).unwrap_or_default();
        DeviceStore { file, lifetime, clock, content: Mutex::new(content) }
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        (self.clock)().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }

    pub fn rates(&self, key: &str) -> Option<DeviceRates> {
        self.lock().rates.get(key).cloned()
    }

    pub fn keep_rates(&self, key: &str, rates: &DeviceRates) {
        self.change(|content| drop(content.rates.insert(key.to_owned(), rates.clone())));
    }

    /// A decision that has not expired.
    pub fn decision(&self, key: &str) -> Option<Decision> {
        let now = self.now();
        let fresh = |d: &&Decision| now >= d.made_at && now - d.made_at < self.lifetime.as_secs();
        self.lock().decisions.get(key).filter(fresh).cloned()
    }

    pub fn keep_decision(&self, key: &str, device: DeviceId, measured: bool, verified: Option<bool>) {
        let made_at = self.now();
        let decision = Decision { device, made_at, measured, verified };
        self.change(|content| {
            content.decisions.insert(key.to_owned(), decision.clone());
            while content.decisions.len() > DECISIONS {
                let oldest = content.decisions.iter().min_by_key(|(_, d)| d.made_at);
                let Some(oldest) = oldest.map(|(key, _)| key.clone()) else { break };
                content.decisions.remove(&oldest);
            }
        });
    }

    /// Drops the decisions that `condemned` names.
    pub fn forget_decisions(&self, condemned: impl Fn(&str, &Decision) -> bool) {
        self.change(|content| content.decisions.retain(|key, decision| !condemned(key, decision)));
    }

    /// Changes what is in memory, and the file: what others wrote to it meanwhile stays.
    fn change(&self, change: impl Fn(&mut Content)) {
        let mut content = self.lock();
        change(&mut content);
        let Some(file) = &self.file else { return };
        let mut shared = read(file);
        change(&mut shared);
        shared.format = FORMAT;
        // A folder that cannot be written makes later processes measure again, nothing worse.
        let _ = write(file, &shared);
    }
}

fn read(file: &Path) -> Content {
    let small = std::fs::metadata(file).is_ok_and(|meta| meta.len() <= FILE_BYTES);
    let text = small.then(|| std::fs::read_to_string(file).ok()).flatten().unwrap_or_default();
    let content: Content = serde_json::from_str(&text).unwrap_or_default();
    let sane = |r: &DeviceRates| {
        let all = r.matrix_flops.values().chain([&r.vector_flops, &r.bytes_per_s, &r.dispatch_s]);
        all.into_iter().all(|v| v.is_finite() && *v > 0.0)
    };
    match content.format == FORMAT && content.rates.values().all(sane) {
        true => content,
        false => Content::default(),
    }
}

/// A reader sees the old file or the new one, never a part.
fn write(file: &Path, content: &Content) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let part = folder.join(format!("devices.json.{}.part", std::process::id()));
    let text = serde_json::to_string_pretty(content)?;
    let mut to = std::fs::File::create(&part)?;
    to.write_all(text.as_bytes())?;
    to.sync_all()?;
    std::fs::rename(&part, file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Device;

    fn at(seconds: u64) -> Clock {
        Arc::new(move || SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    }

    fn open(folder: &Path, seconds: u64) -> DeviceStore {
        DeviceStore::open(Some(folder), Duration::from_secs(100), at(seconds))
    }

    #[test]
    fn decisions_persist_and_expire() {
        let folder = tempfile::tempdir().unwrap();
        let cuda = DeviceId { kind: Device::Cuda, index: 1 };
        open(folder.path(), 1000).keep_decision("g", cuda, true, Some(true));
        let found = open(folder.path(), 1099).decision("g").unwrap();
        assert_eq!(found, Decision { device: cuda, made_at: 1000, measured: true, verified: Some(true) });
        assert_eq!(open(folder.path(), 1100).decision("g"), None, "expired");
        assert_eq!(
            open(folder.path(), 999).decision("g"),
            None,
            "made in the future: the clock was set back"
        );
        assert_eq!(open(folder.path(), 1000).decision("h"), None);
    }

    #[test]
    fn a_damaged_file_is_empty_and_is_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let rates = DeviceRates {
            matrix_flops: BTreeMap::new(),
            vector_flops: 1.0,
            bytes_per_s: 2.0,
            dispatch_s: 3.0,
        };
        open(folder.path(), 1).keep_rates("cpu", &rates);
        let file = folder.path().join("devices.json");
        let text = std::fs::read_to_string(&file).unwrap();
        for broken in
            [&text[..text.len() / 2], "", "[]", &text.replace("2.0", "0.0"), &text.replace("1,", "2,")]
        {
            std::fs::write(&file, broken).unwrap();
            let store = open(folder.path(), 1);
            assert_eq!(store.rates("cpu"), None, "{broken}");
            store.keep_rates("cpu", &rates);
            assert_eq!(open(folder.path(), 1).rates("cpu"), Some(rates.clone()));
        }
    }

    #[test]
    fn two_users_of_a_folder_keep_what_the_other_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (open(folder.path(), 5), open(folder.path(), 5));
        a.keep_decision("a", DeviceId::CPU, false, None);
        b.keep_decision("b", DeviceId::CPU, false, None);
        let both = open(folder.path(), 5);
        assert!(both.decision("a").is_some() && both.decision("b").is_some());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let store = open(&file, 5);
        store.keep_decision("a", DeviceId::CPU, false, None);
        assert!(store.decision("a").is_some(), "kept in memory");
    }
}
