//! Meaning: the graph, its ops, their reference evaluation, text form, rewrites and passes.

pub mod attrs;
pub mod eval;
pub mod expand;
mod graph;
mod ids;
pub mod op;
pub mod ops;

pub use graph::{DimCheck, Graph, GraphError, Node, Source, Value};
pub use ids::{NodeId, ValueId};
pub use op::{Cost, EvalError, InferCx, InferError, OpDef, Props};
pub use ops::Op;
