//! The microkernels: raw accumulators of a block of rows by one or several panels.
//!
//! Numeric contract: an accumulator starts at zero and takes `fma(x[k], w[k], acc)` for k = 0, 1, 2, ... in order, in
//! f32; where both operands are rounded to bf16, for k = 1, 0, 3, 2, ... (the order of `vdpbf16ps`, see `dot.rs`). Every
//! instance, of every instruction set, gives the same bits.

use std::marker::PhantomData;

use super::pack::{WeightType, panel_columns};
use super::precision::Products;
use crate::isa::{Kernel, LANES, Simd};

/// One call of a microkernel.
pub(super) struct BlockArgs {
    /// `ROWS` rows of `k` values, `ldx` values apart.
    pub x: *const f32,
    pub ldx: usize,
    /// The first of `PANELS` consecutive packed panels.
    pub w: *const u8,
    pub panel_bytes: usize,
    pub k: usize,
    /// `[ROWS][PANELS * NR]` values, written.
    pub acc: *mut f32,
}

/// How a packed row of 32-bit words becomes f32 values.
pub(super) trait Weight: Copy + 'static {
    const DTYPE: WeightType;
    const NAME: &'static str;
    const PRODUCTS: Products = Products::F32;
    /// Consecutive k per word: 1 or 2.
    const INPUTS: usize;
    /// Which of a word's k is added first.
    const FIRST: usize = 0;

    /// Value `part < INPUTS` of each of 16 words.
    ///
    /// # Safety
    /// `words` is valid for reads of 64 bytes.
    unsafe fn widen<S: Simd>(s: S, words: *const u8, part: usize) -> S::V;
}

/// f32 weights.
#[derive(Clone, Copy)]
pub(super) struct F32;

impl Weight for F32 {
    const DTYPE: WeightType = WeightType::F32;
    const NAME: &'static str = "f32";
    const INPUTS: usize = 1;

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, words: *const u8, _part: usize) -> S::V {
        // SAFETY: the caller guarantees 16 readable words.
        unsafe { s.load(words.cast()) }
    }
}

/// bf16 weights, widened in registers.
#[derive(Clone, Copy)]
pub(super) struct Bf16;

impl Weight for Bf16 {
    const DTYPE: WeightType = WeightType::Bf16;
    const NAME: &'static str = "bf16";
    const INPUTS: usize = 2;

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, words: *const u8, part: usize) -> S::V {
        // SAFETY: the caller guarantees 16 readable words.
        let bits = unsafe { s.iload(words.cast()) };
        s.with_bits(if part == 0 { s.ishl(bits, 16) } else { s.iand(bits, s.isplat(!0xffff)) })
    }
}

/// bf16 weights, widened in registers, for rows rounded to bf16.
#[derive(Clone, Copy)]
pub(super) struct RoundedBf16;

impl Weight for RoundedBf16 {
    const DTYPE: WeightType = WeightType::Bf16;
    const NAME: &'static str = "bf16xbf16";
    const PRODUCTS: Products = Products::Bf16Fma;
    const INPUTS: usize = 2;
    const FIRST: usize = 1;

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, words: *const u8, part: usize) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { Bf16::widen(s, words, part) }
    }
}

/// f16 weights, widened in registers.
#[derive(Clone, Copy)]
pub(super) struct F16;

impl Weight for F16 {
    const DTYPE: WeightType = WeightType::F16;
    const NAME: &'static str = "f16";
    const INPUTS: usize = 2;

    #[inline(always)]
    unsafe fn widen<S: Simd>(s: S, words: *const u8, part: usize) -> S::V {
        // SAFETY: the caller guarantees 16 readable words.
        let bits = unsafe { s.iload(words.cast()) };
        let high = if part == 0 { s.ishl(bits, 16) } else { bits };
        // Sign, exponent and fraction in f32's places; the product corrects the exponent's bias, exactly.
        let placed = s.iand(s.isar(high, 3), s.isplat(0x8fff_e000_u32 as i32));
        let value = s.mul(s.with_bits(placed), s.splat(f32::from_bits(0x7780_0000)));
        let special = s.le(s.splat(65_536.0), s.abs(value));
        s.select(special, s.with_bits(s.ior(s.bits(value), s.isplat(0x7f80_0000))), value)
    }
}

/// `ROWS` rows by `PANELS` panels of weights `W`.
pub(super) struct Block<W, const ROWS: usize, const PANELS: usize>(PhantomData<W>);

impl<W: Weight, const ROWS: usize, const PANELS: usize> Kernel for Block<W, ROWS, PANELS> {
    type Args = BlockArgs;
    const OP: &'static str = "linear";
    const DTYPES: &'static str = W::NAME;
    const VARIANT: &'static str = VARIANTS[PANELS - 1][ROWS - 1];

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &BlockArgs, _tile: usize) {
        // SAFETY: the caller guarantees the operands of `BlockArgs`.
        unsafe {
            if panel_columns(S::ISA) == 2 * LANES {
                accumulate::<S, W, ROWS, PANELS, 2>(s, args);
            } else {
                accumulate::<S, W, ROWS, PANELS, 1>(s, args);
            }
        }
    }
}

pub(super) const VARIANTS: [[&str; 14]; 4] = [
    [
        "1x1p", "2x1p", "3x1p", "4x1p", "5x1p", "6x1p", "7x1p", "8x1p", "9x1p", "10x1p", "11x1p", "12x1p",
        "13x1p", "14x1p",
    ],
    [
        "1x2p", "2x2p", "3x2p", "4x2p", "5x2p", "6x2p", "7x2p", "8x2p", "9x2p", "10x2p", "11x2p", "12x2p",
        "13x2p", "14x2p",
    ],
    [
        "1x3p", "2x3p", "3x3p", "4x3p", "5x3p", "6x3p", "7x3p", "8x3p", "9x3p", "10x3p", "11x3p", "12x3p",
        "13x3p", "14x3p",
    ],
    [
        "1x4p", "2x4p", "3x4p", "4x4p", "5x4p", "6x4p", "7x4p", "8x4p", "9x4p", "10x4p", "11x4p", "12x4p",
        "13x4p", "14x4p",
    ],
];

/// Variants of a panel's first half.
pub(super) const HALVES: [&str; 14] =
    ["1xh", "2xh", "3xh", "4xh", "5xh", "6xh", "7xh", "8xh", "9xh", "10xh", "11xh", "12xh", "13xh", "14xh"];

/// Rows per base pointer: the rows of a group are reached with scaled indices of one stride register.
pub(super) const GROUP: usize = 3;
pub(super) const GROUPS: usize = 5;

/// Hides a value's origin from the optimiser, so that multiples of the stride stay addressing modes instead of
/// becoming one pointer per row, for which there are not enough registers.
#[inline(always)]
pub(super) fn opaque(value: usize) -> usize {
    #[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)))]
    let value = {
        let mut value = value;
        // SAFETY: no instruction is emitted.
        unsafe {
            std::arch::asm!("/* {0} */", inout(reg) value, options(pure, nomem, nostack, preserves_flags));
        }
        value
    };
    value
}

/// Repeats the body for each row, as straight code: the optimiser gives up on unrolling loops of this size, and
/// accumulators that a loop variable indexes stay in memory.
macro_rules! for_each_row {
    ($row:ident in $rows:ident $body:block) => {
        for_each_row!(@ $row $rows $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13)
    };
    (@ $row:ident $rows:ident $body:block $($index:literal)*) => {$(
        if $index < $rows {
            let $row: usize = $index;
            $body
        }
    )*};
}

pub(super) use for_each_row;

pub(super) struct Operands<const PANELS: usize> {
    pub rows: [*const f32; GROUPS],
    pub panels: [*const u8; PANELS],
}

#[inline(always)]
unsafe fn accumulate<S: Simd, W: Weight, const ROWS: usize, const PANELS: usize, const VECS: usize>(
    s: S,
    args: &BlockArgs,
) {
    const { assert!(ROWS <= GROUP * GROUPS) };
    let word_bytes = VECS * LANES * 4;
    let mut acc = [[[s.zero(); VECS]; PANELS]; ROWS];
    let mut at = Operands::<PANELS> { rows: [args.x; GROUPS], panels: [args.w; PANELS] };
    for group in 0..GROUPS.min(ROWS.div_ceil(GROUP)) {
        at.rows[group] = args.x.wrapping_add(opaque(group * GROUP * args.ldx));
    }
    for panel in 0..PANELS {
        at.panels[panel] = args.w.wrapping_add(opaque(panel * args.panel_bytes));
    }
    let words = args.k / W::INPUTS;
    // While more than AHEAD rows are left, the prefetch stays in the panel; the last rows fetch the next panels' first.
    let near = if PANELS == 1 { 0 } else { words.saturating_sub(AHEAD) };
    let stride = args.ldx;
    // SAFETY: the caller guarantees ROWS rows of k values and PANELS panels of `k / INPUTS` rows, rounded up; the
    // pointers advance by as many words and inputs as have been read.
    unsafe {
        let ahead = AHEAD * word_bytes;
        if PANELS > 1 {
            run_words::<S, W, ROWS, PANELS, VECS, VECS>(s, &mut acc, &mut at, stride, near, ahead);
        }
        let ahead = (PANELS - 1) * args.panel_bytes + ahead;
        run_words::<S, W, ROWS, PANELS, VECS, VECS>(s, &mut acc, &mut at, stride, words - near, ahead);
        if !args.k.is_multiple_of(W::INPUTS) {
            step::<S, W, ROWS, PANELS, VECS, VECS>(s, &mut acc, &at, stride, 0, 0);
        }
        for_each_row!(row in ROWS {
            for panel in 0..PANELS {
                for vec in 0..VECS {
                    let column = (row * PANELS + panel) * VECS + vec;
                    s.store(args.acc.add(column * LANES), acc[row][panel][vec]);
                }
            }
        });
    }
}

/// Packed rows between the row being read and the row being prefetched.
pub(super) const AHEAD: usize = 16;

/// Advances over `words` packed rows that are `PITCH` vectors apart, of which the first `VECS` are read.
#[inline(always)]
pub(super) unsafe fn run_words<
    S: Simd,
    W: Weight,
    const ROWS: usize,
    const PANELS: usize,
    const VECS: usize,
    const PITCH: usize,
>(
    s: S,
    acc: &mut [[[S::V; VECS]; PANELS]; ROWS],
    at: &mut Operands<PANELS>,
    stride: usize,
    words: usize,
    ahead: usize,
) {
    let word_bytes = PITCH * LANES * 4;
    let unroll = 2;
    let mut left = words;
    // SAFETY: the caller guarantees `words` more packed rows and `words * INPUTS` more values of each row.
    unsafe {
        while left >= unroll {
            let stride = opaque(stride);
            step_and_fetch::<S, W, ROWS, PANELS, VECS, PITCH>(s, acc, at, stride, 0, ahead);
            step_and_fetch::<S, W, ROWS, PANELS, VECS, PITCH>(s, acc, at, stride, 1, ahead);
            advance::<PANELS>(at, unroll * W::INPUTS, unroll * word_bytes);
            left -= unroll;
        }
        while left > 0 {
            let stride = opaque(stride);
            step_and_fetch::<S, W, ROWS, PANELS, VECS, PITCH>(s, acc, at, stride, 0, ahead);
            advance::<PANELS>(at, W::INPUTS, word_bytes);
            left -= 1;
        }
    }
}

/// All k of packed row `word`, and the prefetch of the row `ahead` bytes after it.
#[inline(always)]
unsafe fn step_and_fetch<
    S: Simd,
    W: Weight,
    const ROWS: usize,
    const PANELS: usize,
    const VECS: usize,
    const PITCH: usize,
>(
    s: S,
    acc: &mut [[[S::V; VECS]; PANELS]; ROWS],
    at: &Operands<PANELS>,
    stride: usize,
    word: usize,
    ahead: usize,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        step::<S, W, ROWS, PANELS, VECS, PITCH>(s, acc, at, stride, word, W::FIRST);
        if W::INPUTS == 2 {
            step::<S, W, ROWS, PANELS, VECS, PITCH>(s, acc, at, stride, word, 1 - W::FIRST);
        }
    }
    fetch::<S, PANELS, VECS>(s, at, word * PITCH * LANES * 4 + ahead);
}

/// One k: value `part` of packed row `word` from where the operands are.
#[inline(always)]
unsafe fn step<
    S: Simd,
    W: Weight,
    const ROWS: usize,
    const PANELS: usize,
    const VECS: usize,
    const PITCH: usize,
>(
    s: S,
    acc: &mut [[[S::V; VECS]; PANELS]; ROWS],
    at: &Operands<PANELS>,
    stride: usize,
    word: usize,
    part: usize,
) {
    let mut b = [[s.zero(); VECS]; PANELS];
    for panel in 0..PANELS {
        for vec in 0..VECS {
            let words = at.panels[panel].wrapping_add((word * PITCH + vec) * LANES * 4);
            // SAFETY: the caller guarantees that packed row `word` is in the panel.
            b[panel][vec] = unsafe { W::widen(s, words, part) };
        }
    }
    for_each_row!(row in ROWS {
        let base = at.rows[row / GROUP].wrapping_add(row % GROUP * stride);
        // SAFETY: the caller guarantees that the row has this value.
        let a = s.splat(unsafe { *base.wrapping_add(word * W::INPUTS + part) });
        for panel in 0..PANELS {
            for vec in 0..VECS {
                acc[row][panel][vec] = s.fma(a, b[panel][vec], acc[row][panel][vec]);
            }
        }
    });
}

#[inline(always)]
fn fetch<S: Simd, const PANELS: usize, const VECS: usize>(s: S, at: &Operands<PANELS>, bytes: usize) {
    for panel in 0..PANELS {
        for vec in 0..VECS {
            s.prefetch(at.panels[panel].wrapping_add(bytes + vec * LANES * 4));
        }
    }
}

#[inline(always)]
fn advance<const PANELS: usize>(at: &mut Operands<PANELS>, inputs: usize, bytes: usize) {
    for row in &mut at.rows {
        *row = row.wrapping_add(inputs);
    }
    for panel in &mut at.panels {
        *panel = panel.wrapping_add(bytes);
    }
}
