//! Which blocks of a KV cache belong to which sequence.

use crate::error::{ModelError, Result};
use crate::generate::DecoderLimits;
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

/// Blocks of the caches of layers that have a window: fewer than positions, since what no later token sees is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowLimits {
    /// The widest window.
    pub positions: usize,
    /// Blocks of each such cache.
    pub blocks: usize,
}

impl WindowLimits {
    /// As many blocks as `batch` sequences of up to `table` blocks need that run up to `rows` rows in a step, all together.
    ///
    /// `r` rows see `positions + r - 1` positions, which lie in at most `ceil(positions / 64) + floor(r / 64) + 2` blocks.
    pub fn new(positions: usize, batch: usize, table: usize, rows: usize) -> Self {
        let seen = blocks_for(positions).saturating_add(2).saturating_mul(batch);
        let blocks = seen.saturating_add(rows / BLOCK_POSITIONS);
        Self { positions, blocks: blocks.min(table.saturating_mul(batch)) }
    }

    /// The first block of which a token at `position` sees anything.
    fn first_seen(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.positions) / BLOCK_POSITIONS
    }
}

/// Blocks of the KV caches and who holds them. Block ids are those of the graph's `block_table`; the lowest free ones are given first, so
/// a single sequence gets `0, 1, 2, ..`. Blocks whose content is known stay when nobody holds them, until others are needed: a
/// sequence that begins alike may adopt them.
///
/// Layers with a window have blocks of their own, named in `window_table`: see [`BlockPool::advance`].
#[derive(Debug, Clone)]
pub struct BlockPool {
    all: Blocks,
    window: Option<(WindowLimits, Blocks)>,
}

/// The blocks of one kind of cache.
#[derive(Debug, Clone)]
struct Blocks {
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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<u32>,
    /// Of layers with a window; those before `left` were given back.
    window: Vec<u32>,
    left: usize,
}

/// Blocks that hold this many positions.
pub fn blocks_for(positions: usize) -> usize {
    positions.div_ceil(BLOCK_POSITIONS)
}

impl Blocks {
    fn new(total: usize) -> Self {
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

    fn free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Appends `count` blocks; all of them or none.
    fn take(&mut self, count: usize, to: &mut Vec<u32>) -> Result<()> {
        if count > self.free() {
            return Err(ModelError::CacheFull { needed: count, free: self.free() });
        }
        for _ in 0..count {
            let Some(block) = self.free.pop_first().or_else(|| self.forget_oldest()) else { break };
            self.holders[block as usize] = 1;
            to.push(block);
        }
        Ok(())
    }

    fn give_back(&mut self, block: u32) {
        let at = block as usize;
        self.holders[at] -= 1;
        match (self.holders[at], self.keys[at]) {
            (0, Some(_)) => self.idle.push_back(block),
            (0, None) => drop(self.free.insert(block)),
            _ => {}
        }
    }

    fn remember(&mut self, block: u32, key: BlockKey) {
        if self.keys[block as usize].is_none() && !self.known.contains_key(&key) {
            self.keys[block as usize] = Some(key);
            self.known.insert(key, block);
        }
    }

    fn knows(&self, key: &BlockKey) -> bool {
        self.known.contains_key(key)
    }

    fn adopt(&mut self, key: &BlockKey) -> Option<u32> {
        let &block = self.known.get(key)?;
        if self.holders[block as usize] == 0 {
            self.idle.retain(|&idle| idle != block);
        }
        self.holders[block as usize] += 1;
        Some(block)
    }

    fn forget_oldest(&mut self) -> Option<u32> {
        let block = self.idle.pop_front()?;
        if let Some(key) = self.keys[block as usize].take() {
            self.known.remove(&key);
        }
        Some(block)
    }
}

impl BlockPool {
    /// A pool of `total` free blocks, for models without windows.
    pub fn new(total: usize) -> Self {
        Self { all: Blocks::new(total), window: None }
    }

    /// The blocks of a runtime.
    pub fn of(limits: &DecoderLimits) -> Self {
        let window = limits.window.map(|window| (window, Blocks::new(window.blocks)));
        Self { all: Blocks::new(limits.blocks), window }
    }

    /// Blocks in all, of layers without a window.
    pub fn total(&self) -> usize {
        self.all.total
    }

    /// Blocks that nobody holds, of layers without a window.
    pub fn free(&self) -> usize {
        self.all.free()
    }

    /// Gives a sequence the blocks it lacks to hold `positions`; all of them or none. Layers with a window get theirs step by step, by
    /// [`BlockPool::advance`].
    ///
    /// # Errors
    /// [`ModelError::CacheFull`].
    pub fn reserve(&mut self, table: &mut BlockTable, positions: usize) -> Result<()> {
        let needed = blocks_for(positions).saturating_sub(table.blocks.len());
        self.all.take(needed, &mut table.blocks)
    }

    /// Gives the layers with a window the blocks of a step that runs the positions `past..end`. Where too few are free, those that no
    /// position from `past` on sees are given back first. Nothing to do for models without windows.
    ///
    /// # Errors
    /// [`ModelError::CacheFull`]: other sequences hold what they do not see any more ([`BlockPool::give_back_unseen`]), or run more rows
    /// than the limits say.
    pub fn advance(&mut self, table: &mut BlockTable, past: usize, end: usize) -> Result<()> {
        let Some((_, blocks)) = &self.window else { return Ok(()) };
        let needed = blocks_for(end).saturating_sub(table.window.len());
        if needed > blocks.free() {
            self.give_back_unseen(table, past);
        }
        let Some((_, blocks)) = &mut self.window else { return Ok(()) };
        blocks.take(needed, &mut table.window)
    }

    /// Takes back the blocks of layers with a window that no position from `past` on sees.
    pub fn give_back_unseen(&mut self, table: &mut BlockTable, past: usize) {
        let Some((window, blocks)) = &mut self.window else { return };
        let first = window.first_seen(past).min(table.window.len());
        for at in table.left..first {
            blocks.give_back(table.window[at]);
        }
        table.left = table.left.max(first);
    }

    /// From where a text may go on of which the positions before `past` were run with this table: from `past`, unless a layer with a window
    /// has given back what the token there sees. Then from the start.
    pub fn resume(&mut self, table: &mut BlockTable, past: usize) -> usize {
        match &self.window {
            Some((window, _)) if window.first_seen(past) < table.left => {
                self.truncate_window(table, 0);
                0
            }
            _ => past,
        }
    }

    /// Takes back the blocks of a sequence beyond the first `positions`.
    pub fn truncate(&mut self, table: &mut BlockTable, positions: usize) {
        let keep = blocks_for(positions).min(table.blocks.len());
        // The last of a text first: of an idle text its start is worth most.
        table.blocks.drain(keep..).rev().for_each(|block| self.all.give_back(block));
        self.truncate_window(table, blocks_for(positions));
    }

    fn truncate_window(&mut self, table: &mut BlockTable, keep: usize) {
        let Some((_, blocks)) = &mut self.window else { return };
        let keep = keep.min(table.window.len());
        let held = keep.max(table.left).min(table.window.len());
        table.window.drain(held..).rev().for_each(|block| blocks.give_back(block));
        table.window.truncate(keep);
        table.left = table.left.min(keep);
    }

    /// Says what a full block of a sequence holds. It must not be written any more.
    pub fn remember(&mut self, table: &BlockTable, index: usize, key: BlockKey) {
        if let Some(&block) = table.blocks.get(index) {
            self.all.remember(block, key);
        }
        if let (Some((_, blocks)), Some(&block)) = (&mut self.window, table.window.get(index))
            && index >= table.left
        {
            blocks.remember(block, key);
        }
    }

    /// Gives a sequence without blocks those that hold the first of these keys; their number. Where layers have a window, the last of
    /// these that the next token sees have to be known there too.
    pub fn adopt(&mut self, table: &mut BlockTable, keys: &[BlockKey]) -> usize {
        if !table.blocks.is_empty() || !table.window.is_empty() {
            return 0;
        }
        let mut count = keys.iter().take_while(|key| self.all.knows(key)).count();
        let mut first = count;
        if let Some((window, blocks)) = &self.window {
            let seen = |count: &usize| {
                let first = window.first_seen(count * BLOCK_POSITIONS);
                keys[first..*count].iter().all(|key| blocks.knows(key))
            };
            count = (0..=count).rev().find(seen).unwrap_or(0);
            first = window.first_seen(count * BLOCK_POSITIONS).min(count);
        }
        table.blocks.extend(keys[..count].iter().filter_map(|key| self.all.adopt(key)));
        if let Some((_, blocks)) = &mut self.window {
            table.window.resize(first, 0);
            table.left = first;
            table.window.extend(keys[first..count].iter().filter_map(|key| blocks.adopt(key)));
        }
        count
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

    /// The blocks of layers without a window, in order of positions.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Blocks that layers with a window hold.
    pub fn window_blocks(&self) -> usize {
        self.window.len() - self.left
    }

    /// Appends a row of the graph's `block_table`, `width` wide; entries that are never read are zero.
    pub fn push_row(&self, width: usize, out: &mut Vec<i32>) {
        out.extend(self.blocks.iter().take(width).map(|&block| block as i32));
        out.extend(std::iter::repeat_n(0, width.saturating_sub(self.blocks.len())));
    }

    /// Appends a row of the graph's `window_table`, `width` wide: zero where a block was given back, -1, which no run accepts, where there is
    /// none yet.
    pub fn push_window_row(&self, width: usize, out: &mut Vec<i32>) {
        let held = self.window.iter().enumerate().take(width);
        out.extend(held.map(|(at, &block)| if at < self.left { 0 } else { block as i32 }));
        out.extend(std::iter::repeat_n(-1, width.saturating_sub(self.window.len())));
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
        assert_eq!(pool.adopt(&mut second, &[one]), 1);
        pool.reserve(&mut second, 128).unwrap();
        assert_eq!((first.blocks(), second.blocks(), pool.free()), (&[0, 1, 2][..], &[0, 3][..], 0));
        pool.truncate(&mut first, 0);
        assert_eq!(pool.free(), 2);
        pool.truncate(&mut second, 0);
        assert_eq!((pool.adopt(&mut first, &[one, two]), first.blocks()), (2, &[0, 1][..]));
        pool.truncate(&mut first, 0);
        // The end of the idle text goes first.
        pool.reserve(&mut first, 192).unwrap();
        assert_eq!(first.blocks(), [2, 3, 1]);
        assert_eq!(pool.adopt(&mut second, &[one, two]), 1);
        pool.truncate(&mut second, 0);
        pool.truncate(&mut first, 0);
        assert_eq!(pool.free(), 4);
    }

    fn windowed(positions: usize, table: usize, rows: usize) -> BlockPool {
        let window = WindowLimits::new(positions, 1, table, rows);
        let limits = DecoderLimits { max_rows: rows, blocks: table, table, outs: 1, window: Some(window) };
        BlockPool::of(&limits)
    }

    /// Blocks that the table of layers with a window names for the positions that a step sees.
    fn seen(table: &BlockTable, window: usize, past: usize, end: usize) -> Vec<i32> {
        let mut row = Vec::new();
        table.push_window_row(blocks_for(end), &mut row);
        row.split_off((past + 1).saturating_sub(window) / BLOCK_POSITIONS)
    }

    #[test]
    fn a_window_holds_as_many_blocks_as_a_step_sees_however_long_the_text() {
        for (window, rows) in [(1, 1), (8, 64), (64, 1), (65, 7), (100, 130), (512, 512)] {
            let (length, mut past) = (4000, 0);
            let mut pool = windowed(window, blocks_for(length), rows);
            let mut table = BlockTable::new();
            pool.reserve(&mut table, length).unwrap();
            let most = WindowLimits::new(window, 1, blocks_for(length), rows).blocks;
            assert!(most <= blocks_for(window) + rows / BLOCK_POSITIONS + 2);
            while past < length {
                let end = length.min(past + rows);
                pool.advance(&mut table, past, end).unwrap();
                let mut held = seen(&table, window, past, end);
                assert!(held.iter().all(|&block| (0..most as i32).contains(&block)), "{window} {rows}");
                let count = held.len();
                held.sort_unstable();
                held.dedup();
                assert!(held.len() == count && table.window_blocks() <= most);
                past = end;
            }
            assert!(table.window_blocks() < table.blocks().len());
            pool.truncate(&mut table, 0);
            assert_eq!((table.window_blocks(), pool.window.unwrap().1.free()), (0, most));
        }
    }

    #[test]
    fn a_text_goes_on_only_where_its_window_is_still_there() {
        let mut pool = windowed(64, 40, 64);
        let mut table = BlockTable::new();
        pool.reserve(&mut table, 2560).unwrap();
        for past in (0..1280).step_by(64) {
            pool.advance(&mut table, past, past + 64).unwrap();
        }
        assert_eq!(pool.resume(&mut table, 1280), 1280);
        assert_eq!(pool.resume(&mut table, 1279), 1279);
        let held = table.window_blocks();
        assert!(held <= 4);
        assert_eq!(pool.resume(&mut table, 640), 0);
        assert_eq!(table.window_blocks(), 0);
        pool.advance(&mut table, 0, 64).unwrap();
        assert_eq!(seen(&table, 64, 0, 64).len(), 1);
    }

    #[test]
    fn a_beginning_is_adopted_as_far_as_its_window_is_known() {
        let window = WindowLimits { positions: 64, blocks: 6 };
        let limits = DecoderLimits { max_rows: 64, blocks: 16, table: 8, outs: 1, window: Some(window) };
        let mut pool = BlockPool::of(&limits);
        let (mut first, mut second) = (BlockTable::new(), BlockTable::new());
        let keys: Vec<BlockKey> = (0..5)
            .scan(BlockKey::start(0), |key, n| {
                *key = key.then(&[n; BLOCK_POSITIONS]);
                Some(*key)
            })
            .collect();
        pool.reserve(&mut first, 320).unwrap();
        for (n, key) in keys.iter().enumerate() {
            pool.advance(&mut first, 64 * n, 64 * n + 64).unwrap();
            pool.remember(&first, n, *key);
            pool.give_back_unseen(&mut first, 64 * n + 64);
        }
        // Block 4 is what position 320 sees; those before are idle, all known still.
        assert_eq!(first.window_blocks(), 1);
        assert_eq!(pool.adopt(&mut second, &keys), 5);
        assert_eq!((second.blocks().len(), second.window_blocks()), (5, 1));
        pool.truncate(&mut second, 0);
        // Other texts take the idle blocks, the oldest first: 0, 1 and 2 are gone, then 3.
        let mut other = BlockTable::new();
        pool.advance(&mut other, 0, 256).unwrap();
        assert_eq!(pool.adopt(&mut second, &keys[..3]), 0, "block 2 is not there, and token 192 sees it");
        assert_eq!(pool.adopt(&mut second, &keys[..4]), 4);
        pool.truncate(&mut second, 0);
        pool.truncate(&mut first, 0);
        pool.truncate(&mut other, 0);
        assert_eq!((pool.free(), pool.window.unwrap().1.free()), (16, 6));
    }
}
