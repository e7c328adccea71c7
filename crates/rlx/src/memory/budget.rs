//! How much memory may be used: the soft budget and what is left of it.

use super::estimate::{MemoryDeficit, MemoryEstimate};
use super::probe::{MemoryProbe, SystemProbe};
use crate::config::{Config, ConfigError};

/// Share of the memory that may be used unless a setting says otherwise.
pub const DEFAULT_SOFT_MEMORY_FRACTION: f64 = 0.80;

/// Whether a need fits into what may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BudgetVerdict {
    /// Every figure is known and leaves room.
    Fits,
    /// A known figure leaves too little room.
    Exceeds,
    /// No known figure forbids it, but not all are known.
    Unknown,
}

/// The figures of a probe under the settings of a config.
#[derive(Clone, Copy)]
pub struct MemoryView<'a> {
    probe: &'a dyn MemoryProbe,
    config: &'a Config,
}

impl<'a> MemoryView<'a> {
    /// A view of `probe` with the limits that `config` sets.
    pub fn new(probe: &'a dyn MemoryProbe, config: &'a Config) -> Self {
        MemoryView { probe, config }
    }

    /// Share of the memory that may be used, above 0 and at most 1.
    pub fn soft_fraction(&self) -> f64 {
        self.config.soft_memory_fraction.map_or(DEFAULT_SOFT_MEMORY_FRACTION, |fraction| fraction.value())
    }

    /// Bytes that may be used by the process: as set, else the fraction of physical memory or of the control group's limit,
    /// whichever is less. `None` if unknown.
    pub fn soft_budget_bytes(&self) -> Option<u64> {
        if let Some(budget) = self.config.soft_memory_budget_bytes {
            return Some(budget.0);
        }
        let limit = self.probe.cgroup().map(|group| group.limit_bytes);
        let total = self.probe.physical_bytes().into_iter().chain(limit).min()?;
        Some((total as f64 * self.soft_fraction()) as u64)
    }

    /// Bytes that can be taken now: the least of budget minus resident bytes, available memory and what the control group
    /// leaves. `None` if the budget, the resident bytes or the available memory is unknown.
    pub fn headroom_bytes(&self) -> Option<u64> {
        let [budget, available, group] = self.rooms(self.probe.rss_bytes());
        Some(budget?.min(available?).min(group.unwrap_or(u64::MAX)))
    }

    /// Whether taking `need_bytes` more would exceed what may be used. A need equal to the headroom fits.
    pub fn would_exceed_soft_budget(&self, need_bytes: u64) -> BudgetVerdict {
        let [budget, available, group] = self.rooms(self.probe.rss_bytes());
        if [budget, available, group].into_iter().flatten().any(|room| need_bytes > room) {
            BudgetVerdict::Exceeds
        } else if budget.is_some() && available.is_some() {
            BudgetVerdict::Fits
        } else {
            BudgetVerdict::Unknown
        }
    }

    fn rooms(&self, taken: Option<u64>) -> [Option<u64>; 3] {
        let budget = self.soft_budget_bytes().zip(taken).map(|(budget, taken)| budget.saturating_sub(taken));
        let group = self.probe.cgroup().map(|group| group.remaining_bytes);
        [budget, self.probe.available_bytes(), group]
    }
}

/// A need that does not fit what may be used, or what is there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("loading would take more than may be used now: {deficit}{}", hint(.remedy))]
pub struct MemoryRefusal {
    /// Need, room and parts.
    pub deficit: MemoryDeficit,
    /// What would make it fit, if something would.
    pub remedy: Option<String>,
}

fn hint(remedy: &Option<String>) -> String {
    remedy.as_ref().map_or(String::new(), |remedy| format!("; {remedy}"))
}

impl MemoryView<'_> {
    /// Refuses an estimate of which `held_bytes` are taken already and the rest exceeds the room there is. Only what the system cannot
    /// take back counts; mapped files that are larger than the room are a warning, because they would be read again and again. Figures
    /// that are unknown refuse nothing.
    ///
    /// # Errors
    /// The deficit against the room.
    pub fn admit(&self, estimate: &MemoryEstimate, held_bytes: u64) -> Result<(), MemoryDeficit> {
        let [budget, available, group] = self.rooms(self.probe.held_bytes());
        let Some(room) = [budget, available, group].into_iter().flatten().min() else { return Ok(()) };
        let mapped = estimate.mapped_bytes;
        let reread = available.into_iter().chain(group).min().is_some_and(|room| mapped > room);
        if reread {
            tracing::warn!(
                "{mapped} bytes of mapped weights are more than the {room} bytes free: they will be read again and again"
            );
        }
        estimate.fits_in(room.saturating_add(held_bytes))
    }
}

/// Peak to assume for a decoder compiled for one length bucket: as `RLX_DECODE_BUCKET_PEAK_BYTES` says, else the plan's, whose estimate
/// this is.
///
/// # Errors
/// A setting that does not parse.
pub fn llama_decode_bucket_compile_peak_bytes(plan: &MemoryEstimate) -> Result<u64, ConfigError> {
    Ok(Config::global()?.decode_bucket_peak_bytes.map_or(plan.peak_bytes(), |bytes| bytes.0))
}

/// Peak to assume for a decoder compiled for its full length: as `RLX_DECODE_ONESHOT_PEAK_BYTES` says, else the plan's, whose estimate
/// this is.
///
/// # Errors
/// A setting that does not parse.
pub fn llama_decode_oneshot_compile_peak_bytes(plan: &MemoryEstimate) -> Result<u64, ConfigError> {
    Ok(Config::global()?.decode_oneshot_peak_bytes.map_or(plan.peak_bytes(), |bytes| bytes.0))
}

fn system() -> Result<MemoryView<'static>, ConfigError> {
    Ok(MemoryView::new(&SystemProbe, Config::global()?))
}

/// Installed memory of this machine in bytes; `None` if unknown.
pub fn available_unified_memory() -> Option<u64> {
    SystemProbe.physical_bytes()
}

/// Bytes this process has in memory; `None` if unknown.
pub fn process_rss_bytes() -> Option<u64> {
    SystemProbe.rss_bytes()
}

/// [`MemoryView::soft_fraction`] of this machine. An error if a setting does not parse.
pub fn soft_memory_fraction() -> Result<f64, ConfigError> {
    Ok(system()?.soft_fraction())
}

/// [`MemoryView::soft_budget_bytes`] of this machine. An error if a setting does not parse.
pub fn soft_memory_budget_bytes() -> Result<Option<u64>, ConfigError> {
    Ok(system()?.soft_budget_bytes())
}

/// [`MemoryView::headroom_bytes`] of this machine. An error if a setting does not parse.
pub fn memory_headroom_bytes() -> Result<Option<u64>, ConfigError> {
    Ok(system()?.headroom_bytes())
}

/// [`MemoryView::would_exceed_soft_budget`] of this machine. An error if a setting does not parse.
pub fn would_exceed_soft_budget(need_bytes: u64) -> Result<BudgetVerdict, ConfigError> {
    Ok(system()?.would_exceed_soft_budget(need_bytes))
}

#[cfg(test)]
mod tests {
    use super::super::probe::{CgroupMemory, FixedProbe};
    use super::*;
    use crate::config::{ByteSize, Fraction};

    const FULL: FixedProbe = FixedProbe {
        physical_bytes: Some(1000),
        available_bytes: Some(600),
        cgroup: None,
        rss_bytes: Some(100),
        peak_rss_bytes: Some(100),
    };

    #[test]
    fn the_budget_is_set_or_a_share_of_the_smaller_total() {
        let mut config = Config::default();
        assert_eq!(MemoryView::new(&FULL, &config).soft_budget_bytes(), Some(800));
        let group = Some(CgroupMemory { limit_bytes: 500, remaining_bytes: 500 });
        let grouped = FixedProbe { cgroup: group, ..FULL };
        assert_eq!(MemoryView::new(&grouped, &config).soft_budget_bytes(), Some(400));
        config.soft_memory_fraction = Fraction::new(0.5);
        assert_eq!(MemoryView::new(&grouped, &config).soft_budget_bytes(), Some(250));
        config.soft_memory_budget_bytes = Some(ByteSize(77));
        assert_eq!(MemoryView::new(&grouped, &config).soft_budget_bytes(), Some(77));
        assert_eq!(MemoryView::new(&FixedProbe::default(), &Config::default()).soft_budget_bytes(), None);
    }

    #[test]
    fn headroom_is_the_least_of_its_parts() {
        let config = Config::default();
        let headroom = |probe: FixedProbe| MemoryView::new(&probe, &config).headroom_bytes();
        assert_eq!(headroom(FULL), Some(600));
        assert_eq!(headroom(FixedProbe { rss_bytes: Some(700), ..FULL }), Some(100));
        assert_eq!(headroom(FixedProbe { rss_bytes: Some(900), ..FULL }), Some(0));
        let cgroup = Some(CgroupMemory { limit_bytes: 10_000, remaining_bytes: 30 });
        assert_eq!(headroom(FixedProbe { cgroup, ..FULL }), Some(30));
        assert_eq!(headroom(FixedProbe { rss_bytes: None, ..FULL }), None);
        assert_eq!(headroom(FixedProbe { available_bytes: None, ..FULL }), None);
    }

    #[test]
    fn what_cannot_be_taken_back_decides_and_what_is_held_counts() {
        let config = Config::default();
        let view = MemoryView::new(&FULL, &config);
        let estimate = |activation_bytes, mapped_bytes| MemoryEstimate {
            activation_bytes,
            weight_bytes: mapped_bytes,
            mapped_bytes,
            ..MemoryEstimate::default()
        };
        assert_eq!(view.admit(&estimate(600, 0), 0), Ok(()));
        assert_eq!(view.admit(&estimate(600, 5000), 0), Ok(()), "mapped pages refuse nothing");
        let deficit = view.admit(&estimate(601, 0), 0).unwrap_err();
        assert_eq!((deficit.budget_bytes, deficit.peak_bytes, deficit.shortfall_bytes()), (600, 601, 1));
        assert_eq!(view.admit(&estimate(601, 0), 1), Ok(()), "one byte is held already");
        let cgroup = Some(CgroupMemory { limit_bytes: 300, remaining_bytes: 50 });
        let grouped = FixedProbe { cgroup, ..FULL };
        assert!(MemoryView::new(&grouped, &config).admit(&estimate(51, 0), 0).is_err());
        assert_eq!(MemoryView::new(&FixedProbe::default(), &config).admit(&estimate(1 << 50, 0), 0), Ok(()));
    }

    #[test]
    fn unknown_never_means_fits() {
        let config = Config::default();
        let verdict =
            |probe: FixedProbe, need| MemoryView::new(&probe, &config).would_exceed_soft_budget(need);
        assert_eq!(verdict(FULL, 600), BudgetVerdict::Fits);
        assert_eq!(verdict(FULL, 601), BudgetVerdict::Exceeds);
        let partial = FixedProbe { available_bytes: None, ..FULL };
        assert_eq!(verdict(partial, 700), BudgetVerdict::Unknown);
        assert_eq!(verdict(partial, 701), BudgetVerdict::Exceeds);
        assert_eq!(verdict(FixedProbe::default(), 0), BudgetVerdict::Unknown);
    }
}
