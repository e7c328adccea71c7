//! The buffers of one run in flight: arena, arguments, and what results are read from.

use super::{Compiled, Gpu};
use crate::device::{Dispatch, Job};
use rlx::backend::BackendError;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What the arena of a debug build holds before a run writes it: NaNs, so that a read of nothing shows.
const POISON: u32 = 0x7fc0_dead;
/// Programs along one axis of a grid at most.
const GRID: usize = 32_768;
/// How long a run may take before the device counts as lost.
const PATIENCE: Duration = Duration::from_secs(600);

/// A device's memory for one run at a time.
pub(super) struct Memory {
    arena: wgpu::Buffer,
    words: usize,
    arguments: Option<(wgpu::Buffer, usize)>,
    results: Option<(wgpu::Buffer, usize)>,
    /// Bind groups by number of arguments and addresses of weights.
    groups: HashMap<Vec<usize>, wgpu::BindGroup>,
}

impl Memory {
    pub fn new(gpu: &Gpu, words: usize) -> Result<Self, BackendError> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let arena = gpu.buffer("the arena of a run", words, usage)?;
        Ok(Memory { arena, words, arguments: None, results: None, groups: HashMap::new() })
    }

    /// Words from one dispatch's arguments to the next.
    fn pitch(gpu: &Gpu, kernels: &[Compiled]) -> usize {
        let most = kernels.iter().map(|k| k.arguments).max().unwrap_or(0).max(1);
        most.next_multiple_of(gpu.limits.min_storage_buffer_offset_alignment.max(4) as usize / 4)
    }

    fn upload_arguments(
        &mut self,
        gpu: &Gpu,
        job: &Job<'_, wgpu::Buffer>,
        pitch: usize,
    ) -> Result<wgpu::Buffer, BackendError> {
        let words = pitch * job.dispatches.len().max(1);
        let buffer = match &self.arguments {
            Some((buffer, held)) if *held >= words => buffer.clone(),
            _ => {
                let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
                let buffer = gpu.buffer("the arguments of a run", words, usage)?;
                self.groups.clear();
                self.arguments = Some((buffer.clone(), words));
                buffer
            }
        };
        let mut table = vec![0u32; words];
        for (dispatch, own) in job.dispatches.iter().zip(table.chunks_mut(pitch)) {
            own.iter_mut().zip(&dispatch.arguments).for_each(|(word, &value)| *word = value as u32);
        }
        gpu.write(&buffer, 0, &table);
        Ok(buffer)
    }

    fn results(&mut self, gpu: &Gpu, words: usize) -> Result<wgpu::Buffer, BackendError> {
        match &self.results {
            Some((buffer, held)) if *held >= words => Ok(buffer.clone()),
            _ => {
                let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
                let buffer = gpu.buffer("the results of a run", words, usage)?;
                self.results = Some((buffer.clone(), words));
                Ok(buffer)
            }
        }
    }

    fn group(
        &mut self,
        gpu: &Gpu,
        kernel: &Compiled,
        dispatch: &Dispatch<'_, wgpu::Buffer>,
        arguments: &wgpu::Buffer,
        pitch: usize,
    ) -> wgpu::BindGroup {
        let addresses = dispatch.weights.iter().map(|w| std::ptr::from_ref::<wgpu::Buffer>(w) as usize);
        let key: Vec<usize> = addresses.collect();
        let arena = &self.arena;
        let make = || {
            let size = std::num::NonZeroU64::new(pitch as u64 * 4);
            let window = wgpu::BufferBinding { buffer: arguments, offset: 0, size };
            let mut entries = vec![
                wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(window) },
                wgpu::BindGroupEntry { binding: 1, resource: arena.as_entire_binding() },
            ];
            for (binding, weight) in (crate::print::wgsl::FIRST_WEIGHT..).zip(&dispatch.weights) {
                entries.push(wgpu::BindGroupEntry { binding, resource: weight.as_entire_binding() });
            }
            let layout = &gpu.layouts[kernel.weights].0;
            gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout,
                entries: &entries,
            })
        };
        self.groups.entry(key).or_insert_with(make).clone()
    }

    /// Uploads, one pass, downloads: one submission.
    pub fn run(
        &mut self,
        gpu: &Gpu,
        kernels: &[Compiled],
        job: &Job<'_, wgpu::Buffer>,
    ) -> Result<Vec<Vec<u32>>, BackendError> {
        gpu.alive()?;
        let pitch = Self::pitch(gpu, kernels);
        let total: usize = job.downloads.iter().map(|(_, count)| count).sum();
        let results = self.results(gpu, total)?;
        let arguments = self.upload_arguments(gpu, job, pitch)?;
        let submission = gpu.guarded("a run", 0, || {
            if cfg!(debug_assertions) {
                gpu.write(&self.arena, 0, &vec![POISON; self.words]);
            }
            for (at, words) in &job.uploads {
                gpu.write(&self.arena, *at, words);
            }
            let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                for (at, dispatch) in job.dispatches.iter().enumerate() {
                    let kernel = &kernels[dispatch.kernel];
                    let group = self.group(gpu, kernel, dispatch, &arguments, pitch);
                    pass.set_pipeline(&kernel.pipeline);
                    pass.set_bind_group(0, &group, &[(at * pitch * 4) as u32]);
                    let across = dispatch.programs.min(GRID);
                    pass.dispatch_workgroups(across as u32, dispatch.programs.div_ceil(across) as u32, 1);
                }
            }
            let mut to = 0;
            for &(at, count) in job.downloads.iter().filter(|(_, count)| *count > 0) {
                let bytes = count as u64 * 4;
                encoder.copy_buffer_to_buffer(&self.arena, at as u64 * 4, &results, to, Some(bytes));
                to += bytes;
            }
            gpu.queue.submit([encoder.finish()])
        })?;
        let words = self.read(gpu, submission, &results, total)?;
        let mut rest = words.as_slice();
        let mut ranges = Vec::with_capacity(job.downloads.len());
        for &(_, count) in &job.downloads {
            let (range, after) = rest.split_at(count);
            ranges.push(range.to_vec());
            rest = after;
        }
        Ok(ranges)
    }

    fn read(
        &self,
        gpu: &Gpu,
        submission: wgpu::SubmissionIndex,
        results: &wgpu::Buffer,
        words: usize,
    ) -> Result<Vec<u32>, BackendError> {
        let lost = |reason: String| BackendError::Lost { reason };
        if words == 0 {
            return Ok(Vec::new());
        }
        let range = 0..words as u64 * 4;
        let outcome = Arc::new(Mutex::new(None));
        let told = Arc::clone(&outcome);
        results.map_async(wgpu::MapMode::Read, range.clone(), move |result| {
            *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        });
        let wait = wgpu::PollType::Wait { submission_index: Some(submission), timeout: Some(PATIENCE) };
        gpu.device.poll(wait).map_err(|e| lost(e.to_string()))?;
        gpu.alive()?;
        match outcome.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Ok(())) => {}
            Some(Err(error)) => return Err(lost(error.to_string())),
            None => return Err(lost("results were not mapped when the run had ended".to_owned())),
        }
        let read = {
            let view = results.get_mapped_range(range).map_err(|e| lost(e.to_string()))?;
            let word = |c: &[u8]| c.try_into().map(u32::from_le_bytes).unwrap_or_default();
            view.chunks_exact(4).map(word).collect()
        };
        results.unmap();
        gpu.alive().map(|()| read)
    }
}
