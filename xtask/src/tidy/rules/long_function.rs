//! A function holds at most 100 lines of code; tables and macro data are not counted.

use std::ops::Range;

use super::super::lexer::Kind;
use super::super::source::SourceFile;
use super::{Finding, Tree};

const LIMIT_LINES: usize = 100;

pub fn check(tree: &Tree) -> Vec<Finding> {
    tree.sources.iter().flat_map(check_file).collect()
}

fn check_file(file: &SourceFile) -> Vec<Finding> {
    let lengths = file.functions.iter().map(|function| (function, counted_lines(file, &function.tokens)));
    let long = lengths.filter(|(_, lines)| *lines > LIMIT_LINES);
    long.map(|(function, lines)| Finding {
        subject: format!("{}::{}", file.path, function.name),
        line: function.line,
        message: format!("{lines} code lines, at most {LIMIT_LINES}; name a part of it"),
    })
    .collect()
}

fn counted_lines(file: &SourceFile, function: &Range<usize>) -> usize {
    let mut lines = file.code_lines(function.clone());
    let mut at = function.start;
    while at < function.end {
        if let Some(close) = table_at(file, at) {
            let inside = file.line(at) + 1..file.line(close);
            lines.retain(|line| !inside.contains(line));
            at = close;
        }
        at += 1;
    }
    lines.len()
}

/// The end of the table that opens at `at`: an array literal or a macro in brackets or braces, without control flow.
fn table_at(file: &SourceFile, at: usize) -> Option<usize> {
    let close = file.close(at)?;
    let before = at.checked_sub(1)?;
    let is_macro = file.word(before) == "!" && matches!(file.word(at), "[" | "{");
    let indexes = matches!(file.word(before), ")" | "]" | "#" | "!") || is_value(file, before);
    let is_array = file.word(at) == "[" && !indexes;
    let control = ["let", "if", "for", "while", "match", "loop"];
    let is_data = || !(at..close).any(|inside| control.iter().any(|word| file.is_ident(inside, word)));
    ((is_macro || is_array) && is_data()).then_some(close)
}

fn is_value(file: &SourceFile, at: usize) -> bool {
    let keywords = ["return", "in", "break", "else", "mut", "const", "static"];
    file.kind(at) == Some(Kind::Ident) && !keywords.contains(&file.word(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(body: &str) -> Vec<String> {
        let source = format!("fn short() {{}}\nfn long() {{\n{body}\n}}\n");
        check(&Tree::sample(&[("a.rs", &source)])).into_iter().map(|f| f.subject).collect()
    }

    #[test]
    fn statements_count() {
        assert_eq!(found(&"step();\n".repeat(LIMIT_LINES)), ["a.rs::long"]);
        assert_eq!(found(&"step();\n".repeat(LIMIT_LINES - 2)), Vec::<String>::new());
    }

    #[test]
    fn tables_and_multi_line_text_do_not_count() {
        let rows = "    (1, \"a\"),\n".repeat(LIMIT_LINES);
        assert!(found(&format!("let table = [\n{rows}];")).is_empty());
        assert!(found(&format!("rows! {{\n{rows}}}")).is_empty());
        assert!(found(&format!("parse(\"{}\");", "row\n".repeat(LIMIT_LINES))).is_empty());
    }

    #[test]
    fn a_bracket_does_not_hide_control_flow_or_an_index() {
        let code = "if a() { b() }\n".repeat(LIMIT_LINES);
        assert_eq!(found(&format!("all! {{\n{code}}}")), ["a.rs::long"]);
        assert_eq!(found(&format!("table[{{\n{code}}}];")), ["a.rs::long"]);
    }
}
