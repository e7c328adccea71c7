//! The thread pool: a team of workers that executes one closure together (SPMD).
//!
//! [`Pool::run`] enters the pool once; inside, every worker walks the same steps, takes tiles of the current step
//! from a shared ticket ([`Team::tiles`]), or from its own part first ([`Team::near_tiles`]), and meets the others at [`Team::barrier`]. Nothing is allocated per run.

mod gate;
mod quota;

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use gate::Gate;
pub use quota::{cgroup_cpu_limit, default_threads};

/// How long a waiting worker stays hot before it gives its core away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Polls with a pause instruction between them (each some tens of nanoseconds).
    pub spins: u32,
    /// Polls with a `yield` to the operating system between them, after the spins; the worker parks after them.
    pub yields: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { spins: 2_000, yields: 2_000 }
    }
}

#[repr(align(128))]
struct Padded<T>(T);

type Job = *const (dyn Fn(&Team<'_>) + Sync);

struct Shared {
    count: usize,
    patience: Patience,
    /// Number of the current run; a change is the signal to start, `STOP` the signal to end.
    epoch: Padded<AtomicU32>,
    job: UnsafeCell<Option<Job>>,
    ticket: Padded<AtomicUsize>,
    /// Claims of each worker's part.
    parts: Box<[Padded<AtomicUsize>]>,
    arrived: Padded<AtomicUsize>,
    phase: Padded<AtomicU32>,
    finished: Padded<AtomicUsize>,
    poisoned: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    start_gate: Gate,
    phase_gate: Gate,
    end_gate: Gate,
}

const STOP: u32 = u32::MAX;

// SAFETY: `job` is written by the caller of `run`, who holds the run lock, while no worker is inside a run, and is
// published by the release store of `epoch`; the other fields are synchronised by themselves.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is to a `Sync` closure that outlives the run during which it is read.
unsafe impl Send for Shared {}

/// The payload of the unwinding that a poisoned team starts in workers other than the one that panicked.
struct Poisoned;

impl Shared {
    /// Forgets the claims of a phase that every worker has left.
    fn forget_claims(&self) {
        self.ticket.0.store(0, Ordering::Relaxed);
        self.parts.iter().for_each(|part| part.0.store(0, Ordering::Relaxed));
        self.arrived.0.store(0, Ordering::Relaxed);
    }

    fn poison(&self, payload: Box<dyn Any + Send>) {
        if !payload.is::<Poisoned>() {
            let mut first = lock(&self.panic);
            first.get_or_insert(payload);
        }
        self.poisoned.store(true, Ordering::SeqCst);
        self.phase_gate.open();
    }

    /// Runs the job as worker `index`; returns after the closure ended or unwound.
    fn execute(&self, index: usize, job: &(dyn Fn(&Team<'_>) + Sync)) {
        let team = Team { shared: self, index, claimed: Cell::new(false), phase: Cell::new(0) };
        team.phase.set(self.phase.0.load(Ordering::Relaxed));
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(&team))) {
            self.poison(payload);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A fixed set of worker threads. The thread that calls [`Pool::run`] is worker 0.
///
/// Calls from several threads are served one after the other. Dropping the pool ends its threads.
pub struct Pool {
    shared: Arc<Shared>,
    entry: Mutex<()>,
    handles: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Pool {
    /// A pool of `threads` workers (at least one), the caller of [`Pool::run`] included.
    ///
    /// If the operating system refuses a thread, the pool has fewer; [`Pool::threads`] tells. Results never depend
    /// on the number of workers.
    pub fn new(threads: usize) -> Pool {
        Pool::with_patience(threads, Patience::default())
    }

    /// As [`Pool::new`], with the waiting behaviour chosen.
    pub fn with_patience(threads: usize, patience: Patience) -> Pool {
        let wanted = threads.max(1);
        let (senders, handles) = Pool::spawn(wanted);
        let shared = Arc::new(Shared {
            count: handles.len() + 1,
            patience,
            epoch: Padded(AtomicU32::new(0)),
            job: UnsafeCell::new(None),
            ticket: Padded(AtomicUsize::new(0)),
            parts: (0..=handles.len()).map(|_| Padded(AtomicUsize::new(0))).collect(),
            arrived: Padded(AtomicUsize::new(0)),
            phase: Padded(AtomicU32::new(0)),
            finished: Padded(AtomicUsize::new(0)),
            poisoned: AtomicBool::new(false),
            panic: Mutex::new(None),
            start_gate: Gate::default(),
            phase_gate: Gate::default(),
            end_gate: Gate::default(),
        });
        for sender in senders {
            // A worker that has gone (it cannot, before it has received its team) would only make the send fail.
            let _ = sender.send(Arc::clone(&shared));
        }
        Pool { shared, entry: Mutex::new(()), handles }
    }

    /// Starts up to `wanted - 1` threads, each waiting for the team it belongs to.
    fn spawn(wanted: usize) -> (Vec<std::sync::mpsc::Sender<Arc<Shared>>>, Vec<JoinHandle<()>>) {
        let (mut senders, mut handles) = (Vec::new(), Vec::new());
        for index in 1..wanted {
            let (sender, receiver) = std::sync::mpsc::channel::<Arc<Shared>>();
            let builder = std::thread::Builder::new().name(format!("rlx-worker-{index}"));
            let body = move || {
                if let Ok(shared) = receiver.recv() {
                    serve(&shared, index);
                }
            };
            let Ok(handle) = builder.spawn(body) else { break };
            senders.push(sender);
            handles.push(handle);
        }
        (senders, handles)
    }

    /// The number of workers, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.count
    }

    /// Executes `body` once on every worker and returns when all have finished.
    ///
    /// # Panics
    /// With the payload of the first worker that panicked, after all have unwound; the pool stays usable. Panics at
    /// once if called from inside a run (of any pool), which could not make progress.
    pub fn run<F: Fn(&Team<'_>) + Sync>(&self, body: F) {
        assert!(!INSIDE.get(), "Pool::run called from inside a run");
        let entry = lock(&self.entry);
        INSIDE.set(true);
        let shared = &*self.shared;
        if shared.count > 1 {
            let job: &(dyn Fn(&Team<'_>) + Sync) = &body;
            // SAFETY: only the lifetime is erased; `run` returns after every worker has counted itself finished, and
            // none touches the job after that.
            let job: Job = unsafe { std::mem::transmute::<&(dyn Fn(&Team<'_>) + Sync), Job>(job) };
            // SAFETY: the entry lock is held and no worker is inside a run, so nothing else accesses the cell.
            unsafe { *shared.job.get() = Some(job) };
            let epoch = shared.epoch.0.load(Ordering::Relaxed);
            let next = if epoch + 1 == STOP { 0 } else { epoch + 1 };
            shared.epoch.0.store(next, Ordering::SeqCst);
            shared.start_gate.open();
        }
        shared.execute(0, &body);
        if shared.count > 1 {
            let others = shared.count - 1;
            shared.end_gate.wait(shared.patience, || shared.finished.0.load(Ordering::SeqCst) == others);
            shared.finished.0.store(0, Ordering::Relaxed);
        }
        shared.forget_claims();
        let failed = shared.poisoned.swap(false, Ordering::Relaxed);
        let payload = if failed { lock(&shared.panic).take() } else { None };
        INSIDE.set(false);
        drop(entry);
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.epoch.0.store(STOP, Ordering::SeqCst);
        self.shared.start_gate.open();
        for handle in self.handles.drain(..) {
            // A worker catches every panic of a job, so there is no payload to pass on.
            let _ = handle.join();
        }
    }
}

fn serve(shared: &Shared, index: usize) {
    INSIDE.set(true);
    let mut seen = 0;
    loop {
        shared.start_gate.wait(shared.patience, || shared.epoch.0.load(Ordering::SeqCst) != seen);
        seen = shared.epoch.0.load(Ordering::SeqCst);
        if seen == STOP {
            return;
        }
        // SAFETY: the load of `epoch` saw the store that follows the caller's write of `job`; the caller writes again
        // only after this worker has counted itself finished.
        let job = unsafe { *shared.job.get() };
        if let Some(job) = job {
            // SAFETY: the closure lives until `run` returns, which waits for the count below.
            shared.execute(index, unsafe { &*job });
        }
        shared.finished.0.fetch_add(1, Ordering::SeqCst);
        shared.end_gate.open();
    }
}

/// One worker's view of a run.
///
/// A run is a sequence of *phases* separated by [`Team::barrier`]. In each phase a worker may call [`Team::tiles`] at
/// most once, and all workers must call it with the same count (or not at all) and pass the same barriers.
pub struct Team<'a> {
    shared: &'a Shared,
    index: usize,
    claimed: Cell<bool>,
    phase: Cell<u32>,
}

impl Team<'_> {
    /// This worker's number, `0..count`.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The number of workers in the run.
    pub fn count(&self) -> usize {
        self.shared.count
    }

    /// Claims indices of `0..n` one at a time: over the whole team, each index is handed out exactly once. A worker's first is its
    /// own number.
    ///
    /// # Panics
    /// If called twice without a barrier between, because the second loop would share the first one's ticket.
    pub fn tiles(&self, n: usize) -> Tiles<'_> {
        assert!(!self.claimed.replace(true), "Team::tiles called twice without a barrier between");
        Tiles { shared: self.shared, first: self.index, last: None, n }
    }

    /// As [`Team::tiles`], but a worker claims indices of its own part first, one of as many adjacent parts of `0..n` as there are
    /// workers, in order; then what is left of others' parts. So a worker finds near it what it wrote in the step before, where
    /// steps cut alike.
    ///
    /// # Panics
    /// As [`Team::tiles`].
    pub fn near_tiles(&self, n: usize) -> NearTiles<'_> {
        assert!(!self.claimed.replace(true), "Team::near_tiles called twice without a barrier between");
        NearTiles { shared: self.shared, index: self.index, passed: 0, n }
    }

    /// Waits until every worker has arrived; afterwards all writes made before it are visible, and
    /// [`Team::tiles`] may be called again.
    ///
    /// # Panics
    /// Unwinds, silently, if another worker of the run has panicked.
    pub fn barrier(&self) {
        self.barrier_with(|| false);
    }

    /// As [`Team::barrier`]; a worker that waits calls `idle` over and over until it gives false or the wait is over. A call should
    /// take well below a microsecond.
    pub fn barrier_with(&self, mut idle: impl FnMut() -> bool) {
        self.claimed.set(false);
        let shared = self.shared;
        if shared.count == 1 {
            return shared.forget_claims();
        }
        let phase = self.phase.get();
        self.phase.set(phase.wrapping_add(1));
        if shared.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == shared.count {
            shared.forget_claims();
            shared.phase.0.store(phase.wrapping_add(1), Ordering::SeqCst);
            shared.phase_gate.open();
            return;
        }
        let passed = || shared.phase.0.load(Ordering::SeqCst) != phase;
        while !passed() && idle() {}
        shared.phase_gate.wait(shared.patience, || passed() || shared.poisoned.load(Ordering::SeqCst));
        if !passed() {
            resume_unwind(Box::new(Poisoned));
        }
    }
}

/// The indices one worker claims in a phase; see [`Team::tiles`].
pub struct Tiles<'a> {
    shared: &'a Shared,
    first: usize,
    last: Option<usize>,
    n: usize,
}

impl Iterator for Tiles<'_> {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let (last, count) = (self.last, self.shared.count);
        let tile = match last {
            None => self.first,
            Some(last) if count == 1 || last >= self.n => last + 1,
            Some(_) => count + self.shared.ticket.0.fetch_add(1, Ordering::Relaxed),
        };
        self.last = Some(tile);
        (tile < self.n).then_some(tile)
    }
}

/// The indices one worker claims in a phase; see [`Team::near_tiles`].
pub struct NearTiles<'a> {
    shared: &'a Shared,
    index: usize,
    /// Parts that nothing is left of, from the worker's own on.
    passed: usize,
    n: usize,
}

impl Iterator for NearTiles<'_> {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let count = self.shared.count;
        while self.passed < count {
            let part = (self.index + self.passed) % count;
            let tile = part * self.n / count + self.shared.parts[part].0.fetch_add(1, Ordering::Relaxed);
            if tile < (part + 1) * self.n / count {
                return Some(tile);
            }
            self.passed += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests;
