//! A class of kernels under each choice that there is, timed on the device: a graph of one op, of sizes that stand for the class.

use super::DeviceTarget;
use super::driver::{Batch, Call, Driver, Limits, Read, Write};
use super::layout::Layout;
use super::plan::{Plan, Schedule};
use crate::lower::Home;
use crate::lower::classes::{AttentionClass, Class, ExpertsClass, ProductClass};
use crate::lower::schedules::{Choice, Choices};
use rlx::backend::BackendError;
use rlx::plan::Template;
use rlx_graph::Graph;
use rlx_tensor::DimBinding;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

/// Runs that are timed, of which the shortest counts; two of one launch go before them.
const RUNS: usize = 3;
/// Launches of a run.
const LAUNCHES: usize = 4;
/// A launch that takes as long is timed once: it is long enough for the clock, and all of them would take too long.
const SLOW: Duration = Duration::from_millis(10);
/// Keys that stand in a cache before many rows, and before few.
const BEFORE_MANY: usize = 192;
const BEFORE_FEW: usize = 952;
/// Blocks of the cache, as many as hold them all.
const BLOCKS: usize = 16;
/// Rows that are few to attention.
const FEW: usize = 8;

/// Kernels that were compiled, by their hashes.
type Compiled<D> = HashMap<String, Arc<<D as Driver>::Kernel>>;

/// A class's op under each choice that there is.
pub(super) struct Trials {
    class: Class,
    byte_units: Option<usize>,
    template: Arc<Template>,
    /// The plan for each choice whose kernels differ from those of the ones before.
    plans: Vec<(Choice, Plan)>,
}

impl Trials {
    pub fn of<D: Driver>(driver: &D, class: Class, base: &Choices) -> Result<Self, BackendError> {
        let wrong = |e: &dyn std::fmt::Display| super::driver::refused(&driver.name(), &class.to_string(), e);
        let text = match class {
            Class::Product(class) => a_product(class),
            Class::Attention(class) => an_attention(class),
            Class::Experts(class) => a_mixture(class),
        };
        let graph: Graph = text.parse().map_err(|e| wrong(&e))?;
        let template = Template::build(&graph, &DeviceTarget).map_err(|e| wrong(&e))?;
        let (template, byte_units) = (Arc::new(template), base.byte_units);
        let mut trials = Trials { class, byte_units, plans: Vec::new(), template };
        let mut seen = Vec::new();
        for choice in class.candidates() {
            let plan = trials.plan(driver, choice)?;
            let launched: Vec<_> =
                plan.launches.iter().map(|l| (l.kernel.hash(), l.programs.clone())).collect();
            if !seen.contains(&launched) {
                seen.push(launched);
                trials.plans.push((choice, plan));
            }
        }
        Ok(trials)
    }

    fn plan<D: Driver>(&self, driver: &D, choice: Choice) -> Result<Plan, BackendError> {
        let Limits { binding_words, dots, .. } = driver.limits();
        let operands = match self.class {
            Class::Product(ProductClass { by, .. }) | Class::Experts(ExpertsClass { by, .. }) => {
                by.operands()
            }
            Class::Attention(_) => Default::default(),
        };
        let classes = [(self.class, choice)].into();
        let byte_units = self.byte_units;
        let choices =
            Choices { classes, operands, without_dots: !dots, compact: false, byte_units, library: None };
        Plan::of(&self.template, binding_words, &choices)
    }

    /// A digest of all kernels that are compared.
    pub fn kernels(&self) -> String {
        let all = self.plans.iter().flat_map(|(_, plan)| &plan.kernels);
        let hashes: String = all.map(|kernel| kernel.hash()).collect();
        blake3::hash(hashes.as_bytes()).to_hex().as_str()[..16].to_owned()
    }

    /// The schedule that takes the least time for many rows, and up to how many rows the form for few takes less.
    pub fn fastest<D: Driver>(&self, driver: &D) -> Result<Choice, BackendError> {
        let [(first, plan), rest @ ..] = self.plans.as_slice() else {
            return Err(super::driver::refused(
                &driver.name(),
                &self.class.to_string(),
                "nothing to choose from",
            ));
        };
        let (mut best, mut compiled) = ((*first, plan), HashMap::new());
        if !rest.is_empty() {
            let mut least = self.of_rows(driver, &mut compiled, plan)?;
            for (choice, plan) in rest {
                let time = self.of_rows(driver, &mut compiled, plan)?;
                if time < least {
                    (least, best) = (time, (*choice, plan));
                }
            }
        }
        let (choice, plan) = best;
        if self.class.fews().is_empty() {
            return Ok(choice);
        }
        let never = self.plan(driver, Choice { few: 0, ..choice })?;
        for &few in self.class.fews() {
            let own = self.time((driver, &mut compiled), plan, few)?;
            if own <= self.time((driver, &mut compiled), &never, few)? {
                return Ok(Choice { few, ..choice });
            }
        }
        Ok(Choice { few: 0, ..choice })
    }

    /// Nanoseconds of a row, added up over the numbers of rows that are compared.
    fn of_rows<D: Driver>(
        &self,
        driver: &D,
        compiled: &mut Compiled<D>,
        plan: &Plan,
    ) -> Result<f64, BackendError> {
        self.class.rows().iter().try_fold(0.0, |sum, &rows| {
            Ok(sum + self.time((driver, compiled), plan, rows)?.as_nanos() as f64 / rows as f64)
        })
    }

    /// The shortest time of some runs of so many rows.
    fn time<D: Driver>(
        &self,
        (driver, compiled): (&D, &mut Compiled<D>),
        plan: &Plan,
        rows: usize,
    ) -> Result<Duration, BackendError> {
        let name = self.class.to_string();
        let wrong = |e: &dyn std::fmt::Display| super::driver::refused(&driver.name(), &name, e);
        let lir = self.template.specialize(&DimBinding::new().with("rows", rows)).map_err(|e| wrong(&e))?;
        let layout = plan.layout(&lir, usize::MAX)?;
        let words = |buffer| layout.elements(buffer);
        let schedule =
            plan.schedule(&self.template, &layout, driver.limits(), lir.capacities(), &[rows], &words)?;
        let arena = driver.allocate(&name, layout.words())?;
        let arguments = driver.allocate(&name, schedule.arguments.len())?;
        let mut kernels = Vec::with_capacity(schedule.planned.len());
        for planned in &schedule.planned {
            let kernel = &plan.launches[planned.launch].kernel;
            kernels.push(shared(compiled, kernel.hash(), || Ok(Arc::new(driver.compile(kernel)?)))?);
        }
        let bound = bound(driver, &name, plan, &schedule, &layout)?;
        let mut work = driver.work()?;
        let mut shortest = Duration::MAX;
        let mut writes = vec![
            Write { to: &arguments, at: 0, words: schedule.arguments.clone() },
            Write { to: &arena, at: 0, words: vec![0; layout.words()] },
        ];
        for input in self.template.inputs() {
            if let Some(words) = self.class.content(&input.name, rows) {
                writes.push(Write { to: &arena, at: layout.offset(input.place.buffer), words });
            }
        }
        // What stands there afterwards is of no interest.
        let mut writes = Some(writes);
        for run in 0..=RUNS + 1 {
            let calls = schedule.planned.iter().zip(&kernels).zip(&bound);
            let calls = calls.map(|((planned, kernel), bound)| Call {
                kernel: &**kernel,
                arguments: planned.arguments,
                bound: bound.iter().map(|buffer| &**buffer).collect(),
                grid: planned.grid,
            });
            let once: Vec<_> = calls.collect();
            let launches = if run < 2 { 1 } else { LAUNCHES };
            let calls = (0..launches).flat_map(|_| once.iter().map(Call::again)).collect();
            let batch = Batch {
                graph: &name,
                arena: &arena,
                further: &[],
                arguments: &arguments,
                table: &schedule.arguments,
                pitch: schedule.pitch,
                writes: writes.take().unwrap_or_default(),
                calls,
                reads: vec![Read { from: &arena, at: 0, count: 1 }],
            };
            let begun = driver.now();
            let pending = driver.submit(&mut work, &batch)?;
            driver.read(&mut work, pending)?;
            let took = driver.now().saturating_sub(begun);
            match run {
                0 => {}
                1 if took >= SLOW => return Ok(took),
                1 => {}
                _ => shortest = shortest.min(took / LAUNCHES as u32),
            }
        }
        Ok(shortest)
    }
}

/// Weights and states of each launch, of zeros; those that launches share are there once.
fn bound<D: Driver>(
    driver: &D,
    name: &str,
    plan: &Plan,
    schedule: &Schedule,
    layout: &Layout,
) -> Result<Vec<Vec<Arc<D::Buffer>>>, BackendError> {
    let zeros = |words: usize| {
        let buffer = driver.allocate(name, words)?;
        driver.upload(name, &buffer, 0, &vec![0; words])?;
        Ok::<_, BackendError>(Arc::new(buffer))
    };
    let (mut weights, mut states) = (HashMap::new(), HashMap::new());
    let mut all = Vec::with_capacity(schedule.planned.len());
    for planned in &schedule.planned {
        let launch = &plan.launches[planned.launch];
        let mut own = Vec::new();
        for weight in &launch.weights {
            let words = match (&weight.home, weight.band) {
                (Home::Buffer(id), None) => layout.elements(*id),
                (_, band) => band.map_or(0, |band| band.words),
            };
            own.push(shared(&mut weights, weight.clone(), || zeros(words))?);
        }
        for &state in &launch.states {
            own.push(shared(&mut states, state, || zeros(layout.elements(state)))?);
        }
        all.push(own);
    }
    Ok(all)
}

/// What is kept under a key, made where it is not there.
fn shared<K: Eq + std::hash::Hash, V>(
    kept: &mut HashMap<K, Arc<V>>,
    key: K,
    make: impl FnOnce() -> Result<Arc<V>, BackendError>,
) -> Result<Arc<V>, BackendError> {
    Ok(match kept.entry(key) {
        Entry::Occupied(known) => Arc::clone(known.get()),
        Entry::Vacant(place) => Arc::clone(place.insert(make()?)),
    })
}

impl Class {
    /// Words of an input that are not all zero.
    fn content(self, name: &str, rows: usize) -> Option<Vec<u32>> {
        match (self, name) {
            (_, "starts") => Some(vec![0, rows as u32]),
            (_, "past") => Some(vec![if rows <= FEW { BEFORE_FEW } else { BEFORE_MANY } as u32]),
            (_, "table") => Some((0..BLOCKS as u32).collect()),
            // Rows go to experts of all numbers.
            (Class::Experts(class), "l") => {
                let count = rows * class.dims()[2];
                let number = |i: usize| (i as u32).wrapping_mul(2_654_435_761) >> 8;
                Some((0..count).map(|i| (number(i) as f32 / (1 << 24) as f32).to_bits()).collect())
            }
            _ => None,
        }
    }

    /// What was chosen, in words.
    pub fn told(self, choice: Choice) -> String {
        let few = match (self.fews().is_empty(), choice.few) {
            (true, _) => String::new(),
            (false, 0) => ", never by the form for few rows".to_owned(),
            (false, few) => format!(", by the form for few up to {few} rows"),
        };
        format!("{self}: {}{few}", self.schedule_told(choice.schedule))
    }
}

/// A linear layer.
fn a_product(class: ProductClass) -> String {
    let ([n, k], ProductClass { matrices, dtype, .. }) = (class.dims(), class);
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

/// The attention of one sequence.
fn an_attention(class: AttentionClass) -> String {
    let AttentionClass { cache, group, head_dim, kv_heads } = class;
    let kv_heads = 1usize << kv_heads;
    let heads = kv_heads * group;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let (states, inputs, operands, result) = match cache {
        None => (String::new(), String::new(), "", 4),
        Some(dtype) => (
            format!(
                "
  state @kc : {dtype}[{BLOCKS}, {kv_heads}, {head_dim}, 64]
  state @vc : {dtype}[{BLOCKS}, {kv_heads}, 64, {head_dim}]"
            ),
            format!("\n  input @past : i32[1]\n  input @table : i32[1, {BLOCKS}]"),
            ", @past, @table, @kc, @vc",
            8,
        ),
    };
    let cached = cache.is_some();
    format!(
        "graph \"an attention\" {{{states}
  input @q : f32[rows, {q}]
  input @k : f32[rows, {kv}]
  input @v : f32[rows, {kv}]
  input @starts : i32[2]{inputs}
  %{result} : f32[rows, {q}] = attention(@q, @k, @v, @starts{operands}) {{heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}, scale=0.3, causal={cached}, window=none, softcap=none, mask=false, cache={cached}}}
  return \"y\": %{result}
}}"
    )
}

/// A mixture of experts.
fn a_mixture(class: ExpertsClass) -> String {
    let ([inner, width, experts], ExpertsClass { dtype, top_k, .. }) = (class.dims(), class);
    let (mut params, mut names) = (String::new(), String::new());
    for expert in 0..experts {
        for (name, [n, k]) in [("g", [inner, width]), ("u", [inner, width]), ("d", [width, inner])] {
            // Writing to a string does not fail.
            let _ = write!(params, "\n  param @{name}{expert} : {dtype}[{n}, {k}]");
            let _ = write!(names, ", @{name}{expert}");
        }
    }
    let result = 2 + 3 * experts;
    format!(
        "graph \"a mixture\" {{
  input @x : f32[rows, {width}]
  input @l : f32[rows, {experts}]{params}
  %{result} : f32[rows, {width}] = moe(@x, @l{names}) {{experts={experts}, top_k={top_k}, renormalize=true, activation=silu}}
  return \"y\": %{result}
}}"
    )
}
