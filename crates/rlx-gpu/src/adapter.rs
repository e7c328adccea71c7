//! Devices through wgpu: Vulkan here, and what else it is built with.

mod pipelines;
mod work;

use crate::device::DeviceBackend;
use crate::device::driver::{Batch, Driver, Limits, exhausted, lost, refused};
use crate::device::tune::Tuner;
use crate::ffi::trusted;
use crate::ir::Kernel;
use crate::lower::MAX_BOUND;
use crate::print::wgsl;
use pipelines::Pipelines;
use rlx::aot::AotCache;
use rlx::backend::{Backend, BackendError, BackendProvider, DeviceProbe};
use rlx::config::Config;
use rlx::devices::Device;
use rlx::session::SessionError;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use work::{Submitted, Work};

/// The devices that the process's graphics drivers show.
#[derive(Debug, Clone, Copy, Default)]
pub struct GpuProvider;

/// Waits for what is ready at once, or soon.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::yield_now(),
        }
    }
}

/// The adapters, asked for once in a process: they keep their numbers, and one whose device was lost opens another.
fn adapters() -> &'static [wgpu::Adapter] {
    static FOUND: OnceLock<Vec<wgpu::Adapter>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let found = wait(trusted::instance().enumerate_adapters(wgpu::Backends::all()));
        found.into_iter().filter(|a| a.get_info().backend != wgpu::Backend::Noop).collect()
    })
}

impl BackendProvider for GpuProvider {
    fn kind(&self) -> Device {
        Device::Gpu
    }

    fn probe(&self) -> DeviceProbe {
        match adapters().len() {
            0 => DeviceProbe::Absent(
                "no graphics driver shows an adapter (Vulkan: is a driver installed?)".to_owned(),
            ),
            count => DeviceProbe::Present(u32::try_from(count).unwrap_or(u32::MAX)),
        }
    }

    fn is_software(&self, index: u32) -> bool {
        let adapter = adapters().get(index as usize);
        adapter.is_some_and(|adapter| adapter.get_info().device_type == wgpu::DeviceType::Cpu)
    }

    fn open(&self, index: u32, config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
        let adapter = adapters().get(index as usize).ok_or_else(|| BackendError::Lost {
            reason: format!("adapter {index} is none of the {} there are", adapters().len()),
        })?;
        let gpu = Gpu::open(adapter, AotCache::from_config(config))?;
        let tuner = Tuner::of(config, &gpu);
        Ok(Arc::new(DeviceBackend::set_up(gpu, tuner, config.precision.unwrap_or_default())?))
    }
}

/// What the device told last, outside of any call.
#[derive(Debug, Default)]
struct Faults {
    lost: Option<String>,
    error: Option<String>,
}

/// An adapter that is open.
struct Gpu {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    limits: wgpu::Limits,
    faults: Arc<Mutex<Faults>>,
    /// Layouts for kernels of so many weights and so many states.
    layouts: Vec<Vec<(wgpu::BindGroupLayout, wgpu::PipelineLayout)>>,
    allocated: AtomicU64,
    pipelines: Option<Pipelines>,
}

/// A buffer, with a number that no other has had.
struct Words {
    buffer: wgpu::Buffer,
    number: u64,
}

/// A kernel as the driver compiled it.
struct Compiled {
    pipeline: wgpu::ComputePipeline,
    weights: usize,
    states: usize,
}

fn lock(faults: &Mutex<Faults>) -> MutexGuard<'_, Faults> {
    faults.lock().unwrap_or_else(PoisonError::into_inner)
}

fn storage(binding: u32, read_only: bool, dynamic: bool) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only },
            has_dynamic_offset: dynamic,
            min_binding_size: None,
        },
        count: None,
    }
}

impl Gpu {
    fn open(adapter: &wgpu::Adapter, cache: Option<AotCache>) -> Result<Self, BackendError> {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        let refused = |reason: String| lost(&info.name, "opening it", reason);
        if (limits.max_storage_buffers_per_shader_stage as usize) < 2 + MAX_BOUND {
            let count = limits.max_storage_buffers_per_shader_stage;
            return Err(refused(format!("a kernel may bind {count} buffers, {} are needed", 2 + MAX_BOUND)));
        }
        let desc = wgpu::DeviceDescriptor {
            label: Some("rlx"),
            required_limits: limits.clone(),
            required_features: Pipelines::wanted(adapter),
            ..wgpu::DeviceDescriptor::default()
        };
        let (device, queue) = wait(adapter.request_device(&desc)).map_err(|e| refused(e.to_string()))?;
        let faults = Arc::new(Mutex::new(Faults::default()));
        let told = Arc::clone(&faults);
        device.set_device_lost_callback(move |reason, text| {
            lock(&told).lost = Some(format!("{reason:?}: {text}"));
        });
        let told = Arc::clone(&faults);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            lock(&told).error = Some(error.to_string());
        }));
        let layout = |weights: u32, states: u32| {
            let bound = (0..weights + states).map(|b| storage(wgsl::FIRST_WEIGHT + b, b < weights, false));
            let entries: Vec<_> =
                [storage(0, true, true), storage(1, false, false)].into_iter().chain(bound).collect();
            let desc = wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries };
            let group = device.create_bind_group_layout(&desc);
            let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&group)],
                immediate_size: 0,
            });
            (group, pipeline)
        };
        let most = MAX_BOUND as u32;
        let of_weights = |weights| (0..=most - weights).map(|states| layout(weights, states)).collect();
        let layouts = (0..=most).map(of_weights).collect();
        let pipelines = cache.and_then(|cache| Pipelines::open(&device, &info, cache));
        let allocated = AtomicU64::new(0);
        Ok(Gpu { device, queue, info, limits, faults, layouts, allocated, pipelines })
    }

    /// Calls the device; what it says against it becomes an error. `words` is how many it is asked for.
    fn guarded<T>(&self, what: &str, words: usize, call: impl FnOnce() -> T) -> Result<T, BackendError> {
        let invalid = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let value = call();
        let (memory, invalid) = (wait(memory.pop()), wait(invalid.pop()));
        if memory.is_some() {
            return Err(exhausted(&self.name(), what, words));
        }
        if let Some(error) = invalid {
            return Err(refused(&self.name(), what, error));
        }
        self.alive(what).map(|()| value)
    }

    /// An error if the device has been lost, or failed outside of a call.
    fn alive(&self, during: &str) -> Result<(), BackendError> {
        let mut faults = lock(&self.faults);
        match (faults.lost.clone(), faults.error.take()) {
            (Some(reason), _) | (None, Some(reason)) => Err(lost(&self.name(), during, reason)),
            (None, None) => Ok(()),
        }
    }

    fn buffer(
        &self,
        what: &str,
        words: usize,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer, BackendError> {
        let size = (words.max(1) as u64) * 4;
        if size > self.limits.max_buffer_size {
            let what = format!("{what} (a buffer has at most {} bytes)", self.limits.max_buffer_size);
            return Err(exhausted(&self.name(), &what, words));
        }
        let desc = wgpu::BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: false };
        self.guarded(what, words, || self.device.create_buffer(&desc))
    }

    fn write(&self, buffer: &wgpu::Buffer, at: usize, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        if !bytes.is_empty() {
            self.queue.write_buffer(buffer, at as u64 * 4, &bytes);
        }
    }
}

/// What any buffer may be used for, but to be mapped.
const USAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_DST).union(wgpu::BufferUsages::COPY_SRC);

/// Programs along one axis of a grid.
const GRID: usize = 32_768;

impl Driver for Gpu {
    type Buffer = Words;
    type Kernel = Compiled;
    type Work = Work;
    type Pending = Submitted;

    fn name(&self) -> String {
        format!("gpu ({})", self.info.name)
    }

    fn capabilities(&self) -> Vec<String> {
        let (limit, kind) = (self.limits.max_storage_buffer_binding_size >> 20, self.info.device_type);
        vec![format!("{:?}", self.info.backend), format!("{kind:?}"), format!("bindings of {limit} MiB")]
    }

    fn fingerprint(&self) -> String {
        let (info, version) = (&self.info, env!("CARGO_PKG_VERSION"));
        format!("gpu {version} {:?} {} {} {}", info.backend, info.name, info.driver, info.driver_info)
    }

    fn limits(&self) -> Limits {
        let binding = self.limits.max_storage_buffer_binding_size / 4;
        Limits {
            binding_words: usize::try_from(binding).unwrap_or(usize::MAX),
            argument_words: self.limits.min_storage_buffer_offset_alignment.max(4) as usize / 4,
            grid: GRID.min(self.limits.max_compute_workgroups_per_dimension as usize),
            compact: false,
            // Where a device has none, naga prints what gives the same.
            dots: true,
        }
    }

    fn allocate(&self, what: &str, words: usize) -> Result<Words, BackendError> {
        let buffer = self.buffer(what, words, USAGE)?;
        Ok(Words { buffer, number: self.allocated.fetch_add(1, Ordering::Relaxed) })
    }

    fn upload(&self, what: &str, to: &Words, at: usize, words: &[u32]) -> Result<(), BackendError> {
        self.guarded(what, words.len(), || {
            self.write(&to.buffer, at, words);
            // What is written waits in memory of the host until something is submitted.
            self.queue.submit([]);
        })
    }

    fn download(&self, what: &str, from: &Words, at: usize, count: usize) -> Result<Vec<u32>, BackendError> {
        work::download(self, what, from, at, count)
    }

    fn compile(&self, kernel: &Kernel) -> Result<Compiled, BackendError> {
        let (weights, states) = (kernel.weights() as usize, kernel.states() as usize);
        let text = wgsl::print(kernel);
        let pipeline = self.guarded(&format!("kernel {}", kernel.name), 0, || {
            let module = trusted::module(&self.device, &kernel.name, &text);
            let options = wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..wgpu::PipelineCompilationOptions::default()
            };
            self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&kernel.name),
                layout: Some(&self.layouts[weights][states].1),
                module: &module,
                entry_point: Some("main"),
                compilation_options: options,
                cache: self.pipelines.as_ref().map(|pipelines| &pipelines.cache),
            })
        })?;
        Ok(Compiled { pipeline, weights, states })
    }

    fn keep(&self) {
        if let Some(pipelines) = &self.pipelines {
            pipelines.keep();
        }
    }

    fn work(&self) -> Result<Work, BackendError> {
        Ok(Work::default())
    }

    fn submit(&self, work: &mut Work, batch: &Batch<'_, Self>) -> Result<Submitted, BackendError> {
        work.submit(self, batch)
    }

    fn read(&self, work: &mut Work, pending: Submitted) -> Result<Vec<u32>, BackendError> {
        work.read(self, &pending)
    }
}
