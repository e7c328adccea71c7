//! `rlx bench --worker`: the line protocol of `benches/peers/worker.py`.

use super::Work;
use super::runs::{DecodeRun, EmbedRun};
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output;
use rlx::memory::{MemoryProbe, SystemProbe};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::BufRead as _;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Debug, Deserialize)]
struct Request {
    work: Option<String>,
    #[serde(default = "one")]
    batch: usize,
    #[serde(default = "one")]
    seq: usize,
    #[serde(default)]
    ctx: usize,
    #[serde(default = "one")]
    steps: usize,
    file: Option<PathBuf>,
    n: usize,
}

fn one() -> usize {
    1
}

#[derive(Debug, Serialize)]
struct Answer {
    name: &'static str,
    version: &'static str,
    threads: usize,
    #[serde(flatten)]
    timings: Timings,
    rss_mb: Option<f64>,
}

#[derive(Debug, Default, Serialize)]
struct Timings {
    ms: Vec<f64>,
    /// The first values of the output.
    first: Vec<f32>,
    mean_abs: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    token_ids: Vec<u32>,
}

#[derive(Debug, Serialize)]
struct Refusal {
    name: &'static str,
    error: String,
}

/// Rows of a request: a bound on what one line can make the process allocate.
const MOST_ROWS: usize = 1 << 20;
const MOST_RUNS: usize = 100_000;
const NAME: &str = "rlx";

/// What was made for earlier requests.
struct Worker<'e> {
    engine: &'e Engine,
    embeds: HashMap<(usize, usize), EmbedRun>,
    texts: HashMap<PathBuf, Vec<String>>,
    /// The last decoder run with its room and what is in its cache.
    decode: Option<(usize, DecodeRun)>,
    filled: usize,
}

/// Answers until the end of input.
pub fn serve(engine: &Engine, threads: usize) -> Result<()> {
    let (embeds, texts) = (HashMap::new(), HashMap::new());
    let mut worker = Worker { engine, embeds, texts, decode: None, filled: 0 };
    for line in std::io::stdin().lock().lines() {
        let line =
            line.map_err(|error| Failure::new(error, "standard input", "send one JSON object a line"))?;
        if line.trim().is_empty() {
            continue;
        }
        match worker.answer(&line) {
            Ok(timings) => output::print_json(&Answer {
                name: NAME,
                version: env!("CARGO_PKG_VERSION"),
                threads,
                timings,
                rss_mb: SystemProbe.peak_rss_bytes().map(|bytes| bytes as f64 / (1u64 << 20) as f64),
            })?,
            Err(error) => output::print_json(&Refusal { name: NAME, error })?,
        }
    }
    Ok(())
}

impl Worker<'_> {
    fn answer(&mut self, line: &str) -> std::result::Result<Timings, String> {
        let request: Request = serde_json::from_str(line).map_err(|error| error.to_string())?;
        request.check(self.engine.model().context_limit())?;
        let done = match request.work.as_deref().unwrap_or(Work::Embed.name()) {
            "embed" => self.embed(&request),
            "texts" => self.texts(&request),
            "prefill" => self.prefill(&request),
            "decode" => self.decode(&request),
            other => return Err(format!("{other}: expected embed, texts, prefill or decode")),
        };
        done.map_err(|failure| failure.to_string())
    }

    fn embed(&mut self, request: &Request) -> Result<Timings> {
        let run = match self.embeds.entry((request.batch, request.seq)) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(EmbedRun::new(self.engine, request.batch, request.seq)?)
            }
        };
        let ms = timed(request.n, || run.run())?;
        let (mut first, mut sum, mut count) = (Vec::new(), 0.0, 0usize);
        run.run_with(|hidden| {
            if first.is_empty() {
                first = first_of(hidden);
            }
            sum += sum_abs(hidden);
            count += hidden.len();
        })?;
        Ok(Timings { ms, first, mean_abs: sum / count.max(1) as f64, ..Timings::default() })
    }

    fn texts(&mut self, request: &Request) -> Result<Timings> {
        let advice = "give a file of texts, one a line";
        let Some(path) = &request.file else {
            return Err(Failure::usage("file is missing", "the request", advice));
        };
        if !self.texts.contains_key(path) {
            let text =
                std::fs::read_to_string(path).map_err(|error| Failure::new(error, path.display(), advice))?;
            self.texts.insert(path.clone(), text.lines().map(str::to_owned).collect());
        }
        let (texts, mut vectors) = (&self.texts[path], Vec::new());
        let ms = timed(request.n, || {
            vectors = self.engine.model().embed(texts)?;
            Ok(())
        })?;
        let values = vectors.iter().map(Vec::len).sum::<usize>().max(1);
        let mean_abs = vectors.iter().map(|vector| sum_abs(vector)).sum::<f64>() / values as f64;
        let first = vectors.first().map_or(Vec::new(), |vector| first_of(vector));
        Ok(Timings { ms, first, mean_abs, ..Timings::default() })
    }

    fn prefill(&mut self, request: &Request) -> Result<Timings> {
        let run = self.room(request.seq)?;
        let prompt = run.prompt(request.seq);
        let ms = timed(request.n, || run.read(0, &prompt).map(drop))?;
        let logits = run.read(0, &prompt)?;
        let (first, mean_abs) = (first_of(logits), sum_abs(logits) / logits.len() as f64);
        self.filled = request.seq;
        Ok(Timings { ms, first, mean_abs, ..Timings::default() })
    }

    fn decode(&mut self, request: &Request) -> Result<Timings> {
        let (ctx, filled) = (request.ctx, self.filled);
        let run = self.room(ctx + request.steps)?;
        let prompt = run.prompt(ctx + 1);
        if filled != ctx {
            run.read(0, &prompt[..ctx])?;
        }
        let mut timings = Timings::default();
        for _ in 0..request.n {
            let (mut token, mut spent) = (prompt[ctx], 0.0);
            timings.token_ids.clear();
            for step in 0..request.steps {
                let started = Instant::now();
                let logits = run.read(ctx + step, &[token])?;
                spent += started.elapsed().as_secs_f64();
                token = likeliest(logits);
                if step == 0 {
                    timings.first = first_of(logits);
                    timings.mean_abs = sum_abs(logits) / logits.len() as f64;
                }
                timings.token_ids.push(token);
            }
            timings.ms.push(spent * 1e3 / request.steps as f64);
        }
        self.filled = ctx;
        Ok(timings)
    }

    /// The decoder run if it has room for these positions, else another.
    fn room(&mut self, positions: usize) -> Result<&mut DecodeRun> {
        let kept = self.decode.take().filter(|(room, _)| *room == positions);
        if kept.is_none() {
            self.filled = 0;
        }
        let (_, run) = match kept {
            Some(kept) => self.decode.insert(kept),
            None => self.decode.insert((positions, DecodeRun::new(self.engine, positions)?)),
        };
        Ok(run)
    }
}

impl Request {
    fn check(&self, limit: usize) -> std::result::Result<(), String> {
        let rows = self.batch.checked_mul(self.seq).filter(|&rows| rows > 0 && rows <= MOST_ROWS);
        let positions = self.ctx.checked_add(self.steps).filter(|&positions| positions <= limit);
        let runs = (1..=MOST_RUNS).contains(&self.n) && self.steps > 0;
        if rows.is_none() || positions.is_none() || self.seq > limit || !runs {
            return Err(format!(
                "expected batch, seq and steps of at least 1 with at most {MOST_ROWS} tokens, seq and ctx + steps at most {limit}, n from 1 to {MOST_RUNS}"
            ));
        }
        Ok(())
    }
}

fn timed(n: usize, mut run: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut ms = Vec::with_capacity(n);
    for _ in 0..n {
        let started = Instant::now();
        run()?;
        ms.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(ms)
}

fn first_of(values: &[f32]) -> Vec<f32> {
    values.iter().take(8).copied().collect()
}

fn sum_abs(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value.abs())).sum()
}

/// The first of the greatest values.
fn likeliest(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
    best as u32
}
