//! Reading the text form.

use crate::attrs::{AttrError, AttrValue};
use crate::graph::Graph;
use crate::ids::ValueId;
use crate::ops::Op;
use half::{bf16, f16};
use rlx_tensor::{DType, Dim, Element, Shape, Tensor};
use std::collections::HashMap;
use std::panic::Location;
use std::str::FromStr;

/// Values in a graph read from text, at most.
const MAX_VALUES: usize = 1 << 22;

/// Text that is no graph.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {reason}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong there.
    pub reason: String,
}

/// Finds ops from outside by name and attributes; `None` if the name is unknown.
pub type CustomOps<'a> = &'a dyn Fn(&str, &[(String, AttrValue)]) -> Option<Result<Op, AttrError>>;

/// Reads a graph of built-in ops.
pub fn parse(text: &str) -> Result<Graph, ParseError> {
    parse_with(text, &|_, _| None)
}

/// Reads a graph that may hold ops from outside.
pub fn parse_with(text: &str, custom: CustomOps<'_>) -> Result<Graph, ParseError> {
    let blobs = HashMap::new();
    let mut parser = Parser { text, at: 0, custom, graph: Graph::new(""), numbered: HashMap::new(), blobs };
    parser.file()?;
    Ok(parser.graph)
}

impl FromStr for Graph {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Graph, ParseError> {
        parse(text)
    }
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    custom: CustomOps<'t>,
    graph: Graph,
    numbered: HashMap<u64, ValueId>,
    blobs: HashMap<u64, Vec<u8>>,
}

/// A result as it stands left of `=`.
struct Target {
    number: u64,
    label: Option<String>,
    shape: Shape,
    at: usize,
}

type Parsed<T> = Result<T, ParseError>;

impl<'t> Parser<'t> {
    fn fail_at<T>(&self, at: usize, reason: impl Into<String>) -> Parsed<T> {
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let start = before.rfind('\n').map_or(0, |i| i + 1);
        let column = before[start..].chars().count() + 1;
        Err(ParseError { line, column, reason: reason.into() })
    }

    fn fail<T>(&self, reason: impl Into<String>) -> Parsed<T> {
        self.fail_at(self.at, reason)
    }

    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn peek(&mut self) -> Option<char> {
        let trimmed = self.rest().trim_start();
        self.at = self.text.len() - trimmed.len();
        trimmed.chars().next()
    }

    fn take(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.at += c.len_utf8();
        }
        found
    }

    fn expect(&mut self, c: char) -> Parsed<()> {
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

    fn word(&mut self) -> &'t str {
        self.span(|c| c.is_ascii_alphanumeric() || c == '_')
    }

    fn number(&mut self) -> Parsed<u64> {
        let at = self.at;
        let digits = self.span(|c| c.is_ascii_digit());
        digits.parse().or_else(|_| self.fail_at(at, "expected a number"))
    }

    fn keyword(&mut self, word: &str) -> Parsed<()> {
        self.peek();
        let at = self.at;
        match self.word() {
            found if found == word => Ok(()),
            found => self.fail_at(at, format!("expected `{word}`, found {found:?}")),
        }
    }

    fn string(&mut self) -> Parsed<String> {
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

    fn file(&mut self) -> Parsed<()> {
        self.read_blobs()?;
        self.keyword("graph")?;
        self.graph = Graph::new(self.string()?);
        self.expect('{')?;
        while !self.take('}') {
            if self.graph.values().len() >= MAX_VALUES {
                return self.fail(format!("more than {MAX_VALUES} values"));
            }
            self.line()?;
        }
        match self.peek() {
            None => Ok(()),
            Some(_) if !self.blobs.is_empty() => Ok(()),
            Some(_) => self.fail("expected the end; blobs follow a `}` that stands alone on its line"),
        }
    }

    /// Blobs follow the graph; they are read first, so that constants find them.
    fn read_blobs(&mut self) -> Parsed<()> {
        let Some(end) = self.text.find("\n}\n").map(|i| i + 3) else { return Ok(()) };
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
                    if self.blobs.insert(number, bytes).is_some() {
                        return self.fail_at(at, format!("blob {number} is given twice"));
                    }
                }
                _ => return self.fail_at(start, "expected pairs of hexadecimal digits"),
            }
        }
        self.at = 0;
        Ok(())
    }

    fn line(&mut self) -> Parsed<()> {
        let Some(first) = self.peek() else { return self.fail("the graph is not closed") };
        if first == '%' {
            return self.node();
        }
        let at = self.at;
        match self.word() {
            kind @ ("input" | "param" | "state") => self.interface(kind, at),
            "const" => self.constant(),
            "return" => self.outputs(at),
            _ => {
                self.at = at;
                self.node()
            }
        }
    }

    fn interface(&mut self, kind: &str, at: usize) -> Parsed<()> {
        self.expect('@')?;
        let name = self.interface_name()?;
        self.expect(':')?;
        let shape = self.shape()?;
        let declared = match kind {
            "input" => self.graph.input(&name, shape),
            "param" => self.graph.param(&name, shape),
            _ => self.graph.state(&name, shape),
        };
        match declared {
            Ok(_) => Ok(()),
            Err(_) => self.fail_at(at, format!("{kind} name {name:?} is already taken")),
        }
    }

    fn interface_name(&mut self) -> Parsed<String> {
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

    fn shape(&mut self) -> Parsed<Shape> {
        self.peek();
        let at = self.at;
        let word = self.word();
        let dtype = word.parse::<DType>().or_else(|e| self.fail_at(at, e.to_string()))?;
        Ok(Shape::from_dims(self.dims()?, dtype))
    }

    fn dims(&mut self) -> Parsed<Vec<Dim>> {
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

    fn label(&mut self) -> Parsed<Option<String>> {
        match self.peek() {
            Some('"') => self.string().map(Some),
            _ => Ok(None),
        }
    }

    fn target(&mut self) -> Parsed<Target> {
        self.peek();
        let at = self.at;
        self.expect('%')?;
        let number = self.number()?;
        let label = self.label()?;
        self.expect(':')?;
        let shape = self.shape()?;
        Ok(Target { number, label, shape, at })
    }

    fn define(&mut self, target: Target, value: ValueId) -> Parsed<()> {
        if self.graph.shape(value) != &target.shape {
            let reason = format!("is written as {}, but is {}", target.shape, self.graph.shape(value));
            return self.fail_at(target.at, reason);
        }
        if let Some(label) = &target.label {
            self.graph.label(value, label);
        }
        match self.numbered.insert(target.number, value) {
            None => Ok(()),
            Some(_) => self.fail_at(target.at, format!("%{} is defined twice", target.number)),
        }
    }

    fn constant(&mut self) -> Parsed<()> {
        let target = self.target()?;
        self.expect('=')?;
        self.peek();
        let at = self.at;
        let Some(dims) = target.shape.known_dims() else {
            return self.fail_at(target.at, "a constant has no symbols in its dims");
        };
        let dtype = target.shape.dtype();
        let tensor = if self.take('[') {
            let mut words = Vec::new();
            while !self.take(']') {
                words.push(self.number_word()?);
                if !self.take(',') {
                    self.expect(']')?;
                    break;
                }
            }
            numbers(&dims, dtype, &words)
                .ok_or_else(|| format!("these are not the elements of {}", target.shape))
        } else {
            self.keyword("blob")?;
            let number = self.number()?;
            match self.blobs.get(&number) {
                Some(bytes) => Tensor::from_bytes(&dims, dtype, bytes).map_err(|e| e.to_string()),
                None => Err(format!("there is no blob {number}")),
            }
        };
        match tensor {
            Ok(tensor) => {
                let value = self.graph.constant(tensor);
                self.define(target, value)
            }
            Err(reason) => self.fail_at(at, reason),
        }
    }

    fn number_word(&mut self) -> Parsed<&'t str> {
        self.peek();
        let at = self.at;
        match self.span(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | ':')) {
            "" => self.fail_at(at, "expected a number"),
            word => Ok(word),
        }
    }

    fn value(&mut self) -> Parsed<ValueId> {
        self.peek();
        let at = self.at;
        if self.take('@') {
            let name = self.interface_name()?;
            return match self.graph.by_name(&name) {
                Some(value) => Ok(value),
                None => self.fail_at(at, format!("@{name} is not defined above")),
            };
        }
        self.expect('%')?;
        let number = self.number()?;
        match self.numbered.get(&number) {
            Some(&value) => Ok(value),
            None => self.fail_at(at, format!("%{number} is not defined above")),
        }
    }

    fn node(&mut self) -> Parsed<()> {
        let mut targets = Vec::new();
        while self.peek() == Some('%') {
            targets.push(self.target()?);
            if !self.take(',') {
                self.expect('=')?;
                break;
            }
        }
        self.peek();
        let at = self.at;
        let name = self.word();
        self.expect('(')?;
        let mut operands = Vec::new();
        while !self.take(')') {
            operands.push(self.value()?);
            if !self.take(',') {
                self.expect(')')?;
                break;
            }
        }
        let attrs = self.attrs()?;
        let found = Op::from_text(name, &attrs).or_else(|| (self.custom)(name, &attrs));
        let op = match found {
            Some(Ok(op)) => op,
            Some(Err(e)) => return self.fail_at(at, e.to_string()),
            None => return self.fail_at(at, format!("unknown op {name:?}")),
        };
        let results = match self.graph.add_at(op, &operands, *Location::caller()) {
            Ok(results) => results,
            Err(crate::graph::GraphError::Infer { cause, .. }) => {
                return self.fail_at(at, format!("{name}: {cause}"));
            }
            Err(e) => return self.fail_at(at, e.to_string()),
        };
        if results.len() != targets.len() {
            let reason = format!("{name} has {} results, {} are named", results.len(), targets.len());
            return self.fail_at(at, reason);
        }
        targets.into_iter().zip(results).try_for_each(|(target, value)| self.define(target, value))
    }

    fn attrs(&mut self) -> Parsed<Vec<(String, AttrValue)>> {
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

    fn outputs(&mut self, at: usize) -> Parsed<()> {
        if !self.graph.outputs().is_empty() {
            return self.fail_at(at, "outputs are given twice");
        }
        let mut outputs = Vec::new();
        loop {
            let name = self.string()?;
            self.expect(':')?;
            outputs.push((name, self.value()?));
            if !self.take(',') {
                break;
            }
        }
        let named: Vec<(&str, ValueId)> = outputs.iter().map(|(name, v)| (name.as_str(), *v)).collect();
        self.graph.set_outputs(&named).or_else(|e| self.fail_at(at, e.to_string()))
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
