//! Owned bytes on 64-byte boundaries.

use bytemuck::{Pod, Zeroable};
use std::fmt;

/// Alignment of every owned buffer, in bytes: one cache line, one AVX-512 vector.
pub const ALIGNMENT: usize = 64;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; ALIGNMENT]);

/// A fixed-length, zero-initialised byte buffer whose start is 64-byte aligned.
#[derive(Clone)]
pub struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBytes {
    /// A buffer of `len` zero bytes; the system commits its pages when they are first written.
    pub fn zeroed(len: usize) -> Self {
        Self { lines: bytemuck::zeroed_vec(len.div_ceil(ALIGNMENT)), len }
    }

    /// As [`AlignedBytes::zeroed`]; `None` if the system refuses that much memory.
    pub fn try_zeroed(len: usize) -> Option<Self> {
        let lines = bytemuck::try_zeroed_vec(len.div_ceil(ALIGNMENT)).ok()?;
        Some(Self { lines, len })
    }

    /// A buffer that holds a copy of `bytes`.
    pub fn copied_from(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.as_mut_slice().copy_from_slice(bytes);
        buffer
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }

    /// The bytes, writable.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBytes({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_on_a_line() {
        for len in [0, 1, 63, 64, 65, 1000] {
            let buffer = AlignedBytes::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_slice().as_ptr() as usize % ALIGNMENT, 0);
        }
        assert_eq!(AlignedBytes::copied_from(&[1, 2, 3]).as_slice(), [1, 2, 3]);
    }
}
