//! Buffers that survive runs: on the host, or where a device keeps them.

use super::BackendError;
use rlx_tensor::storage::AlignedBytes;
use std::any::Any;
use std::fmt;

/// A state's content in a device's memory.
pub trait ResidentState: Any + Send + Sync + fmt::Debug {
    /// Copies the content to the host, in the state's dtype.
    ///
    /// # Errors
    /// [`BackendError::Lost`] if the device has gone, and the content with it.
    fn fetch(&self, bytes: &mut [u8]) -> Result<(), BackendError>;
}

/// A state's buffer. Where a device keeps the content, the host's bytes are out of date until they are asked for.
#[derive(Debug)]
pub struct StateBuffer {
    host: AlignedBytes,
    resident: Option<Box<dyn ResidentState>>,
}

impl From<AlignedBytes> for StateBuffer {
    fn from(host: AlignedBytes) -> Self {
        StateBuffer { host, resident: None }
    }
}

impl StateBuffer {
    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.host.len()
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }

    /// Whether a device keeps the content.
    pub fn is_resident(&self) -> bool {
        self.resident.is_some()
    }

    /// The content, brought back if a device keeps it; the device's copy stays the one in use.
    ///
    /// # Errors
    /// As [`ResidentState::fetch`].
    pub fn bytes(&mut self) -> Result<&[u8], BackendError> {
        if let Some(resident) = &self.resident {
            resident.fetch(self.host.as_mut_slice())?;
        }
        Ok(self.host.as_slice())
    }

    /// The content, brought back for good and to be written.
    ///
    /// # Errors
    /// As [`ResidentState::fetch`].
    pub fn bytes_mut(&mut self) -> Result<&mut [u8], BackendError> {
        self.bytes()?;
        self.resident = None;
        Ok(self.host.as_mut_slice())
    }

    /// What a device keeps, if it is of this kind.
    pub fn resident<T: ResidentState>(&self) -> Option<&T> {
        let resident: &dyn Any = &**self.resident.as_ref()?;
        resident.downcast_ref()
    }

    /// From now on a device keeps the content.
    pub fn keep(&mut self, resident: impl ResidentState) {
        self.resident = Some(Box::new(resident));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU8, Ordering};

    /// A device whose memory holds one byte all over; 0 for a device that is lost.
    #[derive(Debug)]
    struct Far(AtomicU8);

    impl ResidentState for Far {
        fn fetch(&self, bytes: &mut [u8]) -> Result<(), BackendError> {
            match self.0.load(Ordering::SeqCst) {
                0 => Err(BackendError::Lost { reason: "it fell off the bus".to_owned() }),
                byte => {
                    bytes.fill(byte);
                    Ok(())
                }
            }
        }
    }

    #[test]
    fn the_devices_content_counts_until_the_host_writes() {
        let mut state = StateBuffer::from(AlignedBytes::copied_from(&[1, 2]));
        state.keep(Far(AtomicU8::new(7)));
        assert_eq!(state.bytes().unwrap(), [7, 7]);
        assert!(state.is_resident());
        state.bytes_mut().unwrap()[1] = 9;
        assert_eq!(state.bytes().unwrap(), [7, 9]);
        assert!(!state.is_resident());
    }

    #[test]
    fn what_was_on_a_lost_device_is_an_error_not_what_the_host_had() {
        let mut state = StateBuffer::from(AlignedBytes::copied_from(&[1, 2]));
        state.keep(Far(AtomicU8::new(0)));
        for _ in 0..2 {
            assert!(matches!(state.bytes(), Err(BackendError::Lost { .. })));
            assert!(state.bytes_mut().is_err());
        }
    }
}
