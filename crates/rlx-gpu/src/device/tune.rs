//! Schedules of products as they were timed on a device: once for each class, kept in the cache folder for later processes.
//!
//! An entry names the class, the kernels that were timed and what was fastest. What is there decides; nothing is timed twice. An entry
//! that cannot be read, or that was made of other kernels, counts as none, and is told of.

use super::DeviceTarget;
use super::driver::{Batch, Call, Driver, Limits, Read, Write};
use super::plan::Plan;
use crate::lower::Home;
use crate::lower::schedules::{Choice, Choices, Class};
use rlx::aot::AotCache;
use rlx::aot::container::Stamp;
use rlx::backend::BackendError;
use rlx::plan::Template;
use rlx_graph::Graph;
use rlx_tensor::DimBinding;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Rows of a product of many that is timed.
const MANY: usize = 64;
/// Numbers of rows up to which the form for few is tried.
const FEWS: [usize; 4] = [8, 4, 2, 1];
/// Runs that are timed, of which the shortest counts; one goes before them.
const RUNS: usize = 3;
/// Launches of a run.
const LAUNCHES: usize = 4;
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
        let ignored = match known.ignored {
            0 => String::new(),
            count => format!(", {count} entries of the cache not used"),
        };
        format!("schedules of {} products, {} timed now{ignored}", known.choices.len(), known.timed)
    }

    /// Choices for these classes, timed where they are not known.
    ///
    /// # Errors
    /// As the device says.
    pub fn choices<D: Driver>(
        &self,
        driver: &D,
        classes: &[Class],
    ) -> Result<HashMap<Class, Choice>, BackendError> {
        let mut known = self.known();
        let before = known.timed;
        for &class in classes {
            if known.checked.contains(&class) {
                continue;
            }
            let trials = Trials::of(driver, class)?;
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
            (parts.next().is_none() && choice.is_one_of(class.matrices)).then_some((class, kernels, choice))
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

/// A class's product under each choice that there is.
struct Trials {
    class: Class,
    template: Arc<Template>,
    /// Rows of the sizes that are timed, and the plan for each choice.
    plans: Vec<(Choice, Plan)>,
}

impl Trials {
    fn of<D: Driver>(driver: &D, class: Class) -> Result<Self, BackendError> {
        let wrong = |e: &dyn std::fmt::Display| super::driver::refused(&driver.name(), &class.to_string(), e);
        let graph: Graph = graph_of(class).parse().map_err(|e| wrong(&e))?;
        let template = Template::build(&graph, &DeviceTarget).map_err(|e| wrong(&e))?;
        let limits = driver.limits();
        let plan = |choice: Choice| {
            Ok((choice, Plan::of(&template, limits.binding_words, &only(class, choice, limits))?))
        };
        let plans: Result<Vec<_>, BackendError> = Choice::candidates(class.matrices).map(plan).collect();
        Ok(Trials { class, plans: plans?, template: Arc::new(template) })
    }

    /// A digest of all kernels that are compared.
    fn kernels(&self) -> String {
        let all = self.plans.iter().flat_map(|(_, plan)| &plan.kernels);
        let hashes: String = all.map(|kernel| kernel.hash()).collect();
        blake3::hash(hashes.as_bytes()).to_hex().as_str()[..16].to_owned()
    }

    /// The schedule that takes the least time for many rows, and up to how many rows the form for few takes less.
    fn fastest<D: Driver>(&self, driver: &D) -> Result<Choice, BackendError> {
        let mut best: Option<(Duration, &Choice, &Plan)> = None;
        for (choice, plan) in &self.plans {
            let time = self.time(driver, plan, MANY)?;
            if best.is_none_or(|(least, ..)| time < least) {
                best = Some((time, choice, plan));
            }
        }
        let Some((_, choice, plan)) = best else {
            return Ok(Choice::by_shape(
                &crate::lower::Amount::Known(1 << self.class.columns),
                self.class.matrices,
            ));
        };
        let never = self.without_few(driver, *choice)?;
        for few in FEWS {
            if self.time(driver, plan, few)? <= self.time(driver, &never, few)? {
                return Ok(Choice { few, ..*choice });
            }
        }
        Ok(Choice { few: 0, ..*choice })
    }

    fn without_few<D: Driver>(&self, driver: &D, choice: Choice) -> Result<Plan, BackendError> {
        let limits = driver.limits();
        let choices = only(self.class, Choice { few: 0, ..choice }, limits);
        Plan::of(&self.template, limits.binding_words, &choices)
    }

    /// The shortest time of some runs of so many rows.
    fn time<D: Driver>(&self, driver: &D, plan: &Plan, rows: usize) -> Result<Duration, BackendError> {
        let name = self.class.to_string();
        let wrong = |e: &dyn std::fmt::Display| super::driver::refused(&driver.name(), &name, e);
        let lir = self.template.specialize(&DimBinding::new().with("rows", rows)).map_err(|e| wrong(&e))?;
        let limits = driver.limits();
        let layout = plan.layout(&lir, usize::MAX)?;
        let schedule = plan.schedule(&self.template, &layout, limits, lir.capacities(), &[rows], &|_| 0)?;
        let arena = driver.allocate(&name, layout.words())?;
        let arguments = driver.allocate(&name, schedule.arguments.len())?;
        let mut bound = Vec::new();
        let mut kernels = Vec::new();
        for planned in &schedule.planned {
            let launch = &plan.launches[planned.launch];
            kernels.push(driver.compile(&launch.kernel)?);
            let mut own = Vec::new();
            for weight in &launch.weights {
                let words = match (&weight.home, weight.band) {
                    (Home::Buffer(id), None) => layout.elements(*id),
                    (_, band) => band.map_or(0, |band| band.words),
                };
                let buffer = driver.allocate(&name, words)?;
                driver.upload(&name, &buffer, 0, &vec![0; words])?;
                own.push(buffer);
            }
            bound.push(own);
        }
        let mut work = driver.work()?;
        let mut shortest = Duration::MAX;
        // What stands there afterwards is of no interest.
        let mut writes = Some(vec![
            Write { to: &arguments, at: 0, words: schedule.arguments.clone() },
            Write { to: &arena, at: 0, words: vec![0; layout.words()] },
        ]);
        for run in 0..=RUNS {
            let calls = schedule.planned.iter().zip(&kernels).zip(&bound);
            let calls = calls.map(|((planned, kernel), bound)| Call {
                kernel,
                arguments: planned.arguments,
                bound: bound.iter().collect(),
                grid: planned.grid,
            });
            let once: Vec<_> = calls.collect();
            let calls = (0..LAUNCHES).flat_map(|_| once.iter().map(Call::again)).collect();
            let batch = Batch {
                graph: &name,
                arena: &arena,
                further: &[],
                arguments: &arguments,
                pitch: schedule.pitch,
                writes: writes.take().unwrap_or_default(),
                calls,
                reads: vec![Read { from: &arena, at: 0, count: 1 }],
            };
            let begun = driver.now();
            let pending = driver.submit(&mut work, &batch)?;
            driver.read(&mut work, pending)?;
            let took = driver.now().saturating_sub(begun);
            if run > 0 {
                shortest = shortest.min(took);
            }
        }
        Ok(shortest)
    }
}

fn only(class: Class, choice: Choice, limits: Limits) -> Choices {
    Choices { classes: [(class, choice)].into(), without_dots: !limits.dots, ..Choices::default() }
}

/// A linear layer of a class's sizes.
fn graph_of(class: Class) -> String {
    let ([n, k], Class { matrices, dtype, .. }) = (class.dims(), class);
    let (second, both, gated) = match matrices {
        1 => (String::new(), "@w0", false),
        _ => (format!("\n  param @w1 : {dtype}[{n}, {k}]"), "@w0, @w1", true),
    };
    let result = 1 + matrices;
    format!(
        "graph \"a product\" {{
  input @x : f32[rows, {k}]
  param @w0 : {dtype}[{n}, {k}]{second}
  %{result} : f32[rows, {n}] = linear(@x, {both}) {{parts={matrices}, transposed=false, bias=false, activation=identity, gated={gated}, residual=false}}
  return \"y\": %{result}
}}"
    )
}
