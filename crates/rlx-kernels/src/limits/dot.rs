//! Peaks of the instructions that multiply narrow operands and add in 32 bits.

#[cfg(target_arch = "x86_64")]
use std::hint::black_box;

use super::fastest;
use crate::isa::CpuFeatures;
use crate::pool::Pool;

/// A dot-product instruction on 512 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DotKind {
    /// `vdpbf16ps`: 32 products of bf16, added in f32.
    Bf16,
    /// `vpdpbusd`: 64 products of bytes, added in i32.
    Int8,
}

const CHAINS: usize = 12;
const ROUNDS: usize = 10_000;

/// Operations per second, a product and its addition counted as two, that all workers of the pool reach together on registers.
///
/// Takes some milliseconds. `None` if the machine lacks the instruction.
pub fn dot_ops(pool: &Pool, kind: DotKind) -> Option<f64> {
    let features = CpuFeatures::detect();
    let (present, products) = match kind {
        DotKind::Bf16 => (features.avx512_bf16, 32),
        DotKind::Int8 => (features.avx512_vnni, 64),
    };
    if !(present && features.avx512) {
        return None;
    }
    let time = fastest(40, || pool.run(|_| run(kind)));
    Some((pool.threads() * ROUNDS * 4 * CHAINS * products * 2) as f64 / time.as_secs_f64())
}

#[cfg(target_arch = "x86_64")]
fn run(kind: DotKind) {
    // SAFETY: `dot_ops` calls this only where the machine has AVX-512 and the instruction.
    unsafe {
        match kind {
            DotKind::Bf16 => x86::bf16(),
            DotKind::Int8 => x86::int8(),
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn run(_: DotKind) {}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHAINS, ROUNDS, black_box};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16() {
        let halves = _mm512_set1_ps(black_box(0.5));
        let operand = _mm512_cvtne2ps_pbh(halves, halves);
        let mut acc = black_box([_mm512_setzero_ps(); CHAINS]);
        for _ in 0..ROUNDS * 4 {
            for chain in &mut acc {
                *chain = _mm512_dpbf16_ps(*chain, operand, operand);
            }
        }
        black_box(acc.map(|chain| _mm512_reduce_add_ps(chain)));
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8() {
        let operand = _mm512_set1_epi8(black_box(1));
        let mut acc = black_box([_mm512_setzero_si512(); CHAINS]);
        for _ in 0..ROUNDS * 4 {
            for chain in &mut acc {
                *chain = _mm512_dpbusd_epi32(*chain, operand, operand);
            }
        }
        black_box(acc.map(|chain| _mm512_reduce_add_epi32(chain)));
    }
}
