//! Running a case of the ONNX backend tests: a model with input and output files.

use crate::decode::{self, ExternalData};
use crate::error::OnnxError;
use crate::proto::{DimProto, ModelProto, OptionalProto, SequenceProto, TensorProto, TypeProto};
use crate::value::Value;
use bytes::Bytes;
use prost::Message;
use std::path::Path;

/// Which message a file of test data holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A tensor.
    Tensor,
    /// A sequence.
    Sequence,
    /// An optional.
    Optional,
}

fn read(path: &Path) -> Result<Bytes, OnnxError> {
    std::fs::read(path).map(Bytes::from).map_err(|source| OnnxError::Io { path: path.to_owned(), source })
}

fn parse<M: Message + Default>(path: &Path) -> Result<M, OnnxError> {
    M::decode(read(path)?).map_err(|e| OnnxError::Malformed { reason: e.to_string() })
}

/// A value from a file of test data.
///
/// # Errors
/// [`OnnxError::Io`], [`OnnxError::Malformed`], [`OnnxError::Tensor`].
pub fn read_value(path: &Path, kind: FileKind) -> Result<Value, OnnxError> {
    let mut external = ExternalData::default();
    match kind {
        FileKind::Tensor => decode::tensor(&parse::<TensorProto>(path)?, &mut external),
        FileKind::Sequence => decode::sequence(&parse::<SequenceProto>(path)?, &mut external),
        FileKind::Optional => decode::optional(&parse::<OptionalProto>(path)?, &mut external),
    }
}

/// A model file with every dim of its inputs made a name of its own, and no dims said of its outputs.
///
/// # Errors
/// [`OnnxError::Io`], [`OnnxError::Malformed`].
pub fn symbolic_model(path: &Path) -> Result<Vec<u8>, OnnxError> {
    let mut model = parse::<ModelProto>(path)?;
    if let Some(graph) = &mut model.graph {
        let initial: Vec<String> = graph.initializer.iter().map(|t| t.name.clone()).collect();
        for (i, info) in graph.input.iter_mut().enumerate().filter(|(_, info)| !initial.contains(&info.name))
        {
            let shape =
                info.value_type.as_mut().and_then(|t| t.tensor.as_mut()).and_then(|t| t.shape.as_mut());
            for (axis, dim) in shape.into_iter().flat_map(|s| s.dim.iter_mut()).enumerate() {
                *dim = DimProto { value: None, param: Some(format!("input{i}_axis{axis}")) };
            }
        }
        for info in &mut graph.output {
            if let Some(tensor) = info.value_type.as_mut().and_then(|t| t.tensor.as_mut()) {
                tensor.shape = None;
            }
        }
    }
    Ok(model.encode_to_vec())
}

fn kind_of(value_type: Option<&TypeProto>) -> FileKind {
    match value_type {
        Some(t) if t.optional.is_some() => FileKind::Optional,
        Some(t) if t.sequence.is_some() => FileKind::Sequence,
        _ => FileKind::Tensor,
    }
}

/// Names and kinds of what a model is given and gives.
#[derive(Debug, Clone, Default)]
pub struct Interface {
    /// Inputs that no initialiser gives, in order.
    pub inputs: Vec<(String, FileKind)>,
    /// Outputs, in order.
    pub outputs: Vec<(String, FileKind)>,
    /// Ops of the main graph, `domain::op`, in order of first use.
    pub ops: Vec<String>,
}

/// The interface of a model file.
///
/// # Errors
/// [`OnnxError::Io`], [`OnnxError::Malformed`].
pub fn interface(path: &Path) -> Result<Interface, OnnxError> {
    let graph = parse::<ModelProto>(path)?.graph.unwrap_or_default();
    let mut ops: Vec<String> = Vec::new();
    for node in &graph.node {
        let op = match node.domain.as_str() {
            "" | "ai.onnx" => node.op_type.clone(),
            domain => format!("{domain}::{}", node.op_type),
        };
        if !ops.contains(&op) {
            ops.push(op);
        }
    }
    let inputs = graph.input.iter().map(|i| (i.name.clone(), kind_of(i.value_type.as_ref())));
    let outputs = graph.output.iter().map(|i| (i.name.clone(), kind_of(i.value_type.as_ref())));
    Ok(Interface { inputs: inputs.collect(), outputs: outputs.collect(), ops })
}

/// Where a result differs from what is expected: element type, extents or values beyond `atol + rtol * |expected|`.
pub fn difference(expected: &Value, found: &Value, rtol: f64, atol: f64) -> Option<String> {
    let shapes = || format!("expected {}, found {}", expected.describe(), found.describe());
    match (expected, found) {
        (Value::Sequence(a), Value::Sequence(b)) => {
            if a.len() != b.len() {
                return Some(shapes());
            }
            a.iter().zip(b).enumerate().find_map(|(i, (x, y))| {
                difference(x, y, rtol, atol).map(|reason| format!("item {i}: {reason}"))
            })
        }
        (Value::Optional(None), Value::Optional(None)) => None,
        (Value::Optional(Some(a)), Value::Optional(Some(b))) => difference(a, b, rtol, atol),
        (Value::Optional(Some(a)), other) => difference(a, other, rtol, atol),
        (Value::Text(a), Value::Text(b)) => (a != b).then(|| format!("{a:?} {b:?}")),
        _ if expected.element() != found.element() || expected.dims() != found.dims() => Some(shapes()),
        _ => numbers_differ(expected, found, rtol, atol),
    }
}

fn numbers_differ(expected: &Value, found: &Value, rtol: f64, atol: f64) -> Option<String> {
    if expected.same(found) {
        return None;
    }
    let numbers = |value: &Value| match value {
        Value::Tensor(t) if t.dtype() == rlx_tensor::DType::C64 => {
            Ok(bytemuck::cast_slice::<u8, f32>(t.bytes()).iter().map(|&v| f64::from(v)).collect())
        }
        Value::Tensor(t) if t.dtype() == rlx_tensor::DType::C128 => {
            Ok(bytemuck::cast_slice::<u8, f64>(t.bytes()).to_vec())
        }
        other => other.floats(),
    };
    let (Ok(a), Ok(b)) = (numbers(expected), numbers(found)) else {
        return Some("values cannot be compared".to_owned());
    };
    let close =
        |x: f64, y: f64| (x.is_nan() && y.is_nan()) || x == y || (x - y).abs() <= atol + rtol * x.abs();
    let wrong: Vec<usize> = (0..a.len()).filter(|&i| !close(a[i], b[i])).collect();
    let first = *wrong.first()?;
    Some(format!(
        "{} of {} values differ, first at {first}: expected {}, found {}",
        wrong.len(),
        a.len(),
        a[first],
        b[first]
    ))
}
