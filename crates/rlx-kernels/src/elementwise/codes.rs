//! Codes of eight bits as vectors of numbers, and back.

use crate::isa::{LANES, Simd};

/// Reads `n <= 16` codes; the other lanes are a number.
///
/// # Safety
/// `from` is valid for reads of `n` bytes.
#[inline(always)]
pub(crate) unsafe fn read<S: Simd>(s: S, from: *const u8, unsigned: bool, n: usize) -> S::V {
    // SAFETY: the caller guarantees `n` bytes; the buffer has 16.
    unsafe {
        let mut buffer = [0u8; LANES];
        let at = if n == LANES {
            from
        } else {
            std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), n);
            buffer.as_ptr()
        };
        // Without a sign a byte is what is below its sign bit after the sign was extended.
        let wide = s.iload_i8(at.cast());
        s.to_float(if unsigned { s.iand(wide, s.isplat(0xff)) } else { wide })
    }
}

/// Writes the first `n <= 16` lanes, whole numbers in the range of the codes.
///
/// # Safety
/// `to` is valid for writes of `n` bytes.
#[inline(always)]
pub(crate) unsafe fn write<S: Simd>(s: S, to: *mut u8, unsigned: bool, n: usize, codes: S::V) {
    // SAFETY: the caller guarantees the bytes.
    unsafe { write_whole(s, to, unsigned, n, s.to_int(codes)) }
}

/// The same of integers.
///
/// # Safety
/// `to` is valid for writes of `n` bytes.
#[inline(always)]
pub(crate) unsafe fn write_whole<S: Simd>(s: S, to: *mut u8, unsigned: bool, n: usize, codes: S::I) {
    // The same byte as a number with a sign.
    let codes = if unsigned { s.isar(s.ishl(codes, 24), 24) } else { codes };
    // SAFETY: the caller guarantees `n` bytes; the buffer has 16.
    unsafe {
        if n == LANES {
            s.istore_i8(to.cast(), codes);
        } else {
            let mut buffer = [0u8; LANES];
            s.istore_i8(buffer.as_mut_ptr().cast(), codes);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), to, n);
        }
    }
}
