//! NVIDIA's cards through CUDA. Everything that decides what is launched is shared with the other devices; here it is handed to the
//! driver's library, which is loaded when a card is looked for.

#![forbid(unsafe_code)]

use crate::device::DeviceBackend;
use crate::device::driver::{Batch, Driver, Limits, exhausted, lost, refused};
use crate::device::replay::{Replays, Step, signature};
use crate::device::tune::Tuner;
use crate::ffi::blas::{self, Blas};
use crate::ffi::cuda::{self as library, Card, Fault, Function, Graph, Queue};
use crate::ir::Kernel;
use crate::lower::library::Library;
use crate::print::cuda as text;
use rlx::aot::AotCache;
use rlx::aot::container::Stamp;
use rlx::backend::cpu::Precision;
use rlx::backend::{Backend, BackendError, BackendProvider, DeviceProbe};
use rlx::config::Config;
use rlx::devices::Device;
use rlx::session::SessionError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The cards that CUDA's driver sees, as `cuda:0`, `cuda:1`, ..
#[derive(Debug, Clone, Copy, Default)]
pub struct CudaProvider;

impl BackendProvider for CudaProvider {
    fn kind(&self) -> Device {
        Device::Cuda
    }

    fn probe(&self) -> DeviceProbe {
        if !library::has_driver() {
            return DeviceProbe::Absent(
                "no CUDA driver (libcuda) is installed; NVIDIA's display driver has it".to_owned(),
            );
        }
        if !library::has_compiler() {
            return DeviceProbe::Absent(
                "CUDA's run-time compiler (libnvrtc) is not found; the CUDA toolkit and the package nvidia-cuda-nvrtc have it"
                    .to_owned(),
            );
        }
        match Card::count() {
            Ok(0) => DeviceProbe::Absent("the CUDA driver sees no card".to_owned()),
            Ok(count) => DeviceProbe::Present(u32::try_from(count).unwrap_or(u32::MAX)),
            Err(fault) => DeviceProbe::Absent(format!("the CUDA driver does not start: {fault}")),
        }
    }

    fn open(&self, index: u32, config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
        let asked = config.cuda_blas.is_some_and(|switch| switch.0);
        let card = Cuda::open(index, AotCache::from_config(config), asked)?;
        let tuner = Tuner::of(config, &card);
        Ok(Arc::new(DeviceBackend::set_up(card, tuner, config.precision.unwrap_or_default())?))
    }

    fn precision_of_bf16(&self, index: u32) -> Precision {
        let units = Card::open(index as usize).and_then(|card| card.capability());
        if units.is_ok_and(|(major, _)| has_matrix_units(major)) { Precision::Bf16 } else { Precision::F32 }
    }
}

/// The architecture whose machine code a card of this capability runs; with its own instructions where it has such.
fn architecture(major: i32, minor: i32) -> String {
    let own = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{own}")
}

/// Whether cards of this capability multiply warps' bfloat16 as kernels ask them to: the architectures that this is known of. A card whose
/// results differ is found when it is opened.
fn has_matrix_units(major: i32) -> bool {
    matches!(major, 8 | 9 | 10 | 12)
}

/// Memory that NVIDIA advises to give cuBLASLt on cards of this capability.
fn workspace_mib(major: i32) -> usize {
    if major >= 9 { 32 } else { 4 }
}

/// cuBLASLt for a card, or why it cannot be used.
fn open_blas(card: &Card) -> Result<Blas, String> {
    match blas::missing() {
        Some(reason) => Err(reason),
        None => Blas::open(card).map_err(|fault| format!("it does not start: {fault}")),
    }
}

/// A card.
struct Cuda {
    card: Card,
    name: String,
    architecture: String,
    matrix_units: bool,
    /// If it was asked for, or why it cannot be used.
    blas: Option<Result<Blas, String>>,
    /// Words that it may use.
    workspace: usize,
    versions: String,
    cache: Option<AotCache>,
    counted: AtomicU64,
}

/// Something that no two things share.
struct Numbered<T> {
    inner: T,
    number: u64,
}

/// A kernel that is loaded, or that cuBLASLt takes the place of.
struct Loaded {
    function: Option<Function>,
    kernel: Kernel,
}

/// What runs of one context keep.
struct Work {
    queue: Queue,
    replays: Replays<Graph>,
}

/// A batch on its way.
struct Submitted {
    graph: String,
    words: usize,
}

impl Cuda {
    fn open(index: u32, cache: Option<AotCache>, blas: bool) -> Result<Self, BackendError> {
        let device = format!("cuda:{index}");
        let failed = |fault: Fault| lost(&device, "opening it", fault);
        let card = Card::open(index as usize).map_err(failed)?;
        let (major, minor) = card.capability().map_err(failed)?;
        let name = format!("cuda ({})", card.name().map_err(failed)?);
        let (driver, (compiler, update)) = (library::driver_version(), library::compiler_version());
        let versions = format!("driver {driver}, nvrtc {compiler}.{update}");
        let (architecture, matrix_units) = (architecture(major, minor), has_matrix_units(major));
        let blas = blas.then(|| open_blas(&card));
        let (workspace, counted) = (workspace_mib(major) << 18, AtomicU64::new(0));
        Ok(Cuda { card, name, architecture, matrix_units, blas, workspace, versions, cache, counted })
    }

    fn numbered<T>(&self, inner: T) -> Numbered<T> {
        Numbered { inner, number: self.counted.fetch_add(1, Ordering::Relaxed) }
    }

    fn failed(&self, during: &str, words: usize, fault: &Fault) -> BackendError {
        match (fault.exhausted, fault.refused) {
            (true, _) => exhausted(&self.name, during, words),
            (_, true) => refused(&self.name, during, fault),
            _ => lost(&self.name, during, fault),
        }
    }

    /// What machine code in the cache is for.
    fn stamp(&self) -> Stamp {
        Stamp {
            kind: "kernel".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            device: format!("cuda, {}", self.versions),
            isa: self.architecture.clone(),
            precision: String::new(),
            packing: [0; 32],
        }
    }

    /// Machine code of a kernel: from the cache, where there is one, else compiled now.
    fn code(&self, kernel: &Kernel) -> Result<Vec<u8>, BackendError> {
        let text = text::print(kernel);
        let (stamp, key) = (self.stamp(), *blake3::hash(text.as_bytes()).as_bytes());
        if let Some(code) = self.cache.as_ref().and_then(|cache| cache.kernel(&stamp, &key)) {
            return Ok(code);
        }
        let code = library::compile(&text, &self.architecture);
        let code = code.map_err(|log| refused(&self.name, &format!("kernel {}", kernel.name), log))?;
        if let Some(cache) = &self.cache {
            cache.store_kernel(&stamp, &key, &code);
        }
        Ok(code)
    }

    fn launch_all(&self, queue: &Queue, batch: &Batch<'_, Self>) -> Result<(), BackendError> {
        for call in &batch.calls {
            let Loaded { function, kernel } = &call.kernel.inner;
            let during = || format!("running {}, kernel {}", batch.graph, kernel.name);
            let failed = |fault: Fault| self.failed(&during(), 0, &fault);
            let buffers = std::iter::once(batch.arena).chain(call.bound.iter().copied());
            let buffers: Vec<_> = buffers.map(|buffer| &buffer.inner).collect();
            match (function, &self.blas, &kernel.gemm) {
                (Some(function), ..) => {
                    let arguments = (&batch.arguments.inner, call.arguments);
                    let launched = queue.launch(function, call.grid, kernel.lanes, arguments, &buffers);
                    launched.map_err(failed)?;
                }
                (None, Some(Ok(blas)), Some(gemm)) => {
                    let told = call.told(batch.table, kernel.told()).iter().map(|&word| word as i32);
                    let product = gemm.call(kernel, &told.collect::<Vec<_>>());
                    let product = product.map_err(|cause| refused(&self.name, &during(), cause))?;
                    if let Some(product) = product {
                        let memory = (buffers[0], &buffers[1..], kernel.weights() as usize);
                        blas.multiply(queue, &product, memory).map_err(failed)?;
                    }
                }
                _ => return Err(refused(&self.name, &during(), "it is left to cuBLASLt, which is not open")),
            }
        }
        Ok(())
    }

    /// The kernels of a batch: one by one, or as they were recorded.
    fn launch(&self, work: &mut Work, batch: &Batch<'_, Self>) -> Result<(), BackendError> {
        let Work { queue, replays } = work;
        let during = format!("running {}", batch.graph);
        let failed = |fault: Fault| self.failed(&during, 0, &fault);
        let told = |kernel: &Numbered<Loaded>| kernel.inner.kernel.told();
        let step = replays.next(signature(batch, |kernel| kernel.number, |buffer| buffer.number, told));
        if step == Step::Record {
            let mut refusal = None;
            let recorded = queue.record(|queue| {
                refusal = self.launch_all(queue, batch).err();
                Ok(())
            });
            if let Some(error) = refusal {
                return Err(error);
            }
            if let Some(graph) = recorded.map_err(failed)? {
                replays.keep(graph);
            }
        }
        match replays.last() {
            Some(graph) => queue.replay(graph).map_err(failed),
            None => self.launch_all(queue, batch),
        }
    }
}

/// What the arena of a debug build holds before a run writes it: NaNs, so that a read of nothing shows.
const POISON: u32 = 0x7fc0_dead;

impl Driver for Cuda {
    type Buffer = Numbered<library::Words>;
    type Kernel = Numbered<Loaded>;
    type Work = Work;
    type Pending = Submitted;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn capabilities(&self) -> Vec<String> {
        let memory = self.card.memory().map_or(0, |(_, all)| all >> 20);
        vec![self.architecture.clone(), self.versions.clone(), format!("{memory} MiB")]
    }

    fn fingerprint(&self) -> String {
        format!("{} {} {} {}", env!("CARGO_PKG_VERSION"), self.name, self.architecture, self.versions)
    }

    /// A kernel counts elements with 31 bits.
    fn limits(&self) -> Limits {
        let most = i32::MAX as usize;
        Limits { binding_words: most, argument_words: 4, grid: most, compact: false, dots: true }
    }

    fn matrix_units(&self) -> bool {
        self.matrix_units
    }

    fn library(&self) -> Option<Result<Library, String>> {
        let library = |blas: &Blas| {
            let (workspace, version) = (self.workspace, blas.version());
            Library { rows: Library::ROWS, width: Library::WIDTH, workspace, version }
        };
        self.blas.as_ref().map(|blas| blas.as_ref().map(library).map_err(String::clone))
    }

    fn free_bytes(&self) -> Option<u64> {
        self.card.memory().ok().map(|(free, _)| free as u64)
    }

    fn allocate(&self, what: &str, words: usize) -> Result<Self::Buffer, BackendError> {
        let words_of = self.card.allocate(words).map_err(|fault| self.failed(what, words, &fault))?;
        Ok(self.numbered(words_of))
    }

    fn upload(&self, what: &str, to: &Self::Buffer, at: usize, words: &[u32]) -> Result<(), BackendError> {
        let written = self.card.write(&to.inner, at, words);
        written.map_err(|fault| self.failed(&format!("writing {what}"), words.len(), &fault))
    }

    fn download(
        &self,
        what: &str,
        from: &Self::Buffer,
        at: usize,
        count: usize,
    ) -> Result<Vec<u32>, BackendError> {
        let read = self.card.read(&from.inner, at, count);
        read.map_err(|fault| self.failed(&format!("reading {what}"), count, &fault))
    }

    fn compile(&self, kernel: &Kernel) -> Result<Self::Kernel, BackendError> {
        let load = || {
            let function = self.card.load(self.code(kernel)?, text::ENTRY);
            function.map_err(|fault| refused(&self.name, &format!("kernel {}", kernel.name), fault))
        };
        // One that a library computes is text for nothing but the interpreter.
        let function = if kernel.gemm.is_none() { Some(load()?) } else { None };
        Ok(self.numbered(Loaded { function, kernel: kernel.clone() }))
    }

    fn work(&self) -> Result<Work, BackendError> {
        let queue = self.card.queue().map_err(|fault| self.failed("a queue of work", 0, &fault))?;
        Ok(Work { queue, replays: Replays::default() })
    }

    fn submit(&self, work: &mut Work, batch: &Batch<'_, Self>) -> Result<Submitted, BackendError> {
        let during = format!("running {}", batch.graph);
        let failed = |fault: Fault| self.failed(&during, 0, &fault);
        let up: usize = batch.writes.iter().map(|write| write.words.len()).sum();
        work.queue.reserve(up, batch.words_read()).map_err(failed)?;
        if cfg!(debug_assertions) {
            for arena in batch.arenas() {
                work.queue.fill(&arena.inner, POISON).map_err(failed)?;
            }
        }
        let mut through = 0;
        for write in &batch.writes {
            work.queue.write(through, &write.to.inner, write.at, &write.words).map_err(failed)?;
            through += write.words.len();
        }
        self.launch(work, batch)?;
        let mut to = 0;
        for read in &batch.reads {
            work.queue.read(&read.from.inner, read.at, read.count, to).map_err(failed)?;
            to += read.count;
        }
        Ok(Submitted { graph: batch.graph.to_owned(), words: to })
    }

    fn read(&self, work: &mut Work, pending: Submitted) -> Result<Vec<u32>, BackendError> {
        let during = format!("running {}", pending.graph);
        work.queue.wait().map_err(|fault| self.failed(&during, 0, &fault))?;
        Ok(work.queue.came_down()[..pending.words].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlx::backend::BackendRegistry;
    use rlx::devices::DeviceId;

    #[test]
    fn an_architecture_is_named_as_the_compiler_names_it() {
        let names =
            [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)].map(|(major, minor)| architecture(major, minor));
        assert_eq!(names, ["sm_75", "sm_80", "sm_89", "sm_90a", "sm_120a"]);
    }

    /// The compiler needs no card.
    #[test]
    #[ignore = "needs libnvrtc: cargo xtask nvrtc installs it and runs this"]
    fn a_text_becomes_machine_code_and_a_wrong_one_a_log() {
        assert!(library::has_compiler(), "libnvrtc is not found");
        let text = "extern \"C\" __global__ void kernel(int *x) { x[threadIdx.x] += 1; }";
        for architecture in ["sm_75", "sm_80", "sm_90a", "sm_120a"] {
            let code = library::compile(text, architecture).unwrap();
            assert!(code.starts_with(b"\x7fELF") && code.len() > 500, "{architecture}");
        }
        let log = library::compile("extern \"C\" __global__ void kernel() { y = 1; }", "sm_80").unwrap_err();
        assert!(log.contains("identifier \"y\" is undefined"), "{log}");
        println!("nvrtc {:?}", library::compiler_version());
    }

    /// Holds on every machine: where there is no driver or no card, the probe says so in a line, and opening a card is an error with the
    /// same words.
    #[test]
    fn a_machine_without_a_card_says_what_is_missing() {
        let registry = BackendRegistry::empty();
        registry.register(Arc::new(CudaProvider)).unwrap();
        let device = DeviceId { kind: Device::Cuda, index: 0 };
        match registry.probe(Device::Cuda).unwrap() {
            DeviceProbe::Present(count) => println!("{count} cards"),
            DeviceProbe::Absent(reason) => {
                assert!(reason.contains("CUDA") && !reason.contains('\n'), "{reason}");
                let error = registry.open(device, &Config::default()).map(drop).unwrap_err();
                assert!(error.to_string().contains(&reason), "{error}");
                assert!(error.is_device_fault());
            }
        }
    }
}
