//! Ending a run from outside.

use rlx_kernels::schedule::RunControl;
use rlx_tensor::time::Instant;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Lets another thread end a run, or whatever holds the token, between two steps.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends what holds this token.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// True after [`CancelToken::cancel`].
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Limits of a run: this token, and a time at which the run ends unfinished.
    pub fn control(&self, deadline: Option<Instant>) -> RunControl<'_> {
        RunControl { cancel: Some(&self.0), deadline, times: None }
    }
}
