//! Elements of the host as words of a device and back.
//!
//! In an arena every element is one word: floats as binary32 (which holds each narrower float exactly), integers as 32 bits, truth as 0
//! or 1. Weights of 16 bits stay packed, two a word; blocks as [`crate::lower::blocks`] says.

use crate::lower::blocks;
use half::{bf16, f16};
use rlx::backend::BackendError;
use rlx_tensor::DType;
use std::fmt::Display;

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.chunks_exact(N).map(|chunk| {
        let mut array = [0; N];
        array.copy_from_slice(chunk);
        array
    })
}

fn unsupported(name: &str, reason: String) -> BackendError {
    BackendError::Unsupported { op: "upload".to_owned(), location: name.to_owned(), reason }
}

/// Integers as words; those that a signed word does not hold are refused.
fn fitting<T: TryInto<i32> + Display + Copy>(
    name: &str,
    values: impl Iterator<Item = T>,
) -> Result<Vec<u32>, BackendError> {
    let word = |value: T| {
        let word: Result<i32, _> = value.try_into();
        word.map(|word| word as u32).map_err(|_| {
            unsupported(name, format!("its element {value} does not fit the 32 bits of a device"))
        })
    };
    values.map(word).collect()
}

/// Elements as words of an arena.
///
/// # Errors
/// [`BackendError::Unsupported`] for an integer that 32 bits do not hold, and for a dtype that devices do not have.
pub(super) fn widened(name: &str, dtype: DType, bytes: &[u8]) -> Result<Vec<u32>, BackendError> {
    Ok(match dtype {
        DType::F32 | DType::I32 => chunks(bytes).map(u32::from_le_bytes).collect(),
        DType::F16 => chunks(bytes).map(|b| f16::from_le_bytes(b).to_f32().to_bits()).collect(),
        DType::BF16 => chunks(bytes).map(|b| bf16::from_le_bytes(b).to_f32().to_bits()).collect(),
        DType::Bool => bytes.iter().map(|&b| u32::from(b != 0)).collect(),
        DType::U8 => bytes.iter().map(|&b| u32::from(b)).collect(),
        DType::I8 => bytes.iter().map(|&b| i32::from(b as i8) as u32).collect(),
        DType::U16 => chunks(bytes).map(|b| u32::from(u16::from_le_bytes(b))).collect(),
        DType::I16 => chunks(bytes).map(|b| i32::from(i16::from_le_bytes(b)) as u32).collect(),
        DType::I64 => fitting(name, chunks(bytes).map(i64::from_le_bytes))?,
        DType::U64 => fitting(name, chunks(bytes).map(u64::from_le_bytes))?,
        DType::U32 => fitting(name, chunks(bytes).map(u32::from_le_bytes))?,
        other => return Err(unsupported(name, format!("devices hold no {other}"))),
    })
}

/// Elements as words of a weight.
///
/// # Errors
/// As [`widened`].
pub(super) fn packed(name: &str, dtype: DType, bytes: &[u8]) -> Result<Vec<u32>, BackendError> {
    match dtype {
        DType::F16 | DType::BF16 => {
            let pair = |pair: &[u8]| {
                let mut word = [0; 4];
                word[..pair.len()].copy_from_slice(pair);
                u32::from_le_bytes(word)
            };
            Ok(bytes.chunks(4).map(pair).collect())
        }
        _ if blocks::is_blocks(dtype) => blocks::upload(dtype, bytes)
            .ok_or_else(|| unsupported(name, format!("{} bytes are no blocks of {dtype}", bytes.len()))),
        _ => widened(name, dtype, bytes),
    }
}

/// Words of an arena as elements; as many as there are bytes for.
pub(super) fn narrowed(dtype: DType, words: &[u32], bytes: &mut [u8]) {
    fn fill<const N: usize>(words: &[u32], bytes: &mut [u8], element: impl Fn(u32) -> [u8; N]) {
        bytes.chunks_exact_mut(N).zip(words).for_each(|(to, &word)| to.copy_from_slice(&element(word)));
    }
    match dtype {
        DType::F16 => fill(words, bytes, |w| f16::from_f32(f32::from_bits(w)).to_le_bytes()),
        DType::BF16 => fill(words, bytes, |w| bf16::from_f32(f32::from_bits(w)).to_le_bytes()),
        DType::Bool => fill(words, bytes, |w| [u8::from(w != 0)]),
        DType::U8 | DType::I8 => fill(words, bytes, |w| [w as u8]),
        DType::U16 | DType::I16 => fill(words, bytes, |w| (w as u16).to_le_bytes()),
        DType::I64 | DType::U64 => fill(words, bytes, |w| i64::from(w as i32).to_le_bytes()),
        _ => fill(words, bytes, u32::to_le_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_comes_back_as_it_went() {
        let bytes: Vec<u8> = (0..64u8).map(|i| i.wrapping_mul(37)).collect();
        use DType::{BF16, F16, F32, I8, I16, I32, U8, U16};
        for dtype in [F32, I32, BF16, F16, I8, U8, I16, U16] {
            let words = widened("x", dtype, &bytes).unwrap();
            let mut back = vec![0; bytes.len()];
            narrowed(dtype, &words, &mut back);
            assert_eq!(back, bytes, "{dtype}");
        }
        let mut back = [9; 3];
        narrowed(DType::Bool, &widened("x", DType::Bool, &[0, 1, 1]).unwrap(), &mut back);
        assert_eq!(back, [0, 1, 1]);
    }

    #[test]
    fn an_i64_beyond_32_bits_is_refused_by_name() {
        let bytes = |v: i64| v.to_le_bytes();
        assert_eq!(widened("ids", DType::I64, &bytes(-7)).unwrap(), [(-7i32) as u32]);
        let error = widened("ids", DType::I64, &bytes(1 << 40)).unwrap_err();
        assert!(error.to_string().contains("ids") && error.to_string().contains("1099511627776"), "{error}");
        assert!(error.is_device_fault());
        assert!(widened("ids", DType::U32, &u32::MAX.to_le_bytes()).is_err());
        let mut back = [0; 8];
        narrowed(DType::U64, &widened("ids", DType::U64, &7u64.to_le_bytes()).unwrap(), &mut back);
        assert_eq!(u64::from_le_bytes(back), 7);
    }

    #[test]
    fn an_odd_number_of_halves_ends_in_zero() {
        assert_eq!(packed("w", DType::BF16, &[1, 2, 3, 4, 5, 6]).unwrap(), [0x0403_0201, 0x0605]);
    }
}
