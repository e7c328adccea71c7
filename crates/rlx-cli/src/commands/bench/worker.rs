//! `rlx bench --worker`: the line protocol of `benches/peers/worker.py`.

use super::measure::EmbedRun;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output;
use rlx::memory::{MemoryProbe, SystemProbe};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::BufRead as _;
use std::time::Instant;

#[derive(Debug, Deserialize)]
struct Request {
    batch: usize,
    seq: usize,
    n: usize,
}

#[derive(Debug, Serialize)]
struct Answer {
    name: &'static str,
    version: &'static str,
    threads: usize,
    batch: usize,
    seq: usize,
    ms: Vec<f64>,
    /// The first values of the first row.
    first: Vec<f32>,
    sum: f64,
    mean_abs: f64,
    rss_mb: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Refusal {
    name: &'static str,
    error: String,
}

/// Rows of a request: a bound on what one line can make the process allocate.
const MOST_ROWS: usize = 1 << 20;
const MOST_RUNS: usize = 100_000;

/// Answers until the end of input.
pub fn serve(engine: &Engine, threads: usize) -> Result<()> {
    let mut ready = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line =
            line.map_err(|error| Failure::new(error, "standard input", "send one JSON object a line"))?;
        if line.trim().is_empty() {
            continue;
        }
        match answer(&line, engine, threads, &mut ready) {
            Ok(answer) => output::print_json(&answer)?,
            Err(error) => output::print_json(&Refusal { name: "rlx", error })?,
        }
    }
    Ok(())
}

fn answer(
    line: &str,
    engine: &Engine,
    threads: usize,
    ready: &mut HashMap<(usize, usize), EmbedRun>,
) -> std::result::Result<Answer, String> {
    let Request { batch, seq, n } = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let rows = batch.checked_mul(seq).filter(|&rows| rows > 0 && rows <= MOST_ROWS);
    let limit = engine.model.context_limit();
    if rows.is_none() || seq > limit || n == 0 || n > MOST_RUNS {
        return Err(format!(
            "expected batch and seq of at least 1 with at most {MOST_ROWS} tokens, seq at most {limit}, n from 1 to {MOST_RUNS}"
        ));
    }
    let run = match ready.entry((batch, seq)) {
        std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
        std::collections::hash_map::Entry::Vacant(entry) => {
            entry.insert(EmbedRun::new(engine, batch, seq).map_err(|failure| failure.to_string())?)
        }
    };
    let mut ms = Vec::with_capacity(n);
    for _ in 0..n {
        let started = Instant::now();
        run.run().map_err(|failure| failure.to_string())?;
        ms.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let (mut first, mut sum, mut sum_abs, mut count) = (Vec::new(), 0.0, 0.0, 0usize);
    run.run_with(|hidden| {
        if first.is_empty() {
            first = hidden.iter().take(8).copied().collect();
        }
        sum += hidden.iter().map(|&value| f64::from(value)).sum::<f64>();
        sum_abs += hidden.iter().map(|&value| f64::from(value.abs())).sum::<f64>();
        count += hidden.len();
    })
    .map_err(|failure| failure.to_string())?;
    Ok(Answer {
        name: "rlx",
        version: env!("CARGO_PKG_VERSION"),
        threads,
        batch,
        seq,
        ms,
        first,
        sum,
        mean_abs: sum_abs / count.max(1) as f64,
        rss_mb: SystemProbe.peak_rss_bytes().map(|bytes| bytes as f64 / (1u64 << 20) as f64),
    })
}
