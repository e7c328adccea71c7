//! Words that the passes' patterns are written with.

use crate::ids::ValueId;
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::cast::Cast;
use crate::ops::unary::{Unary, UnaryOp};
use crate::rewrite::pat::op;
use crate::rewrite::{Draft, Pattern};
use rlx_tensor::DType;

/// `kind(a, b)`, in either order if `kind` is commutative.
pub(crate) fn binary(kind: BinaryOp, a: Pattern, b: Pattern) -> Pattern {
    op::<Binary>().attr(move |o: &Binary| o.kind == kind).with([a, b])
}

/// `kind(x)`
pub(crate) fn unary(kind: UnaryOp, x: Pattern) -> Pattern {
    op::<Unary>().attr(move |o: &Unary| o.kind == kind).with([x])
}

/// `kind(x)`
pub(crate) fn activation(kind: ActivationKind, x: Pattern) -> Pattern {
    op::<Activation>().attr(move |o: &Activation| o.kind == kind).with([x])
}

/// True for a value of some float dtype.
pub(crate) fn is_float(draft: &Draft, value: ValueId) -> bool {
    draft.shape(value).dtype().is_float()
}

/// True for F32.
pub(crate) fn is_f32(draft: &Draft, value: ValueId) -> bool {
    draft.shape(value).dtype() == DType::F32
}

/// What a weight is before it was widened to F32: ops with weight operands widen them themselves.
pub(crate) fn narrow(draft: &Draft, weight: ValueId) -> ValueId {
    match draft.made_by::<Cast>(weight) {
        Some((cast, node)) if cast.to == DType::F32 && is_float(draft, node.inputs()[0]) => node.inputs()[0],
        _ => weight,
    }
}

/// True for a value of rank 1 whose extent is the last dim of `of`: one number per column.
pub(crate) fn is_row_of(draft: &Draft, value: ValueId, of: ValueId) -> bool {
    let shape = draft.shape(value);
    shape.rank() == 1 && shape.last() == draft.shape(of).last()
}
