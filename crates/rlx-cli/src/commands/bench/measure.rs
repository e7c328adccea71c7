//! Timings of one case.

use super::super::doctor::Limits;
use super::Work;
use super::runs::{DecodeRun, EmbedRun};
use super::work::{Sequence, attention_flops, cache_bytes, weight_bytes, weight_flops};
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::Result;
use crate::output::StepShare;
use rlx::session::StepTimes;
use rlx_kernels::limits;
use rlx_kernels::pool::Pool;
use serde::Serialize;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub work: Work,
    pub batch: usize,
    pub seq: usize,
    pub ctx: usize,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Row {
    pub work: &'static str,
    pub batch: usize,
    pub seq: usize,
    pub ctx: usize,
    pub median_ms: f64,
    pub p10_ms: f64,
    pub n: usize,
    pub tokens_per_s: f64,
    /// The time at this machine's limit over the median: of the precision's products for embed and prefill, attention in f32 included; of
    /// reading the weights and the cache once for decode, at the rate measured for that many bytes. `null` on a device whose limit is unknown.
    pub fraction_of_limit: Option<f64>,
    /// Where the time goes, if that was asked for; longest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepShare>,
}

/// Time a case gets.
const BUDGET: Duration = Duration::from_millis(800);
const LEAST_RUNS: usize = 5;
const MOST_RUNS: usize = 2000;
/// Runs before the first that is timed.
pub const UNTIMED_RUNS: usize = 2;

/// Measures a case.
pub fn run(
    engine: &Engine,
    case: &Case,
    limits: Option<&Limits>,
    context: &Context,
    steps: bool,
) -> Result<Row> {
    let mut shares = Vec::new();
    let times = match case.work {
        Work::Embed => {
            let mut embedding = EmbedRun::new(engine, case.batch, case.seq)?;
            let times = timed(|| embedding.run())?;
            if steps {
                let counters = embedding.time_steps()?;
                shares = shares_of(|| [&*counters], || embedding.run())?;
            }
            times
        }
        Work::Prefill | Work::Decode => {
            let mut decoding = DecodeRun::new(engine, case.ctx + case.seq)?;
            let tokens = decoding.prompt(case.ctx + case.seq);
            if case.ctx > 0 {
                decoding.read(0, &tokens[..case.ctx])?;
            }
            let times = timed(|| decoding.read(case.ctx, &tokens[case.ctx..]).map(drop))?;
            if steps {
                let counters = decoding.time_steps()?;
                let again = || decoding.read(case.ctx, &tokens[case.ctx..]).map(drop);
                shares = shares_of(|| [&*counters], again)?;
            }
            times
        }
    };
    let median_ms = times[times.len() / 2];
    let tokens = case.batch * case.seq;
    let seconds = median_ms / 1e3;
    let least = limits.map(|limits| seconds_at_limit(engine, case, limits, context)).transpose()?.flatten();
    let fraction_of_limit = least.map(|least| least / seconds);
    Ok(Row {
        work: case.work.name(),
        batch: case.batch,
        seq: case.seq,
        ctx: case.ctx,
        median_ms,
        p10_ms: times[times.len() / 10],
        n: times.len(),
        tokens_per_s: tokens as f64 / seconds,
        fraction_of_limit,
        steps: shares,
    })
}

/// Times the steps over some runs and adds up those of one op and kernel.
pub fn shares_of<'t, I: IntoIterator<Item = &'t StepTimes>>(
    counters: impl FnOnce() -> I,
    run: impl FnMut() -> Result<()>,
) -> Result<Vec<StepShare>> {
    let runs = timed(run)?.len() + UNTIMED_RUNS;
    let mut shares: Vec<StepShare> = Vec::new();
    for (step, time) in counters().into_iter().flat_map(|times| times.steps()) {
        let micros = time.as_secs_f64() * 1e6 / runs as f64;
        match shares.iter_mut().find(|share| share.op == step.op && share.kernel == step.kernel) {
            Some(share) => (share.steps, share.micros) = (share.steps + 1, share.micros + micros),
            None => {
                let (op, kernel) = (step.op.clone(), step.kernel.clone());
                shares.push(StepShare { op, kernel, steps: 1, micros, share: 0.0 });
            }
        }
    }
    let total: f64 = shares.iter().map(|share| share.micros).sum();
    shares.iter_mut().for_each(|share| share.share = share.micros / total.max(f64::MIN_POSITIVE));
    shares.sort_by(|a, b| b.micros.total_cmp(&a.micros));
    Ok(shares)
}

/// The least time that this machine could take.
fn seconds_at_limit(engine: &Engine, case: &Case, limits: &Limits, context: &Context) -> Result<Option<f64>> {
    let (compiled, template) = (engine.model().compiled(), engine.model().compiled().template());
    let precision = engine.model().precision().unwrap_or_default();
    Ok(match case.work {
        Work::Embed | Work::Prefill => {
            let sequences = vec![Sequence { past: case.ctx, rows: case.seq }; case.batch];
            let linear = weight_flops(compiled, case.batch * case.seq)?;
            let attention = attention_flops(template, &sequences);
            let limits = limits.product_flops(precision).zip(limits.f32_flops);
            limits.map(|(products, f32)| linear / products + attention / f32)
        }
        Work::Decode => {
            let bytes =
                weight_bytes(template, precision).map(|bytes| bytes + cache_bytes(template, case.ctx));
            let pool = Pool::new(context.threads());
            let rate = bytes.and_then(|bytes| limits::read_rate(&pool, engine.isa, bytes));
            bytes.zip(rate).map(|(bytes, rate)| bytes as f64 / rate)
        }
    })
}

/// Times in milliseconds, shortest first.
pub fn timed(mut run: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    for _ in 0..UNTIMED_RUNS {
        run()?;
    }
    let (started, mut times) = (Instant::now(), Vec::new());
    while times.len() < LEAST_RUNS || (started.elapsed() < BUDGET && times.len() < MOST_RUNS) {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}
