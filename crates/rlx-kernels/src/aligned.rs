//! Memory aligned for vector loads and, where large, for huge pages.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Alignment of every [`AlignedBuf`], one cache line.
pub const LINE_BYTES: usize = 64;

const HUGE_BYTES: usize = 2 << 20;

/// A zero-initialised byte buffer aligned to 64 bytes; from 2 MiB on, to 2 MiB, with huge pages asked for.
pub struct AlignedBuf {
    start: NonNull<u8>,
    layout: Option<Layout>,
    len: usize,
}

// SAFETY: the buffer owns its memory exclusively, as a `Box<[u8]>` would.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access is read-only.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` zero bytes; `None` if `len` is more than an allocation can be.
    ///
    /// Aborts, as every allocation does, if the machine has no memory left.
    pub fn zeroed(len: usize) -> Option<AlignedBuf> {
        let align = if len >= HUGE_BYTES { HUGE_BYTES } else { LINE_BYTES };
        let layout = Layout::from_size_align(len, align).ok()?;
        if len == 0 {
            return Some(AlignedBuf { start: NonNull::<Line>::dangling().cast(), layout: None, len });
        }
        // SAFETY: `layout` has a size other than zero.
        let start = unsafe { alloc(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        if align == HUGE_BYTES {
            // The first write decides about a page, and `alloc_zeroed` writes where the alignment is not that of `malloc`.
            advise_huge(start.as_ptr(), len);
        }
        // SAFETY: the allocation is valid for `len` bytes.
        unsafe { start.write_bytes(0, len) };
        Some(AlignedBuf { start, layout: Some(layout), len })
    }

    /// A buffer of `len` zeros of type `f32`.
    pub fn zeroed_f32(len: usize) -> Option<AlignedBuf> {
        AlignedBuf::zeroed(len.checked_mul(size_of::<f32>())?)
    }

    /// The bytes, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `start` is valid for `len` initialised bytes and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// The buffer as `f32` values; a remainder of fewer than four bytes is left out.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `bytes_mut`; the alignment is at least 64 and any bits are a valid `f32`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len / size_of::<f32>()) }
    }
}

#[repr(align(64))]
struct Line;

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `start` is valid for `len` initialised bytes and shared borrows forbid writes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if let Some(layout) = self.layout {
            // SAFETY: allocated in `zeroed` with this layout and freed only here.
            unsafe { dealloc(self.start.as_ptr(), layout) }
        }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish()
    }
}

/// Asks for huge pages for the whole huge pages inside the range; a refusal changes nothing but speed.
#[cfg(all(target_os = "linux", not(miri)))]
fn advise_huge(start: *mut u8, len: usize) {
    unsafe extern "C" {
        fn madvise(start: *mut std::ffi::c_void, len: usize, advice: std::ffi::c_int) -> std::ffi::c_int;
    }
    const MADV_HUGEPAGE: std::ffi::c_int = 14;
    // SAFETY: the range lies in one allocation of this process and the advice does not change its contents.
    let _ = unsafe { madvise(start.cast(), len / HUGE_BYTES * HUGE_BYTES, MADV_HUGEPAGE) };
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn advise_huge(_start: *mut u8, _len: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_and_zero() {
        for len in [0, 1, 63, 64, 1000, 5 << 20] {
            let mut buf = AlignedBuf::zeroed(len).expect("a small buffer");
            assert_eq!(buf.as_ref().len(), len);
            assert_eq!(buf.as_ref().as_ptr() as usize % LINE_BYTES, 0);
            assert!(buf.as_ref().iter().all(|&byte| byte == 0));
            buf.bytes_mut().fill(1);
            assert!(buf.as_ref().iter().all(|&byte| byte == 1));
            assert_eq!(buf.f32_mut().len(), len / 4);
        }
        assert!(AlignedBuf::zeroed(usize::MAX).is_none());
        assert!(AlignedBuf::zeroed_f32(usize::MAX / 2).is_none());
    }
}
