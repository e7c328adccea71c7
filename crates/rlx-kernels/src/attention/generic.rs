use super::{AttentionArgs, BLOCK, CHUNK, CacheDtype, Keys};
use crate::isa::{Isa, Kernel, LANES, Simd};
use crate::math::{exp, tanh};

/// Vectors of scores per row and block.
const WIDTH: usize = BLOCK / LANES;

/// What one tile computes.
#[derive(Clone, Copy)]
struct Place {
    sequence: usize,
    kv_head: usize,
    /// First row of the sequence in this run.
    first_row: usize,
    /// First query of the tile, counted from `first_row`.
    first_query: usize,
    queries: usize,
    /// Absolute position of the tile's first query.
    position: usize,
    /// Keys of the sequence.
    total: usize,
    chunk: usize,
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
    fn visible(&self, args: &AttentionArgs, i: usize) -> (usize, usize) {
        let p = self.position + i;
        (p.saturating_sub(args.left), p.saturating_add(args.right).saturating_add(1).min(self.total))
    }

    /// Visible keys of any query of the tile.
    #[inline(always)]
    fn visible_to_any(&self, args: &AttentionArgs) -> (usize, usize) {
        (self.visible(args, 0).0, self.visible(args, self.queries - 1).1)
    }
}

/// Running state of rows: maximum, sum, and output rows of `value_dim`.
#[derive(Clone, Copy)]
struct State {
    m: *mut f32,
    l: *mut f32,
    o: *mut f32,
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

/// One block of keys: transposed keys, values, and the position of its first key.
#[derive(Clone, Copy)]
struct Block {
    kt: *const f32,
    v: *const f32,
    v_stride: usize,
    start: usize,
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
            let rows = place.queries * args.group();
            let value_dim = args.value_dim;
            let mut at = args.scratch.add(BLOCK * (args.head_dim + value_dim));
            let part = State::carve(&mut at, rows, value_dim);
            let whole = State::carve(&mut at, rows, value_dim);
            let (low, high) = place.visible_to_any(args);
            let (first, end) = if args.chunks > 0 {
                (place.chunk, place.chunk + 1)
            } else {
                (low / CHUNK, high.div_ceil(CHUNK).max(low / CHUNK + 1))
            };
            for chunk in first..end {
                attend_chunk(s, args, &place, chunk, if chunk == first { whole } else { part });
                if chunk > first {
                    s.call::<MergeRows>(&(whole, part, value_dim), rows);
                }
            }
            if args.chunks > 0 {
                write_partials(s, args, &place, whole);
                return;
            }
            write_output(s, args, &place, whole);
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
        let (a, b) = (exp_one(s, m - top), exp_one(s, n - top));
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
fn exp_one<S: Simd>(s: S, x: f32) -> f32 {
    s.reduce_max(exp(s, s.splat(x)))
}

/// Runs the rows of a tile over the keys of one chunk, from an empty state.
#[inline(always)]
unsafe fn attend_chunk<S: Simd>(s: S, args: &AttentionArgs, place: &Place, chunk: usize, state: State) {
    // SAFETY: the caller guarantees the contract of `AttentionArgs`.
    unsafe {
        let rows = place.queries * args.group();
        state.clear(rows, args.value_dim);
        let (low, high) = place.visible_to_any(args);
        let low = low.max(chunk * CHUNK);
        let high = high.min((chunk + 1) * CHUNK);
        if low >= high {
            return;
        }
        for index in low / BLOCK..high.div_ceil(BLOCK) {
            let block = prepare_block(s, args, place, index);
            let step = Step { args, place, block: &block, state };
            let mut row = 0;
            while row < rows {
                row += match rows - row {
                    _ if matches!(S::ISA, Isa::Scalar) => step_rows::<S, 1>(s, step, row),
                    1 => step_rows::<S, 1>(s, step, row),
                    2 => step_rows::<S, 2>(s, step, row),
                    3 => step_rows::<S, 3>(s, step, row),
                    4 | 5 => step_rows::<S, 4>(s, step, row),
                    _ => step_rows::<S, 6>(s, step, row),
                };
            }
        }
    }
}

/// Brings one block of keys and values into the form that rows are computed from.
#[inline(always)]
unsafe fn prepare_block<S: Simd>(s: S, args: &AttentionArgs, place: &Place, index: usize) -> Block {
    let start = index * BLOCK;
    let keys = (place.total - start).min(BLOCK);
    let (head_dim, value_dim) = (args.head_dim, args.value_dim);
    // SAFETY: the caller guarantees the rows or the cache, and scratch for one block of keys and values.
    unsafe {
        let kt = args.scratch;
        let values = args.scratch.add(BLOCK * head_dim);
        match args.keys {
            Keys::Rows { k, k_stride, v, v_stride } => {
                let row = place.first_row + start;
                let k = k.add(row * k_stride + place.kv_head * head_dim);
                transpose_keys(s, k, k_stride, keys, head_dim, kt);
                let v = v.add(row * v_stride + place.kv_head * value_dim);
                for j in 0..keys {
                    for i in (0..value_dim).step_by(LANES) {
                        let x = s.load_to(v.add(j * v_stride + i), value_dim - i);
                        s.store_to(values.add(j * value_dim + i), value_dim - i, x);
                    }
                }
                Block { kt, v: values, v_stride: value_dim, start }
            }
            Keys::Cache { k, v, dtype, block_table, table_width } => {
                let number = *block_table.add(place.sequence * table_width + index) as usize;
                let head = number * args.kv_heads + place.kv_head;
                let (k_at, v_at) = (head * head_dim * BLOCK, head * BLOCK * value_dim);
                let (k16, v16) = (k.cast::<u16>().wrapping_add(k_at), v.cast::<u16>().wrapping_add(v_at));
                match dtype {
                    CacheDtype::F32 => {
                        let (k, v) = (k.cast::<f32>().add(k_at), v.cast::<f32>().add(v_at));
                        return Block { kt: k, v, v_stride: value_dim, start };
                    }
                    CacheDtype::F16 => {
                        for i in (0..head_dim * BLOCK).step_by(LANES) {
                            s.store(kt.add(i), s.load_f16(k16.add(i)));
                        }
                        let n = keys * value_dim;
                        for i in (0..n).step_by(LANES) {
                            let x = s.load_f16_part(v16.add(i), LANES.min(n - i));
                            s.store_to(values.add(i), n - i, x);
                        }
                    }
                    CacheDtype::Bf16 => {
                        for i in (0..head_dim * BLOCK).step_by(LANES) {
                            s.store(kt.add(i), s.load_bf16(k16.add(i)));
                        }
                        let n = keys * value_dim;
                        for i in (0..n).step_by(LANES) {
                            let x = s.load_bf16_part(v16.add(i), LANES.min(n - i));
                            s.store_to(values.add(i), n - i, x);
                        }
                    }
                }
                Block { kt, v: values, v_stride: value_dim, start }
            }
        }
    }
}

/// `kt[d][j] = k[j][d]` for `keys` rows; the other columns become zero.
#[inline(always)]
unsafe fn transpose_keys<S: Simd>(s: S, k: *const f32, stride: usize, keys: usize, dim: usize, kt: *mut f32) {
    // SAFETY: the caller guarantees `keys` rows of `dim` values and a block of scratch.
    unsafe {
        for j in (0..BLOCK).step_by(LANES) {
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

/// What a step of some rows over one block reads and changes.
#[derive(Clone, Copy)]
struct Step {
    args: *const AttentionArgs,
    place: *const Place,
    block: *const Block,
    state: State,
}

#[inline(always)]
unsafe fn step_rows<S: Simd, const R: usize>(s: S, step: Step, row: usize) -> usize {
    // SAFETY: the caller guarantees the contract of `AttentionArgs` and that `row + R` rows are in the tile.
    unsafe { s.call::<StepRows<R>>(&step, row) };
    R
}

/// Moves `R` rows from `row` on over one block.
struct StepRows<const R: usize>;

impl<const R: usize> Kernel for StepRows<R> {
    type Args = Step;
    const OP: &'static str = "attention_step";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, step: &Step, row: usize) {
        // SAFETY: `step_rows` passes references; the caller guarantees the rest.
        unsafe { move_rows::<S, R>(s, &*step.args, &*step.place, &*step.block, step.state, row) }
    }
}

#[inline(always)]
unsafe fn move_rows<S: Simd, const R: usize>(
    s: S,
    args: &AttentionArgs,
    place: &Place,
    block: &Block,
    state: State,
    row: usize,
) {
    let group = args.group();
    let value_dim = args.value_dim;
    let (mut low, mut high) = ([0; R], [0; R]);
    let mut q = [args.q; R];
    let mut end = 0;
    // SAFETY: the caller guarantees the contract of `AttentionArgs`; `row + R` rows are in the tile.
    unsafe {
        for r in 0..R {
            let (query, head) = ((row + r) / group, place.kv_head * group + (row + r) % group);
            let (from, to) = place.visible(args, query);
            low[r] = from.saturating_sub(block.start).min(BLOCK);
            high[r] = to.saturating_sub(block.start).min(BLOCK);
            if low[r] < high[r] {
                end = high[r].max(end);
            }
            let at = place.first_row + place.first_query + query;
            q[r] = args.q.add(at * args.q_stride + head * args.head_dim);
        }
        if end == 0 {
            return;
        }
        let mut p = Scores([[0.0; BLOCK]; R]);
        score_rows::<S, R>(s, &q, block.kt, args.head_dim, end, &mut p);
        let mut alpha = [0.0f32; LANES];
        let mut base = [0.0f32; R];
        for r in 0..R {
            let shape = RowScores { place, block, row: row + r, low: low[r], high: high[r], end };
            let top = finish_scores(s, args, &shape, &mut p.0[r]);
            let m = *state.m.add(row + r);
            let top = if top > m { top } else { m };
            base[r] = if top == f32::NEG_INFINITY { 0.0 } else { top };
            alpha[r] = m - base[r];
            *state.m.add(row + r) = top;
        }
        s.store(alpha.as_mut_ptr(), exp(s, s.load(alpha.as_ptr())));
        for r in 0..R {
            let mut sums = [s.zero(); WIDTH];
            for i in 0..WIDTH {
                if i * LANES < end {
                    let at = p.0[r].as_mut_ptr().add(i * LANES);
                    sums[i] = exp(s, s.sub(s.load(at), s.splat(base[r])));
                    s.store(at, sums[i]);
                }
            }
            let sum = s.reduce_add(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
            let l = state.l.add(row + r);
            *l = (*l).mul_add(alpha[r], sum);
            if alpha[r] != 1.0 {
                let factor = s.splat(alpha[r]);
                let o = state.o.add((row + r) * value_dim);
                for i in (0..value_dim).step_by(LANES) {
                    let left = value_dim - i;
                    s.store_to(o.add(i), left, s.mul(s.load_to(o.add(i), left), factor));
                }
            }
        }
        add_values::<S, R>(s, block, &p, &low, &high, state.o.add(row * value_dim), value_dim);
    }
}

#[repr(align(64))]
struct Scores<const R: usize>([[f32; BLOCK]; R]);

/// `p[r][j] = sum over d of q[r][d] kt[d][j]` for at least the first `end` keys.
#[inline(always)]
unsafe fn score_rows<S: Simd, const R: usize>(
    s: S,
    q: &[*const f32; R],
    kt: *const f32,
    dim: usize,
    end: usize,
    p: &mut Scores<R>,
) {
    // SAFETY: the caller guarantees the queries and a whole block of keys.
    unsafe {
        if matches!(S::ISA, Isa::Avx512) && end > 2 * LANES {
            score_tile::<S, R, 4>(s, q, kt, dim, 0, p);
        } else if matches!(S::ISA, Isa::Avx512) && end > LANES {
            score_tile::<S, R, 2>(s, q, kt, dim, 0, p);
        } else {
            for j in (0..end).step_by(LANES) {
                score_tile::<S, R, 1>(s, q, kt, dim, j, p);
            }
        }
    }
}

#[inline(always)]
unsafe fn score_tile<S: Simd, const R: usize, const N: usize>(
    s: S,
    q: &[*const f32; R],
    kt: *const f32,
    dim: usize,
    first: usize,
    p: &mut Scores<R>,
) {
    // SAFETY: the caller guarantees the queries and a whole block of keys.
    unsafe {
        let mut acc = [[s.zero(); N]; R];
        for d in 0..dim {
            let mut keys = [s.zero(); N];
            for n in 0..N {
                keys[n] = s.load(kt.add(d * BLOCK + first + n * LANES));
            }
            for r in 0..R {
                let x = s.splat(*q[r].add(d));
                for n in 0..N {
                    acc[r][n] = s.fma(x, keys[n], acc[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                s.store(p.0[r].as_mut_ptr().add(first + n * LANES), acc[r][n]);
            }
        }
    }
}

/// One row of scores: which keys of the block it sees.
struct RowScores<'a> {
    place: &'a Place,
    block: &'a Block,
    row: usize,
    low: usize,
    high: usize,
    end: usize,
}

/// Scale, soft-cap, mask and visibility of one row of scores; returns its largest.
#[inline(always)]
unsafe fn finish_scores<S: Simd>(s: S, args: &AttentionArgs, row: &RowScores, p: &mut [f32; BLOCK]) -> f32 {
    let mut top = s.splat(f32::NEG_INFINITY);
    // SAFETY: vectors stay inside the block; the mask is read at visible keys' vectors, up to the last key.
    unsafe {
        let mask = mask_row(args, row);
        for i in 0..WIDTH {
            let first = i * LANES;
            if first >= row.end {
                break;
            }
            let at = p.as_mut_ptr().add(first);
            let mut x = s.mul(s.load(at), s.splat(args.scale));
            if args.softcap != 0.0 {
                let cap = s.splat(args.softcap);
                x = s.mul(tanh(s, s.div(x, cap)), cap);
            }
            if !mask.is_null() {
                let left = row.place.total - row.block.start;
                if first < left {
                    x = s.add(x, s.load_to(mask.add(row.block.start + first), left - first));
                }
            }
            if row.low > first || row.high < first + LANES {
                let inside = s.first(row.high.saturating_sub(first).min(LANES));
                let before = s.first(row.low.saturating_sub(first).min(LANES));
                x = s.select(s.and(inside, s.not(before)), x, s.splat(f32::NEG_INFINITY));
            }
            top = s.max(top, x);
            s.store(at, x);
        }
    }
    s.reduce_max(top)
}

#[inline(always)]
unsafe fn mask_row(args: &AttentionArgs, row: &RowScores) -> *const f32 {
    if args.mask.is_null() {
        return args.mask;
    }
    let group = args.group();
    let (query, head) = (row.row / group, row.place.kv_head * group + row.row % group);
    let [of_sequence, of_head, of_query] = args.mask_strides;
    let at = row.place.sequence * of_sequence + head * of_head + (row.place.first_query + query) * of_query;
    // SAFETY: the caller guarantees a mask of these extents.
    unsafe { args.mask.add(at) }
}

/// `o[r] += sum over visible j of p[r][j] v[j]`, j ascending; keys that a row does not see are not read for it.
#[inline(always)]
unsafe fn add_values<S: Simd, const R: usize>(
    s: S,
    block: &Block,
    p: &Scores<R>,
    low: &[usize; R],
    high: &[usize; R],
    o: *mut f32,
    dim: usize,
) {
    let (mut from, mut to) = (0, BLOCK);
    for r in 0..R {
        from = from.max(low[r]);
        to = to.min(high[r]);
    }
    // SAFETY: the caller guarantees the block's values up to the last visible key and `R` rows of output.
    unsafe {
        let shared = from < to;
        if !shared {
            (from, to) = (BLOCK, BLOCK);
        }
        for r in 0..R {
            let range = AddRange { block, p: p.0[r].as_ptr(), from: low[r], to: high[r].min(from), dim };
            add_range::<S, 1>(s, &range, o.add(r * dim));
        }
        if shared {
            let range = AddRange { block, p: p.0.as_ptr().cast(), from, to, dim };
            add_range::<S, R>(s, &range, o);
        }
        for r in 0..R {
            let range = AddRange { block, p: p.0[r].as_ptr(), from: low[r].max(to), to: high[r], dim };
            add_range::<S, 1>(s, &range, o.add(r * dim));
        }
    }
}

/// Keys `from..to` of a block and the weights of one or more rows.
struct AddRange<'a> {
    block: &'a Block,
    p: *const f32,
    from: usize,
    to: usize,
    dim: usize,
}

#[inline(always)]
unsafe fn add_range<S: Simd, const R: usize>(s: S, range: &AddRange, o: *mut f32) {
    if range.from >= range.to {
        return;
    }
    let dim = range.dim;
    let mut i = 0;
    // SAFETY: the caller guarantees the values and outputs of `dim` elements per row.
    unsafe {
        if matches!(S::ISA, Isa::Avx512) && R > 1 {
            while i + 4 * LANES <= dim {
                add_tile::<S, R, 4>(s, range, o, i);
                i += 4 * LANES;
            }
        }
        if matches!(S::ISA, Isa::Avx512) {
            while i + 2 * LANES <= dim {
                add_tile::<S, R, 2>(s, range, o, i);
                i += 2 * LANES;
            }
        }
        while i < dim {
            add_tile::<S, R, 1>(s, range, o, i);
            i += LANES;
        }
    }
}

#[inline(always)]
unsafe fn add_tile<S: Simd, const R: usize, const N: usize>(
    s: S,
    range: &AddRange,
    o: *mut f32,
    first: usize,
) {
    let AddRange { block, p, dim, .. } = *range;
    let left = dim - first;
    // SAFETY: the caller guarantees `dim` elements per row; only the last vector is partial, and then `N` is 1.
    unsafe {
        let mut acc = [[s.zero(); N]; R];
        for r in 0..R {
            for n in 0..N {
                acc[r][n] = s.load_to(o.add(r * dim + first + n * LANES), left - n * LANES);
            }
        }
        for j in range.from..range.to {
            let v = block.v.add(j * block.v_stride + first);
            let mut values = [s.zero(); N];
            for n in 0..N {
                values[n] = s.load_to(v.add(n * LANES), left - n * LANES);
            }
            for r in 0..R {
                let x = s.splat(*p.add(r * BLOCK + j));
                for n in 0..N {
                    acc[r][n] = s.fma(x, values[n], acc[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                s.store_to(o.add(r * dim + first + n * LANES), left - n * LANES, acc[r][n]);
            }
        }
    }
}

/// `out = o / l`, zeros where nothing was seen.
#[inline(always)]
unsafe fn write_row<S: Simd>(s: S, out: *mut f32, o: *const f32, l: f32, seen: bool, dim: usize) {
    let divisor = s.splat(if seen { l } else { 1.0 });
    // SAFETY: the caller guarantees both rows.
    unsafe {
        for i in (0..dim).step_by(LANES) {
            let x = if seen { s.load_to(o.add(i), dim - i) } else { s.zero() };
            s.store_to(out.add(i), dim - i, s.div(x, divisor));
        }
    }
}

#[inline(always)]
unsafe fn write_output<S: Simd>(s: S, args: &AttentionArgs, place: &Place, state: State) {
    let (group, dim) = (args.group(), args.value_dim);
    // SAFETY: the caller guarantees the output rows and the tile's state.
    unsafe {
        for query in 0..place.queries {
            let row = args.out.add((place.first_row + place.first_query + query) * args.out_stride);
            for h in 0..group {
                let r = query * group + h;
                let seen = *state.m.add(r) != f32::NEG_INFINITY;
                let out = row.add((place.kv_head * group + h) * dim);
                write_row(s, out, state.o.add(r * dim), *state.l.add(r), seen, dim);
            }
        }
    }
}

/// Stores a chunk's state of every row: `value_dim` outputs, the maximum, the sum.
#[inline(always)]
unsafe fn write_partials<S: Simd>(s: S, args: &AttentionArgs, place: &Place, state: State) {
    let (group, dim) = (args.group(), args.value_dim);
    // SAFETY: the caller guarantees `partial_floats` values and the tile's state.
    unsafe {
        for r in 0..place.queries * group {
            let row = place.first_row + place.first_query + r / group;
            let head = place.kv_head * group + r % group;
            let at = args.partials.add(((row * args.heads + head) * args.chunks + place.chunk) * (dim + 2));
            for i in (0..dim).step_by(LANES) {
                s.store_to(at.add(i), dim - i, s.load_to(state.o.add(r * dim + i), dim - i));
            }
            *at.add(dim) = *state.m.add(r);
            *at.add(dim + 1) = *state.l.add(r);
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
                let out = args.out.add(tile * args.out_stride + head * dim);
                write_row(s, out, whole.o, *whole.l, *whole.m != f32::NEG_INFINITY, dim);
            }
        }
    }
}
