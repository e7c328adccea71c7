//! A clock that the host of a module gives. The standard library's stops a WebAssembly module that asks it.

use std::ops::{Add, Sub};
use std::sync::OnceLock;
use std::time::Duration;

static CLOCK: OnceLock<fn() -> Duration> = OnceLock::new();

/// Sets the clock, which must never go back: the time since any fixed point. Until then, time stands still. False if it was set before.
pub fn set_clock(clock: fn() -> Duration) -> bool {
    CLOCK.set(clock).is_ok()
}

/// A point in time, as [`std::time::Instant`] is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

impl Instant {
    /// Now.
    pub fn now() -> Self {
        Instant(CLOCK.get().map_or(Duration::ZERO, |clock| clock()))
    }

    /// The time since then.
    pub fn elapsed(&self) -> Duration {
        Instant::now().duration_since(*self)
    }

    /// The time from `earlier` to this; none if it is later.
    pub fn duration_since(&self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// This much later; `None` beyond what can be told.
    pub fn checked_add(&self, duration: Duration) -> Option<Self> {
        self.0.checked_add(duration).map(Instant)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    fn add(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_add(duration))
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Instant) -> Duration {
        self.duration_since(earlier)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    static MS: AtomicU64 = AtomicU64::new(0);

    #[test]
    fn time_stands_still_until_the_host_gives_a_clock() {
        MS.store(500, Ordering::SeqCst);
        let before = Instant::now();
        assert_eq!(before.elapsed(), Duration::ZERO);
        assert!(set_clock(|| Duration::from_millis(MS.load(Ordering::SeqCst))));
        assert!(!set_clock(|| Duration::ZERO));
        let start = Instant::now();
        MS.store(750, Ordering::SeqCst);
        assert_eq!(start.elapsed(), Duration::from_millis(250));
        assert_eq!(start - Instant::now(), Duration::ZERO);
        assert!(Instant::now() >= start + Duration::from_millis(250));
        assert!(start.checked_add(Duration::MAX).is_none());
    }
}
