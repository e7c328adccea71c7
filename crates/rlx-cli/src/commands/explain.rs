//! `rlx explain`.

use super::onnx;
use super::plan::Capacities;
use super::sizes::Sizes;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output::{self, Stage, print_report, print_stage, summary_text};
use rlx::plan::Lir;
use rlx_models::ModelError;
use std::path::PathBuf;

/// Show what the compiler made of a model: fusions, kernels, the graph at each stage
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF or ONNX file, or hub name in the local cache [default: the built-in demo]
    model: Option<String>,
    /// Print the graph's text at one stage instead of the summary
    #[arg(long)]
    stage: Option<Stage>,
    /// Also draw the memory plan
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    capacities: Capacities,
    #[command(flatten)]
    sizes: Sizes,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        if let Some(file) = self.sizes.onnx_file(self.model.as_deref(), &self.capacities.given())? {
            return onnx::explain(&file, &self.sizes, self.stage, self.svg.as_ref(), context);
        }
        let engine = Engine::open(self.model.as_deref(), context)?;
        let plan = engine.model().plan(self.capacities.request(), context.threads())?;
        if let Some(file) = &self.svg {
            let advice = "choose a file in a folder that may be written";
            std::fs::write(file, plan.lir.svg())
                .map_err(|error| Failure::new(error, file.display(), advice))?;
            context.note(format!("memory plan: {}", file.display()));
        }
        let Some(stage) = self.stage else { return summarize(&engine, &plan.lir, context) };
        let text = match stage {
            Stage::Hir => engine.model().built().graph().to_string(),
            Stage::Mir => engine.model().compiled().graph().to_string(),
            Stage::Lir => plan.lir.to_string(),
        };
        print_stage(engine.source.name(), stage, text, context)
    }
}

fn summarize(engine: &Engine, lir: &Lir, context: &Context) -> Result<()> {
    let report = engine.model().compiled().report().map_err(ModelError::from)?;
    if !context.shared.json {
        return output::print(&summary_text(&report, lir)?);
    }
    print_report(engine.source.name(), &report, lir)
}
