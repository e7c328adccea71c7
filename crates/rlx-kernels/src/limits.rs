//! What this machine can do at most, measured: the scale that kernel figures are read against.

mod dot;

pub use dot::{DotKind, dot_ops};

use rlx_tensor::time::Instant;
use std::hint::black_box;
use std::time::Duration;

use crate::aligned::AlignedBuf;
use crate::isa::{Entry, Isa, Kernel, LANES, Simd, entry};
use crate::pool::Pool;

struct FmaPeak;

struct FmaArgs {
    rounds: usize,
    sink: *mut f32,
}

/// Vectors in flight: enough to cover the latency on every instruction set without running out of registers.
const fn chains(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 12,
        _ => 6,
    }
}

#[inline(always)]
unsafe fn fma_chains<S: Simd, const CHAINS: usize>(s: S, args: &FmaArgs) {
    let (a, b) = (s.splat(black_box(0.999)), s.splat(black_box(1e-3)));
    let mut acc = [s.zero(); CHAINS];
    for _ in 0..args.rounds {
        for _ in 0..4 {
            for chain in &mut acc {
                *chain = s.fma(*chain, a, b);
            }
        }
    }
    let mut sum = s.zero();
    for chain in acc {
        sum = s.add(sum, chain);
    }
    // SAFETY: the caller guarantees 16 writable values.
    unsafe { s.store(args.sink, sum) };
}

impl Kernel for FmaPeak {
    type Args = FmaArgs;
    const OP: &'static str = "fma_peak";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &FmaArgs, _tile: usize) {
        // SAFETY: the caller guarantees the sink.
        unsafe {
            if chains(S::ISA) == 12 {
                fma_chains::<S, 12>(s, args);
            } else {
                fma_chains::<S, 6>(s, args);
            }
        }
    }
}

struct Read;

struct ReadArgs {
    start: *const f32,
    /// Values, a multiple of 128.
    len: usize,
    sink: *mut f32,
}

/// Streams read side by side: prefetchers follow several at once faster than one.
const STREAMS: usize = 4;

impl Kernel for Read {
    type Args = ReadArgs;
    const OP: &'static str = "read";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &ReadArgs, _tile: usize) {
        let mut acc = [s.zero(); STREAMS];
        let each = args.len / STREAMS;
        let mut at = 0;
        // SAFETY: the caller guarantees `len` readable and 16 writable values.
        unsafe {
            while at < each {
                for (stream, acc) in acc.iter_mut().enumerate() {
                    let p = args.start.add(stream * each + at);
                    s.prefetch(p.wrapping_add(512).cast());
                    s.prefetch(p.wrapping_add(512 + LANES).cast());
                    *acc = s.add(*acc, s.add(s.load(p), s.load(p.add(LANES))));
                }
                at += 2 * LANES;
            }
            let sum = s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3]));
            s.store(args.sink, sum);
        }
    }
}

/// The time of the fastest of several calls: what the machine does when nothing disturbs it.
fn fastest(calls: usize, mut call: impl FnMut()) -> Duration {
    let time = |_| {
        let start = Instant::now();
        call();
        start.elapsed()
    };
    (0..calls).map(time).min().unwrap_or_default()
}

/// Multiply-adds per second, counted as two operations each, that all workers of the pool reach together on registers.
///
/// Takes some milliseconds. `None` if the machine lacks the instruction set.
pub fn fma_flops(pool: &Pool, isa: Isa) -> Option<f64> {
    fma_rate(pool, isa, 40)
}

/// As [`fma_flops`], of the fastest of `calls` runs of less than a millisecond.
pub fn fma_rate(pool: &Pool, isa: Isa, calls: usize) -> Option<f64> {
    let kernel: Entry<FmaArgs> = entry::<FmaPeak>(isa).filter(|_| isa.is_available())?;
    let rounds = if isa == Isa::Scalar { 1_000 } else { 10_000 };
    let per_round = 4 * chains(isa) * LANES * 2;
    Some(chain_rate(pool, kernel, rounds, per_round, calls))
}

fn chain_rate(pool: &Pool, kernel: Entry<FmaArgs>, rounds: usize, per_round: usize, calls: usize) -> f64 {
    let time = fastest(calls, || {
        pool.run(|_| {
            let mut sink = [0.0f32; LANES];
            // SAFETY: the sink has 16 values; callers pass kernels of instruction sets that are available.
            unsafe { kernel(&FmaArgs { rounds, sink: sink.as_mut_ptr() }, 0) };
            black_box(sink);
        });
    });
    (pool.threads() * rounds * per_round) as f64 / time.as_secs_f64()
}

/// Bytes per second that all workers together read from a buffer of `bytes` bytes (rounded down to 64 KiB), each
/// its own part, repeatedly: the limit of a matrix-vector product over weights of that size.
///
/// `None` if the machine lacks the instruction set or the buffer cannot be had.
pub fn read_rate(pool: &Pool, isa: Isa, bytes: usize) -> Option<f64> {
    let reader = Reader::new(isa, bytes)?;
    let calls = (1 << 30) / bytes.max(1 << 20);
    Some(reader.rate(pool, calls.clamp(3, 50)))
}

/// A buffer to measure the read rate with.
pub struct Reader {
    kernel: Entry<ReadArgs>,
    buf: AlignedBuf,
}

impl Reader {
    const PIECE: usize = 64 << 10;

    /// A buffer of `bytes` bytes, rounded down to 64 KiB; `None` as for [`read_rate`].
    pub fn new(isa: Isa, bytes: usize) -> Option<Reader> {
        let kernel: Entry<ReadArgs> = entry::<Read>(isa).filter(|_| isa.is_available())?;
        let mut buf = AlignedBuf::zeroed((bytes / Self::PIECE).max(1) * Self::PIECE)?;
        buf.bytes_mut().fill(1);
        Some(Reader { kernel, buf })
    }

    /// Bytes per second of the fastest of `calls` passes over the buffer.
    pub fn rate(&self, pool: &Pool, calls: usize) -> f64 {
        let data: &[u8] = self.buf.as_ref();
        let pieces = data.len() / Self::PIECE;
        let time = fastest(calls, || {
            pool.run(|team| {
                let mut sink = [0.0f32; LANES];
                let own = team.index() * pieces / team.count()..(team.index() + 1) * pieces / team.count();
                let own = &data[own.start * Self::PIECE..own.end * Self::PIECE];
                let args =
                    ReadArgs { start: own.as_ptr().cast(), len: own.len() / 4, sink: sink.as_mut_ptr() };
                // SAFETY: the part has `len` values, a multiple of 128, aligned to 64 bytes; the sink has 16.
                unsafe { (self.kernel)(&args, 0) };
                black_box(sink);
            });
        });
        data.len() as f64 / time.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_finite_and_positive() {
        let pool = Pool::new(2);
        for isa in Isa::available() {
            let flops = fma_flops(&pool, isa).expect("available");
            let read = read_rate(&pool, isa, 1 << 20).expect("available");
            assert!(
                flops.is_finite() && flops > 1e6 && read.is_finite() && read > 1e6,
                "{isa} {flops} {read}"
            );
        }
        let features = crate::isa::CpuFeatures::detect();
        for (kind, present) in [(DotKind::Bf16, features.avx512_bf16), (DotKind::Int8, features.avx512_vnni)]
        {
            let rate = dot_ops(&pool, kind);
            assert_eq!(rate.is_some(), present && features.avx512, "{kind:?}");
            assert!(rate.is_none_or(|rate| rate.is_finite() && rate > 1e6), "{kind:?} {rate:?}");
        }
    }
}
