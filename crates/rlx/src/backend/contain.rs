//! The boundary that no panic of a backend crosses.

use super::BackendError;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Calls into a backend: a panic comes back as [`BackendError::Panicked`]. The process's panic hook is not touched.
///
/// What the call may have left half done must not be used again; callers discard the executable or the backend.
pub(crate) fn contain<T>(call: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result,
        Err(payload) => Err(BackendError::Panicked { message: message_of(payload.as_ref()) }),
    }
}

fn message_of(payload: &(dyn Any + Send)) -> String {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (None, Some(text)) => text.clone(),
        (None, None) => "a panic without a message".to_owned(),
    }
}
