//! `rlx generate`.

use super::constrained::Constrained;
use super::drafting::Drafting;
use super::sampling::Further;
use crate::context::Context;
use crate::demo;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::output::{self, Devices};
use crate::source::Source;
use rlx::memory::{MemoryProbe, SystemProbe};
use rlx_models::generate::Shift;
use rlx_models::sampling::SamplingOptions;
use rlx_models::{HeldText, Model, ModelDevices, ModelError, TextGeneration, TextOptions};
use serde::Serialize;
use std::io::IsTerminal as _;
use std::path::PathBuf;

/// Continue a text
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF file, or hub name in the local cache [default: the built-in demo]
    model: Option<String>,
    /// The text to continue [default, for the demo: the beginning of a story]
    #[arg(short, long)]
    prompt: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    lora: Lora,
    #[command(flatten)]
    drafting: Drafting,
    #[command(flatten)]
    constrained: Constrained,
    /// Show the prompt and its token ids
    #[arg(long)]
    show_prompt: bool,
    /// Write down which experts were needed, for a replay; needs --expert-budget
    #[arg(long, value_name = "FILE")]
    expert_trace: Option<PathBuf>,
}

/// Low-rank adapters.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Lora {
    /// Load the adapter of a PEFT folder under a name; the first one given is used
    #[arg(long = "lora", value_name = "NAME=PATH", value_parser = named_path)]
    adapters: Vec<(String, PathBuf)>,
    /// Use this one of the adapters given; `none` for the plain model
    #[arg(long, value_name = "NAME", requires = "adapters")]
    adapter: Option<String>,
}

pub(super) fn named_path(text: &str) -> std::result::Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok((name.to_owned(), path.into())),
        _ => Err("expected NAME=PATH, such as sailor=models/demo-lora".to_owned()),
    }
}

impl Lora {
    /// Adds the adapters to a model; gives the name of the one to use.
    pub fn load(&self, model: &Model, context: &Context) -> Result<Option<String>> {
        for (name, path) in &self.adapters {
            let adapter = model.add_adapter(name, path)?;
            context.detail(format!("adapter {name}: rank {}", adapter.rank()));
        }
        Ok(match self.adapter.as_deref() {
            Some("none") => None,
            Some(chosen) => Some(chosen.to_owned()),
            None => self.adapters.first().map(|(name, _)| name.clone()),
        })
    }
}

/// How text is generated.
#[derive(Debug, Clone, clap::Args)]
pub struct Sampling {
    /// Most new tokens [default: 128, or fewer where the context ends]
    #[arg(short = 'n', long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Divides the logits; 0 always takes the likeliest token [default: 0, or 1 with another sampling option]
    #[arg(long, visible_alias = "temp", value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Sample from this many of the likeliest tokens [default: all]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample from the likeliest tokens that sum to this probability [default: 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Sample from tokens at least this times as likely as the likeliest [default: 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Make tokens that occurred less likely by this factor [default: 1]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Seed of the random stream [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// Most positions of prompt and text together [default: the model's limit]
    #[arg(short, long, value_name = "N")]
    ctx: Option<usize>,
    /// Where the text reaches the context, forget half of it and go on; it is refused otherwise
    #[arg(long)]
    context_shift: bool,
    /// Tokens at the start that a context shift keeps [default: 4]
    #[arg(long, value_name = "N", requires = "context_shift")]
    keep: Option<usize>,
    #[command(flatten)]
    further: Further,
}

/// Tokens at the start that a context shift keeps: attention leans on the first few (Xiao et al., 2023).
const KEEP: usize = 4;

impl Sampling {
    /// Continues a prompt of these tokens, under options that [`Sampling::options`] checked.
    pub fn continue_from<'m>(
        &self,
        devices: &'m ModelDevices,
        prompt: &[u32],
        options: &TextOptions,
    ) -> Result<TextGeneration<'m>> {
        Ok(devices.generate_tokens(prompt, &self.for_prompt(devices.model(), prompt, options))?)
    }

    /// As [`Sampling::continue_from`], after a text that may begin as the prompt does.
    pub fn continue_after<'m>(
        &self,
        devices: &'m ModelDevices,
        held: Option<HeldText>,
        prompt: &[u32],
        options: &TextOptions,
    ) -> Result<TextGeneration<'m>> {
        Ok(devices.generate_after(held, prompt, &self.for_prompt(devices.model(), prompt, options))?)
    }

    fn for_prompt(&self, model: &Model, prompt: &[u32], options: &TextOptions) -> TextOptions {
        let limit = self.ctx.unwrap_or(usize::MAX).min(model.context_limit());
        let room = limit.saturating_sub(prompt.len()).max(1);
        let room = if self.context_shift { usize::MAX } else { room };
        let max_tokens = self.max_tokens.unwrap_or(options.max_tokens.min(room));
        TextOptions { max_tokens, ..options.clone() }
    }

    /// The options, checked.
    pub fn options(&self) -> Result<TextOptions> {
        let sampled = [self.top_k.is_some(), self.top_p.is_some(), self.min_p.is_some(), self.seed.is_some()];
        let samples = sampled.contains(&true) || self.further.samples();
        let default_temperature = if samples { 1.0 } else { 0.0 };
        let greedy = SamplingOptions::greedy();
        let sampling = SamplingOptions {
            temperature: self.temperature.unwrap_or(default_temperature),
            top_k: self.top_k.unwrap_or(greedy.top_k),
            top_p: self.top_p.unwrap_or(greedy.top_p),
            min_p: self.min_p.unwrap_or(greedy.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(greedy.repetition_penalty),
            seed: self.seed.unwrap_or(greedy.seed),
            ..greedy
        };
        let sampling = self.further.apply(sampling)?;
        let advice = "`rlx generate --help` says what each option takes";
        sampling.check().map_err(|error| Failure::usage(error, "the sampling options", advice))?;
        let context_shift = self.context_shift.then(|| self.keep.unwrap_or(KEEP));
        Ok(TextOptions { sampling, context: self.ctx, context_shift, ..TextOptions::default() })
    }
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'a str>,
    prompt_ids: &'a [u32],
    token_ids: &'a [u32],
    text: &'a str,
    finish_reason: &'static str,
    prefill_ms: f64,
    decode_ms: f64,
    /// How many of the largest logits of a step came back from the device; all where it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    largest_logits: Option<usize>,
    #[serde(flatten)]
    devices: Devices,
    peak_rss_bytes: Option<u64>,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let prompt = match (&self.prompt, &self.model) {
            (Some(prompt), _) => prompt.as_str(),
            (None, None) => demo::PROMPT,
            (None, Some(_)) => {
                let advice = "give the text to continue: --prompt \"Once upon a time\"";
                return Err(Failure::usage("--prompt is missing", "rlx generate MODEL", advice));
            }
        };
        if prompt.is_empty() {
            return Err(ModelError::EmptyPrompt.into());
        }
        if self.expert_trace.is_some() && context.shared.expert_budget.is_none() {
            let advice = "add --expert-budget N: without it every expert stays in memory";
            return Err(Failure::usage("nothing decides about experts", "--expert-trace", advice));
        }
        let mut options = self.sampling.options()?;
        options.grammar = self.constrained.read()?;
        let mut engine = Engine::open_fastest(self.model.as_deref(), context)?;
        options.adapter = self.lora.load(engine.model(), context)?;
        options.draft = self.drafting.load(engine.model(), context)?;
        if self.prompt.is_none() {
            context.note(format!("prompt: {prompt}"));
        }
        engine.load(context)?;
        if let (Some(_), Some(pool)) = (&self.expert_trace, engine.model().experts()) {
            pool.start_trace();
        }
        let ids = engine.model().tokenizer().encode(prompt, true)?;
        let mut generation = self.sampling.continue_from(&engine.devices, &ids, &options)?;
        if self.show_prompt && !context.shared.json {
            context.note(format!("prompt: {prompt:?}\nprompt ids: {:?}", generation.prompt_ids()));
        }
        let text = stream(&engine.devices, &mut generation, context)?;
        self.tell_experts(engine.model(), context)?;
        if context.shared.json {
            return output::print_json(&Report {
                prompt: self.show_prompt.then_some(prompt),
                prompt_ids: generation.prompt_ids(),
                token_ids: generation.token_ids(),
                text: &text,
                finish_reason: generation.finish_reason().map_or("length", |reason| reason.name()),
                prefill_ms: generation.prefill_ms(),
                decode_ms: generation.decode_ms(),
                largest_logits: generation.largest(),
                devices: Devices::of(&engine.devices),
                peak_rss_bytes: SystemProbe.peak_rss_bytes(),
            });
        }
        context.detail(speed(&generation));
        if engine.model().backend().traffic().is_some() {
            context.detail(from_device(&generation));
        }
        if engine.source == Source::Demo && context.watched() && std::io::stdout().is_terminal() {
            context.note(NEXT);
        }
        Ok(())
    }
}

impl Args {
    /// What the pool of experts did, and the trace that was asked for.
    fn tell_experts(&self, model: &Model, context: &Context) -> Result<()> {
        let Some(pool) = model.experts() else { return Ok(()) };
        let stats = pool.stats();
        let rate = 100.0 * stats.hits as f64 / (stats.hits + stats.misses).max(1) as f64;
        context.detail(format!(
            "experts: {rate:.1}% of {} in memory when needed; {:.1} MiB loaded in {} stalls of {:.2} ms in all; {:.1} MiB held",
            stats.hits + stats.misses,
            stats.bytes_moved as f64 / f64::from(1 << 20),
            stats.stalls,
            stats.stall_nanos as f64 / 1e6,
            stats.resident_bytes as f64 / f64::from(1 << 20),
        ));
        let (Some(path), Some(trace)) = (&self.expert_trace, pool.take_trace()) else { return Ok(()) };
        let written = std::fs::write(path, trace.to_text());
        written
            .map_err(|e| Failure::new(e, path.display(), "check that the folder exists and may be written"))
    }
}

/// Takes all pieces; prints them as they come, unless one JSON object is asked for. The text ends with a line break when printed.
fn stream(devices: &ModelDevices, generation: &mut TextGeneration<'_>, context: &Context) -> Result<String> {
    let (mut text, quiet) = (String::new(), context.shared.json);
    while let Some(piece) = devices.next_piece(generation) {
        let piece = piece?;
        tell_shift(generation, context);
        if !quiet {
            output::print(&piece)?;
        }
        text.push_str(&piece);
    }
    if !quiet {
        output::print("\n")?;
    }
    Ok(text)
}

/// Says what a text that reached the context has forgotten.
pub fn tell_shift(generation: &mut TextGeneration<'_>, context: &Context) {
    if let Some(Shift { kept, forgotten, run_again }) = generation.take_shift() {
        context.note(format!(
            "context shift: kept the first {kept} tokens, forgot the {forgotten} after them, ran {run_again} again"
        ));
    }
}

/// Speed of prefill and decode, as a line.
pub fn speed(generation: &TextGeneration<'_>) -> String {
    let (prompt, new) = (generation.prompt_ids().len(), generation.token_ids().len());
    let run = prompt - generation.reused();
    let rate = |tokens: usize, ms: f64| if ms > 0.0 { tokens as f64 / ms * 1e3 } else { 0.0 };
    let of = if run < prompt { format!(" of {prompt}") } else { String::new() };
    let drafts = generation.drafts();
    let guessed = match drafts.proposed {
        0 => String::new(),
        proposed => format!("; {} of {proposed} guesses right", drafts.accepted),
    };
    format!(
        "prefill: {run}{of} tokens in {:.2} ms ({:.0}/s); decode: {new} tokens in {:.2} ms ({:.0}/s){guessed}",
        generation.prefill_ms(),
        rate(run, generation.prefill_ms()),
        generation.decode_ms(),
        rate(new.saturating_sub(1), generation.decode_ms())
    )
}

/// What of a step's logits came back from a device with a memory of its own, as a line.
fn from_device(generation: &TextGeneration<'_>) -> String {
    match (generation.largest(), generation.ran_again()) {
        (None, _) => "logits: all came back from the device, for these options need them".to_owned(),
        (Some(count), 0) => format!("logits: the {count} largest of a step came back from the device"),
        (Some(count), again) => {
            format!("logits: the {count} largest of a step came back from the device, in {again} steps all")
        }
    }
}

const NEXT: &str = "
That was the built-in demo, a story teller of 0.9 million parameters. Try next:
  rlx generate --prompt \"One day, Ben was at the beach\" --temperature 0.8 --seed 7
  rlx explain                                  what the compiler made of it
  rlx plan                                     its memory, known before loading
  rlx generate FOLDER --prompt \"Hello\"         a Hugging Face folder, or org/name from the local cache";
