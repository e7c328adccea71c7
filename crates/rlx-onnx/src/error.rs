//! What can go wrong between an ONNX file and its results.

use rlx::SessionError;
use rlx::aot::AotCacheError;
use rlx_graph::{EvalError, GraphError, InterpretError};
use rlx_tensor::TensorError;
use rlx_tensor::storage::mapped::MapError;
use std::io;
use std::path::PathBuf;

/// Why a model cannot be imported or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OnnxError {
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The bytes are no ONNX model.
    #[error("not an ONNX model: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
    /// A tensor of the file is broken.
    #[error("tensor {name:?}: {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The graph around the nodes is broken: names, inputs, outputs.
    #[error("graph {graph:?}: {reason}")]
    Graph {
        /// The graph.
        graph: String,
        /// What is wrong.
        reason: String,
    },
    /// A node is wrong, or does not fit its operands.
    #[error("node {node:?} ({op}): {reason}")]
    Node {
        /// The node's name, or what it produces if it has none.
        node: String,
        /// Domain and op.
        op: String,
        /// What is wrong.
        reason: String,
    },
    /// A node asks for something that is not supported.
    #[error("node {node:?} ({op}) is not supported: {reason}")]
    Unsupported {
        /// The node's name, or what it produces if it has none.
        node: String,
        /// Domain and op.
        op: String,
        /// Which part of it.
        reason: String,
    },
    /// An input given to a run is unknown, missing or of another type.
    #[error("input {name:?}: {reason}")]
    Input {
        /// The input.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A region of the model could not be compiled or run.
    #[error("{nodes}: {source}")]
    Region {
        /// Which nodes.
        nodes: String,
        /// Why.
        source: Box<SessionError>,
    },
    /// A compiled file cannot be written or used.
    #[error(transparent)]
    Compiled(#[from] AotCacheError),
    /// The model cannot be one compiled file.
    #[error("this model cannot be one compiled file: {reason}")]
    NotOneGraph {
        /// What stands against it, with nodes by name.
        reason: String,
    },
    /// The device cannot be used.
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Why a row of the op table does not give a result.
#[derive(Debug)]
pub enum Refusal {
    /// The graph can only be built once this operand's value is known.
    NeedsValue(usize),
    /// This form is evaluated between regions instead.
    Host,
    /// The node is wrong.
    Invalid(String),
    /// Nobody has written this form yet.
    Unsupported(String),
    /// An error that already says where.
    Inner(Box<OnnxError>),
}

impl From<GraphError> for Refusal {
    fn from(error: GraphError) -> Self {
        Refusal::Invalid(error.to_string())
    }
}

impl From<EvalError> for Refusal {
    fn from(error: EvalError) -> Self {
        Refusal::Invalid(error.to_string())
    }
}

impl From<TensorError> for Refusal {
    fn from(error: TensorError) -> Self {
        Refusal::Invalid(error.to_string())
    }
}

impl From<InterpretError> for Refusal {
    fn from(error: InterpretError) -> Self {
        Refusal::Invalid(error.to_string())
    }
}

impl From<OnnxError> for Refusal {
    fn from(error: OnnxError) -> Self {
        Refusal::Inner(Box::new(error))
    }
}

/// An error of a node that is wrong.
pub fn invalid<T>(reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Invalid(reason.into()))
}

/// An error of a form that is not supported.
pub fn unsupported<T>(reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Unsupported(reason.into()))
}
