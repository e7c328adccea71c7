//! Reading the text form.

use crate::attrs::{AttrError, AttrValue};
use crate::graph::Graph;
use crate::ids::ValueId;
use crate::ops::Op;
use crate::text::scan::{Blobs, Scanner};
use rlx_tensor::Shape;
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
    let (scan, graph) = (Scanner::new(text), Graph::new(""));
    let mut parser = Parser { scan, custom, graph, numbered: HashMap::new(), blobs: Blobs::new() };
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
    scan: Scanner<'t>,
    custom: CustomOps<'t>,
    graph: Graph,
    numbered: HashMap<u64, ValueId>,
    blobs: Blobs,
}

/// A result as it stands left of `=`.
struct Target {
    number: u64,
    label: Option<String>,
    shape: Shape,
    at: usize,
}

type Parsed<T> = Result<T, ParseError>;

impl Parser<'_> {
    fn file(&mut self) -> Parsed<()> {
        self.blobs = self.scan.blobs()?;
        self.scan.keyword("graph")?;
        self.graph = Graph::new(self.scan.string()?);
        self.scan.expect('{')?;
        while !self.scan.take('}') {
            if self.graph.values().len() >= MAX_VALUES {
                return self.scan.fail(format!("more than {MAX_VALUES} values"));
            }
            self.line()?;
        }
        self.scan.end(&self.blobs)
    }

    fn line(&mut self) -> Parsed<()> {
        let Some(first) = self.scan.peek() else { return self.scan.fail("the graph is not closed") };
        if first == '%' {
            return self.node();
        }
        let at = self.scan.at();
        match self.scan.word() {
            kind @ ("input" | "param" | "state") => self.interface(kind, at),
            "const" => self.constant(),
            "return" => self.outputs(at),
            _ => {
                self.scan.rewind(at);
                self.node()
            }
        }
    }

    fn interface(&mut self, kind: &str, at: usize) -> Parsed<()> {
        self.scan.expect('@')?;
        let name = self.scan.name()?;
        self.scan.expect(':')?;
        let shape = self.scan.shape()?;
        let declared = match kind {
            "input" => self.graph.input(&name, shape),
            "param" => self.graph.param(&name, shape),
            _ => self.graph.state(&name, shape),
        };
        match declared {
            Ok(_) => Ok(()),
            Err(_) => self.scan.fail_at(at, format!("{kind} name {name:?} is already taken")),
        }
    }

    fn label(&mut self) -> Parsed<Option<String>> {
        match self.scan.peek() {
            Some('"') => self.scan.string().map(Some),
            _ => Ok(None),
        }
    }

    fn target(&mut self) -> Parsed<Target> {
        self.scan.peek();
        let at = self.scan.at();
        self.scan.expect('%')?;
        let number = self.scan.number()?;
        let label = self.label()?;
        self.scan.expect(':')?;
        let shape = self.scan.shape()?;
        Ok(Target { number, label, shape, at })
    }

    fn define(&mut self, target: Target, value: ValueId) -> Parsed<()> {
        if self.graph.shape(value) != &target.shape {
            let reason = format!("is written as {}, but is {}", target.shape, self.graph.shape(value));
            return self.scan.fail_at(target.at, reason);
        }
        if let Some(label) = &target.label {
            self.graph.label(value, label);
        }
        match self.numbered.insert(target.number, value) {
            None => Ok(()),
            Some(_) => self.scan.fail_at(target.at, format!("%{} is defined twice", target.number)),
        }
    }

    fn constant(&mut self) -> Parsed<()> {
        let target = self.target()?;
        self.scan.expect('=')?;
        let tensor = self.scan.tensor(&target.shape, &self.blobs)?;
        let value = self.graph.constant(tensor);
        self.define(target, value)
    }

    fn value(&mut self) -> Parsed<ValueId> {
        self.scan.peek();
        let at = self.scan.at();
        if self.scan.take('@') {
            let name = self.scan.name()?;
            return match self.graph.by_name(&name) {
                Some(value) => Ok(value),
                None => self.scan.fail_at(at, format!("@{name} is not defined above")),
            };
        }
        self.scan.expect('%')?;
        let number = self.scan.number()?;
        match self.numbered.get(&number) {
            Some(&value) => Ok(value),
            None => self.scan.fail_at(at, format!("%{number} is not defined above")),
        }
    }

    fn node(&mut self) -> Parsed<()> {
        let mut targets = Vec::new();
        while self.scan.peek() == Some('%') {
            targets.push(self.target()?);
            if !self.scan.take(',') {
                self.scan.expect('=')?;
                break;
            }
        }
        self.scan.peek();
        let at = self.scan.at();
        let name = self.scan.word();
        self.scan.expect('(')?;
        let mut operands = Vec::new();
        while !self.scan.take(')') {
            operands.push(self.value()?);
            if !self.scan.take(',') {
                self.scan.expect(')')?;
                break;
            }
        }
        let attrs = self.scan.attrs()?;
        let op = find_op(name, &attrs, self.custom).or_else(|reason| self.scan.fail_at(at, reason))?;
        let results = match self.graph.add_at(op, &operands, *Location::caller()) {
            Ok(results) => results,
            Err(crate::graph::GraphError::Infer { cause, .. }) => {
                return self.scan.fail_at(at, format!("{name}: {cause}"));
            }
            Err(e) => return self.scan.fail_at(at, e.to_string()),
        };
        if results.len() != targets.len() {
            let reason = format!("{name} has {} results, {} are named", results.len(), targets.len());
            return self.scan.fail_at(at, reason);
        }
        targets.into_iter().zip(results).try_for_each(|(target, value)| self.define(target, value))
    }

    fn outputs(&mut self, at: usize) -> Parsed<()> {
        if !self.graph.outputs().is_empty() {
            return self.scan.fail_at(at, "outputs are given twice");
        }
        let mut outputs = Vec::new();
        loop {
            let name = self.scan.string()?;
            self.scan.expect(':')?;
            outputs.push((name, self.value()?));
            if !self.scan.take(',') {
                break;
            }
        }
        let named: Vec<(&str, ValueId)> = outputs.iter().map(|(name, v)| (name.as_str(), *v)).collect();
        self.graph.set_outputs(&named).or_else(|e| self.scan.fail_at(at, e.to_string()))
    }
}

/// An op by name and attributes, built in or from outside; the error says what is wrong.
pub fn find_op(name: &str, attrs: &[(String, AttrValue)], custom: CustomOps<'_>) -> Result<Op, String> {
    match Op::from_text(name, attrs).or_else(|| custom(name, attrs)) {
        Some(found) => found.map_err(|e| e.to_string()),
        None => Err(format!("unknown op {name:?}")),
    }
}
