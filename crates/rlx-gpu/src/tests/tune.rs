//! Schedules that are timed, on a device whose clock says what a test wants.

use super::flash::{self, HEADS};
use super::grouped;
use super::products::{self, LAYERS, numbers, results};
use super::units;
use crate::device::DeviceBackend;
use crate::device::driver::{Batch, Driver, Limits, Read, Write};
use crate::device::tune::Tuner;
use crate::emulate::{Emulator, emulated_in};
use crate::emulated;
use crate::ir::Kernel;
use crate::lower::LowerCx;
use crate::lower::classes::{AttentionClass, By, Class, ExpertsClass, ProductClass};
use crate::lower::operands::Operands;
use crate::lower::schedules::{Choice, Choices};
use rlx::Session;
use rlx::aot::AotCache;
use rlx::backend::cpu::Precision;
use rlx::backend::{Backend, BackendError};
use rlx::config::Config;
use rlx::plan::Template;
use rlx_graph::Graph;
use rlx_tensor::{DType, Tensor};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The interpreter, where a launch takes as long as `cost` says. What is only timed is not computed.
struct Timed {
    cost: fn(&Kernel) -> u64,
    passed: Arc<AtomicU64>,
    timed: Arc<AtomicU64>,
    compact: bool,
    dots: bool,
    fingerprint: &'static str,
}

impl Timed {
    fn new(cost: fn(&Kernel) -> u64) -> Self {
        let (passed, timed) = (Arc::default(), Arc::default());
        Timed { cost, passed, timed, compact: false, dots: true, fingerprint: "a card, driver 1" }
    }
}

impl Driver for Timed {
    type Buffer = <Emulator as Driver>::Buffer;
    type Kernel = Kernel;
    type Work = ();
    type Pending = Vec<u32>;

    fn name(&self) -> String {
        "timed gpu".to_owned()
    }

    fn capabilities(&self) -> Vec<String> {
        Vec::new()
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.to_owned()
    }

    fn limits(&self) -> Limits {
        Limits { compact: self.compact, dots: self.dots, ..Emulator::default().limits() }
    }

    fn now(&self) -> Duration {
        Duration::from_nanos(self.passed.load(Ordering::Relaxed))
    }

    fn allocate(&self, what: &str, words: usize) -> Result<Self::Buffer, BackendError> {
        Emulator::default().allocate(what, words)
    }

    fn upload(&self, what: &str, to: &Self::Buffer, at: usize, words: &[u32]) -> Result<(), BackendError> {
        Emulator::default().upload(what, to, at, words)
    }

    fn download(
        &self,
        what: &str,
        from: &Self::Buffer,
        at: usize,
        count: usize,
    ) -> Result<Vec<u32>, BackendError> {
        Emulator::default().download(what, from, at, count)
    }

    fn compile(&self, kernel: &Kernel) -> Result<Kernel, BackendError> {
        Ok(kernel.clone())
    }

    fn work(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn submit(&self, work: &mut (), batch: &Batch<'_, Self>) -> Result<Vec<u32>, BackendError> {
        let cost = batch.calls.iter().map(|call| (self.cost)(call.kernel)).sum();
        self.passed.fetch_add(cost, Ordering::Relaxed);
        if batch.graph.parse::<Class>().is_ok() {
            self.timed.fetch_add(1, Ordering::Relaxed);
            return Ok(vec![0; batch.words_read()]);
        }
        let batch = Batch::<'_, Emulator> {
            graph: batch.graph,
            arena: batch.arena,
            further: batch.further,
            arguments: batch.arguments,
            table: batch.table,
            pitch: batch.pitch,
            writes: batch
                .writes
                .iter()
                .map(|w| Write { to: w.to, at: w.at, words: w.words.clone() })
                .collect(),
            calls: batch
                .calls
                .iter()
                .map(|c| crate::device::driver::Call {
                    kernel: c.kernel,
                    arguments: c.arguments,
                    bound: c.bound.clone(),
                    grid: c.grid,
                })
                .collect(),
            reads: batch.reads.iter().map(|r| Read { from: r.from, at: r.at, count: r.count }).collect(),
        };
        Emulator::default().submit(work, &batch)
    }

    fn read(&self, _work: &mut (), pending: Vec<u32>) -> Result<Vec<u32>, BackendError> {
        Ok(pending)
    }
}

fn store(folder: &Path) -> Option<AotCache> {
    let mut config = Config::default();
    config.cache_dir = Some(folder.to_owned());
    AotCache::from_config(&config)
}

/// The first tile grows with the rows and the depth of a program.
fn by_tile(kernel: &Kernel) -> u64 {
    kernel.tiles.first().map_or(1, |tile| u64::from(tile.words))
}

/// The other way round, and forms for few rows are slowest.
fn by_tile_reversed(kernel: &Kernel) -> u64 {
    if kernel.name.contains("few") || kernel.name.contains("unit") {
        1 << 20
    } else {
        (1 << 16) - by_tile(kernel)
    }
}

const CLASS: Class =
    Class::Product(ProductClass { matrices: 1, dtype: DType::F32, by: By::Floats, columns: 7, depth: 9 });

/// A class of each family, and products by matrix units.
const CLASSES: [Class; 5] = [
    CLASS,
    Class::Product(ProductClass { matrices: 2, dtype: DType::BF16, by: By::Units, columns: 8, depth: 8 }),
    Class::Attention(AttentionClass { cache: Some(DType::F16), group: 2, head_dim: 12, kv_heads: 1 }),
    Class::Attention(AttentionClass { cache: None, group: 1, head_dim: 8, kv_heads: 1 }),
    Class::Experts(ExpertsClass {
        dtype: DType::Q8_0,
        by: By::Floats,
        inner: 6,
        width: 6,
        experts: 2,
        top_k: 2,
    }),
];

#[test]
fn the_fastest_schedule_is_taken_and_kept() {
    for class in CLASSES {
        let folder = tempfile::tempdir().unwrap();
        let choose = |driver: &Timed| {
            let tuner = Tuner::open(store(folder.path()), driver.fingerprint());
            let choices = tuner.choices(driver, &[class], &Choices::default()).unwrap();
            assert!(tuner.table()[0].starts_with(&format!("{class}: ")), "{:?}", tuner.table());
            (choices[&class], tuner.told())
        };
        let first = Timed::new(by_tile);
        let (choice, told) = choose(&first);
        assert!(first.timed.load(Ordering::Relaxed) > 0 && told.contains("1 timed now"), "{told}");
        // A device on which all else is faster takes what was found, and times nothing.
        let other = Timed::new(by_tile_reversed);
        let (again, told) = choose(&other);
        assert_eq!((again, other.timed.load(Ordering::Relaxed)), (choice, 0));
        assert!(told.contains(&format!("{} x1, 0 timed now", class.family())), "{told}");
        // Another driver is another device.
        let newer = Timed { fingerprint: "a card, driver 2", ..Timed::new(by_tile_reversed) };
        let (reversed, told) = choose(&newer);
        assert!(reversed != choice && reversed.few == 0, "{class}: {reversed:?} {choice:?}");
        assert!(told.contains("1 timed now"), "{told}");
    }
}

#[test]
fn entries_that_are_broken_or_of_other_kernels_are_told_of_and_not_used() {
    let told = |text: &str| {
        let folder = tempfile::tempdir().unwrap();
        let driver = Timed::new(by_tile);
        let sound = Tuner::open(store(folder.path()), driver.fingerprint());
        sound.choices(&driver, &[CLASS], &Choices::default()).unwrap();
        sound.put(text.as_bytes());
        let tuner = Tuner::open(store(folder.path()), driver.fingerprint());
        let choice = tuner.choices(&driver, &[CLASS], &Choices::default()).unwrap()[&CLASS];
        assert_eq!(
            Some(choice),
            sound.choices(&driver, &[CLASS], &Choices::default()).unwrap().get(&CLASS).copied()
        );
        tuner.told()
    };
    let entry = |rest: &str| format!("{CLASS}\t0123456789abcdef\t{rest}");
    for broken in [
        entry("0\t8\n"),
        entry("77\t8\n"),
        entry("0\n"),
        "nothing of the kind\n".to_owned(),
        "\u{0}".to_owned(),
    ] {
        let told = told(&broken);
        assert!(told.contains("1 timed now, 1 entries of the cache not used"), "{broken:?}: {told}");
    }
}

/// Whatever is chosen, results have the bits that they have without a choice.
#[test]
fn every_choice_gives_the_same_bits() {
    let layer = &LAYERS[0];
    let (graph, params): (Graph, _) = (layer.graph(), layer.params());
    let inputs = [1, 2, 9].map(|rows: usize| {
        let tensor = |columns: usize, seed| {
            Tensor::from_slice(&[rows, columns], &numbers(rows * columns, seed)).unwrap()
        };
        vec![("x", tensor(layer.k, 1)), ("r", tensor(layer.n, 2))]
    });
    let expected = results(&emulated(), &graph, &params, &inputs);
    let costs: [fn(&Kernel) -> u64; 2] = [by_tile, by_tile_reversed];
    for cost in costs {
        let driver = Timed::new(cost);
        let timed = Arc::clone(&driver.timed);
        let tuner = Tuner::open(None, driver.fingerprint());
        let backend: Arc<dyn Backend> =
            Arc::new(DeviceBackend::set_up(driver, Some(tuner), Precision::F32).unwrap());
        assert_eq!(results(&backend, &graph, &params, &inputs), expected);
        assert!(timed.load(Ordering::Relaxed) > 0);
        assert!(backend.capabilities().concat().contains("1 timed now"), "{:?}", backend.capabilities());
    }
}

/// A device on which kernels run so, whatever is fast.
fn forced(graph: &Graph, precision: Precision, at: usize, few: usize) -> Arc<dyn Backend> {
    let units = precision == Precision::Bf16;
    let operands = if units { Operands::Units { wave: 1 } } else { Operands::Floats };
    let choice = |class: Class| {
        let candidates = class.candidates();
        let Choice { schedule, few: most } = candidates[at % candidates.len()];
        (class, Choice { schedule, few: few.min(most) })
    };
    let choices = classes_of(graph, operands).into_iter().map(choice).collect();
    let tuner = Tuner::knowing(choices);
    Arc::new(
        DeviceBackend::set_up(Emulator { units, ..Emulator::default() }, Some(tuner), precision).unwrap(),
    )
}

fn classes_of(graph: &Graph, operands: Operands) -> Vec<Class> {
    let template = template_of(graph);
    let mut cx = LowerCx::new(&template);
    cx.choices.operands = operands;
    template.steps().iter().enumerate().for_each(|(at, step)| cx.lower(at, step).unwrap());
    assert!(!cx.classes.is_empty());
    cx.classes
}

fn template_of(graph: &Graph) -> Template {
    let (legal, _) = rlx_graph::passes::compile_passes(graph, &super::Runs, &Default::default()).unwrap();
    Template::build(&legal, &super::Runs).unwrap()
}

/// Every schedule of a class of products by matrix units, of experts and of attention gives the bits that it has without a choice.
#[test]
fn every_schedule_of_every_family_gives_the_same_bits() {
    let wide = units::WIDE.graph();
    let rows = |counts: &[usize]| {
        let named = |&rows: &usize| {
            let of = |name, columns: usize, seed| {
                (name, Tensor::from_slice(&[rows, columns], &numbers(rows * columns, seed)).unwrap())
            };
            vec![of("x", units::WIDE.k, 1), of("r", units::WIDE.n, 2)]
        };
        counts.iter().map(named).collect::<Vec<_>>()
    };
    let inputs = rows(&[130, 5, 1]);
    let bits = |backend| results(&backend, &wide, &units::WIDE.params(), &inputs);
    let expected = bits(emulated_in(Precision::Bf16, true));
    for (at, few) in [(3, 4), (0, 0)] {
        assert_eq!(bits(forced(&wide, Precision::Bf16, at, few)), expected, "{at} {few}");
    }
    for (mixture, graph) in grouped::graphs().into_iter().enumerate().skip(1).take(1) {
        let expected = grouped::bits(mixture, &emulated());
        for (at, few) in [(1, 0), (2, 1)] {
            let found = grouped::bits(mixture, &forced(&graph, Precision::F32, at, few));
            assert_eq!(found, expected, "mixture {mixture}, {at} {few}");
        }
    }
    let heads = &HEADS[1];
    let expected = flash::bits(heads, &emulated());
    for (at, few) in [(1, 1), (2, 0)] {
        let backend = forced(&heads.graph(), Precision::F32, at, few);
        assert_eq!(flash::bits(heads, &backend), expected, "attention, {at} {few}");
    }
}

/// A device that wants kernels of little text has the bits of the others.
#[test]
fn compact_kernels_give_the_same_bits() {
    let driver = Timed { compact: true, ..Timed::new(by_tile) };
    let backend: Arc<dyn Backend> = Arc::new(DeviceBackend::open(driver).unwrap());
    [&LAYERS[3], &LAYERS[4]].into_iter().for_each(|layer| products::check(layer, &backend));
    flash::check(&HEADS[0], &backend);
    let layer = &LAYERS[4];
    let named = [("x", layer.k, 1), ("r", layer.n, 2)].map(|(name, columns, seed)| {
        (name, Tensor::from_slice(&[3, columns], &numbers(3 * columns, seed)).unwrap())
    });
    let run = |backend| results(backend, &layer.graph(), &layer.params(), &[named.to_vec()]);
    assert_eq!(run(&backend), run(&emulated()));
}

/// A device that has no product of bytes multiplies packed weights as floats, and its kernels' names say so.
#[test]
fn a_device_without_products_of_bytes_multiplies_floats() {
    for dots in [true, false] {
        let driver = Timed { dots, ..Timed::new(by_tile) };
        let backend: Arc<dyn Backend> = Arc::new(DeviceBackend::open(driver).unwrap());
        let layer = &LAYERS[9];
        [9, 12, 13, 14].into_iter().for_each(|at| products::check_as(&LAYERS[at], &backend, dots));
        let compiled = Session::with_backend(Arc::clone(&backend)).compile(&layer.graph()).unwrap();
        layer.params().iter().for_each(|(name, value)| compiled.set_param(name, value).unwrap());
        let kernels: String =
            compiled.program().unwrap().kernels().iter().map(|k| k.kernel.clone()).collect();
        assert_eq!(kernels.contains("_q8"), dots, "{kernels}");
        assert_eq!(kernels.contains("quantise_rows"), dots, "{kernels}");
    }
}

/// For those who go over every kernel: a layer of each storage, attention and experts under every choice.
pub(super) fn kernels() -> Vec<Arc<Kernel>> {
    let mut kernels = Vec::new();
    let layers = [&LAYERS[0], &LAYERS[6], &LAYERS[9]].map(products::Layer::graph);
    let others = [flash::HEADS[1].graph(), grouped::graphs().swap_remove(1)];
    for graph in layers.iter().chain(&others) {
        let (known, template) = (classes_of(graph, Operands::Floats), template_of(graph));
        for choice in known[0].candidates() {
            let classes = known.iter().map(|&class| (class, choice)).collect();
            let mut cx = LowerCx::new(&template);
            cx.choices = Choices { classes, ..Choices::default() };
            template.steps().iter().enumerate().for_each(|(at, step)| cx.lower(at, step).unwrap());
            kernels.extend(cx.kernels());
        }
    }
    let floats = [9, 12, 13, 14].map(|at| (&LAYERS[at], false));
    for (layer, compact) in [(&LAYERS[7], true), (&LAYERS[9], true)].into_iter().chain(floats) {
        let (legal, _) =
            rlx_graph::passes::compile_passes(&layer.graph(), &super::Runs, &Default::default()).unwrap();
        let template = rlx::plan::Template::build(&legal, &super::Runs).unwrap();
        let mut cx = LowerCx::new(&template);
        (cx.choices.compact, cx.choices.without_dots) = (compact, !compact);
        template.steps().iter().enumerate().for_each(|(at, step)| cx.lower(at, step).unwrap());
        kernels.extend(cx.kernels());
    }
    let template = rlx::plan::Template::build(&HEADS[0].graph(), &super::Runs).unwrap();
    let mut cx = LowerCx::new(&template);
    cx.choices.compact = true;
    template.steps().iter().enumerate().for_each(|(at, step)| cx.lower(at, step).unwrap());
    kernels.extend(cx.kernels());
    kernels
}
