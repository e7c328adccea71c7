//! Which blocks of a KV cache belong to which sequence.

use crate::error::{ModelError, Result};
use std::collections::{BTreeSet, HashMap, VecDeque};

/// Positions in one block of a cache.
pub const BLOCK_POSITIONS: usize = rlx_graph::ops::attention::BLOCK;

/// What the keys and values of a full block were made from: all tokens up to its end, and whatever else they depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey([u8; 32]);

impl BlockKey {
    /// The key before the first block. Texts with different contexts (adapters, say) share nothing.
    pub fn start(context: u64) -> Self {
        Self(*blake3::hash(&context.to_le_bytes()).as_bytes())
    }

    /// The key of the block of these [`BLOCK_POSITIONS`] tokens after the blocks of this key.
    #[must_use]
    pub fn then(&self, tokens: &[u32]) -> Self {
        let mut digest = blake3::Hasher::new_keyed(&self.0);
        tokens.iter().for_each(|token| {
            digest.update(&token.to_le_bytes());
        });
        Self(*digest.finalize().as_bytes())
    }
}

/// Blocks of a KV cache and who holds them. Block ids are those of the graph's `block_table`; the lowest free ones are given first, so
/// a single sequence gets `0, 1, 2, ..`. Blocks whose content is known stay when nobody holds them, until others are needed: a
/// sequence that begins alike may adopt them.
#[derive(Debug, Clone)]
pub struct BlockPool {
    free: BTreeSet<u32>,
    total: usize,
    /// Sequences that hold a block.
    holders: Vec<u32>,
    known: HashMap<BlockKey, u32>,
    keys: Vec<Option<BlockKey>>,
    /// Known blocks that nobody holds, the longest unused first.
    idle: VecDeque<u32>,
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
        let (known, idle) = (HashMap::new(), VecDeque::new());
        Self {
            free: (0..total as u32).collect(),
            total,
            holders: vec![0; total],
            known,
            keys: vec![None; total],
            idle,
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Gives a sequence the blocks it lacks to hold `positions`; all of them or none.
    ///
    /// # Errors
    /// [`ModelError::CacheFull`].
    pub fn reserve(&mut self, table: &mut BlockTable, positions: usize) -> Result<()> {
        let needed = blocks_for(positions).saturating_sub(table.blocks.len());
        if needed > self.free() {
            return Err(ModelError::CacheFull { needed, free: self.free() });
        }
        for _ in 0..needed {
            let Some(block) = self.free.pop_first().or_else(|| self.forget_oldest()) else { break };
            self.holders[block as usize] = 1;
            table.blocks.push(block);
        }
        Ok(())
    }

    /// Takes back the blocks of a sequence beyond the first `positions`.
    pub fn truncate(&mut self, table: &mut BlockTable, positions: usize) {
        let keep = blocks_for(positions).min(table.blocks.len());
        // The last of a text first: of an idle text its start is worth most.
        for block in table.blocks.drain(keep..).rev() {
            let at = block as usize;
            self.holders[at] -= 1;
            match (self.holders[at], self.keys[at]) {
                (0, Some(_)) => self.idle.push_back(block),
                (0, None) => drop(self.free.insert(block)),
                _ => {}
            }
        }
    }

    /// Says what a full block of a sequence holds. It must not be written any more.
    pub fn remember(&mut self, table: &BlockTable, index: usize, key: BlockKey) {
        let Some(&block) = table.blocks.get(index) else { return };
        if self.keys[block as usize].is_none() && !self.known.contains_key(&key) {
            self.keys[block as usize] = Some(key);
            self.known.insert(key, block);
        }
    }

    /// Gives a sequence without blocks those that hold the first of these keys; their number.
    pub fn adopt(&mut self, table: &mut BlockTable, keys: impl IntoIterator<Item = BlockKey>) -> usize {
        if !table.blocks.is_empty() {
            return 0;
        }
        for key in keys {
            let Some(&block) = self.known.get(&key) else { break };
            if self.holders[block as usize] == 0 {
                self.idle.retain(|&idle| idle != block);
            }
            self.holders[block as usize] += 1;
            table.blocks.push(block);
        }
        table.blocks.len()
    }

    fn forget_oldest(&mut self) -> Option<u32> {
        let block = self.idle.pop_front()?;
        if let Some(key) = self.keys[block as usize].take() {
            self.known.remove(&key);
        }
        Some(block)
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

    #[test]
    fn known_blocks_are_shared_and_stay_until_others_are_needed() {
        let (mut pool, mut first, mut second) = (BlockPool::new(4), BlockTable::new(), BlockTable::new());
        let tokens: Vec<u32> = (0..128).collect();
        let one = BlockKey::start(0).then(&tokens[..64]);
        let two = one.then(&tokens[64..]);
        assert!(one != BlockKey::start(1).then(&tokens[..64]) && two != one.then(&tokens[..64]));
        pool.reserve(&mut first, 192).unwrap();
        pool.remember(&first, 0, one);
        pool.remember(&first, 1, two);
        assert_eq!(pool.adopt(&mut second, [one]), 1);
        pool.reserve(&mut second, 128).unwrap();
        assert_eq!((first.blocks(), second.blocks(), pool.free()), (&[0, 1, 2][..], &[0, 3][..], 0));
        pool.truncate(&mut first, 0);
        assert_eq!(pool.free(), 2);
        pool.truncate(&mut second, 0);
        assert_eq!((pool.adopt(&mut first, [one, two]), first.blocks()), (2, &[0, 1][..]));
        pool.truncate(&mut first, 0);
        // The end of the idle text goes first.
        pool.reserve(&mut first, 192).unwrap();
        assert_eq!(first.blocks(), [2, 3, 1]);
        assert_eq!(pool.adopt(&mut second, [one, two]), 1);
        pool.truncate(&mut second, 0);
        pool.truncate(&mut first, 0);
        assert_eq!(pool.free(), 4);
    }
}
