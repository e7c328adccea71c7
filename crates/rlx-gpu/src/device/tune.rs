//! Schedules as they were timed on a device: once for each class, kept in the cache folder for later processes.
//!
//! An entry names the class, the kernels that were timed and what was fastest. What is there decides; nothing is timed twice. An entry
//! that cannot be read, or that was made of other kernels, counts as none, and is told of.

use super::driver::Driver;
use super::trial::Trials;
use crate::lower::classes::Class;
use crate::lower::schedules::{Choice, Choices};
use rlx::aot::AotCache;
use rlx::aot::container::Stamp;
use rlx::backend::BackendError;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// One entry holds all classes of a device.
const KEY: &[u8] = b"schedules";

/// What is known of a device's schedules.
pub(crate) struct Tuner {
    store: Option<(AotCache, Stamp)>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    choices: HashMap<Class, Choice>,
    /// The kernels behind each choice.
    kernels: BTreeMap<Class, String>,
    /// Classes whose kernels were held to the entry.
    checked: BTreeSet<Class>,
    timed: usize,
    /// What it took to time them.
    took: Duration,
    ignored: usize,
}

impl Tuner {
    /// What the cache folder has of a device that says so of itself.
    #[cfg(any(feature = "wgpu", feature = "cuda", test))]
    pub fn open(store: Option<AotCache>, fingerprint: String) -> Self {
        let stamp = Stamp {
            kind: "kernel".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            device: fingerprint,
            isa: "schedules".to_owned(),
            precision: String::new(),
            packing: [0; 32],
        };
        let bytes = store.as_ref().and_then(|store| store.kernel(&stamp, KEY));
        let known = bytes.map(|bytes| Known::parse(&bytes)).unwrap_or_default();
        Self { store: store.map(|store| (store, stamp)), known: Mutex::new(known) }
    }

    /// A tuner that knows these choices.
    #[cfg(test)]
    pub fn knowing(choices: HashMap<Class, Choice>) -> Self {
        let checked = choices.keys().copied().collect();
        Self { store: None, known: Mutex::new(Known { choices, checked, ..Known::default() }) }
    }

    /// A tuner for a device, if the settings ask for one.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub fn of<D: Driver>(config: &rlx::config::Config, driver: &D) -> Option<Self> {
        let wanted = config.gpu_tune.is_some_and(|switch| switch.0);
        wanted.then(|| Self::open(AotCache::from_config(config), driver.fingerprint()))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many classes are known, and what was not used, for reports.
    pub fn told(&self) -> String {
        let known = self.known();
        let mut families: BTreeMap<&str, usize> = BTreeMap::new();
        known.choices.keys().for_each(|class| *families.entry(class.family()).or_default() += 1);
        let families: Vec<String> = families.iter().map(|(name, count)| format!("{name} x{count}")).collect();
        let families = if families.is_empty() { "none".to_owned() } else { families.join(", ") };
        let took = match known.timed {
            0 => String::new(),
            _ => format!(", which took {:.1} s", known.took.as_secs_f64()),
        };
        let ignored = match known.ignored {
            0 => String::new(),
            count => format!(", {count} entries of the cache not used"),
        };
        format!("schedules: {families}, {} timed now{ignored}{took}", known.timed)
    }

    /// What was chosen for each class, a line each.
    pub fn table(&self) -> Vec<String> {
        let known = self.known();
        let line = |class: &Class| Some(class.told(*known.choices.get(class)?));
        known.kernels.keys().filter_map(line).collect()
    }

    /// Choices for these classes, timed where they are not known, all else being as in `base`.
    ///
    /// # Errors
    /// As the device says.
    pub fn choices<D: Driver>(
        &self,
        driver: &D,
        classes: &[Class],
        base: &Choices,
    ) -> Result<HashMap<Class, Choice>, BackendError> {
        let mut known = self.known();
        let (before, begun) = (known.timed, driver.now());
        for &class in classes {
            if known.checked.contains(&class) {
                continue;
            }
            let trials = Trials::of(driver, class, base)?;
            let kernels = trials.kernels();
            if known.kernels.get(&class) != Some(&kernels) {
                let choice = trials.fastest(driver)?;
                known.choices.insert(class, choice);
                known.ignored += usize::from(known.kernels.insert(class, kernels).is_some());
                known.timed += 1;
            }
            known.checked.insert(class);
        }
        if known.timed > before {
            known.took += driver.now().saturating_sub(begun);
            self.put(known.text().as_bytes());
        }
        Ok(known.choices.clone())
    }

    /// Writes what the next process finds.
    pub fn put(&self, text: &[u8]) {
        if let Some((store, stamp)) = &self.store {
            store.store_kernel(stamp, KEY, text);
        }
    }
}

impl Known {
    /// A line for each class: the class, its kernels, the schedule and the rows of the form for few.
    fn text(&self) -> String {
        let line = |(class, kernels): (&Class, &String)| {
            let Choice { schedule, few } = self.choices.get(class)?;
            Some(format!("{class}\t{kernels}\t{schedule}\t{few}\n"))
        };
        self.kernels.iter().filter_map(line).collect()
    }

    #[cfg(any(feature = "wgpu", feature = "cuda", test))]
    fn parse(bytes: &[u8]) -> Self {
        let mut known = Known::default();
        let entry = |line: &str| {
            let mut parts = line.split('\t');
            let class: Class = parts.next()?.parse().ok()?;
            let kernels = parts.next()?.to_owned();
            let (schedule, few) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            let choice = Choice { schedule, few };
            (parts.next().is_none() && class.takes(choice)).then_some((class, kernels, choice))
        };
        let Ok(text) = std::str::from_utf8(bytes) else {
            return Known { ignored: 1, ..known };
        };
        for line in text.lines() {
            match entry(line) {
                Some((class, kernels, choice)) => {
                    known.choices.insert(class, choice);
                    known.kernels.insert(class, kernels);
                }
                None => known.ignored += 1,
            }
        }
        known
    }
}
