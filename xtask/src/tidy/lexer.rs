//! A light Rust tokenizer: enough to tell code from comments, strings and lifetimes.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ident,
    Lifetime,
    /// String, byte string, C string or raw string, quotes included.
    Text,
    Char,
    Number,
    Punct,
}

/// One token; `start..end` are byte offsets, lines count from 1.
#[derive(Clone, Copy, Debug)]
pub struct Token {
    pub kind: Kind,
    pub start: usize,
    pub end: usize,
    pub line: usize,
}

/// Splits `source` into tokens; comments and white space are dropped, unterminated items end with the file.
pub fn tokenize(source: &str) -> Vec<Token> {
    let mut lexer = Lexer { source, at: 0, line: 1 };
    let mut tokens = Vec::new();
    while lexer.skip_blank() {
        let (start, line) = (lexer.at, lexer.line);
        let kind = lexer.token();
        tokens.push(Token { kind, start, end: lexer.at, line });
    }
    tokens
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: usize,
}

impl Lexer<'_> {
    fn peek(&self, ahead: usize) -> char {
        self.source[self.at..].chars().nth(ahead).unwrap_or('\0')
    }

    fn done(&self) -> bool {
        self.at >= self.source.len()
    }

    fn bump(&mut self) {
        let c = self.peek(0);
        if c == '\n' {
            self.line += 1;
        }
        if !self.done() {
            self.at += c.len_utf8();
        }
    }

    fn bump_while(&mut self, keep: impl Fn(char) -> bool) {
        while !self.done() && keep(self.peek(0)) {
            self.bump();
        }
    }

    /// Skips white space and comments; false at the end of the file.
    fn skip_blank(&mut self) -> bool {
        loop {
            self.bump_while(char::is_whitespace);
            if self.done() {
                return false;
            }
            match (self.peek(0), self.peek(1)) {
                ('/', '/') => self.bump_while(|c| c != '\n'),
                ('/', '*') => self.skip_block_comment(),
                _ => return true,
            }
        }
    }

    fn skip_block_comment(&mut self) {
        let mut depth = 0;
        while !self.done() {
            match (self.peek(0), self.peek(1)) {
                ('/', '*') => depth += 1,
                ('*', '/') => depth -= 1,
                _ => {
                    self.bump();
                    continue;
                }
            }
            self.bump();
            self.bump();
            if depth == 0 {
                return;
            }
        }
    }

    fn token(&mut self) -> Kind {
        match self.peek(0) {
            '"' => self.quoted('"', Kind::Text),
            '\'' => self.char_or_lifetime(),
            c if c.is_ascii_digit() => self.number(),
            c if is_ident(c) => self.word(),
            _ => {
                self.bump();
                Kind::Punct
            }
        }
    }

    fn quoted(&mut self, quote: char, kind: Kind) -> Kind {
        self.bump();
        while !self.done() {
            match self.peek(0) {
                '\\' => self.bump(),
                c if c == quote => {
                    self.bump();
                    return kind;
                }
                _ => {}
            }
            self.bump();
        }
        kind
    }

    fn char_or_lifetime(&mut self) -> Kind {
        if self.peek(1) == '\\' || self.peek(2) == '\'' {
            return self.quoted('\'', Kind::Char);
        }
        self.bump();
        self.bump_while(is_ident);
        Kind::Lifetime
    }

    fn number(&mut self) -> Kind {
        let start = self.at;
        loop {
            let c = self.peek(0);
            let radix = self.source[start..].starts_with("0x");
            let exponent = matches!(c, 'e' | 'E') && !radix && matches!(self.peek(1), '+' | '-');
            if exponent {
                self.bump();
                self.bump();
            } else if is_ident(c) || (c == '.' && self.peek(1).is_ascii_digit()) {
                self.bump();
            } else {
                return Kind::Number;
            }
        }
    }

    fn word(&mut self) -> Kind {
        let start = self.at;
        self.bump_while(is_ident);
        let word = &self.source[start..self.at];
        let raw = matches!(word, "r" | "br" | "cr");
        if raw && matches!(self.peek(0), '"' | '#') {
            let hashes = self.source[self.at..].chars().take_while(|&c| c == '#').count();
            if self.peek(hashes) == '"' {
                return self.raw_text(hashes);
            }
            self.bump();
            self.bump_while(is_ident);
            return Kind::Ident;
        }
        match (word, self.peek(0)) {
            ("b" | "c", '"') => self.quoted('"', Kind::Text),
            ("b", '\'') => self.quoted('\'', Kind::Char),
            _ => Kind::Ident,
        }
    }

    fn raw_text(&mut self, hashes: usize) -> Kind {
        let close = format!("\"{}", "#".repeat(hashes));
        let body = self.at + hashes + 1;
        let end =
            self.source[body..].find(&close).map_or(self.source.len(), |found| body + found + close.len());
        self.line += self.source[self.at..end].matches('\n').count();
        self.at = end;
        Kind::Text
    }
}

fn is_ident(c: char) -> bool {
    c == '_' || c.is_alphanumeric()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> Vec<(Kind, &str)> {
        tokenize(source).iter().map(|t| (t.kind, &source[t.start..t.end])).collect()
    }

    #[test]
    fn comments_and_strings_hide_their_words() {
        let found = words("a /* unsafe /* b */ */ \"unsafe \\\" x\" // unsafe\nr#\"unsafe \"quoted\" \"# c");
        let idents: Vec<_> =
            found.iter().filter(|(kind, _)| *kind == Kind::Ident).map(|(_, text)| *text).collect();
        assert_eq!(idents, ["a", "c"]);
    }

    #[test]
    fn lifetimes_are_not_characters() {
        assert_eq!(words("&'a str")[1], (Kind::Lifetime, "'a"));
        assert_eq!(words("('a', '\\'', b'{', 'é')")[1], (Kind::Char, "'a'"));
        assert_eq!(words("b'{' x").len(), 2);
    }

    #[test]
    fn numbers_ranges_and_raw_identifiers() {
        let texts = |source| words(source).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(texts("0..10"), ["0", ".", ".", "10"]);
        assert_eq!(texts("1.5e-3f32 + 0xe-1"), ["1.5e-3f32", "+", "0xe", "-", "1"]);
        assert_eq!(texts("r#type x"), ["r#type", "x"]);
    }

    #[test]
    fn lines_are_those_of_the_first_character() {
        let source = "a\n\"x\ny\"\nb";
        assert_eq!(tokenize(source).iter().map(|t| t.line).collect::<Vec<_>>(), [1, 2, 4]);
    }
}
