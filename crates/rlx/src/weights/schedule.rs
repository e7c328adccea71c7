//! Where a registry takes a lock: tests let a model checker decide who goes first there.

#[cfg(test)]
thread_local! {
    static MODELLED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `body` with every lock and count of this thread's registries scheduled by the model checker that calls it.
#[cfg(test)]
pub(super) fn modelled(body: impl FnOnce()) {
    MODELLED.with(|modelled| modelled.set(true));
    body();
    MODELLED.with(|modelled| modelled.set(false));
}

/// A point at which another thread may go on.
pub(super) fn point() {
    #[cfg(test)]
    if MODELLED.with(std::cell::Cell::get) {
        shuttle::thread::yield_now();
    }
}

/// Takes a lock. A model checker waits for it by letting others go on.
pub(super) fn take<G>(attempt: impl Fn() -> Option<G>, wait: impl FnOnce() -> G) -> G {
    #[cfg(test)]
    if MODELLED.with(std::cell::Cell::get) {
        loop {
            point();
            if let Some(guard) = attempt() {
                return guard;
            }
        }
    }
    drop(attempt);
    wait()
}
