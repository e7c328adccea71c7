//! `rlx explain`.

mod svg;

use super::plan::Capacities;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output;
use clap::ValueEnum;
use rlx::plan::{BufferKind, Lir, Place};
use rlx::session::CompileReport;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

/// Show what the compiler made of a model: fusions, kernels, the graph at each stage
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, or hub name in the local cache [default: the built-in demo]
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
    native: bool,
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
            std::fs::write(file, svg::draw(&plan.lir))
                .map_err(|error| Failure::new(error, file.display(), advice))?;
            context.note(format!("memory plan: {}", file.display()));
        }
        let (stage, text) = match self.stage {
            None => return summarize(&engine, &plan.lir, context),
            Some(Stage::Hir) => ("hir", engine.model.built().graph().to_string()),
            Some(Stage::Mir) => ("mir", engine.model.compiled().graph().to_string()),
            Some(Stage::Lir) => ("lir", lir_text(&plan.lir)),
        };
        if context.shared.json {
            return output::print_json(&StageText { model: engine.source.name(), stage, text });
        }
        output::print(&text)
    }
}

fn summarize(engine: &Engine, lir: &Lir, context: &Context) -> Result<()> {
    let report = engine.model.compiled().report().map_err(rlx_models::ModelError::from)?;
    if !context.shared.json {
        return output::print(&summary_text(&report, lir));
    }
    let pass = |pass: &rlx_graph::passes::PassStat| PassRow {
        pass: pass.pass.to_string(),
        nodes_before: pass.nodes_before,
        nodes_after: pass.nodes_after,
        rewrites: pass.fired,
    };
    let steps = report.steps.iter().map(|step| StepRow {
        op: step.op.clone(),
        kernel: step.kernel.clone(),
        native: step.native,
    });
    output::print_json(&Report {
        model: engine.source.name(),
        compile_ms: report.compile_micros as f64 / 1e3,
        passes: report.passes.passes.iter().map(pass).collect(),
        fusions: report.passes.trace.tally().into_iter().map(|t| (t.rule.to_string(), t.times)).collect(),
        decomposed: report.passes.dispatch.decomposed.len(),
        steps: steps.collect(),
        arena_bytes: lir.arena_bytes(),
        live_bytes_bound: lir.live_bytes_bound(),
    })
}

fn summary_text(report: &CompileReport, lir: &Lir) -> String {
    let cells = |cells: [String; 4]| cells.to_vec();
    let mut rows = vec![cells(["pass", "nodes before", "after", "rewrites"].map(str::to_owned))];
    for pass in &report.passes.passes {
        let numbers = [pass.nodes_before, pass.nodes_after, pass.fired].map(|n| n.to_string());
        let [before, after, fired] = numbers;
        rows.push(cells([pass.pass.to_string(), before, after, fired]));
    }
    let mut text = output::table(&rows);
    text.push_str("\nrewrites\n");
    for tally in report.passes.trace.tally() {
        let _ = writeln!(text, "  {:4} {}", tally.times, tally.rule);
    }
    text.push_str("\nsteps, by op and kernel\n");
    let mut kernels: BTreeMap<(&str, &str, bool), usize> = BTreeMap::new();
    for step in &report.steps {
        *kernels.entry((&step.op, &step.kernel, step.native)).or_insert(0) += 1;
    }
    for ((op, kernel, native), count) in kernels {
        let why = if native { "" } else { "  (no kernel: reference evaluation)" };
        let _ = writeln!(text, "  {count:4} {op:20} {kernel}{why}");
    }
    let (arena, bound) = (lir.arena_bytes(), lir.live_bytes_bound());
    let _ = writeln!(
        text,
        "\n{} steps; {} nodes decomposed; compiled in {:.2} ms; arena {arena} bytes, at least {bound} needed",
        report.steps.len(),
        report.passes.dispatch.decomposed.len(),
        report.compile_micros as f64 / 1e3
    );
    text
}

/// Buffers with their places, then steps in order.
fn lir_text(lir: &Lir) -> String {
    let template = lir.template();
    let capacities: Vec<String> =
        lir.binding().iter().map(|(symbol, value)| format!("{symbol}={value}")).collect();
    let mut text =
        format!("lir {} [{}] arena {} bytes\n", template.name(), capacities.join(" "), lir.arena_bytes());
    for (id, buffer) in template.buffer_ids() {
        let owner = match &buffer.kind {
            BufferKind::Arena => {
                let at = lir.offset(id).map_or("unplaced".to_owned(), |offset| format!("arena+{offset}"));
                format!("{at} steps {}..={}", buffer.first, buffer.last)
            }
            BufferKind::Input(i) => format!("input {}", template.inputs()[*i].name),
            BufferKind::Output(i) => format!("output {}", template.outputs()[*i].name),
            BufferKind::State(i) => format!("state {}", template.states()[*i].name),
            BufferKind::Param(i) => format!("param {}", template.params()[*i].name),
            BufferKind::Const(_) => "constant".to_owned(),
            _ => "other".to_owned(),
        };
        let _ = writeln!(text, "{id}: {} bytes, {owner}", lir.buffer_bytes(id));
    }
    for (index, step) in template.steps().iter().enumerate() {
        let list =
            |places: &[Place]| places.iter().map(|p| place_text(lir, p)).collect::<Vec<_>>().join(", ");
        let (outputs, inputs) = (list(&step.outputs), list(&step.inputs));
        let _ = writeln!(text, "{index}: {outputs} = {}({inputs})", step.op.def().name());
    }
    text
}

fn place_text(lir: &Lir, place: &Place) -> String {
    let dims = place.dims.iter().map(|&dim| lir.template().sizes().dim(dim).to_string());
    let offset = if place.offset > 0 { format!("+{}", place.offset) } else { String::new() };
    format!("{}{offset}:{}[{}]", place.buffer, place.dtype, dims.collect::<Vec<_>>().join(", "))
}
