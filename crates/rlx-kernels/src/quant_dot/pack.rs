//! Packing blocks into strips, and what a strip measures.

use rlx_tensor::DType;

use super::format::{Format, SHORTS_BYTES, WORDS_BYTES};
use crate::isa::LANES;

/// What packing and dispatch need to know of a format.
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub dtype: DType,
    pub name: &'static str,
    /// Inputs and bytes of a source block.
    pub block: (usize, usize),
    pub w_bytes: usize,
    pub h_bytes: usize,
    pub offset: i32,
    pub halves: bool,
    pub min: bool,
    pub wide: bool,
    /// Source byte offsets of the shorts.
    #[cfg(test)]
    pub shorts: &'static [usize],
    pub pack: PackStrip,
}

/// Packs `superblocks` blocks of up to 16 rows into strip `strip` of the `strips` of a panel; padding columns become zero.
pub(super) type PackStrip =
    fn(rows: &[Option<&[u8]>], superblocks: usize, place: (usize, usize), out: &mut [u8]);

impl Geometry {
    pub const fn of<F: Format>() -> Geometry {
        Geometry {
            dtype: F::DTYPE,
            name: F::NAME,
            block: F::DTYPE.block(),
            w_bytes: F::W_BYTES,
            h_bytes: F::H_BYTES,
            offset: F::OFFSET,
            halves: F::HALVES,
            min: F::MIN,
            wide: F::WIDE,
            #[cfg(test)]
            shorts: F::SHORTS,
            pack: pack_strip::<F>,
        }
    }

    /// Bytes of a panel of `strips` strips, a multiple of 64.
    pub fn panel_bytes(&self, k: usize, strips: usize) -> usize {
        (k / self.block.0 * strips * (self.w_bytes + self.h_bytes)).next_multiple_of(WORDS_BYTES)
    }
}

fn pack_strip<F: Format>(
    rows: &[Option<&[u8]>],
    superblocks: usize,
    (strip, strips): (usize, usize),
    out: &mut [u8],
) {
    let block_bytes = F::DTYPE.block().1;
    let superblock_bytes = strips * (F::W_BYTES + F::H_BYTES);
    for (index, superblock) in out.chunks_exact_mut(superblock_bytes).take(superblocks).enumerate() {
        let (words, shorts) = superblock.split_at_mut(strips * F::W_BYTES);
        let words = &mut words[strip * F::W_BYTES..(strip + 1) * F::W_BYTES];
        let shorts = &mut shorts[strip * F::H_BYTES..(strip + 1) * F::H_BYTES];
        if rows.iter().any(Option::is_none) {
            words.fill(0);
            shorts.fill(0);
        }
        for (column, row) in rows.iter().enumerate() {
            let Some(row) = row else { continue };
            let block = &row[index * block_bytes..(index + 1) * block_bytes];
            let mut vectors = words.chunks_exact_mut(WORDS_BYTES);
            for (field, &(start, count)) in F::WORDS.iter().enumerate() {
                let source = block[start..start + 4 * count].chunks_exact(4);
                for (word, vector) in source.zip(&mut vectors) {
                    let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                    let stored = F::stored(word, field).to_le_bytes();
                    vector[4 * column..4 * column + 4].copy_from_slice(&stored);
                }
            }
            for (&start, vector) in F::SHORTS.iter().zip(shorts.chunks_exact_mut(SHORTS_BYTES)) {
                vector[2 * column..2 * column + 2].copy_from_slice(&block[start..start + 2]);
            }
        }
    }
    const { assert!(4 * LANES == WORDS_BYTES) };
}
