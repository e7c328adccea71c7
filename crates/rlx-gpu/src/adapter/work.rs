//! What runs of one context keep: bind groups, and the buffer that results are read from.

use super::{Compiled, Gpu, Words};
use crate::device::driver::{Batch, Driver, lost};
use rlx::backend::BackendError;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What the arena of a debug build holds before a run writes it: NaNs, so that a read of nothing shows.
const POISON: u32 = 0x7fc0_dead;
/// How long a run may take before the device counts as lost.
const PATIENCE: Duration = Duration::from_secs(600);

/// What runs of one context keep.
#[derive(Default)]
pub(super) struct Work {
    results: Option<(wgpu::Buffer, usize)>,
    /// The bind groups of the last run, by the numbers of the buffers they bind.
    groups: HashMap<Vec<u64>, wgpu::BindGroup>,
}

/// A batch on its way.
pub(super) struct Submitted {
    submission: wgpu::SubmissionIndex,
    graph: String,
    words: usize,
}

fn group(gpu: &Gpu, kernel: &Compiled, pitch: usize, buffers: &[&Words]) -> wgpu::BindGroup {
    let window = wgpu::BufferBinding {
        buffer: &buffers[0].buffer,
        offset: 0,
        size: std::num::NonZeroU64::new(pitch as u64 * 4),
    };
    let whole = buffers[1..].iter().map(|words| words.buffer.as_entire_binding());
    let resources = std::iter::once(wgpu::BindingResource::Buffer(window)).chain(whole);
    let entries: Vec<wgpu::BindGroupEntry<'_>> =
        (0..).zip(resources).map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource }).collect();
    let layout = &gpu.layouts[kernel.weights][kernel.states].0;
    gpu.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
}

impl Work {
    fn results(&mut self, gpu: &Gpu, words: usize) -> Result<wgpu::Buffer, BackendError> {
        match &self.results {
            Some((buffer, held)) if *held >= words => Ok(buffer.clone()),
            _ => {
                let buffer = gpu.buffer("the results of a run", words, MAPPED)?;
                self.results = Some((buffer.clone(), words));
                Ok(buffer)
            }
        }
    }

    /// Writes, one pass, reads: one submission.
    pub fn submit(&mut self, gpu: &Gpu, batch: &Batch<'_, Gpu>) -> Result<Submitted, BackendError> {
        let during = format!("running {}", batch.graph);
        gpu.alive(&during)?;
        let words = batch.words_read();
        let results = self.results(gpu, words)?;
        let mut known = std::mem::take(&mut self.groups);
        let submission = gpu.guarded(&during, words, || {
            if cfg!(debug_assertions) {
                for Words { buffer, .. } in batch.arenas() {
                    gpu.write(buffer, 0, &vec![POISON; (buffer.size() / 4) as usize]);
                }
            }
            for write in &batch.writes {
                gpu.write(&write.to.buffer, write.at, &write.words);
            }
            let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            for call in &batch.calls {
                let first = [batch.arguments, batch.arena];
                let buffers: Vec<&Words> = first.into_iter().chain(call.bound.iter().copied()).collect();
                let key: Vec<u64> = buffers.iter().map(|words| words.number).collect();
                let group = self.groups.entry(key).or_insert_with_key(|key| {
                    known.remove(key).unwrap_or_else(|| group(gpu, call.kernel, batch.pitch, &buffers))
                });
                pass.set_pipeline(&call.kernel.pipeline);
                pass.set_bind_group(0, &*group, &[(call.arguments * 4) as u32]);
                pass.dispatch_workgroups(call.grid[0] as u32, call.grid[1] as u32, 1);
            }
            drop(pass);
            let mut to = 0;
            for read in batch.reads.iter().filter(|read| read.count > 0) {
                let bytes = read.count as u64 * 4;
                let from = &read.from.buffer;
                encoder.copy_buffer_to_buffer(from, read.at as u64 * 4, &results, to, Some(bytes));
                to += bytes;
            }
            gpu.queue.submit([encoder.finish()])
        })?;
        Ok(Submitted { submission, graph: batch.graph.to_owned(), words })
    }

    /// Waits for a batch and gives what it read.
    pub fn read(&mut self, gpu: &Gpu, pending: &Submitted) -> Result<Vec<u32>, BackendError> {
        match &self.results {
            Some((results, _)) if pending.words > 0 => {
                let during = format!("running {}", pending.graph);
                mapped(gpu, &during, &pending.submission, results, pending.words)
            }
            _ => Ok(Vec::new()),
        }
    }
}

const MAPPED: wgpu::BufferUsages = wgpu::BufferUsages::MAP_READ.union(wgpu::BufferUsages::COPY_DST);

/// Copies words of a buffer to one that the host may map, and reads them.
pub(super) fn download(
    gpu: &Gpu,
    what: &str,
    from: &Words,
    at: usize,
    count: usize,
) -> Result<Vec<u32>, BackendError> {
    let during = format!("reading {what}");
    gpu.alive(&during)?;
    let results = gpu.buffer(&during, count, MAPPED)?;
    let submission = gpu.guarded(&during, count, || {
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let bytes = Some(count as u64 * 4);
        encoder.copy_buffer_to_buffer(&from.buffer, at as u64 * 4, &results, 0, bytes);
        gpu.queue.submit([encoder.finish()])
    })?;
    mapped(gpu, &during, &submission, &results, count)
}

/// The words of a buffer when a submission has ended.
fn mapped(
    gpu: &Gpu,
    during: &str,
    submission: &wgpu::SubmissionIndex,
    results: &wgpu::Buffer,
    words: usize,
) -> Result<Vec<u32>, BackendError> {
    let lost = |reason: String| lost(&gpu.name(), during, reason);
    let range = 0..words as u64 * 4;
    let outcome = Arc::new(Mutex::new(None));
    let told = Arc::clone(&outcome);
    results.map_async(wgpu::MapMode::Read, range.clone(), move |result| {
        *told.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    });
    let wait = wgpu::PollType::Wait { submission_index: Some(submission.clone()), timeout: Some(PATIENCE) };
    gpu.device.poll(wait).map_err(|e| lost(e.to_string()))?;
    gpu.alive(during)?;
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
    gpu.alive(during).map(|()| read)
}
