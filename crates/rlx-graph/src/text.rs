//! The text form: one value or node a line, everything spelled out, read back to the same graph.
//!
//! ```text
//! graph "tiny" {
//!   input @ids : i32[rows]
//!   param @table : f32[100, 8]
//!   const %2 "half" : f32[] = [0.5]
//!   %3 : f32[rows, 8] = embedding(@ids, @table) {}
//!   %4 "y" : f32[rows, 8] = binary(%3, %2) {kind=mul}
//!   return "out": %4
//! }
//! ```
//!
//! Inputs, params and states are written `@name`, or `@"name"` where the name is no plain word; other values `%n`, n counting all
//! values in order. Attributes are all printed. A list of dims is `dims[rows, 2*batch]`, of integers `[1, 2]`, of floats
//! `floats[1.0]`; a word that is no dtype or keyword stands for itself, other text is quoted. Floats are the shortest decimal that
//! reads back to the same bits, or `inf`, `-inf`, `nan`, `nan:` with the bits. Constants of up to 16 plain numbers stand in the
//! line; others are `blob n`, whose bytes follow the graph in hexadecimal. Where nodes were added is not kept.

use crate::attrs::{AttrValue, Attrs};
use crate::graph::{Graph, Source};
use crate::ids::{NodeId, ValueId};
use half::{bf16, f16};
use rlx_tensor::{DType, Dim, Tensor};
use std::fmt::{self, Write};

mod parse;
mod scan;

pub use parse::{CustomOps, ParseError, find_op, parse, parse_with};
pub use scan::{Blobs, Scanner};

/// Elements of a constant that is written in its line, at most.
const INLINE_ELEMENTS: usize = 16;

/// Words that mean something of their own where an attribute value stands.
const KEYWORDS: [&str; 7] = ["true", "false", "none", "inf", "nan", "dims", "floats"];

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Printer::new(self).graph(f)
    }
}

/// What a line stands for.
enum Line {
    Value(ValueId),
    Node(NodeId),
}

struct Printer<'g> {
    graph: &'g Graph,
    lines: Vec<Line>,
    number: Vec<usize>,
}

impl<'g> Printer<'g> {
    fn new(graph: &'g Graph) -> Self {
        let mut printer = Printer { graph, lines: Vec::new(), number: vec![0; graph.values().len()] };
        let mut pending = graph.values().filter(|(_, v)| !matches!(v.source, Source::Node { .. })).peekable();
        let mut count = 0;
        for (id, node) in graph.nodes() {
            let first = node.outputs.iter().min().copied();
            let before = |v: ValueId| first.is_none_or(|f| v < f) || node.inputs.contains(&v);
            while let Some((value, _)) = pending.next_if(|&(v, _)| before(v)) {
                printer.place(value, &mut count);
                printer.lines.push(Line::Value(value));
            }
            node.outputs.iter().for_each(|&value| printer.place(value, &mut count));
            printer.lines.push(Line::Node(id));
        }
        for (value, _) in pending {
            printer.place(value, &mut count);
            printer.lines.push(Line::Value(value));
        }
        printer
    }

    fn place(&mut self, value: ValueId, count: &mut usize) {
        self.number[value.index()] = *count;
        *count += 1;
    }

    fn graph(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "graph {} {{", quoted(self.graph.name()))?;
        let mut blobs = Vec::new();
        for line in &self.lines {
            match *line {
                Line::Value(value) => self.value(f, value, &mut blobs)?,
                Line::Node(node) => self.node(f, node)?,
            }
        }
        if !self.graph.outputs().is_empty() {
            let output =
                |(name, value): &(String, ValueId)| format!("{}: {}", quoted(name), self.name(*value));
            let outputs: Vec<String> = self.graph.outputs().iter().map(output).collect();
            writeln!(f, "  return {}", outputs.join(", "))?;
        }
        writeln!(f, "}}")?;
        write_blobs(f, &blobs)
    }

    fn name(&self, value: ValueId) -> String {
        let record = self.graph.value(value);
        match (&record.source, &record.name) {
            (Source::Input | Source::Param | Source::State, Some(name)) if is_plain_name(name) => {
                format!("@{name}")
            }
            (Source::Input | Source::Param | Source::State, Some(name)) => format!("@{}", quoted(name)),
            _ => format!("%{}", self.number[value.index()]),
        }
    }

    fn label(&self, value: ValueId) -> String {
        let record = self.graph.value(value);
        match (&record.source, &record.name) {
            (Source::Const(_) | Source::Node { .. }, Some(name)) => format!(" {}", quoted(name)),
            _ => String::new(),
        }
    }

    fn value(&self, f: &mut fmt::Formatter<'_>, value: ValueId, blobs: &mut Vec<&'g Tensor>) -> fmt::Result {
        let record = self.graph.value(value);
        let kind = match &record.source {
            Source::Input => "input",
            Source::Param => "param",
            Source::State => "state",
            Source::Const(_) | Source::Node { .. } => "const",
        };
        write!(f, "  {kind} {}{} : {}", self.name(value), self.label(value), record.shape)?;
        if let Source::Const(tensor) = &record.source {
            write!(f, " = {}", const_text(tensor, blobs))?;
        }
        writeln!(f)
    }

    fn node(&self, f: &mut fmt::Formatter<'_>, id: NodeId) -> fmt::Result {
        let node = self.graph.node(id);
        let result = |&v: &ValueId| format!("{}{} : {}", self.name(v), self.label(v), self.graph.shape(v));
        let results: Vec<String> = node.outputs.iter().map(result).collect();
        let operands: Vec<String> = node.inputs.iter().map(|&v| self.name(v)).collect();
        let attrs = attrs_text(&node.op.def().attrs());
        let equals = if results.is_empty() { "" } else { " = " };
        let (results, operands) = (results.join(", "), operands.join(", "));
        writeln!(f, "  {results}{equals}{}({operands}) {attrs}", node.op.def().name())
    }
}

fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/'))
}

fn is_word(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Text in quotes, with what the quotes cannot hold escaped.
pub fn quoted(text: &str) -> String {
    let mut result = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => result.extend(['\\', c]),
            c if c.is_control() => {
                result.push_str("\\u{");
                result.push_str(&format!("{:x}", u32::from(c)));
                result.push('}');
            }
            c => result.push(c),
        }
    }
    result.push('"');
    result
}

fn float_text(value: f64) -> String {
    match value {
        v if v.is_nan() && v.to_bits() == f64::NAN.to_bits() => "nan".to_owned(),
        v if v.is_nan() => format!("nan:{:016x}", v.to_bits()),
        v => format!("{v:?}"),
    }
}

fn list<T>(prefix: &str, items: &[T], text: impl Fn(&T) -> String) -> String {
    let items: Vec<String> = items.iter().map(text).collect();
    format!("{prefix}[{}]", items.join(", "))
}

fn attr_text(value: &AttrValue) -> String {
    match value {
        AttrValue::Bool(v) => v.to_string(),
        AttrValue::Int(v) => v.to_string(),
        AttrValue::Float(v) => float_text(*v),
        AttrValue::Str(v) => {
            match is_word(v) && !KEYWORDS.contains(&v.as_str()) && v.parse::<DType>().is_err() {
                true => v.clone(),
                false => quoted(v),
            }
        }
        AttrValue::DType(v) => v.to_string(),
        AttrValue::Dims(v) => list("dims", v, Dim::to_string),
        AttrValue::Ints(v) => list("", v, i64::to_string),
        AttrValue::Floats(v) => list("floats", v, |v| float_text(*v)),
        AttrValue::None => "none".to_owned(),
    }
}

/// Attributes in braces.
pub fn attrs_text(attrs: &Attrs) -> String {
    let attrs: Vec<String> = attrs.iter().map(|(name, v)| format!("{name}={}", attr_text(v))).collect();
    format!("{{{}}}", attrs.join(", "))
}

/// The elements of a constant, or the number of a blob that is added to `blobs`.
pub fn const_text<'g>(tensor: &'g Tensor, blobs: &mut Vec<&'g Tensor>) -> String {
    match inline(tensor) {
        Some(text) => format!("[{text}]"),
        None => {
            blobs.push(tensor);
            format!("blob {}", blobs.len() - 1)
        }
    }
}

/// Writes the blobs that stand behind a text.
pub fn write_blobs(f: &mut dyn Write, blobs: &[&Tensor]) -> fmt::Result {
    for (i, tensor) in blobs.iter().enumerate() {
        write!(f, "blob {i} = \"")?;
        tensor.bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        writeln!(f, "\"")?;
    }
    Ok(())
}

/// The numbers of a small constant, if they read back to the same bits.
fn inline(tensor: &Tensor) -> Option<String> {
    if tensor.len() > INLINE_ELEMENTS {
        return None;
    }
    let mut text = String::new();
    macro_rules! write_numbers {
        ($ty:ty, $convert:expr) => {{
            for (i, &value) in tensor.as_slice::<$ty>().ok()?.iter().enumerate() {
                let comma = if i == 0 { "" } else { ", " };
                let value = $convert(value);
                write!(text, "{comma}{value:?}").ok()?;
            }
        }};
    }

    match tensor.dtype() {
        DType::F64 => write_numbers!(f64, std::convert::identity),
        DType::F32 => write_numbers!(f32, std::convert::identity),
        DType::F16 => write_numbers!(f16, f16::to_f32),
        DType::BF16 => write_numbers!(bf16, bf16::to_f32),
        DType::I64 => write_numbers!(i64, std::convert::identity),
        DType::I32 => write_numbers!(i32, std::convert::identity),
        DType::I16 => write_numbers!(i16, std::convert::identity),
        DType::I8 => write_numbers!(i8, std::convert::identity),
        DType::U64 => write_numbers!(u64, std::convert::identity),
        DType::U32 => write_numbers!(u32, std::convert::identity),
        DType::U16 => write_numbers!(u16, std::convert::identity),
        DType::U8 | DType::Bool => write_numbers!(u8, std::convert::identity),
        _ => return None,
    }
    let words: Vec<&str> = text.split(", ").filter(|w| !w.is_empty()).collect();
    let again = scan::numbers(tensor.dims(), tensor.dtype(), &words)?;
    again.bits_eq(tensor).then_some(text)
}

#[cfg(test)]
mod tests;
