//! `rlx explain`.

use super::plan::Capacities;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output;
use clap::ValueEnum;
use rlx::plan::Lir;
use rlx::session::CompileReport;
use rlx_models::ModelError;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

/// Show what the compiler made of a model: fusions, kernels, the graph at each stage
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF file, or hub name in the local cache [default: the built-in demo]
    model: Option<String>,
    /// Print the graph's text at one stage instead of the summary
    #[arg(long)]
    stage: Option<Stage>,
    /// Also draw the memory plan
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    capacities: Capacities,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// As imported.
    Hir,
    /// Fused and legal for the device.
    Mir,
    /// Capacities bound, steps in order, buffers placed.
    Lir,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    compile_ms: f64,
    passes: Vec<PassRow>,
    fusions: BTreeMap<String, usize>,
    decomposed: usize,
    steps: Vec<StepRow>,
    arena_bytes: usize,
    live_bytes_bound: usize,
}

#[derive(Debug, Serialize)]
struct PassRow {
    pass: String,
    nodes_before: usize,
    nodes_after: usize,
    rewrites: usize,
}

#[derive(Debug, Serialize)]
struct StepRow {
    op: String,
    kernel: String,
    /// Whether a kernel runs it, not the reference evaluation.
    native: bool,
    flops: usize,
    bytes: usize,
    location: String,
}

#[derive(Debug, Serialize)]
struct StageText {
    model: String,
    stage: &'static str,
    text: String,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let engine = Engine::open(self.model.as_deref(), context)?;
        let plan = engine.model.plan(self.capacities.request(), context.threads())?;
        if let Some(file) = &self.svg {
            let advice = "choose a file in a folder that may be written";
            std::fs::write(file, plan.lir.svg())
                .map_err(|error| Failure::new(error, file.display(), advice))?;
            context.note(format!("memory plan: {}", file.display()));
        }
        let (stage, text) = match self.stage {
            None => return summarize(&engine, &plan.lir, context),
            Some(Stage::Hir) => ("hir", engine.model.built().graph().to_string()),
            Some(Stage::Mir) => ("mir", engine.model.compiled().graph().to_string()),
            Some(Stage::Lir) => ("lir", plan.lir.to_string()),
        };
        if context.shared.json {
            return output::print_json(&StageText { model: engine.source.name(), stage, text });
        }
        output::print(&text)
    }
}

fn summarize(engine: &Engine, lir: &Lir, context: &Context) -> Result<()> {
    let report = engine.model.compiled().report().map_err(ModelError::from)?;
    if !context.shared.json {
        return output::print(&summary_text(&report, lir)?);
    }
    let pass = |pass: &rlx_graph::passes::PassStat| PassRow {
        pass: pass.pass.to_string(),
        nodes_before: pass.nodes_before,
        nodes_after: pass.nodes_after,
        rewrites: pass.fired,
    };
    let work = report.work(lir.binding()).map_err(rlx::SessionError::from).map_err(ModelError::from)?;
    let steps = report.steps.iter().zip(work).map(|(step, work)| StepRow {
        op: step.op.clone(),
        kernel: step.kernel.clone(),
        native: step.native,
        flops: work.flops,
        bytes: work.bytes,
        location: step.location.clone(),
    });
    output::print_json(&Report {
        model: engine.source.name(),
        compile_ms: report.compile_micros as f64 / 1e3,
        passes: report.passes.passes.iter().map(pass).collect(),
        fusions: report.fusions.iter().map(|tally| (tally.rule.to_string(), tally.times)).collect(),
        decomposed: report.decomposed.len(),
        steps: steps.collect(),
        arena_bytes: lir.arena_bytes(),
        live_bytes_bound: lir.live_bytes_bound(),
    })
}

fn summary_text(report: &CompileReport, lir: &Lir) -> Result<String> {
    let steps = report.table(lir.binding()).map_err(rlx::SessionError::from).map_err(ModelError::from)?;
    let cells = |cells: [String; 4]| cells.to_vec();
    let mut rows = vec![cells(["pass", "nodes before", "after", "rewrites"].map(str::to_owned))];
    for pass in &report.passes.passes {
        let numbers = [pass.nodes_before, pass.nodes_after, pass.fired].map(|n| n.to_string());
        let [before, after, fired] = numbers;
        rows.push(cells([pass.pass.to_string(), before, after, fired]));
    }
    let mut text = output::table(&rows);
    let _ = writeln!(text, "\n{steps}");
    let (arena, bound) = (lir.arena_bytes(), lir.live_bytes_bound());
    let compile_ms = report.compile_micros as f64 / 1e3;
    let _ = writeln!(text, "compiled in {compile_ms:.2} ms; arena {arena} bytes, at least {bound} needed");
    Ok(text)
}
