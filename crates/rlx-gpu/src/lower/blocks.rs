//! Block-quantised weights on a device: codes, and what scales them, in planes of their own, so that lanes read each of them in order.
//!
//! | type | codes | then |
//! |---|---|---|
//! | Q8_0 | 4 of 8 bits a word | a binary16 scale for 32 |
//! | Q4_0 | 8 of 4 bits a word | a binary16 scale for 32 |
//! | Q4_K | 8 of 4 bits a word | scale and minimum of 8 bits each for 32, two binary16 for 256 |
//! | Q6_K | 8 of 4 bits a word, then 16 of the upper 2 bits | a scale of 8 bits for 16, a binary16 for 256 |
//!
//! Code `i` of a word has its bits in byte `i % 4`, so a shift and a mask make a word of four codes that follow each other.
//!
//! Every other type is decoded when it is uploaded, to a word an element.

use super::{Amount, Draft, Operand};
use crate::ir::{BinaryFn, UnaryFn, Value, ViewId};
use rlx_tensor::quant::decode;
use rlx_tensor::{DType, DTypeClass};

/// Whether a dtype is of blocks.
pub(crate) fn is_blocks(dtype: DType) -> bool {
    dtype.class() == DTypeClass::Quant
}

/// A part of an uploaded weight: how many elements share so many of its bits.
#[derive(Debug, Clone, Copy)]
struct Plane {
    per: usize,
    bits: usize,
}

impl Plane {
    fn words(self, elements: usize) -> usize {
        (elements / self.per * self.bits).div_ceil(32)
    }
}

const fn plane(per: usize, bits: usize) -> Plane {
    Plane { per, bits }
}

/// The planes of a type that stays packed, each at the end of those before it; empty for others.
fn planes(dtype: DType) -> &'static [Plane] {
    match dtype {
        DType::Q8_0 => const { &[plane(1, 8), plane(32, 16)] },
        DType::Q4_0 => const { &[plane(1, 4), plane(32, 16)] },
        DType::Q4_K => const { &[plane(1, 4), plane(32, 16), plane(256, 32)] },
        DType::Q6_K => const { &[plane(1, 4), plane(1, 2), plane(16, 8), plane(256, 16)] },
        _ => &[],
    }
}

/// Whether a weight of this type stays packed.
pub(crate) fn is_packed(dtype: DType) -> bool {
    !planes(dtype).is_empty()
}

/// Whether elements of a packed type are scaled codes less a minimum.
pub(super) fn has_minima(dtype: DType) -> bool {
    dtype == DType::Q4_K
}

/// Whether a matrix `[lines, k]` is of packed blocks that stand one after another.
pub(super) fn is_whole(operand: &Operand) -> bool {
    let known = matches!(operand.dims.as_slice(), [Amount::Known(_), Amount::Known(k)] if k % 32 == 0);
    let plain = operand.base == Amount::Known(0) && operand.strides == super::contiguous(&operand.dims);
    is_packed(operand.dtype) && known && plain
}

/// Words of an uploaded weight.
pub(crate) fn words(dtype: DType, elements: usize) -> usize {
    match planes(dtype) {
        [] => elements,
        parts => parts.iter().map(|p| p.words(elements)).sum(),
    }
}

/// Words of an uploaded weight of any dtype.
pub(crate) fn weight_words(dtype: DType, elements: usize) -> usize {
    match dtype {
        DType::F16 | DType::BF16 => elements.div_ceil(2),
        _ if is_blocks(dtype) => words(dtype, elements),
        _ => elements,
    }
}

/// The first word of a plane.
fn start(dtype: DType, at: usize, elements: usize) -> usize {
    planes(dtype)[..at].iter().map(|p| p.words(elements)).sum()
}

/// Writes fields of `bits` one after another.
struct Fields<'w> {
    words: &'w mut [u32],
    bits: usize,
}

impl Fields<'_> {
    fn set(&mut self, at: usize, value: u32) {
        let per = 32 / self.bits;
        self.words[at / per] |= value << (at % per * self.bits);
    }
}

/// Which of the fields of 4 bits of a word holds one of its 8 codes.
fn nibble(code: usize) -> usize {
    code % 4 * 2 + code / 4
}

/// Which of the fields of 2 bits of a word holds the upper bits of one of its 16 codes.
fn quarter(code: usize) -> usize {
    code % 4 * 4 + code / 4
}

/// Blocks as words of a device; `None` if they are none of this type.
pub(crate) fn upload(dtype: DType, bytes: &[u8]) -> Option<Vec<u32>> {
    let (per, size) = dtype.block();
    let elements = bytes.len() / size * per;
    let parts = planes(dtype);
    if parts.is_empty() {
        let mut values = vec![0.0; elements];
        decode(dtype, bytes, &mut values).ok()?;
        return Some(values.into_iter().map(f32::to_bits).collect());
    }
    let mut all = vec![0; words(dtype, elements)];
    let mut rest = all.as_mut_slice();
    let mut fields: Vec<Fields<'_>> = Vec::with_capacity(parts.len());
    for part in parts {
        let (own, after) = std::mem::take(&mut rest).split_at_mut(part.words(elements));
        fields.push(Fields { words: own, bits: part.bits });
        rest = after;
    }
    for (number, block) in bytes.chunks_exact(size).enumerate() {
        let half = |at: usize| u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
        let first = number * per;
        match dtype {
            DType::Q8_0 => {
                (0..32).for_each(|i| fields[0].set(first + i, u32::from(block[2 + i])));
                fields[1].set(number, half(0));
            }
            DType::Q4_0 => {
                let code = |i: usize| u32::from(block[2 + i % 16] >> (i / 16 * 4) & 15);
                (0..32).for_each(|i| fields[0].set(first + i / 8 * 8 + nibble(i % 8), code(i)));
                fields[1].set(number, half(0));
            }
            DType::Q4_K => {
                let code = |i: usize| u32::from(block[16 + i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15);
                (0..256).for_each(|i| fields[0].set(first + i / 8 * 8 + nibble(i % 8), code(i)));
                (0..8)
                    .for_each(|group| fields[1].set(number * 8 + group, scale_and_min(&block[4..16], group)));
                fields[2].set(number, half(0) | half(2) << 16);
            }
            _ => {
                let low = |i: usize| u32::from(block[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15);
                let high = |i: usize| u32::from(block[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3);
                (0..256).for_each(|i| fields[0].set(first + i / 8 * 8 + nibble(i % 8), low(i)));
                (0..256).for_each(|i| fields[1].set(first + i / 16 * 16 + quarter(i % 16), high(i)));
                (0..16).for_each(|group| fields[2].set(number * 16 + group, u32::from(block[192 + group])));
                fields[3].set(number, half(208));
            }
        }
    }
    Some(all)
}

/// Scale, and above it minimum, of one of the 8 groups of a Q4_K block: six bits each in 12 bytes.
fn scale_and_min(packed: &[u8], group: usize) -> u32 {
    let (scale, min) = match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => {
            let low = packed[group + 4];
            ((low & 15) | (packed[group - 4] >> 6 << 4), (low >> 4) | (packed[group] >> 6 << 4))
        }
    };
    u32::from(scale) | u32::from(min) << 8
}

/// Views of a packed weight `[lines, k]`, each of words in lines.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    dtype: DType,
    views: Vec<ViewId>,
    /// Words of a line in each view.
    widths: Vec<usize>,
}

impl Blocks {
    /// `None` unless it is a packed weight whose lines stand one after another.
    pub fn new(d: &mut Draft<'_>, operand: &Operand) -> Option<Self> {
        let ([Amount::Known(lines), Amount::Known(k)], dtype) = (operand.dims.as_slice(), operand.dtype)
        else {
            return None;
        };
        if !is_whole(operand) {
            return None;
        }
        // A word of each plane belongs to one line, but of scales for 256 there may be an odd number.
        let (parts, lines, k) = (planes(dtype), *lines, *k);
        let (mut views, mut widths) = (Vec::new(), Vec::new());
        for (at, part) in parts.iter().enumerate() {
            let fields = k / part.per;
            // Fields of 16 bits are seen one by one; smaller ones in words, which lines fill.
            let halves = part.bits == 16;
            let (width, first) = match halves {
                true => (fields, 2 * start(dtype, at, lines * k)),
                false => ((fields * part.bits).div_ceil(32), start(dtype, at, lines * k)),
            };
            if !halves && fields * part.bits % 32 != 0 {
                return None;
            }
            let view = Operand {
                base: Amount::Known(first),
                dims: vec![Amount::Known(lines), Amount::Known(width)],
                strides: vec![Amount::Known(width), Amount::Known(1)],
                ..operand.clone()
            };
            // A scale and a minimum are no binary16.
            let raw = halves && dtype == DType::Q4_K;
            let view = match (halves, raw) {
                (true, false) => d.halves(&view),
                (true, true) => {
                    let words =
                        |a: &Amount| if let Amount::Known(n) = a { Amount::Known(n / 2) } else { a.clone() };
                    let dims = vec![Amount::Known(lines), Amount::Known(width / 2)];
                    let strides = vec![Amount::Known(width / 2), Amount::Known(1)];
                    d.words(&Operand { base: words(&view.base), dims, strides, ..view })
                }
                _ => d.words(&view),
            };
            let wide =
                [4, 2, 1].into_iter().find(|w| at == 0 && width % w == 0 && first % w == 0).unwrap_or(1);
            d.b.widen(view, wide as u32);
            views.push(view);
            widths.push(if raw { width / 2 } else { width });
        }
        Some(Blocks { dtype, views, widths })
    }

    /// The word at a place of a line, and those after it.
    fn load(
        &self,
        d: &mut Draft<'_>,
        at: usize,
        [line, word]: [Value; 2],
        count: u32,
        mask: Value,
    ) -> Vec<Value> {
        let width = d.size(&Amount::Known(self.widths[at]));
        let within = d.b.within(word, width);
        let mask = d.b.and(mask, within);
        d.b.load_wide(self.views[at], &[line, word], count, Some(mask))
    }

    fn code_bits(&self) -> u32 {
        if self.dtype == DType::Q8_0 { 8 } else { 4 }
    }

    /// Values that a fetch of so many elements gives.
    pub fn raw(&self, count: u32) -> usize {
        let rest = match self.dtype {
            DType::Q8_0 | DType::Q4_0 => 1,
            DType::Q4_K => 2,
            _ => 2 + count.div_ceil(16),
        };
        (count * self.code_bits() / 32 + rest) as usize
    }

    /// What must be loaded for `count` (8, 16 or 32) elements from `k` on, a multiple of so many.
    pub fn fetch(&self, d: &mut Draft<'_>, [line, k]: [Value; 2], mask: Value, count: u32) -> Vec<Value> {
        let per = 32 / self.code_bits();
        let mut raw = Vec::new();
        let (word, _) = d.b.halves(k, per);
        let wide = (count / per).min(d.b.width(self.views[0]));
        for first in (0..count / per).step_by(wide as usize) {
            let by = d.b.int(first as i32);
            let word = d.b.add(word, by);
            raw.extend(self.load(d, 0, [line, word], wide, mask));
        }
        let one = |d: &mut Draft<'_>, at: usize, per: u32, raw: &mut Vec<Value>| {
            let (word, _) = d.b.halves(k, per);
            raw.extend(self.load(d, at, [line, word], 1, mask));
        };
        match self.dtype {
            DType::Q8_0 | DType::Q4_0 => one(d, 1, 32, &mut raw),
            DType::Q4_K => {
                one(d, 1, 64, &mut raw);
                one(d, 2, 256, &mut raw);
            }
            _ => {
                one(d, 1, 16, &mut raw);
                if count == 32 {
                    let (word, one) = (d.b.halves(k, 16).0, d.b.int(1));
                    let word = d.b.add(word, one);
                    raw.extend(self.load(d, 1, [line, word], 1, mask));
                }
                one(d, 2, 64, &mut raw);
                one(d, 3, 256, &mut raw);
            }
        }
        raw
    }

    /// The elements of what was fetched for `k`.
    pub fn decode(&self, d: &mut Draft<'_>, raw: &[Value], k: Value, count: u32) -> Vec<Value> {
        let (scales, minima) = self.scales(d, raw, k, count);
        let (words, rest) = raw.split_at((count * self.code_bits() / 32) as usize);
        let codes: Vec<Value> = match self.dtype {
            DType::Q8_0 => words.iter().flat_map(|&w| signed_bytes(d, w)).collect(),
            DType::Q6_K => {
                let high = self.upper(d, rest, k, count);
                let code = |i: u32| {
                    let low = field(d, words[i as usize / 8], nibble(i as usize % 8) as u32 * 4, 15);
                    let top = field(d, high[i as usize / 16], quarter(i as usize % 16) as u32 * 2, 3);
                    let up = d.b.int(16);
                    let top = d.b.mul(top, up);
                    let code = d.b.add(low, top);
                    less(d, code, 32)
                };
                (0..count).map(code).collect()
            }
            _ => {
                let code = |i: u32| {
                    let code = field(d, words[i as usize / 8], nibble(i as usize % 8) as u32 * 4, 15);
                    if self.dtype == DType::Q4_0 { less(d, code, 8) } else { number(d, code) }
                };
                (0..count).map(code).collect()
            }
        };
        let each = count as usize / scales.len();
        let scaled = |(i, code): (usize, Value)| match minima.get(i / each) {
            Some(&minus) => d.b.fma(scales[i / each], code, minus),
            None => d.b.mul(scales[i / each], code),
        };
        codes.into_iter().enumerate().map(scaled).collect()
    }

    /// What the codes of so many elements are multiplied by, a scale for each [`Blocks::per_scale`] of them, and the minima with the
    /// sign changed, which some types have.
    pub fn scales(&self, d: &mut Draft<'_>, raw: &[Value], k: Value, count: u32) -> (Vec<Value>, Vec<Value>) {
        let rest = &raw[(count * self.code_bits() / 32) as usize..];
        match self.dtype {
            DType::Q8_0 | DType::Q4_0 => (vec![rest[0]], Vec::new()),
            DType::Q4_K => {
                let (half, sixteen) = (d.b.halves(k, 32).0, d.b.int(16));
                let one = d.b.int(1);
                let odd = d.b.binary(BinaryFn::And, half, one);
                let by = d.b.mul(odd, sixteen);
                let pair = d.b.binary(BinaryFn::ShiftRight, rest[0], by);
                let (scale, min) = (field(d, pair, 0, 255), field(d, pair, 8, 255));
                let [most, least] = [UnaryFn::LowHalf, UnaryFn::HighHalf].map(|f| d.b.unary(f, rest[1]));
                let (scale, min) = (number(d, scale), number(d, min));
                let (scale, min) = (d.b.mul(most, scale), d.b.mul(least, min));
                (vec![scale], vec![d.b.unary(UnaryFn::Neg, min)])
            }
            _ => {
                let scales = &rest[count.div_ceil(16) as usize..];
                // Where in the word of scales the elements begin.
                let (three, eight, group) = (d.b.int(3), d.b.int(8), d.b.halves(k, 16).0);
                let low = d.b.binary(BinaryFn::And, group, three);
                let shift = d.b.mul(low, eight);
                let first = d.b.binary(BinaryFn::ShiftRight, scales[0], shift);
                let scale = |group: u32| {
                    let byte = field(d, first, group * 8, 255);
                    let byte = signed(d, byte);
                    d.b.mul(scales[1], byte)
                };
                ((0..count.div_ceil(16)).map(scale).collect(), Vec::new())
            }
        }
    }

    /// Words of the upper bits, of which the first begins with the first element.
    fn upper(&self, d: &mut Draft<'_>, rest: &[Value], k: Value, count: u32) -> Vec<Value> {
        let mut high = rest[..count.div_ceil(16) as usize].to_vec();
        if count == 8 {
            let (half, one, four) = (d.b.halves(k, 8).0, d.b.int(1), d.b.int(4));
            let odd = d.b.binary(BinaryFn::And, half, one);
            let by = d.b.mul(odd, four);
            high[0] = d.b.binary(BinaryFn::ShiftRight, high[0], by);
        }
        high
    }

    /// Whether a minimum is added to scaled codes.
    pub fn has_minima(&self) -> bool {
        has_minima(self.dtype)
    }

    /// Elements that share a scale, or scale and minimum.
    pub fn per_scale(&self) -> u32 {
        if self.dtype == DType::Q6_K { 16 } else { 32 }
    }

    /// The codes of 16 or 32 elements as signed bytes, four that follow each other in a word.
    pub fn bytes(&self, d: &mut Draft<'_>, raw: &[Value], k: Value, count: u32) -> Vec<Value> {
        let (words, rest) = raw.split_at((count * self.code_bits() / 32) as usize);
        if self.dtype == DType::Q8_0 {
            return words.to_vec();
        }
        let nibbles: Vec<Value> =
            words.iter().flat_map(|&w| [0, 4].map(|at| field(d, w, at, 0x0f0f_0f0f))).collect();
        match self.dtype {
            DType::Q4_0 => nibbles.into_iter().map(|w| bytes_less(d, w, 8)).collect(),
            DType::Q4_K => nibbles,
            _ => {
                let high = self.upper(d, rest, k, count);
                let code = |(at, low): (usize, Value)| {
                    let two = high[at / 4];
                    let moved = match at % 4 {
                        2 => two,
                        3 => shifted(d, two, 2),
                        at => {
                            let up = d.b.int(16 >> (2 * at));
                            d.b.mul(two, up)
                        }
                    };
                    let mask = d.b.int(0x3030_3030);
                    let top = d.b.binary(BinaryFn::And, moved, mask);
                    let both = d.b.binary(BinaryFn::Or, low, top);
                    bytes_less(d, both, 32)
                };
                nibbles.into_iter().enumerate().map(code).collect()
            }
        }
    }

    /// One element.
    pub fn element(&self, d: &mut Draft<'_>, line: Value, k: Value, mask: Value) -> Value {
        let (group, low) = d.b.halves(k, 8);
        let eight = d.b.int(8);
        let first = d.b.mul(group, eight);
        let raw = self.fetch(d, [line, first], mask, 8);
        let all = self.decode(d, &raw, first, 8);
        let zero = d.b.float(0.0);
        (0..8).fold(zero, |found, i| {
            let number = d.b.int(i);
            let same = d.b.binary(BinaryFn::Equal, low, number);
            d.b.select(same, all[i as usize], found)
        })
    }
}

fn shifted(d: &mut Draft<'_>, word: Value, by: u32) -> Value {
    if by == 0 {
        return word;
    }
    let by = d.b.int(by as i32);
    d.b.binary(BinaryFn::ShiftRight, word, by)
}

fn field(d: &mut Draft<'_>, word: Value, at: u32, mask: i32) -> Value {
    let (shifted, mask) = (shifted(d, word, at), d.b.int(mask));
    d.b.binary(BinaryFn::And, shifted, mask)
}

/// Four bytes below 128, each less a number up to 64: none borrows from the next.
fn bytes_less(d: &mut Draft<'_>, word: Value, by: u8) -> Value {
    let (up, sign) = (d.b.int(i32::from_le_bytes([128 - by; 4])), d.b.int(i32::from_le_bytes([128; 4])));
    let sum = d.b.add(word, up);
    d.b.binary(BinaryFn::Xor, sum, sign)
}

fn number(d: &mut Draft<'_>, code: Value) -> Value {
    d.b.unary(UnaryFn::ToFloat, code)
}

/// A code less an integer, as a float.
fn less(d: &mut Draft<'_>, code: Value, by: i32) -> Value {
    let by = d.b.int(by);
    let code = d.b.sub(code, by);
    number(d, code)
}

/// A byte as the signed number that it is, as a float.
fn signed(d: &mut Draft<'_>, byte: Value) -> Value {
    let (sign, half) = (d.b.int(128), d.b.int(128));
    let turned = d.b.binary(BinaryFn::Xor, byte, sign);
    let code = d.b.sub(turned, half);
    number(d, code)
}

fn signed_bytes(d: &mut Draft<'_>, word: Value) -> Vec<Value> {
    (0..4)
        .map(|i| {
            let byte = field(d, word, i * 8, 255);
            signed(d, byte)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_weight_takes_hardly_more_than_its_blocks() {
        let elements = 1 << 16;
        for dtype in [DType::Q8_0, DType::Q4_0, DType::Q4_K, DType::Q6_K] {
            let (per, size) = dtype.block();
            let (own, blocks) = (words(dtype, elements) * 4, elements / per * size);
            assert!(own >= blocks && own * 100 <= blocks * 103, "{dtype}: {own} of {blocks}");
        }
        assert_eq!(words(DType::IQ4_NL, 64), 64);
    }

    #[test]
    fn bytes_that_are_no_blocks_have_no_words() {
        assert!(upload(DType::Q5_0, &[0; 22]).is_some());
        assert_eq!(upload(DType::Q8_0, &[0; 34]).map(|w| w.len()), Some(9));
    }
}
