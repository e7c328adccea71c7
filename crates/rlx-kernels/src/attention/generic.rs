use super::{AttentionArgs, BLOCK, CHUNK, CacheDtype, FEW_ROWS, Keys, few, many, q8};
use crate::isa::{Kernel, LANES, Simd};
use crate::math::exp2;
use std::ptr;

/// What one tile computes.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub sequence: usize,
    pub kv_head: usize,
    /// First row of the sequence in this run.
    pub first_row: usize,
    /// First query of the tile, counted from `first_row`.
    pub first_query: usize,
    pub queries: usize,
    /// Absolute position of the tile's first query.
    pub position: usize,
    /// Keys of the sequence.
    pub total: usize,
    pub chunk: usize,
}

impl Place {
    #[inline(always)]
    unsafe fn of(args: &AttentionArgs, tile: usize) -> Option<Place> {
        let chunks = args.chunks.max(1);
        let (tile, chunk) = (tile / chunks, tile % chunks);
        let (mut block, kv_head) = (tile / args.kv_heads, tile % args.kv_heads);
        let per_tile = args.queries_per_tile();
        for sequence in 0..args.batch {
            // SAFETY: `sequence < batch`; the caller guarantees `seq_starts` and `past`.
            let ((first_row, rows), past) = unsafe { (args.rows_of(sequence), args.past_of(sequence)) };
            let blocks = rows.div_ceil(per_tile);
            if block < blocks {
                let first_query = block * per_tile;
                return Some(Place {
                    sequence,
                    kv_head,
                    first_row,
                    first_query,
                    queries: per_tile.min(rows - first_query),
                    position: past + first_query,
                    total: past + rows,
                    chunk,
                });
            }
            block -= blocks;
        }
        None
    }

    /// Visible keys `[low, high)` of query `i` of the tile.
    #[inline(always)]
    pub fn visible(&self, args: &AttentionArgs, i: usize) -> (usize, usize) {
        let p = self.position + i;
        (p.saturating_sub(args.left), p.saturating_add(args.right).saturating_add(1).min(self.total))
    }

    /// Visible keys of any query of the tile.
    #[inline(always)]
    fn visible_to_any(&self, args: &AttentionArgs) -> (usize, usize) {
        (self.visible(args, 0).0, self.visible(args, self.queries - 1).1)
    }

    /// Where the head of row `row` of the tile begins among rows of `stride` elements, heads of `dim`.
    #[inline(always)]
    pub fn query_at(&self, args: &AttentionArgs, row: usize, stride: usize, dim: usize) -> usize {
        let (query, head) = (row / args.group(), self.kv_head * args.group() + row % args.group());
        (self.first_row + self.first_query + query) * stride + head * dim
    }

    /// Rows are lanes (see [`many`]); else keys are (see [`few`]).
    #[inline(always)]
    fn has_many_rows(&self, args: &AttentionArgs) -> bool {
        args.mask.is_null() && self.queries * args.group() > FEW_ROWS
    }
}

/// Running state of rows: maximum in powers of two, sum, and outputs, `[row][value_dim]`, or `[group][value_dim][width]` where a tile
/// has many rows.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub m: *mut f32,
    pub l: *mut f32,
    pub o: *mut f32,
}

impl State {
    #[inline(always)]
    unsafe fn carve(at: &mut *mut f32, rows: usize, value_dim: usize) -> State {
        // SAFETY: the caller guarantees `rows * (value_dim + 2)` values of scratch.
        unsafe {
            let state = State { o: *at, m: at.add(rows * value_dim), l: at.add(rows * (value_dim + 1)) };
            *at = at.add(rows * (value_dim + 2));
            state
        }
    }

    #[inline(always)]
    unsafe fn row(self, r: usize, value_dim: usize) -> State {
        // SAFETY: the state was carved for more than `r` rows.
        unsafe { State { m: self.m.add(r), l: self.l.add(r), o: self.o.add(r * value_dim) } }
    }

    /// The state of the rows from `row` on, where a group begins.
    #[inline(always)]
    pub unsafe fn group(self, row: usize, value_dim: usize) -> State {
        // SAFETY: as for `row`.
        unsafe { self.row(row, value_dim) }
    }

    #[inline(always)]
    unsafe fn clear(self, rows: usize, value_dim: usize) {
        // SAFETY: the state was carved for at least these rows.
        unsafe {
            for r in 0..rows {
                *self.m.add(r) = f32::NEG_INFINITY;
                *self.l.add(r) = 0.0;
            }
            self.o.write_bytes(0, rows * value_dim);
        }
    }
}

/// One block of keys and values, at the position of its first key: `f32`, unless a tile of few rows reads a cache as it is stored.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub k: *const f32,
    /// `[head_dim][BLOCK]`; else rows of `k_stride`.
    pub k_transposed: bool,
    pub k_stride: usize,
    pub v: *const f32,
    pub v_stride: usize,
    pub start: usize,
    /// What is read after this block; hints only.
    pub next_k: *const f32,
    pub next_v: *const f32,
    /// Where keys are integers: binary16, `[group][BLOCK]`.
    pub key_scales: *const u16,
    /// Where values are integers: `[BLOCK][group]`.
    pub value_scales: *const f32,
}

pub(super) struct AttentionF32;

impl Kernel for AttentionF32 {
    type Args = AttentionArgs;
    const OP: &'static str = "attention";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &AttentionArgs, tile: usize) {
        // SAFETY: the caller guarantees the contract of `AttentionArgs`.
        unsafe {
            let Some(place) = Place::of(args, tile) else { return };
            let rows = (place.queries * args.group()).next_multiple_of(many::WIDEST);
            let value_dim = args.value_dim;
            let mut at = args.scratch.add(BLOCK * (args.head_dim + value_dim));
            let tile = many::Rows { q: at, scores: at.add(rows * args.head_dim) };
            at = tile.scores.add(BLOCK * many::WIDEST);
            let part = State::carve(&mut at, rows, value_dim);
            let whole = State::carve(&mut at, rows, value_dim);
            if place.has_many_rows(args) {
                many::load_queries(s, args, &place, tile.q);
            }
            let (low, high) = place.visible_to_any(args);
            let (first, end) = if args.chunks > 0 {
                (place.chunk, place.chunk + 1)
            } else {
                (low / CHUNK, high.div_ceil(CHUNK).max(low / CHUNK + 1))
            };
            for chunk in first..end {
                let state = if chunk == first { whole } else { part };
                state.clear(rows, value_dim);
                attend_chunk(s, args, &place, chunk, tile, state);
                if chunk > first && place.has_many_rows(args) {
                    many::merge(s, whole, part, place.queries * args.group(), value_dim);
                } else if chunk > first {
                    s.call::<MergeRows>(&(whole, part, value_dim), place.queries * args.group());
                }
            }
            write(s, args, &place, whole);
        }
    }
}

/// Merges the second state into the first; the tile number is the number of rows.
struct MergeRows;

impl Kernel for MergeRows {
    type Args = (State, State, usize);
    const OP: &'static str = "attention_merge_rows";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, &(into, from, dim): &Self::Args, rows: usize) {
        // SAFETY: the caller guarantees the rows of both states.
        unsafe {
            for r in 0..rows {
                merge_row(s, into.row(r, dim), from.row(r, dim), dim);
            }
        }
    }
}

/// `into` becomes the state of both; a state that saw no key changes nothing.
#[inline(always)]
unsafe fn merge_row<S: Simd>(s: S, into: State, from: State, value_dim: usize) {
    // SAFETY: the caller guarantees one row each.
    unsafe {
        let (m, n) = (*into.m, *from.m);
        if n == f32::NEG_INFINITY {
            return;
        }
        if m == f32::NEG_INFINITY {
            *into.m = n;
            *into.l = *from.l;
            into.o.copy_from_nonoverlapping(from.o, value_dim);
            return;
        }
        let top = if m > n { m } else { n };
        let (a, b) = (exp2_of(s, m - top), exp2_of(s, n - top));
        *into.m = top;
        *into.l = (*into.l).mul_add(a, *from.l * b);
        let (a, b) = (s.splat(a), s.splat(b));
        for i in (0..value_dim).step_by(LANES) {
            let left = value_dim - i;
            let y = s.mul(s.load_to(from.o.add(i), left), b);
            s.store_to(into.o.add(i), left, s.fma(s.load_to(into.o.add(i), left), a, y));
        }
    }
}

#[inline(always)]
fn exp2_of<S: Simd>(s: S, x: f32) -> f32 {
    s.reduce_max(exp2(s, s.splat(x)))
}

/// Runs the rows of a tile over the keys of one chunk.
#[inline(always)]
unsafe fn attend_chunk<S: Simd>(
    s: S,
    args: &AttentionArgs,
    place: &Place,
    chunk: usize,
    tile: many::Rows,
    state: State,
) {
    let (low, high) = place.visible_to_any(args);
    let low = low.max(chunk * CHUNK);
    let high = high.min((chunk + 1) * CHUNK);
    if low >= high {
        return;
    }
    let end = high.div_ceil(BLOCK);
    // SAFETY: the caller guarantees the contract of `AttentionArgs`.
    unsafe {
        for index in low / BLOCK..end {
            let next = if index + 1 < end { index + 1 } else { index };
            let block = match args.keys {
                Keys::Rows { .. } => rows_block(s, args, place, index),
                Keys::Cache { .. } => cache_block(s, args, place, index, next),
            };
            match args.keys {
                _ if place.has_many_rows(args) => many::attend(s, args, place, &block, tile, state),
                Keys::Cache { dtype: CacheDtype::F16, .. } => {
                    few::attend::<S, few::F16>(s, args, place, &block, state);
                }
                Keys::Cache { dtype: CacheDtype::Bf16, .. } => {
                    few::attend::<S, few::Bf16>(s, args, place, &block, state);
                }
                Keys::Cache { dtype: CacheDtype::Q8, .. } => {
                    few::attend::<S, few::Q8>(s, args, place, &block, state);
                }
                _ => few::attend::<S, f32>(s, args, place, &block, state),
            }
        }
    }
}

/// One block of this run's own rows. Values are copied where several groups of rows read them.
#[inline(always)]
unsafe fn rows_block<S: Simd>(s: S, args: &AttentionArgs, place: &Place, index: usize) -> Block {
    let start = index * BLOCK;
    let keys = (place.total - start).min(BLOCK);
    let (head_dim, value_dim) = (args.head_dim, args.value_dim);
    let Keys::Rows { k, k_stride, v, v_stride } = args.keys else { unreachable!("the caller matched") };
    // SAFETY: the caller guarantees the rows, and scratch for one block of keys and values.
    unsafe {
        let row = place.first_row + start;
        let k = k.add(row * k_stride + place.kv_head * head_dim);
        let v = v.add(row * v_stride + place.kv_head * value_dim);
        let mut block = Block {
            k,
            k_transposed: false,
            k_stride,
            v,
            v_stride,
            start,
            next_k: k,
            next_v: v,
            key_scales: ptr::null(),
            value_scales: ptr::null(),
        };
        if !place.has_many_rows(args) {
            transpose_keys(s, k, k_stride, keys, head_dim, args.scratch);
            (block.k, block.k_transposed, block.next_k) = (args.scratch, true, args.scratch);
        } else if place.queries * args.group() > many::WIDEST {
            let values = args.scratch.add(BLOCK * head_dim);
            for j in 0..keys {
                for i in (0..value_dim).step_by(LANES) {
                    let x = s.load_to(v.add(j * v_stride + i), value_dim - i);
                    s.store_to(values.add(j * value_dim + i), value_dim - i, x);
                }
            }
            (block.v, block.v_stride, block.next_v) = (values, value_dim, values);
        }
        block
    }
}

/// One block of the cache; widened where a tile has many rows.
#[inline(always)]
unsafe fn cache_block<S: Simd>(
    s: S,
    args: &AttentionArgs,
    place: &Place,
    index: usize,
    next: usize,
) -> Block {
    let start = index * BLOCK;
    let (head_dim, value_dim) = (args.head_dim, args.value_dim);
    let Keys::Cache { k, v, dtype, block_table, table_width } = args.keys else {
        unreachable!("the caller matched")
    };
    // SAFETY: the caller guarantees the cache, and scratch for one block of keys and values.
    unsafe {
        let at = |index: usize| {
            let number = *block_table.add(place.sequence * table_width + index) as usize;
            let head = (number * args.kv_heads + place.kv_head) * BLOCK;
            (k.add(head * dtype.bytes(head_dim)), v.add(head * dtype.bytes(value_dim)))
        };
        let ((k, v), (next_k, next_v)) = (at(index), at(next));
        let mut block = Block {
            k: k.cast(),
            k_transposed: true,
            k_stride: BLOCK,
            v: v.cast(),
            v_stride: value_dim,
            start,
            next_k: next_k.cast(),
            next_v: next_v.cast(),
            key_scales: ptr::null(),
            value_scales: ptr::null(),
        };
        let (keys, values) = (args.scratch, args.scratch.add(BLOCK * head_dim));
        let used = (place.total - start).min(BLOCK);
        if dtype == CacheDtype::Q8 && place.has_many_rows(args) {
            let widened = q8::WidenArgs { k, v, keys, values, head_dim, value_dim, next: [next_k, next_v] };
            s.call::<q8::Widen>(&widened, used);
            (block.k, block.v, block.next_k, block.next_v) = (keys, values, keys, values);
        } else if dtype == CacheDtype::Q8 {
            q8::integers(s, &mut block, (head_dim, value_dim), used, values);
        } else if dtype != CacheDtype::F32 && place.has_many_rows(args) {
            let used = used * value_dim;
            if dtype == CacheDtype::F16 {
                widen::<S, few::F16>(s, k.cast(), keys, BLOCK * head_dim);
                widen::<S, few::F16>(s, v.cast(), values, used);
            } else {
                widen::<S, few::Bf16>(s, k.cast(), keys, BLOCK * head_dim);
                widen::<S, few::Bf16>(s, v.cast(), values, used);
            }
            (block.k, block.v) = (keys, values);
        }
        block
    }
}

#[inline(always)]
unsafe fn widen<S: Simd, E: few::Stored>(s: S, from: *const E, to: *mut f32, n: usize) {
    // SAFETY: the caller guarantees `n` values of both.
    unsafe {
        for i in (0..n).step_by(LANES) {
            s.store_to(to.add(i), n - i, few::load_to(s, from.add(i), n - i));
        }
    }
}

/// `kt[d][j] = k[j][d]` for `keys` rows; the other columns of their vectors become zero.
#[inline(always)]
unsafe fn transpose_keys<S: Simd>(s: S, k: *const f32, stride: usize, keys: usize, dim: usize, kt: *mut f32) {
    // SAFETY: the caller guarantees `keys` rows of `dim` values and a block of scratch.
    unsafe {
        for j in (0..keys).step_by(LANES) {
            for d in (0..dim).step_by(LANES) {
                let mut tile = [s.zero(); LANES];
                for i in 0..LANES {
                    if j + i < keys {
                        tile[i] = s.load_to(k.add((j + i) * stride + d), dim - d);
                    }
                }
                let tile = s.transpose(tile);
                for i in 0..LANES {
                    if d + i < dim {
                        s.store(kt.add((d + i) * BLOCK + j), tile[i]);
                    }
                }
            }
        }
    }
}

/// `out = o / l`, zeros where nothing was seen.
#[inline(always)]
unsafe fn write_row<S: Simd>(s: S, out: *mut f32, state: State, dim: usize) {
    // SAFETY: the caller guarantees both rows.
    unsafe {
        let seen = *state.m != f32::NEG_INFINITY;
        let factor = s.splat(if seen { 1.0 / *state.l } else { 0.0 });
        for i in (0..dim).step_by(LANES) {
            s.store_to(out.add(i), dim - i, s.mul(s.load_to(state.o.add(i), dim - i), factor));
        }
    }
}

/// Where a row of the tile is written in `out`.
unsafe fn output_at(args: &AttentionArgs, place: &Place, row: usize) -> *mut f32 {
    // SAFETY: the caller guarantees the output rows.
    unsafe { args.out.add(place.query_at(args, row, args.out_stride, args.value_dim)) }
}

/// Where the state of a row's chunk is written: `value_dim` outputs, the maximum, the sum.
unsafe fn partial_at(args: &AttentionArgs, place: &Place, row: usize) -> *mut f32 {
    let state = args.value_dim + 2;
    let of_head = place.query_at(args, row, args.heads * args.chunks, args.chunks) + place.chunk;
    // SAFETY: the caller guarantees `partial_floats` values.
    unsafe { args.partials.add(of_head * state) }
}

/// Writes the rows' outputs, or their states if chunks are split.
#[inline(always)]
unsafe fn write<S: Simd>(s: S, args: &AttentionArgs, place: &Place, state: State) {
    let (rows, dim) = (place.queries * args.group(), args.value_dim);
    let split = args.chunks > 0;
    // SAFETY: the caller guarantees the targets and the tile's state.
    unsafe {
        if place.has_many_rows(args) {
            let target: many::RowTarget = if split { partial_at } else { output_at };
            many::write_rows(s, args, place, state, !split, target);
        }
        for r in 0..rows {
            if split {
                let to = partial_at(args, place, r);
                if !place.has_many_rows(args) {
                    to.copy_from_nonoverlapping(state.o.add(r * dim), dim);
                }
                (*to.add(dim), *to.add(dim + 1)) = (*state.m.add(r), *state.l.add(r));
            } else if !place.has_many_rows(args) {
                write_row(s, output_at(args, place, r), state.row(r, dim), dim);
            }
        }
    }
}

pub(super) struct MergeF32;

impl Kernel for MergeF32 {
    type Args = AttentionArgs;
    const OP: &'static str = "attention_merge";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &AttentionArgs, tile: usize) {
        let dim = args.value_dim;
        // SAFETY: the caller guarantees the partials of row `tile` and its output row.
        unsafe {
            let mut at = args.scratch;
            let whole = State::carve(&mut at, 1, dim);
            for head in 0..args.heads {
                whole.clear(1, dim);
                for chunk in 0..args.chunks {
                    let o = args.partials.add(((tile * args.heads + head) * args.chunks + chunk) * (dim + 2));
                    merge_row(s, whole, State { o, m: o.add(dim), l: o.add(dim + 1) }, dim);
                }
                write_row(s, args.out.add(tile * args.out_stride + head * dim), whole, dim);
            }
        }
    }
}
