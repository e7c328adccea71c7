//! `rlx chat`.

use super::constrained::Constrained;
use super::drafting::Drafting;
use super::generate::{Lora, Sampling, speed, tell_shift};
use crate::context::Context;
use crate::engine::Engine;
use crate::failure::{Failure, Result};
use crate::interrupt::Interrupt;
use crate::output;
use rlx_models::template::{ChatTemplate, Message};
use rlx_models::{Draft, Fallback, HeldText, ModelDevices, ModelError, TextGeneration, TextOptions};
use std::io::{BufRead as _, IsTerminal as _};

/// Talk with a model that has a chat template: one line of input is one message
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder, GGUF file, or hub name in the local cache
    model: String,
    /// The message that comes before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    lora: Lora,
    #[command(flatten)]
    drafting: Drafting,
    #[command(flatten)]
    constrained: Constrained,
}

const HELP: &str = "\
/help          these lines
/system TEXT   start anew with this message before the conversation
/clear         forget the conversation
/retry         answer the last message again, by the next seed
/undo          forget the last message and its answer
/history       show the conversation
/stats         show speed after each answer, or no longer
/quit          end; so does the end of input
Ctrl-C stops an answer, and ends the program where none is being written.
";

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        if context.shared.json {
            let advice = "use `rlx generate --json`";
            return Err(Failure::usage("a conversation is not one JSON object", "rlx chat --json", advice));
        }
        let mut options = self.sampling.options()?;
        options.grammar = self.constrained.read()?;
        let mut engine = Engine::open_fastest(Some(&self.model), context)?;
        options.adapter = self.lora.load(engine.model(), context)?;
        options.draft = self.drafting.load(engine.model(), context)?;
        let template = ChatTemplate::open(engine.model().folder())?;
        engine.load(context)?;
        let terminal = std::io::stdin().is_terminal() && context.watched();
        if terminal {
            context.note("/help lists commands; Ctrl-C stops an answer");
        }
        let mut chat = Chat {
            context,
            engine,
            template,
            sampling: self.sampling,
            options,
            messages: Vec::new(),
            held: None,
            system: self.system,
            stats: terminal,
            interrupt: Interrupt::install(),
        };
        chat.talk(terminal)
    }
}

struct Chat<'a> {
    context: &'a Context,
    engine: Engine,
    template: ChatTemplate,
    sampling: Sampling,
    options: TextOptions,
    messages: Vec<Message>,
    /// The last turn, from which the next goes on.
    held: Option<HeldText>,
    system: Option<String>,
    stats: bool,
    interrupt: Interrupt,
}

enum Next {
    Read,
    Answer,
    End,
}

fn message(role: &str, content: String) -> Message {
    Message { role: role.to_owned(), content }
}

impl Chat<'_> {
    fn talk(&mut self, terminal: bool) -> Result<()> {
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if terminal {
                eprint!("> ");
            }
            let Some(line) = lines.next() else { break };
            let line =
                line.map_err(|error| Failure::new(error, "standard input", "give lines of UTF-8 text"))?;
            match self.read(line.trim_end_matches('\r'))? {
                Next::Read => {}
                Next::Answer => self.answer()?,
                Next::End => break,
            }
        }
        Ok(())
    }

    fn read(&mut self, line: &str) -> Result<Next> {
        if line.trim().is_empty() {
            return Ok(Next::Read);
        }
        let Some(command) = line.strip_prefix('/') else {
            self.messages.push(message("user", line.to_owned()));
            return Ok(Next::Answer);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match name {
            "quit" | "exit" => return Ok(Next::End),
            "clear" => self.messages.clear(),
            "system" => {
                self.messages.clear();
                self.system = Some(rest.trim().to_owned()).filter(|text| !text.is_empty());
            }
            "retry" => {
                if self.messages.pop_if(|last| last.role == "assistant").is_some() {
                    self.options.sampling.seed = self.options.sampling.seed.wrapping_add(1);
                }
                if !self.messages.is_empty() {
                    return Ok(Next::Answer);
                }
                self.context.note("nothing to answer yet");
            }
            "undo" => {
                self.messages.pop_if(|last| last.role == "assistant");
                self.messages.pop_if(|last| last.role == "user");
            }
            "history" => {
                for said in self.conversation() {
                    self.context.note(format!("{}: {}", said.role, said.content));
                }
            }
            "stats" => self.stats = !self.stats,
            "help" => self.context.note(HELP.trim_end()),
            _ => self.context.note(format!("no command /{name}; /help lists them")),
        }
        Ok(Next::Read)
    }

    /// All messages, the one before the conversation first.
    fn conversation(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| message("system", text.clone()));
        system.chain(self.messages.iter().cloned()).collect()
    }

    fn answer(&mut self) -> Result<()> {
        let prompt = self.template.render(&self.conversation(), true)?;
        let prompt = self.engine.model().tokenizer().encode(&prompt, false)?;
        let cancel = self.interrupt.turn();
        let options = TextOptions { cancel, ..self.options.clone() };
        let held = self.held.take();
        let started = self.sampling.continue_after(&self.engine.devices, held, &prompt, &options);
        let outcome = started.and_then(|mut generation| {
            let text = print_answer(&self.engine.devices, &mut generation, self.context)?;
            if self.stats {
                self.context.note(speed(&generation));
            }
            Ok((text, generation.into_held()))
        });
        self.interrupt.end_turn();
        if self.engine.devices.fallbacks().iter().any(|f| matches!(f, Fallback::Undrafted { .. })) {
            self.options.draft = Draft::Off;
        }
        let (text, held) = outcome?;
        self.held = Some(held);
        // What was said of a stopped answer stays part of the conversation.
        self.messages.push(message("assistant", text));
        Ok(())
    }
}

/// Prints the pieces as they come. An answer that is stopped ends there.
fn print_answer(
    devices: &ModelDevices,
    generation: &mut TextGeneration<'_>,
    context: &Context,
) -> Result<String> {
    let mut text = String::new();
    while let Some(piece) = devices.next_piece(generation) {
        tell_shift(generation, context);
        match piece {
            Ok(piece) => {
                output::print(&piece)?;
                text.push_str(&piece);
            }
            Err(ModelError::Cancelled) => break,
            Err(error) => return Err(error.into()),
        }
    }
    output::print("\n")?;
    Ok(text)
}
