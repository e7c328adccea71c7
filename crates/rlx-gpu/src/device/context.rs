//! Runs of a program: what goes up, what is launched, what comes back.

use super::Loaded;
use super::driver::{Batch, Call, Driver, Read, Write};
use super::layout::{Layout, Spot};
use super::segments::Reach;
use super::states::{self, Resident};
use super::words;
use crate::lower::is_weight;
use rlx::backend::{BackendError, Context, Io};
use rlx::plan::{BufferId, BufferKind, InterfaceEntry, Lir, PlanError};
use rlx_kernels::schedule::{FrameError, RunControl, StepError};
use rlx_tensor::time::Instant;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Words of checks stand first.
const GUARDS: Spot = Spot { segment: 0, at: 0 };

/// A device's memory for one run at a time.
pub(super) struct DeviceContext<D: Driver> {
    loaded: Arc<Loaded<D>>,
    layout: Layout,
    /// The first segment of the arena, then the others.
    arena: D::Buffer,
    further: Vec<D::Buffer>,
    reach: Reach<D>,
    /// The table of arguments, with room for every launch of the plan.
    arguments: D::Buffer,
    /// What the table holds: steps of a text come with the same arguments one after another.
    written: Vec<u32>,
    work: D::Work,
    capacities: Vec<usize>,
    sizes: Vec<usize>,
    arena_bytes: usize,
}

impl<D: Driver> fmt::Debug for DeviceContext<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceContext({} words)", self.layout.words())
    }
}

fn stop(control: &RunControl<'_>) -> Result<(), BackendError> {
    if control.cancel.is_some_and(|c| c.load(Ordering::Relaxed)) {
        return Err(BackendError::Step(StepError::Cancelled));
    }
    match control.deadline.is_some_and(|d| Instant::now() >= d) {
        true => Err(BackendError::Step(StepError::DeadlinePassed)),
        false => Ok(()),
    }
}

impl<D: Driver> DeviceContext<D> {
    pub fn new(loaded: Arc<Loaded<D>>, lir: &Lir) -> Result<Self, BackendError> {
        let limits = loaded.device.driver.limits();
        let layout = loaded.plan.layout(lir, limits.binding_words)?;
        let reach = Reach::new(&loaded, &layout)?;
        let room = |words: &usize| loaded.device.allocate("the arena of a run", *words);
        let (arena, further) = (room(&layout.segments[0])?, &layout.segments[1..]);
        let further = further.iter().map(room).collect::<Result<_, _>>()?;
        let table = loaded.plan.pitch(limits) * loaded.plan.launches.len().max(1);
        let arguments = loaded.device.driver.allocate("the arguments of a run", table)?;
        let work = loaded.device.driver.work()?;
        let capacities = lir.capacities().to_vec();
        let arena_bytes = lir.arena_bytes();
        let (written, sizes) = (Vec::new(), Vec::new());
        Ok(Self {
            loaded,
            layout,
            arena,
            further,
            reach,
            arguments,
            written,
            work,
            capacities,
            sizes,
            arena_bytes,
        })
    }

    fn bind_sizes(&mut self, symbols: &[usize]) -> Result<(), BackendError> {
        let sizes = self.loaded.template.sizes();
        sizes.eval(symbols, &mut self.sizes).map_err(PlanError::from)?;
        for (index, (&value, &capacity)) in self.sizes.iter().zip(&self.capacities).enumerate() {
            if value > capacity {
                return Err(FrameError::AboveCapacity { index, value, capacity }.into());
            }
        }
        Ok(())
    }

    /// What a run writes to the arena before its first kernel.
    fn uploads(&self, io: &mut Io<'_, '_>) -> Result<Vec<(Spot, Vec<u32>)>, BackendError> {
        let template = &self.loaded.template;
        let mut uploads = vec![(GUARDS, vec![0; self.layout.guards])];
        for (id, buffer) in template.buffer_ids() {
            let (Some(dtype), Some(at)) = (self.loaded.plan.dtypes[id.index()], self.layout.placed(id))
            else {
                continue;
            };
            let words = match &buffer.kind {
                BufferKind::Input(i) => words::widened(&template.inputs()[*i].name, dtype, io.inputs[*i])?,
                BufferKind::State(i) => {
                    words::widened(&template.states()[*i].name, dtype, io.states[*i].bytes()?)?
                }
                BufferKind::Const(tensor) if !is_weight(template, id) => {
                    words::widened("a constant", dtype, tensor.bytes())?
                }
                _ => continue,
            };
            uploads.push((at, words));
        }
        Ok(uploads)
    }

    /// What comes back: the words of checks, outputs, states that do not stay.
    fn downloads(&self, io: &Io<'_, '_>) -> Vec<(Spot, usize)> {
        let template = &self.loaded.template;
        let range = |entry: &InterfaceEntry, bytes: usize| {
            let (dtype, buffer) = (entry.place.dtype, entry.place.buffer);
            let spot = self.layout.placed(buffer).unwrap_or(GUARDS);
            (spot, bytes / dtype.element_bytes().unwrap_or(1))
        };
        let mut downloads = vec![(GUARDS, self.layout.guards)];
        let outputs = template.outputs().iter().zip(io.outputs.iter());
        downloads.extend(outputs.map(|(entry, bytes)| range(entry, bytes.len())));
        let states = template.states().iter().zip(io.states.iter());
        let states = states.filter(|(entry, _)| self.layout.placed(entry.place.buffer).is_some());
        downloads.extend(states.map(|(entry, state)| range(entry, state.len())));
        downloads
    }

    /// Makes the batch of a run and hands it to the device.
    fn submit(
        &mut self,
        io: &mut Io<'_, '_>,
        downloads: &[(Spot, usize)],
    ) -> Result<D::Pending, BackendError> {
        let loaded = Arc::clone(&self.loaded);
        let (template, plan, device) = (&loaded.template, &loaded.plan, &loaded.device);
        let uploads = self.uploads(io)?;
        let residents = states::settle(&loaded, io.states)?;
        let resident =
            |buffer: BufferId| residents.iter().find(|(id, _)| *id == buffer).map(|(_, state)| *state);
        let words = |buffer: BufferId| resident(buffer).map_or(0, Resident::words);
        let limits = device.driver.limits();
        let schedule = plan.schedule(template, &self.layout, limits, &self.sizes, io.symbols, &words)?;
        let Self { arena, further, reach, arguments, written, work, .. } = self;
        let (arena, further, reach) = (&*arena, &**further, &*reach);
        let bound = |at: usize| {
            let launch = &plan.launches[at];
            let weights = launch.weights.iter().filter_map(|bound| loaded.weights.get(bound).map(|b| &**b));
            let states = launch.states.iter().filter_map(|&b| resident(b).map(Resident::buffer));
            weights.chain(states).chain(reach.further(at).iter().map(|&s| &further[s - 1])).collect()
        };
        let segment = |spot: Spot| spot.segment.checked_sub(1).map_or(arena, |at| &further[at]);
        let calls = schedule.planned.iter().map(|planned| Call {
            kernel: reach.kernel(planned.launch),
            arguments: planned.arguments,
            bound: bound(planned.launch),
            grid: planned.grid,
        });
        let arguments = &*arguments;
        let known = *written == schedule.arguments;
        // What a submission that fails has written is not known.
        let table = if known { std::mem::take(written) } else { schedule.arguments };
        let write = if known { Vec::new() } else { table.clone() };
        written.clear();
        let write = Write { to: arguments, at: 0, words: write };
        let uploads =
            uploads.into_iter().map(|(spot, words)| Write { to: segment(spot), at: spot.at, words });
        let batch = Batch {
            graph: template.name(),
            arena,
            further,
            arguments,
            table: &table,
            pitch: schedule.pitch,
            writes: std::iter::once(write).chain(uploads).filter(|w| !w.words.is_empty()).collect(),
            calls: calls.collect(),
            reads: downloads
                .iter()
                .map(|&(spot, count)| Read { from: segment(spot), at: spot.at, count })
                .collect(),
        };
        let pending = device.driver.submit(work, &batch)?;
        device.moved.count(batch.writes.iter().map(|w| w.words.len()).sum(), batch.words_read());
        *written = table;
        Ok(pending)
    }

    /// Fails for the first check of a kernel that did not hold.
    fn check(&self, failed: &[u32]) -> Result<(), BackendError> {
        match self.loaded.plan.guards.iter().zip(failed).find(|(_, word)| **word != 0) {
            None => Ok(()),
            Some((guard, _)) => {
                let step = &self.loaded.template.steps()[guard.step];
                if guard.of_device {
                    return Err(BackendError::Unsupported {
                        op: step.op.def().name().to_owned(),
                        location: step.location.clone(),
                        reason: guard.reason.to_owned(),
                    });
                }
                let step = format!("{} at {}", step.op.def().name(), step.location);
                Err(BackendError::Step(StepError::Value { step, reason: guard.reason.to_owned() }))
            }
        }
    }

    /// Gives the caller what was read.
    fn deliver(
        &self,
        io: &mut Io<'_, '_>,
        downloads: &[(Spot, usize)],
        words: &[u32],
    ) -> Result<(), BackendError> {
        let template = &self.loaded.template;
        let mut rest = words;
        let mut ranges = downloads.iter().map(|&(_, count)| {
            let (range, after) = rest.split_at(count);
            rest = after;
            range
        });
        ranges.next();
        for (entry, bytes) in template.outputs().iter().zip(io.outputs.iter_mut()) {
            words::narrowed(entry.place.dtype, ranges.next().unwrap_or_default(), bytes);
        }
        for (entry, state) in template.states().iter().zip(io.states.iter_mut()) {
            if self.layout.placed(entry.place.buffer).is_some() {
                let words = ranges.next().unwrap_or_default();
                words::narrowed(entry.place.dtype, words, state.bytes_mut()?);
            }
        }
        Ok(())
    }
}

impl<D: Driver> Context for DeviceContext<D> {
    fn run(&mut self, mut io: Io<'_, '_>) -> Result<(), BackendError> {
        stop(&io.control)?;
        self.bind_sizes(io.symbols)?;
        let downloads = self.downloads(&io);
        let pending = self.submit(&mut io, &downloads)?;
        let words = self.loaded.device.driver.read(&mut self.work, pending)?;
        self.check(&words[..self.layout.guards])?;
        stop(&io.control)?;
        self.deliver(&mut io, &downloads, &words)
    }

    fn bytes(&self) -> (usize, usize) {
        (self.arena_bytes, (self.layout.words() * 4).saturating_sub(self.arena_bytes))
    }
}
