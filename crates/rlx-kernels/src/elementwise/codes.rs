//! Codes of eight bits as vectors of numbers, and back.

use crate::isa::{LANES, Simd};

/// Takes the sign bit of each byte away, or gives it back.
const SIGN: u8 = 0x80;

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
    // SAFETY: the caller guarantees `n` bytes; the buffer has 16.
    unsafe {
        let wide = if unsigned { s.to_int(s.sub(codes, s.splat(f32::from(SIGN)))) } else { s.to_int(codes) };
        let mut buffer = [0u8; LANES];
        s.istore_i8(buffer.as_mut_ptr().cast(), wide);
        if unsigned {
            for byte in &mut buffer {
                *byte ^= SIGN;
            }
        }
        if n == LANES {
            to.cast::<[u8; LANES]>().write_unaligned(buffer);
        } else {
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), to, n);
        }
    }
}
