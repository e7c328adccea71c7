//! Values into blocks. The 32-element types are defined by their rounding, so their bytes equal those of any other writer; for the
//! superblocks the scales are searched so that the weighted squared error is least, and the definition leaves that search free.

use super::{QuantError, SUPERBLOCK, check_length};
use crate::DType;
use half::{bf16, f16};

type EncodeBlock = fn(&[f32], &mut [u8]);

const ENCODERS: &[(DType, EncodeBlock)] = &[
    (DType::F32, |x, out| out.copy_from_slice(&x[0].to_le_bytes())),
    (DType::F16, |x, out| out.copy_from_slice(&f16::from_f32(x[0]).to_le_bytes())),
    (DType::BF16, |x, out| out.copy_from_slice(&bf16::from_f32(x[0]).to_le_bytes())),
    (DType::Q4_0, q4_0),
    (DType::Q4_1, q4_1),
    (DType::Q5_0, q5_0),
    (DType::Q5_1, q5_1),
    (DType::Q8_0, q8_0),
    (DType::Q4_K, q4_k),
    (DType::Q5_K, q5_k),
    (DType::Q6_K, q6_k),
];

fn block_encoder(dtype: DType) -> Option<EncodeBlock> {
    ENCODERS.iter().find(|(known, _)| *known == dtype).map(|(_, encode)| *encode)
}

/// True for the types that [`encode`] writes.
pub fn has_encoder(dtype: DType) -> bool {
    block_encoder(dtype).is_some()
}

/// Encodes whole blocks: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K. Values have to be finite.
///
/// # Errors
/// [`QuantError::DType`], [`QuantError::Length`].
pub fn encode(dtype: DType, values: &[f32], out: &mut [u8]) -> Result<(), QuantError> {
    let encode = block_encoder(dtype).ok_or(QuantError::DType { dtype, direction: "encoder" })?;
    check_length(dtype, values.len(), out.len())?;
    let (elements, block_bytes) = dtype.block();
    for (values, out) in values.chunks_exact(elements).zip(out.chunks_exact_mut(block_bytes)) {
        encode(values, out);
    }
    Ok(())
}

fn put_half(out: &mut [u8], at: usize, value: f32) {
    out[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value of largest magnitude, with its sign; the first of equals.
fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |best, &v| if v.abs() > best.abs() { v } else { best })
}

fn range(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &v| (low.min(v), high.max(v)))
}

/// `trunc(v)` clamped to `0..=max`.
fn code(v: f32, max: u8) -> u8 {
    (v as u8).min(max)
}

fn put_codes(codes: &[u8; 32], nibbles: &mut [u8]) -> u32 {
    let mut high = 0;
    for i in 0..16 {
        nibbles[i] = (codes[i] & 15) | codes[i + 16] << 4;
    }
    for (i, code) in codes.iter().enumerate() {
        high |= u32::from(code >> 4 & 1) << i;
    }
    high
}

fn q4_0(x: &[f32], out: &mut [u8]) {
    let d = extreme(x) / -8.0;
    let inverse = inverse(d);
    put_half(out, 0, d);
    put_codes(&std::array::from_fn(|i| code(x[i] * inverse + 8.5, 15)), &mut out[2..]);
}

fn q4_1(x: &[f32], out: &mut [u8]) {
    let (low, high) = range(x);
    let d = (high - low) / 15.0;
    let inverse = inverse(d);
    put_half(out, 0, d);
    put_half(out, 2, low);
    put_codes(&std::array::from_fn(|i| code((x[i] - low) * inverse + 0.5, 15)), &mut out[4..]);
}

fn q5_0(x: &[f32], out: &mut [u8]) {
    let d = extreme(x) / -16.0;
    let inverse = inverse(d);
    put_half(out, 0, d);
    let high = put_codes(&std::array::from_fn(|i| code(x[i] * inverse + 16.5, 31)), &mut out[6..]);
    out[2..6].copy_from_slice(&high.to_le_bytes());
}

fn q5_1(x: &[f32], out: &mut [u8]) {
    let (low, high) = range(x);
    let d = (high - low) / 31.0;
    let inverse = inverse(d);
    put_half(out, 0, d);
    put_half(out, 2, low);
    let high = put_codes(&std::array::from_fn(|i| code((x[i] - low) * inverse + 0.5, 31)), &mut out[8..]);
    out[4..8].copy_from_slice(&high.to_le_bytes());
}

fn q8_0(x: &[f32], out: &mut [u8]) {
    let d = extreme(x).abs() / 127.0;
    let inverse = inverse(d);
    put_half(out, 0, d);
    for (byte, v) in out[2..].iter_mut().zip(x) {
        *byte = (v * inverse).round() as i8 as u8;
    }
}

/// How much each element's error counts: the larger the value, the more.
fn weights(x: &[f32]) -> Vec<f32> {
    let mean_square = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
    let spread = mean_square.sqrt();
    x.iter().map(|v| spread + v.abs()).collect()
}

/// Sums of a weighted straight-line fit of `x` by `codes`.
#[derive(Default)]
struct Fit {
    w: f64,
    l: f64,
    ll: f64,
    x: f64,
    lx: f64,
}

impl Fit {
    fn of(x: &[f32], w: &[f32], codes: &[f32]) -> Self {
        let mut fit = Fit::default();
        for ((&x, &w), &l) in x.iter().zip(w).zip(codes) {
            let (x, w, l) = (f64::from(x), f64::from(w), f64::from(l));
            fit.w += w;
            fit.l += w * l;
            fit.ll += w * l * l;
            fit.x += w * x;
            fit.lx += w * l * x;
        }
        fit
    }

    /// The scale and the minimum (subtracted, never below zero) of least error for these codes.
    fn solve(&self) -> Option<(f32, f32)> {
        let determinant = self.w * self.ll - self.l * self.l;
        if determinant <= 0.0 {
            return None;
        }
        let scale = (self.w * self.lx - self.l * self.x) / determinant;
        let offset = (self.ll * self.x - self.l * self.lx) / determinant;
        if offset <= 0.0 {
            return Some((scale as f32, -offset as f32));
        }
        (self.ll > 0.0).then(|| ((self.lx / self.ll) as f32, 0.0))
    }
}

fn line_codes(x: &[f32], scale: f32, min: f32, max_code: u8) -> Vec<f32> {
    let inverse = inverse(scale);
    x.iter().map(|v| ((v + min) * inverse).round_ties_even().clamp(0.0, f32::from(max_code))).collect()
}

fn line_error(x: &[f32], w: &[f32], codes: &[f32], scale: f32, min: f32) -> f64 {
    let terms = x.iter().zip(w).zip(codes);
    terms.map(|((x, w), l)| f64::from(*w) * f64::from(scale * l - min - x).powi(2)).sum()
}

/// Scale and minimum such that `scale * code - min` is near `x` for codes up to `max_code`; both at least zero.
fn fit_line(x: &[f32], max_code: u8) -> (f32, f32) {
    let (low, high) = range(x);
    let low = low.min(0.0);
    if high <= low {
        return (0.0, -low);
    }
    let w = weights(x);
    let mut best = ((high - low) / f32::from(max_code), -low);
    let codes = line_codes(x, best.0, best.1, max_code);
    let mut least = line_error(x, &w, &codes, best.0, best.1);
    // A grid a little finer or coarser than the range may fit better: the ends then saturate, or are not reached.
    for step in 0..=20 {
        let levels = f32::from(max_code) - 1.0 + 0.1 * step as f32;
        let codes = line_codes(x, (high - low) / levels, -low, max_code);
        let Some((scale, min)) = Fit::of(x, &w, &codes).solve() else { continue };
        let error = line_error(x, &w, &codes, scale, min);
        if scale > 0.0 && error < least {
            (best, least) = ((scale, min), error);
        }
    }
    best
}

/// Packs 8 scales and minima of six bits into 12 bytes.
fn pack_scales(scales: &[u8; 8], mins: &[u8; 8], out: &mut [u8]) {
    for i in 0..4 {
        out[i] = scales[i] | scales[i + 4] >> 4 << 6;
        out[i + 4] = mins[i] | mins[i + 4] >> 4 << 6;
        out[i + 8] = (scales[i + 4] & 15) | mins[i + 4] << 4;
    }
}

/// The part of Q4_K and Q5_K before the codes, and the codes.
fn encode_lines(x: &[f32], max_code: u8, out: &mut [u8]) -> [u8; SUPERBLOCK] {
    let fits: [(f32, f32); 8] = std::array::from_fn(|group| fit_line(&x[group * 32..][..32], max_code));
    let most = |pick: fn(&(f32, f32)) -> f32| fits.iter().map(pick).fold(0.0f32, f32::max) / 63.0;
    put_half(out, 0, most(|fit| fit.0));
    put_half(out, 2, most(|fit| fit.1));
    // What the rounding to half precision left of them is what a reader multiplies with.
    let (d, dmin) = (super::half_at(out, 0), super::half_at(out, 2));
    let six_bits = |value: f32, unit: f32| (value * inverse(unit)).round().clamp(0.0, 63.0) as u8;
    let scales = fits.map(|fit| six_bits(fit.0, d));
    let mins = fits.map(|fit| six_bits(fit.1, dmin));
    pack_scales(&scales, &mins, &mut out[4..16]);
    let mut codes = [0u8; SUPERBLOCK];
    for (group, (codes, x)) in codes.chunks_exact_mut(32).zip(x.chunks_exact(32)).enumerate() {
        let (scale, min) = (d * f32::from(scales[group]), dmin * f32::from(mins[group]));
        for (code, value) in codes.iter_mut().zip(line_codes(x, scale, min, max_code)) {
            *code = value as u8;
        }
    }
    codes
}

/// Low nibbles of 64 elements in 32 bytes.
fn put_nibbles(codes: &[u8], out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(64).zip(out.chunks_exact_mut(32)) {
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = (codes[i] & 15) | codes[i + 32] << 4;
        }
    }
}

fn q4_k(x: &[f32], out: &mut [u8]) {
    let codes = encode_lines(x, 15, out);
    put_nibbles(&codes, &mut out[16..144]);
}

fn q5_k(x: &[f32], out: &mut [u8]) {
    let codes = encode_lines(x, 31, out);
    out[16..48].fill(0);
    for (i, code) in codes.iter().enumerate() {
        out[16 + i % 32] |= (code >> 4 & 1) << (i / 32);
    }
    put_nibbles(&codes, &mut out[48..176]);
}

/// The signed scale such that `scale * code` is near `x` for codes from -32 to 31.
fn fit_scale(x: &[f32]) -> f32 {
    let extreme = extreme(x);
    if extreme == 0.0 {
        return 0.0;
    }
    let mut best = (0.0f32, f64::NEG_INFINITY);
    for step in -9i8..=9 {
        let inverse = -(32.0 + 0.1 * f32::from(step)) / extreme;
        let (mut lx, mut ll) = (0.0f64, 0.0f64);
        for &v in x {
            let code = f64::from((v * inverse).round_ties_even().clamp(-32.0, 31.0));
            let (v, weight) = (f64::from(v), f64::from(v).powi(2));
            lx += weight * code * v;
            ll += weight * code * code;
        }
        // The error is the sum of w x^2 minus this.
        if ll > 0.0 && lx * lx / ll > best.1 {
            best = ((lx / ll) as f32, lx * lx / ll);
        }
    }
    best.0
}

fn q6_k(x: &[f32], out: &mut [u8]) {
    let fits: [f32; 16] = std::array::from_fn(|group| fit_scale(&x[group * 16..][..16]));
    put_half(out, 208, extreme(&fits) / -128.0);
    let d = super::half_at(out, 208);
    out[..192].fill(0);
    for (group, fit) in fits.iter().enumerate() {
        let scale = (fit * inverse(d)).round().clamp(-128.0, 127.0) as i8;
        out[192 + group] = scale as u8;
        let inverse = inverse(d * f32::from(scale));
        for i in group * 16..group * 16 + 16 {
            let code = ((x[i] * inverse).round_ties_even().clamp(-32.0, 31.0) + 32.0) as u8;
            out[i / 128 * 64 + i % 64] |= (code & 15) << (i % 128 / 64 * 4);
            out[128 + i / 128 * 32 + i % 32] |= (code >> 4) << (i % 128 / 32 * 2);
        }
    }
}
