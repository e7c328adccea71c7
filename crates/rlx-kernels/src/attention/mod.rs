//! Attention over ragged batches, streaming over keys.
//!
//! A row is one query position; its heads lie side by side. Key `j` is visible to a query at absolute position `p` iff
//! `p - left <= j <= p + right`. A row that sees no key gives zeros.
//!
//! Numeric contract. A score is one accumulator over d = 0, 1, ..., fused; then one factor `scale * log2(e)`, or `* scale`,
//! soft-cap, `+ mask`, `* log2(e)` where there is a soft-cap or a mask; weights are powers of two. Keys are taken in blocks
//! of [`BLOCK`] absolute positions with running maximum, sum and output per row; a block's weights are summed in a fixed
//! tree; an output element is one accumulator over the visible keys in order, and in the end times `1 / sum`. Every
//! [`CHUNK`] absolute positions start from an empty state, and the states of chunks are merged in ascending order. So the
//! bits of a row depend on its query and on the keys and values it sees, never on the batch, the tile, the threads,
//! whether it was prefilled or decoded, or whether chunks ran in one tile or in several.
//!
//! Tiles of up to 8 rows (`few`) hold keys in the lanes of a vector and read a cache once for all rows, as it is
//! stored; larger ones (`many`) hold rows in the lanes, so that nothing is reduced across lanes. Both give the same bits.

mod append;
mod few;
mod generic;
mod many;
mod q8;
mod table;
#[cfg(test)]
mod tests;

use rlx_tensor::quant::{CACHE_GROUP, CACHE_GROUP_BYTES};

pub use append::AppendArgs;
pub use table::{APPEND, ATTENTION, MERGE, append_entry, attention_entry, merge_entry};

/// Key positions per block, in the cache and while streaming.
pub const BLOCK: usize = 64;
/// Key positions per independently started state.
pub const CHUNK: usize = 512;
/// Query rows times heads of a group that one tile aims at.
const TILE_ROWS: usize = 128;
/// Rows of a tile up to which its vectors hold keys.
const FEW_ROWS: usize = 8;

/// Query rows of a tile for groups of `group` heads.
const fn queries_per_tile(group: usize) -> usize {
    let queries = TILE_ROWS / group;
    if queries == 0 { 1 } else { queries }
}

/// Values of scratch that one tile needs: a block of keys and values, queries, scores, two states.
pub const fn scratch_floats(group: usize, head_dim: usize, value_dim: usize) -> usize {
    let rows = (queries_per_tile(group) * group).next_multiple_of(many::WIDEST);
    BLOCK * (head_dim + value_dim + many::WIDEST) + rows * head_dim + 2 * rows * (value_dim + 2)
}

/// Storage type of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheDtype {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit integers with an f16 scale for each 32 of a head, as [`rlx_tensor::quant::Q8Head`] places them.
    Q8,
}

impl CacheDtype {
    /// Bytes of the elements of a head at one position; a multiple of 32 for [`CacheDtype::Q8`].
    pub const fn bytes(self, dim: usize) -> usize {
        match self {
            CacheDtype::F32 => 4 * dim,
            CacheDtype::F16 | CacheDtype::Bf16 => 2 * dim,
            CacheDtype::Q8 => dim / CACHE_GROUP * CACHE_GROUP_BYTES,
        }
    }
}

/// Where keys and values are read.
#[derive(Clone, Copy, Debug)]
pub enum Keys {
    /// The rows of the same sequence of this run: `k` rows of `kv_heads * head_dim`, `v` rows of
    /// `kv_heads * value_dim`, row strides in elements. `past` must be null.
    Rows {
        /// First key row.
        k: *const f32,
        /// Elements between key rows.
        k_stride: usize,
        /// First value row.
        v: *const f32,
        /// Elements between value rows.
        v_stride: usize,
    },
    /// A cache of blocks of [`BLOCK`] positions; sequence `b` has its position `p` in block
    /// `block_table[b * table_width + p / BLOCK]`.
    Cache {
        /// `[block][kv_head][head_dim][BLOCK]`. Whole blocks are read: unused positions hold any initialised bits.
        k: *const u8,
        /// `[block][kv_head][BLOCK][value_dim]`.
        v: *const u8,
        /// Element type of both.
        dtype: CacheDtype,
        /// Block numbers, `[batch][table_width]`.
        block_table: *const i32,
        /// Blocks per sequence in the table.
        table_width: usize,
    },
}

/// Arguments of attention and of the merge of its chunks.
#[derive(Clone, Copy, Debug)]
pub struct AttentionArgs {
    /// Queries, rows of `heads * head_dim`.
    pub q: *const f32,
    /// Elements between query rows.
    pub q_stride: usize,
    /// Output, rows of `heads * value_dim`; must not overlap anything read.
    pub out: *mut f32,
    /// Elements between output rows.
    pub out_stride: usize,
    /// Keys and values.
    pub keys: Keys,
    /// `batch + 1` ascending row numbers, the first one 0.
    pub seq_starts: *const i32,
    /// Sequences.
    pub batch: usize,
    /// Per sequence, positions before this run's first row; null for none. A sequence has `past + rows` keys.
    pub past: *const i32,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a query and key head.
    pub head_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Scores become `softcap * tanh(score / softcap)`; 0 for none.
    pub softcap: f32,
    /// Visible positions before a query's own; `usize::MAX` for all.
    pub left: usize,
    /// Visible positions after a query's own: 0 when causal, `usize::MAX` for all.
    pub right: usize,
    /// Added to the scores, element `[sequence][head][query in this run][key position]`, the last one contiguous;
    /// null for none.
    pub mask: *const f32,
    /// Elements between sequences, heads and queries of the mask (0 broadcasts).
    pub mask_strides: [usize; 3],
    /// When `chunks > 0`: states of chunks, [`AttentionArgs::partial_floats`] values, written by split tiles and read
    /// by the merge.
    pub partials: *mut f32,
    /// 0: a tile covers all keys and writes `out`. Else at least the longest sequence's keys / [`CHUNK`], rounded up:
    /// a tile covers one chunk and writes `partials`.
    pub chunks: usize,
    /// [`AttentionArgs::scratch_floats`] values, private to the caller of the tile.
    pub scratch: *mut f32,
}

/// `left` of a causal sliding window: key `j` is visible iff `p - window < j <= p`.
pub const fn left_of_window(window: usize) -> usize {
    window.saturating_sub(1)
}

impl AttentionArgs {
    /// Query heads per key head.
    pub const fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Query rows of one tile.
    pub const fn queries_per_tile(&self) -> usize {
        queries_per_tile(self.group())
    }

    /// Values of scratch that one tile needs.
    pub const fn scratch_floats(&self) -> usize {
        scratch_floats(self.group(), self.head_dim, self.value_dim)
    }

    /// Values of `partials` for `rows` query rows.
    pub const fn partial_floats(&self, rows: usize) -> usize {
        rows * self.heads * self.chunks * (self.value_dim + 2)
    }

    /// Tiles of attention for these sequences.
    ///
    /// # Safety
    /// `seq_starts` is valid for `batch + 1` reads.
    pub unsafe fn tiles(&self) -> usize {
        let mut tiles = 0;
        for b in 0..self.batch {
            // SAFETY: `b + 1 <= batch`.
            let rows = unsafe { self.rows_of(b) }.1;
            tiles += rows.div_ceil(self.queries_per_tile());
        }
        tiles * self.kv_heads * self.chunks.max(1)
    }

    /// First row and number of rows of sequence `b`.
    ///
    /// # Safety
    /// `b < batch` and `seq_starts` is valid for `batch + 1` reads.
    #[inline(always)]
    unsafe fn rows_of(&self, b: usize) -> (usize, usize) {
        // SAFETY: the caller guarantees the reads.
        let (start, end) =
            unsafe { (*self.seq_starts.add(b) as usize, *self.seq_starts.add(b + 1) as usize) };
        (start, end - start)
    }

    /// Positions of sequence `b` before this run.
    ///
    /// # Safety
    /// `b < batch` and `past` is null or valid for `batch` reads.
    #[inline(always)]
    unsafe fn past_of(&self, b: usize) -> usize {
        // SAFETY: the caller guarantees the read.
        if self.past.is_null() { 0 } else { unsafe { *self.past.add(b) as usize } }
    }
}
