//! `cargo xtask tidy`: the house rules as a test over the tree's text.
//!
//! A rule is one file in `rules/` and one row in [`rules::RULES`]; an exception is one line of
//! `xtask/tidy-exceptions.txt` with its reason.

mod exceptions;
mod lexer;
mod rules;
mod source;
mod tree;

use std::time::Instant;

use crate::config::Config;
use exceptions::Exceptions;
use tree::Tree;

/// A broken rule. `subject` is what an exception names: a path, `path::function`, or a crate.
#[derive(Debug)]
pub struct Finding {
    pub subject: String,
    /// 1-based, 0 where the finding is about the whole subject.
    pub line: usize,
    pub message: String,
}

/// Checks every rule; an error counts what is left after the exceptions.
pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    if let Some(unknown) = args.first() {
        return Err(format!("tidy takes no argument `{unknown}`"));
    }
    let started = Instant::now();
    let tree = Tree::read(&config.root)?;
    let mut exceptions = Exceptions::read(&config.root)?;
    let mut broken = 0;
    for rule in rules::RULES {
        for finding in (rule.check)(&tree) {
            if exceptions.cover(rule.name, &finding.subject) {
                continue;
            }
            broken += 1;
            let line = if finding.line > 0 { format!(":{}", finding.line) } else { String::new() };
            println!("{}: {}{line}: {}", rule.name, finding.subject, finding.message);
        }
    }
    for unused in exceptions.unused() {
        broken += 1;
        println!("exceptions: {unused}: covers nothing; delete the line");
    }
    print!("{}", exceptions.listing());
    let rules = rules::RULES.len();
    let (files, lines) = (tree.sources.len(), tree.sources.iter().map(rules::code_lines_of).sum::<usize>());
    println!("tidy: {rules} rules, {files} Rust files, {lines} code lines, {:.0?}", started.elapsed());
    if broken == 0 { Ok(()) } else { Err(format!("tidy: {broken} findings")) }
}
