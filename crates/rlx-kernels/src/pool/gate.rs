//! Waiting for a condition over atomics: spin, then yield, then park.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Condvar, Mutex};

use super::{Patience, lock};

/// Where workers wait. The state they wait for lives outside, in atomics.
#[derive(Default)]
pub(super) struct Gate {
    sleepers: AtomicU32,
    mutex: Mutex<()>,
    wake: Condvar,
}

impl Gate {
    /// Returns once `ready` holds.
    pub(super) fn wait(&self, patience: Patience, ready: impl Fn() -> bool) {
        for _ in 0..patience.spins {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
        for _ in 0..patience.yields {
            if ready() {
                return;
            }
            std::thread::yield_now();
        }
        let mut guard = lock(&self.mutex);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        while !ready() {
            guard = self.wake.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Wakes the parked; call after changing the state that `ready` reads.
    pub(super) fn open(&self) {
        // Either this fence comes before the sleeper's, and its `ready` sees the new state, or the load sees the sleeper.
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.mutex));
            self.wake.notify_all();
        }
    }
}
