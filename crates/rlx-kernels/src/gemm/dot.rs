//! The microkernels of `vdpbf16ps`: raw accumulators of a block of rows by one or several panels.
//!
//! Numeric contract: an accumulator starts at zero and takes, for each pair of consecutive k in order, the product of the
//! second k and then that of the first, each added with one rounding; denormals, operands and sums, count as zero. The second of
//! the last pair of an odd k is zero.

use std::arch::x86_64::*;

use super::block::{BlockArgs, for_each_row};
use crate::isa::LANES;

/// Vectors of a panel's packed row.
const VECS: usize = 2;

/// Bytes of a packed row of words.
const WORD_BYTES: usize = VECS * LANES * 4;

/// Packed rows between the row being read and the row being prefetched.
const AHEAD: usize = 16;

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn pairs(words: __m512i) -> __m512bh {
    // SAFETY: equal sizes, and every bit pattern is a value.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

/// `ROWS` rows by `PANELS` panels. `args.x` are pairs of bf16, `ldx` pairs from row to row.
///
/// # Safety
/// The operands are as [`BlockArgs`] says and the machine has the features.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn dot_block<const ROWS: usize, const PANELS: usize>(args: &BlockArgs, _tile: usize) {
    let mut acc = [[[_mm512_setzero_ps(); VECS]; PANELS]; ROWS];
    let words = args.k.div_ceil(2);
    // With several panels the fetch stays in the panel: what follows it belongs to the next one, which is being read.
    let last = if PANELS == 1 { usize::MAX } else { words };
    for word in 0..words {
        let mut b = [[pairs(_mm512_setzero_si512()); VECS]; PANELS];
        for panel in 0..PANELS {
            let row = args.w.wrapping_add(panel * args.panel_bytes + word * WORD_BYTES);
            for vec in 0..VECS {
                let at = row.wrapping_add(vec * LANES * 4);
                // SAFETY: the caller guarantees `ceil(k / 2)` packed rows in every panel; a prefetch may name any address.
                unsafe {
                    b[panel][vec] = pairs(_mm512_loadu_si512(at.cast()));
                    if word + AHEAD < last {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD * WORD_BYTES).cast());
                    }
                }
            }
        }
        for_each_row!(row in ROWS {
            // SAFETY: the caller guarantees `ceil(k / 2)` pairs of every row.
            let pair = unsafe { *args.x.wrapping_add(row * args.ldx + word).cast::<i32>() };
            let a = pairs(_mm512_set1_epi32(pair));
            for panel in 0..PANELS {
                for vec in 0..VECS {
                    acc[row][panel][vec] = _mm512_dpbf16_ps(acc[row][panel][vec], a, b[panel][vec]);
                }
            }
        });
    }
    for_each_row!(row in ROWS {
        for panel in 0..PANELS {
            for vec in 0..VECS {
                let column = (row * PANELS + panel) * VECS + vec;
                // SAFETY: the caller guarantees `ROWS` rows of as many accumulators as the panels have columns.
                unsafe { _mm512_storeu_ps(args.acc.add(column * LANES), acc[row][panel][vec]) };
            }
        }
    });
}
