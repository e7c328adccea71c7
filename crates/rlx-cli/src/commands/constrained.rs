//! Text that obeys a grammar.

use crate::failure::{Failure, Result};
use rlx_models::grammar::Grammar;
use std::path::{Path, PathBuf};

/// What the text has to be. Tokens that cannot follow are never chosen; the text ends where the grammar does.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Text that obeys a grammar")]
#[group(multiple = false)]
pub struct Constrained {
    /// Write a JSON value of the JSON schema in this file
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// Write a text of the grammar in this file, in Lark's notation
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
    /// Write a text that this regular expression matches
    #[arg(long, value_name = "EXPRESSION")]
    regex: Option<String>,
}

impl Constrained {
    /// The grammar asked for, if any.
    pub fn read(&self) -> Result<Option<Grammar>> {
        Ok(match (&self.json_schema, &self.grammar, &self.regex) {
            (Some(path), ..) => Some(Grammar::JsonSchema(text(path)?)),
            (_, Some(path), _) => Some(Grammar::Lark(text(path)?)),
            (.., Some(expression)) => Some(Grammar::Regex(expression.clone())),
            _ => None,
        })
    }
}

fn text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .map_err(|error| Failure::new(error, path.display(), "give a file of UTF-8 text that can be read"))
}
