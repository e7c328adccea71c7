//! Block-quantised weights: what every GGUF block type means, element by element, and how values are put into blocks.
//!
//! [`decode`] is the plain definition that faster code is checked against. It multiplies in f32 in the order in which GGUF's own
//! Python package does, so that both give the same bits. The layouts are those of <https://github.com/ggml-org/ggml>.

mod cache;
mod encode;
mod grid;
mod small;
mod superblock;

use crate::DType;
use half::{bf16, f16};

pub use cache::{CACHE_GROUP, CACHE_GROUP_BYTES, Q8Head, encode_cache_group};
pub use encode::{encode, has_encoder};

/// Elements of a superblock, which most types use.
pub const SUPERBLOCK: usize = 256;

/// Why blocks cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// The dtype has no such conversion.
    #[error("no {direction} of {dtype} blocks")]
    DType {
        /// The dtype.
        dtype: DType,
        /// "decoder" or "encoder".
        direction: &'static str,
    },
    /// Bytes and elements do not match, or do not fill whole blocks.
    #[error("{elements} elements of {dtype} do not fit {bytes} bytes")]
    Length {
        /// The dtype.
        dtype: DType,
        /// Number of elements.
        elements: usize,
        /// Number of bytes.
        bytes: usize,
    },
}

/// Decodes one block: the bytes of [`DType::block`] to as many elements.
pub type DecodeBlock = fn(&[u8], &mut [f32]);

const DECODERS: &[(DType, DecodeBlock)] = &[
    (DType::F32, |bytes, out| out[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
    (DType::F16, |bytes, out| out[0] = half_at(bytes, 0)),
    (DType::BF16, |bytes, out| out[0] = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()),
    (DType::Q4_0, small::q4_0),
    (DType::Q4_1, small::q4_1),
    (DType::Q5_0, small::q5_0),
    (DType::Q5_1, small::q5_1),
    (DType::Q8_0, small::q8_0),
    (DType::IQ4_NL, small::iq4_nl),
    (DType::MXFP4, small::mxfp4),
    (DType::Q2_K, superblock::q2_k),
    (DType::Q3_K, superblock::q3_k),
    (DType::Q4_K, superblock::q4_k),
    (DType::Q5_K, superblock::q5_k),
    (DType::Q6_K, superblock::q6_k),
    (DType::IQ4_XS, superblock::iq4_xs),
    (DType::IQ2_XXS, grid::iq2_xxs),
    (DType::IQ2_XS, grid::iq2_xs),
    (DType::IQ2_S, grid::iq2_s),
    (DType::IQ3_XXS, grid::iq3_xxs),
    (DType::IQ3_S, grid::iq3_s),
    (DType::IQ1_S, grid::iq1_s),
    (DType::IQ1_M, grid::iq1_m),
];

/// The decoder of one block, for quantised types and F32, F16, BF16.
pub fn block_decoder(dtype: DType) -> Option<DecodeBlock> {
    DECODERS.iter().find(|(known, _)| *known == dtype).map(|(_, decode)| *decode)
}

/// Decodes whole blocks: every quantised type, and F32, F16, BF16.
///
/// # Errors
/// [`QuantError::DType`], [`QuantError::Length`].
pub fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
    let decode = block_decoder(dtype).ok_or(QuantError::DType { dtype, direction: "decoder" })?;
    check_length(dtype, out.len(), bytes.len())?;
    let (elements, block_bytes) = dtype.block();
    for (block, out) in bytes.chunks_exact(block_bytes).zip(out.chunks_exact_mut(elements)) {
        decode(block, out);
    }
    Ok(())
}

fn check_length(dtype: DType, elements: usize, bytes: usize) -> Result<(), QuantError> {
    match dtype.bytes_for(elements) {
        Some(needed) if needed == bytes => Ok(()),
        _ => Err(QuantError::Length { dtype, elements, bytes }),
    }
}

/// The binary16 at byte `at`, as f32.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests;
