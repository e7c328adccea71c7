//! A Rust file as the rules see it: tokens, matching delimiters, functions, code lines.

use std::collections::BTreeSet;
use std::ops::Range;

use super::lexer::{Kind, Token, tokenize};

pub struct SourceFile {
    /// Relative to the repository root, with `/`.
    pub path: String,
    text: String,
    tokens: Vec<Token>,
    closes: Vec<Option<usize>>,
    pub functions: Vec<Function>,
}

/// A function with a body; `tokens` runs from `fn` to the closing brace.
pub struct Function {
    pub name: String,
    pub line: usize,
    pub tokens: Range<usize>,
}

impl SourceFile {
    pub fn parse(path: &str, text: &str) -> SourceFile {
        let tokens = tokenize(text);
        let closes = match_delimiters(text, &tokens);
        let mut file =
            SourceFile { path: path.into(), text: text.into(), tokens, closes, functions: Vec::new() };
        file.functions = (0..file.len()).filter_map(|at| file.function_at(at)).collect();
        file
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// The token's text, empty past the end.
    pub fn word(&self, at: usize) -> &str {
        self.tokens.get(at).map_or("", |token| &self.text[token.start..token.end])
    }

    pub fn kind(&self, at: usize) -> Option<Kind> {
        self.tokens.get(at).map(|token| token.kind)
    }

    pub fn is_ident(&self, at: usize, name: &str) -> bool {
        self.kind(at) == Some(Kind::Ident) && self.word(at) == name
    }

    pub fn line(&self, at: usize) -> usize {
        self.tokens.get(at).map_or(0, |token| token.line)
    }

    /// The index of the delimiter that closes the one at `at`.
    pub fn close(&self, at: usize) -> Option<usize> {
        self.closes.get(at).copied().flatten()
    }

    /// Whether the tokens from `at` on read `words`.
    pub fn reads(&self, at: usize, words: &[&str]) -> bool {
        words.iter().enumerate().all(|(offset, word)| self.word(at + offset) == *word)
    }

    /// Every place whose tokens read `words`.
    pub fn find<'a>(&'a self, words: &'a [&'a str]) -> impl Iterator<Item = usize> + 'a {
        (0..self.len()).filter(move |&at| self.reads(at, words))
    }

    /// Lines of `range` on which a token starts.
    pub fn code_lines(&self, range: Range<usize>) -> BTreeSet<usize> {
        self.tokens[range].iter().map(|token| token.line).collect()
    }

    /// The innermost function around a token, else the file: what an exception names.
    pub fn subject(&self, at: usize) -> String {
        let around = self.functions.iter().filter(|function| function.tokens.contains(&at));
        match around.min_by_key(|function| function.tokens.len()) {
            Some(function) => format!("{}::{}", self.path, function.name),
            None => self.path.clone(),
        }
    }

    /// Whether code names `name`, as an identifier or as a whole text literal.
    pub fn names(&self, name: &str) -> bool {
        (0..self.len()).any(|at| match self.kind(at) {
            Some(Kind::Ident) => self.word(at) == name,
            Some(Kind::Text) => self.word(at).trim_matches(['b', 'r', '#', '"']) == name,
            _ => false,
        })
    }

    /// Where the file's first `#[cfg(test)]` starts, else its length.
    pub fn test_start(&self) -> usize {
        self.find(&["#", "[", "cfg", "(", "test", ")", "]"]).next().unwrap_or(self.len())
    }

    pub fn has_test(&self) -> bool {
        self.find(&["#", "[", "test", "]"]).next().is_some()
            || self.find(&["proptest", "!", "{"]).next().is_some()
    }

    /// The next `{` that is not inside parentheses or brackets, before any `;`.
    pub fn next_brace(&self, from: usize) -> Option<usize> {
        let mut at = from;
        while at < self.len() {
            match self.word(at) {
                "{" => return Some(at),
                ";" => return None,
                "(" | "[" => at = self.close(at)?,
                _ => {}
            }
            at += 1;
        }
        None
    }

    fn function_at(&self, at: usize) -> Option<Function> {
        if !self.is_ident(at, "fn") || self.kind(at + 1) != Some(Kind::Ident) {
            return None;
        }
        let open = self.next_brace(at + 2)?;
        let close = self.close(open)?;
        Some(Function { name: self.word(at + 1).into(), line: self.line(at), tokens: at..close + 1 })
    }
}

fn match_delimiters(text: &str, tokens: &[Token]) -> Vec<Option<usize>> {
    let mut closes = vec![None; tokens.len()];
    let mut open: Vec<usize> = Vec::new();
    for (at, token) in tokens.iter().enumerate().filter(|(_, token)| token.kind == Kind::Punct) {
        match &text[token.start..token.end] {
            "(" | "[" | "{" => open.push(at),
            ")" | "]" | "}" => {
                if let Some(start) = open.pop() {
                    closes[start] = Some(at);
                }
            }
            _ => {}
        }
    }
    closes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_found_with_their_bodies() {
        let source = "fn a<T>(f: fn(u8) -> u8) -> [u8; 2] where T: X { { } }\ntrait T { fn b(); fn c() { } }";
        let file = SourceFile::parse("a.rs", source);
        let names: Vec<_> = file.functions.iter().map(|function| function.name.as_str()).collect();
        assert_eq!(names, ["a", "c"]);
        assert_eq!(file.subject(file.find(&["T", ":"]).next().unwrap()), "a.rs::a");
    }

    #[test]
    fn blank_lines_and_comments_are_no_code() {
        let file = SourceFile::parse("a.rs", "a;\n\n// b\n\"c\n d\n e\";\nf;");
        assert_eq!(file.code_lines(0..file.len()).into_iter().collect::<Vec<_>>(), [1, 4, 6, 7]);
    }
}
