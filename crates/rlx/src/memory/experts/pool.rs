//! The pool: experts are registry entries in a mapped store; a layer has a fixed number of slots for packed ones.

use super::residency::{ExpertPolicy, Residency};
use super::trace::ExpertTrace;
use super::{ExpertError, MoeOffloadEstimate};
use crate::weights::PinGuard;
use rlx_kernels::gemm::{PackError, PackedMatrix, Precision, WeightOrder, WeightPart, WeightType, pack};
use rlx_kernels::isa::Isa;
use rlx_kernels::steps::moe::{ExpertSource, LoadedExpert};
use rlx_tensor::time::Instant;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a pool did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpertStats {
    /// Experts needed that were in memory.
    pub hits: u64,
    /// Experts needed that had to be loaded.
    pub misses: u64,
    /// Bytes loaded, packed.
    pub bytes_moved: u64,
    /// Visits of a layer that waited for a load.
    pub stalls: u64,
    /// Time of these waits, in nanoseconds.
    pub stall_nanos: u64,
    /// Bytes of the experts in memory now.
    pub resident_bytes: u64,
}

/// A weight of an expert: how it lies, and the pin that keeps its entry.
pub(crate) struct ExpertWeight {
    pub guard: PinGuard,
    pub n: usize,
    pub k: usize,
    pub dtype: WeightType,
}

/// The weights of an expert: gate and up, down.
pub(crate) struct ExpertWeights {
    pub gate_up: [ExpertWeight; 2],
    pub down: [ExpertWeight; 1],
}

#[derive(Debug, Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    bytes_moved: AtomicU64,
    stalls: AtomicU64,
    stall_nanos: AtomicU64,
    resident_bytes: AtomicU64,
}

/// Some experts of every layer of a model in memory, loaded as the router asks for them.
pub struct ExpertPool {
    slots: usize,
    policy: ExpertPolicy,
    layers: Mutex<BTreeMap<usize, Arc<LayerExperts>>>,
    counters: Arc<Counters>,
    trace: Arc<Mutex<Option<ExpertTrace>>>,
}

impl fmt::Debug for ExpertPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExpertPool({} of each layer, {}, {:?})", self.slots, self.policy, self.stats())
    }
}

impl ExpertPool {
    /// A pool of `slots` experts for each layer.
    ///
    /// # Errors
    /// [`ExpertError::Zero`].
    pub fn new(slots: usize, policy: ExpertPolicy) -> Result<Self, ExpertError> {
        if slots == 0 {
            return Err(ExpertError::Zero { what: "experts per layer" });
        }
        let (layers, counters) = (Mutex::default(), Arc::default());
        Ok(Self { slots, policy, layers, counters, trace: Arc::default() })
    }

    /// Experts of each layer in memory at most.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// What the pool did so far.
    pub fn stats(&self) -> ExpertStats {
        let of = |counter: &AtomicU64| counter.load(Relaxed);
        let c = &self.counters;
        ExpertStats {
            hits: of(&c.hits),
            misses: of(&c.misses),
            bytes_moved: of(&c.bytes_moved),
            stalls: of(&c.stalls),
            stall_nanos: of(&c.stall_nanos),
            resident_bytes: of(&c.resident_bytes),
        }
    }

    /// The layers that a program asked for, by id.
    pub fn layer_ids(&self) -> Vec<usize> {
        lock(&self.layers).keys().copied().collect()
    }

    /// Bytes of all experts and of those that the slots hold at most; `None` before a program was loaded, or if layers differ.
    pub fn estimate(&self) -> Option<MoeOffloadEstimate> {
        let layers = lock(&self.layers);
        let first = layers.values().next()?;
        let (experts, bytes) = (first.experts.len(), first.expert_bytes);
        if layers.values().any(|layer| layer.experts.len() != experts || layer.expert_bytes != bytes) {
            return None;
        }
        let whole = super::estimate_moe_offload(bytes, layers.len(), experts, experts, u64::MAX, 0.0).ok()?;
        Some(whole.with_budget(self.slots))
    }

    /// Starts to write down which experts are needed.
    pub fn start_trace(&self) {
        *lock(&self.trace) = Some(ExpertTrace::default());
    }

    /// What was written down since [`ExpertPool::start_trace`].
    pub fn take_trace(&self) -> Option<ExpertTrace> {
        lock(&self.trace).take()
    }

    /// The layer of this id, made of `experts` at first; later programs of the same weights share it.
    pub(crate) fn layer(
        &self,
        id: usize,
        expert_bytes: u64,
        isa: Isa,
        precision: Precision,
        experts: Vec<ExpertWeights>,
    ) -> Result<Arc<LayerExperts>, ExpertError> {
        let mut layers = lock(&self.layers);
        if let Some(layer) = layers.get(&id) {
            let entry = |expert: &ExpertWeights| {
                let entry = expert.down[0].guard.entry();
                (entry.name().to_owned(), entry.version())
            };
            let same = layer.experts.iter().map(entry).eq(experts.iter().map(entry));
            return if same { Ok(Arc::clone(layer)) } else { Err(ExpertError::Layer { layer: id }) };
        }
        let residency = Residency::new(self.policy, experts.len(), self.slots);
        let held = (0..self.slots.min(experts.len())).map(|_| None).collect();
        let layer = Arc::new(LayerExperts {
            id,
            isa,
            precision,
            experts,
            expert_bytes,
            state: Mutex::new(State { residency, held }),
            counters: Arc::clone(&self.counters),
            trace: Arc::clone(&self.trace),
        });
        layers.insert(id, Arc::clone(&layer));
        Ok(layer)
    }
}

/// A packed expert: gate and up, down.
type Packed = [PackedMatrix; 2];

struct State {
    residency: Residency,
    held: Vec<Option<Packed>>,
}

/// The experts of one layer.
pub struct LayerExperts {
    id: usize,
    isa: Isa,
    precision: Precision,
    experts: Vec<ExpertWeights>,
    expert_bytes: u64,
    state: Mutex<State>,
    counters: Arc<Counters>,
    trace: Arc<Mutex<Option<ExpertTrace>>>,
}

impl fmt::Debug for LayerExperts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerExperts({}: {} experts of {} bytes)", self.id, self.experts.len(), self.expert_bytes)
    }
}

impl LayerExperts {
    /// The layer's number in the model.
    pub fn id(&self) -> usize {
        self.id
    }

    fn load(&self, state: &mut State, expert: usize, slot: usize) -> Result<(), PackError> {
        if state.held[slot].take().is_some() {
            self.counters.resident_bytes.fetch_sub(self.expert_bytes, Relaxed);
        }
        let weights = &self.experts[expert];
        let packed = [self.pack(&weights.gate_up, true)?, self.pack(&weights.down, false)?];
        state.held[slot] = Some(packed);
        self.counters.resident_bytes.fetch_add(self.expert_bytes, Relaxed);
        self.counters.bytes_moved.fetch_add(self.expert_bytes, Relaxed);
        Ok(())
    }

    fn pack(&self, weights: &[ExpertWeight], gated: bool) -> Result<PackedMatrix, PackError> {
        let mut parts = Vec::with_capacity(weights.len());
        for weight in weights {
            let (bytes, order) = (weight.guard.bytes(), WeightOrder::RowMajor);
            parts.push(WeightPart { bytes, dtype: weight.dtype, n: weight.n, k: weight.k, order });
        }
        let packed = pack(&parts, gated, self.isa, self.precision)?;
        weights.iter().for_each(|weight| weight.guard.release_pages());
        Ok(packed)
    }

    fn note(&self, needed: &[usize]) {
        if let Some(trace) = &mut *lock(&self.trace) {
            trace.experts = trace.experts.max(self.experts.len());
            trace.expert_bytes = trace.expert_bytes.max(self.expert_bytes);
            trace.visits.push((self.id, needed.to_vec()));
        }
    }
}

impl ExpertSource for LayerExperts {
    fn visit(&self, needed: &[usize], each: &mut dyn FnMut(&[LoadedExpert<'_>])) -> Result<(), String> {
        // Held until the last wave has run: what a slot holds does not change under a run.
        let mut state = lock(&self.state);
        self.note(needed);
        let waves = state.residency.plan(needed);
        for (expert, _) in waves.iter().flat_map(|wave| &wave.loads) {
            let weights = &self.experts[*expert];
            weights.gate_up.iter().chain(&weights.down).for_each(|weight| weight.guard.will_need());
        }
        let (mut misses, mut members) = (0, 0);
        for wave in &waves {
            let started = Instant::now();
            for &(expert, slot) in &wave.loads {
                if let Err(error) = self.load(&mut state, expert, slot) {
                    state.residency.clear();
                    return Err(format!("expert {expert} of layer {}: {error}", self.id));
                }
            }
            if !wave.loads.is_empty() {
                self.counters.stall_nanos.fetch_add(started.elapsed().as_nanos() as u64, Relaxed);
            }
            misses += wave.loads.len() as u64;
            members += wave.members.len() as u64;
            let held = wave.members.iter().filter_map(|&(expert, slot)| {
                let [gate_up, down] = state.held[slot].as_ref()?;
                Some(LoadedExpert { expert, gate_up, down })
            });
            each(&held.collect::<Vec<_>>());
        }
        self.counters.hits.fetch_add(members - misses, Relaxed);
        self.counters.misses.fetch_add(misses, Relaxed);
        self.counters.stalls.fetch_add(u64::from(misses > 0), Relaxed);
        Ok(())
    }
}
