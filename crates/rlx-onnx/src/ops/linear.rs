//! Matrix products.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Lowering;
use rlx_graph::ValueId;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::matmul::MatMul;
use rlx_tensor::DType;

type Lowered = Result<Vec<ValueId>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("MatMul", |l| {
        let (a, b) = (l.value(0)?, matrix_beside(l)?);
        product(l, a, b).map(|y| vec![y])
    }),
    Row::lower("Gemm", gemm),
];

/// Operand 1, as codes made numbers if it is a matrix of codes beside codes.
fn matrix_beside(l: &mut Lowering<'_>) -> Result<ValueId, Refusal> {
    if l.rank(1)? == 2 && l.rank(0)? >= 2 { l.value_beside(1, 0) } else { l.value(1) }
}

/// The NumPy product of two values: vectors get a dim of 1 that the result loses again.
pub fn product(l: &mut Lowering<'_>, a: ValueId, b: ValueId) -> Result<ValueId, Refusal> {
    let dtype = l.shape_of(a).dtype();
    let (mut x, mut y) = (a, b);
    if !dtype.is_float() {
        (x, y) = (l.cast(x, DType::F64)?, l.cast(y, DType::F64)?);
    }
    if l.shape_of(x).rank() > 1 && l.shape_of(y).rank() > 1 {
        let result = l.add(MatMul::plain(), &[x, y])?;
        return l.cast(result, dtype);
    }
    let (left, right) = (l.dims_of(x)?, l.dims_of(y)?);
    if left.is_empty() || right.is_empty() {
        return invalid("a scalar has no matrix product");
    }
    if left.len() == 1 {
        x = l.reshape(x, &[1, left[0]])?;
    }
    if right.len() == 1 {
        y = l.reshape(y, &[right[0], 1])?;
    }
    let mut result = l.add(MatMul::plain(), &[x, y])?;
    if left.len() == 1 || right.len() == 1 {
        let mut dims = l.dims_of(result)?;
        if right.len() == 1 {
            dims.pop();
        }
        if left.len() == 1 {
            let row = dims.len() - if right.len() == 1 { 1 } else { 2 };
            dims.remove(row);
        }
        result = l.reshape(result, &dims)?;
    }
    l.cast(result, dtype)
}

fn gemm(l: &mut Lowering<'_>) -> Lowered {
    let (alpha, beta) = (l.node.float("alpha", 1.0)?, l.node.float("beta", 1.0)?);
    let op =
        MatMul { transpose_a: l.node.flag("transA", false)?, transpose_b: l.node.flag("transB", false)? };
    let a = l.value(0)?;
    let b = if op.transpose_a { l.value(1)? } else { matrix_beside(l)? };
    if l.rank(0)? != 2 || l.rank(1)? != 2 {
        return invalid("both matrices must have rank 2");
    }
    let dtype = l.dtype(0)?;
    let whole = !dtype.is_float();
    let (x, y) = if whole { (l.cast(a, DType::F64)?, l.cast(b, DType::F64)?) } else { (a, b) };
    let mut result = l.add(op, &[x, y])?;
    if alpha != 1.0 {
        result = l.expand().scalar(BinaryOp::Mul, result, alpha)?;
    }
    if let Some(mut c) = l.optional(2)? {
        if whole {
            c = l.cast(c, DType::F64)?;
        }
        if beta != 1.0 {
            c = l.expand().scalar(BinaryOp::Mul, c, beta)?;
        }
        result = l.expand().binary(BinaryOp::Add, result, c)?;
    }
    Ok(vec![l.cast(result, dtype)?])
}
