//! What an executable runs: steps over regions of memory, walked by every worker of a team.
//!
//! A *region* is a byte range known by number: a buffer of the arena, a weight, an input, an output, a state. A step names regions
//! through [`Operand`]s and sizes through positions in a table of values that is set before each run. Bounds, alignment and overlap of
//! all operands are checked here, once for a frame or once for a run, which is what lets kernels write through raw pointers.

mod frame;
mod operand;

pub use frame::{Frame, FrameError, Launch, RunControl};
pub use operand::{Access, Operand};

use crate::pool::Team;
use operand::RawRegion;
use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

/// Bytes that live as long as a schedule: a weight or a constant.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Why a step stopped a run. The values a step reads can be wrong (an index, a sequence start); its sizes cannot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// An index in an operand is outside the table it points into.
    #[error("{step}: {what} {index} at position {position} is outside 0..{limit}")]
    Index {
        /// The step.
        step: String,
        /// What the index is.
        what: &'static str,
        /// The index.
        index: i64,
        /// Where it stands.
        position: usize,
        /// First value that is too large.
        limit: usize,
    },
    /// Sequence starts, past lengths or a block table contradict each other or the sizes.
    #[error("{step}: {reason}")]
    Sequences {
        /// The step.
        step: String,
        /// The contradiction.
        reason: String,
    },
    /// Operands whose sizes do not fit each other.
    #[error("{step}: operand sizes do not fit each other")]
    Shape {
        /// The step.
        step: String,
    },
    /// A value the step cannot work with.
    #[error("{step}: {reason}")]
    Value {
        /// The step.
        step: String,
        /// What is wrong.
        reason: String,
    },
    /// The cancel token was set.
    #[error("the run was cancelled")]
    Cancelled,
    /// The deadline passed.
    #[error("the deadline passed before the run ended")]
    DeadlinePassed,
}

/// One kernel call with its operands.
pub trait Step: Send + Sync + fmt::Debug {
    /// The kernel's name, as its family's table spells it.
    fn name(&self) -> String;

    /// Calls `visit` for every operand.
    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access));

    /// Bytes of scratch each worker needs, 64-byte aligned.
    fn worker_scratch(&self, sizes: &[usize]) -> usize {
        let _ = sizes;
        0
    }

    /// Bytes of scratch all workers share, 64-byte aligned.
    fn shared_scratch(&self, sizes: &[usize], workers: usize) -> usize {
        let _ = (sizes, workers);
        0
    }

    /// Executes this worker's share. Every worker of the team calls it and passes the same barriers inside; a step with barriers
    /// inside reports an error before the first, and then every worker reports it.
    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError>;

    /// Whether [`Step::read_ahead`] has anything to read.
    fn reads_ahead(&self) -> bool {
        false
    }

    /// Asks the caches for the `part`-th part, a few KiB, of what this worker will read first and no step of a run writes; whether
    /// there is more. Workers that wait for an earlier step call it.
    fn read_ahead(&self, run: &Run<'_>, team: &Team<'_>, part: usize) -> bool {
        let _ = (run, team, part);
        false
    }

    /// For downcasting.
    fn as_any(&self) -> &dyn Any;
}

/// Steps in order, with the weights they read.
#[derive(Debug, Default)]
pub struct Schedule {
    steps: Vec<Box<dyn Step>>,
    /// For each step the next one that reads ahead.
    ahead: Vec<Option<usize>>,
    bounds: Vec<Operand>,
    shared: Vec<Shared>,
}

struct Shared {
    region: usize,
    bytes: SharedBytes,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}: {} bytes", self.region, (*self.bytes).as_ref().len())
    }
}

impl Schedule {
    /// No steps.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a step at the end.
    pub fn push(&mut self, step: Box<dyn Step>) {
        step.operands(&mut |operand, _| {
            if !self.bounds.contains(operand) {
                self.bounds.push(operand.clone());
            }
        });
        if step.reads_ahead() {
            let next = self.steps.len();
            self.ahead
                .iter_mut()
                .rev()
                .take_while(|ahead| ahead.is_none())
                .for_each(|ahead| *ahead = Some(next));
        }
        self.ahead.push(None);
        self.steps.push(step);
    }

    /// Binds a region to bytes that live as long as the schedule.
    pub fn share(&mut self, region: usize, bytes: SharedBytes) {
        self.shared.push(Shared { region, bytes });
    }

    /// The steps in order.
    pub fn steps(&self) -> &[Box<dyn Step>] {
        &self.steps
    }

    /// `(per worker, shared)` scratch bytes that cover every step at these sizes.
    pub fn scratch_bytes(&self, sizes: &[usize], workers: usize) -> (usize, usize) {
        let line = |bytes: usize| bytes.next_multiple_of(64);
        let each = self.steps.iter().map(|s| s.worker_scratch(sizes)).max().unwrap_or(0);
        let shared = self.steps.iter().map(|s| s.shared_scratch(sizes, workers)).max().unwrap_or(0);
        (line(each), line(shared))
    }
}

/// What a step sees while it runs: sizes, pointers, scratch.
pub struct Run<'r> {
    regions: &'r [RawRegion],
    sizes: &'r [usize],
    scratch: *mut u8,
    worker_scratch: usize,
    shared_scratch: usize,
    failure: OnceLock<(usize, StepError)>,
}

// SAFETY: the pointers are dereferenced by kernels only, within regions that `Launch::run` checked; workers write disjoint tiles.
unsafe impl Sync for Run<'_> {}

impl Run<'_> {
    /// A size by its position in the table.
    pub fn size(&self, index: usize) -> usize {
        self.sizes[index]
    }

    /// An operand's extents, multiplied.
    pub fn len(&self, operand: &Operand) -> usize {
        operand.elements(self.sizes)
    }

    /// An operand's extents but the last, multiplied.
    pub fn rows(&self, operand: &Operand) -> usize {
        operand.rows(self.sizes)
    }

    /// An operand's last extent; 1 for a scalar.
    pub fn columns(&self, operand: &Operand) -> usize {
        operand.columns(self.sizes)
    }

    /// Elements from one row of an operand to the next.
    pub fn stride(&self, operand: &Operand) -> usize {
        operand.row_stride(self.sizes)
    }

    /// An operand's extents.
    pub fn extents<'s>(&'s self, operand: &'s Operand) -> impl ExactSizeIterator<Item = usize> + 's {
        operand.dims.iter().map(|&d| self.sizes[d])
    }

    /// Where an operand starts.
    pub fn pointer<T>(&self, operand: &Operand) -> *mut T {
        self.regions[operand.region].pointer.wrapping_add(operand.offset_bytes()).cast()
    }

    /// A contiguous operand's elements.
    ///
    /// # Safety
    /// `T` has the operand's size and any bits are a `T`; no worker writes the operand while the slice lives.
    pub unsafe fn slice<T>(&self, operand: &Operand) -> &[T] {
        debug_assert!(operand.stride.is_none() && size_of::<T>() == operand.element_bytes());
        // SAFETY: `Launch::run` checked the operand's bounds and alignment; the caller vouches for type and writers.
        unsafe { std::slice::from_raw_parts(self.pointer::<T>(operand), self.len(operand)) }
    }

    /// The scratch of one worker, as long as the largest [`Step::worker_scratch`].
    pub fn worker_scratch<T>(&self, team: &Team<'_>) -> *mut T {
        self.scratch.wrapping_add(self.shared_scratch + team.index() * self.worker_scratch).cast()
    }

    /// The scratch that workers share, as long as the largest [`Step::shared_scratch`].
    pub fn shared_scratch<T>(&self) -> *mut T {
        self.scratch.cast()
    }
}
