//! `rlx chat`.

use super::generate::{Lora, Sampling, stream};
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use rlx_models::template::{ChatTemplate, Message};
use std::io::BufRead as _;

/// Talk with a model that has a chat template: one line of input is one message
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, or hub name in the local cache
    model: String,
    /// The message that comes before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    lora: Lora,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        if context.shared.json {
            let advice = "use `rlx generate --json`";
            return Err(Failure::usage("a conversation is not one JSON object", "rlx chat --json", advice));
        }
        let mut options = self.sampling.options()?;
        let mut engine = Engine::open(Some(&self.model), context)?;
        options.adapter = self.lora.load(&engine.model, context)?;
        let template = ChatTemplate::open(engine.model.folder())?;
        engine.load(context)?;
        let message = |role: &str, content: String| Message { role: role.to_owned(), content };
        let mut messages: Vec<Message> =
            self.system.into_iter().map(|text| message("system", text)).collect();
        for line in std::io::stdin().lock().lines() {
            let line =
                line.map_err(|error| Failure::new(error, "standard input", "give lines of UTF-8 text"))?;
            if line.trim().is_empty() {
                continue;
            }
            messages.push(message("user", line));
            let prompt = engine.model.tokenizer().encode(&template.render(&messages, true)?, false)?;
            let answer = stream(&mut self.sampling.continue_from(&engine.model, &prompt, &options)?, false)?;
            messages.push(message("assistant", answer));
        }
        Ok(())
    }
}
