//! What the system says about memory.

mod commands;
#[cfg(target_arch = "wasm32")]
mod module;

pub use commands::{Commands, MacProbe, Shell, WindowsProbe};
#[cfg(target_arch = "wasm32")]
pub use module::ModuleProbe;

use std::fs;
use std::path::{Path, PathBuf};

/// Memory of the control groups that hold this process, the tightest of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CgroupMemory {
    /// The smallest limit.
    pub limit_bytes: u64,
    /// The least that is left under a limit. File pages that the system would drop count as left.
    pub remaining_bytes: u64,
}

/// Resident bytes by what they are pages of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResidentBytes {
    /// All of them.
    pub total: u64,
    /// Of no file: the system cannot take them back.
    pub anonymous: u64,
    /// Of mapped files.
    pub file: u64,
}

/// A source of memory figures. `None` means unknown, never zero.
pub trait MemoryProbe: Send + Sync {
    /// Installed memory in bytes.
    fn physical_bytes(&self) -> Option<u64>;

    /// Bytes that new work can have without swapping.
    fn available_bytes(&self) -> Option<u64>;

    /// The control group's limit; `None` where there is none.
    fn cgroup(&self) -> Option<CgroupMemory>;

    /// Bytes this process has in memory.
    fn rss_bytes(&self) -> Option<u64>;

    /// The most bytes this process had in memory.
    fn peak_rss_bytes(&self) -> Option<u64>;

    /// Bytes this process has in memory that the system cannot take back: those of no file. All of them where it does not tell.
    fn held_bytes(&self) -> Option<u64> {
        self.rss_bytes()
    }
}

/// Figures given by hand, for tests and for planning for another machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FixedProbe {
    /// Installed memory in bytes.
    pub physical_bytes: Option<u64>,
    /// Available memory in bytes.
    pub available_bytes: Option<u64>,
    /// The control group's limit.
    pub cgroup: Option<CgroupMemory>,
    /// Resident bytes.
    pub rss_bytes: Option<u64>,
    /// Most resident bytes.
    pub peak_rss_bytes: Option<u64>,
}

impl MemoryProbe for FixedProbe {
    fn physical_bytes(&self) -> Option<u64> {
        self.physical_bytes
    }

    fn available_bytes(&self) -> Option<u64> {
        self.available_bytes
    }

    fn cgroup(&self) -> Option<CgroupMemory> {
        self.cgroup
    }

    fn rss_bytes(&self) -> Option<u64> {
        self.rss_bytes
    }

    fn peak_rss_bytes(&self) -> Option<u64> {
        self.peak_rss_bytes
    }
}

/// The machine that this process runs on.
///
/// Linux and Android are read through [`ProcProbe`], macOS through [`MacProbe`], Windows through [`WindowsProbe`], a WebAssembly module
/// by its own memory. Elsewhere every figure is unknown.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemProbe;

impl SystemProbe {
    fn of_system(self) -> Option<Box<dyn MemoryProbe>> {
        #[cfg(target_arch = "wasm32")]
        return Some(Box::new(ModuleProbe));
        #[cfg(not(target_arch = "wasm32"))]
        match std::env::consts::OS {
            "linux" | "android" => Some(Box::new(ProcProbe { root: PathBuf::from("/") })),
            "macos" => Some(Box::new(MacProbe::new(Shell))),
            "windows" => Some(Box::new(WindowsProbe::new(Shell))),
            _ => None,
        }
    }
}

impl MemoryProbe for SystemProbe {
    fn physical_bytes(&self) -> Option<u64> {
        self.of_system()?.physical_bytes()
    }

    fn available_bytes(&self) -> Option<u64> {
        self.of_system()?.available_bytes()
    }

    fn cgroup(&self) -> Option<CgroupMemory> {
        self.of_system()?.cgroup()
    }

    fn rss_bytes(&self) -> Option<u64> {
        self.of_system()?.rss_bytes()
    }

    fn peak_rss_bytes(&self) -> Option<u64> {
        self.of_system()?.peak_rss_bytes()
    }

    fn held_bytes(&self) -> Option<u64> {
        self.of_system()?.held_bytes()
    }
}

/// Linux: `/proc/meminfo`, `/proc/self/status`, control groups of version 1 and 2.
#[derive(Debug, Clone)]
pub struct ProcProbe {
    /// The folder that holds `proc` and `sys`: `/`, except in tests.
    pub root: PathBuf,
}

/// Version 1 writes "no limit" as the largest multiple of a page.
const NO_LIMIT_BYTES: u64 = 1 << 62;

impl ProcProbe {
    fn kib_field(&self, file: &str, field: &str) -> Option<u64> {
        let text = fs::read_to_string(self.root.join(file)).ok()?;
        let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }

    /// Resident bytes of this process, pages of files apart from others; `None` if the system does not tell both.
    pub fn rss_apart(&self) -> Option<ResidentBytes> {
        let field = |name| self.kib_field("proc/self/status", name);
        let (anonymous, file) = (field("RssAnon")?, field("RssFile")?);
        Some(ResidentBytes { total: field("VmRSS")?, anonymous, file })
    }

    /// Folders of the groups that limit this process, with their files' names.
    fn cgroups(&self) -> Vec<(PathBuf, &'static GroupFiles)> {
        let membership = fs::read_to_string(self.root.join("proc/self/cgroup")).unwrap_or_default();
        let mut groups = Vec::new();
        for line in membership.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
            let (mount, files) = match controllers {
                "" => ("sys/fs/cgroup", &VERSION_2),
                _ if controllers.split(',').any(|name| name == "memory") => {
                    ("sys/fs/cgroup/memory", &VERSION_1)
                }
                _ => continue,
            };
            let group = Path::new(group.trim_start_matches('/'));
            groups.extend(group.ancestors().map(|part| (self.root.join(mount).join(part), files)));
        }
        groups
    }
}

struct GroupFiles {
    limit: &'static str,
    usage: &'static str,
    /// The fields of `memory.stat` that count pages of files, which the system takes back before it refuses memory.
    reclaimable: [&'static str; 2],
    /// Those that count what it cannot take back: pages of no file first.
    held: [&'static str; 3],
}

static VERSION_1: GroupFiles = GroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file", "total_active_file"],
    held: ["total_rss", "total_shmem", "total_unevictable"],
};

static VERSION_2: GroupFiles = GroupFiles {
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: ["inactive_file", "active_file"],
    held: ["anon", "shmem", "kernel"],
};

/// Limit and rest of a group. The usage is exact, but the fields of `memory.stat` follow it by up to seconds, in which pages of files just
/// read would count as held; so what is held is also added up by itself, with this process's own pages, which are exact.
fn group_memory(folder: &Path, files: &GroupFiles, own_bytes: u64) -> Option<CgroupMemory> {
    let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    let limit_bytes = number(files.limit).filter(|&limit| limit < NO_LIMIT_BYTES)?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let field = |name: &&str| {
        let of = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse::<u64>().ok();
        stat.lines().find_map(of)
    };
    let sum = |names: &[&'static str]| names.iter().filter_map(field).fold(0, u64::saturating_add);
    let taken = number(files.usage)?.saturating_sub(sum(&files.reclaimable));
    let used = match field(&files.held[0]) {
        Some(_) => taken.min(sum(&files.held).max(own_bytes)),
        None => taken,
    };
    Some(CgroupMemory { limit_bytes, remaining_bytes: limit_bytes.saturating_sub(used) })
}

impl MemoryProbe for ProcProbe {
    fn physical_bytes(&self) -> Option<u64> {
        self.kib_field("proc/meminfo", "MemTotal")
    }

    fn available_bytes(&self) -> Option<u64> {
        self.kib_field("proc/meminfo", "MemAvailable")
    }

    fn cgroup(&self) -> Option<CgroupMemory> {
        let own = self.kib_field("proc/self/status", "RssAnon").unwrap_or(0);
        let groups = self.cgroups();
        let known = groups.iter().filter_map(|(folder, files)| group_memory(folder, files, own));
        known.reduce(|a, b| CgroupMemory {
            limit_bytes: a.limit_bytes.min(b.limit_bytes),
            remaining_bytes: a.remaining_bytes.min(b.remaining_bytes),
        })
    }

    fn rss_bytes(&self) -> Option<u64> {
        self.kib_field("proc/self/status", "VmRSS")
    }

    fn peak_rss_bytes(&self) -> Option<u64> {
        self.kib_field("proc/self/status", "VmHWM")
    }

    fn held_bytes(&self) -> Option<u64> {
        self.rss_apart()
            .map_or_else(|| self.rss_bytes(), |resident| Some(resident.total.saturating_sub(resident.file)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(files: &[(&str, &str)]) -> (tempfile::TempDir, ProcProbe) {
        let folder = tempfile::tempdir().expect("temporary folder");
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("a test path has a folder")).expect("temporary folder");
            fs::write(path, text).expect("temporary file");
        }
        let root = folder.path().to_owned();
        (folder, ProcProbe { root })
    }

    #[test]
    fn pages_of_files_that_the_statistics_do_not_tell_yet_are_not_held() {
        let (_folder, probe) = probe(&[
            ("proc/self/cgroup", "0::/a\n"),
            ("proc/self/status", "RssAnon:\t   2 kB\n"),
            ("sys/fs/cgroup/a/memory.max", "10000\n"),
            ("sys/fs/cgroup/a/memory.current", "9900\n"),
            (
                "sys/fs/cgroup/a/memory.stat",
                "anon 1500\nkernel 300\nshmem 0\ninactive_file 10\nactive_file 0\n",
            ),
        ]);
        assert_eq!(probe.cgroup(), Some(CgroupMemory { limit_bytes: 10000, remaining_bytes: 10000 - 2048 }));
    }

    #[test]
    fn mapped_files_are_resident_but_not_held() {
        let status = "VmRSS:\t 100 kB\nRssAnon:\t  30 kB\nRssFile:\t  60 kB\nRssShmem:\t  10 kB\n";
        let (_folder, probe) = probe(&[("proc/self/status", status)]);
        assert_eq!((probe.rss_bytes(), probe.held_bytes()), (Some(100 << 10), Some(40 << 10)));
    }

    #[test]
    fn meminfo_and_status_are_read() {
        let (_folder, probe) = probe(&[
            ("proc/meminfo", "MemTotal:       2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n"),
            ("proc/self/status", "Name:\trlx\nVmHWM:\t     300 kB\nVmRSS:\t     200 kB\n"),
        ]);
        assert_eq!(probe.physical_bytes(), Some(2 << 20));
        assert_eq!(probe.available_bytes(), Some(1 << 20));
        assert_eq!(probe.peak_rss_bytes(), Some(300 << 10));
        assert_eq!(probe.rss_bytes(), Some(200 << 10));
        assert_eq!(probe.cgroup(), None);
    }

    #[test]
    fn what_is_absent_or_malformed_is_unknown() {
        let (_folder, probe) = probe(&[("proc/meminfo", "MemTotal: many kB\nMemAvailableX: 5 kB\n")]);
        assert_eq!(probe.physical_bytes(), None);
        assert_eq!(probe.available_bytes(), None);
        assert_eq!(probe.rss_bytes(), None);
    }

    #[test]
    fn version_2_takes_the_tightest_ancestor_and_counts_idle_file_pages_as_left() {
        let (_folder, probe) = probe(&[
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.max", "1000\n"),
            ("sys/fs/cgroup/a/memory.current", "700\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 500\ninactive_file 200\nactive_file 5\n"),
            ("sys/fs/cgroup/memory.max", "5000\n"),
            ("sys/fs/cgroup/memory.current", "4900\n"),
        ]);
        assert_eq!(probe.cgroup(), Some(CgroupMemory { limit_bytes: 1000, remaining_bytes: 100 }));
    }

    #[test]
    fn version_1_knows_its_own_no_limit() {
        let (_folder, probe) = probe(&[
            ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/x\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "4096\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "5000\n"),
            (
                "sys/fs/cgroup/memory/x/memory.stat",
                "active_file 9\ntotal_inactive_file 900\ntotal_active_file 1000\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n"),
        ]);
        assert_eq!(probe.cgroup(), Some(CgroupMemory { limit_bytes: 4096, remaining_bytes: 996 }));
    }

    #[test]
    fn the_running_system_answers() {
        if cfg!(any(target_os = "linux", target_os = "macos", target_os = "windows")) {
            let physical = SystemProbe.physical_bytes().expect("the system tells its installed memory");
            assert!(SystemProbe.available_bytes().expect("and what is available") <= physical);
        } else {
            assert_eq!(SystemProbe.physical_bytes(), None);
        }
        if cfg!(target_os = "linux") {
            let rss = SystemProbe.rss_bytes().expect("Linux tells the resident size");
            let peak = SystemProbe.peak_rss_bytes().expect("Linux tells its high-water mark");
            let physical = SystemProbe.physical_bytes().expect("Linux tells the installed memory");
            assert!(rss > 0 && peak > 0 && rss < physical);
        }
    }
}
