//! How many workers the machine grants: CPUs, limited by the cgroup's CPU quota.

use std::fs;
use std::path::{Path, PathBuf};

/// The default number of workers: the CPUs this process may use, limited by the CPU quota of its cgroup.
///
/// `root` is the root of the file system to read `/proc` and `/sys` from (`/`, except in tests).
pub fn default_threads(root: &Path) -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    cgroup_cpu_limit(root).map_or(cpus, |limit| cpus.min(limit))
}

/// The CPU quota of this process's cgroup (version 2 or 1) in whole CPUs, rounded down, at least one.
///
/// A limit of any ancestor counts. `None` if there is no quota or the files are absent or unreadable.
pub fn cgroup_cpu_limit(root: &Path) -> Option<usize> {
    let membership = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut limit: Option<f64> = None;
    let mut note = |cpus: Option<f64>| {
        if let Some(cpus) = cpus {
            limit = Some(limit.map_or(cpus, |known: f64| known.min(cpus)));
        }
    };
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(group)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if id == "0" && controllers.is_empty() {
            for folder in ancestors(&root.join("sys/fs/cgroup"), group) {
                note(quota_v2(&folder));
            }
        } else if controllers.split(',').any(|name| name == "cpu") {
            for mount in ["cpu", controllers] {
                for folder in ancestors(&root.join("sys/fs/cgroup").join(mount), group) {
                    note(quota_v1(&folder));
                }
            }
        }
    }
    limit.map(|cpus| (cpus.floor() as usize).max(1))
}

/// The folder of `group` under `mount` and those above it, down to `mount` itself.
fn ancestors(mount: &Path, group: &str) -> Vec<PathBuf> {
    let relative = Path::new(group.trim_start_matches('/'));
    relative.ancestors().map(|part| mount.join(part)).collect()
}

fn quota_v2(folder: &Path) -> Option<f64> {
    let text = fs::read_to_string(folder.join("cpu.max")).ok()?;
    let mut words = text.split_ascii_whitespace();
    let quota: f64 = words.next()?.parse().ok()?;
    let period: f64 = words.next()?.parse().ok()?;
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

fn quota_v1(folder: &Path) -> Option<f64> {
    let number =
        |name: &str| -> Option<f64> { fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok() };
    let (quota, period) = (number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let root = std::env::temp_dir().join(format!("rlx-quota-{}-{name}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a test path has a folder")).expect("temporary folder");
            fs::write(path, text).expect("temporary file");
        }
        root
    }

    #[test]
    fn version_2_takes_the_smallest_ancestor() {
        let root = root(
            "v2",
            &[
                ("proc/self/cgroup", "0::/a/b\n"),
                ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
                ("sys/fs/cgroup/a/cpu.max", "350000 100000\n"),
            ],
        );
        assert_eq!(cgroup_cpu_limit(&root), Some(3));
        assert!(default_threads(&root) <= 3);
        fs::remove_dir_all(root).expect("temporary folder");
    }

    #[test]
    fn version_1_and_fractions() {
        let root = root(
            "v1",
            &[
                ("proc/self/cgroup", "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n"),
                ("sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us", "50000\n"),
                ("sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us", "100000\n"),
            ],
        );
        assert_eq!(cgroup_cpu_limit(&root), Some(1));
        fs::remove_dir_all(root).expect("temporary folder");
    }

    #[test]
    fn no_quota() {
        let root = root(
            "none",
            &[
                ("proc/self/cgroup", "3:cpu:/\n0::/\n"),
                ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
                ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
                ("sys/fs/cgroup/cpu.max", "max 100000\n"),
            ],
        );
        assert_eq!(cgroup_cpu_limit(&root), None);
        assert_eq!(cgroup_cpu_limit(&root.join("absent")), None);
        assert!(default_threads(&root) >= 1);
        fs::remove_dir_all(root).expect("temporary folder");
    }
}
