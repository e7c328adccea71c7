//! What a device must do for a backend: hold words, compile kernels, run a batch. What a batch contains is decided elsewhere, for every
//! device alike.

use crate::ir::Kernel;
use crate::lower::library::Library;
use rlx::backend::BackendError;
use rlx_tensor::time::Instant;
use std::fmt;
use std::sync::OnceLock;
use std::time::Duration;

/// What a device takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Words that one binding may have.
    pub binding_words: usize,
    /// The first argument of a call stands at a multiple of so many words.
    pub argument_words: usize,
    /// Programs along the first axis of a grid at most.
    pub grid: usize,
    /// Whether kernels should be of little text: the device's compiler takes seconds for one of much.
    pub compact: bool,
    /// Whether kernels may multiply four bytes at a time.
    pub dots: bool,
}

/// Words to be written before the first kernel.
pub(crate) struct Write<'r, B> {
    pub to: &'r B,
    pub at: usize,
    pub words: Vec<u32>,
}

/// A kernel to be run.
pub(crate) struct Call<'r, D: Driver + ?Sized> {
    pub kernel: &'r D::Kernel,
    /// The first word of its arguments.
    pub arguments: usize,
    /// What it binds behind arguments and arena: weights, then states, then more of the arena.
    pub bound: Vec<&'r D::Buffer>,
    pub grid: [usize; 2],
}

/// Words to be read after the last kernel.
pub(crate) struct Read<'r, B> {
    pub from: &'r B,
    pub at: usize,
    pub count: usize,
}

/// One run: words to write, kernels in order, ranges to read. A device makes one submission of it.
pub(crate) struct Batch<'r, D: Driver + ?Sized> {
    /// The graph, for messages.
    pub graph: &'r str,
    /// Holds nothing of earlier runs that a kernel may rely on.
    pub arena: &'r D::Buffer,
    /// As the arena; kernels bind these behind their states.
    pub further: &'r [D::Buffer],
    pub arguments: &'r D::Buffer,
    /// What that buffer holds when the calls run, for calls that the host makes itself.
    pub table: &'r [u32],
    /// Words from one call's arguments to the next.
    #[cfg_attr(
        not(any(feature = "wgpu", target_arch = "wasm32", test)),
        expect(dead_code, reason = "bindings of wgpu ask for it")
    )]
    pub pitch: usize,
    pub writes: Vec<Write<'r, D::Buffer>>,
    pub calls: Vec<Call<'r, D>>,
    pub reads: Vec<Read<'r, D::Buffer>>,
}

impl<D: Driver + ?Sized> Call<'_, D> {
    /// The first of its arguments, as many as are asked for.
    pub fn told<'t>(&self, table: &'t [u32], count: usize) -> &'t [u32] {
        &table[self.arguments..self.arguments + count]
    }

    /// The same call.
    pub fn again(&self) -> Self {
        Call { kernel: self.kernel, arguments: self.arguments, bound: self.bound.clone(), grid: self.grid }
    }
}

impl<D: Driver + ?Sized> Batch<'_, D> {
    /// What holds nothing of earlier runs.
    pub fn arenas(&self) -> impl Iterator<Item = &D::Buffer> {
        std::iter::once(self.arena).chain(self.further)
    }

    /// Words that come back, range behind range.
    pub fn words_read(&self) -> usize {
        self.reads.iter().map(|read| read.count).sum()
    }
}

impl<D: Driver + ?Sized> fmt::Debug for Batch<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (writes, calls) = (self.writes.len(), self.calls.len());
        write!(f, "{}: {writes} writes, {calls} calls, {} words back", self.graph, self.words_read())
    }
}

/// A device, or what stands for one.
///
/// Errors name the device, what was done, and the driver's words: [`lost`], [`refused`] and [`exhausted`] make them.
pub(crate) trait Driver: Send + Sync + 'static {
    /// Words on the device.
    type Buffer: Send + Sync;
    /// A kernel ready to run.
    type Kernel: Send + Sync;
    /// What runs of one context need besides their buffers.
    type Work: Send;
    /// A batch on its way.
    type Pending;

    /// The name in reports.
    fn name(&self) -> String;
    /// What it can do, in words.
    fn capabilities(&self) -> Vec<String>;
    /// What decides results and speed.
    fn fingerprint(&self) -> String;
    /// What it takes.
    fn limits(&self) -> Limits;
    /// Free memory in bytes, if the driver tells.
    fn free_bytes(&self) -> Option<u64> {
        None
    }
    /// Whether warps of 32 lanes multiply together: of devices that are known to, and then held to the interpreter before it is relied on.
    fn matrix_units(&self) -> bool {
        false
    }
    /// The library that products of many rows are left to, or why it is not there; `None` if none was asked for.
    fn library(&self) -> Option<Result<Library, String>> {
        None
    }
    /// The time, for what is measured on it.
    fn now(&self) -> Duration {
        static BEGUN: OnceLock<Instant> = OnceLock::new();
        BEGUN.get_or_init(Instant::now).elapsed()
    }
    /// Room for words, whose content is undefined.
    fn allocate(&self, what: &str, words: usize) -> Result<Self::Buffer, BackendError>;
    /// Writes words of a buffer that no run uses now.
    fn upload(&self, what: &str, to: &Self::Buffer, at: usize, words: &[u32]) -> Result<(), BackendError>;
    /// Reads words of a buffer that no run uses now.
    fn download(
        &self,
        what: &str,
        from: &Self::Buffer,
        at: usize,
        count: usize,
    ) -> Result<Vec<u32>, BackendError>;
    /// Compiles a kernel.
    fn compile(&self, kernel: &Kernel) -> Result<Self::Kernel, BackendError>;
    /// Compiles kernels, at once where the device does so; the first that it does not take is the error.
    fn compile_all(&self, kernels: &[&Kernel]) -> Result<Vec<Self::Kernel>, BackendError> {
        kernels.iter().map(|kernel| self.compile(kernel)).collect()
    }
    /// Keeps for later processes what was compiled.
    fn keep(&self) {}
    /// What a context needs.
    fn work(&self) -> Result<Self::Work, BackendError>;
    /// Hands a batch to the device.
    fn submit(&self, work: &mut Self::Work, batch: &Batch<'_, Self>) -> Result<Self::Pending, BackendError>;
    /// Waits for a batch; the words it read, range behind range.
    fn read(&self, work: &mut Self::Work, pending: Self::Pending) -> Result<Vec<u32>, BackendError>;
}

/// The device does not answer any more.
#[cfg(any(feature = "wgpu", feature = "cuda", target_arch = "wasm32", test))]
pub(crate) fn lost(device: &str, during: &str, cause: impl fmt::Display) -> BackendError {
    BackendError::Lost { reason: format!("{device}, {during}: {cause}") }
}

/// The device does not take something, a kernel for one.
pub(crate) fn refused(device: &str, what: &str, cause: impl fmt::Display) -> BackendError {
    BackendError::Unsupported { op: what.to_owned(), location: device.to_owned(), reason: cause.to_string() }
}

/// The device has no room.
#[cfg(any(feature = "wgpu", feature = "cuda", target_arch = "wasm32", test))]
pub(crate) fn exhausted(device: &str, what: &str, words: usize) -> BackendError {
    BackendError::OutOfMemory { bytes: (words as u64).saturating_mul(4), what: format!("{what} on {device}") }
}
