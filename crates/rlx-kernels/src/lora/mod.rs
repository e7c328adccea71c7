//! Low-rank updates of rows that each have an adapter of their own: `t = scale * A x`, then `delta = B t`.
//!
//! Numeric contract: an element of `t` is one vector of lanes over ascending k and one combine tree, times the scale; an element of
//! `delta` is one accumulator over ascending rank. Neighbours with the same adapter share loads only, so a row's bits depend on
//! neither rows nor tiles.

#[cfg(test)]
mod tests;

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
use std::marker::PhantomData;

/// Storage of an adapter's factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FactorType {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

/// One adapter of a run: `rank` rows of factors.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    /// Row 0.
    pub rows: *const u8,
    /// Rows.
    pub rank: usize,
    /// Elements between rows.
    pub stride: usize,
}

/// Arguments of both halves for one part of a layer. Tile `t` covers the rows `ROWS * t ..` of the down half; the up half has
/// `row_tiles() * column_tiles()` tiles, rows first.
#[derive(Clone, Copy, Debug)]
pub struct LoraArgs {
    /// Rows of `k` values.
    pub x: *const f32,
    /// Values between rows of `x`.
    pub x_stride: usize,
    /// Rows.
    pub m: usize,
    /// Each row's adapter, or -1.
    pub slots: *const i32,
    /// The adapters.
    pub factors: *const Factors,
    /// Each adapter's scale for this part; 0 if it leaves the part alone.
    pub scales: *const f32,
    /// Values between scales.
    pub scales_stride: usize,
    /// Where a row of factors has this part's A.
    pub a: usize,
    /// Columns of A.
    pub k: usize,
    /// Where a row of factors has this part's B.
    pub b: usize,
    /// Columns of B.
    pub n: usize,
    /// Rows of `t_stride` values, of which an adapter's rank is used.
    pub t: *mut f32,
    /// Values between rows of `t`; at least the largest rank.
    pub t_stride: usize,
    /// Rows of `n` values: -0 where the row has no update, which leaves every number as it is.
    pub delta: *mut f32,
    /// Values between rows of `delta`.
    pub delta_stride: usize,
}

/// Rows that share loads where they have the same adapter.
pub const ROWS: usize = 4;
/// Columns of a tile of the up half.
pub const COLUMNS: usize = 512;

impl LoraArgs {
    /// Tiles of the down half.
    pub const fn row_tiles(&self) -> usize {
        self.m.div_ceil(ROWS)
    }

    /// Tiles of the up half.
    pub const fn up_tiles(&self) -> usize {
        self.row_tiles() * self.n.div_ceil(COLUMNS)
    }
}

/// Instances of the down half over f32 factors.
pub static DOWN_F32: Rows<LoraArgs> = Row::all_of::<Down<WideF32>>();
/// Instances of the down half over bf16 factors.
pub static DOWN_BF16: Rows<LoraArgs> = Row::all_of::<Down<WideBf16>>();
/// Instances of the up half over f32 factors.
pub static UP_F32: Rows<LoraArgs> = Row::all_of::<Up<WideF32>>();
/// Instances of the up half over bf16 factors.
pub static UP_BF16: Rows<LoraArgs> = Row::all_of::<Up<WideBf16>>();

/// The down half for `isa`.
pub fn down_entry(isa: Isa, factors: FactorType) -> Option<Entry<LoraArgs>> {
    match factors {
        FactorType::F32 => select(&DOWN_F32, isa),
        FactorType::Bf16 => select(&DOWN_BF16, isa),
    }
}

/// The up half for `isa`.
pub fn up_entry(isa: Isa, factors: FactorType) -> Option<Entry<LoraArgs>> {
    match factors {
        FactorType::F32 => select(&UP_F32, isa),
        FactorType::Bf16 => select(&UP_BF16, isa),
    }
}

/// How stored factors become vectors.
trait Wide: 'static {
    /// The type's name in kernel names.
    const DTYPE: &'static str;
    /// Bytes of an element.
    const BYTES: usize;

    /// Up to 16 elements from element `at` on; the other lanes are zero.
    ///
    /// # Safety
    /// `p` is valid for reads of `at + min(n, 16)` elements.
    unsafe fn load<S: Simd>(s: S, p: *const u8, at: usize, n: usize) -> S::V;
}

/// Factors stored as f32.
struct WideF32;
/// Factors stored as bf16.
struct WideBf16;

impl Wide for WideF32 {
    const DTYPE: &'static str = "f32";
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8, at: usize, n: usize) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { s.load_to(p.cast::<f32>().add(at), n) }
    }
}

impl Wide for WideBf16 {
    const DTYPE: &'static str = "bf16";
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8, at: usize, n: usize) -> S::V {
        let p = p.cast::<u16>().wrapping_add(at);
        // SAFETY: passed on to the caller.
        unsafe { if n >= LANES { s.load_bf16(p) } else { s.load_bf16_part(p, n) } }
    }
}

/// The adapter of a row, unless it has none or leaves this part alone.
#[inline(always)]
unsafe fn factors_of(args: &LoraArgs, row: usize) -> Option<(Factors, f32)> {
    // SAFETY: the caller guarantees the row, whose slot names an adapter or is negative.
    unsafe {
        let slot = *args.slots.add(row);
        if slot < 0 {
            return None;
        }
        let scale = *args.scales.add(slot as usize * args.scales_stride);
        if scale == 0.0 {
            return None;
        }
        Some((*args.factors.add(slot as usize), scale))
    }
}

/// Whether `ROWS` rows from `row` on are there and have one adapter.
#[inline(always)]
unsafe fn alike(args: &LoraArgs, row: usize) -> bool {
    if row + ROWS > args.m {
        return false;
    }
    // SAFETY: the rows are below `m`.
    unsafe {
        let slot = *args.slots.add(row);
        let mut alike = true;
        for other in 1..ROWS {
            alike &= *args.slots.add(row + other) == slot;
        }
        alike
    }
}

/// `t = scale * A x`.
struct Down<W>(PhantomData<W>);

impl<W: Wide> Kernel for Down<W> {
    type Args = LoraArgs;
    const OP: &'static str = "lora_down";
    const DTYPES: &'static str = W::DTYPE;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &LoraArgs, tile: usize) {
        let first = tile * ROWS;
        // SAFETY: the caller guarantees operands and adapters; rows of the tile are below `m`.
        unsafe {
            if alike(args, first) {
                down::<S, W, ROWS>(s, args, first);
            } else {
                for row in first..args.m.min(first + ROWS) {
                    down::<S, W, 1>(s, args, row);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn down<S: Simd, W: Wide, const N: usize>(s: S, args: &LoraArgs, row: usize) {
    // SAFETY: passed on to the caller.
    unsafe {
        let Some((factors, scale)) = factors_of(args, row) else { return };
        let mut rank = 0;
        while rank + 4 <= factors.rank {
            dots::<S, W, N, 4>(s, args, row, (&factors, scale), rank);
            rank += 4;
        }
        while rank < factors.rank {
            dots::<S, W, N, 1>(s, args, row, (&factors, scale), rank);
            rank += 1;
        }
    }
}

/// `R` products of each of `N` rows with rows of A.
#[inline(always)]
unsafe fn dots<S: Simd, W: Wide, const N: usize, const R: usize>(
    s: S,
    args: &LoraArgs,
    row: usize,
    (factors, scale): (&Factors, f32),
    rank: usize,
) {
    let mut acc = [[s.zero(); R]; N];
    let at = |r: usize| factors.rows.wrapping_add(((rank + r) * factors.stride + args.a) * W::BYTES);
    let mut rows = [std::ptr::null(); R];
    for r in 0..R {
        rows[r] = at(r);
    }
    let mut p = 0;
    while p < args.k {
        let left = args.k - p;
        let mut a = [s.zero(); R];
        for r in 0..R {
            // SAFETY: the caller guarantees `k` elements of A in each row of factors.
            a[r] = unsafe { W::load(s, rows[r], p, left) };
        }
        for n in 0..N {
            // SAFETY: the caller guarantees `k` values of the row.
            let x = unsafe { s.load_to(args.x.add((row + n) * args.x_stride + p), left) };
            for r in 0..R {
                acc[n][r] = s.fma(x, a[r], acc[n][r]);
            }
        }
        p += LANES;
    }
    for n in 0..N {
        for r in 0..R {
            // SAFETY: the caller guarantees `rank` values in each row of `t`.
            unsafe {
                *args.t.add((row + n) * args.t_stride + rank + r) = scale * s.reduce_add(acc[n][r]);
            }
        }
    }
}

/// `delta = B t`, or -0.
struct Up<W>(PhantomData<W>);

impl<W: Wide> Kernel for Up<W> {
    type Args = LoraArgs;
    const OP: &'static str = "lora_up";
    const DTYPES: &'static str = W::DTYPE;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &LoraArgs, tile: usize) {
        let (first, column) = (tile % args.row_tiles() * ROWS, tile / args.row_tiles() * COLUMNS);
        // SAFETY: the caller guarantees operands and adapters; rows of the tile are below `m`.
        unsafe {
            if alike(args, first) {
                up::<S, W, ROWS>(s, args, first, column);
            } else {
                for row in first..args.m.min(first + ROWS) {
                    up::<S, W, 1>(s, args, row, column);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn up<S: Simd, W: Wide, const N: usize>(s: S, args: &LoraArgs, row: usize, first: usize) {
    let end = args.n.min(first + COLUMNS);
    // SAFETY: the caller guarantees `n` values of each row of `delta`, of factors from `b` on, and the rank's values of `t`.
    unsafe {
        let Some((factors, _)) = factors_of(args, row) else {
            for n in 0..N {
                for column in (first..end).step_by(LANES) {
                    let out = args.delta.add((row + n) * args.delta_stride + column);
                    s.store_to(out, end - column, s.splat(-0.0));
                }
            }
            return;
        };
        let mut column = first;
        while column + 4 * LANES <= end {
            columns::<S, W, N, 4>(s, args, row, &factors, column, 4 * LANES);
            column += 4 * LANES;
        }
        while column < end {
            columns::<S, W, N, 1>(s, args, row, &factors, column, end - column);
            column += LANES;
        }
    }
}

#[inline(always)]
unsafe fn columns<S: Simd, W: Wide, const N: usize, const V: usize>(
    s: S,
    args: &LoraArgs,
    row: usize,
    factors: &Factors,
    column: usize,
    left: usize,
) {
    let mut acc = [[s.zero(); V]; N];
    for rank in 0..factors.rank {
        let from = factors.rows.wrapping_add((rank * factors.stride + args.b) * W::BYTES);
        let mut b = [s.zero(); V];
        for v in 0..V {
            // SAFETY: the caller guarantees `left` elements of B from `column` on, which is `V` vectors if `V` is above 1.
            b[v] = unsafe { W::load(s, from, column + v * LANES, left - v * LANES) };
        }
        for n in 0..N {
            // SAFETY: the caller guarantees the rank's values of `t`.
            let t = s.splat(unsafe { *args.t.add((row + n) * args.t_stride + rank) });
            for v in 0..V {
                acc[n][v] = s.fma(t, b[v], acc[n][v]);
            }
        }
    }
    for n in 0..N {
        for v in 0..V {
            // SAFETY: the caller guarantees `left` more values of the row.
            unsafe {
                let out = args.delta.add((row + n) * args.delta_stride + column + v * LANES);
                s.store_to(out, left - v * LANES, acc[n][v]);
            }
        }
    }
}
