//! The backends a test runs on.

use rlx::Session;
use rlx::backend::cpu::CpuBackend;
use rlx_kernels::isa::Isa;
use std::sync::Arc;

/// A session on the CPU.
pub fn cpu(isa: Isa, threads: usize) -> Session {
    Session::with_backend(Arc::new(CpuBackend::new(isa, threads)))
}

/// Numbers between -1 and 1 that only depend on the seed.
pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}
