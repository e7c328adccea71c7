//! Which blocks of a KV cache belong to which sequence.

use crate::error::{ModelError, Result};

/// Positions in one block of a cache.
pub const BLOCK_POSITIONS: usize = rlx_graph::ops::attention::BLOCK;

/// Blocks of a KV cache and who holds them. Block ids are those of the graph's `block_table`; the lowest free ones are given first, so
/// a single sequence gets `0, 1, 2, ..`.
#[derive(Debug, Clone)]
pub struct BlockPool {
    free: std::collections::BTreeSet<u32>,
    total: usize,
}

/// The blocks of one sequence, in order of positions.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

/// Blocks that hold this many positions.
pub fn blocks_for(positions: usize) -> usize {
    positions.div_ceil(BLOCK_POSITIONS)
}

impl BlockPool {
    /// A pool of `total` free blocks.
    pub fn new(total: usize) -> Self {
        let total = total.min(i32::MAX as usize);
        Self { free: (0..total as u32).collect(), total }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Gives a sequence the blocks it lacks to hold `positions`; all of them or none.
    ///
    /// # Errors
    /// [`ModelError::CacheFull`].
    pub fn reserve(&mut self, table: &mut BlockTable, positions: usize) -> Result<()> {
        let needed = blocks_for(positions).saturating_sub(table.blocks.len());
        if needed > self.free.len() {
            return Err(ModelError::CacheFull { needed, free: self.free.len() });
        }
        table.blocks.extend((0..needed).filter_map(|_| self.free.pop_first()));
        Ok(())
    }

    /// Takes back the blocks of a sequence beyond the first `positions`.
    pub fn truncate(&mut self, table: &mut BlockTable, positions: usize) {
        let keep = blocks_for(positions).min(table.blocks.len());
        self.free.extend(table.blocks.drain(keep..));
    }
}

impl BlockTable {
    /// A sequence without blocks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Positions that fit.
    pub fn capacity(&self) -> usize {
        self.blocks.len() * BLOCK_POSITIONS
    }

    /// The blocks, in order of positions.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Appends a row of the graph's `block_table`, `width` wide; entries that are never read are zero.
    pub fn push_row(&self, width: usize, out: &mut Vec<i32>) {
        out.extend(self.blocks.iter().take(width).map(|&block| block as i32));
        out.extend(std::iter::repeat_n(0, width.saturating_sub(self.blocks.len())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_sequence_is_contiguous() {
        let (mut pool, mut table) = (BlockPool::new(4), BlockTable::new());
        pool.reserve(&mut table, 1).unwrap();
        pool.reserve(&mut table, 64).unwrap();
        assert_eq!(table.blocks(), [0]);
        pool.reserve(&mut table, 65).unwrap();
        assert_eq!((table.blocks(), table.capacity(), pool.free()), (&[0, 1][..], 128, 2));
        let mut row = Vec::new();
        table.push_row(3, &mut row);
        assert_eq!(row, [0, 1, 0]);
    }

    #[test]
    fn a_full_cache_gives_nothing() {
        let (mut pool, mut first, mut second) = (BlockPool::new(3), BlockTable::new(), BlockTable::new());
        pool.reserve(&mut first, 100).unwrap();
        let error = pool.reserve(&mut second, 129).unwrap_err();
        assert!(matches!(error, ModelError::CacheFull { needed: 3, free: 1 }), "{error}");
        assert_eq!((second.blocks().len(), pool.free()), (0, 1));
        pool.truncate(&mut first, 64);
        pool.reserve(&mut second, 128).unwrap();
        assert_eq!((first.blocks(), second.blocks()), (&[0][..], &[1, 2][..]));
        pool.truncate(&mut first, 0);
        assert_eq!(pool.free(), 1);
    }
}
