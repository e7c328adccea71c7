//! `rlx bench`.

pub mod measure;
mod runs;
mod work;
mod worker;

use super::doctor::Limits;
use super::onnx;
use super::sizes::Sizes;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output::{self, Devices};
use clap::ValueEnum;
use measure::{Case, Row};
use rlx::devices::DeviceId;
use rlx::memory::{MemoryProbe, SystemProbe};
use rlx_models::Built;
use serde::Serialize;
use std::num::NonZeroUsize;

/// Measure a model's throughput and how much of this machine's limits it reaches
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF or ONNX file, or hub name in the local cache [default: the built-in demo]
    model: Option<String>,
    /// Sequences at once
    #[arg(short, long, value_name = "N")]
    batch: Option<NonZeroUsize>,
    /// Tokens of a sequence
    #[arg(short, long, value_name = "N")]
    seq: Option<NonZeroUsize>,
    /// Tokens already in the cache when decoding
    #[arg(short, long, value_name = "N")]
    ctx: Option<NonZeroUsize>,
    /// Measure only this
    #[arg(short, long)]
    work: Option<Work>,
    /// Say where the time goes, step by step
    #[arg(long)]
    steps: bool,
    #[command(flatten)]
    sizes: Sizes,
    /// Answer requests for timings on standard input, one JSON object a line
    #[arg(long)]
    worker: bool,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Texts to vectors.
    Embed,
    /// Reading a prompt.
    Prefill,
    /// One token after another.
    Decode,
}

impl Work {
    /// The word in JSON output.
    pub fn name(self) -> &'static str {
        match self {
            Work::Embed => "embed",
            Work::Prefill => "prefill",
            Work::Decode => "decode",
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    threads: usize,
    isa: &'static str,
    precision: Option<&'static str>,
    #[serde(flatten)]
    devices: Devices,
    /// Of the CPU; not measured where the model runs elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<Limits>,
    rows: Vec<Row>,
    peak_rss_bytes: Option<u64>,
    load_ms: f64,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let given = [
            ("--batch", self.batch.is_some()),
            ("--seq", self.seq.is_some()),
            ("--ctx", self.ctx.is_some()),
            ("--work", self.work.is_some()),
            ("--worker", self.worker),
        ];
        if let Some(file) = self.sizes.onnx_file(self.model.as_deref(), &given)? {
            return onnx::bench(&file, &self.sizes, self.steps, context);
        }
        let mut engine = Engine::open_fastest(self.model.as_deref(), context)?;
        let cases = self.cases(&engine)?;
        engine.load(context)?;
        if self.worker {
            return worker::serve(&engine, context.threads());
        }
        let isa = context.isa()?;
        let on_cpu = engine.devices.device() == DeviceId::CPU;
        let limits = on_cpu.then(|| Limits::measure(isa, context.threads()));
        let mut rows = Vec::new();
        for case in &cases {
            context.detail(format!("measuring {case:?}"));
            rows.push(measure::run(&engine, case, limits.as_ref(), context, self.steps)?);
        }
        let report = Report {
            threads: context.threads(),
            isa: isa.name(),
            devices: Devices::of(&engine.devices),
            precision: engine.model().precision().map(|precision| precision.name()),
            limits,
            rows,
            peak_rss_bytes: SystemProbe.peak_rss_bytes(),
            load_ms: engine.load_ms,
        };
        if context.shared.json {
            return output::print_json(&report);
        }
        output::print(&text(&report))
    }

    /// The rows to measure: what the arguments say, else a few that are usual for the kind of model.
    fn cases(&self, engine: &Engine) -> Result<Vec<Case>> {
        let encoder = matches!(engine.model().built(), Built::Encoder(_));
        let fits = |work: &Work| (*work == Work::Embed) == encoder;
        let works: Vec<Work> = match self.work {
            Some(work) if !fits(&work) => {
                let advice = if encoder { "--work embed" } else { "--work prefill or --work decode" };
                let what = format!("this model does not {}", work.name());
                return Err(Failure::usage(what, "--work", advice));
            }
            Some(work) => vec![work],
            None => [Work::Embed, Work::Prefill, Work::Decode].into_iter().filter(fits).collect(),
        };
        if !encoder && self.batch.is_some_and(|batch| batch.get() > 1) {
            let advice = "leave --batch out: this build runs a decoder on one sequence at a time";
            return Err(Failure::usage(
                "--batch above 1 with a model that continues text",
                "--batch",
                advice,
            ));
        }
        let limit = engine.model().context_limit();
        let chosen = self.batch.is_some() || self.seq.is_some();
        let (batch, seq) = (self.batch.map_or(1, usize::from), self.seq.map(usize::from));
        let ctx = self.ctx.map_or(limit.saturating_sub(1).min(128), usize::from);
        let mut cases = Vec::new();
        for work in works {
            let usual: &[(usize, usize)] = match work {
                Work::Embed if !chosen => &[(1, 16), (1, 128), (32, 128)],
                _ => &[(0, 0)],
            };
            for &(usual_batch, usual_seq) in usual {
                let case = match work {
                    Work::Decode => Case { work, batch: 1, seq: 1, ctx },
                    Work::Embed if !chosen => {
                        Case { work, batch: usual_batch, seq: usual_seq.min(limit), ctx: 0 }
                    }
                    _ => Case { work, batch, seq: seq.unwrap_or(128.min(limit)), ctx: 0 },
                };
                if case.seq + case.ctx > limit {
                    let what = format!("{} tokens are more than the model's {limit}", case.seq + case.ctx);
                    return Err(Failure::usage(what, "--seq and --ctx", "choose fewer tokens"));
                }
                cases.push(case);
            }
        }
        Ok(cases)
    }
}

fn text(report: &Report) -> String {
    let header = ["work", "batch", "seq", "ctx", "median ms", "p10 ms", "n", "tokens/s", "of limit"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for row in &report.rows {
        let fraction = row.fraction_of_limit.map_or("unknown".to_owned(), |f| format!("{:.0}%", f * 100.0));
        let [batch, seq, ctx, n] = [row.batch, row.seq, row.ctx, row.n].map(|number| number.to_string());
        let [median, p10] = [row.median_ms, row.p10_ms].map(|ms| format!("{ms:.3}"));
        let rate = format!("{:.0}", row.tokens_per_s);
        rows.push(vec![row.work.to_owned(), batch, seq, ctx, median, p10, n, rate, fraction]);
    }
    let mut text = output::table(&rows);
    for row in report.rows.iter().filter(|row| !row.steps.is_empty()) {
        text.push_str(&format!("\n{} {} x {}, context {}:\n", row.work, row.batch, row.seq, row.ctx));
        text.push_str(&output::steps_table(&row.steps));
    }
    let on = match report.limits {
        Some(_) => format!("{} threads, {}", report.threads, report.isa),
        None => format!("on {}", report.devices.device),
    };
    text.push_str(&format!("{on}, loaded in {:.1} ms\n", report.load_ms));
    text
}
