//! A backend that fails as it is told: the reference evaluation with faults.

use super::reference::ReferenceBackend;
use super::{Backend, BackendError, BackendProvider, Context, DeviceProbe, Io, KernelChoice, Program};
use crate::config::Config;
use crate::devices::Device;
use crate::plan::{Lir, PlanTarget, Template};
use crate::session::SessionError;
use crate::weights::WeightRegistry;
use rlx_graph::passes::{OpSet, Target};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// The device is gone.
    Lost,
    /// The device has no memory.
    OutOfMemory,
    /// A panic.
    Panic,
    /// The first float of the first output is off; runs only.
    Wrong,
}

impl Fault {
    fn strike(self) -> Result<(), BackendError> {
        match self {
            Fault::None | Fault::Wrong => Ok(()),
            Fault::Lost => Err(BackendError::Lost { reason: "it fell off the bus".to_owned() }),
            Fault::OutOfMemory => {
                Err(BackendError::OutOfMemory { bytes: 1 << 40, what: "the weights".to_owned() })
            }
            Fault::Panic => panic!("a driver bug"),
        }
    }
}

/// What a fake device does, changed by a test while it is used.
#[derive(Debug)]
pub struct Script {
    on_load: Mutex<Fault>,
    on_run: Mutex<Fault>,
    probe: Mutex<DeviceProbe>,
    free_bytes: Mutex<Option<u64>>,
    delay: Mutex<Duration>,
    unsupported: Mutex<Option<&'static str>>,
    /// Devices opened.
    pub opens: AtomicUsize,
    /// Programs loaded.
    pub loads: AtomicUsize,
    /// Runs begun.
    pub runs: AtomicUsize,
}

impl Default for Script {
    fn default() -> Self {
        Script {
            on_load: Mutex::default(),
            on_run: Mutex::default(),
            probe: Mutex::new(DeviceProbe::Present(1)),
            free_bytes: Mutex::new(Some(1 << 40)),
            delay: Mutex::default(),
            unsupported: Mutex::default(),
            opens: AtomicUsize::new(0),
            loads: AtomicUsize::new(0),
            runs: AtomicUsize::new(0),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Script {
    /// From now on programs fail to load in this way.
    pub fn fail_loads(&self, fault: Fault) {
        *lock(&self.on_load) = fault;
    }

    /// From now on runs fail in this way, after they have written outputs and states.
    pub fn fail_runs(&self, fault: Fault) {
        *lock(&self.on_run) = fault;
    }

    /// From now on the backend sees these devices.
    pub fn see(&self, probe: DeviceProbe) {
        *lock(&self.probe) = probe;
    }

    /// From now on the device has this much free memory.
    pub fn leave_free(&self, bytes: Option<u64>) {
        *lock(&self.free_bytes) = bytes;
    }

    /// From now on a run takes this much longer.
    pub fn slow_down(&self, delay: Duration) {
        *lock(&self.delay) = delay;
    }

    /// Devices opened from now on do not run this op.
    pub fn refuse(&self, op: &'static str) {
        *lock(&self.unsupported) = Some(op);
    }

    /// How often the counter went up so far.
    pub fn count(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::SeqCst)
    }
}

/// Opens fake devices of one kind.
pub struct FakeProvider {
    kind: Device,
    script: Arc<Script>,
}

impl FakeProvider {
    /// A provider with what its devices follow.
    pub fn new(kind: Device) -> (Arc<Self>, Arc<Script>) {
        let script = Arc::new(Script::default());
        (Arc::new(Self { kind, script: Arc::clone(&script) }), script)
    }
}

impl BackendProvider for FakeProvider {
    fn kind(&self) -> Device {
        self.kind
    }

    fn probe(&self) -> DeviceProbe {
        lock(&self.script.probe).clone()
    }

    fn open(&self, _index: u32, _config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
        self.script.opens.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(FakeBackend::new(self.kind.name(), Arc::clone(&self.script))))
    }
}

/// A backend that follows a script.
pub struct FakeBackend {
    name: String,
    inner: ReferenceBackend,
    target: OpSet,
    script: Arc<Script>,
}

impl FakeBackend {
    /// A backend of this name.
    pub fn new(name: &str, script: Arc<Script>) -> Self {
        let target = match *lock(&script.unsupported) {
            Some(op) => OpSet::every_op(name).without(&[op]),
            None => OpSet::every_op(name),
        };
        Self { name: name.to_owned(), inner: ReferenceBackend::default(), target, script }
    }
}

#[derive(Debug)]
struct FakeProgram(Arc<dyn Program>, Arc<Script>);

#[derive(Debug)]
struct FakeContext(Box<dyn Context>, Arc<Script>);

impl Backend for FakeBackend {
    fn name(&self) -> &str {
        &self.name
    }

    fn free_bytes(&self) -> Option<u64> {
        *lock(&self.script.free_bytes)
    }

    fn target(&self) -> &dyn Target {
        &self.target
    }

    fn plan_target(&self) -> &dyn PlanTarget {
        self.inner.plan_target()
    }

    fn packed_bytes(&self, template: &Template) -> Result<usize, BackendError> {
        self.inner.packed_bytes(template)
    }

    fn own_bytes(&self, template: &Template) -> usize {
        self.inner.own_bytes(template)
    }

    fn workspace_bytes(&self, lir: &Lir) -> Result<usize, BackendError> {
        self.inner.workspace_bytes(lir)
    }

    fn load(
        &self,
        template: &Arc<Template>,
        weights: &WeightRegistry,
    ) -> Result<Arc<dyn Program>, BackendError> {
        self.script.loads.fetch_add(1, Ordering::SeqCst);
        let fault = *lock(&self.script.on_load);
        fault.strike()?;
        Ok(Arc::new(FakeProgram(self.inner.load(template, weights)?, Arc::clone(&self.script))))
    }
}

impl Program for FakeProgram {
    fn context(&self, lir: &Lir) -> Result<Box<dyn Context>, BackendError> {
        Ok(Box::new(FakeContext(self.0.context(lir)?, Arc::clone(&self.1))))
    }

    fn kernels(&self) -> Vec<KernelChoice> {
        self.0.kernels()
    }
}

impl Context for FakeContext {
    fn run(&mut self, io: Io<'_, '_>) -> Result<(), BackendError> {
        self.1.runs.fetch_add(1, Ordering::SeqCst);
        let (fault, delay) = (*lock(&self.1.on_run), *lock(&self.1.delay));
        std::thread::sleep(delay);
        let Io { symbols, inputs, outputs, states, control } = io;
        self.0.run(Io { symbols, inputs, outputs: &mut *outputs, states, control })?;
        if fault == Fault::Wrong {
            outputs[0][..4].copy_from_slice(&2.5e3f32.to_le_bytes());
        }
        fault.strike()
    }

    fn bytes(&self) -> (usize, usize) {
        self.0.bytes()
    }
}
