//! Low-rank adapters of a model: loaded, replaced and removed while it serves, and chosen request by request.
//!
//! An adapter in use is a value of its own: a request holds the generation that it started with, whatever is replaced meanwhile.

use crate::error::{ModelError, Result};
use crate::runtime::{Executables, with_weights};
use rlx::SessionError;
use rlx::import::hf::PeftAdapter;
use rlx::pipeline::ModelCompilePipeline;
use rlx::weights::{LoraSide, WeightHandle, WeightKind, WeightRegistry};
use rlx_graph::Graph;
use rlx_graph::adapters::{AdapterLayout, AdapterSite};
use rlx_graph::eval::to_f64;
use rlx_graph::passes::PassOptions;
use rlx_kernels::isa::half::f32_to_bf16;
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Adapters that one run can serve at once.
pub const ADAPTER_SLOTS: usize = 8;

/// Generation number of an adapter: higher for each that is added or replaced.
pub type Generation = u64;

/// One generation of an adapter, in the form that runs read.
#[derive(Debug)]
pub struct Adapter {
    name: String,
    generation: Generation,
    rank: usize,
    width: usize,
    factors: AlignedBytes,
    bytes: usize,
    scales: Vec<f32>,
}

impl Adapter {
    /// The name it was added under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which of the adapters of this name.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Inner dim of the factors.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Bytes of the factors. Columns of weights that it leaves alone are never touched, so they take no memory and do not count.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn dims(&self) -> [usize; 2] {
        [self.rank, self.width]
    }

    pub(crate) fn factors(&self) -> &[u8] {
        self.factors.as_slice()
    }

    pub(crate) fn scales(&self) -> &[f32] {
        &self.scales
    }
}

/// What an adapter on disk will take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterPlan {
    /// Inner dim of its factors, the highest where they differ.
    pub rank: usize,
    /// Bytes of its factors.
    pub adapter_bytes: u64,
    /// Arena and scratch of the second context, which runs with adapters use; the same for any number of them.
    pub run_bytes: u64,
}

/// A graph compiled with room for adapters.
#[derive(Clone)]
pub struct AdaptedGraph {
    /// Its executables; they share weights with the plain ones.
    pub executables: Executables,
    /// Where factors lie.
    pub layout: Arc<AdapterLayout>,
}

struct Registered {
    adapter: Arc<Adapter>,
    handles: Vec<WeightHandle>,
}

/// The adapters of a model, by name.
pub(crate) struct Adapters {
    layout: Arc<AdapterLayout>,
    graph: OnceLock<AdaptedGraph>,
    named: Mutex<(Generation, BTreeMap<String, Registered>)>,
}

impl Adapters {
    pub(crate) fn of(graph: &Graph, dtype: DType) -> Self {
        let layout = Arc::new(AdapterLayout::of(graph, ADAPTER_SLOTS, dtype));
        Self { layout, graph: OnceLock::new(), named: Mutex::new((0, BTreeMap::new())) }
    }

    fn named(&self) -> MutexGuard<'_, (Generation, BTreeMap<String, Registered>)> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The graph with room for adapters, compiled at first use.
    pub(crate) fn graph(&self, pipeline: &Arc<ModelCompilePipeline>, source: &Graph) -> Result<AdaptedGraph> {
        if let Some(graph) = self.graph.get() {
            return Ok(graph.clone());
        }
        let passes = PassOptions { adapters: Some(Arc::clone(&self.layout)), ..PassOptions::default() };
        let template = pipeline.ensure_template(source, &with_weights(passes))?;
        let executables = Executables::of(Arc::clone(pipeline), template)?;
        let graph = AdaptedGraph { executables, layout: Arc::clone(&self.layout) };
        Ok(self.graph.get_or_init(|| graph).clone())
    }

    /// Adds or replaces an adapter; `replaces` says which of the two is wanted.
    pub(crate) fn put(
        &self,
        registry: &WeightRegistry,
        name: &str,
        path: &Path,
        head_dim: usize,
        replaces: bool,
    ) -> Result<Arc<Adapter>> {
        let source = open(path, head_dim)?;
        let mut named = self.named();
        match (replaces, named.1.contains_key(name)) {
            (false, true) => return Err(ModelError::AdapterExists { name: name.to_owned() }),
            (true, false) => return Err(unknown(name, &named.1)),
            _ => {}
        }
        let generation = named.0 + 1;
        let entry = format!("{name}#{generation}");
        let base = |weight: &str| self.site_name(weight).and_then(|site| registry.lookup(&site));
        let handles = source.register(registry, &entry, base).map_err(SessionError::from)?;
        let packed = pack(&self.layout, registry, name, generation, &source, &handles);
        let adapter = match packed {
            Ok(adapter) => Arc::new(adapter),
            Err(error) => {
                forget(registry, &handles);
                return Err(error);
            }
        };
        named.0 = generation;
        let registered = Registered { adapter: Arc::clone(&adapter), handles };
        if let Some(old) = named.1.insert(name.to_owned(), registered) {
            forget(registry, &old.handles);
        }
        Ok(adapter)
    }

    /// Takes over the adapters of the same model on another device, as they are in memory.
    pub(crate) fn adopt(&self, others: &Adapters) -> Result<()> {
        let others = others.named();
        if let Some((name, _)) = others.1.first_key_value().filter(|(_, entry)| {
            entry.adapter.width != self.layout.width()
                || entry.adapter.scales.len() != self.layout.sites().len()
        }) {
            let reason = "it was loaded for a model with other linear layers".to_owned();
            return Err(ModelError::Adapter { name: name.clone(), reason });
        }
        let shared =
            |entry: &Registered| Registered { adapter: Arc::clone(&entry.adapter), handles: Vec::new() };
        let all = others.1.iter().map(|(name, entry)| (name.clone(), shared(entry))).collect();
        *self.named() = (others.0, all);
        Ok(())
    }

    /// Removes an adapter; requests that run with it go on.
    pub(crate) fn remove(&self, registry: &WeightRegistry, name: &str) -> Result<()> {
        let mut named = self.named();
        let removed = named.1.remove(name).ok_or_else(|| unknown(name, &named.1))?;
        forget(registry, &removed.handles);
        Ok(())
    }

    pub(crate) fn find(&self, name: &str) -> Result<Arc<Adapter>> {
        let named = self.named();
        let found = named.1.get(name).map(|entry| Arc::clone(&entry.adapter));
        found.ok_or_else(|| unknown(name, &named.1))
    }

    /// Rank and bytes of an adapter on disk once it is added, by its header.
    pub(crate) fn expected(&self, path: &Path, head_dim: usize) -> Result<(usize, usize)> {
        let source = open(path, head_dim)?;
        let element = self.layout.dtype.element_bytes().unwrap_or(4);
        let sites = self.layout.sites();
        let mut columns = 0usize;
        for base in source.base_names() {
            let site = self.site_name(base).and_then(|name| sites.get(&name));
            let reason = format!("{base} is no weight of a linear layer of this model");
            let name = path.display().to_string();
            let site = site.ok_or(ModelError::Adapter { name, reason })?;
            columns = columns.saturating_add(site.k + site.n);
        }
        Ok((source.rank(), columns.saturating_mul(source.rank()).saturating_mul(element)))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.named().1.values().map(|entry| entry.adapter.bytes()).sum()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.named().1.keys().cloned().collect()
    }

    /// The name that the checkpoint has for a weight which the adapter calls `weight`: files of the bare model lack the prefix,
    /// and a tied head is the embedding.
    fn site_name(&self, weight: &str) -> Option<String> {
        let sites = self.layout.sites();
        let bare = ["model.", "transformer."].iter().find_map(|prefix| weight.strip_prefix(prefix));
        let candidates = [weight.to_owned(), format!("model.{weight}"), bare.unwrap_or(weight).to_owned()];
        let found = candidates.into_iter().find(|name| sites.contains_key(name));
        let tied = || {
            let embedding =
                |name: &&String| name.ends_with("embed_tokens.weight") || name.ends_with("wte.weight");
            sites.keys().find(embedding).cloned()
        };
        found.or_else(|| if weight == "lm_head.weight" { tied() } else { None })
    }
}

fn open(path: &Path, head_dim: usize) -> Result<PeftAdapter> {
    Ok(match path.extension().is_some_and(|end| end == "gguf") {
        true => PeftAdapter::open_gguf(path, head_dim)?,
        false => PeftAdapter::open(path)?,
    })
}

fn unknown(name: &str, known: &BTreeMap<String, Registered>) -> ModelError {
    ModelError::UnknownAdapter { name: name.to_owned(), known: known.keys().cloned().collect() }
}

fn forget(registry: &WeightRegistry, handles: &[WeightHandle]) {
    for &handle in handles {
        // Pinned by another thread just now: then the registry keeps it until that is over and the file is dropped.
        drop(registry.unregister(handle));
    }
}

/// The factors in the layout of runs. Every factor was checked against its base when it was registered; here against the layer.
fn pack(
    layout: &AdapterLayout,
    registry: &WeightRegistry,
    name: &str,
    generation: Generation,
    source: &PeftAdapter,
    handles: &[WeightHandle],
) -> Result<Adapter> {
    let (rank, width) = (source.rank(), layout.width());
    let element = layout.dtype.element_bytes().unwrap_or(4);
    let bytes = rank.checked_mul(width).and_then(|n| n.checked_mul(element));
    let factors = bytes.and_then(AlignedBytes::try_zeroed);
    let refuse = |reason: String| ModelError::Adapter { name: name.to_owned(), reason };
    let mut factors = factors.ok_or_else(|| refuse(format!("the system refuses memory for rank {rank}")))?;
    let mut scales = vec![0.0; layout.sites().len()];
    for &handle in handles {
        let guard = registry.guard(handle).map_err(SessionError::from)?;
        let entry = guard.entry();
        let WeightKind::LoraAdapter { base, side, rank: own, alpha, .. } = entry.kind() else { continue };
        let (base, _) = registry.describe(*base).map_err(SessionError::from)?;
        let site = layout.sites().get(&*base);
        let site = site.ok_or_else(|| refuse(format!("{base} is no weight of a linear layer")))?;
        let expected = match side {
            LoraSide::A => [*own, site.k],
            LoraSide::B => [site.n, *own],
        };
        let dims = entry.shape().known_dims().unwrap_or_default();
        if dims != expected {
            return Err(refuse(format!("{side} of {base} is {dims:?}, the layer needs {expected:?}")));
        }
        if !matches!(entry.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(refuse(format!("{side} of {base} is {}, expected f32, f16 or bf16", entry.dtype())));
        }
        let tensor = Tensor::from_bytes(&dims, entry.dtype(), guard.bytes())?;
        let values = to_f64(&tensor).map_err(|e| refuse(e.to_string()))?;
        scales[site.index] = *alpha / *own as f32;
        // Ranks above the factor's own stay zero.
        place(&mut factors, layout, site, *side, *own, &values);
    }
    let touched = layout.sites().values().filter(|site| scales[site.index] != 0.0);
    let bytes = touched.map(|site| (site.k + site.n) * rank * element).sum();
    let name = name.to_owned();
    Ok(Adapter { name, generation, rank, width, factors, bytes, scales })
}

fn place(
    to: &mut AlignedBytes,
    layout: &AdapterLayout,
    site: &AdapterSite,
    side: LoraSide,
    rank: usize,
    values: &[f64],
) {
    let (to, width) = (to.as_mut_slice(), layout.width());
    let mut put = |row: usize, column: usize, value: f64| {
        let at = row * width + column;
        match layout.dtype {
            DType::BF16 => {
                let bits = f32_to_bf16(value as f32).to_ne_bytes();
                to[2 * at..2 * at + 2].copy_from_slice(&bits);
            }
            _ => to[4 * at..4 * at + 4].copy_from_slice(&(value as f32).to_ne_bytes()),
        }
    };
    for (i, &value) in values.iter().enumerate() {
        match side {
            LoraSide::A => put(i / site.k, site.column + i % site.k, value),
            LoraSide::B => put(i % rank, site.column + site.k + i / rank, value),
        }
    }
}

/// Decides which waiting request joins a batch next, so that few adapters are in it and nobody waits for ever.
///
/// A request whose adapter is in the batch already (or that has none) goes first, else the oldest. Each time a request is passed by,
/// it ages; one that was passed by `max_age` times is next, and until it can join nobody else does.
#[derive(Debug)]
pub struct LoraScheduler<T> {
    max_batch: usize,
    max_adapters: usize,
    max_age: usize,
    waiting: VecDeque<Waiting<T>>,
}

#[derive(Debug)]
struct Waiting<T> {
    adapter: Option<Generation>,
    age: usize,
    item: T,
}

impl<T> LoraScheduler<T> {
    /// A scheduler for batches of at most `max_batch` requests with at most `max_adapters` adapters, in which no request is passed
    /// by more than `max_age` times.
    ///
    /// # Errors
    /// [`ModelError::Setting`] for a limit of 0.
    pub fn new(max_batch: usize, max_adapters: usize, max_age: usize) -> Result<Self> {
        let limits = [("max_batch", max_batch), ("max_adapters", max_adapters), ("max_age", max_age)];
        if let Some((setting, _)) = limits.iter().find(|(_, limit)| *limit == 0) {
            return Err(ModelError::Setting { setting, expected: "at least 1", found: "0".to_owned() });
        }
        Ok(Self { max_batch, max_adapters, max_age, waiting: VecDeque::new() })
    }

    /// Adds a request at the end, with its adapter's generation if it has one.
    pub fn push(&mut self, adapter: Option<Generation>, item: T) {
        self.waiting.push_back(Waiting { adapter, age: 0, item });
    }

    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// True if none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The request to join a batch of `running` requests with the adapters `in_use`; `None` if there is no room, or none may.
    pub fn next(&mut self, running: usize, in_use: &BTreeSet<Generation>) -> Option<T> {
        if running >= self.max_batch {
            return None;
        }
        let joins = |w: &Waiting<T>| w.adapter.is_none_or(|a| in_use.contains(&a));
        let fits = |w: &Waiting<T>| joins(w) || in_use.len() < self.max_adapters;
        let overdue = self.waiting.iter().position(|w| w.age >= self.max_age);
        let at = match overdue {
            Some(at) => Some(at).filter(|&at| fits(&self.waiting[at])),
            None => self.waiting.iter().position(joins).or_else(|| self.waiting.iter().position(fits)),
        }?;
        self.waiting.iter_mut().take(at).for_each(|w| w.age += 1);
        self.waiting.remove(at).map(|w| w.item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_zero_is_refused_by_name() {
        for (limits, name) in [([0, 1, 1], "max_batch"), ([1, 0, 1], "max_adapters"), ([1, 1, 0], "max_age")]
        {
            let error = LoraScheduler::<u8>::new(limits[0], limits[1], limits[2]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn requests_are_grouped_by_adapter() {
        let mut scheduler = LoraScheduler::new(4, 1, 10).unwrap();
        for (adapter, item) in [(Some(1), 'a'), (Some(2), 'b'), (Some(1), 'c'), (None, 'd'), (Some(2), 'e')] {
            scheduler.push(adapter, item);
        }
        let mut in_use = BTreeSet::new();
        assert_eq!(scheduler.next(0, &in_use), Some('d'));
        assert_eq!(scheduler.next(1, &in_use), Some('a'));
        in_use.insert(1);
        assert_eq!(scheduler.next(2, &in_use), Some('c'));
        assert_eq!(scheduler.next(3, &in_use), None);
        assert_eq!(scheduler.next(4, &BTreeSet::new()), None);
        assert_eq!((scheduler.next(0, &BTreeSet::from([2])), scheduler.len()), (Some('b'), 1));
    }

    #[test]
    fn nobody_is_passed_by_more_often_than_the_age_limit() {
        let mut scheduler = LoraScheduler::new(2, 1, 3).unwrap();
        let in_use = BTreeSet::from([1]);
        scheduler.push(Some(2), "other");
        (0..10).for_each(|_| scheduler.push(Some(1), "popular"));
        for _ in 0..3 {
            assert_eq!(scheduler.next(1, &in_use), Some("popular"));
        }
        assert_eq!(scheduler.next(1, &in_use), None, "the overdue request is next, and cannot join yet");
        assert_eq!(scheduler.next(0, &BTreeSet::new()), Some("other"));
        assert_eq!(scheduler.next(1, &in_use), Some("popular"));
    }
}
