//! The backend over any device: plans of launches, one arena for each run in flight, weights uploaded once. What differs between devices
//! is behind [`Driver`].

#![forbid(unsafe_code)]

mod context;
pub(crate) mod driver;
mod held;
mod layout;
mod library;
mod plan;
#[cfg(any(feature = "cuda", test))]
pub(crate) mod replay;
mod segments;
mod self_test;
mod states;
mod trial;
pub(crate) mod tune;
mod units;
mod words;

use crate::ir::Kernel;
use crate::lower::library::Library;
use crate::lower::operands::Operands;
use crate::lower::schedules::Choices;
use crate::lower::{Band, Bound, Home, find};
use context::DeviceContext;
use driver::{Driver, Limits, refused};
#[cfg(test)]
pub(crate) use layout::buffer_dtypes;
use plan::Plan;
use rlx::backend::cpu::Precision;
use rlx::backend::{Backend, BackendError, Context, KernelChoice, Program, Traffic};
use rlx::plan::{BufferKind, Lir, PlanTarget, Template};
use rlx::weights::{WeightHandle, WeightRegistry};
use rlx_graph::passes::Target;
use rlx_graph::{Op, OpDef};
use rlx_tensor::Shape;
use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tune::Tuner;

/// What programs of one device share while any of them uses it.
type Shared<K, V> = Mutex<HashMap<K, Weak<V>>>;

/// A weight as it was set last.
type Version = (WeightHandle, u64);

/// What `known` has for the key, or what is made now.
fn shared<K: std::hash::Hash + Eq, V>(
    known: &Shared<K, V>,
    key: K,
    make: impl FnOnce() -> Result<V, BackendError>,
) -> Result<Arc<V>, BackendError> {
    let lock = || known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(value) = lock().get(&key).and_then(Weak::upgrade) {
        return Ok(value);
    }
    let value = Arc::new(make()?);
    let mut known = lock();
    known.retain(|_, value| value.strong_count() > 0);
    known.insert(key, Arc::downgrade(&value));
    Ok(value)
}

/// An open device with what is on it.
struct OpenDevice<D: Driver> {
    driver: D,
    name: String,
    weights: Shared<(Vec<Version>, Option<Band>), D::Buffer>,
    kernels: Shared<String, D::Kernel>,
    /// Where schedules come from, if they are timed.
    tuner: Option<Tuner>,
    /// The launches of the template asked about last: memory is asked for before a program is loaded.
    planned: Mutex<Option<(Weak<Template>, Arc<Plan>)>>,
    precision: Precision,
    /// What products of weights multiply, and how it came to that, for reports.
    operands: Operands,
    multiplied: String,
    /// Programs that the device runs at once, if its matrix units multiply packed weights.
    byte_units: Option<usize>,
    /// What products of many rows are left to, and how it came to that.
    library: Option<Library>,
    left: Option<String>,
    moved: Moved,
}

/// Words that runs moved to the device and from it.
#[derive(Debug, Default)]
struct Moved {
    up: AtomicU64,
    down: AtomicU64,
}

impl Moved {
    fn count(&self, up: usize, down: usize) {
        self.up.fetch_add(up as u64, Ordering::Relaxed);
        self.down.fetch_add(down as u64, Ordering::Relaxed);
    }
}

impl<D: Driver> OpenDevice<D> {
    /// Room for words that are bound as one.
    fn allocate(&self, what: &str, words: usize) -> Result<D::Buffer, BackendError> {
        let limit = self.driver.limits().binding_words;
        if words > limit {
            return Err(layout::too_large(&format!("{what} of {}", self.name), words, limit));
        }
        self.driver.allocate(what, words)
    }

    fn upload(&self, name: &str, words: &[u32]) -> Result<D::Buffer, BackendError> {
        let buffer = self.allocate(name, words.len())?;
        self.driver.upload(name, &buffer, 0, words)?;
        Ok(buffer)
    }

    fn compile(&self, kernels: &[Arc<Kernel>]) -> Result<Vec<Arc<D::Kernel>>, BackendError> {
        let lock = || self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let hashes: Vec<String> = kernels.iter().map(|kernel| kernel.hash()).collect();
        let mut found: HashMap<&String, Arc<D::Kernel>> = {
            let known = lock();
            hashes.iter().filter_map(|hash| Some((hash, known.get(hash)?.upgrade()?))).collect()
        };
        let all = hashes.iter().zip(kernels.iter().map(Arc::as_ref));
        let (absent, wanted): (Vec<&String>, Vec<&Kernel>) =
            all.filter(|(hash, _)| !found.contains_key(hash)).unzip();
        if !absent.is_empty() {
            let made = self.driver.compile_all(&wanted)?;
            found.extend(absent.into_iter().zip(made.into_iter().map(Arc::new)));
            let mut known = lock();
            known.retain(|_, kernel| kernel.strong_count() > 0);
            known.extend(found.iter().map(|(hash, kernel)| ((*hash).clone(), Arc::downgrade(kernel))));
            drop(known);
            self.driver.keep();
        }
        let of = |hash| found.get(hash).cloned();
        let fewer = || refused(&self.name, "its kernels", "fewer were compiled than asked for");
        hashes.iter().map(of).collect::<Option<_>>().ok_or_else(fewer)
    }
}

/// The bytes of a weight's band, if it is not bound whole.
fn banded(bytes: &[u8], band: Option<Band>) -> Cow<'_, [u8]> {
    let Some(Band { first, count, of, times, .. }) = band else { return Cow::Borrowed(bytes) };
    let line = bytes.len() / (of * times).max(1);
    let own = |all: &[u8]| all[first * line..(first + count) * line].to_vec();
    match times {
        1 => Cow::Borrowed(&bytes[first * line..(first + count) * line]),
        _ => bytes.chunks_exact((of * line).max(1)).flat_map(own).collect(),
    }
}

/// The backend over a device.
pub(crate) struct DeviceBackend<D: Driver>(Arc<OpenDevice<D>>);

impl<D: Driver> DeviceBackend<D> {
    /// A device that computes as the interpreter does, which is tried first. Products are in f32.
    ///
    /// # Errors
    /// What the device says against it; [`BackendError::Unsupported`] names the kernel that gave other results.
    #[cfg(any(target_arch = "wasm32", test))]
    pub fn open(driver: D) -> Result<Self, BackendError> {
        Self::set_up(driver, None, Precision::F32)
    }

    /// As [`DeviceBackend::open`], with schedules that were timed on the device, and products in this precision: in bf16 by matrix units,
    /// if the device has such and they pass a test.
    ///
    /// # Errors
    /// As there.
    pub fn set_up(driver: D, tuner: Option<Tuner>, precision: Precision) -> Result<Self, BackendError> {
        self_test::run(&driver)?;
        let (operands, multiplied) = units::choose(&driver, precision)?;
        let (byte_units, of_bytes) = units::choose_bytes(&driver)?;
        let multiplied = [multiplied].into_iter().chain(of_bytes).collect::<Vec<_>>().join(", ");
        let (library, left) = library::choose(&driver, operands)?;
        let name = driver.name();
        let (weights, kernels, moved) = (Mutex::default(), Mutex::default(), Moved::default());
        let planned = Mutex::default();
        Ok(Self(Arc::new(OpenDevice {
            driver,
            name,
            weights,
            kernels,
            tuner,
            planned,
            precision,
            operands,
            multiplied,
            byte_units,
            library,
            left,
            moved,
        })))
    }

    /// The launches of a template, made once for all who ask in a row.
    fn plan(&self, template: &Arc<Template>) -> Result<Arc<Plan>, BackendError> {
        let lock = || self.0.planned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, plan)) = &*lock()
            && of.upgrade().is_some_and(|of| Arc::ptr_eq(&of, template))
        {
            return Ok(Arc::clone(plan));
        }
        let plan = Arc::new(self.planned(template)?);
        *lock() = Some((Arc::downgrade(template), Arc::clone(&plan)));
        Ok(plan)
    }

    /// The launches of a template, under schedules that were timed if the device has any.
    fn planned(&self, template: &Template) -> Result<Plan, BackendError> {
        let Limits { binding_words, compact, dots, .. } = self.0.driver.limits();
        let (operands, byte_units, library) = (self.0.operands, self.0.byte_units, self.0.library);
        let without_dots = !dots;
        let choices = Choices { compact, without_dots, operands, byte_units, library, ..Choices::default() };
        let plan = Plan::of(template, binding_words, &choices)?;
        match &self.0.tuner {
            Some(tuner) if !plan.classes.is_empty() => {
                let classes = tuner.choices(&self.0.driver, &plan.classes, &choices)?;
                Plan::of(template, binding_words, &Choices { classes, ..choices })
            }
            _ => Ok(plan),
        }
    }
}

struct DeviceTarget;

impl Target for DeviceTarget {
    fn name(&self) -> &str {
        "gpu"
    }

    fn runs(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        find(op.name()).is_some_and(|entry| entry.supports(op, inputs, outputs))
    }
}

impl PlanTarget for DeviceTarget {
    fn accepts_strided(&self, op: &Op, _operand: usize) -> bool {
        find(op.def().name()).is_some()
    }

    /// Elements of narrow dtypes are wider on a device, so a buffer of as many bytes need not hold as many elements.
    fn accepts_in_place(&self, _op: &Op, _operand: Option<usize>, _result: &Shape) -> bool {
        false
    }
}

impl<D: Driver> Backend for DeviceBackend<D> {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn fingerprint(&self) -> String {
        let left = self.0.library.as_ref().map(library::told);
        let own = [self.0.driver.fingerprint(), self.0.operands.told().to_owned()];
        own.into_iter().chain(left).collect::<Vec<_>>().join(", ")
    }

    fn precision(&self) -> Option<Precision> {
        Some(self.0.precision)
    }

    fn capabilities(&self) -> Vec<String> {
        let tuned = self.0.tuner.as_ref().map(Tuner::told);
        let own = self.0.driver.capabilities().into_iter().chain([self.0.multiplied.clone()]);
        own.chain(self.0.left.clone()).chain(tuned).collect()
    }

    fn details(&self) -> Vec<String> {
        self.0.tuner.as_ref().map(Tuner::table).unwrap_or_default()
    }

    fn free_bytes(&self) -> Option<u64> {
        self.0.driver.free_bytes()
    }

    fn traffic(&self) -> Option<Traffic> {
        let bytes = |words: &AtomicU64| words.load(Ordering::Relaxed) * 4;
        Some(Traffic { up: bytes(&self.0.moved.up), down: bytes(&self.0.moved.down) })
    }

    fn target(&self) -> &dyn Target {
        &DeviceTarget
    }

    fn plan_target(&self) -> &dyn PlanTarget {
        &DeviceTarget
    }

    /// None: a weight keeps its size on the device.
    fn packed_bytes(&self, _template: &Template) -> Result<usize, BackendError> {
        Ok(0)
    }

    fn workspace_bytes(&self, lir: &Lir) -> Result<usize, BackendError> {
        let plan = self.plan(lir.template())?;
        let layout = plan.layout(lir, self.0.driver.limits().binding_words)?;
        let arena = (layout.words() * 4).saturating_sub(lir.arena_bytes());
        Ok(arena + plan.widening(lir))
    }

    fn load(
        &self,
        template: &Arc<Template>,
        weights: &WeightRegistry,
    ) -> Result<Arc<dyn Program>, BackendError> {
        let plan = self.plan(template)?;
        let mut bound: HashMap<Bound, Arc<D::Buffer>> = HashMap::new();
        for weight in plan.launches.iter().flat_map(|launch| &launch.weights) {
            if let Entry::Vacant(place) = bound.entry(weight.clone()) {
                place.insert(self.weight(template, weight, weights)?);
            }
        }
        let kernels = self.0.compile(&plan.kernels)?;
        let (device, template) = (Arc::clone(&self.0), Arc::clone(template));
        Ok(Arc::new(DeviceProgram(Arc::new(Loaded { device, template, plan, kernels, weights: bound }))))
    }
}

impl<D: Driver> DeviceBackend<D> {
    /// What a launch binds on the device; uploaded if no program holds these versions of it.
    fn weight(
        &self,
        template: &Template,
        weight: &Bound,
        weights: &WeightRegistry,
    ) -> Result<Arc<D::Buffer>, BackendError> {
        let ids = match &weight.home {
            Home::Buffer(id) => std::slice::from_ref(id),
            Home::Stack(ids) => ids,
            Home::Scratch => &[],
        };
        let band = weight.band.filter(|_| ids.len() == 1);
        let (mut guards, mut versions) = (Vec::new(), Vec::new());
        let mut of = ("", rlx_tensor::DType::F32);
        for id in ids {
            match &template.buffers()[id.index()].kind {
                BufferKind::Const(tensor) => {
                    let bytes = tensor.bytes();
                    let words = words::packed("a constant", tensor.dtype(), &banded(bytes, band))?;
                    return Ok(Arc::new(self.0.upload("a constant", &words)?));
                }
                BufferKind::Param(at) => {
                    let param = &template.params()[*at];
                    of = (&param.name, param.shape.dtype());
                    let handle = weights.lookup(&param.name);
                    let handle = handle.ok_or_else(|| BackendError::Unset { name: param.name.clone() })?;
                    let guard = weights.guard(handle)?;
                    versions.push((handle, guard.entry().version()));
                    guards.push(guard);
                }
                _ => return Err(BackendError::Unset { name: id.to_string() }),
            }
        }
        let (name, dtype) = of;
        shared(&self.0.weights, (versions, weight.band), || {
            let words = match guards.as_slice() {
                [one] => words::packed(name, dtype, &banded(one.bytes(), band))?,
                several => {
                    let parts: Vec<&[u8]> = several.iter().map(|guard| guard.bytes()).collect();
                    words::packed(name, dtype, &parts.concat())?
                }
            };
            self.0.upload(name, &words)
        })
    }
}

/// What every context of a program shares.
struct Loaded<D: Driver> {
    device: Arc<OpenDevice<D>>,
    template: Arc<Template>,
    plan: Arc<Plan>,
    kernels: Vec<Arc<D::Kernel>>,
    weights: HashMap<Bound, Arc<D::Buffer>>,
}

struct DeviceProgram<D: Driver>(Arc<Loaded<D>>);

impl<D: Driver> fmt::Debug for DeviceProgram<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceProgram({} on {})", self.0.template.name(), self.0.device.name)
    }
}

impl<D: Driver> Program for DeviceProgram<D> {
    fn context(&self, lir: &Lir) -> Result<Box<dyn Context>, BackendError> {
        Ok(Box::new(DeviceContext::new(Arc::clone(&self.0), lir)?))
    }

    fn kernels(&self) -> Vec<KernelChoice> {
        let of = |step: usize| {
            let own = self.0.plan.launches.iter().filter(move |l| l.step == step);
            own.map(|l| l.kernel.name.clone()).collect::<Vec<_>>()
        };
        let steps = 0..self.0.template.steps().len();
        steps.map(|step| KernelChoice { kernel: of(step).join(" + "), native: true }).collect()
    }
}
