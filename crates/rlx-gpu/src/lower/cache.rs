//! Caches of 8-bit integers on a device: for each 32 elements of a head a word with their scale, a binary32, and 8 words of four integers
//! each, so that no two rows share a word. Of keys a word lies beside those of the neighbouring positions, of values beside the row's
//! next.

use super::{Amount, Draft, Operand, contiguous};
use crate::ir::{BinaryFn, UnaryFn, Value, ViewId};
use half::f16;
use rlx::plan::Template;
use rlx_graph::ops::attention::{Attention, BLOCK};
use rlx_tensor::DType;
use rlx_tensor::quant::{CACHE_GROUP, Q8Head};

/// Words of a group.
pub(super) const GROUP_WORDS: usize = 1 + CACHE_GROUP / 4;

/// Words of a head's elements at a position.
pub(crate) fn head_words(dim: usize) -> usize {
    dim / CACHE_GROUP * GROUP_WORDS
}

/// For each buffer how its heads are made, if it is a cache of integers.
pub(crate) fn caches(template: &Template) -> Vec<Option<Q8Head>> {
    let mut caches = vec![None; template.buffers().len()];
    for step in template.steps() {
        let Some(op) = step.op.downcast::<Attention>() else { continue };
        let Some(past) = op.past_at() else { continue };
        for (at, keys) in [(past + 2, true), (past + 3, false)] {
            let place = &step.inputs[at];
            if place.dtype == DType::U8 {
                let head = Q8Head { dim: op.head_dim, positions: BLOCK, keys };
                caches[place.buffer.index()] = Some(head);
            }
        }
    }
    caches
}

/// Where the word of a group of a position stands within a head.
fn word_at(head: Q8Head, position: usize, group: usize, word: usize) -> usize {
    let own = group * GROUP_WORDS + word;
    if head.keys { own * head.positions + position } else { position * head_words(head.dim) + own }
}

/// Heads as words of a device.
pub(crate) fn upload(head: Q8Head, bytes: &[u8]) -> Vec<u32> {
    let size = head.positions * head_words(head.dim);
    let mut words = vec![0; bytes.len() / head.bytes() * size];
    for (bytes, words) in bytes.chunks_exact(head.bytes()).zip(words.chunks_exact_mut(size)) {
        for (position, group) in groups(head) {
            let (first, scale) = (group * CACHE_GROUP, head.scale_at(position, group * CACHE_GROUP));
            let scale = f16::from_le_bytes([bytes[scale], bytes[scale + 1]]).to_f32();
            words[word_at(head, position, group, 0)] = scale.to_bits();
            for four in 0..CACHE_GROUP / 4 {
                let byte = |i: usize| bytes[head.integer_at(position, first + 4 * four + i)];
                words[word_at(head, position, group, 1 + four)] =
                    u32::from_le_bytes(std::array::from_fn(byte));
            }
        }
    }
    words
}

/// Words of a device as heads.
pub(crate) fn fetch(head: Q8Head, words: &[u32], bytes: &mut [u8]) {
    let size = head.positions * head_words(head.dim);
    for (bytes, words) in bytes.chunks_exact_mut(head.bytes()).zip(words.chunks_exact(size)) {
        for (position, group) in groups(head) {
            let (first, at) = (group * CACHE_GROUP, head.scale_at(position, group * CACHE_GROUP));
            let scale = f16::from_f32(f32::from_bits(words[word_at(head, position, group, 0)]));
            bytes[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            for i in 0..CACHE_GROUP {
                let word = words[word_at(head, position, group, 1 + i / 4)];
                bytes[head.integer_at(position, first + i)] = word.to_le_bytes()[i % 4];
            }
        }
    }
}

fn groups(head: Q8Head) -> impl Iterator<Item = (usize, usize)> {
    (0..head.positions).flat_map(move |p| (0..head.dim / CACHE_GROUP).map(move |g| (p, g)))
}

/// A cache of integers in words: `[blocks, heads, words, positions]` of keys, with the last two exchanged of values.
pub(super) fn in_words(cache: &Operand, dim: usize, keys: bool) -> Operand {
    let inner = [Amount::Known(head_words(dim)), Amount::Known(BLOCK)];
    let inner = if keys { inner } else { [inner[1].clone(), inner[0].clone()] };
    let dims = [&cache.dims[..2], &inner].concat();
    let strides = contiguous(&dims);
    Operand { dims, strides, ..cache.clone() }
}

/// The first word of an element's group, and its place in the group.
pub(super) fn group_of(d: &mut Draft<'_>, element: Value) -> (Value, Value) {
    let (group, within) = d.b.halves(element, CACHE_GROUP as u32);
    let size = d.b.int(GROUP_WORDS as i32);
    (d.b.mul(group, size), within)
}

/// The word that holds an element's integer, after the first of its group.
pub(super) fn word_of(d: &mut Draft<'_>, within: Value) -> (Value, Value) {
    let (four, byte) = d.b.halves(within, 4);
    let one = d.b.int(1);
    (d.b.add(four, one), byte)
}

/// A word of a head, masked where the head has none.
pub(super) fn load(
    d: &mut Draft<'_>,
    view: ViewId,
    at: impl Fn(Value) -> [Value; 4],
    (word, dim): (Value, usize),
    mask: Value,
) -> Value {
    let extent = d.size(&Amount::Known(head_words(dim)));
    let within = d.b.within(word, extent);
    let mask = d.b.and(mask, within);
    d.b.load(view, &at(word), Some(mask))
}

/// An integer of a word, times its scale.
pub(super) fn scaled(d: &mut Draft<'_>, word: Value, byte: Value, scale: Value) -> Value {
    let (eight, mask, half) = (d.b.int(8), d.b.int(255), d.b.int(128));
    let by = d.b.mul(byte, eight);
    let shifted = d.b.binary(BinaryFn::ShiftRight, word, by);
    let code = d.b.binary(BinaryFn::And, shifted, mask);
    let turned = d.b.binary(BinaryFn::Xor, code, half);
    let code = d.b.sub(turned, half);
    let code = d.b.unary(UnaryFn::ToFloat, code);
    let scale = d.b.unary(UnaryFn::FromBits, scale);
    d.b.mul(scale, code)
}

/// The words of a group, as [`rlx_tensor::quant::encode_cache_group`] makes them.
pub(super) fn encode(d: &mut Draft<'_>, values: &[Value]) -> Vec<Value> {
    let (zero, infinity) = (d.b.float(0.0), d.b.float(f64::INFINITY));
    let (mut largest, mut finite) = (zero, d.b.truth(true));
    for &value in values {
        let size = d.b.unary(UnaryFn::Abs, value);
        let below = d.b.less(size, infinity);
        finite = d.b.and(finite, below);
        largest = d.b.binary(BinaryFn::Max, largest, size);
    }
    let (most, parts) = (d.b.float(f64::from(f16::MAX)), d.b.float(127.0));
    let scale = d.b.div(largest, parts);
    let scale = d.rounded(DType::F16, scale);
    let scale = d.b.binary(BinaryFn::Min, scale, most);
    let positive = d.b.less(zero, scale);
    let coded = d.b.and(finite, positive);
    let one = d.b.float(1.0);
    let step = d.b.select(coded, scale, one);
    let (least, mask, none) = (d.b.float(-127.0), d.b.int(255), d.b.int(0));
    let nan = d.b.float(f64::NAN);
    let scale = d.b.select(finite, scale, nan);
    let mut words = vec![d.b.unary(UnaryFn::Bits, scale)];
    for four in values.chunks(4) {
        let mut word = none;
        for (i, &value) in four.iter().enumerate() {
            let code = d.b.div(value, step);
            let code = d.b.unary(UnaryFn::RoundEven, code);
            let code = d.b.binary(BinaryFn::Max, code, least);
            let code = d.b.binary(BinaryFn::Min, code, parts);
            let code = d.b.select(coded, code, zero);
            let code = d.b.unary(UnaryFn::ToInt, code);
            let code = d.b.binary(BinaryFn::And, code, mask);
            let up = d.b.int(1 << (8 * i));
            let code = d.b.mul(code, up);
            word = d.b.binary(BinaryFn::Or, word, code);
        }
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_of_integers_comes_back_as_it_went() {
        for keys in [true, false] {
            let head = Q8Head { dim: 64, positions: 64, keys };
            let mut bytes = vec![0; 3 * head.bytes()];
            for (number, bytes) in bytes.chunks_mut(head.bytes()).enumerate() {
                for position in 0..64 {
                    let value = |i: usize| ((i * 37 + position * 11 + number) % 101) as f32 / 7.0 - 6.0;
                    let values: Vec<f32> = (0..64).map(value).collect();
                    head.store(bytes, position, &values);
                }
            }
            let words = upload(head, &bytes);
            assert_eq!(words.len() * 4 * 34, bytes.len() * 36);
            let mut back = vec![9; bytes.len()];
            fetch(head, &words, &mut back);
            assert_eq!(back, bytes);
        }
    }
}
