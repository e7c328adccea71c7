//! Superblocks of 256 elements: a half-precision scale, and small integer scales (and minima) of 16 or 32 elements each.

use super::half_at;
use super::small::NONLINEAR;

/// Scale and minimum `group` of the 8 that Q4_K and Q5_K pack into 12 bytes: six bits each, the upper two bits of the last four
/// of both kept above the first four.
pub(super) fn scale_and_min(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let low = packed[group + 4];
    ((low & 0x0f) | (packed[group - 4] >> 6 << 4), (low >> 4) | (packed[group] >> 6 << 4))
}

/// Two bits of element `i`: 32 bytes hold 128 elements, 32 with each shift.
fn two_bits(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

/// Four bits of element `i`: 32 bytes hold 64 elements, low nibbles first.
fn four_bits(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15
}

/// `scales and minima: 16 of 4 + 4 bits, codes: 64, d: f16, dmin: f16`; value `d * scale * code - dmin * min`.
pub(super) fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = block.split_at(16);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (i, value) in out.iter_mut().enumerate() {
        let scale = scales[i / 16];
        let (dl, ml) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        *value = dl * f32::from(two_bits(codes, i)) - ml;
    }
}

/// `inverted third bits: 32, codes: 64, scales: 16 of 6 bits in 12, d: f16`; value `d * (scale - 32) * (code - 4)`.
pub(super) fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, codes, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (i, value) in out.iter_mut().enumerate() {
        let group = i / 16;
        let low = scales[group % 8] >> (group / 8 * 4) & 15;
        let top = scales[8 + group % 4] >> (group / 4 * 2) & 3;
        let dl = d * (f32::from(low | top << 4) - 32.0);
        let third = high[i % 32] >> (i / 32) & 1;
        *value = dl * (f32::from(two_bits(codes, i) | third << 2) - 4.0);
    }
}

/// `d: f16, dmin: f16, scales and minima: 12, codes: 128`; value `d * scale * code - dmin * min`, 32 elements a group.
pub(super) fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (packed, codes) = (&block[4..16], &block[16..144]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(packed, group);
        let (dl, ml) = (d * f32::from(scale), dmin * f32::from(min));
        for (i, value) in out.iter_mut().enumerate() {
            *value = dl * f32::from(four_bits(codes, group * 32 + i)) - ml;
        }
    }
}

/// `d: f16, dmin: f16, scales and minima: 12, fifth bits: 32, codes: 128`; value as of Q4_K.
pub(super) fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (packed, high, codes) = (&block[4..16], &block[16..48], &block[48..176]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(packed, group);
        let (dl, ml) = (d * f32::from(scale), dmin * f32::from(min));
        for (i, value) in out.iter_mut().enumerate() {
            let fifth = high[i] >> group & 1;
            *value = dl * f32::from(four_bits(codes, group * 32 + i) | fifth << 4) - ml;
        }
    }
}

/// `low nibbles: 128, upper two bits: 64, scales: 16 of i8, d: f16`; value `d * scale * (code - 32)`, 16 elements a group.
pub(super) fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (i, value) in out.iter_mut().enumerate() {
        // 64 bytes of low nibbles and 32 of upper bits make 128 elements.
        let nibble = low[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
        let code = nibble | two_bits(high, i) << 4;
        let dl = d * f32::from(scales[i / 16] as i8);
        *value = dl * (f32::from(code) - 32.0);
    }
}

/// `d: f16, upper scale bits: u16, lower scale bits: 4, codes: 128`; value `d * (scale - 32) * NONLINEAR[code]`, 32 elements a
/// group, each as one IQ4_NL block.
pub(super) fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let low = block[4 + group / 2] >> (group % 2 * 4) & 15;
        let top = (high >> (group * 2) & 3) as u8;
        let dl = d * (f32::from(low | top << 4) - 32.0);
        let codes = &block[8 + group * 16..][..16];
        for (i, value) in out.iter_mut().enumerate() {
            let code = codes[i % 16] >> (i / 16 * 4) & 15;
            *value = dl * f32::from(NONLINEAR[usize::from(code)]);
        }
    }
}
