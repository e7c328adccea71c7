//! Sequences and optionals.

use super::{Row, interpret_lowering};
use crate::error::{Refusal, invalid};
use crate::lower::{Host, Lowering};
use crate::model::axis_of;
use crate::value::{Value, truth_tensor};
use rlx_graph::ValueId;
use rlx_graph::ops::concat::Concat;
use rlx_tensor::Tensor;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("SequenceEmpty", |_| Ok(vec![Value::Sequence(Vec::new())])),
    Row::host("SequenceConstruct", |h| {
        Ok(vec![Value::Sequence(h.inputs.iter().flatten().cloned().collect())])
    }),
    Row::host("SequenceAt", |h| {
        let items = h.value(0)?.sequence()?;
        Ok(vec![items[position(h.value(1)?.int()?, items.len())?].clone()])
    }),
    Row::host("SequenceLength", |h| {
        let length = h.value(0)?.sequence()?.len();
        Ok(vec![Tensor::scalar(length as i64).into()])
    }),
    Row::host("SequenceInsert", insert),
    Row::host("SequenceErase", erase),
    Row::host("ConcatFromSequence", concat_from),
    Row::host("SplitToSequence", split_to),
    Row::host("Optional", |h| Ok(vec![Value::Optional(h.optional(0).cloned().map(Box::new))])),
    Row::host("OptionalHasElement", |h| {
        let has = h.optional(0).is_some_and(|v| !matches!(v, Value::Optional(None)));
        Ok(vec![truth_tensor(has)?])
    }),
    Row::host("OptionalGetElement", |h| match h.value(0)? {
        Value::Optional(Some(inner)) => Ok(vec![(**inner).clone()]),
        Value::Optional(None) => invalid("the optional is empty"),
        other => Ok(vec![other.clone()]),
    }),
];

fn position(at: i64, len: usize) -> Result<usize, Refusal> {
    let from_front = if at < 0 { at + len as i64 } else { at };
    match usize::try_from(from_front) {
        Ok(at) if at < len => Ok(at),
        _ => invalid(format!("position {at} is outside a sequence of {len}")),
    }
}

fn insert(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let mut items = h.value(0)?.sequence()?.to_vec();
    let at = match h.optional(2) {
        Some(at) => match at.int()? {
            at if at < 0 => position(at, items.len())?,
            at => position(at, items.len() + 1)?,
        },
        None => items.len(),
    };
    items.insert(at, h.value(1)?.clone());
    Ok(vec![Value::Sequence(items)])
}

fn erase(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let mut items = h.value(0)?.sequence()?.to_vec();
    let at = match h.optional(1) {
        Some(at) => at.int()?,
        None => -1,
    };
    items.remove(position(at, items.len())?);
    Ok(vec![Value::Sequence(items)])
}

fn join(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    let mut all = l.values()?;
    let stacked = l.node.flag("new_axis", false)?;
    let rank = l.rank(0)? + usize::from(stacked);
    let axis = axis_of(l.node.int("axis", 0)?, rank)?;
    if stacked {
        for value in &mut all {
            let mut dims = l.dims_of(*value)?;
            dims.insert(axis, 1);
            *value = l.reshape(*value, &dims)?;
        }
    }
    Ok(vec![l.add(Concat { axis }, &all)?])
}

fn concat_from(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let items = h.value(0)?.sequence()?;
    interpret_lowering(h.node, join, items.iter().cloned().map(Some).collect())
}

fn split_to(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let dims = h.dims(0)?;
    let axis = axis_of(h.node.int("axis", 0)?, dims.len())?;
    let extent = dims[axis] as i64;
    let (sizes, keep) = match h.optional(1) {
        None => (vec![1; dims[axis]], h.node.flag("keepdims", true)?),
        Some(split) if split.dims() == Some(&[]) => {
            let each = split.int()?;
            if each <= 0 {
                return invalid(format!("parts of {each} elements"));
            }
            let sizes = (0..(extent + each - 1) / each).map(|i| each.min(extent - i * each));
            (sizes.collect::<Vec<i64>>(), true)
        }
        Some(split) => (split.ints()?, true),
    };
    let mut items = Vec::new();
    let mut start = 0;
    for size in sizes {
        if size < 0 || start + size > extent {
            return invalid(format!("parts do not make up {extent} elements"));
        }
        let part = [axis as i64, start, size, i64::from(!keep)];
        let operands = vec![Some(h.value(0)?.clone()), Some(crate::decode::int_vector(&part))];
        items.extend(super::movement::sliced(h, operands)?);
        start += size;
    }
    Ok(vec![Value::Sequence(items)])
}
