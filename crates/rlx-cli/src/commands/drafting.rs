//! Guessing tokens ahead.

use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use rlx_models::{Beside, Draft, Model};
use std::sync::Arc;

/// Guesses of several tokens at a time, which are checked in one step. The text stays the same.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Guessing ahead (the text stays the same)")]
pub struct Drafting {
    /// Guess tokens from this and check them together
    #[arg(long, value_enum, value_name = "SOURCE", conflicts_with = "draft_model")]
    draft: Option<Source>,
    /// Guess tokens by a smaller model with the same tokens, and check them together
    #[arg(long, value_name = "MODEL")]
    draft_model: Option<String>,
    /// Most tokens guessed at a time [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    draft_tokens: Option<u8>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Source {
    /// The text so far: good where it repeats itself
    Lookup,
}

/// As many rows with a guess as the kernels of quantised weights read in place.
const TOKENS: u8 = 3;

/// Opens a model that guesses tokens for another one, its weights in that one's registry.
pub fn open_draft(name: &str, model: &Model, context: &Context) -> Result<Engine> {
    Engine::open_beside(Some(name), context, Some(Beside::of(model, "draft")))
}

impl Drafting {
    /// What the options ask for; the draft model is opened beside the model.
    pub fn load(&self, model: &Model, context: &Context) -> Result<Draft> {
        let tokens = usize::from(self.draft_tokens.unwrap_or(TOKENS));
        match (&self.draft_model, self.draft) {
            (Some(name), _) => {
                let mut engine = open_draft(name, model, context)?;
                model.admit_with_draft(1, engine.model())?;
                engine.load(context)?;
                Ok(Draft::by(Arc::clone(engine.model()), model, tokens)?)
            }
            (None, Some(Source::Lookup)) => Ok(Draft::Lookup { tokens }),
            (None, None) if self.draft_tokens.is_some() => {
                let advice = "add --draft lookup or --draft-model MODEL";
                Err(Failure::usage("nothing guesses tokens", "--draft-tokens", advice))
            }
            (None, None) => Ok(Draft::Off),
        }
    }
}
