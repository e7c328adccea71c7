//! Meaning: the graph, its ops, their reference evaluation, text form, rewrites and passes.

pub mod adapters;
pub mod attrs;
pub mod eval;
pub mod expand;
mod graph;
pub mod hir;
mod ids;
pub mod integer;
pub mod interpret;
pub mod op;
pub mod ops;
pub mod passes;
pub mod rewrite;
pub mod text;
pub mod verify;
mod window;

pub use graph::{DimCheck, Graph, GraphError, Node, Source, Value};
pub use hir::{HirModule, HirMut};
pub use ids::{NodeId, ValueId};
pub use interpret::{InterpretError, interpret};
pub use op::{Cost, EvalError, InferCx, InferError, OpDef, Props};
pub use ops::Op;
pub use text::ParseError;
pub use verify::{Stage, VerifyError, verify};
