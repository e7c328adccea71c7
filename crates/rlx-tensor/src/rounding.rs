//! One rounding from 64-bit floats to those of 16 bits.

use half::{bf16, f16};

/// `x` towards zero, with the last bit set if anything was lost: rounding this once more to at most 22 bits is right, as rounding the
/// nearest f32 is not.
#[inline(always)]
pub fn f32_to_odd(x: f64) -> f32 {
    let near = x as f32;
    let back = f64::from(near);
    if back == x || near.is_nan() {
        return near;
    }
    let towards_zero = if back.abs() > x.abs() { near.to_bits() - 1 } else { near.to_bits() };
    f32::from_bits(towards_zero | 1)
}

/// The nearest f16, ties to even.
pub fn f16_of(x: f64) -> f16 {
    f16::from_f32(f32_to_odd(x))
}

/// The nearest bf16, ties to even.
pub fn bf16_of(x: f64) -> bf16 {
    bf16::from_f32(f32_to_odd(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Neighbours of the middle between each number and the next, down to the last bit of an f64, and the middle itself.
    fn check(count: u16, value: impl Fn(u16) -> f64, rounded: impl Fn(f64) -> u16) {
        for code in 0..count {
            let (low, high) = (value(code), value(code + 1));
            let middle = low + (high - low) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(rounded(middle), even, "{middle:e}");
            assert_eq!(rounded(middle.next_down()), code, "just below {middle:e}");
            assert_eq!(rounded(middle.next_up()), code + 1, "just above {middle:e}");
            assert_eq!(rounded(-middle.next_up()), (code + 1) | 0x8000, "just below {:e}", -middle);
            assert_eq!(rounded(low), code);
        }
    }

    #[test]
    fn every_middle_between_two_numbers_is_rounded_once() {
        check(0x7bff, |code| f16::from_bits(code).to_f64(), |x| f16_of(x).to_bits());
        check(0x7f7f, |code| bf16::from_bits(code).to_f64(), |x| bf16_of(x).to_bits());
        assert_eq!(f16_of(65520.0f64.next_down()).to_bits(), 0x7bff);
        assert_eq!(f16_of(65520.0).to_bits(), 0x7c00);
        assert!(bf16_of(f64::MAX).is_infinite() && bf16_of(f64::NAN).is_nan() && f16_of(f64::NAN).is_nan());
        assert_eq!((f16_of(f64::MIN_POSITIVE).to_bits(), bf16_of(-f64::MIN_POSITIVE).to_bits()), (0, 0x8000));
    }
}
