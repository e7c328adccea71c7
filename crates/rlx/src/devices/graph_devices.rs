//! One graph on any device: compiled there when it is first needed, with one set of weights.

mod pick;
mod run;

pub use pick::DevicePick;
pub use run::{DeviceBenchResult, DeviceTimes};

use super::calibrate::{calibrate, rates_key};
use super::candidate::{DeviceCandidate, rows};
use super::cost::{DeviceRates, predict};
use super::fallback::{DeviceAttempt, DeviceFallbackError};
use super::id::DeviceId;
use super::policy::{DeviceError, DevicePolicy};
use super::store::{Clock, DeviceStore};
use crate::backend::{Backend, BackendError, BackendRegistry};
use crate::config::Config;
use crate::session::{
    CompileOptions, CompiledGraph, Session, SessionError, TensorArg, check_param, set_weight,
};
use crate::weights::WeightRegistry;
use rlx_graph::Graph;
use rlx_tensor::{DType, DimBinding};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

/// The value that a symbol takes in choices and predictions where neither inputs nor [`GraphDevicesOptions::sizes`] give it one.
pub const NOMINAL_EXTENT: usize = 128;

/// How long a choice of device holds.
pub const DECISION_LIFETIME: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What a [`GraphDevices`] is made with.
#[derive(Clone)]
#[non_exhaustive]
pub struct GraphDevicesOptions {
    /// Which devices may be used, and how one is picked.
    pub policy: DevicePolicy,
    /// Settings: `RLX_DEVICE`, `RLX_DEVICE_CHAIN`, and those of the backends.
    pub config: Config,
    /// Where backends come from.
    pub backends: BackendRegistry,
    /// Where params bind from, on every device.
    pub weights: Arc<WeightRegistry>,
    /// How the graph is compiled.
    pub compile: CompileOptions,
    /// Sizes that choices are made for where no inputs say; a symbol that is missing counts as [`NOMINAL_EXTENT`].
    pub sizes: DimBinding,
    /// Where measured rates and decisions are kept between processes; `None`: nowhere.
    pub folder: Option<PathBuf>,
    /// How long a decision holds.
    pub decision_lifetime: Duration,
    /// Tells the time.
    pub clock: Clock,
}

impl GraphDevicesOptions {
    /// The process's backends under these settings, with the policy that the settings describe and weights of its own.
    pub fn from_config(config: &Config) -> Self {
        let caching = config.cache_bytes.is_none_or(|bytes| bytes.0 > 0);
        Self {
            policy: DevicePolicy::from_config(config),
            config: config.clone(),
            backends: BackendRegistry::global().clone(),
            weights: Arc::new(WeightRegistry::new()),
            compile: CompileOptions::default(),
            sizes: DimBinding::new(),
            folder: config.cache_folder().filter(|_| caching).map(|folder| folder.join("devices")),
            decision_lifetime: DECISION_LIFETIME,
            clock: Arc::new(SystemTime::now),
        }
    }
}

/// What is compiled for one device.
#[derive(Default)]
struct Slot {
    backend: Option<Arc<dyn Backend>>,
    compiled: Option<Arc<CompiledGraph>>,
}

/// One graph on any device: lazily compiled for each, weights shared, a device chosen by policy.
///
/// `&self` everywhere, from any thread; there is one lock for each device, and none is held while a graph runs.
///
/// ```
/// use rlx::devices::{Device, DevicePolicy, GraphDevices};
/// use rlx_graph::{Graph, ops::activation::{Activation, ActivationKind}};
/// use rlx_tensor::{DType, Shape};
///
/// let mut graph = Graph::new("relu");
/// let x = graph.input("x", Shape::new(&[3], DType::F32))?;
/// let y = graph.add_one(Activation { kind: ActivationKind::Relu }, &[x])?;
/// graph.set_outputs(&[("y", y)])?;
/// let devices = GraphDevices::with_policy(graph, DevicePolicy::only([Device::Cpu]))?;
/// let results = devices.run(Device::Cpu, &[("x", (&[-1.0f32, 0.0, 2.0][..]).into())])?;
/// assert_eq!(results[0].1.as_slice::<f32>()?, [0.0, 0.0, 2.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct GraphDevices {
    graph: Graph,
    digest: String,
    options: GraphDevicesOptions,
    policy: RwLock<DevicePolicy>,
    slots: Mutex<BTreeMap<DeviceId, Arc<Mutex<Slot>>>>,
    store: DeviceStore,
    machine: OnceLock<String>,
    calibrations: AtomicU64,
    decisions: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names of a graph's params, in declaration order.
pub fn graph_param_names(graph: &Graph) -> Vec<String> {
    graph.params().filter_map(|(_, value)| value.name.clone()).collect()
}

impl GraphDevices {
    /// A graph on any device of this process, whatever the policy that the settings describe; their other values hold.
    ///
    /// # Errors
    /// A setting that does not parse.
    pub fn new(graph: Graph) -> Result<Self, SessionError> {
        Self::with_policy(graph, DevicePolicy::all())
    }

    /// A graph under a policy.
    ///
    /// # Errors
    /// A setting that does not parse.
    pub fn with_policy(graph: Graph, policy: DevicePolicy) -> Result<Self, SessionError> {
        let options = GraphDevicesOptions::from_config(Config::global()?);
        Ok(Self::open(graph, GraphDevicesOptions { policy, ..options }))
    }

    /// A graph under the policy that the process's settings describe.
    ///
    /// # Errors
    /// A setting that does not parse, named with its text.
    pub fn from_env(graph: Graph) -> Result<Self, SessionError> {
        Ok(Self::open(graph, GraphDevicesOptions::from_config(Config::global()?)))
    }

    /// A graph with everything chosen.
    pub fn open(graph: Graph, options: GraphDevicesOptions) -> Self {
        let text = format!("{graph}{:?}", options.compile.passes);
        let digest = blake3::hash(text.as_bytes()).to_hex().to_string();
        let clock = Arc::clone(&options.clock);
        let store = DeviceStore::open(options.folder.as_deref(), options.decision_lifetime, clock);
        let policy = RwLock::new(options.policy.clone());
        let (calibrations, decisions) = (AtomicU64::new(0), AtomicU64::new(0));
        let (slots, machine) = (Mutex::default(), OnceLock::new());
        Self { graph, digest, options, policy, slots, store, machine, calibrations, decisions }
    }

    /// The policy.
    pub fn policy(&self) -> DevicePolicy {
        self.policy.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The registry that params bind from, on every device.
    pub fn weights(&self) -> &Arc<WeightRegistry> {
        &self.options.weights
    }

    /// How often a device was measured for the cost model.
    pub fn calibrations(&self) -> u64 {
        self.calibrations.load(Ordering::Relaxed)
    }

    /// How often a device was chosen anew, rather than taken as chosen before.
    pub fn decisions(&self) -> u64 {
        self.decisions.load(Ordering::Relaxed)
    }

    /// The devices that can run the graph now, in the policy's order of preference.
    pub fn devices(&self) -> Vec<DeviceId> {
        let rows = self.candidates(&self.nominal_sizes());
        rows.into_iter().filter(DeviceCandidate::is_viable).map(|row| row.device).collect()
    }

    /// A row for every kind of device: what it is, what it would take, what blocks it.
    pub fn report(&self) -> Vec<DeviceCandidate> {
        self.report_for(&DimBinding::new())
    }

    /// As [`GraphDevices::report`], at these sizes.
    pub fn report_for(&self, sizes: &DimBinding) -> Vec<DeviceCandidate> {
        let sizes = self.complete(sizes);
        let mut rows = self.candidates(&sizes);
        self.predict_rows(&mut rows, &sizes);
        if let Ok(chosen) = self.choose(&rows)
            && let Some(row) = rows.iter_mut().find(|row| row.device == chosen)
        {
            row.recommended = true;
        }
        rows
    }

    /// The device with the shortest predicted time among those that can run the graph; a preferred one comes first.
    ///
    /// # Errors
    /// [`DeviceError::NoneViable`] as [`SessionError::Device`].
    pub fn fastest(&self) -> Result<DeviceId, SessionError> {
        self.decide(&self.nominal_sizes())
    }

    /// The executable of a device, compiled if it is not yet.
    ///
    /// # Errors
    /// A device that is denied, absent, or does not run the graph.
    pub fn compile(&self, device: impl Into<DeviceId>) -> Result<Arc<CompiledGraph>, SessionError> {
        let device = device.into();
        if !self.policy().allows(device.kind) {
            return Err(DeviceError::Forbidden { device }.into());
        }
        let slot = self.slot(device);
        let mut slot = lock(&slot);
        if let Some(compiled) = &slot.compiled {
            return Ok(Arc::clone(compiled));
        }
        let backend = self.backend(device, &mut slot)?;
        let session = Session::with_backend(backend).with_weights(Arc::clone(&self.options.weights));
        let compiled = Arc::new(session.compile_with(&self.graph, &self.options.compile)?);
        slot.compiled = Some(Arc::clone(&compiled));
        Ok(compiled)
    }

    fn backend(&self, device: DeviceId, slot: &mut Slot) -> Result<Arc<dyn Backend>, SessionError> {
        if let Some(backend) = &slot.backend {
            return Ok(Arc::clone(backend));
        }
        let backend = self.options.backends.open(device, &self.options.config)?;
        slot.backend = Some(Arc::clone(&backend));
        Ok(backend)
    }

    fn slot(&self, device: DeviceId) -> Arc<Mutex<Slot>> {
        Arc::clone(lock(&self.slots).entry(device).or_default())
    }

    /// Gives a param its value, checked once against the graph: every executable sees it, those there are and those to come.
    ///
    /// # Errors
    /// [`SessionError::UnknownName`], [`SessionError::DType`], [`SessionError::Shape`]; nothing is changed then.
    pub fn set_param<'t>(&self, name: &str, value: impl Into<TensorArg<'t>>) -> Result<(), SessionError> {
        let value = value.into();
        self.set_param_typed(name, value.bytes, value.dtype)
    }

    /// As [`GraphDevices::set_param`], from bytes.
    ///
    /// # Errors
    /// As [`GraphDevices::set_param`].
    pub fn set_param_typed(&self, name: &str, bytes: &[u8], dtype: DType) -> Result<(), SessionError> {
        self.set_params(&[(name, bytes, dtype)])
    }

    /// Gives several params their values: all of them, or none if one is refused.
    ///
    /// # Errors
    /// As [`GraphDevices::set_param`]; [`SessionError::Weights`] for names that the registry holds in another shape.
    pub fn set_params(&self, values: &[(&str, &[u8], DType)]) -> Result<(), SessionError> {
        let params: Vec<_> =
            self.graph.params().map(|(_, v)| (v.name.as_deref().unwrap_or(""), &v.shape)).collect();
        let weights = &self.options.weights;
        let mut problems = Vec::new();
        let mut checked = Vec::with_capacity(values.len());
        for &(name, bytes, dtype) in values {
            let shape = check_param(params.iter().copied(), name, bytes.len(), dtype)?;
            if let Some(handle) = weights.lookup(name) {
                let found = weights.get(handle)?;
                if found.shape() != shape {
                    problems.push(format!("{name}: expected {shape}, the registry holds {}", found.shape()));
                }
            }
            checked.push((name, shape, bytes));
        }
        if !problems.is_empty() {
            return Err(SessionError::Weights { problems });
        }
        checked.into_iter().try_for_each(|(name, shape, bytes)| set_weight(weights, name, shape, bytes))
    }

    /// Loads the newest values into every executable there is, so that the next runs need not.
    ///
    /// An executable never runs on old values, whether this was called or not.
    ///
    /// # Errors
    /// [`SessionError::Fallback`] with every device that could not take them; it is compiled anew at its next use.
    pub fn sync_params_to_all(&self) -> Result<(), SessionError> {
        let mut attempts = Vec::new();
        for (device, compiled) in self.cached() {
            if let Err(cause) = compiled.program() {
                self.note_fault(device, &compiled, &cause);
                attempts.push(DeviceAttempt { device, cause });
            }
        }
        if attempts.is_empty() { Ok(()) } else { Err(DeviceFallbackError { attempts }.into()) }
    }

    /// The executables there are.
    fn cached(&self) -> Vec<(DeviceId, Arc<CompiledGraph>)> {
        let slots: Vec<_> =
            lock(&self.slots).iter().map(|(&device, slot)| (device, Arc::clone(slot))).collect();
        let compiled = |slot: &Mutex<Slot>| lock(slot).compiled.clone();
        slots.into_iter().filter_map(|(device, slot)| Some((device, compiled(&slot)?))).collect()
    }

    /// Drops every executable and decision; params stay.
    pub fn invalidate_cache(&self) {
        lock(&self.slots).clear();
        self.store.forget_decisions(|key, _| key.starts_with(&self.digest));
    }

    /// Changes the policy. Params and the executables of kinds that are still allowed stay.
    pub fn set_policy(&self, policy: DevicePolicy) {
        lock(&self.slots).retain(|device, _| policy.allows(device.kind));
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// Draws the consequences of a failed run: a discarded executable is compiled anew, a lost device probed and opened anew.
    fn note_fault(&self, device: DeviceId, compiled: &Arc<CompiledGraph>, error: &SessionError) {
        if !error.is_device_fault() {
            return;
        }
        let slot = self.slot(device);
        let mut slot = lock(&slot);
        if slot.compiled.as_ref().is_some_and(|current| Arc::ptr_eq(current, compiled)) {
            slot.compiled = None;
        }
        if matches!(error, SessionError::Backend(BackendError::Lost { .. })) {
            slot.backend = None;
            let prefix = self.digest.clone();
            self.store.forget_decisions(|key, d| d.device == device && key.starts_with(&prefix));
        }
    }

    /// Rates of a device: remembered, else measured now.
    fn rates(&self, backend: &Arc<dyn Backend>) -> Result<DeviceRates, SessionError> {
        let key = rates_key(&**backend);
        if let Some(rates) = self.store.rates(&key) {
            return Ok(rates);
        }
        self.calibrations.fetch_add(1, Ordering::Relaxed);
        let rates = calibrate(backend)?;
        self.store.keep_rates(&key, &rates);
        Ok(rates)
    }

    fn nominal_sizes(&self) -> DimBinding {
        self.complete(&DimBinding::new())
    }

    /// These sizes, then those of the options, then nominal ones, for every symbol of the graph.
    fn complete(&self, sizes: &DimBinding) -> DimBinding {
        let mut complete = DimBinding::new();
        for symbol in self.graph.symbols() {
            let value = sizes.value(&symbol).or_else(|| self.options.sizes.value(&symbol));
            // A symbol that was just made has one value, so binding it cannot conflict.
            let _ = complete.bind(&symbol, value.unwrap_or(NOMINAL_EXTENT));
        }
        complete
    }

    /// Every row with what can be said without measuring: ops and memory.
    fn candidates(&self, sizes: &DimBinding) -> Vec<DeviceCandidate> {
        let mut rows = rows(&self.options.backends, &self.policy());
        for row in rows.iter_mut().filter(|row| row.available && row.allowed) {
            self.examine(row, sizes);
        }
        rows
    }

    fn examine(&self, row: &mut DeviceCandidate, sizes: &DimBinding) {
        let compiled = match self.compile(row.device) {
            Ok(compiled) => compiled,
            Err(error) => {
                row.supports_graph = matches!(error, SessionError::Pass(_)).then_some(false);
                row.available = row.supports_graph.is_some();
                row.block(error.to_string());
                return;
            }
        };
        let backend = compiled.backend();
        row.supports_graph = Some(true);
        row.capabilities = backend.capabilities();
        row.free_bytes = backend.free_bytes();
        match compiled.estimate(sizes) {
            Ok(estimate) => {
                let weights = &self.options.weights;
                let held = match backend.reads_host_memory() {
                    true => weights.total_bytes().min(estimate.weight_bytes) + weights.packed_bytes(),
                    false if compiled.is_loaded() => estimate.weight_bytes + estimate.packed_bytes,
                    false => 0,
                };
                row.needed_bytes = Some(estimate.total_bytes().saturating_sub(held));
                row.check_memory();
            }
            Err(error) => row.block(error.to_string()),
        }
    }

    /// Adds predicted times, calibrating what has no rates. A device that fails to be measured is no candidate.
    fn predict_rows(&self, rows: &mut [DeviceCandidate], sizes: &DimBinding) {
        for row in rows.iter_mut().filter(|row| row.is_viable()) {
            let predicted = self.compile(row.device).and_then(|compiled| {
                let rates = self.rates(compiled.backend());
                if let Err(error) = &rates {
                    self.note_fault(row.device, &compiled, error);
                }
                Ok(predict(compiled.template(), sizes, &rates?)?.seconds())
            });
            match predicted {
                Ok(seconds) => row.predicted_s = Some(seconds),
                Err(error) => row.block(format!("cannot be measured: {error}")),
            }
        }
    }
}

#[cfg(test)]
mod tests;
