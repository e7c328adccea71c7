//! Reading the text form of a dim.

use super::{Dim, DimError};
use std::str::FromStr;

/// Nesting allowed in a dim expression read from text.
const MAX_DEPTH: usize = 32;

struct Parser<'t> {
    text: &'t str,
    at: usize,
    depth: usize,
}

impl FromStr for Dim {
    type Err = DimError;

    /// Reads what `Display` prints: sums of products of numbers, symbols, `ceil_div(a, b)`, `floor_div(a, b)`, `min(a, b)`, `max(a, b)`.
    fn from_str(text: &str) -> Result<Dim, DimError> {
        let mut parser = Parser { text, at: 0, depth: 0 };
        let dim = parser.sum()?;
        match parser.peek() {
            None => Ok(dim),
            Some(c) => Err(parser.fail(format!("unexpected {c:?} at byte {}", parser.at))),
        }
    }
}

impl Parser<'_> {
    fn fail(&self, reason: impl Into<String>) -> DimError {
        DimError::Syntax { text: self.text.to_owned(), reason: reason.into() }
    }

    fn peek(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        let trimmed = rest.trim_start();
        self.at += rest.len() - trimmed.len();
        trimmed.chars().next()
    }

    fn take(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.at += c.len_utf8();
        }
        found
    }

    fn sum(&mut self) -> Result<Dim, DimError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.fail("nested too deeply"));
        }
        let mut total = match self.take('-') {
            true => Dim::Known(0) - self.product()?,
            false => self.product()?,
        };
        loop {
            if self.take('+') {
                total = total + self.product()?;
            } else if self.take('-') {
                total = total - self.product()?;
            } else {
                self.depth -= 1;
                return Ok(total);
            }
        }
    }

    fn product(&mut self) -> Result<Dim, DimError> {
        let mut product = self.factor()?;
        while self.take('*') {
            product = product * self.factor()?;
        }
        Ok(product)
    }

    fn factor(&mut self) -> Result<Dim, DimError> {
        let Some(first) = self.peek() else { return Err(self.fail("ends where a factor should stand")) };
        let is_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '#');
        let rest = &self.text[self.at..];
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let word = &rest[..end];
        self.at += end;
        if word.is_empty() {
            return Err(self.fail(format!("unexpected {first:?} at byte {}", self.at)));
        }
        if first.is_ascii_digit() {
            return word.parse().map(Dim::Known).map_err(|_| self.fail(format!("{word:?} is no size")));
        }
        if !self.take('(') {
            return Ok(Dim::symbol(word));
        }
        let left = self.sum()?;
        if !self.take(',') {
            return Err(self.fail(format!("{word} needs two arguments")));
        }
        let right = self.sum()?;
        if !self.take(')') {
            return Err(self.fail(format!("{word}( is not closed")));
        }
        match word {
            "ceil_div" => Ok(left.ceil_div(right)),
            "floor_div" => Ok(left.floor_div(right)),
            "min" => Ok(left.minimum(right)),
            "max" => Ok(left.maximum(right)),
            _ => Err(self.fail(format!("unknown function {word:?}"))),
        }
    }
}
