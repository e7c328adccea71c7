//! Devices that fail: what a program says then, what a caller's buffers hold, and where the work goes.

use crate::device::DeviceBackend;
use crate::device::driver::{Batch, Call, Driver, Limits, Read, Write, exhausted, lost, refused};
use crate::device::replay::signature;
use crate::emulate::Emulator;
use crate::ir::Kernel;
use crate::lower::library::Library;
use rlx::backend::cpu::Precision;
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
pub(super) enum Fault {
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
    /// A library's product.
    Library,
}

#[derive(Debug, Default)]
pub(super) struct Script {
    fault: Mutex<Option<(Fault, usize)>>,
    binding_words: Option<usize>,
    moved: Mutex<Moved>,
    /// Of the last batch.
    pub(super) signature: Mutex<Vec<u64>>,
}

/// Words that batches wrote and read, that went up or down apart from them, and batches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Moved {
    written: usize,
    read: usize,
    up: usize,
    down: usize,
    batches: usize,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Script {
    pub(super) fn fail(&self, fault: Fault, after: usize) {
        *lock(&self.fault) = Some((fault, after));
    }

    /// What was moved since it was asked for last.
    fn moved(&self) -> Moved {
        std::mem::take(&mut lock(&self.moved))
    }

    pub(super) fn heal(&self) {
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
pub(super) struct Failing(pub Emulator, pub Arc<Script>);

pub(super) const NAME: &str = "failing gpu";

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

    fn matrix_units(&self) -> bool {
        self.0.units
    }

    fn library(&self) -> Option<Result<Library, String>> {
        self.0.library()
    }

    fn limits(&self) -> Limits {
        let limits = self.0.limits();
        let binding_words = self.1.binding_words.unwrap_or(limits.binding_words);
        Limits { binding_words, argument_words: 16, grid: 3, compact: false, dots: true }
    }

    fn allocate(&self, what: &str, words: usize) -> Result<Self::Buffer, BackendError> {
        match self.1.strikes(Fault::Allocation) {
            true => Err(exhausted(NAME, what, words)),
            false => self.0.allocate(what, words),
        }
    }

    fn upload(&self, what: &str, to: &Self::Buffer, at: usize, words: &[u32]) -> Result<(), BackendError> {
        lock(&self.1.moved).up += words.len();
        self.0.upload(what, to, at, words)
    }

    fn download(
        &self,
        what: &str,
        from: &Self::Buffer,
        at: usize,
        count: usize,
    ) -> Result<Vec<u32>, BackendError> {
        match self.1.strikes(Fault::Read) {
            true => Err(lost(NAME, &format!("reading {what}"), "it fell off the bus")),
            false => {
                lock(&self.1.moved).down += count;
                self.0.download(what, from, at, count)
            }
        }
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
        if let Some(call) = batch.calls.iter().find(|call| call.kernel.gemm.is_some())
            && self.1.strikes(Fault::Library)
        {
            let during = format!("running {}, kernel {}", batch.graph, call.kernel.name);
            return Err(refused(NAME, &during, "no algorithm"));
        }
        let mut words = self.0.submit(work, &of_the_interpreter(batch))?;
        let number = |of: *const Self::Buffer| of as u64;
        let kernel = |of: &Kernel| std::ptr::from_ref(of) as u64;
        *lock(&self.1.signature) = signature(batch, kernel, |of| number(of), Kernel::told);
        let mut moved = lock(&self.1.moved);
        moved.written += batch.writes.iter().map(|write| write.words.len()).sum::<usize>();
        (moved.read, moved.batches) = (moved.read + batch.words_read(), moved.batches + 1);
        drop(moved);
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
        further: batch.further,
        arguments: batch.arguments,
        table: batch.table,
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
        Ok(Arc::new(DeviceBackend::open(Failing(Emulator::default(), Arc::clone(&self.0)))?))
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

/// The interpreter with bindings of at most so many words.
pub(super) fn narrow(binding_words: usize) -> Arc<dyn Backend> {
    let script = Script { binding_words: Some(binding_words), ..Script::default() };
    Arc::new(DeviceBackend::open(Failing(Emulator::default(), Arc::new(script))).unwrap())
}

fn session(script: &Arc<Script>) -> Session {
    let backend = DeviceBackend::open(Failing(Emulator::default(), Arc::clone(script))).unwrap();
    Session::with_backend(Arc::new(backend))
}

pub(super) fn contains(error: &impl std::fmt::Display, parts: &[&str]) {
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text:?} should name {parts:?}");
}

#[test]
fn a_device_that_computes_something_else_does_not_open() {
    let script = Arc::new(Script::default());
    for (after, kernel) in [(0, "self_test_floats"), (1, "self_test_integers"), (2, "self_test_lanes")] {
        script.fail(Fault::Wrong, after);
        let error =
            DeviceBackend::open(Failing(Emulator::default(), Arc::clone(&script))).map(drop).unwrap_err();
        contains(&error, &[NAME, kernel, "element 5", "is right"]);
        assert!(error.is_device_fault());
    }
}

#[test]
fn matrix_units_that_compute_something_else_are_not_used_and_the_device_says_so() {
    let script = Arc::new(Script::default());
    let driver = || Failing(Emulator { units: true, ..Emulator::default() }, Arc::clone(&script));
    let open = |precision| DeviceBackend::set_up(driver(), None, precision);
    let told = || open(Precision::Bf16).unwrap().capabilities().join(", ");
    assert_eq!(told(), "bf16 by matrix units, packed weights by matrix units");
    let told_in_floats = || open(Precision::F32).unwrap().capabilities().join(", ");
    assert_eq!(told_in_floats(), "f32, packed weights by matrix units");
    let apart = "element 5 has other bits among 20 rows than among 130";
    let causes =
        [(Fault::Wrong, 4, "element 5 is"), (Fault::Wrong, 5, apart), (Fault::Kernel, 4, "line 7: no")];
    for (fault, after, cause) in causes {
        script.fail(fault, after);
        contains(&told(), &["bf16 without matrix units, whose test failed: ", cause]);
    }
    let without = "f32, packed weights without matrix units, whose test failed: ";
    let apart = "element 5 of 20 rows by Q6_K is";
    let causes = [(Fault::Wrong, 5, "element 5 of 130 rows by Q8_0 is"), (Fault::Wrong, 11, apart)];
    for (fault, after, cause) in causes.into_iter().chain([(Fault::Kernel, 5, "line 7: no")]) {
        script.fail(fault, after);
        contains(&told_in_floats(), &[without, cause]);
    }
    script.fail(Fault::MidRun, 4);
    contains(&open(Precision::Bf16).map(drop).unwrap_err(), &["fell off the bus"]);
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
fn what_one_binding_does_not_hold_is_refused_with_the_numbers() {
    let script = Arc::new(Script { binding_words: Some(100), ..Script::default() });
    let rows = 30;
    let x = vec![0.5f32; rows * 4];
    let error = compiled(&script).run(&[("x", TensorArg::typed(&[rows, 4], &x))]).unwrap_err();
    contains(
        &error,
        &["360 bytes for the result of linear at", "in one binding", "at most 256 bytes", "another device"],
    );
    assert!(error.is_device_fault());
}

/// A state is named with its bytes, the limit and what needs less.
#[test]
fn a_cache_beyond_one_binding_is_refused_by_name() {
    let script = Arc::new(Script { binding_words: Some(CACHE / 2 - 1), ..Script::default() });
    let error = Decode::on(&session(&script)).step(0).unwrap_err();
    let (bytes, limit) = (CACHE / 2 * 4, (CACHE / 2 - 1) * 4);
    contains(
        &error,
        &[
            "state k",
            NAME,
            &bytes.to_string(),
            &format!("at most {limit} bytes"),
            "shorter context",
            "type of cache",
        ],
    );
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

/// A step of a decoder's attention: one row of two heads, keys and values that the cache keeps.
fn cached() -> Graph {
    r#"graph "cached" {
  input @q : f32[rows, 16]
  input @starts : i32[2]
  input @past : i32[1]
  input @table : i32[1, blocks]
  state @k : f16[blocks, 2, 8, 64]
  state @v : f16[blocks, 2, 64, 8]
  %6 : f32[rows, 16] = attention(@q, @q, @q, @starts, @past, @table, @k, @v) {heads=2, kv_heads=2, head_dim=8, scale=0.3, causal=true, window=none, softcap=none, mask=false, cache=true}
  return "y": %6
}"#
    .parse()
    .unwrap()
}

/// Words of both caches of 3 blocks.
const CACHE: usize = 2 * 3 * 2 * 8 * 64;

struct Decode {
    compiled: CompiledGraph,
    state: State,
}

impl Decode {
    fn on(session: &Session) -> Self {
        let compiled = session.compile(&cached()).unwrap();
        let state = compiled.new_state(&DimBinding::new().with("blocks", 3)).unwrap();
        Decode { compiled, state }
    }

    fn step(&mut self, past: i32) -> Result<Vec<f32>, SessionError> {
        let q: Vec<f32> = (0..16).map(|i| ((i * 7 + past * 5) % 11) as f32 / 4.0 - 1.0).collect();
        let inputs = [
            ("q", TensorArg::typed(&[1, 16], &q)),
            ("starts", TensorArg::typed(&[2], &[0i32, 1])),
            ("past", TensorArg::typed(&[1], std::slice::from_ref(&past))),
            ("table", TensorArg::typed(&[1, 3], &[2i32, 0, 1])),
        ];
        Ok(floats(&self.compiled.run_with(&mut self.state, &inputs)?))
    }
}

#[test]
fn a_cache_stays_on_the_device_and_only_results_come_back() {
    let script = Arc::new(Script::default());
    let (mut device, mut cpu) =
        (Decode::on(&session(&script)), Decode::on(&Session::new(Device::Cpu).unwrap()));
    script.moved();
    for past in 0..70 {
        let (found, expected) = (device.step(past).unwrap(), cpu.step(past).unwrap());
        let close = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(close, "after {past}: {found:?} {expected:?}");
        let moved = script.moved();
        let small = moved.written + moved.read < 1000 && moved.down == 0 && moved.batches == 1;
        assert!(small && moved.up == if past == 0 { CACHE } else { 0 }, "after {past}: {moved:?}");
    }
    for cache in 0..2 {
        assert!(device.state.is_resident(cache) && !cpu.state.is_resident(cache));
        let found = device.state.buffer(cache).unwrap().to_vec();
        assert_eq!(found, cpu.state.buffer(cache).unwrap());
    }
    assert_eq!(script.moved().down, CACHE);
    device.step(70).unwrap();
    assert_eq!(script.moved().up, 0, "to have looked at a cache does not move it");
    // What the host writes goes up again.
    device.state.buffer_mut(0).unwrap()[0] ^= 1;
    device.step(71).unwrap();
    assert_eq!(script.moved().up, CACHE / 2);
}

#[test]
fn a_cache_goes_from_device_to_device_with_its_content() {
    let (first, second) = (Arc::new(Script::default()), Arc::new(Script::default()));
    let (mut device, mut cpu) =
        (Decode::on(&session(&first)), Decode::on(&Session::new(Device::Cpu).unwrap()));
    let other = session(&second).compile(&cached()).unwrap();
    let at_home = Session::new(Device::Cpu).unwrap().compile(&cached()).unwrap();
    for past in 0..3 {
        device.step(past).unwrap();
        cpu.step(past).unwrap();
    }
    for compiled in [other, at_home] {
        device.compiled = compiled;
        let (found, expected) = (device.step(3).unwrap(), cpu.step(3).unwrap());
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} {expected:?}");
    }
    assert_eq!(first.moved().down, CACHE);
    assert_eq!((second.moved().down, device.state.is_resident(0)), (CACHE, false));
}

/// A cache on a device that is lost is lost with it: that is said wherever it is used from then on, and no older content takes its place.
#[test]
fn a_cache_that_was_lost_is_an_error_on_every_device() {
    let script = Arc::new(Script::default());
    let mut decode = Decode::on(&session(&script));
    decode.step(0).unwrap();
    script.fail(Fault::Read, 0);
    contains(&decode.step(1).unwrap_err(), &["lost", NAME]);
    contains(&decode.state.buffer(0).unwrap_err(), &["lost", NAME, "state k"]);
    decode.compiled = Session::new(Device::Cpu).unwrap().compile(&cached()).unwrap();
    let error = decode.step(1).unwrap_err();
    contains(&error, &["lost", NAME, "state k"]);
    assert!(error.is_device_fault());
}

/// A step that fails in mid-run and is run again gives what it would have given.
#[test]
fn a_step_that_failed_can_be_run_again_on_the_same_cache() {
    let script = Arc::new(Script::default());
    let (mut failed, mut plain) = (Decode::on(&session(&script)), Decode::on(&session(&Arc::default())));
    for past in 0..4 {
        script.fail(Fault::MidRun, 0);
        contains(&failed.step(past).unwrap_err(), &["lost", NAME]);
        script.heal();
        assert_eq!(failed.step(past).unwrap(), plain.step(past).unwrap(), "after {past}");
    }
}

/// A decode step launches the same kernels on the same memory as the one before, whatever is in it: a driver may replay it.
#[test]
fn decode_steps_have_one_signature_and_prompts_another() {
    let script = Arc::new(Script::default());
    let mut decode = Decode::on(&session(&script));
    let signatures: Vec<Vec<u64>> = (0..4)
        .map(|past| {
            decode.step(past).unwrap();
            std::mem::take(&mut *lock(&script.signature))
        })
        .collect();
    assert!(signatures[0].len() > 8, "{signatures:?}");
    assert!(signatures.iter().all(|s| *s == signatures[0]), "{signatures:?}");
    let other = Decode::on(&session(&script)).step(0).map(|_| std::mem::take(&mut *lock(&script.signature)));
    assert_ne!(other.unwrap(), signatures[0], "another state is other memory");
}
