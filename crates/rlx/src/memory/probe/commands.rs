//! Memory figures of systems that tell them through programs of theirs: macOS and Windows.

use super::{CgroupMemory, MemoryProbe};
use std::process::{Command, Stdio};

/// What runs a program and gives what it prints; `None` if it cannot be run or fails. Tests answer in its place.
pub trait Commands: Send + Sync {
    /// The standard output of a program.
    fn output(&self, program: &str, arguments: &[&str]) -> Option<String>;
}

/// Programs of this system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shell;

impl Commands for Shell {
    fn output(&self, program: &str, arguments: &[&str]) -> Option<String> {
        let mut command = Command::new(program);
        let output = command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// macOS: `sysctl` for installed memory, `vm_stat` for what is available, `ps` for this process. It does not tell the peak.
#[derive(Debug, Clone, Copy, Default)]
pub struct MacProbe<C> {
    commands: C,
}

impl<C: Commands> MacProbe<C> {
    /// A probe that asks through these commands.
    pub fn new(commands: C) -> Self {
        MacProbe { commands }
    }
}

/// Pages that new work may have: free ones, ones read ahead, and ones that nobody used lately.
const AVAILABLE_PAGES: [&str; 3] = ["Pages free", "Pages speculative", "Pages inactive"];

/// Available bytes by the table of `vm_stat`.
fn vm_stat_available(text: &str) -> Option<u64> {
    let mut lines = text.lines();
    let (_, size) = lines.next()?.split_once("page size of ")?;
    let page_bytes: u64 = size.split_whitespace().next()?.parse().ok()?;
    let rows: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once(':')).collect();
    let pages = AVAILABLE_PAGES.map(|name| {
        let (_, count) = rows.iter().find(|(row, _)| row.trim() == name)?;
        count.trim().trim_end_matches('.').parse::<u64>().ok()
    });
    let pages = pages.into_iter().sum::<Option<u64>>()?;
    pages.checked_mul(page_bytes)
}

impl<C: Commands> MemoryProbe for MacProbe<C> {
    fn physical_bytes(&self) -> Option<u64> {
        self.commands.output("/usr/sbin/sysctl", &["-n", "hw.memsize"])?.trim().parse().ok()
    }

    fn available_bytes(&self) -> Option<u64> {
        vm_stat_available(&self.commands.output("/usr/bin/vm_stat", &[])?)
    }

    fn cgroup(&self) -> Option<CgroupMemory> {
        None
    }

    fn rss_bytes(&self) -> Option<u64> {
        let process = std::process::id().to_string();
        let text = self.commands.output("/bin/ps", &["-o", "rss=", "-p", &process])?;
        text.trim().parse::<u64>().ok()?.checked_mul(1024)
    }

    fn peak_rss_bytes(&self) -> Option<u64> {
        None
    }
}

/// Windows: the operating system's and this process's entries of its management interface, through PowerShell.
#[derive(Debug, Clone, Copy, Default)]
pub struct WindowsProbe<C> {
    commands: C,
}

impl<C: Commands> WindowsProbe<C> {
    /// A probe that asks through these commands.
    pub fn new(commands: C) -> Self {
        WindowsProbe { commands }
    }

    /// A number that an expression of PowerShell gives.
    fn number(&self, expression: &str) -> Option<u64> {
        let arguments = ["-NoProfile", "-NonInteractive", "-Command", expression];
        self.commands.output("powershell.exe", &arguments)?.trim().parse().ok()
    }

    /// A field of this process.
    fn of_process(&self, field: &str) -> Option<u64> {
        self.number(&format!("(Get-Process -Id {}).{field}", std::process::id()))
    }
}

impl<C: Commands> MemoryProbe for WindowsProbe<C> {
    fn physical_bytes(&self) -> Option<u64> {
        self.number("(Get-CimInstance Win32_ComputerSystem).TotalPhysicalMemory")
    }

    fn available_bytes(&self) -> Option<u64> {
        self.number("(Get-CimInstance Win32_OperatingSystem).FreePhysicalMemory")?.checked_mul(1024)
    }

    fn cgroup(&self) -> Option<CgroupMemory> {
        None
    }

    fn rss_bytes(&self) -> Option<u64> {
        self.of_process("WorkingSet64")
    }

    fn peak_rss_bytes(&self) -> Option<u64> {
        self.of_process("PeakWorkingSet64")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::memory::MemoryView;

    /// Answers by a part of the command line.
    struct Told(&'static [(&'static str, &'static str)]);

    impl Commands for Told {
        fn output(&self, program: &str, arguments: &[&str]) -> Option<String> {
            let line = format!("{program} {}", arguments.join(" "));
            self.0.iter().find(|(part, _)| line.contains(part)).map(|(_, text)| (*text).to_owned())
        }
    }

    const VM_STAT: &str = "Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                6000.
Pages active:                            400000.
Pages inactive:                           90000.
Pages speculative:                         4000.
Pages wired down:                        100000.
\"Translation faults\":                 999999999.
";

    #[test]
    fn macos_tells_installed_available_and_resident_memory() {
        let probe = MacProbe::new(Told(&[
            ("sysctl -n hw.memsize", "17179869184\n"),
            ("vm_stat", VM_STAT),
            ("ps -o rss= -p ", "  2048\n"),
        ]));
        assert_eq!(probe.physical_bytes(), Some(16 << 30));
        assert_eq!(probe.available_bytes(), Some(100_000 * 16384));
        assert_eq!((probe.rss_bytes(), probe.peak_rss_bytes(), probe.cgroup()), (Some(2 << 20), None, None));
        let config = Config::default();
        let view = MemoryView::new(&probe, &config);
        assert_eq!(view.headroom_bytes(), Some(100_000 * 16384), "what is available is the least");
    }

    #[test]
    fn windows_tells_installed_available_resident_and_peak_memory() {
        let probe = WindowsProbe::new(Told(&[
            ("TotalPhysicalMemory", "8589934592\r\n"),
            ("FreePhysicalMemory", "1048576\r\n"),
            ("PeakWorkingSet64", "300\r\n"),
            ("WorkingSet64", "200\r\n"),
        ]));
        assert_eq!((probe.physical_bytes(), probe.available_bytes()), (Some(8 << 30), Some(1 << 30)));
        assert_eq!((probe.rss_bytes(), probe.peak_rss_bytes(), probe.cgroup()), (Some(200), Some(300), None));
    }

    #[test]
    fn an_answer_that_does_not_parse_or_does_not_come_is_unknown_and_never_fits() {
        let cut = &VM_STAT[..VM_STAT.find("Pages speculative").unwrap()];
        for text in [
            "",
            "no table",
            &VM_STAT.replace("16384 bytes", "many bytes"),
            cut,
            &VM_STAT.replace("6000.", "-1."),
        ] {
            assert_eq!(vm_stat_available(text), None, "{text}");
        }
        assert_eq!(vm_stat_available(&VM_STAT.replace("16384", "18446744073709551615")), None, "an overflow");
        let garbled = [("sysctl", "many"), ("ps", ""), ("Memory", "1 2"), ("WorkingSet", "-5")];
        let garbled = || Told(Box::leak(Box::new(garbled)));
        let (mac, windows) = (MacProbe::new(garbled()), WindowsProbe::new(garbled()));
        let (silent_mac, silent_windows) = (MacProbe::new(Told(&[])), WindowsProbe::new(Told(&[])));
        let probes: [&dyn MemoryProbe; 4] = [&mac, &windows, &silent_mac, &silent_windows];
        for probe in probes {
            assert_eq!(
                (probe.physical_bytes(), probe.available_bytes(), probe.rss_bytes()),
                (None, None, None)
            );
            let config = Config::default();
            let verdict = MemoryView::new(probe, &config).would_exceed_soft_budget(1);
            assert_eq!(verdict, crate::memory::BudgetVerdict::Unknown);
        }
    }
}
