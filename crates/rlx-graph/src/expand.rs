//! Writing decompositions: one short call for each primitive.

use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::broadcast::Broadcast;
use crate::ops::cast::to_dtype;
use crate::ops::iota::Iota;
use crate::ops::reduce::{Reduce, ReduceOp};
use crate::ops::reshape::Reshape;
use crate::ops::select::Select;
use crate::ops::slice::Slice;
use crate::ops::unary::{Unary, UnaryOp};
use rlx_tensor::{DType, Dim, Tensor};

/// Adds primitives to a graph.
#[derive(Debug)]
pub struct Expand<'g> {
    /// Where nodes go.
    pub graph: &'g mut Graph,
}

impl Expand<'_> {
    /// `f(x)`
    pub fn unary(&mut self, kind: UnaryOp, x: ValueId) -> Result<ValueId, GraphError> {
        self.graph.add_one(Unary { kind }, &[x])
    }

    /// `f(a, b)`
    pub fn binary(&mut self, kind: BinaryOp, a: ValueId, b: ValueId) -> Result<ValueId, GraphError> {
        self.graph.add_one(Binary { kind }, &[a, b])
    }

    /// `f(a, b)` with a number, which takes a's dtype.
    pub fn scalar(&mut self, kind: BinaryOp, a: ValueId, b: f64) -> Result<ValueId, GraphError> {
        let constant = self.number(b, self.graph.shape(a).dtype())?;
        self.binary(kind, a, constant)
    }

    /// A scalar constant.
    pub fn number(&mut self, value: f64, dtype: DType) -> Result<ValueId, GraphError> {
        let tensor = crate::eval::from_f64(&[], dtype, &[value]);
        match tensor {
            Ok(tensor) => Ok(self.graph.constant(tensor)),
            Err(_) => {
                let wide = self.graph.constant(Tensor::scalar(value));
                to_dtype(self.graph, wide, dtype)
            }
        }
    }

    /// One axis reduced, kept with extent 1.
    pub fn reduce(&mut self, kind: ReduceOp, x: ValueId, axis: usize) -> Result<ValueId, GraphError> {
        self.graph.add_one(Reduce { kind, axes: vec![axis], keep_dims: true }, &[x])
    }

    /// The same elements under other dims.
    pub fn reshape(&mut self, x: ValueId, dims: &[Dim]) -> Result<ValueId, GraphError> {
        self.graph.add_one(Reshape { dims: dims.to_vec() }, &[x])
    }

    /// Expanded to `dims`.
    pub fn broadcast(&mut self, x: ValueId, dims: &[Dim]) -> Result<ValueId, GraphError> {
        self.graph.add_one(Broadcast { dims: dims.to_vec() }, &[x])
    }

    /// Elements `start .. start + len` along an axis.
    pub fn slice(
        &mut self,
        x: ValueId,
        axis: usize,
        start: impl Into<Dim>,
        len: impl Into<Dim>,
    ) -> Result<ValueId, GraphError> {
        let rank = self.graph.shape(x).rank();
        self.graph.add_one(Slice::range(axis, rank, start, len), &[x])
    }

    /// `condition ? a : b`
    pub fn select(&mut self, condition: ValueId, a: ValueId, b: ValueId) -> Result<ValueId, GraphError> {
        self.graph.add_one(Select {}, &[condition, a, b])
    }

    /// `0, 1, .., len - 1` as I32.
    pub fn count_up(&mut self, len: &Dim) -> Result<ValueId, GraphError> {
        self.graph.add_one(Iota { dims: vec![len.clone()], axis: 0, dtype: DType::I32 }, &[])
    }

    /// As F32.
    pub fn float(&mut self, x: ValueId) -> Result<ValueId, GraphError> {
        to_dtype(self.graph, x, DType::F32)
    }
}
