//! Tiles of many rows: the lanes of a vector are rows, and scores, weights and outputs of a group of rows stand transposed.

use super::generic::{Block, Place, State};
use super::{AttentionArgs, BLOCK};
use crate::isa::{Isa, Kernel, LANES, Simd};
use crate::math::{exp2, exp2_of_all, tanh};

/// Rows that stand side by side in the state of a tile, at most.
pub(super) const WIDEST: usize = 2 * LANES;

/// Rows of a group on this instruction set: as many vectors as leave registers for several keys.
#[inline(always)]
pub(super) fn width<S: Simd>() -> usize {
    if matches!(S::ISA, Isa::Avx512) { WIDEST } else { LANES }
}

/// Queries and state of a tile's rows, `width` rows a group, and the scores of one group and block.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    /// `[group][head_dim][width]`
    pub q: *mut f32,
    /// `[BLOCK][width]`
    pub scores: *mut f32,
}

/// One group over one block.
#[derive(Clone, Copy)]
struct Step {
    args: *const AttentionArgs,
    place: *const Place,
    block: *const Block,
    q: *const f32,
    scores: *mut f32,
    state: State,
    /// First row of the group in the tile.
    row: usize,
    rows: usize,
}

/// Transposes the tile's queries.
#[inline(always)]
pub(super) unsafe fn load_queries<S: Simd>(s: S, args: &AttentionArgs, place: &Place, to: *mut f32) {
    let rows = place.queries * args.group();
    // SAFETY: the caller guarantees the queries and room for whole groups.
    unsafe {
        for row in (0..rows).step_by(LANES) {
            let group = to.add(row / width::<S>() * width::<S>() * args.head_dim + row % width::<S>());
            for d in (0..args.head_dim).step_by(LANES) {
                let mut tile = [s.zero(); LANES];
                if row + LANES <= rows && d + LANES <= args.head_dim {
                    for i in 0..LANES {
                        let q = args.q.add(place.query_at(args, row + i, args.q_stride, args.head_dim));
                        tile[i] = s.load(q.add(d));
                    }
                    let tile = s.transpose(tile);
                    for i in 0..LANES {
                        s.store(group.add((d + i) * width::<S>()), tile[i]);
                    }
                    continue;
                }
                for i in 0..LANES.min(rows - row) {
                    let q = args.q.add(place.query_at(args, row + i, args.q_stride, args.head_dim));
                    tile[i] = s.load_to(q.add(d), args.head_dim - d);
                }
                let tile = s.transpose(tile);
                for i in 0..LANES.min(args.head_dim - d) {
                    s.store(group.add((d + i) * width::<S>()), tile[i]);
                }
            }
        }
    }
}

/// Moves every group of the tile over one block.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd>(
    s: S,
    args: &AttentionArgs,
    place: &Place,
    block: &Block,
    tile: Rows,
    state: State,
) {
    let rows = place.queries * args.group();
    for row in (0..rows).step_by(width::<S>()) {
        // SAFETY: the caller guarantees the contract of `AttentionArgs`; the state and queries hold whole groups.
        unsafe {
            let step = Step {
                args,
                place,
                block,
                q: tile.q.add(row * args.head_dim),
                scores: tile.scores,
                state: state.group(row, args.value_dim),
                row,
                rows: width::<S>().min(rows - row),
            };
            if !matches!(S::ISA, Isa::Avx512) {
                s.call::<Group<1, 4>>(&step, 0);
            } else if step.rows > LANES {
                s.call::<Group<2, 8>>(&step, 0);
            } else {
                s.call::<Group<1, 8>>(&step, 0);
            }
        }
    }
}

/// `V` vectors of rows over one block, `N` keys or value elements at a time.
struct Group<const V: usize, const N: usize>;

impl<const V: usize, const N: usize> Kernel for Group<V, N> {
    type Args = Step;
    const OP: &'static str = "attention_group";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, step: &Step, _tile: usize) {
        // SAFETY: `attend` passes references and the rows' state; the caller guarantees the rest.
        unsafe {
            let (args, block) = (&*step.args, &*step.block);
            let seen = Seen::of(&*step.place, args, step, block.start);
            if seen.from >= seen.to {
                return;
            }
            let top = match block.k_transposed {
                true => scores::<S, V, N, true>(s, args, block, step, &seen),
                false => scores::<S, V, N, false>(s, args, block, step, &seen),
            };
            let alpha = weights::<S, V>(s, step, &seen, top);
            let mut i = 0;
            while i + N <= args.value_dim {
                outputs::<S, V, N>(s, block, step, &seen, alpha, i);
                i += N;
            }
            while i < args.value_dim {
                outputs::<S, V, 1>(s, block, step, &seen, alpha, i);
                i += 1;
            }
        }
    }
}

/// Keys of a block, counted from its start, that the rows of a group see: `from..to` by any, `all_from..all_to` by all, and by
/// each row where these differ.
struct Seen {
    from: usize,
    to: usize,
    all_from: usize,
    all_to: usize,
    low: [i32; WIDEST],
    high: [i32; WIDEST],
}

impl Seen {
    #[inline(always)]
    fn of(place: &Place, args: &AttentionArgs, step: &Step, start: usize) -> Seen {
        let group = args.group();
        let within = |position: usize| position.saturating_sub(start).min(BLOCK);
        let (first, last) =
            (place.visible(args, step.row / group), place.visible(args, (step.row + step.rows - 1) / group));
        let (from, to) = (within(first.0), within(last.1));
        let (all_from, all_to) = (within(last.0), within(first.1).min(to));
        let mut seen = Seen { from, to, all_from, all_to, low: [0; WIDEST], high: [0; WIDEST] };
        if all_from >= all_to {
            (seen.all_from, seen.all_to) = (to, to);
        }
        if seen.all_from > from || seen.all_to < to {
            for i in 0..WIDEST {
                let (low, high) = place.visible(args, (step.row + i.min(step.rows - 1)) / group);
                (seen.low[i], seen.high[i]) = (within(low) as i32, within(high) as i32);
            }
        }
        seen
    }

    #[inline(always)]
    fn by_all(&self, key: usize) -> bool {
        key >= self.all_from && key < self.all_to
    }

    /// Rows of vector `v` that see a key.
    #[inline(always)]
    fn rows<S: Simd>(&self, s: S, v: usize, key: usize) -> S::M {
        let key = s.isplat(key as i32);
        // SAFETY: the arrays hold `WIDEST` values.
        unsafe {
            let low = s.iload(self.low.as_ptr().add(v * LANES));
            let high = s.iload(self.high.as_ptr().add(v * LANES));
            s.and(s.not(s.igt(low, key)), s.igt(high, key))
        }
    }
}

/// Scores of the keys that any row sees, in powers of two; returns each row's largest.
#[inline(always)]
unsafe fn scores<S: Simd, const V: usize, const N: usize, const TRANSPOSED: bool>(
    s: S,
    args: &AttentionArgs,
    block: &Block,
    step: &Step,
    seen: &Seen,
) -> [S::V; V] {
    let mut top = [s.splat(f32::NEG_INFINITY); V];
    // SAFETY: the caller guarantees the queries, and keys up to the last that is seen (whole blocks where transposed).
    unsafe {
        for j in (seen.from..seen.to).step_by(N) {
            let mut keys = [block.k; N];
            for n in 0..N {
                let key = (j + n).min(seen.to - 1);
                keys[n] = block.k.add(if TRANSPOSED { key } else { key * block.k_stride });
            }
            let mut acc = [[s.zero(); V]; N];
            for d in 0..args.head_dim {
                let mut q = [s.zero(); V];
                for v in 0..V {
                    q[v] = s.load(step.q.add(d * width::<S>() + v * LANES));
                }
                for n in 0..N {
                    let x = s.splat(*keys[n].add(if TRANSPOSED { d * BLOCK } else { d }));
                    for v in 0..V {
                        acc[n][v] = s.fma(x, q[v], acc[n][v]);
                    }
                }
            }
            if args.softcap == 0.0 && seen.by_all(j) && j + N <= seen.all_to {
                let factor = s.splat(args.scale * std::f32::consts::LOG2_E);
                for n in 0..N {
                    for v in 0..V {
                        let x = s.mul(acc[n][v], factor);
                        top[v] = s.max(top[v], x);
                        s.store(step.scores.add((j + n) * width::<S>() + v * LANES), x);
                    }
                }
                continue;
            }
            for n in 0..N.min(seen.to - j) {
                for v in 0..V {
                    let mut x = finish(s, args, acc[n][v]);
                    if !seen.by_all(j + n) {
                        x = s.select(seen.rows(s, v, j + n), x, s.splat(f32::NEG_INFINITY));
                    }
                    top[v] = s.max(top[v], x);
                    s.store(step.scores.add((j + n) * width::<S>() + v * LANES), x);
                }
            }
        }
    }
    top
}

/// Scale and soft-cap of scores, in powers of two.
#[inline(always)]
fn finish<S: Simd>(s: S, args: &AttentionArgs, x: S::V) -> S::V {
    if args.softcap == 0.0 {
        return s.mul(x, s.splat(args.scale * std::f32::consts::LOG2_E));
    }
    let cap = s.splat(args.softcap);
    let x = s.mul(tanh(s, s.div(s.mul(x, s.splat(args.scale)), cap)), cap);
    s.mul(x, s.splat(std::f32::consts::LOG2_E))
}

/// Order in which sixteen leaves make the tree of [`Simd::reduce_add`] when each joins its neighbour as soon as both are there.
const LEAVES: [usize; LANES] = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];

/// Scores become weights, and join each row's sum; returns the factors of what the rows had before.
#[inline(always)]
unsafe fn weights<S: Simd, const V: usize>(s: S, step: &Step, seen: &Seen, top: [S::V; V]) -> [S::V; V] {
    let lowest = s.splat(f32::NEG_INFINITY);
    let (mut base, mut alpha) = (top, top);
    // SAFETY: the caller guarantees the state and the scores of the keys that are seen.
    unsafe {
        for v in 0..V {
            let m = s.load(step.state.m.add(v * LANES));
            let top = s.max(top[v], m);
            s.store(step.state.m.add(v * LANES), top);
            base[v] = s.select(s.eq(top, lowest), s.zero(), top);
            alpha[v] = exp2(s, s.sub(m, base[v]));
        }
        // Several at a time, so that their chains of operations overlap.
        let mut key = seen.from;
        while key + 4 <= seen.to {
            raise::<S, V, 4>(s, step.scores.add(key * width::<S>()), base);
            key += 4;
        }
        while key < seen.to {
            raise::<S, V, 1>(s, step.scores.add(key * width::<S>()), base);
            key += 1;
        }
        let mut waiting = [[s.zero(); V]; 5];
        for at in 0..LANES {
            let mut sum = [s.zero(); V];
            for v in 0..V {
                let mut e = [s.zero(); BLOCK / LANES];
                for i in 0..BLOCK / LANES {
                    let key = LEAVES[at] + i * LANES;
                    if key >= seen.from && key < seen.to {
                        e[i] = s.load(step.scores.add(key * width::<S>() + v * LANES));
                    }
                }
                sum[v] = s.add(s.add(e[0], e[1]), s.add(e[2], e[3]));
            }
            let mut level = 0;
            while at >> level & 1 == 1 {
                for v in 0..V {
                    sum[v] = s.add(waiting[level][v], sum[v]);
                }
                level += 1;
            }
            waiting[level] = sum;
        }
        for v in 0..V {
            let l = step.state.l.add(v * LANES);
            s.store(l, s.fma(s.load(l), alpha[v], waiting[4][v]));
        }
    }
    alpha
}

/// `p = 2^(p - base)` for the rows' scores of `N` keys.
#[inline(always)]
unsafe fn raise<S: Simd, const V: usize, const N: usize>(s: S, p: *mut f32, base: [S::V; V]) {
    let mut x = [[s.zero(); V]; N];
    // SAFETY: the caller guarantees the scores.
    unsafe {
        for n in 0..N {
            for v in 0..V {
                x[n][v] = s.sub(s.load(p.add(n * width::<S>() + v * LANES)), base[v]);
            }
        }
        let y = exp2_of_all(s, x);
        for n in 0..N {
            for v in 0..V {
                s.store(p.add(n * width::<S>() + v * LANES), y[n][v]);
            }
        }
    }
}

/// Adds the block's values to `N` output elements of every row.
#[inline(always)]
unsafe fn outputs<S: Simd, const V: usize, const N: usize>(
    s: S,
    block: &Block,
    step: &Step,
    seen: &Seen,
    alpha: [S::V; V],
    first: usize,
) {
    // SAFETY: the caller guarantees the state and the values of the keys that are seen.
    unsafe {
        let o = step.state.o.add(first * width::<S>());
        let mut acc = [[s.zero(); V]; N];
        for n in 0..N {
            for v in 0..V {
                acc[n][v] = s.mul(s.load(o.add(n * width::<S>() + v * LANES)), alpha[v]);
            }
        }
        for key in seen.from..seen.all_from.min(seen.to) {
            add_seen::<S, V, N>(s, block, step, seen, key, first, &mut acc);
        }
        for key in seen.all_from..seen.all_to {
            let (p, values) =
                (step.scores.add(key * width::<S>()), block.v.add(key * block.v_stride + first));
            let mut weight = [s.zero(); V];
            for v in 0..V {
                weight[v] = s.load(p.add(v * LANES));
            }
            for n in 0..N {
                let x = s.splat(*values.add(n));
                for v in 0..V {
                    acc[n][v] = s.fma(weight[v], x, acc[n][v]);
                }
            }
        }
        for key in seen.all_to.max(seen.from)..seen.to {
            add_seen::<S, V, N>(s, block, step, seen, key, first, &mut acc);
        }
        for n in 0..N {
            for v in 0..V {
                s.store(o.add(n * width::<S>() + v * LANES), acc[n][v]);
            }
        }
    }
}

/// Adds one key's values to the rows that see it.
#[inline(always)]
unsafe fn add_seen<S: Simd, const V: usize, const N: usize>(
    s: S,
    block: &Block,
    step: &Step,
    seen: &Seen,
    key: usize,
    first: usize,
    acc: &mut [[S::V; V]; N],
) {
    // SAFETY: as for `outputs`.
    unsafe {
        let values = block.v.add(key * block.v_stride + first);
        for v in 0..V {
            let rows = seen.rows(s, v, key);
            let weight = s.load(step.scores.add(key * width::<S>() + v * LANES));
            for n in 0..N {
                acc[n][v] = s.select(rows, s.fma(weight, s.splat(*values.add(n)), acc[n][v]), acc[n][v]);
            }
        }
    }
}

/// Merges the second state into the first, row by row as `merge_row` does.
#[inline(always)]
pub(super) unsafe fn merge<S: Simd>(s: S, into: State, from: State, rows: usize, value_dim: usize) {
    let lowest = s.splat(f32::NEG_INFINITY);
    // SAFETY: the caller guarantees whole groups of both states.
    unsafe {
        for row in (0..rows).step_by(LANES) {
            let (first, lane) = (row / width::<S>() * width::<S>(), row % width::<S>());
            let (m, n) = (s.load(into.m.add(row)), s.load(from.m.add(row)));
            let (fresh, unseen) = (s.eq(m, lowest), s.eq(n, lowest));
            let top = s.max(m, n);
            let (a, b) = (exp2(s, s.sub(m, top)), exp2(s, s.sub(n, top)));
            s.store(into.m.add(row), top);
            let (o, p) = (into.o.add(first * value_dim + lane), from.o.add(first * value_dim + lane));
            for d in 0..=value_dim {
                let (x, y) = match d {
                    0 => (into.l.add(row), from.l.add(row)),
                    _ => (o.add((d - 1) * width::<S>()), p.add((d - 1) * width::<S>())),
                };
                let (old, other) = (s.load(x), s.load(y));
                let sum = s.fma(old, a, s.mul(other, b));
                s.store(x, s.select(unseen, old, s.select(fresh, other, sum)));
            }
        }
    }
}

/// Writes each row's outputs, divided by its sum where `divided`, to where `to` says.
#[inline(always)]
pub(super) unsafe fn write_rows<S: Simd>(
    s: S,
    args: &AttentionArgs,
    place: &Place,
    state: State,
    divided: bool,
    to: RowTarget,
) {
    let (rows, dim) = (place.queries * args.group(), args.value_dim);
    // SAFETY: the caller guarantees the state and the rows' targets.
    unsafe {
        for row in (0..rows).step_by(LANES) {
            let (first, lane) = (row / width::<S>() * width::<S>(), row % width::<S>());
            let (m, l) = (s.load(state.m.add(row)), s.load(state.l.add(row)));
            let unseen = s.eq(m, s.splat(f32::NEG_INFINITY));
            let factor = s.select(unseen, s.zero(), s.div(s.splat(1.0), l));
            for d in (0..dim).step_by(LANES) {
                let o = state.o.add(first * dim + d * width::<S>() + lane);
                let mut tile = [s.zero(); LANES];
                for i in 0..LANES {
                    if d + i < dim {
                        let x = s.load(o.add(i * width::<S>()));
                        tile[i] = if divided { s.mul(x, factor) } else { x };
                    }
                }
                let tile = s.transpose(tile);
                if row + LANES <= rows && d + LANES <= dim {
                    for i in 0..LANES {
                        s.store(to(args, place, row + i).add(d), tile[i]);
                    }
                    continue;
                }
                for i in 0..LANES.min(rows - row) {
                    s.store_to(to(args, place, row + i).add(d), dim - d, tile[i]);
                }
            }
        }
    }
}

/// Where a row's outputs are written.
pub(super) type RowTarget = unsafe fn(&AttentionArgs, &Place, usize) -> *mut f32;
