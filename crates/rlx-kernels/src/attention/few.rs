//! Tiles of few rows, as in decoding: the lanes of a vector are keys, and a block is read once for all rows, as it is stored.

use super::generic::{Block, Place, State};
use super::{AttentionArgs, BLOCK};
use crate::isa::{Isa, Kernel, LANES, Simd};
use crate::math::{exp2, exp2_of_all, tanh};
use rlx_tensor::quant::CACHE_GROUP;
use std::marker::PhantomData;

/// Vectors of scores per row and block.
const WIDTH: usize = BLOCK / LANES;

/// How keys and values are stored.
pub(super) trait Stored: Copy + 'static {
    /// Groups of [`CACHE_GROUP`] elements have a scale, as [`Block::key_scales`] and [`Block::value_scales`] hold them. A scale times an
    /// integer is exact, so that what follows is what it is for an `f32` cache that holds these values.
    const SCALED: bool;

    /// Widens 16 values.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
    /// Widens `n <= 16` values.
    unsafe fn load_part<S: Simd>(s: S, p: *const Self, n: usize) -> S::V;
}

/// Bits of an IEEE half.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct F16(u16);

/// Bits of a bfloat16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Bf16(u16);

/// An integer of a group that has a scale.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Q8(i8);

macro_rules! stored {
    ($($type:ty: $load:ident, $load_part:ident;)*) => {$(
        impl Stored for $type {
            const SCALED: bool = false;

            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
                // SAFETY: the caller guarantees the values.
                unsafe { s.$load(p.cast()) }
            }

            #[inline(always)]
            unsafe fn load_part<S: Simd>(s: S, p: *const Self, n: usize) -> S::V {
                // SAFETY: the caller guarantees the values.
                unsafe { s.$load_part(p.cast(), n) }
            }
        }
    )*};
}

stored! {
    f32: load, load_part;
    F16: load_f16, load_f16_part;
    Bf16: load_bf16, load_bf16_part;
}

impl Stored for Q8 {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Q8) -> S::V {
        // SAFETY: the caller guarantees the values.
        unsafe { s.to_float(s.iload_i8(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_part<S: Simd>(s: S, p: *const Q8, n: usize) -> S::V {
        let mut part = [Q8(0); LANES];
        // SAFETY: the caller guarantees the values.
        unsafe {
            part.as_mut_ptr().copy_from_nonoverlapping(p, n.min(LANES));
            Q8::load(s, part.as_ptr())
        }
    }
}

/// Widens `min(n, 16)` values.
#[inline(always)]
pub(super) unsafe fn load_to<S: Simd, E: Stored>(s: S, p: *const E, n: usize) -> S::V {
    // SAFETY: the caller guarantees the values.
    unsafe { if n >= LANES { E::load(s, p) } else { E::load_part(s, p, n) } }
}

/// What a step of some rows over one block reads and changes.
#[derive(Clone, Copy)]
struct Step {
    args: *const AttentionArgs,
    place: *const Place,
    block: *const Block,
    state: State,
}

/// Moves every row of the tile over one block of `E`s, whose keys are transposed.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, E: Stored>(
    s: S,
    args: &AttentionArgs,
    place: &Place,
    block: &Block,
    state: State,
) {
    let step = Step { args, place, block, state };
    let rows = place.queries * args.group();
    let mut row = 0;
    while row < rows {
        // SAFETY: the caller guarantees the contract of `AttentionArgs`.
        unsafe {
            row += match rows - row {
                _ if matches!(S::ISA, Isa::Scalar) => step_rows::<S, E, 1>(s, step, row),
                1 => step_rows::<S, E, 1>(s, step, row),
                2 => step_rows::<S, E, 2>(s, step, row),
                3 => step_rows::<S, E, 3>(s, step, row),
                4 => step_rows::<S, E, 4>(s, step, row),
                5 => step_rows::<S, E, 5>(s, step, row),
                7 if matches!(S::ISA, Isa::Avx512) => step_rows::<S, E, 7>(s, step, row),
                8 if matches!(S::ISA, Isa::Avx512) => step_rows::<S, E, 8>(s, step, row),
                7 | 8 => step_rows::<S, E, 4>(s, step, row),
                _ => step_rows::<S, E, 6>(s, step, row),
            };
        }
    }
}

#[inline(always)]
unsafe fn step_rows<S: Simd, E: Stored, const R: usize>(s: S, step: Step, row: usize) -> usize {
    // SAFETY: the caller guarantees the contract of `AttentionArgs` and that `row + R` rows are in the tile.
    unsafe { s.call::<StepRows<E, R>>(&step, row) };
    R
}

/// Moves `R` rows from `row` on over one block.
struct StepRows<E, const R: usize>(PhantomData<E>);

impl<E: Stored, const R: usize> Kernel for StepRows<E, R> {
    type Args = Step;
    const OP: &'static str = "attention_step";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, step: &Step, row: usize) {
        // SAFETY: `step_rows` passes references; the caller guarantees the rest.
        unsafe { move_rows::<S, E, R>(s, &*step.args, &*step.place, &*step.block, step.state, row) }
    }
}

#[inline(always)]
unsafe fn move_rows<S: Simd, E: Stored, const R: usize>(
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
            let (from, to) = place.visible(args, (row + r) / group);
            low[r] = from.saturating_sub(block.start).min(BLOCK);
            high[r] = to.saturating_sub(block.start).min(BLOCK);
            if low[r] < high[r] {
                end = high[r].max(end);
            }
            q[r] = args.q.add(place.query_at(args, row + r, args.q_stride, args.head_dim));
        }
        if end == 0 {
            return;
        }
        let mut p = Scores([[0.0; BLOCK]; R]);
        score_rows::<S, E, R>(s, &q, block, args.head_dim, end, &mut p);
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
        s.store(alpha.as_mut_ptr(), exp2(s, s.load(alpha.as_ptr())));
        for r in 0..R {
            let mut sums = [s.zero(); WIDTH];
            let at = p.0[r].as_mut_ptr();
            if end > (WIDTH - 1) * LANES {
                for i in 0..WIDTH {
                    sums[i] = s.sub(s.load(at.add(i * LANES)), s.splat(base[r]));
                }
                sums = exp2_of_all(s, [sums])[0];
                for i in 0..WIDTH {
                    s.store(at.add(i * LANES), sums[i]);
                }
            } else {
                for i in 0..end.div_ceil(LANES) {
                    sums[i] = exp2(s, s.sub(s.load(at.add(i * LANES)), s.splat(base[r])));
                    s.store(at.add(i * LANES), sums[i]);
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
        add_values::<S, E, R>(s, block, &p, &low, &high, state.o.add(row * value_dim), value_dim);
    }
}

#[repr(align(64))]
struct Scores<const R: usize>([[f32; BLOCK]; R]);

/// `p[r][j] = sum over d of q[r][d] kt[d][j]` for at least the first `end` keys.
#[inline(always)]
unsafe fn score_rows<S: Simd, E: Stored, const R: usize>(
    s: S,
    q: &[*const f32; R],
    block: &Block,
    dim: usize,
    end: usize,
    p: &mut Scores<R>,
) {
    // SAFETY: the caller guarantees the queries and the keys' vectors up to `end`.
    unsafe {
        if matches!(S::ISA, Isa::Avx512) && R <= 6 && end > 2 * LANES {
            score_tile::<S, E, R, 4>(s, q, block, dim, 0, p);
        } else if matches!(S::ISA, Isa::Avx512) && end > LANES {
            for j in (0..end).step_by(2 * LANES) {
                score_tile::<S, E, R, 2>(s, q, block, dim, j, p);
            }
        } else {
            for j in (0..end).step_by(LANES) {
                score_tile::<S, E, R, 1>(s, q, block, dim, j, p);
            }
        }
    }
}

#[inline(always)]
unsafe fn score_tile<S: Simd, E: Stored, const R: usize, const N: usize>(
    s: S,
    q: &[*const f32; R],
    block: &Block,
    dim: usize,
    first: usize,
    p: &mut Scores<R>,
) {
    // SAFETY: the caller guarantees the queries and the keys' vectors.
    unsafe {
        let kt = block.k.cast::<E>();
        let next = block.next_k.cast::<E>();
        let mut acc = [[s.zero(); N]; R];
        let mut from = 0;
        while from < dim {
            let mut scales = [s.zero(); N];
            let mut to = dim;
            if E::SCALED {
                let group = block.key_scales.add(from / CACHE_GROUP * BLOCK + first);
                for n in 0..N {
                    scales[n] = s.load_f16(group.add(n * LANES));
                }
                to = from + CACHE_GROUP;
            }
            for d in from..to {
                let mut keys = [s.zero(); N];
                for n in 0..N {
                    let at = d * BLOCK + first + n * LANES;
                    keys[n] = E::load(s, kt.add(at));
                    if E::SCALED {
                        keys[n] = s.mul(keys[n], scales[n]);
                    }
                    if (size_of::<E>() * n).is_multiple_of(4) {
                        s.prefetch(next.wrapping_add(at).cast());
                    }
                }
                for r in 0..R {
                    let x = s.splat(*q[r].add(d));
                    for n in 0..N {
                        acc[r][n] = s.fma(x, keys[n], acc[r][n]);
                    }
                }
            }
            from = to;
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

/// Scale, soft-cap, mask and visibility of one row of scores, in powers of two; returns its largest.
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
            let mut x = s.load(at);
            if args.softcap == 0.0 && mask.is_null() {
                x = s.mul(x, s.splat(args.scale * std::f32::consts::LOG2_E));
            } else {
                x = s.mul(x, s.splat(args.scale));
                if args.softcap != 0.0 {
                    let cap = s.splat(args.softcap);
                    x = s.mul(tanh(s, s.div(x, cap)), cap);
                }
                let left = row.place.total - row.block.start;
                if !mask.is_null() && first < left {
                    x = s.add(x, s.load_to(mask.add(row.block.start + first), left - first));
                }
                x = s.mul(x, s.splat(std::f32::consts::LOG2_E));
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
unsafe fn add_values<S: Simd, E: Stored, const R: usize>(
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
            add_range::<S, E, 1>(s, &range, o.add(r * dim));
        }
        if shared {
            let range = AddRange { block, p: p.0.as_ptr().cast(), from, to, dim };
            add_range::<S, E, R>(s, &range, o);
        }
        for r in 0..R {
            let range = AddRange { block, p: p.0[r].as_ptr(), from: low[r].max(to), to: high[r], dim };
            add_range::<S, E, 1>(s, &range, o.add(r * dim));
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
unsafe fn add_range<S: Simd, E: Stored, const R: usize>(s: S, range: &AddRange, o: *mut f32) {
    if range.from >= range.to {
        return;
    }
    let dim = range.dim;
    let mut i = 0;
    // SAFETY: the caller guarantees the values and outputs of `dim` elements per row.
    unsafe {
        if matches!(S::ISA, Isa::Avx512) && R <= 6 {
            while i + 4 * LANES <= dim {
                add_tile::<S, E, R, 4>(s, range, o, i);
                i += 4 * LANES;
            }
        }
        if matches!(S::ISA, Isa::Avx512) {
            while i + 2 * LANES <= dim {
                add_tile::<S, E, R, 2>(s, range, o, i);
                i += 2 * LANES;
            }
        }
        while i < dim {
            add_tile::<S, E, R, 1>(s, range, o, i);
            i += LANES;
        }
    }
}

#[inline(always)]
unsafe fn add_tile<S: Simd, E: Stored, const R: usize, const N: usize>(
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
            let at = j * block.v_stride + first;
            let (v, next) = (block.v.cast::<E>().add(at), block.next_v.cast::<E>().wrapping_add(at));
            let mut values = [s.zero(); N];
            for n in 0..N {
                values[n] = load_to(s, v.add(n * LANES), left - n * LANES);
                if E::SCALED {
                    let scale = *block.value_scales.add((at + n * LANES) / CACHE_GROUP);
                    values[n] = s.mul(values[n], s.splat(scale));
                }
                if (size_of::<E>() * n).is_multiple_of(4) {
                    s.prefetch(next.wrapping_add(n * LANES).cast());
                }
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
