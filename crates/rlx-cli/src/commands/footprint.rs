//! `rlx footprint`: not shown in the help; what tests and benchmarks compare `rlx plan` with.

use super::plan::Capacities;
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output;
use rlx::memory::{MemoryProbe, ProcProbe, SystemProbe};
use rlx_models::embed::embed_tokens;
use rlx_models::{Built, TextOptions};
use serde::Serialize;
use std::path::PathBuf;

/// Use a model at its full capacities and tell by how much resident memory grew
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, hub name or compiled file [default: the built-in demo]
    model: Option<String>,
    #[command(flatten)]
    capacities: Capacities,
}

/// High-water mark minus what was resident when `main` began; and the same apart for pages of files and others, at the end.
#[derive(Debug, Serialize)]
struct Report {
    estimate_bytes: u64,
    estimate_mapped_bytes: u64,
    estimate_host_bytes: u64,
    peak_growth_bytes: u64,
    anonymous_growth_bytes: Option<u64>,
    file_growth_bytes: Option<u64>,
    within: bool,
    under: bool,
}

/// Larger of 2% and 32 MiB: how far above the measured peak an estimate may lie.
fn allowance(measured: u64) -> u64 {
    (measured / 50).max(32 << 20)
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let unknown =
            || Failure::new("this system does not tell its memory", "rlx footprint", "run it on Linux");
        let before = context.started.ok_or_else(unknown)?;
        let engine = Engine::open(self.model.as_deref(), context)?;
        let model = engine.model();
        let plan = model.plan(self.capacities.request(), context.threads())?;
        match model.built() {
            Built::Encoder(encoder) => {
                let rows = plan.context.saturating_mul(plan.batch).max(1);
                let mut runner = model.encoder_runner(rows.min(rlx_models::runtime::ENCODER_ROWS))?;
                let (length, vocab) = (plan.context.min(encoder.info.max_tokens), encoder.info.vocab);
                // Every row of a table that is read in place comes in once, as it does in time.
                for first in (0..vocab).step_by(length) {
                    let text: Vec<u32> = (first..first + length).map(|at| (at % vocab) as u32).collect();
                    embed_tokens(&mut runner, &encoder.info, &vec![text; plan.batch])?;
                }
            }
            Built::Decoder(decoder) => {
                let token = |at: usize| (at * 7919 % decoder.info.vocab) as u32;
                let prompt: Vec<u32> = (0..plan.context - 1).map(token).collect();
                let options =
                    TextOptions { max_tokens: 1, context: Some(plan.context), ..TextOptions::default() };
                let mut generation = model.generate_tokens(&prompt, &options)?;
                generation.by_ref().try_for_each(|piece| piece.map(|_| ()))?;
            }
            _ => {
                return Err(Failure::new(
                    "this kind of model is not measured",
                    "rlx footprint",
                    "use `rlx plan`",
                ));
            }
        }
        let probe = ProcProbe { root: PathBuf::from("/") };
        let peak = SystemProbe.peak_rss_bytes().ok_or_else(unknown)?.saturating_sub(before.total);
        let apart = probe.rss_apart();
        let total = plan.estimate.total_bytes();
        output::print_json(&Report {
            estimate_bytes: total,
            estimate_mapped_bytes: plan.estimate.mapped_bytes,
            estimate_host_bytes: plan.estimate.host_bytes,
            peak_growth_bytes: peak,
            anonymous_growth_bytes: apart.map(|now| now.anonymous.saturating_sub(before.anonymous)),
            file_growth_bytes: apart.map(|now| now.file.saturating_sub(before.file)),
            within: total <= peak + allowance(peak),
            under: total < peak,
        })
    }
}
