//! What the compiler made of a graph.

use super::{print, print_json, table};
use crate::context::Context;
use crate::failure::Result;
use clap::ValueEnum;
use rlx::plan::Lir;
use rlx::session::CompileReport;
use rlx_models::ModelError;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A form of a graph on its way to an executable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stage {
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

/// A graph's text at one stage.
pub fn print_stage(model: String, stage: Stage, text: String, context: &Context) -> Result<()> {
    if !context.shared.json {
        return print(&text);
    }
    let stage = match stage {
        Stage::Hir => "hir",
        Stage::Mir => "mir",
        Stage::Lir => "lir",
    };
    print_json(&StageText { model, stage, text })
}

/// What the compiler made of a graph, as one JSON object.
pub fn print_report(model: String, report: &CompileReport, lir: &Lir) -> Result<()> {
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
    print_json(&Report {
        model,
        compile_ms: report.compile_micros as f64 / 1e3,
        passes: report.passes.passes.iter().map(pass).collect(),
        fusions: report.fusions.iter().map(|tally| (tally.rule.to_string(), tally.times)).collect(),
        decomposed: report.decomposed.len(),
        steps: steps.collect(),
        arena_bytes: lir.arena_bytes(),
        live_bytes_bound: lir.live_bytes_bound(),
    })
}

/// The same, for people.
pub fn summary_text(report: &CompileReport, lir: &Lir) -> Result<String> {
    let steps = report.table(lir.binding()).map_err(rlx::SessionError::from).map_err(ModelError::from)?;
    let cells = |cells: [String; 4]| cells.to_vec();
    let mut rows = vec![cells(["pass", "nodes before", "after", "rewrites"].map(str::to_owned))];
    for pass in &report.passes.passes {
        let numbers = [pass.nodes_before, pass.nodes_after, pass.fired].map(|n| n.to_string());
        let [before, after, fired] = numbers;
        rows.push(cells([pass.pass.to_string(), before, after, fired]));
    }
    let mut text = table(&rows);
    let _ = writeln!(text, "\n{steps}");
    let (arena, bound) = (lir.arena_bytes(), lir.live_bytes_bound());
    let compile_ms = report.compile_micros as f64 / 1e3;
    let _ = writeln!(text, "compiled in {compile_ms:.2} ms; arena {arena} bytes, at least {bound} needed");
    Ok(text)
}
