//! Values of a KV cache as 8-bit integers: groups of 32 elements of a head share an f16 scale, 34 bytes as in a `Q8_0` block. The parts
//! of a head stand apart, so that vectors of them can be read: see [`Q8Head`].

use half::f16;

/// Elements of a head that share a scale.
pub const CACHE_GROUP: usize = 32;

/// Bytes of a group: its scale and its integers.
pub const CACHE_GROUP_BYTES: usize = 2 + CACHE_GROUP;

/// Added and taken away again, rounds numbers below 2^22 to integers, halves to even.
const ROUND: f32 = 12_582_912.0;

/// The bits of a group's scale, and its integers: each value is within half a scale of `scale * integer`, unless it is beyond 127 times
/// the largest f16. A group with a value that is not finite becomes NaN as a whole.
pub fn encode_cache_group(values: &[f32; CACHE_GROUP]) -> (u16, [i8; CACHE_GROUP]) {
    let (mut largest, mut finite) = (0.0f32, true);
    for value in values {
        largest = largest.max(value.abs());
        finite &= value.is_finite();
    }
    if !finite {
        return (f16::NAN.to_bits(), [0; CACHE_GROUP]);
    }
    let scale = f16::from_f32(largest / 127.0).min(f16::MAX);
    let step = scale.to_f32();
    if step == 0.0 {
        return (0, [0; CACHE_GROUP]);
    }
    (scale.to_bits(), values.map(|value| (value / step + ROUND - ROUND).clamp(-127.0, 127.0) as i8))
}

/// Where the parts of one head of a block of a cache stand: all scales, two bytes each, then all integers. Keys are transposed: scales
/// `[group][position]`, integers `[element][position]`; values are not: `[position][group]` and `[position][element]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Q8Head {
    /// Elements of a head, a multiple of [`CACHE_GROUP`].
    pub dim: usize,
    /// Positions of a block.
    pub positions: usize,
    /// Of keys, not values.
    pub keys: bool,
}

impl Q8Head {
    /// Bytes of a head of a block.
    pub const fn bytes(&self) -> usize {
        self.positions * (self.dim / CACHE_GROUP) * CACHE_GROUP_BYTES
    }

    /// First byte of the integers.
    pub const fn integers(&self) -> usize {
        2 * self.positions * (self.dim / CACHE_GROUP)
    }

    /// Byte of the scale of element `i` at a position.
    pub const fn scale_at(&self, position: usize, i: usize) -> usize {
        let group = i / CACHE_GROUP;
        2 * if self.keys {
            group * self.positions + position
        } else {
            position * (self.dim / CACHE_GROUP) + group
        }
    }

    /// Byte of the integer of element `i` at a position.
    pub const fn integer_at(&self, position: usize, i: usize) -> usize {
        let at = if self.keys { i * self.positions + position } else { position * self.dim + i };
        self.integers() + at
    }

    /// Element `i` at a position, from the bytes of a head.
    pub fn value(&self, head: &[u8], position: usize, i: usize) -> f32 {
        let at = self.scale_at(position, i);
        let scale = f16::from_le_bytes([head[at], head[at + 1]]).to_f32();
        scale * f32::from(head[self.integer_at(position, i)].cast_signed())
    }

    /// Stores the elements of a position in the bytes of a head.
    pub fn store(&self, head: &mut [u8], position: usize, values: &[f32]) {
        for (group, values) in values.as_chunks::<CACHE_GROUP>().0.iter().enumerate() {
            let first = group * CACHE_GROUP;
            let (scale, integers) = encode_cache_group(values);
            let at = self.scale_at(position, first);
            head[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            for (i, integer) in integers.into_iter().enumerate() {
                head[self.integer_at(position, first + i)] = integer.cast_unsigned();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_comes_back_within_half_a_step() {
        for exponent in [-30, -14, -3, 0, 5, 15] {
            let unit = 2f32.powi(exponent);
            let values: [f32; CACHE_GROUP] = std::array::from_fn(|i| unit * ((i * 37 % 64) as f32 - 31.3));
            let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let (scale, integers) = encode_cache_group(&values);
            let step = f16::from_bits(scale).to_f32();
            // A subnormal scale is off by up to 2^-25.
            assert!((step - largest / 127.0).abs() <= (step / 2048.0).max(2f32.powi(-25)));
            for (value, integer) in values.iter().zip(integers) {
                let bound = (step / 2.0).max(largest - 127.0 * step);
                assert!((value - step * f32::from(integer)).abs() <= bound, "{value} {integer} {step}");
            }
        }
        assert_eq!(encode_cache_group(&[0.0; CACHE_GROUP]), (0, [0; CACHE_GROUP]));
        let huge = encode_cache_group(&[f32::MAX; CACHE_GROUP]);
        assert_eq!(huge, (f16::MAX.to_bits(), [127; CACHE_GROUP]));
    }

    #[test]
    fn what_is_not_finite_makes_its_group_nan_and_no_other() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0f32; 2 * CACHE_GROUP];
            values[40] = bad;
            for keys in [true, false] {
                let head = Q8Head { dim: 64, positions: 4, keys };
                let mut bytes = vec![0xff; head.bytes()];
                head.store(&mut bytes, 2, &values);
                assert!((0..32).all(|i| (head.value(&bytes, 2, i) - 1.0).abs() < 0.01));
                assert!((32..64).all(|i| head.value(&bytes, 2, i).is_nan()));
            }
        }
    }

    #[test]
    fn every_byte_of_a_head_has_one_owner() {
        for keys in [true, false] {
            let head = Q8Head { dim: 96, positions: 64, keys };
            let mut owners = vec![0; head.bytes()];
            for position in 0..64 {
                for i in 0..96 {
                    owners[head.integer_at(position, i)] += 1;
                    if i % CACHE_GROUP == 0 {
                        owners[head.scale_at(position, i)] += 1;
                        owners[head.scale_at(position, i) + 1] += 1;
                    }
                }
            }
            assert!(owners.iter().all(|&owners| owners == 1));
        }
    }
}
