//! CUDA's driver and run-time compiler, loaded when they are asked for: memory, kernels, one queue of work for each context of runs.
//!
//! Nothing here decides what is computed; it checks ranges and passes on.
#![expect(unsafe_code, reason = "the driver is C: pointers, and memory that copies use later")]

use cudarc::driver::{CudaContext, CudaFunction, CudaGraph, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::driver::{DriverError, result, sys};
use cudarc::nvrtc::{Ptx, result as nvrtc, sys as nvrtc_sys};
use std::ffi::CString;
use std::fmt;
use std::sync::Arc;

/// What the driver said against a call.
#[derive(Debug)]
pub(crate) struct Fault {
    pub exhausted: bool,
    /// The call is not taken, and nothing has happened.
    pub refused: bool,
    pub(super) cause: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

impl From<DriverError> for Fault {
    fn from(error: DriverError) -> Self {
        let exhausted = error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        Fault { exhausted, refused: false, cause: format!("{:?}", error.0) }
    }
}

fn beyond(at: usize, count: usize, words: usize) -> Fault {
    Fault {
        exhausted: false,
        refused: false,
        cause: format!("words {at} .. {} of {words}", at.saturating_add(count)),
    }
}

/// Whether the driver's library can be loaded.
pub(crate) fn has_driver() -> bool {
    // SAFETY: loading runs the library's initialisers, which is what a driver is installed for.
    unsafe { sys::is_culib_present() }
}

/// Whether the run-time compiler's library can be loaded.
pub(crate) fn has_compiler() -> bool {
    // SAFETY: as `has_driver`.
    unsafe { nvrtc_sys::is_culib_present() }
}

/// The run-time compiler's version.
pub(crate) fn compiler_version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both point to integers of this frame. A status other than success leaves them 0.
    let _ = unsafe { nvrtc_sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

/// The driver's version, as it counts.
pub(crate) fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: it points to an integer of this frame. A status other than success leaves it 0.
    let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
    version
}

/// A program of the run-time compiler, freed when it goes.
struct Source(nvrtc_sys::nvrtcProgram);

impl Drop for Source {
    fn drop(&mut self) {
        // SAFETY: made by `create_program`, freed here only. A failure leaves memory behind and nothing else.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

/// Machine code of one architecture for a text.
///
/// # Errors
/// The compiler's log.
pub(crate) fn compile(text: &str, architecture: &str) -> Result<Vec<u8>, String> {
    let text = CString::new(text).map_err(|e| e.to_string())?;
    let program = Source(nvrtc::create_program(&text, None).map_err(|e| e.to_string())?);
    let options = [format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()];
    // SAFETY: the program lives until the end of this function, as does its text.
    let compiled = unsafe { nvrtc::compile_program(program.0, &options) };
    if let Err(error) = compiled {
        // SAFETY: as above.
        let log = unsafe { nvrtc::get_program_log(program.0) }.unwrap_or_default();
        let log: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
        return Err(format!("{error}: {}", String::from_utf8_lossy(&log).trim()));
    }
    let mut bytes = 0;
    // SAFETY: the program lives, and the size is an integer of this frame.
    let sized = unsafe { nvrtc_sys::nvrtcGetCUBINSize(program.0, &mut bytes) };
    sized.result().map_err(|e| e.to_string())?;
    let mut code = vec![0u8; bytes];
    // SAFETY: the program lives, and the buffer has as many bytes as the compiler said it writes.
    let copied = unsafe { nvrtc_sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) };
    copied.result().map_err(|e| e.to_string())?;
    Ok(code)
}

/// A card that is open.
pub(crate) struct Card(pub(super) Arc<CudaContext>);

/// Words in a card's memory.
pub(crate) struct Words {
    context: Arc<CudaContext>,
    address: sys::CUdeviceptr,
    words: usize,
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `Card::allocate`, freed here only; the driver waits for work that still uses it. What a lost
            // card says to it changes nothing.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

impl Words {
    /// The address of a range that is inside.
    pub(super) fn range(&self, at: usize, count: usize) -> Result<sys::CUdeviceptr, Fault> {
        match at.checked_add(count).is_some_and(|end| end <= self.words) {
            true => Ok(self.address + at as u64 * 4),
            false => Err(beyond(at, count, self.words)),
        }
    }
}

/// A kernel that is loaded.
pub(crate) struct Function(CudaFunction);

impl Card {
    /// Cards that the driver sees.
    pub fn count() -> Result<usize, Fault> {
        result::init()?;
        Ok(usize::try_from(CudaContext::device_count()?).unwrap_or(0))
    }

    pub fn open(index: usize) -> Result<Card, Fault> {
        let context = CudaContext::new(index)?;
        // SAFETY: memory is freed by a call that waits, never used by two queues at once but for reading, and written from the host
        // only where no queue uses it.
        unsafe { context.disable_event_tracking() };
        Ok(Card(context))
    }

    pub fn name(&self) -> Result<String, Fault> {
        Ok(self.0.name()?)
    }

    /// Major and minor number.
    pub fn capability(&self) -> Result<(i32, i32), Fault> {
        Ok(self.0.compute_capability()?)
    }

    /// Free bytes and all bytes.
    pub fn memory(&self) -> Result<(usize, usize), Fault> {
        Ok(self.0.mem_get_info()?)
    }

    pub fn allocate(&self, words: usize) -> Result<Words, Fault> {
        self.0.bind_to_thread()?;
        // SAFETY: the content is undefined; whoever reads a word has written it, which the interpreter checks for every kernel.
        let address = unsafe { result::malloc_sync(words.max(1).saturating_mul(4)) }?;
        Ok(Words { context: Arc::clone(&self.0), address, words })
    }

    /// Writes words and waits.
    pub fn write(&self, to: &Words, at: usize, words: &[u32]) -> Result<(), Fault> {
        self.0.bind_to_thread()?;
        let address = to.range(at, words.len())?;
        // SAFETY: the range is inside, and the source outlives the copy, which has ended when `synchronize` returns.
        unsafe { result::memcpy_htod_sync(address, words) }?;
        Ok(self.0.synchronize()?)
    }

    /// Reads words, after all work that was begun.
    pub fn read(&self, from: &Words, at: usize, count: usize) -> Result<Vec<u32>, Fault> {
        self.0.bind_to_thread()?;
        self.0.synchronize()?;
        let (address, mut words) = (from.range(at, count)?, vec![0; count]);
        // SAFETY: the range is inside; the call returns when the copy has ended.
        unsafe { result::memcpy_dtoh_sync(&mut words, address) }?;
        Ok(words)
    }

    /// Loads machine code.
    pub fn load(&self, code: Vec<u8>, entry: &str) -> Result<Function, Fault> {
        let module = self.0.load_module(Ptx::from_binary(code))?;
        Ok(Function(module.load_function(entry)?))
    }

    pub fn queue(&self) -> Result<Queue, Fault> {
        let stream = self.0.new_stream()?;
        Ok(Queue { stream, up: Pinned::default(), down: Pinned::default() })
    }
}

/// Memory of the host that copies may use while the host goes on.
#[derive(Default)]
struct Pinned(Option<(Arc<CudaContext>, *mut u32, usize)>);

// SAFETY: the pointer is to memory that this value alone owns.
unsafe impl Send for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some((context, memory, _)) = self.0.take()
            && context.bind_to_thread().is_ok()
        {
            // SAFETY: allocated by `reserve`, freed here only; queues wait before they drop it.
            let _ = unsafe { result::free_host(memory.cast()) };
        }
    }
}

impl Pinned {
    /// Room for words, zeroed where it is new. What it held is gone if there was not enough.
    fn reserve(&mut self, context: &Arc<CudaContext>, words: usize) -> Result<(), Fault> {
        if self.0.as_ref().is_some_and(|(_, _, held)| *held >= words) {
            return Ok(());
        }
        context.bind_to_thread()?;
        // SAFETY: the content is set right below.
        let memory = unsafe { result::malloc_host(words.max(1) * 4, 0) }?.cast::<u32>();
        // SAFETY: as many words were just allocated.
        unsafe { memory.write_bytes(0, words.max(1)) };
        drop(std::mem::replace(self, Pinned(Some((Arc::clone(context), memory, words)))));
        Ok(())
    }

    fn slice(&mut self) -> &mut [u32] {
        match &self.0 {
            None => &mut [],
            // SAFETY: `reserve` allocated and set as many words, which live as long as this value and are reached through it alone.
            Some((_, memory, words)) => unsafe { std::slice::from_raw_parts_mut(*memory, *words) },
        }
    }
}

/// Kernels in order that are launched by one call.
pub(crate) struct Graph(CudaGraph);

// SAFETY: the driver asks that a graph is not used by two threads at once; it is owned by one context of runs, which is not.
unsafe impl Send for Graph {}

/// Work in order: copies from and to memory that it holds itself, and kernels.
pub(crate) struct Queue {
    pub(super) stream: Arc<CudaStream>,
    up: Pinned,
    down: Pinned,
}

impl Drop for Queue {
    fn drop(&mut self) {
        // What a lost card says changes nothing: no copy runs on it any more.
        let _ = self.wait();
    }
}

impl Queue {
    /// Room for what goes up and what comes down, after all earlier work.
    pub fn reserve(&mut self, up: usize, down: usize) -> Result<(), Fault> {
        self.wait()?;
        let context = Arc::clone(self.stream.context());
        self.up.reserve(&context, up)?;
        self.down.reserve(&context, down)
    }

    /// Copies words, through the room from `through`.
    pub fn write(&mut self, through: usize, to: &Words, at: usize, words: &[u32]) -> Result<(), Fault> {
        self.stream.context().bind_to_thread()?;
        let (room, stream) = (self.up.slice(), self.stream.cu_stream());
        let (held, address) = (room.len(), to.range(at, words.len())?);
        let staged = room.get_mut(through..through + words.len());
        let staged = staged.ok_or_else(|| beyond(through, words.len(), held))?;
        staged.copy_from_slice(words);
        // SAFETY: both ranges are inside; the source is not touched before `wait`, which `reserve` and `drop` call.
        Ok(unsafe { result::memcpy_htod_async(address, staged, stream) }?)
    }

    /// Sets every word.
    pub fn fill(&self, to: &Words, word: u32) -> Result<(), Fault> {
        self.stream.context().bind_to_thread()?;
        // SAFETY: the range is the whole allocation.
        let filled = unsafe { sys::cuMemsetD32Async(to.address, word, to.words, self.stream.cu_stream()) };
        Ok(filled.result()?)
    }

    /// Runs a kernel: its parameters are the arguments from a word on, then whole buffers.
    pub fn launch(
        &self,
        function: &Function,
        grid: [usize; 2],
        lanes: u32,
        arguments: (&Words, usize),
        buffers: &[&Words],
    ) -> Result<(), Fault> {
        let first = arguments.0.range(arguments.1, 0)?;
        let addresses: Vec<u64> = buffers.iter().map(|b| b.address).collect();
        let axis = |n: usize| u32::try_from(n).map_err(|_| beyond(n, 0, u32::MAX as usize));
        let grid_dim = (axis(grid[0])?, axis(grid[1])?, 1);
        let config = LaunchConfig { grid_dim, block_dim: (lanes, 1, 1), shared_mem_bytes: 0 };
        let mut builder = self.stream.launch_builder(&function.0);
        builder.arg(&first);
        for address in &addresses {
            builder.arg(address);
        }
        // SAFETY: the text was printed from a kernel that the verifier accepted, whose parameters are these in this order; the host has
        // checked that every view of this launch ends inside its buffer, and the buffers outlive the work (see `Words::drop`).
        unsafe { builder.launch(config) }?;
        Ok(())
    }

    /// Kernels that `record` launches, to be launched together later; none of them runs now.
    pub fn record(&self, record: impl FnOnce(&Queue) -> Result<(), Fault>) -> Result<Option<Graph>, Fault> {
        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let recorded = record(self);
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags_enum(0));
        recorded?;
        Ok(graph?.map(Graph))
    }

    pub fn replay(&self, graph: &Graph) -> Result<(), Fault> {
        Ok(graph.0.launch()?)
    }

    /// Copies words down, to the room from `to`.
    pub fn read(&mut self, from: &Words, at: usize, count: usize, to: usize) -> Result<(), Fault> {
        self.stream.context().bind_to_thread()?;
        let (room, stream) = (self.down.slice(), self.stream.cu_stream());
        let (held, address) = (room.len(), from.range(at, count)?);
        let room = room.get_mut(to..to + count).ok_or_else(|| beyond(to, count, held))?;
        // SAFETY: both ranges are inside; the room is not touched before `wait`.
        Ok(unsafe { result::memcpy_dtoh_async(room, address, stream) }?)
    }

    /// Waits for all work.
    pub fn wait(&self) -> Result<(), Fault> {
        Ok(self.stream.synchronize()?)
    }

    /// What came down, once it was waited for.
    pub fn came_down(&mut self) -> &[u32] {
        self.down.slice()
    }
}
