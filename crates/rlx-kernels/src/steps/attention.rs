//! Attention over ragged batches, with or without a KV cache.

use crate::attention::{
    AppendArgs, AttentionArgs, BLOCK, CHUNK, CacheDtype, Keys, append_entry, attention_entry, left_of_window,
    merge_entry, scratch_floats,
};
use crate::isa::{Entry, Isa};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use rlx_tensor::quant::CACHE_GROUP;
use std::any::Any;
use std::ptr::{null, null_mut};

/// Query rows up to which the keys of a long context are split among workers.
const SPLIT_ROWS: usize = 16;

/// What attention computes, apart from its operands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionForm {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// A row sees positions up to its own.
    pub causal: bool,
    /// A row sees positions above its own less this.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
}

/// The operands of a KV cache.
#[derive(Debug, Clone)]
pub struct CacheOperands {
    /// Positions before this run, a number a sequence.
    pub past: Operand,
    /// `[batch, table]` block numbers.
    pub block_table: Operand,
    /// `[blocks, kv_heads, head_dim, 64]`; of U8, which holds groups of integers, `[blocks, kv_heads, 64, head_dim / 32 * 34]`.
    pub k_cache: Operand,
    /// `[blocks, kv_heads, 64, head_dim]`; of U8 as `k_cache`.
    pub v_cache: Operand,
}

/// One attention: append to the cache if there is one, then attend, then merge chunks where the keys were split.
#[derive(Debug)]
pub struct AttentionStep {
    isa: Isa,
    form: AttentionForm,
    attend: Entry<AttentionArgs>,
    merge: Entry<AttentionArgs>,
    append: Entry<AppendArgs>,
    q: Operand,
    k: Operand,
    v: Operand,
    seq_starts: Operand,
    mask: Option<Operand>,
    cache: Option<CacheOperands>,
    out: Operand,
}

impl AttentionStep {
    /// The step for an instruction set; `None` if it is not available or the heads do not divide.
    #[expect(clippy::too_many_arguments, reason = "one argument an operand")]
    pub fn new(
        isa: Isa,
        form: AttentionForm,
        q: Operand,
        k: Operand,
        v: Operand,
        seq_starts: Operand,
        mask: Option<Operand>,
        cache: Option<CacheOperands>,
        out: Operand,
    ) -> Option<Self> {
        let divides = form.kv_heads > 0 && form.heads.is_multiple_of(form.kv_heads);
        let ranks = mask.as_ref().is_none_or(|m| m.dims.len() == 4 && m.stride.is_none())
            && cache.as_ref().is_none_or(|c| c.block_table.dims.len() == 2 && c.k_cache.dims.len() == 4);
        let whole_groups = form.head_dim.is_multiple_of(CACHE_GROUP)
            || cache.as_ref().is_none_or(|c| cache_dtype(c.k_cache.dtype) != CacheDtype::Q8);
        if !divides || !ranks || !whole_groups {
            return None;
        }
        let (attend, merge, append) = (attention_entry(isa)?, merge_entry(isa)?, append_entry(isa)?);
        Some(Self { isa, form, attend, merge, append, q, k, v, seq_starts, mask, cache, out })
    }

    fn error(&self, reason: String) -> StepError {
        StepError::Sequences { step: "attention".to_owned(), reason }
    }

    fn sizes_fit(&self, run: &Run<'_>) -> bool {
        let form = &self.form;
        let rows = run.rows(&self.q);
        let (q_width, kv_width) = (form.heads * form.head_dim, form.kv_heads * form.head_dim);
        let batch = run.len(&self.seq_starts).saturating_sub(1);
        let cache = self.cache.as_ref().is_none_or(|c| {
            let blocks = run.extents(&c.k_cache).next().unwrap_or(0);
            let per_block = match cache_dtype(c.k_cache.dtype) {
                dtype @ CacheDtype::Q8 => form.kv_heads * dtype.bytes(form.head_dim) * BLOCK,
                _ => kv_width * BLOCK,
            };
            run.len(&c.past) == batch
                && run.rows(&c.block_table) == batch
                && run.len(&c.k_cache) == blocks * per_block
                && run.len(&c.v_cache) == blocks * per_block
        });
        cache
            && run.rows(&self.k) == rows
            && run.rows(&self.v) == rows
            && run.rows(&self.out) == rows
            && run.columns(&self.q) == q_width
            && run.columns(&self.out) == q_width
            && run.columns(&self.k) == kv_width
            && run.columns(&self.v) == kv_width
    }

    /// Checks everything that is read from operands and used as an index. The same on every worker.
    fn check(&self, run: &Run<'_>, team: &Team<'_>) -> Result<Lengths, StepError> {
        if run.len(&self.seq_starts) == 0 || !self.sizes_fit(run) {
            return Err(StepError::Shape { step: "attention".to_owned() });
        }
        // SAFETY: index operands are I32 (checked when the graph was inferred) and not written during a run.
        let starts: &[i32] = unsafe { run.slice(&self.seq_starts) };
        let rows = run.rows(&self.q);
        let ends = (starts[0], starts[starts.len() - 1]);
        if ends.0 != 0 || usize::try_from(ends.1) != Ok(rows) || starts.windows(2).any(|w| w[0] > w[1]) {
            return Err(self.error(format!("seq_starts must ascend from 0 to {rows}, found {starts:?}")));
        }
        let mut lengths = Lengths { max_queries: 0, max_keys: 0 };
        // SAFETY: as above.
        let past: Option<&[i32]> = self.cache.as_ref().map(|c| unsafe { run.slice(&c.past) });
        for (b, pair) in starts.windows(2).enumerate() {
            let queries = (pair[1] - pair[0]) as usize;
            let past = past.map_or(0, |p| p[b]);
            let before = usize::try_from(past).map_err(|_| self.error(format!("past[{b}] is {past}")))?;
            lengths.max_queries = lengths.max_queries.max(queries);
            lengths.max_keys = lengths.max_keys.max(before + queries);
        }
        if let (Some(cache), Some(past)) = (&self.cache, past) {
            self.check_blocks(run, team, cache, starts, past)?;
        }
        if let Some(mask) = &self.mask {
            let dims: Vec<usize> = run.extents(mask).collect();
            let batch = starts.len() - 1;
            let fits = (dims[0] == 1 || dims[0] == batch)
                && (dims[1] == 1 || dims[1] == self.form.heads)
                && dims[2] >= lengths.max_queries
                && dims[3] >= lengths.max_keys;
            if !fits {
                return Err(self.error(format!("mask {dims:?} does not cover {lengths:?}")));
            }
        }
        Ok(lengths)
    }

    /// Every block that a sequence uses exists, and no block is written for two sequences or positions.
    fn check_blocks(
        &self,
        run: &Run<'_>,
        team: &Team<'_>,
        cache: &CacheOperands,
        starts: &[i32],
        past: &[i32],
    ) -> Result<(), StepError> {
        let blocks = run.extents(&cache.k_cache).next().unwrap_or(0);
        let width = run.columns(&cache.block_table);
        // SAFETY: as in `check`; the bitset is this worker's scratch, `blocks` bits long (see `worker_scratch`).
        let (table, seen): (&[i32], &mut [u8]) = unsafe {
            let seen = run.worker_scratch::<u8>(team);
            std::ptr::write_bytes(seen, 0, blocks.div_ceil(8));
            (run.slice(&cache.block_table), std::slice::from_raw_parts_mut(seen, blocks.div_ceil(8)))
        };
        for (b, pair) in starts.windows(2).enumerate() {
            let (from, to) = (past[b] as usize, past[b] as usize + (pair[1] - pair[0]) as usize);
            if to > width * BLOCK {
                return Err(self.error(format!(
                    "sequence {b} reaches position {to}, its block table covers {}",
                    width * BLOCK
                )));
            }
            for i in 0..to.div_ceil(BLOCK) {
                let block = table[b * width + i];
                let Some(block) = usize::try_from(block).ok().filter(|&x| x < blocks) else {
                    return Err(self.error(format!("block_table[{b}][{i}] is {block}, outside 0..{blocks}")));
                };
                let written = (i + 1) * BLOCK > from && to > from;
                if written && seen[block / 8] & (1 << (block % 8)) != 0 {
                    return Err(self.error(format!("block {block} is written for two places at once")));
                }
                if written {
                    seen[block / 8] |= 1 << (block % 8);
                }
            }
        }
        Ok(())
    }

    fn append_args(&self, run: &Run<'_>, cache: &CacheOperands) -> AppendArgs {
        AppendArgs {
            k: run.pointer(&self.k),
            k_stride: run.stride(&self.k),
            v: run.pointer(&self.v),
            v_stride: run.stride(&self.v),
            seq_starts: run.pointer(&self.seq_starts),
            batch: run.len(&self.seq_starts) - 1,
            past: run.pointer(&cache.past),
            kv_heads: self.form.kv_heads,
            head_dim: self.form.head_dim,
            value_dim: self.form.head_dim,
            k_cache: run.pointer(&cache.k_cache),
            v_cache: run.pointer(&cache.v_cache),
            dtype: cache_dtype(cache.k_cache.dtype),
            block_table: run.pointer(&cache.block_table),
            table_width: run.columns(&cache.block_table),
            stored_heads: (0, self.form.kv_heads),
            stored_chunk: None,
        }
    }

    fn args(&self, run: &Run<'_>, team: &Team<'_>, lengths: &Lengths) -> AttentionArgs {
        let form = &self.form;
        let keys = match &self.cache {
            None => Keys::Rows {
                k: run.pointer(&self.k),
                k_stride: run.stride(&self.k),
                v: run.pointer(&self.v),
                v_stride: run.stride(&self.v),
            },
            Some(cache) => Keys::Cache {
                k: run.pointer(&cache.k_cache),
                v: run.pointer(&cache.v_cache),
                dtype: cache_dtype(cache.k_cache.dtype),
                block_table: run.pointer(&cache.block_table),
                table_width: run.columns(&cache.block_table),
            },
        };
        let mask_dims: [usize; 4] = self.mask.as_ref().map_or([1; 4], |mask| {
            let mut dims = [1; 4];
            dims.iter_mut().zip(run.extents(mask)).for_each(|(d, extent)| *d = extent);
            dims
        });
        let broadcast = |extent: usize, stride: usize| if extent == 1 { 0 } else { stride };
        let plane = mask_dims[2] * mask_dims[3];
        let left = form.window.map_or(usize::MAX, left_of_window);
        let mut args = AttentionArgs {
            q: run.pointer(&self.q),
            q_stride: run.stride(&self.q),
            out: run.pointer(&self.out),
            out_stride: run.stride(&self.out),
            keys,
            seq_starts: run.pointer(&self.seq_starts),
            batch: run.len(&self.seq_starts) - 1,
            past: self.cache.as_ref().map_or(null(), |c| run.pointer::<i32>(&c.past).cast_const()),
            heads: form.heads,
            kv_heads: form.kv_heads,
            head_dim: form.head_dim,
            value_dim: form.head_dim,
            scale: form.scale,
            softcap: form.softcap.unwrap_or(0.0),
            left,
            right: if form.causal { 0 } else { usize::MAX },
            mask: self.mask.as_ref().map_or(null(), |m| run.pointer::<f32>(m).cast_const()),
            mask_strides: [
                broadcast(mask_dims[0], mask_dims[1] * plane),
                broadcast(mask_dims[1], plane),
                mask_dims[3],
            ],
            partials: null_mut(),
            chunks: 0,
            scratch: run.worker_scratch(team),
        };
        let chunks = lengths.max_keys.div_ceil(CHUNK);
        if self.cache.is_some() && chunks > 1 && team.count() > 1 && run.rows(&self.q) <= SPLIT_ROWS {
            args.chunks = chunks;
            args.partials = run.shared_scratch();
        }
        args
    }
}

/// The longest sequence of a run.
#[derive(Debug)]
struct Lengths {
    max_queries: usize,
    max_keys: usize,
}

fn cache_dtype(dtype: DType) -> CacheDtype {
    match dtype {
        DType::F16 => CacheDtype::F16,
        DType::BF16 => CacheDtype::Bf16,
        DType::U8 => CacheDtype::Q8,
        _ => CacheDtype::F32,
    }
}

/// Scratch of attention, for the memory estimate: `(each worker's, shared)` bytes for up to `rows` query rows and, with a cache,
/// `blocks` blocks of it and `table` blocks a sequence.
pub fn attention_scratch(form: &AttentionForm, rows: usize, cache: Option<(usize, usize)>) -> (usize, usize) {
    let group = (form.heads / form.kv_heads.max(1)).max(1);
    let floats = scratch_floats(group, form.head_dim, form.head_dim);
    let (blocks, table) = cache.unwrap_or((0, 0));
    let chunks = (table * BLOCK).div_ceil(CHUNK);
    let partials =
        if chunks > 1 { rows.min(SPLIT_ROWS) * form.heads * chunks * (form.head_dim + 2) } else { 0 };
    ((floats * size_of::<f32>()).max(blocks.div_ceil(8)), partials * size_of::<f32>())
}

impl Step for AttentionStep {
    fn name(&self) -> String {
        let keys = self.cache.as_ref().map_or("rows", |c| match c.k_cache.dtype {
            DType::F16 => "cache_f16",
            DType::BF16 => "cache_bf16",
            DType::U8 => "cache_q8_0",
            _ => "cache_f32",
        });
        format!("attention_{keys}_{}", self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        for operand in [&self.q, &self.k, &self.v, &self.seq_starts].into_iter().chain(&self.mask) {
            visit(operand, Access::Read);
        }
        if let Some(cache) = &self.cache {
            visit(&cache.past, Access::Read);
            visit(&cache.block_table, Access::Read);
            visit(&cache.k_cache, Access::Update);
            visit(&cache.v_cache, Access::Update);
        }
        visit(&self.out, Access::Write);
    }

    fn worker_scratch(&self, sizes: &[usize]) -> usize {
        self.scratch(sizes).0
    }

    fn shared_scratch(&self, sizes: &[usize], _workers: usize) -> usize {
        self.scratch(sizes).1
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let lengths = self.check(run, team)?;
        let append = self.cache.as_ref().map(|cache| self.append_args(run, cache));
        // Where no tile reads what another one appends, each appends for itself.
        let with_tiles = lengths.max_queries <= 1;
        if let Some(append) = append.as_ref().filter(|_| !with_tiles) {
            for row in team.tiles(run.rows(&self.q)) {
                // SAFETY: `check` validated starts, pasts and blocks against the operands' sizes, which the launch checked against
                // their regions; each row is written by the worker that claimed it, to a block no other row shares.
                unsafe { (self.append)(append, row) };
            }
            team.barrier();
        }
        let args = self.args(run, team, &lengths);
        // SAFETY: as above; `seq_starts` has batch + 1 values; the scratch is this worker's, the partials are shared scratch of
        // the size `attention_scratch` gives; tiles write disjoint rows and heads of `out` or of the partials. A sequence of one
        // row has one tile a head and chunk, in the order of rows, and that tile alone reads what it appends.
        unsafe {
            // Backwards: the last rows of a causal sequence see the most keys, and no worker should be left alone with them.
            let tiles = args.tiles();
            for tile in team.tiles(tiles).map(|tile| tiles - 1 - tile) {
                if let Some(append) = append.filter(|_| with_tiles) {
                    let of_head = tile / args.chunks.max(1);
                    let (row, head) = (of_head / args.kv_heads, of_head % args.kv_heads);
                    let stored_chunk = (args.chunks > 0).then_some(tile % args.chunks.max(1));
                    (self.append)(
                        &AppendArgs { stored_heads: (head, head + 1), stored_chunk, ..append },
                        row,
                    );
                }
                (self.attend)(&args, tile);
            }
            if args.chunks > 0 {
                team.barrier();
                for row in team.tiles(run.rows(&self.q)) {
                    (self.merge)(&args, row);
                }
            }
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl AttentionStep {
    fn scratch(&self, sizes: &[usize]) -> (usize, usize) {
        let extent = |operand: &Operand, axis: usize| sizes[operand.dims[axis]];
        let cache = self.cache.as_ref().map(|c| (extent(&c.k_cache, 0), extent(&c.block_table, 1)));
        attention_scratch(&self.form, extent(&self.q, 0), cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_covers_what_the_kernel_asks() {
        for (heads, kv_heads, head_dim) in
            [(12, 12, 32), (9, 3, 64), (14, 2, 64), (8, 1, 256), (1, 1, 1), (200, 1, 16)]
        {
            let form = AttentionForm {
                heads,
                kv_heads,
                head_dim,
                scale: 1.0,
                causal: true,
                window: None,
                softcap: None,
            };
            let (each, shared) = attention_scratch(&form, 9, Some((100, 64)));
            let args = AttentionArgs {
                q: null(),
                q_stride: 0,
                out: null_mut(),
                out_stride: 0,
                keys: Keys::Rows { k: null(), k_stride: 0, v: null(), v_stride: 0 },
                seq_starts: null(),
                batch: 0,
                past: null(),
                heads,
                kv_heads,
                head_dim,
                value_dim: head_dim,
                scale: 1.0,
                softcap: 0.0,
                left: 0,
                right: 0,
                mask: null(),
                mask_strides: [0; 3],
                partials: null_mut(),
                chunks: 8,
                scratch: null_mut(),
            };
            assert!(each >= args.scratch_floats() * 4, "{heads} {kv_heads} {head_dim}");
            assert!(shared >= args.partial_floats(9) * 4);
        }
    }
}
