//! `rlx plan`.

use super::drafting::open_draft;
use super::generate::named_path;
use super::onnx;
use super::sizes::Sizes;
use crate::context::Context;
use crate::engine::{Engine, folder};
use crate::failure::{Failure, Result};
use crate::output;
use crate::source::Source;
use rlx::config::ByteSize;
use rlx::memory::experts::estimate_moe_offload;
use rlx::memory::{MemoryView, SystemProbe};
use rlx_models::gguf::export::{Scheme, exported_bytes};
use rlx_models::{Model, ModelPlan, PlanRequest};
use serde::Serialize;
use serde_json::{Map, Value};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// Tell a model's peak memory before loading it: the parts, whether they fit, and what would
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF or ONNX file, or hub name in the local cache [default: the built-in demo]
    model: Option<String>,
    #[command(flatten)]
    capacities: Capacities,
    #[command(flatten)]
    sizes: Sizes,
    /// Memory that may be used, such as 2GiB [default: the soft budget of this machine]
    #[arg(long, value_name = "BYTES")]
    budget: Option<ByteSize>,
    /// Count an adapter, from its headers, as if it were loaded under a name
    #[arg(long = "lora", value_name = "NAME=PATH", value_parser = named_path)]
    adapters: Vec<(String, PathBuf)>,
    /// Count a smaller model that guesses tokens, run beside this one
    #[arg(long, value_name = "MODEL")]
    draft_model: Option<String>,
}

/// Sizes to plan for.
#[derive(Debug, Clone, clap::Args)]
pub struct Capacities {
    /// Most tokens of a sequence [default: the model's limit]
    #[arg(short, long, value_name = "N")]
    ctx: Option<NonZeroUsize>,
    /// Sequences at once [default: 1]
    #[arg(short, long, value_name = "N")]
    batch: Option<NonZeroUsize>,
}

impl Capacities {
    /// The request to a model.
    pub fn request(&self) -> PlanRequest {
        PlanRequest { context: self.ctx.map(usize::from), batch: Some(self.batch.map_or(1, usize::from)) }
    }

    /// Each by its argument, and whether it was given.
    pub fn given(&self) -> [(&'static str, bool); 2] {
        [("--ctx", self.ctx.is_some()), ("--batch", self.batch.is_some())]
    }
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    ctx: usize,
    batch: usize,
    peak_bytes: u64,
    parts: Map<String, Value>,
    mapped_bytes: u64,
    budget_bytes: Option<u64>,
    fits: Option<bool>,
    bytes_read: u64,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let [ctx, batch] = self.capacities.given();
        let given = [ctx, batch, ("--lora", !self.adapters.is_empty())];
        if let Some(file) = self.sizes.onnx_file(self.model.as_deref(), &given)? {
            return onnx::plan(&file, &self.sizes, self.budget, context);
        }
        let engine = Engine::open(self.model.as_deref(), context)?;
        let (request, threads) = (self.capacities.request(), context.threads());
        let mut plan = match &self.draft_model {
            None => engine.model().plan(request, threads)?,
            Some(name) => {
                let draft = open_draft(name, engine.model(), context)?;
                engine.model().plan_with_draft(draft.model(), request, threads)?
            }
        };
        plan.estimate.adapter_bytes =
            plan.estimate.adapter_bytes.saturating_add(self.adapter_bytes(engine.model())?);
        let view = MemoryView::new(&SystemProbe, &context.config);
        let budget_bytes = self.budget.map(|size| size.0).or_else(|| view.soft_budget_bytes());
        let fits = budget_bytes.map(|budget| plan.estimate.fits_in(budget).is_ok());
        if context.shared.json {
            let parts =
                plan.estimate.parts().map(|(part, bytes)| (part.name().to_owned(), Value::from(bytes)));
            return output::print_json(&Report {
                model: engine.source.name(),
                ctx: plan.context,
                batch: plan.batch,
                peak_bytes: plan.estimate.peak_bytes(),
                parts: parts.into_iter().collect(),
                mapped_bytes: plan.estimate.mapped_bytes,
                budget_bytes,
                fits,
                bytes_read: bytes_read(&engine)?,
            });
        }
        let mut text = table(&plan);
        text.push_str(&expert_line(engine.model(), context));
        text.push_str(&verdict(&engine, &plan, budget_bytes, self.draft_model.is_none(), context)?);
        output::print(&text)
    }
}

impl Args {
    /// The factors of all adapters, and the one context that runs with adapters need besides.
    fn adapter_bytes(&self, model: &Model) -> Result<u64> {
        let (mut factors, mut run) = (0u64, 0);
        for (_, path) in &self.adapters {
            let plan = model.adapter_plan(path, self.capacities.request())?;
            factors = factors.saturating_add(plan.adapter_bytes);
            run = plan.run_bytes.max(run);
        }
        Ok(factors.saturating_add(run))
    }
}

fn table(plan: &ModelPlan) -> String {
    let mib = |bytes: u64| format!("{:.2}", bytes as f64 / (1u64 << 20) as f64);
    let estimate = &plan.estimate;
    let mut rows = vec![vec![format!("{} x {} tokens", plan.batch, plan.context), "MiB".to_owned()]];
    rows.extend(estimate.parts().map(|(part, bytes)| vec![part.name().to_owned(), mib(bytes)]));
    rows.push(vec!["of these in mapped files".to_owned(), mib(estimate.mapped_bytes)]);
    rows.push(vec!["peak without mapped files".to_owned(), mib(estimate.peak_bytes())]);
    output::table(&rows)
}

/// What the experts take, of a model that has any.
fn expert_line(model: &Model, context: &Context) -> String {
    let Some(all) = model.experts_in_all() else { return String::new() };
    let budget = context.shared.expert_budget.map_or(all.num_experts, usize::from);
    let held = all.with_budget(budget);
    let mib = |bytes: u64| bytes as f64 / (1u64 << 20) as f64;
    format!(
        "experts: {} of {} of each of {} layers in memory, {:.2} of {:.2} MiB\n",
        held.gpu_expert_budget_per_layer,
        all.num_experts,
        all.num_moe_layers,
        mib(held.resident_expert_weight_bytes),
        mib(all.all_expert_weight_bytes)
    )
}

/// The most experts of each layer with which the plan fits.
fn expert_remedy(model: &Model, plan: &ModelPlan, budget: u64, context: &Context) -> Option<usize> {
    let all = model.experts_in_all()?;
    let present = all.with_budget(context.shared.expert_budget.map_or(all.num_experts, usize::from));
    let others = plan.estimate.peak_bytes().checked_sub(present.resident_expert_weight_bytes)?;
    let experts = all.num_experts;
    let room = budget.checked_sub(others)?;
    let fit = estimate_moe_offload(all.expert_param_bytes, all.num_moe_layers, experts, experts, room, 0.0);
    fit.ok().map(|fit| fit.gpu_expert_budget_per_layer).filter(|&count| count > 0)
}

/// Types to propose for a model that does not fit, the least coarse first.
const SMALLER: [&str; 3] = ["Q8_0", "Q6_K", "Q4_K_M"];
/// Blocks in the kernels' layout against the bytes in their file, in hundredths: 98 to 99 measured for Q4_0, Q4_K_M, Q6_K and Q8_0, with room
/// for layers that do not fill their last panel.
const LAID_OUT_PERCENT: u64 = 115;

/// The least coarse quantisation with which the plan fits, or why none is proposed.
fn quantised_remedy(
    engine: &Engine,
    plan: &ModelPlan,
    budget: u64,
    context: &Context,
) -> std::result::Result<String, String> {
    if context.shared.expert_budget.is_some() {
        return Err("its size with --expert-budget is not estimated".to_owned());
    }
    let all = &plan.estimate;
    let weights = all.weight_bytes.saturating_add(all.packed_bytes).saturating_sub(all.mapped_bytes);
    let others = all.peak_bytes().saturating_sub(weights);
    let mut least = u64::MAX;
    for scheme in SMALLER.into_iter().filter_map(Scheme::named) {
        let files = folder(&engine.source, context).map_err(Failure::from);
        let stored = files.and_then(|files| Ok(exported_bytes(&files, scheme)?));
        let stored = match stored {
            Ok(stored) => stored,
            Err(failure) => return Err(failure.what().to_owned()),
        };
        let bytes = others.saturating_add(stored.saturating_mul(LAID_OUT_PERCENT) / 100);
        if bytes <= budget && bytes < all.peak_bytes() {
            let name = scheme.name;
            return Ok(format!("rlx quantize --type {name} would fit, at about {}", ByteSize(bytes)));
        }
        least = least.min(bytes);
    }
    let smallest = SMALLER[SMALLER.len() - 1];
    Err(format!("{smallest} would take about {}", ByteSize(least)))
}

fn verdict(
    engine: &Engine,
    plan: &ModelPlan,
    budget: Option<u64>,
    alone: bool,
    context: &Context,
) -> Result<String> {
    let model = engine.model();
    let Some(budget) = budget else {
        return Ok(
            "whether it fits is unknown: this system does not tell its memory; give --budget\n".to_owned()
        );
    };
    let Err(deficit) = plan.estimate.fits_in(budget) else {
        return Ok(format!("fits in {}\n", ByteSize(budget)));
    };
    let mut remedies = Vec::new();
    // Beside a draft model the search would have to plan both: that one is left out first.
    let tokens = match alone {
        true => model.largest_context(plan.context, plan.batch, budget, context.threads())?,
        false => None,
    };
    remedies.extend((!alone).then(|| "without --draft-model it needs less".to_owned()));
    remedies.extend(tokens.map(|tokens| format!("--ctx {tokens} would fit")));
    let experts = expert_remedy(model, plan, budget, context);
    remedies.extend(experts.map(|count| format!("--expert-budget {count} would fit")));
    let mut unproposed = String::new();
    if alone && matches!(engine.source, Source::Folder(_)) {
        match quantised_remedy(engine, plan, budget, context) {
            Ok(remedy) => remedies.push(remedy),
            Err(reason) => unproposed = format!("no quantisation is proposed: {reason}\n"),
        }
    }
    let remedy = match remedies.is_empty() {
        true => "no context would fit: more memory or a smaller model is needed".to_owned(),
        false => remedies.join("; "),
    };
    Ok(format!("does not fit: {deficit}\n{remedy}\n{unproposed}"))
}

/// Bytes of the files that had to be read: JSON files whole, of weight files all but the tensors.
fn bytes_read(engine: &Engine) -> Result<u64> {
    if let Some(artefact) = engine.model().artefact() {
        return Ok(artefact.opened_bytes());
    }
    let folder = match &engine.source {
        Source::Folder(folder) => folder,
        Source::Gguf(_) => return Ok(engine.model().header_bytes()),
        Source::Demo | Source::Compiled(_) => return Ok(0),
    };
    let fail =
        |error: std::io::Error| Failure::new(error, folder.display(), "check that the folder may be read");
    let (mut json, mut weights) = (0, 0);
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let bytes = std::fs::metadata(&path).map_err(fail)?.len();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => json += bytes,
            Some("safetensors") if is_checkpoint(&path) => weights += bytes,
            _ => {}
        }
    }
    let loader = engine.model().weights();
    let mut tensors = 0;
    for name in loader.names() {
        let tensor = loader.tensor(name).map_err(rlx_models::ModelError::from)?;
        tensors += tensor.map_or(0, |tensor| tensor.bytes.len() as u64);
    }
    Ok(json + weights.saturating_sub(tensors))
}

fn is_checkpoint(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("model"))
}
