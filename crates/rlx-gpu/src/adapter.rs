//! Devices through wgpu: Vulkan here, and what else it is built with.

mod memory;

use crate::device::{DeviceBackend, Driver, Job};
use crate::ffi::trusted;
use crate::ir::Kernel;
use crate::lower::MAX_WEIGHTS;
use crate::print::wgsl;
use memory::Memory;
use rlx::backend::{Backend, BackendError, BackendProvider, DeviceProbe};
use rlx::config::Config;
use rlx::devices::Device;
use rlx::session::SessionError;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

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

fn adapters() -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let found = wait(instance.enumerate_adapters(wgpu::Backends::all()));
    found.into_iter().filter(|a| a.get_info().backend != wgpu::Backend::Noop).collect()
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

    fn open(&self, index: u32, _config: &Config) -> Result<Arc<dyn Backend>, SessionError> {
        let adapter = adapters().into_iter().nth(index as usize).ok_or_else(|| BackendError::Lost {
            reason: format!("adapter {index} has gone since it was counted"),
        })?;
        Ok(Arc::new(DeviceBackend::new(Gpu::open(&adapter)?)))
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
    /// Layouts for kernels of so many weights.
    layouts: Vec<(wgpu::BindGroupLayout, wgpu::PipelineLayout)>,
}

/// A kernel as the driver compiled it.
struct Compiled {
    pipeline: wgpu::ComputePipeline,
    weights: usize,
    arguments: usize,
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
    fn open(adapter: &wgpu::Adapter) -> Result<Self, BackendError> {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        let refused = |reason: String| BackendError::Lost { reason: format!("{}: {reason}", info.name) };
        if (limits.max_storage_buffers_per_shader_stage as usize) < 2 + MAX_WEIGHTS {
            let count = limits.max_storage_buffers_per_shader_stage;
            return Err(refused(format!(
                "a kernel may bind {count} buffers, {} are needed",
                2 + MAX_WEIGHTS
            )));
        }
        let desc = wgpu::DeviceDescriptor {
            label: Some("rlx"),
            required_limits: limits.clone(),
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
        let layout = |weights: u32| {
            let bound = (0..weights).map(|w| storage(wgsl::FIRST_WEIGHT + w, true, false));
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
        let layouts = (0..=MAX_WEIGHTS as u32).map(layout).collect();
        Ok(Gpu { device, queue, info, limits, faults, layouts })
    }

    /// Calls the device; what it says against it becomes an error.
    fn guarded<T>(&self, what: &str, bytes: u64, call: impl FnOnce() -> T) -> Result<T, BackendError> {
        let invalid = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let value = call();
        let (memory, invalid) = (wait(memory.pop()), wait(invalid.pop()));
        if memory.is_some() {
            return Err(BackendError::OutOfMemory { bytes, what: what.to_owned() });
        }
        if let Some(error) = invalid {
            return Err(BackendError::Unsupported {
                op: what.to_owned(),
                location: self.info.name.clone(),
                reason: error.to_string(),
            });
        }
        self.alive().map(|()| value)
    }

    /// An error if the device has been lost, or failed outside of a call.
    fn alive(&self) -> Result<(), BackendError> {
        let mut faults = lock(&self.faults);
        match (faults.lost.clone(), faults.error.take()) {
            (Some(reason), _) | (None, Some(reason)) => Err(BackendError::Lost { reason }),
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
            return Err(BackendError::OutOfMemory { bytes: size, what });
        }
        let desc = wgpu::BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: false };
        self.guarded(what, size, || self.device.create_buffer(&desc))
    }

    fn write(&self, buffer: &wgpu::Buffer, at: usize, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        if !bytes.is_empty() {
            self.queue.write_buffer(buffer, at as u64 * 4, &bytes);
        }
    }
}

impl Driver for Gpu {
    type Weight = wgpu::Buffer;
    type Kernels = Vec<Compiled>;
    type Memory = Memory;

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

    fn binding_words(&self) -> usize {
        usize::try_from(self.limits.max_storage_buffer_binding_size / 4).unwrap_or(usize::MAX)
    }

    fn weight(&self, name: &str, words: &[u32]) -> Result<wgpu::Buffer, BackendError> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let buffer = self.buffer(name, words.len(), usage)?;
        self.guarded(name, words.len() as u64 * 4, || {
            self.write(&buffer, 0, words);
            // What is written waits in memory of the host until something is submitted.
            self.queue.submit([]);
        })?;
        Ok(buffer)
    }

    fn prepare(&self, kernels: &[Arc<Kernel>]) -> Result<Vec<Compiled>, BackendError> {
        let compile = |kernel: &Arc<Kernel>| {
            let (text, weights) = (wgsl::print(kernel), kernel.weights() as usize);
            let pipeline = self.guarded(&format!("kernel {}", kernel.name), 0, || {
                let module = trusted::module(&self.device, &kernel.name, &text);
                let options = wgpu::PipelineCompilationOptions {
                    zero_initialize_workgroup_memory: false,
                    ..wgpu::PipelineCompilationOptions::default()
                };
                self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                    label: Some(&kernel.name),
                    layout: Some(&self.layouts[weights].1),
                    module: &module,
                    entry_point: Some("main"),
                    compilation_options: options,
                    cache: None,
                })
            })?;
            Ok(Compiled { pipeline, weights, arguments: kernel.args.len() })
        };
        kernels.iter().map(compile).collect()
    }

    fn memory(&self, words: usize) -> Result<Memory, BackendError> {
        Memory::new(self, words)
    }

    fn run(
        &self,
        kernels: &Vec<Compiled>,
        memory: &mut Memory,
        job: &Job<'_, wgpu::Buffer>,
    ) -> Result<Vec<Vec<u32>>, BackendError> {
        memory.run(self, kernels, job)
    }
}
