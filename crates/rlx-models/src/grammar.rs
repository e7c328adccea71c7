//! Text that obeys a grammar: before each token is drawn, those that cannot follow are forbidden.
//!
//! It fails closed. A grammar that cannot be read, a tokenizer whose tokens are not known byte by byte, a place where no token may
//! follow: each ends the text with an error. A text may only end where the grammar may, and ends there by itself when nothing else can
//! follow. The parser is `llguidance`; while it runs it keeps panics of its own from being printed, by a panic hook that it installs
//! with the first grammar and that passes others on.

use crate::error::{ModelError, Result};
use crate::generate::Constraint;
use crate::tokenizer::TextTokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use std::sync::Arc;

/// What a text must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grammar {
    /// A JSON value of this JSON schema.
    JsonSchema(String),
    /// A text of this grammar, in the dialect of Lark that llguidance reads.
    Lark(String),
    /// A text that this regular expression matches as a whole.
    Regex(String),
}

/// A grammar at some place of a text.
pub struct GrammarConstraint {
    matcher: Matcher,
    stop: Vec<u32>,
}

fn wrong(expected: &'static str, found: impl ToString) -> ModelError {
    ModelError::Setting { setting: "the grammar", expected, found: found.to_string() }
}

impl GrammarConstraint {
    /// The start of a grammar, for texts of a tokenizer with `vocab` tokens of which `stop` end a text.
    ///
    /// # Errors
    /// [`ModelError::Setting`] for a grammar that cannot be read, no token that ends a text, or tokens whose bytes are not known.
    pub fn new(grammar: &Grammar, tokenizer: &TextTokenizer, vocab: usize, stop: &[u32]) -> Result<Self> {
        let Some(&end) = stop.first() else {
            return Err(wrong("a model with a token that ends a text", "none"));
        };
        let Some(mut words) = tokenizer.token_bytes(vocab) else {
            return Err(wrong("byte-level or SentencePiece tokens", "a tokenizer of another kind"));
        };
        let Some(word) = words.get_mut(end as usize) else {
            return Err(wrong("an end token of the model", end));
        };
        *word = [&[TokTrie::SPECIAL_TOKEN_MARKER][..], b"<end>"].concat();
        for (word, id) in words.iter_mut().zip(0..) {
            if id != end && (stop.contains(&id) || word.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER)) {
                word.clear();
            }
        }
        let info = TokRxInfo::new(vocab as u32, end);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let unread = |error: &dyn std::fmt::Display| wrong("one that llguidance reads", format!("{error:#}"));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| unread(&error))?;
        factory.quiet();
        let parsed = match grammar {
            Grammar::JsonSchema(text) => {
                let schema = serde_json::from_str(text).map_err(|error| wrong("a schema in JSON", error))?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
            Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
        };
        let parser = factory.create_parser(parsed).map_err(|error| unread(&error))?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(error) => Err(unread(&error)),
            None => Ok(Self { matcher, stop: stop.to_vec() }),
        }
    }
}

impl Constraint for GrammarConstraint {
    fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let broken = |error: &dyn std::fmt::Display| wrong("a grammar that goes on", format!("{error:#}"));
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| broken(&error))?;
        let ends = self.stop.first().is_some_and(|&end| mask.is_allowed(end));
        let mut any = false;
        for (logit, id) in logits.iter_mut().zip(0..) {
            match if self.stop.contains(&id) { ends } else { mask.is_allowed(id) } {
                true => any = true,
                false => *logit = f32::NEG_INFINITY,
            }
        }
        if any { Ok(()) } else { Err(broken(&"a place where no token may follow")) }
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        self.matcher
            .consume_token(token)
            .map_err(|error| wrong("a token that may follow", format!("{token}: {error:#}")))
    }

    fn is_over(&self) -> bool {
        self.matcher.is_stopped()
    }
}
