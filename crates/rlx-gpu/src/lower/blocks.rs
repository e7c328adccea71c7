//! Block-quantised weights on a device: codes, and what scales them, in planes of their own, so that lanes read each of them in order.
//! `packing.rs` describes the types; every other is decoded when it is uploaded, to a word an element.

mod packing;

use self::packing::{Bits, Meaning, NONLINEAR, Packing, packing};
use super::lines::offset;
use super::{Amount, Draft, Operand};
use crate::ir::{BinaryFn, UnaryFn, Value, ViewId};
use rlx_tensor::quant::decode;
use rlx_tensor::{DType, DTypeClass};

/// Whether a dtype is of blocks.
pub(crate) fn is_blocks(dtype: DType) -> bool {
    dtype.class() == DTypeClass::Quant
}

/// Whether a weight of this type stays packed.
pub(crate) fn is_packed(dtype: DType) -> bool {
    packing(dtype).is_some()
}

/// Elements that share a scale, of a packed type.
pub(super) fn per_scale(dtype: DType) -> Option<u32> {
    packing(dtype).map(|packing| packing.per)
}

/// Elements that share a minimum, of a packed type whose elements are scaled codes and a minimum.
pub(super) fn per_minimum(dtype: DType) -> Option<u32> {
    packing(dtype).filter(|packing| packing.has_minima()).map(|packing| packing.per)
}

/// Whether a matrix `[lines, k]` is of packed blocks that stand one after another.
pub(super) fn is_whole(operand: &Operand) -> bool {
    let known = matches!(operand.dims.as_slice(), [Amount::Known(_), Amount::Known(k)] if k % 32 == 0);
    let plain = operand.base == Amount::Known(0) && operand.strides == super::contiguous(&operand.dims);
    is_packed(operand.dtype) && known && plain
}

/// Words of an uploaded weight.
pub(crate) fn words(dtype: DType, elements: usize) -> usize {
    packing(dtype).map_or(elements, |packing| packing.words(elements))
}

/// Words of an uploaded weight of any dtype.
pub(crate) fn weight_words(dtype: DType, elements: usize) -> usize {
    match dtype {
        DType::F16 | DType::BF16 => elements.div_ceil(2),
        _ if is_blocks(dtype) => words(dtype, elements),
        _ => elements,
    }
}

/// Blocks as words of a device; `None` if they are none of this type.
pub(crate) fn upload(dtype: DType, bytes: &[u8]) -> Option<Vec<u32>> {
    if let Some(packing) = packing(dtype) {
        return Some(packing.upload(bytes));
    }
    let (per, size) = dtype.block();
    let mut values = vec![0.0; bytes.len() / size * per];
    decode(dtype, bytes, &mut values).ok()?;
    Some(values.into_iter().map(f32::to_bits).collect())
}

/// Views of a packed weight `[lines, k]`, one of each plane, in lines.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    packing: &'static Packing,
    views: Vec<ViewId>,
    /// Words of a line in each view; of single binary16 numbers so many of those.
    widths: Vec<usize>,
}

impl Blocks {
    /// `None` unless it is a packed weight whose lines stand one after another.
    pub fn new(d: &mut Draft<'_>, operand: &Operand) -> Option<Self> {
        let [Amount::Known(lines), Amount::Known(k)] = operand.dims.as_slice() else { return None };
        let packing = packing(operand.dtype).filter(|_| is_whole(operand))?;
        let (mut views, mut widths) = (Vec::new(), Vec::new());
        let codes = packing.codes.len();
        for (at, plane) in packing.planes().enumerate() {
            let (bits, first) = (k / plane.per * plane.bits, packing.start(at, lines * k));
            // Single numbers of 16 bits are seen one by one, for a line may have an odd number; of the rest lines fill words.
            let halves = at + 1 == packing.planes().count() && plane.bits == 16;
            if !halves && bits % 32 != 0 {
                return None;
            }
            let (width, base) = if halves { (bits / 16, 2 * first) } else { (bits / 32, first) };
            let view = Operand {
                base: Amount::Known(base),
                dims: vec![Amount::Known(*lines), Amount::Known(width)],
                strides: vec![Amount::Known(width), Amount::Known(1)],
                ..operand.clone()
            };
            let view = if halves { d.halves(&view) } else { d.words(&view) };
            let fits = |wide: &usize| at < codes && width % wide == 0 && base % wide == 0;
            d.b.widen(view, [4, 2].into_iter().find(fits).unwrap_or(1) as u32);
            views.push(view);
            widths.push(width);
        }
        Some(Blocks { packing, views, widths })
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

    /// Words of codes that a fetch of so many elements gives.
    fn code_words(&self, count: u32) -> usize {
        self.packing.codes.iter().map(|bits| count.div_ceil(bits.per()) as usize).sum()
    }

    /// Elements whose fields share a word.
    fn per_field_word(&self) -> Option<u32> {
        self.packing.fields.map(|fields| self.packing.per * 32 / fields.width)
    }

    /// Values that a fetch of so many elements gives.
    pub fn raw(&self, count: u32) -> usize {
        self.code_words(count) + usize::from(self.packing.fields.is_some()) + 1
    }

    /// What must be loaded for `count` (8, 16 or 32) elements from `k` on, a multiple of so many.
    pub fn fetch(&self, d: &mut Draft<'_>, [line, k]: [Value; 2], mask: Value, count: u32) -> Vec<Value> {
        let mut raw = Vec::with_capacity(self.raw(count));
        let mut at = 0;
        for bits in self.packing.codes {
            let words = count.div_ceil(bits.per());
            let (word, _) = d.b.halves(k, bits.per());
            let wide = words.min(d.b.width(self.views[at]));
            for first in (0..words).step_by(wide as usize) {
                let word = offset(d, word, first);
                raw.extend(self.load(d, at, [line, word], wide, mask));
            }
            at += 1;
        }
        for per in self.per_field_word().into_iter().chain([self.packing.whole()]) {
            let (word, _) = d.b.halves(k, per);
            raw.extend(self.load(d, at, [line, word], 1, mask));
            at += 1;
        }
        raw
    }

    /// The elements of what was fetched for `k`.
    pub fn decode(&self, d: &mut Draft<'_>, raw: &[Value], k: Value, count: u32) -> Vec<Value> {
        let (scales, minima) = self.scales(d, raw, k, count);
        let words = match self.packing.meaning {
            Meaning::Nonlinear => self.bytes(d, raw, k, count),
            _ => self.codes(d, raw, k, count),
        };
        let each = count as usize / scales.len();
        let mut elements = Vec::with_capacity(count as usize);
        for (group, word) in words.into_iter().enumerate() {
            let of = group * 4 / each;
            for i in 0..4 {
                let code = field(d, word, 8 * i, 255);
                let code = match self.packing.meaning {
                    Meaning::Signed | Meaning::Nonlinear => signed(d, code),
                    Meaning::Less(0) => number(d, code),
                    Meaning::Less(by) => less(d, code, i32::from(by)),
                };
                elements.push(match minima.get(of) {
                    Some(&minus) => d.b.fma(scales[of], code, minus),
                    None => d.b.mul(scales[of], code),
                });
            }
        }
        elements
    }

    /// What the codes of so many elements are multiplied by, a scale for each [`Blocks::per_scale`] of them, and what is added, which some
    /// types have.
    pub fn scales(&self, d: &mut Draft<'_>, raw: &[Value], k: Value, count: u32) -> (Vec<Value>, Vec<Value>) {
        let rest = &raw[self.code_words(count)..];
        let (whole, minima) = (rest[rest.len() - 1], self.has_minima());
        let wholes = match minima {
            true => [UnaryFn::LowHalf, UnaryFn::HighHalf].map(|f| d.b.unary(f, whole)).to_vec(),
            false => vec![whole],
        };
        let Some(fields) = self.packing.fields else { return (vec![wholes[0]], wholes[1..].to_vec()) };
        let groups = count.div_ceil(self.packing.per);
        let in_word = 32 / fields.width;
        // Where in the word of fields the elements begin.
        let (group, last, width) =
            (d.b.halves(k, self.packing.per).0, d.b.int(in_word as i32 - 1), d.b.int(fields.width as i32));
        let low = d.b.binary(BinaryFn::And, group, last);
        let shift = d.b.mul(low, width);
        let first = d.b.binary(BinaryFn::ShiftRight, rest[0], shift);
        let (mut scales, mut added) = (Vec::new(), Vec::new());
        for at in (0..groups).map(|group| group * fields.width) {
            if !minima {
                let byte = field(d, first, at, 255);
                let byte = signed(d, byte);
                scales.push(d.b.mul(wholes[0], byte));
                continue;
            }
            let half = fields.width / 2;
            let [scale, min] = [at, at + half].map(|at| field(d, first, at, (1 << half) - 1));
            let (scale, min) = (number(d, scale), number(d, min));
            let (scale, min) = (d.b.mul(wholes[0], scale), d.b.mul(wholes[1], min));
            scales.push(scale);
            added.push(d.b.unary(UnaryFn::Neg, min));
        }
        (scales, added)
    }

    /// Words of bits, of which the first begins with the first element.
    fn begun(&self, d: &mut Draft<'_>, words: &[Value], bits: Bits, k: Value, count: u32) -> Vec<Value> {
        let parts = bits.per() / count.min(bits.per());
        let mut words = words.to_vec();
        if parts > 1 {
            let (part, last, by) =
                (d.b.halves(k, count).0, d.b.int(parts as i32 - 1), d.b.int((count / 4 * bits.width) as i32));
            let part = d.b.binary(BinaryFn::And, part, last);
            let by = d.b.mul(part, by);
            words[0] = d.b.binary(BinaryFn::ShiftRight, words[0], by);
        }
        words
    }

    /// The codes of so many elements, four that follow each other in a word, as they are stored.
    fn codes(&self, d: &mut Draft<'_>, raw: &[Value], k: Value, count: u32) -> Vec<Value> {
        let (mut rest, mut to) = (raw, 0);
        let mut codes: Vec<Value> = Vec::new();
        for &bits in self.packing.codes {
            let (words, after) = rest.split_at(count.div_ceil(bits.per()) as usize);
            rest = after;
            let words = self.begun(d, words, bits, k, count);
            let in_byte = 8 / bits.width;
            for group in 0..count / 4 {
                let word = words[(group / in_byte) as usize];
                let part = moved(d, word, group % in_byte * bits.width, to, bits.width);
                match codes.get_mut(group as usize) {
                    Some(code) => *code = d.b.binary(BinaryFn::Or, *code, part),
                    None => codes.push(part),
                }
            }
            to += bits.width;
        }
        codes
    }

    /// Whether something is added to scaled codes.
    pub fn has_minima(&self) -> bool {
        self.packing.has_minima()
    }

    /// Elements that share a scale, or scale and minimum.
    pub fn per_scale(&self) -> u32 {
        self.packing.per
    }

    /// The codes of so many elements as signed bytes, four that follow each other in a word.
    pub fn bytes(&self, d: &mut Draft<'_>, raw: &[Value], k: Value, count: u32) -> Vec<Value> {
        let codes = self.codes(d, raw, k, count);
        match self.packing.meaning {
            Meaning::Signed | Meaning::Less(0) => codes,
            Meaning::Less(by) => codes.into_iter().map(|word| bytes_less(d, word, by)).collect(),
            Meaning::Nonlinear => codes.into_iter().map(|word| d.b.lookup(word, NONLINEAR)).collect(),
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

/// Fields of so many bits in each byte of a word, moved from one bit to another.
fn moved(d: &mut Draft<'_>, word: Value, at: u32, to: u32, width: u32) -> Value {
    if width == 8 {
        return word;
    }
    let mask = i32::from_le_bytes([((1 << width) - 1) << to; 4]);
    if at >= to {
        return field(d, word, at - to, mask);
    }
    let (up, mask) = (d.b.int(1 << (to - at)), d.b.int(mask));
    let word = d.b.mul(word, up);
    d.b.binary(BinaryFn::And, word, mask)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_weight_takes_hardly_more_than_its_blocks() {
        let elements = 1 << 16;
        for dtype in DType::ALL.iter().copied().filter(|&dtype| is_packed(dtype)) {
            let (per, size) = dtype.block();
            let (own, blocks) = (words(dtype, elements) * 4, elements / per * size);
            assert!(own >= blocks && own * 100 <= blocks * 104, "{dtype}: {own} of {blocks}");
        }
        assert_eq!(words(DType::MXFP4, 64), 64);
    }

    #[test]
    fn bytes_that_are_no_blocks_have_no_words() {
        assert!(upload(DType::MXFP4, &[0; 17]).is_some());
        assert_eq!(upload(DType::Q8_0, &[0; 34]).map(|w| w.len()), Some(9));
    }
}
