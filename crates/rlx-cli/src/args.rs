//! The arguments every verb shares, and how bad use is told.

use crate::commands::Verb;
use crate::failure::{Failure, Result, output_failure};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};
use rlx::config::Config;
use rlx::devices::DeviceId;
use rlx_tensor::DType;
use std::io::Write as _;
use std::num::NonZeroUsize;

/// Compile a model file, know its memory, run it.
#[derive(Debug, Parser)]
#[command(name = "rlx", version, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub shared: Shared,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Arguments of every verb.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Shared {
    /// Worker threads of a run [default: the CPUs granted to the process]
    #[arg(short, long, global = true, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Precision of matrix products [default: bf16 for a bf16 checkpoint where the device has instructions for it, else f32]
    #[arg(long, global = true)]
    pub precision: Option<Precision>,
    /// Element type of key and value caches [default: f16 for a file with quantised weights, else f32]
    #[arg(long, global = true, value_name = "TYPE")]
    pub cache_type: Option<CacheType>,
    /// Device to run on, such as cpu [default: the fastest by the cost model]
    #[arg(long, global = true)]
    pub device: Option<DeviceId>,
    /// Experts of each layer in memory at once; the others are loaded as the router asks for them [default: all]
    #[arg(long, global = true, value_name = "N")]
    pub expert_budget: Option<NonZeroUsize>,
    /// Say on standard error what is done; twice for more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Print one JSON object
    #[arg(short, long, global = true)]
    pub json: bool,
    /// Never fetch, and never propose to
    #[arg(long, global = true)]
    pub offline: bool,
}

/// Precision of matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// Operands as f32; narrower weights are widened.
    F32,
    /// Operands rounded to bf16, sums in f32.
    Bf16,
}

impl From<Precision> for rlx::backend::cpu::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

/// Element type of key and value caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheType {
    /// As computed.
    F32,
    /// Rounded to IEEE half precision.
    F16,
    /// Rounded to bfloat16.
    Bf16,
    /// 8-bit integers, 32 elements of a head with one scale; heads have to be multiples of 32.
    #[value(name = "q8_0")]
    Q8,
}

impl CacheType {
    /// The element type.
    pub fn dtype(self) -> DType {
        match self {
            CacheType::F32 => DType::F32,
            CacheType::F16 => DType::F16,
            CacheType::Bf16 => DType::BF16,
            CacheType::Q8 => DType::Q8_0,
        }
    }
}

/// The command line as clap sees it, with the settings below the help.
pub fn command() -> clap::Command {
    Cli::command().after_long_help(format!("Environment:\n{}", Config::help()))
}

/// Parses the process's arguments. Help and version are printed and end in a quiet failure of status 0.
pub fn parse() -> Result<Cli> {
    let parsed = command().try_get_matches().and_then(|matches| {
        <Cli as clap::FromArgMatches>::from_arg_matches(&matches)
            .map_err(|error| error.format(&mut command()))
    });
    parsed.map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let printed = std::io::stdout().write_all(error.render().to_string().as_bytes());
            printed.map_or_else(output_failure, |()| Failure::quiet())
        }
        _ => usage_failure(&error),
    })
}

/// clap's paragraphs as what, where, what to do.
fn usage_failure(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let missing_verb = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    let what = match text.split("\n\n").next() {
        _ if missing_verb => "a verb is missing",
        Some(paragraph) => paragraph.trim_start_matches("error: "),
        None => "bad use",
    };
    let known = command();
    let verb = std::env::args().skip(1).find(|word| known.find_subcommand(word).is_some());
    let called = verb.map_or_else(|| "rlx".to_owned(), |verb| format!("rlx {verb}"));
    let usage =
        text.lines().find_map(|line| line.strip_prefix("Usage: ")).map_or(called.clone(), str::to_owned);
    let tips = text.lines().filter_map(|line| line.trim().strip_prefix("tip: ")).map(str::to_owned);
    let advice = tips.chain([format!("`{called} --help`")]).collect::<Vec<_>>().join("; ");
    Failure::usage(what, usage, advice)
}
