//! The pieces all text forms share: words, numbers, quoted text, shapes, attributes, constants.

use super::ParseError;
use crate::attrs::AttrValue;
use half::{bf16, f16};
use rlx_tensor::{DType, Dim, Element, Shape, Tensor};
use std::collections::HashMap;

type Parsed<T> = Result<T, ParseError>;

/// Constants that stand behind the text, by number.
pub type Blobs = HashMap<u64, Vec<u8>>;

/// A position in a text, and what can be read there. White space, line ends included, separates and is passed over.
#[derive(Debug, Clone)]
pub struct Scanner<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Scanner<'t> {
    /// A reader at the start of a text.
    pub fn new(text: &'t str) -> Self {
        Self { text, at: 0 }
    }

    /// The position in bytes.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Goes back to a position that [`Scanner::at`] gave.
    pub fn rewind(&mut self, at: usize) {
        self.at = at;
    }

    /// An error at a byte offset of the text, reported by line and column.
    pub fn fail_at<T>(&self, at: usize, reason: impl Into<String>) -> Parsed<T> {
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |i| i + 1);
        let column = before[start..].chars().count() + 1;
        Err(ParseError { line, column, reason: reason.into() })
    }

    /// An error at the reader's position.
    pub fn fail<T>(&self, reason: impl Into<String>) -> Parsed<T> {
        self.fail_at(self.at, reason)
    }

    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    /// The next character that is no white space; it becomes the position.
    pub fn peek(&mut self) -> Option<char> {
        let trimmed = self.rest().trim_start();
        self.at = self.text.len() - trimmed.len();
        trimmed.chars().next()
    }

    /// Passes this character if it comes next.
    pub fn take(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.at += c.len_utf8();
        }
        found
    }

    /// Passes this character, which must come next.
    pub fn expect(&mut self, c: char) -> Parsed<()> {
        match self.take(c) {
            true => Ok(()),
            false => {
                let found = self.peek().map_or("the end".to_owned(), |c| format!("{c:?}"));
                self.fail(format!("expected {c:?}, found {found}"))
            }
        }
    }

    fn span(&mut self, accepts: impl Fn(char) -> bool) -> &'t str {
        self.peek();
        let rest = self.rest();
        let end = rest.find(|c| !accepts(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// Letters, digits and underscores; empty if something else comes next.
    pub fn word(&mut self) -> &'t str {
        self.span(|c| c.is_ascii_alphanumeric() || c == '_')
    }

    /// An unsigned number.
    pub fn number(&mut self) -> Parsed<u64> {
        let at = self.at;
        let digits = self.span(|c| c.is_ascii_digit());
        digits.parse().or_else(|_| self.fail_at(at, "expected a number"))
    }

    /// Passes this word, which must come next.
    pub fn keyword(&mut self, word: &str) -> Parsed<()> {
        self.peek();
        let at = self.at;
        match self.word() {
            found if found == word => Ok(()),
            found => self.fail_at(at, format!("expected `{word}`, found {found:?}")),
        }
    }

    /// Quoted text.
    pub fn string(&mut self) -> Parsed<String> {
        self.expect('"')?;
        let mut result = String::new();
        loop {
            let Some(c) = self.rest().chars().next() else { return self.fail("the quotes are not closed") };
            self.at += c.len_utf8();
            match c {
                '"' => return Ok(result),
                '\\' => result.push(self.escape()?),
                c => result.push(c),
            }
        }
    }

    fn escape(&mut self) -> Parsed<char> {
        let at = self.at;
        if let Some(c @ ('"' | '\\')) = self.rest().chars().next() {
            self.at += 1;
            return Ok(c);
        }
        let code = self.rest().strip_prefix("u{").and_then(|r| r.split_once('}')).map(|(code, _)| code);
        let c = code.and_then(|code| u32::from_str_radix(code, 16).ok()).and_then(char::from_u32);
        match (code, c) {
            (Some(code), Some(c)) => {
                self.at += code.len() + 3;
                Ok(c)
            }
            _ => self.fail_at(at, "unknown escape"),
        }
    }

    /// A plain name or quoted text.
    pub fn name(&mut self) -> Parsed<String> {
        if self.rest().starts_with('"') {
            return self.string();
        }
        let at = self.at;
        let name = self.span(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/'));
        match name.is_empty() {
            true => self.fail_at(at, "expected a name"),
            false => Ok(name.to_owned()),
        }
    }

    /// A dtype with dims.
    pub fn shape(&mut self) -> Parsed<Shape> {
        self.peek();
        let at = self.at;
        let word = self.word();
        let dtype = word.parse::<DType>().or_else(|e| self.fail_at(at, e.to_string()))?;
        Ok(Shape::from_dims(self.dims()?, dtype))
    }

    /// A list of dims in brackets.
    pub fn dims(&mut self) -> Parsed<Vec<Dim>> {
        self.expect('[')?;
        let start = self.at;
        let Some(len) = self.rest().find(']') else { return self.fail("the list of dims is not closed") };
        let inside = &self.text[start..start + len];
        self.at += len + 1;
        if inside.trim().is_empty() {
            return Ok(Vec::new());
        }
        let mut dims = Vec::new();
        let (mut depth, mut from) = (0usize, 0);
        for (i, c) in inside.char_indices().chain([(inside.len(), ',')]) {
            match c {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                ',' if depth == 0 || i == inside.len() => {
                    let dim = inside[from..i].trim().parse::<Dim>();
                    dims.push(dim.or_else(|e| self.fail_at(start + from, e.to_string()))?);
                    from = i + 1;
                }
                _ => {}
            }
        }
        Ok(dims)
    }

    fn number_word(&mut self) -> Parsed<&'t str> {
        self.peek();
        let at = self.at;
        match self.span(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | ':')) {
            "" => self.fail_at(at, "expected a number"),
            word => Ok(word),
        }
    }

    /// An expression that ends before one of these characters, outside parentheses, or with its line.
    pub fn dim_until(&mut self, ends: &[char]) -> Parsed<Dim> {
        self.peek();
        let rest = self.rest();
        let (mut depth, mut len) = (0usize, rest.len());
        for (i, c) in rest.char_indices() {
            match c {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                c if c == '\n' || (depth == 0 && ends.contains(&c)) => {
                    len = i;
                    break;
                }
                _ => {}
            }
        }
        self.dim_of(len)
    }

    /// An expression that ends before ` word `, with its line at the latest.
    pub fn dim_before(&mut self, word: &str) -> Parsed<Dim> {
        self.peek();
        let rest = self.rest();
        let line = rest.find('\n').unwrap_or(rest.len());
        let end = rest[..line].find(&format!(" {word} ")).unwrap_or(line);
        self.dim_of(end)
    }

    fn dim_of(&mut self, len: usize) -> Parsed<Dim> {
        let at = self.at;
        let text = &self.text[at..at + len];
        self.at += len;
        text.trim().parse::<Dim>().or_else(|e| self.fail_at(at, e.to_string()))
    }

    /// Attributes in braces.
    pub fn attrs(&mut self) -> Parsed<Vec<(String, AttrValue)>> {
        self.expect('{')?;
        let mut attrs: Vec<(String, AttrValue)> = Vec::new();
        while !self.take('}') {
            self.peek();
            let at = self.at;
            let name = self.word().to_owned();
            if attrs.iter().any(|(n, _)| *n == name) {
                return self.fail_at(at, format!("attribute {name} is given twice"));
            }
            self.expect('=')?;
            attrs.push((name, self.attr()?));
            if !self.take(',') {
                self.expect('}')?;
                break;
            }
        }
        Ok(attrs)
    }

    fn attr(&mut self) -> Parsed<AttrValue> {
        match self.peek() {
            Some('"') => return self.string().map(AttrValue::Str),
            Some('[') => return self.list("an integer", |w| w.parse().ok()).map(AttrValue::Ints),
            _ => {}
        }
        let at = self.at;
        let word = self.span(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.' | ':'));
        Ok(match word {
            "true" => AttrValue::Bool(true),
            "false" => AttrValue::Bool(false),
            "none" => AttrValue::None,
            "dims" => AttrValue::Dims(self.dims()?),
            "floats" => AttrValue::Floats(self.list("a float", float)?),
            _ => match (word.parse::<i64>(), float(word), word.parse::<DType>()) {
                (Ok(value), ..) => AttrValue::Int(value),
                (_, Some(value), _) => AttrValue::Float(value),
                (.., Ok(dtype)) => AttrValue::DType(dtype),
                _ if super::is_word(word) => AttrValue::Str(word.to_owned()),
                _ => return self.fail_at(at, format!("{word:?} is no attribute value")),
            },
        })
    }

    fn list<T>(&mut self, expected: &str, read: impl Fn(&str) -> Option<T>) -> Parsed<Vec<T>> {
        self.expect('[')?;
        let mut items = Vec::new();
        while !self.take(']') {
            let at = self.at;
            let word = self.number_word()?;
            match read(word) {
                Some(item) => items.push(item),
                None => return self.fail_at(at, format!("{word:?} is not {expected}")),
            }
            if !self.take(',') {
                self.expect(']')?;
                break;
            }
        }
        Ok(items)
    }

    /// Reads the blobs that follow the closing brace of the text, wherever the position is; it is the start afterwards.
    pub fn blobs(&mut self) -> Parsed<Blobs> {
        let mut blobs = Blobs::new();
        let Some(end) = self.text.find("\n}\n").map(|i| i + 3) else { return Ok(blobs) };
        self.at = end;
        while self.peek().is_some() {
            self.keyword("blob")?;
            let at = self.at;
            let number = self.number()?;
            self.expect('=')?;
            self.expect('"')?;
            let start = self.at;
            let digits = self.span(|c| c.is_ascii_hexdigit());
            self.expect('"')?;
            let pair = |i: usize| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16);
            let bytes: Result<Vec<u8>, _> = (0..digits.len() / 2).map(pair).collect();
            match bytes {
                Ok(bytes) if digits.len().is_multiple_of(2) => {
                    if blobs.insert(number, bytes).is_some() {
                        return self.fail_at(at, format!("blob {number} is given twice"));
                    }
                }
                _ => return self.fail_at(start, "expected pairs of hexadecimal digits"),
            }
        }
        self.at = 0;
        Ok(blobs)
    }

    /// The end of the text, or of what stands before its blobs.
    pub fn end(&mut self, blobs: &Blobs) -> Parsed<()> {
        match self.peek() {
            None => Ok(()),
            Some(_) if !blobs.is_empty() => Ok(()),
            Some(_) => self.fail("expected the end; blobs follow a `}` that stands alone on its line"),
        }
    }

    /// The elements of a constant of this shape: a list in brackets or a blob.
    pub fn tensor(&mut self, shape: &Shape, blobs: &Blobs) -> Parsed<Tensor> {
        self.peek();
        let at = self.at;
        let Some(dims) = shape.known_dims() else {
            return self.fail("a constant has no symbols in its dims");
        };
        let dtype = shape.dtype();
        let tensor = if self.take('[') {
            let mut words = Vec::new();
            while !self.take(']') {
                words.push(self.number_word()?);
                if !self.take(',') {
                    self.expect(']')?;
                    break;
                }
            }
            numbers(&dims, dtype, &words).ok_or_else(|| format!("these are not the elements of {shape}"))
        } else {
            self.keyword("blob")?;
            let number = self.number()?;
            match blobs.get(&number) {
                Some(bytes) => Tensor::from_bytes(&dims, dtype, bytes).map_err(|e| e.to_string()),
                None => Err(format!("there is no blob {number}")),
            }
        };
        tensor.or_else(|reason| self.fail_at(at, reason))
    }
}

fn float(word: &str) -> Option<f64> {
    if let Some(bits) = word.strip_prefix("nan:") {
        return u64::from_str_radix(bits, 16).ok().map(f64::from_bits).filter(|v| v.is_nan());
    }
    match word {
        "nan" => Some(f64::NAN),
        "inf" => Some(f64::INFINITY),
        "-inf" => Some(f64::NEG_INFINITY),
        word if word.starts_with(|c: char| c.is_ascii_digit() || c == '-') => word.parse().ok(),
        _ => None,
    }
}

fn elements<T: Element>(dims: &[usize], words: &[&str], read: impl Fn(&str) -> Option<T>) -> Option<Tensor> {
    let values: Option<Vec<T>> = words.iter().map(|w| read(w)).collect();
    Tensor::from_slice(dims, &values?).ok()
}

/// A tensor from its elements as words; `None` if they are too many, too few or no numbers of this dtype.
pub(super) fn numbers(dims: &[usize], dtype: DType, words: &[&str]) -> Option<Tensor> {
    macro_rules! read {
        ($ty:ty) => {
            elements::<$ty>(dims, words, |w| w.parse().ok())
        };
    }
    match dtype {
        DType::F64 => read!(f64),
        DType::F32 => read!(f32),
        DType::F16 => elements(dims, words, |w| w.parse().ok().map(f16::from_f32)),
        DType::BF16 => elements(dims, words, |w| w.parse().ok().map(bf16::from_f32)),
        DType::I64 => read!(i64),
        DType::I32 => read!(i32),
        DType::I16 => read!(i16),
        DType::I8 => read!(i8),
        DType::U64 => read!(u64),
        DType::U32 => read!(u32),
        DType::U16 => read!(u16),
        DType::U8 => read!(u8),
        DType::Bool => read!(u8)?.bitcast(DType::Bool).ok(),
        _ => None,
    }
}
