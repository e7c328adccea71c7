//! Superblocks whose codes are indices into tables of points (grids) of 8 or 4 magnitudes.
//!
//! The grids are data of the format (MIT licence, the ggml authors); `scripts/goldens/gguf_grids.py` writes them from the Python
//! package `gguf`: two bits an element for points of 8, four for points of 4, low bits first.

use super::half_at;

const IQ2_XXS_GRID: &[u8; 512] = include_bytes!("grids/iq2_xxs.bin");
const IQ2_XS_GRID: &[u8; 1024] = include_bytes!("grids/iq2_xs.bin");
const IQ2_S_GRID: &[u8; 2048] = include_bytes!("grids/iq2_s.bin");
const IQ3_XXS_GRID: &[u8; 512] = include_bytes!("grids/iq3_xxs.bin");
const IQ3_S_GRID: &[u8; 1024] = include_bytes!("grids/iq3_s.bin");
const IQ1_GRID: &[u8; 4096] = include_bytes!("grids/iq1_s.bin");

const IQ2_MAGNITUDES: [u8; 4] = [0x08, 0x19, 0x2b, 0];
const IQ3_XXS_MAGNITUDES: [u8; 8] = [0x04, 0x0c, 0x14, 0x1c, 0x24, 0x2c, 0x34, 0x3e];
const IQ1_DELTA: f32 = 0.125;

/// Two bits of coordinate `i` of an 8-element point.
fn coordinate8(grid: &[u8], point: usize, i: usize) -> u8 {
    grid[point * 2 + i / 4] >> (i % 4 * 2) & 3
}

/// Four bits of coordinate `i` of a 4-element point.
fn coordinate4(grid: &[u8], point: usize, i: usize) -> u8 {
    grid[point * 2 + i / 2] >> (i % 2 * 4) & 15
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Eight signs of which seven are stored: their number of minuses is even.
fn even_signs(seven: u32) -> u8 {
    let seven = (seven & 0x7f) as u8;
    seven | (seven.count_ones() as u8 & 1) << 7
}

fn sign(signs: u8, i: usize) -> f32 {
    if signs >> i & 1 == 0 { 1.0 } else { -1.0 }
}

fn point8(grid: &[u8], point: usize, scale: f32, signs: u8, out: &mut [f32]) {
    for (i, value) in out.iter_mut().enumerate() {
        let magnitude = IQ2_MAGNITUDES[usize::from(coordinate8(grid, point, i))];
        *value = scale * f32::from(magnitude) * sign(signs, i);
    }
}

/// Two 4-element points side by side.
fn points4(grid: &[u8], points: [usize; 2], scale: f32, signs: u8, out: &mut [f32], magnitude: fn(u8) -> u8) {
    for (i, value) in out.iter_mut().enumerate() {
        let magnitude = magnitude(coordinate4(grid, points[i / 4], i % 4));
        *value = scale * f32::from(magnitude) * sign(signs, i);
    }
}

/// `d: f16`, then for 32 elements: four points of a byte, four times 7 signs, 4 bits of scale.
pub(super) fn iq2_xxs(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let at = 2 + group * 8;
        let packed = u32_at(block, at + 4);
        let scale = d * (0.5 + (packed >> 28) as f32) * 0.25;
        for (i, out) in out.chunks_exact_mut(8).enumerate() {
            let point = usize::from(block[at + i]);
            point8(IQ2_XXS_GRID, point, scale, even_signs(packed >> (7 * i)), out);
        }
    }
}

/// `d: f16, points: 32 of 9 bits and 7 signs, scales: 16 of 4 bits`.
pub(super) fn iq2_xs(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let code = u16_at(block, 2 + i * 2);
        let scale = block[66 + i / 4] >> (i / 2 % 2 * 4) & 15;
        let scale = d * (0.5 + f32::from(scale)) * 0.25;
        point8(IQ2_XS_GRID, usize::from(code & 511), scale, even_signs(u32::from(code >> 9)), out);
    }
}

/// `d: f16, low bytes of points: 32, signs: 32, upper two bits of points: 8, scales: 16 of 4 bits`.
pub(super) fn iq2_s(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let high = block[66 + i / 4] >> (i % 4 * 2) & 3;
        let point = usize::from(block[2 + i]) | usize::from(high) << 8;
        let scale = block[74 + i / 4] >> (i / 2 % 2 * 4) & 15;
        let scale = d * (0.5 + f32::from(scale)) * 0.25;
        point8(IQ2_S_GRID, point, scale, block[34 + i], out);
    }
}

/// `d: f16, points: 64 of a byte`, then for 32 elements: four times 7 signs, 4 bits of scale.
pub(super) fn iq3_xxs(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let magnitude = |code| IQ3_XXS_MAGNITUDES[usize::from(code & 7)];
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let packed = u32_at(block, 66 + group * 4);
        let scale = d * (0.5 + (packed >> 28) as f32) * 0.5;
        for (i, out) in out.chunks_exact_mut(8).enumerate() {
            let at = 2 + group * 8 + i * 2;
            let points = [usize::from(block[at]), usize::from(block[at + 1])];
            points4(IQ3_XXS_GRID, points, scale, even_signs(packed >> (7 * i)), out, magnitude);
        }
    }
}

/// `d: f16, low bytes of points: 64, ninth bits: 8, signs: 32, scales: 8 of 4 bits`.
pub(super) fn iq3_s(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let point = |j: usize| {
            let at = 2 * i + j;
            usize::from(block[2 + at]) | usize::from(block[66 + at / 8] >> (at % 8) & 1) << 8
        };
        let scale = block[106 + i / 8] >> (i / 4 % 2 * 4) & 15;
        let scale = d * f32::from(1 + 2 * scale);
        points4(IQ3_S_GRID, [point(0), point(1)], scale, block[74 + i], out, |code| 2 * code + 1);
    }
}

fn shifted_point(point: usize, scale: f32, delta: f32, out: &mut [f32]) {
    for (i, value) in out.iter_mut().enumerate() {
        let coordinate = f32::from(coordinate8(IQ1_GRID, point, i)) - 1.0;
        *value = scale * (coordinate + delta);
    }
}

/// `d: f16, low bytes of points: 32`, then for 32 elements 16 bits: four times 3 upper bits, 3 bits of scale, sign of the shift.
pub(super) fn iq1_s(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let packed = u16_at(block, 34 + group * 2);
        let scale = d * f32::from(2 * (packed >> 12 & 7) + 1);
        let delta = if packed & 0x8000 == 0 { IQ1_DELTA } else { -IQ1_DELTA };
        for (i, out) in out.chunks_exact_mut(8).enumerate() {
            let high = usize::from(packed >> (3 * i) & 7);
            shifted_point(usize::from(block[2 + group * 4 + i]) | high << 8, scale, delta, out);
        }
    }
}

/// `low bytes of points: 32, upper bits and shifts: 32 of 3 + 1 bits, scales: 16 of 3 bits`, four in 16 bits, whose upper four
/// bits together are the f16 `d`.
pub(super) fn iq1_m(block: &[u8], out: &mut [f32]) {
    let scales: [u16; 4] = std::array::from_fn(|i| u16_at(block, 48 + i * 2));
    let bits = scales.iter().enumerate().fold(0, |bits, (i, word)| bits | (word >> 12) << (4 * i));
    let d = half::f16::from_bits(bits).to_f32();
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let group = i / 2;
        let scale = d * f32::from(2 * (scales[group / 4] >> (group % 4 * 3) & 7) + 1);
        let high = block[32 + i / 2] >> (i % 2 * 4);
        let delta = if high & 8 == 0 { IQ1_DELTA } else { -IQ1_DELTA };
        shifted_point(usize::from(block[i]) | usize::from(high & 7) << 8, scale, delta, out);
    }
}
