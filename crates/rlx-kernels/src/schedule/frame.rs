//! A frame: the memory of one run in flight, and the checks that make a run sound.

use super::operand::{Access, Operand, RawRegion};
use super::{Run, Schedule, StepError};
use crate::pool::{Pool, Team};
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::time::Instant;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Why a frame cannot be made or launched: the plan and the steps contradict each other, or a buffer is too small.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// An operand reaches past its region.
    #[error("region {region} has {have} bytes, an operand needs {need}")]
    OutOfBounds {
        /// The region.
        region: usize,
        /// Bytes that the operand reaches.
        need: usize,
        /// Bytes of the region.
        have: usize,
    },
    /// A region's start is not aligned for its elements.
    #[error("region {region} is not aligned to {align} bytes")]
    Misaligned {
        /// The region.
        region: usize,
        /// Alignment in bytes.
        align: usize,
    },
    /// A written operand's region is read-only.
    #[error("step {step} ({name}) writes region {region}, which is read-only")]
    ReadOnly {
        /// The step.
        step: usize,
        /// Its kernel.
        name: String,
        /// The region.
        region: usize,
    },
    /// What a step writes overlaps another of its operands.
    #[error("step {step} ({name}) writes region {write}, which overlaps its operand in region {other}")]
    Overlap {
        /// The step.
        step: usize,
        /// Its kernel.
        name: String,
        /// The region written.
        write: usize,
        /// The other.
        other: usize,
    },
    /// A size exceeds the capacity the frame was made for.
    #[error("size {index} is {value}, above its capacity {capacity}")]
    AboveCapacity {
        /// Position in the table of sizes.
        index: usize,
        /// The value for this run.
        value: usize,
        /// The capacity.
        capacity: usize,
    },
    /// The pool has more workers than the frame has scratch for.
    #[error("the frame was made for {frame} workers, the pool has {pool}")]
    TooManyWorkers {
        /// Workers the frame was made for.
        frame: usize,
        /// Workers of the pool.
        pool: usize,
    },
    /// The system refused the memory.
    #[error("the system refuses {bytes} bytes for the arena and scratch of a run")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// A step stopped the run.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// Limits and observers of one run.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunControl<'c> {
    /// Ends the run between two steps once it is true.
    pub cancel: Option<&'c AtomicBool>,
    /// Ends the run between two steps once it has passed.
    pub deadline: Option<Instant>,
    /// Gains each step's wall time in nanoseconds; one counter a step.
    pub times: Option<&'c [AtomicU64]>,
}

/// Arena, scratch and sizes of one run in flight, for one schedule under fixed capacities.
#[derive(Debug)]
pub struct Frame {
    schedule: Arc<Schedule>,
    arena: AlignedBytes,
    scratch: AlignedBytes,
    workers: usize,
    worker_scratch: usize,
    shared_scratch: usize,
    capacities: Vec<usize>,
    sizes: Vec<usize>,
    regions: Vec<RawRegion>,
    external: Vec<bool>,
}

// SAFETY: the raw regions point into `arena` (owned), into bytes that `schedule` keeps alive, or are empty; external ones are
// set by `Launch`, which holds their borrows and clears them when it is dropped.
unsafe impl Send for Frame {}

impl Frame {
    /// A frame for a schedule over `regions` regions, with arena buffers at `placed` byte ranges (region, range) and sizes up to
    /// `capacities`. Fails if a step's written operand overlaps another of its operands.
    pub fn new(
        schedule: Arc<Schedule>,
        regions: usize,
        arena_bytes: usize,
        placed: &[(usize, Range<usize>)],
        capacities: &[usize],
        workers: usize,
    ) -> Result<Self, FrameError> {
        let refused = |bytes| FrameError::OutOfMemory { bytes };
        let mut arena = AlignedBytes::try_zeroed(arena_bytes).ok_or_else(|| refused(arena_bytes))?;
        let mut table = vec![RawRegion::EMPTY; regions];
        let mut external = vec![true; regions];
        let base = arena.as_mut_slice().as_mut_ptr();
        for (region, range) in placed {
            if range.end > arena_bytes || range.start > range.end {
                return Err(FrameError::OutOfBounds { region: *region, need: range.end, have: arena_bytes });
            }
            let pointer = base.wrapping_add(range.start);
            table[*region] = RawRegion { pointer, len: range.len(), writable: true };
            external[*region] = false;
        }
        for shared in &schedule.shared {
            let bytes = (*shared.bytes).as_ref();
            let pointer = bytes.as_ptr().cast_mut();
            table[shared.region] = RawRegion { pointer, len: bytes.len(), writable: false };
            external[shared.region] = false;
        }
        let (worker_scratch, shared_scratch) = schedule.scratch_bytes(capacities, workers);
        let scratch_bytes = worker_scratch.saturating_mul(workers).saturating_add(shared_scratch);
        let scratch = AlignedBytes::try_zeroed(scratch_bytes).ok_or_else(|| refused(scratch_bytes))?;
        let frame = Self {
            schedule,
            arena,
            scratch,
            workers,
            worker_scratch,
            shared_scratch,
            capacities: capacities.to_vec(),
            sizes: Vec::with_capacity(capacities.len()),
            regions: table,
            external,
        };
        frame.check_overlaps()?;
        Ok(frame)
    }

    /// Bytes of arena and scratch.
    pub fn bytes(&self) -> (usize, usize) {
        (self.arena.len(), self.scratch.len())
    }

    /// The sizes of the next run, to be filled by the caller (see `SizeTable::eval`).
    pub fn sizes_mut(&mut self) -> &mut Vec<usize> {
        &mut self.sizes
    }

    /// The sizes of the next run.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// Starts binding the regions that are not in the arena.
    pub fn launch(&mut self) -> Launch<'_> {
        // A launch that was forgotten rather than dropped must not leave its borrows behind.
        self.clear_external();
        Launch { frame: self }
    }

    fn clear_external(&mut self) {
        for (region, external) in self.regions.iter_mut().zip(&self.external) {
            if *external {
                *region = RawRegion::EMPTY;
            }
        }
    }

    /// Within each step, what is written must not overlap anything else, but for an identical range in place. Regions outside the
    /// arena are exclusive borrows or read-only, so only their number counts.
    fn check_overlaps(&self) -> Result<(), FrameError> {
        for (step, kernel) in self.schedule.steps.iter().enumerate() {
            let mut operands: Vec<(Operand, Access)> = Vec::new();
            kernel.operands(&mut |operand, access| operands.push((operand.clone(), access)));
            for (i, (write, access)) in operands.iter().enumerate() {
                if *access == Access::Read {
                    continue;
                }
                for (j, (other, other_access)) in operands.iter().enumerate() {
                    let same = write.region == other.region
                        && write.offset_bytes() == other.offset_bytes()
                        && write.stride == other.stride;
                    let in_place = *access == Access::WriteInPlace && *other_access == Access::Read && same;
                    if i == j || in_place || !self.overlap(write, other) {
                        continue;
                    }
                    let (name, write, other) = (kernel.name(), write.region, other.region);
                    return Err(FrameError::Overlap { step, name, write, other });
                }
            }
        }
        Ok(())
    }

    fn overlap(&self, a: &Operand, b: &Operand) -> bool {
        if a.region == b.region {
            return !disjoint_columns(a, b, &self.capacities);
        }
        let (x, y) = (&self.regions[a.region], &self.regions[b.region]);
        if self.external[a.region] || self.external[b.region] || x.len == 0 || y.len == 0 {
            return false;
        }
        let (x0, y0) = (x.pointer as usize, y.pointer as usize);
        x0 < y0 + y.len && y0 < x0 + x.len
    }

    fn check_bounds(&self) -> Result<(), FrameError> {
        for (index, (&value, &capacity)) in self.sizes.iter().zip(&self.capacities).enumerate() {
            if value > capacity {
                return Err(FrameError::AboveCapacity { index, value, capacity });
            }
        }
        for operand in &self.schedule.bounds {
            let region = &self.regions[operand.region];
            let need = operand.end_bytes(&self.sizes).unwrap_or(usize::MAX);
            if need > region.len {
                return Err(FrameError::OutOfBounds { region: operand.region, need, have: region.len });
            }
            let align = operand.element_bytes().min(8);
            if !(region.pointer as usize).is_multiple_of(align) {
                return Err(FrameError::Misaligned { region: operand.region, align });
            }
        }
        Ok(())
    }
}

/// Two operands of one region with the same row stride that occupy different columns.
fn disjoint_columns(a: &Operand, b: &Operand, sizes: &[usize]) -> bool {
    let (Some(stride), Some(other)) = (a.stride, b.stride) else { return false };
    let (from_a, from_b) = (a.offset % stride.max(1), b.offset % stride.max(1));
    stride == other && (from_a + a.columns(sizes) <= from_b || from_b + b.columns(sizes) <= from_a)
}

/// A frame being bound and run; the borrows of inputs, outputs and states end with it.
pub struct Launch<'f> {
    frame: &'f mut Frame,
}

impl<'f> Launch<'f> {
    /// Binds a region to bytes that are only read.
    pub fn read(&mut self, region: usize, bytes: &'f [u8]) {
        let pointer = bytes.as_ptr().cast_mut();
        self.set(region, RawRegion { pointer, len: bytes.len(), writable: false });
    }

    /// Binds a region to bytes that may be written.
    pub fn write(&mut self, region: usize, bytes: &'f mut [u8]) {
        self.set(region, RawRegion { pointer: bytes.as_mut_ptr(), len: bytes.len(), writable: true });
    }

    fn set(&mut self, region: usize, raw: RawRegion) {
        if self.frame.external[region] {
            self.frame.regions[region] = raw;
        }
    }

    /// Checks every operand against its region, then executes the steps on the pool. Allocates nothing unless it fails.
    pub fn run(&mut self, pool: &Pool, control: RunControl<'_>) -> Result<(), FrameError> {
        let frame = &mut *self.frame;
        if pool.threads() > frame.workers {
            return Err(FrameError::TooManyWorkers { frame: frame.workers, pool: pool.threads() });
        }
        frame.check_bounds()?;
        let schedule = Arc::clone(&frame.schedule);
        for (step, kernel) in schedule.steps.iter().enumerate() {
            let mut read_only = None;
            kernel.operands(&mut |operand, access| {
                if access != Access::Read && !frame.regions[operand.region].writable {
                    read_only = Some(operand.region);
                }
            });
            if let Some(region) = read_only {
                return Err(FrameError::ReadOnly { step, name: kernel.name(), region });
            }
        }
        let run = Run {
            regions: &frame.regions,
            sizes: &frame.sizes,
            scratch: frame.scratch.as_mut_slice().as_mut_ptr(),
            worker_scratch: frame.worker_scratch,
            shared_scratch: frame.shared_scratch,
            failure: OnceLock::new(),
        };
        pool.run(|team| {
            let mut ahead = ReadAhead::default();
            for (at, step) in schedule.steps.iter().enumerate() {
                let started = (team.index() == 0 && control.times.is_some()).then(Instant::now);
                if team.index() == 0
                    && let Some(stop) = control.stop()
                {
                    let _ = run.failure.set((at, stop));
                }
                if let Err(error) = step.run(&run, team) {
                    let _ = run.failure.set((at, error));
                }
                team.barrier_with(|| ahead.read(&schedule, at, &run, team));
                if let (Some(started), Some(times)) = (started, control.times) {
                    let elapsed = started.elapsed().as_nanos() as u64;
                    times.get(at).map(|t| t.fetch_add(elapsed, Ordering::Relaxed));
                }
                if run.failure.get().is_some_and(|(failed, _)| *failed <= at) {
                    break;
                }
            }
        });
        run.failure.into_inner().map_or(Ok(()), |(_, error)| Err(error.into()))
    }
}

/// Parts that a step's worker has read ahead at most.
const PARTS_AHEAD: usize = 64;

/// What a worker has read ahead of a step.
#[derive(Default)]
struct ReadAhead {
    step: usize,
    parts: usize,
}

impl ReadAhead {
    /// Reads one part more of the next step after `at` that has something to read; whether there is more.
    fn read(&mut self, schedule: &Schedule, at: usize, run: &Run<'_>, team: &Team<'_>) -> bool {
        let Some(step) = schedule.ahead[at] else { return false };
        if self.step != step {
            *self = ReadAhead { step, parts: 0 };
        }
        let part = self.parts;
        self.parts += 1;
        part < PARTS_AHEAD && schedule.steps[step].read_ahead(run, team, part)
    }
}

impl Drop for Launch<'_> {
    fn drop(&mut self) {
        self.frame.clear_external();
    }
}

impl RunControl<'_> {
    fn stop(&self) -> Option<StepError> {
        if self.cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
            return Some(StepError::Cancelled);
        }
        self.deadline.is_some_and(|d| Instant::now() >= d).then_some(StepError::DeadlinePassed)
    }
}
