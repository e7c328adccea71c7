//! The imported form of a model: nodes over numbered slots, with attributes typed and functions written out.

use crate::error::{Refusal, invalid};
use crate::program::Program;
use crate::value::{ElementType, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A value's number within its program.
pub type Slot = usize;

/// A dim as an interface declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeclaredDim {
    /// A number.
    Known(usize),
    /// A name.
    Named(String),
    /// Nothing is said.
    Open,
}

/// An input or output as the file declares it.
#[derive(Debug, Clone, PartialEq)]
pub struct Declared {
    /// Its name.
    pub name: String,
    /// Element type, for tensors.
    pub element: Option<ElementType>,
    /// Dims, where the rank is known.
    pub dims: Option<Vec<DeclaredDim>>,
}

/// An attribute's value.
#[derive(Debug, Clone)]
pub enum Attr {
    /// A number.
    Float(f32),
    /// An integer.
    Int(i64),
    /// Text.
    Text(String),
    /// A tensor.
    Tensor(Value),
    /// A graph.
    Graph(Arc<Program>),
    /// Numbers.
    Floats(Vec<f32>),
    /// Integers.
    Ints(Vec<i64>),
    /// Texts.
    Texts(Vec<String>),
    /// The element type of a type.
    Type(Option<ElementType>),
    /// A kind that no op here reads.
    Other(i32),
}

/// One application of an op.
#[derive(Debug, Clone)]
pub struct NodeDef {
    /// Its name, or what it produces.
    pub name: String,
    /// Op name.
    pub op: String,
    /// Domain; empty for the default one.
    pub domain: String,
    /// The domain's version.
    pub opset: i64,
    /// Operands; nothing where one is left out.
    pub inputs: Vec<Option<Slot>>,
    /// Values that its graphs take from around them, graph after graph in order of the attributes' names.
    pub captures: Vec<Slot>,
    /// Results; nothing where one is not wanted.
    pub outputs: Vec<Option<Slot>>,
    /// Attributes by name.
    pub attrs: BTreeMap<String, Attr>,
}

impl NodeDef {
    /// Domain and op, as messages spell them.
    pub fn label(&self) -> String {
        if self.domain.is_empty() { self.op.clone() } else { format!("{}::{}", self.domain, self.op) }
    }

    /// Every slot it reads.
    pub fn reads(&self) -> impl Iterator<Item = Slot> + '_ {
        self.inputs.iter().flatten().chain(&self.captures).copied()
    }
}

/// Reading attributes.
impl NodeDef {
    fn wrong<T>(&self, name: &str, wanted: &str, found: &Attr) -> Result<T, Refusal> {
        let mut found = format!("{found:?}");
        found.truncate(found.char_indices().nth(60).map_or(found.len(), |(at, _)| at));
        invalid(format!("attribute {name:?} must be {wanted}, found {found}"))
    }

    /// An integer attribute.
    pub fn int_opt(&self, name: &str) -> Result<Option<i64>, Refusal> {
        match self.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Int(value)) => Ok(Some(*value)),
            Some(other) => self.wrong(name, "an integer", other),
        }
    }

    /// An integer attribute with its default.
    pub fn int(&self, name: &str, default: i64) -> Result<i64, Refusal> {
        Ok(self.int_opt(name)?.unwrap_or(default))
    }

    /// An integer attribute that is a truth value, with its default.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, Refusal> {
        Ok(self.int(name, i64::from(default))? != 0)
    }

    /// A number attribute.
    pub fn float_opt(&self, name: &str) -> Result<Option<f64>, Refusal> {
        match self.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Float(value)) => Ok(Some(f64::from(*value))),
            Some(other) => self.wrong(name, "a float", other),
        }
    }

    /// A number attribute with its default.
    pub fn float(&self, name: &str, default: f64) -> Result<f64, Refusal> {
        Ok(self.float_opt(name)?.unwrap_or(default))
    }

    /// An attribute of integers.
    pub fn ints_opt(&self, name: &str) -> Result<Option<Vec<i64>>, Refusal> {
        match self.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Ints(values)) => Ok(Some(values.clone())),
            Some(other) => self.wrong(name, "a list of integers", other),
        }
    }

    /// An attribute of numbers.
    pub fn floats_opt(&self, name: &str) -> Result<Option<Vec<f64>>, Refusal> {
        match self.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Floats(values)) => Ok(Some(values.iter().map(|&v| f64::from(v)).collect())),
            Some(other) => self.wrong(name, "a list of floats", other),
        }
    }

    /// A text attribute.
    pub fn text_opt(&self, name: &str) -> Result<Option<&str>, Refusal> {
        match self.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Text(value)) => Ok(Some(value)),
            Some(other) => self.wrong(name, "text", other),
        }
    }

    /// A text attribute with its default.
    pub fn text<'a>(&'a self, name: &str, default: &'a str) -> Result<&'a str, Refusal> {
        Ok(self.text_opt(name)?.unwrap_or(default))
    }

    /// An attribute of texts.
    pub fn texts_opt(&self, name: &str) -> Result<Option<&[String]>, Refusal> {
        match self.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Texts(values)) => Ok(Some(values)),
            Some(other) => self.wrong(name, "a list of texts", other),
        }
    }

    /// A tensor attribute.
    pub fn tensor_opt(&self, name: &str) -> Result<Option<&Value>, Refusal> {
        match self.attrs.get(name) {
            None => Ok(None),
            Some(Attr::Tensor(value)) => Ok(Some(value)),
            Some(other) => self.wrong(name, "a tensor", other),
        }
    }

    /// A graph attribute.
    pub fn graph(&self, name: &str) -> Result<&Arc<Program>, Refusal> {
        match self.attrs.get(name) {
            Some(Attr::Graph(program)) => Ok(program),
            Some(other) => self.wrong(name, "a graph", other),
            None => invalid(format!("attribute {name:?} is missing")),
        }
    }

    /// An attribute that names an element type by its number.
    pub fn element_opt(&self, name: &str) -> Result<Option<ElementType>, Refusal> {
        let Some(code) = self.int_opt(name)? else { return Ok(None) };
        let element = i32::try_from(code).ok().and_then(ElementType::from_onnx);
        element.map(Some).ok_or_else(|| Refusal::Invalid(format!("{name} {code} is no element type")))
    }
}

/// An axis counted from the front; a negative one is counted from the end.
pub fn axis_of(axis: i64, rank: usize) -> Result<usize, Refusal> {
    let size = rank as i64;
    let from_front = if axis < 0 { axis + size } else { axis };
    match usize::try_from(from_front) {
        Ok(axis) if axis < rank => Ok(axis),
        _ => invalid(format!("axis {axis} is outside rank {rank}")),
    }
}

/// Axes counted from the front, ascending, each once.
pub fn axes_of(axes: &[i64], rank: usize) -> Result<Vec<usize>, Refusal> {
    let mut known = axes.iter().map(|&a| axis_of(a, rank)).collect::<Result<Vec<_>, _>>()?;
    known.sort_unstable();
    if known.windows(2).any(|w| w[0] == w[1]) {
        return invalid(format!("axes {axes:?} name an axis twice"));
    }
    Ok(known)
}
