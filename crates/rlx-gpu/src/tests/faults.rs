//! Devices that fail: what a program says then, what a caller's buffers hold, and where the work goes.

use crate::device::DeviceBackend;
use crate::device::driver::{Batch, Call, Driver, Limits, Read, Write, exhausted, lost, refused};
use crate::emulate::Emulator;
use crate::ir::Kernel;
use rlx::backend::{Backend, BackendError, BackendProvider, BackendRegistry, CpuProvider, DeviceProbe};
use rlx::config::Config;
use rlx::devices::{Device, DeviceId, GraphDevices, GraphDevicesOptions};
use rlx::session::SessionError;
use rlx::{CompiledGraph, Session, State, TensorArg};
use rlx_graph::Graph;
use rlx_kernels::schedule::RunControl;
use rlx_tensor::{DimBinding, Tensor};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What fails, and after how many calls of that sort have succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Room for words.
    Allocation,
    /// A kernel's compilation.
    Kernel,
    /// A batch, when its kernels have run.
    MidRun,
    /// Its results, when they are waited for.
    Read,
    /// A word of a self-test's results differs.
    Wrong,
}

#[derive(Debug, Default)]
struct Script {
    fault: Mutex<Option<(Fault, usize)>>,
    binding_words: Option<usize>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Script {
    fn fail(&self, fault: Fault, after: usize) {
        *lock(&self.fault) = Some((fault, after));
    }

    fn heal(&self) {
        *lock(&self.fault) = None;
    }

    /// Whether this call is the one to fail; a device that is lost stays so.
    fn strikes(&self, kind: Fault) -> bool {
        match &mut *lock(&self.fault) {
            Some((fault, 0)) if *fault == kind => true,
            Some((fault, left)) if *fault == kind => {
                *left -= 1;
                false
            }
            _ => false,
        }
    }
}

/// The interpreter, failing as a script says.
struct Failing(Emulator, Arc<Script>);

const NAME: &str = "failing gpu";

impl Driver for Failing {
    type Buffer = <Emulator as Driver>::Buffer;
    type Kernel = Kernel;
    type Work = ();
    type Pending = Vec<u32>;

    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn capabilities(&self) -> Vec<String> {
        Vec::new()
    }

    fn fingerprint(&self) -> String {
        NAME.to_owned()
    }

    fn limits(&self) -> Limits {
        let limits = self.0.limits();
        let binding_words = self.1.binding_words.unwrap_or(limits.binding_words);
        Limits { binding_words, argument_words: 16, grid: 3 }
    }

    fn allocate(&self, what: &str, words: usize) -> Result<Self::Buffer, BackendError> {
        match self.1.strikes(Fault::Allocation) {
            true => Err(exhausted(NAME, what, words)),
            false => self.0.allocate(what, words),
        }
    }

    fn upload(&self, what: &str, buffer: &Self::Buffer, words: &[u32]) -> Result<(), BackendError> {
        self.0.upload(what, buffer, words)
    }

    fn compile(&self, kernel: &Kernel) -> Result<Kernel, BackendError> {
        match self.1.strikes(Fault::Kernel) {
            true => Err(refused(NAME, &format!("kernel {}", kernel.name), "line 7: no")),
            false => self.0.compile(kernel),
        }
    }

    fn work(&self) -> Result<(), BackendError> {
        self.0.work()
    }

    fn submit(&self, work: &mut (), batch: &Batch<'_, Self>) -> Result<Vec<u32>, BackendError> {
        let mut words = self.0.submit(work, &of_the_interpreter(batch))?;
        if self.1.strikes(Fault::MidRun) {
            return Err(lost(NAME, &format!("running {}", batch.graph), "it fell off the bus"));
        }
        if self.1.strikes(Fault::Wrong) {
            words[5] ^= 0x0100_0000;
        }
        Ok(words)
    }

    fn read(&self, work: &mut (), pending: Vec<u32>) -> Result<Vec<u32>, BackendError> {
        match self.1.strikes(Fault::Read) {
            true => Err(lost(NAME, "reading results", "it fell off the bus")),
            false => self.0.read(work, pending),
        }
    }
}

fn of_the_interpreter<'r>(batch: &Batch<'r, Failing>) -> Batch<'r, Emulator> {
    let write = |w: &Write<'r, _>| Write { to: w.to, at: w.at, words: w.words.clone() };
    let call = |c: &Call<'r, Failing>| Call {
        kernel: c.kernel,
        arguments: c.arguments,
        bound: c.bound.clone(),
        grid: c.grid,
    };
    let read = |r: &Read<'r, _>| Read { from: r.from, at: r.at, count: r.count };
    Batch {
        graph: batch.graph,
        arena: batch.arena,
        arguments: batch.arguments,
        pitch: batch.pitch,
        writes: batch.writes.iter().map(write).collect(),
        calls: batch.calls.iter().map(call).collect(),
        reads: batch.reads.iter().map(read).collect(),
    }
}

struct FailingProvider(Arc<Script>);

impl BackendProvider for FailingProvider {
    fn kind(&self) -> Device {
        Device::Gpu
    }

    fn probe(&self) -> DeviceProbe {
        DeviceProbe::Present(1)
    }

    fn open(&self, _index: u32, _config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
        Ok(Arc::new(DeviceBackend::open(Failing(Emulator, Arc::clone(&self.0)))?))
    }
}

fn graph() -> Graph {
    r#"graph "g" {
  input @x : f32[rows, 4]
  param @w : f32[3, 4]
  %2 : f32[rows, 3] = linear(@x, @w) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %3 : f32[rows, 3] = softmax(%2) {axis=1}
  return "y": %3
}"#
    .parse()
    .unwrap()
}

/// The values of the only output.
fn floats(outputs: &[(String, Tensor)]) -> Vec<f32> {
    outputs[0].1.as_slice().unwrap().to_vec()
}

const W: [f32; 12] = [0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7, -0.8, 0.9, 1.0, -1.1, 1.2];
const X: [f32; 8] = [1.0, 2.0, -3.0, 4.0, 0.5, -0.25, 0.125, 2.0];

fn x() -> [(&'static str, TensorArg<'static>); 1] {
    [("x", TensorArg::typed(&[2, 4], &X))]
}

fn session(script: &Arc<Script>) -> Session {
    let backend = DeviceBackend::open(Failing(Emulator, Arc::clone(script))).unwrap();
    Session::with_backend(Arc::new(backend))
}

fn contains(error: &impl std::fmt::Display, parts: &[&str]) {
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text:?} should name {parts:?}");
}

#[test]
fn a_device_that_computes_something_else_does_not_open() {
    let script = Arc::new(Script::default());
    for (after, kernel) in [(0, "self_test_floats"), (1, "self_test_integers"), (2, "self_test_lanes")] {
        script.fail(Fault::Wrong, after);
        let error = DeviceBackend::open(Failing(Emulator, Arc::clone(&script))).map(drop).unwrap_err();
        contains(&error, &[NAME, kernel, "element 5", "is right"]);
        assert!(error.is_device_fault());
    }
}

fn compiled(script: &Arc<Script>) -> CompiledGraph {
    let compiled = session(script).compile(&graph()).unwrap();
    compiled.set_param("w", &Tensor::from_slice(&[3, 4], &W).unwrap()).unwrap();
    compiled
}

#[test]
fn a_kernel_that_is_refused_is_named_with_the_device_and_the_cause() {
    let script = Arc::new(Script::default());
    let compiled = compiled(&script);
    script.fail(Fault::Kernel, 1);
    let error = compiled.run(&x()).unwrap_err();
    contains(&error, &["kernel softmax", NAME, "line 7: no"]);
    assert!(error.is_device_fault());
    script.heal();
    assert_eq!(compiled.run(&x()).unwrap()[0].1.dims(), [2, 3]);
}

#[test]
fn every_allocation_that_fails_says_what_for_and_the_next_run_is_whole() {
    let script = Arc::new(Script::default());
    let expected = floats(&compiled(&script).run(&x()).unwrap());
    for (after, what) in [(0, "w on"), (1, "the arena of a run on"), (2, "the arguments of a run on")] {
        let compiled = compiled(&script);
        script.fail(Fault::Allocation, after);
        let error = compiled.run(&x()).unwrap_err();
        contains(&error, &[what, NAME, "bytes"]);
        assert!(error.is_device_fault());
        script.heal();
        assert_eq!(floats(&compiled.run(&x()).unwrap()), expected, "{what}");
    }
}

#[test]
fn an_arena_beyond_one_binding_is_refused_with_the_numbers() {
    let script = Arc::new(Script { binding_words: Some(100), ..Script::default() });
    let error = compiled(&script).run(&x()).unwrap_err();
    contains(&error, &["bytes for the arena of a run in one binding, of at most 400 bytes, on", NAME]);
}

/// A device that is lost in mid-run has written outputs; the caller's buffers hold what they held.
#[test]
fn a_device_lost_in_mid_run_leaves_the_callers_buffers_alone() {
    for fault in [Fault::MidRun, Fault::Read] {
        let script = Arc::new(Script::default());
        let compiled = compiled(&script);
        let lir = compiled.specialize(&DimBinding::new().with("rows", 2)).unwrap();
        let mut context = compiled.context(&lir).unwrap();
        let mut y = [7.5f32; 6];
        let mut run = |y: &mut [f32; 6]| {
            let mut outputs = [("y", bytemuck::bytes_of_mut(y))];
            context.run_into(&mut State::default(), &x(), &mut outputs, RunControl::default())
        };
        script.fail(fault, 0);
        let error = run(&mut y).unwrap_err();
        contains(&error, &["the device is lost", NAME, "it fell off the bus"]);
        assert!(error.is_device_fault());
        assert_eq!(y, [7.5; 6]);
        script.heal();
        run(&mut y).unwrap();
        let sums: Vec<f32> = y.chunks(3).map(|row| row.iter().sum()).collect();
        assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-6), "{y:?}");
    }
}

#[test]
fn work_goes_on_along_the_chain_and_comes_back_when_the_device_does() {
    const GPU: DeviceId = DeviceId { kind: Device::Gpu, index: 0 };
    let script = Arc::new(Script::default());
    let backends = BackendRegistry::empty();
    backends.register(Arc::new(CpuProvider)).unwrap();
    backends.register(Arc::new(FailingProvider(Arc::clone(&script)))).unwrap();
    let mut config = Config::default();
    config.threads = std::num::NonZeroUsize::new(1);
    let mut options = GraphDevicesOptions::from_config(&config);
    (options.backends, options.folder) = (backends, None);
    let devices = GraphDevices::open(graph(), options);
    devices.set_param("w", W.as_slice()).unwrap();
    let chain = [GPU, DeviceId::CPU];
    let (first, expected) = devices.run_try(&chain, &x()).unwrap();
    assert_eq!(first, GPU);
    for fault in [Fault::MidRun, Fault::Read] {
        script.fail(fault, 0);
        let error = devices.run_try(&[GPU], &x()).unwrap_err();
        contains(&error, &["gpu", NAME, "it fell off the bus"]);
        let (device, found) = devices.run_try(&chain, &x()).unwrap();
        assert_eq!(device, DeviceId::CPU);
        let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-6;
        let (a, b) = (floats(&found), floats(&expected));
        assert!(a.iter().zip(&b).all(close), "{a:?} {b:?}");
        script.heal();
        let (device, found) = devices.run_try(&chain, &x()).unwrap();
        assert_eq!((device, floats(&found)), (GPU, b));
    }
    // A hint is not left for another device.
    script.fail(Fault::MidRun, 0);
    assert!(devices.run_chain(Some(GPU), &x()).is_err());
}
