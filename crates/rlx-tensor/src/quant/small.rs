//! Blocks of 32 elements: one scale (and one minimum) for all. Low nibbles hold the first half, high nibbles the second.

use super::half_at;

/// The values that four bits of IQ4_NL and IQ4_XS stand for.
pub(super) const NONLINEAR: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// E2M1 values, doubled, by sign bit and magnitude.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Writes `value(code)` of 16 bytes of nibbles to 32 elements; a code's fifth bit is taken from `high` (bit i for element i).
fn nibbles(bytes: &[u8], high: u32, out: &mut [f32], value: impl Fn(u8) -> f32) {
    for (i, &byte) in bytes.iter().enumerate() {
        let fifth = |element: usize| ((high >> element) as u8 & 1) << 4;
        out[i] = value((byte & 0x0f) | fifth(i));
        out[i + 16] = value((byte >> 4) | fifth(i + 16));
    }
}

fn word_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// `d: f16, codes: 16`; value `d * (code - 8)`.
pub(super) fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..18], 0, out, |code| d * (f32::from(code) - 8.0));
}

/// `d: f16, m: f16, codes: 16`; value `d * code + m`.
pub(super) fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..20], 0, out, |code| d * f32::from(code) + m);
}

/// `d: f16, fifth bits: 4, codes: 16`; value `d * (code - 16)`.
pub(super) fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    nibbles(&block[6..22], word_at(block, 2), out, |code| d * (f32::from(code) - 16.0));
}

/// `d: f16, m: f16, fifth bits: 4, codes: 16`; value `d * code + m`.
pub(super) fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[8..24], word_at(block, 4), out, |code| d * f32::from(code) + m);
}

/// `d: f16, codes: 32 of i8`; value `d * code`.
pub(super) fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (value, &code) in out.iter_mut().zip(&block[2..34]) {
        *value = d * f32::from(code as i8);
    }
}

/// `d: f16, codes: 16`; value `d * NONLINEAR[code]`.
pub(super) fn iq4_nl(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..18], 0, out, |code| d * f32::from(NONLINEAR[usize::from(code)]));
}

/// `e: E8M0, codes: 16 of E2M1` (OCP Microscaling v1.0); value `2^(e - 127) * code`.
pub(super) fn mxfp4(block: &[u8], out: &mut [f32]) {
    // Half of 2^(e - 127), for codes are doubled; the two smallest are subnormal.
    let exponent = u32::from(block[0]);
    let d = f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { (exponent - 1) << 23 });
    nibbles(&block[1..17], 0, out, |code| d * f32::from(E2M1_DOUBLED[usize::from(code)]));
}
