//! What every device of a chain said.

use super::id::DeviceId;
use crate::session::SessionError;
use std::fmt;

/// A device that was tried, and why it did not do.
#[derive(Debug)]
pub struct DeviceAttempt {
    /// The device.
    pub device: DeviceId,
    /// What went wrong there.
    pub cause: SessionError,
}

/// No device of a chain could compile and run the graph.
#[derive(Debug)]
pub struct DeviceFallbackError {
    /// Every attempt, in order.
    pub attempts: Vec<DeviceAttempt>,
}

impl fmt::Display for DeviceFallbackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no device ran the graph:")?;
        self.attempts.iter().try_for_each(|attempt| write!(f, "\n  {}: {}", attempt.device, attempt.cause))
    }
}

impl std::error::Error for DeviceFallbackError {}
