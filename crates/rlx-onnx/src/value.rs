//! Typed values at the boundary of a model: tensors, strings, narrow codes, sequences and optionals.

use crate::coding::Coding;
use crate::error::{Refusal, invalid};
use rlx::weights::{LazyBytes, SharedBytes, WeightBytes};
use rlx_graph::eval;
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::storage::mapped::MappedRange;
use rlx_tensor::{DType, Tensor};
use std::sync::Arc;
use std::{fmt, io};

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// A dtype that graphs compute on.
    Plain(DType),
    /// A narrow type that is decoded before anything is computed.
    Coded(Coding),
    /// Text.
    Text,
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ElementType::Plain(dtype) => write!(f, "{dtype}"),
            ElementType::Coded(coding) => write!(f, "{coding:?}"),
            ElementType::Text => f.write_str("string"),
        }
    }
}

impl ElementType {
    /// The type with this number in ONNX files; `None` for a number that means none.
    pub fn from_onnx(code: i32) -> Option<ElementType> {
        let plain = [
            (1, DType::F32),
            (2, DType::U8),
            (3, DType::I8),
            (4, DType::U16),
            (5, DType::I16),
            (6, DType::I32),
            (7, DType::I64),
            (9, DType::Bool),
            (10, DType::F16),
            (11, DType::F64),
            (12, DType::U32),
            (13, DType::U64),
            (14, DType::C64),
            (15, DType::C128),
            (16, DType::BF16),
        ];
        if code == 8 {
            return Some(ElementType::Text);
        }
        let plain = plain.iter().find(|(number, _)| *number == code).map(|(_, d)| ElementType::Plain(*d));
        plain.or_else(|| Coding::from_onnx(code).map(ElementType::Coded))
    }
}

/// A tensor of narrow codes, one to a byte whatever their width.
#[derive(Debug, Clone, PartialEq)]
pub struct CodedTensor {
    /// What the codes mean.
    pub coding: Coding,
    /// Extents.
    pub dims: Vec<usize>,
    /// One code an element.
    pub codes: Vec<u8>,
}

/// A tensor of text.
#[derive(Debug, Clone, PartialEq)]
pub struct TextTensor {
    /// Extents.
    pub dims: Vec<usize>,
    /// One string an element.
    pub items: Vec<String>,
}

/// Numbers that are weights: read where they are, shared with the registry.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub dims: Vec<usize>,
    /// Where the elements are.
    pub content: WeightBytes,
}

/// Mapped weights start at a multiple of this, as kernels read them in place.
const ALIGNMENT: usize = 64;

/// A part of a file that does not start where kernels can read it in place.
#[derive(Debug)]
struct Unaligned(MappedRange);

impl LazyBytes for Unaligned {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn load(&self) -> io::Result<SharedBytes> {
        self.0.still_valid().map_err(io::Error::other)?;
        Ok(AlignedBytes::copied_from(self.0.bytes()).into())
    }
}

impl StoredTensor {
    /// The elements as bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.content {
            WeightBytes::Owned(bytes) => bytes.as_slice(),
            WeightBytes::Mapped(range) => range.bytes(),
            _ => &[],
        }
    }

    /// Where the elements are, as a registry takes them: what kernels cannot read in place is copied when it is needed.
    pub fn weight(&self) -> WeightBytes {
        match &self.content {
            WeightBytes::Mapped(range) if !range.offset().is_multiple_of(ALIGNMENT) => {
                WeightBytes::Lazy(Arc::new(Unaligned(range.clone())))
            }
            content => content.clone(),
        }
    }

    /// A copy as a tensor.
    pub fn loaded(&self) -> Result<Tensor, Refusal> {
        Ok(Tensor::from_bytes(&self.dims, self.dtype, self.bytes())?)
    }
}

/// A value of a model.
#[derive(Debug, Clone)]
pub enum Value {
    /// Numbers of a large initialiser.
    Stored(StoredTensor),
    /// Numbers.
    Tensor(Tensor),
    /// Narrow numbers.
    Coded(CodedTensor),
    /// Text.
    Text(TextTensor),
    /// Values in order.
    Sequence(Vec<Value>),
    /// A value or nothing.
    Optional(Option<Box<Value>>),
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Self {
        Value::Tensor(tensor)
    }
}

impl Value {
    /// The same value with a stored tensor copied into memory of its own.
    pub fn loaded(&self) -> Result<Value, Refusal> {
        match self {
            Value::Stored(stored) => Ok(Value::Tensor(stored.loaded()?)),
            other => Ok(other.clone()),
        }
    }

    /// What kind of value it is, in words.
    pub fn describe(&self) -> String {
        match self {
            Value::Tensor(t) => format!("{}{:?}", t.dtype(), t.dims()),
            Value::Stored(t) => format!("{}{:?}", t.dtype, t.dims),
            Value::Coded(t) => format!("{:?}{:?}", t.coding, t.dims),
            Value::Text(t) => format!("string{:?}", t.dims),
            Value::Sequence(items) => format!("sequence of {}", items.len()),
            Value::Optional(None) => "empty optional".to_owned(),
            Value::Optional(Some(inner)) => format!("optional {}", inner.describe()),
        }
    }

    /// Extents of a tensor of any kind.
    pub fn dims(&self) -> Option<&[usize]> {
        match self {
            Value::Tensor(t) => Some(t.dims()),
            Value::Stored(t) => Some(&t.dims),
            Value::Coded(t) => Some(&t.dims),
            Value::Text(t) => Some(&t.dims),
            _ => None,
        }
    }

    /// Element type of a tensor of any kind.
    pub fn element(&self) -> Option<ElementType> {
        match self {
            Value::Tensor(t) => Some(ElementType::Plain(t.dtype())),
            Value::Stored(t) => Some(ElementType::Plain(t.dtype)),
            Value::Coded(t) => Some(ElementType::Coded(t.coding)),
            Value::Text(_) => Some(ElementType::Text),
            _ => None,
        }
    }

    /// The tensor of numbers it is.
    pub fn tensor(&self) -> Result<&Tensor, Refusal> {
        match self {
            Value::Tensor(t) => Ok(t),
            Value::Optional(Some(inner)) => inner.tensor(),
            other => invalid(format!("a tensor of numbers is needed, found {}", other.describe())),
        }
    }

    /// The tensor of text it is.
    pub fn text(&self) -> Result<&TextTensor, Refusal> {
        match self {
            Value::Text(t) => Ok(t),
            other => invalid(format!("a tensor of strings is needed, found {}", other.describe())),
        }
    }

    /// The values of a sequence.
    pub fn sequence(&self) -> Result<&[Value], Refusal> {
        match self {
            Value::Sequence(items) => Ok(items),
            Value::Optional(Some(inner)) => inner.sequence(),
            other => invalid(format!("a sequence is needed, found {}", other.describe())),
        }
    }

    /// Elements as i64; floats are refused.
    pub fn ints(&self) -> Result<Vec<i64>, Refusal> {
        Ok(eval::to_i64(self.tensor()?)?)
    }

    /// Elements as f64, narrow codes decoded.
    pub fn floats(&self) -> Result<Vec<f64>, Refusal> {
        match self {
            Value::Coded(t) => Ok(t.codes.iter().map(|&code| t.coding.decode(code)).collect()),
            other => Ok(eval::to_f64(other.tensor()?)?),
        }
    }

    /// The only element as i64.
    pub fn int(&self) -> Result<i64, Refusal> {
        match self.ints()?.as_slice() {
            [only] => Ok(*only),
            more => invalid(format!("a single integer is needed, found {}", more.len())),
        }
    }

    /// The only element as truth value.
    pub fn truth(&self) -> Result<bool, Refusal> {
        Ok(self.int()? != 0)
    }

    /// Bytes it holds, roughly.
    pub fn bytes(&self) -> usize {
        match self {
            Value::Tensor(t) => t.bytes().len(),
            Value::Stored(t) => t.content.len(),
            Value::Coded(t) => t.codes.len(),
            Value::Text(t) => t.items.iter().map(|s| s.len() + size_of::<String>()).sum(),
            Value::Sequence(items) => items.iter().map(Value::bytes).sum(),
            Value::Optional(inner) => inner.as_ref().map_or(0, |v| v.bytes()),
        }
    }

    /// The same bits throughout.
    pub fn same(&self, other: &Value) -> bool {
        match (self, other) {
            (Value::Tensor(a), Value::Tensor(b)) => a.bits_eq(b),
            (Value::Stored(a), Value::Stored(b)) => {
                a.dtype == b.dtype && a.dims == b.dims && a.bytes() == b.bytes()
            }
            (Value::Coded(a), Value::Coded(b)) => a == b,
            (Value::Text(a), Value::Text(b)) => a == b,
            (Value::Sequence(a), Value::Sequence(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x.same(y))
            }
            (Value::Optional(None), Value::Optional(None)) => true,
            (Value::Optional(Some(a)), Value::Optional(Some(b))) => a.same(b),
            _ => false,
        }
    }
}

/// A scalar of Bool.
pub fn truth_tensor(value: bool) -> Result<Value, Refusal> {
    Ok(Value::Tensor(eval::from_i64(&[], DType::Bool, &[i64::from(value)])?))
}

/// Values of an element type from f64, each rounded once.
pub fn from_floats(element: ElementType, dims: &[usize], values: &[f64]) -> Result<Value, Refusal> {
    Ok(match element {
        ElementType::Plain(dtype) => Value::Tensor(eval::from_f64(dims, dtype, values)?),
        ElementType::Coded(coding) => {
            let codes = values.iter().map(|&v| coding.encode(v, true)).collect();
            Value::Coded(CodedTensor { coding, dims: dims.to_vec(), codes })
        }
        ElementType::Text => return invalid("numbers are no text"),
    })
}
