//! What models compute of shapes, over symbols: vectors and scalars of dims instead of tensors.

use crate::model::{NodeDef, axis_of};
use crate::value::Value;
use rlx_tensor::{DType, Dim};

/// A vector of dims, or a single one as a scalar.
#[derive(Debug, Clone, PartialEq)]
pub struct Dims {
    /// The dims.
    pub dims: Vec<Dim>,
    /// A tensor of rank 0.
    pub scalar: bool,
}

/// Elements that a constant may have to be seen as dims.
const ELEMENTS: usize = 64;

impl Dims {
    /// The dims a constant stands for.
    pub fn of(value: &Value) -> Option<Dims> {
        let Value::Tensor(tensor) = value else { return None };
        if !matches!(tensor.dtype(), DType::I64 | DType::I32)
            || tensor.len() > ELEMENTS
            || tensor.dims().len() > 1
        {
            return None;
        }
        let ints = value.ints().ok()?;
        let dims: Option<Vec<Dim>> = ints.iter().map(|&v| usize::try_from(v).ok().map(Dim::Known)).collect();
        Some(Dims { dims: dims?, scalar: tensor.dims().is_empty() })
    }

    fn vector(dims: Vec<Dim>) -> Dims {
        Dims { dims, scalar: false }
    }
}

/// An operand of a node that computes shapes.
pub enum Operand {
    /// Dims, or a constant that can be seen as such.
    Dims(Dims),
    /// Another constant.
    Ints(Vec<i64>),
}

type Rule = fn(&NodeDef, &[Option<Operand>]) -> Option<Dims>;

const RULES: &[(&str, Rule)] = &[
    ("Identity", |_, operands| first(operands)),
    ("Cast", |node, operands| matches!(node.int("to", 0), Ok(6 | 7)).then(|| first(operands)).flatten()),
    ("Gather", gather),
    ("Concat", concat),
    ("Slice", slice),
    ("Unsqueeze", |_, operands| first(operands).filter(|d| d.scalar).map(|d| Dims::vector(d.dims))),
    ("Squeeze", |_, operands| {
        first(operands).filter(|d| d.dims.len() == 1).map(|d| Dims { scalar: true, ..d })
    }),
    ("Add", |_, operands| pairwise(operands, |a, b| Some(a + b))),
    ("Sub", |_, operands| pairwise(operands, |a, b| Some(a - b))),
    ("Mul", |_, operands| pairwise(operands, |a, b| Some(a * b))),
    ("Div", |_, operands| pairwise(operands, |a, b| b.known().filter(|&b| b > 0).map(|b| a.floor_div(b)))),
];

/// The dims that a node gives; `None` where it is no computation of shapes.
pub fn evaluate(node: &NodeDef, operands: &[Option<Operand>]) -> Option<Dims> {
    if !node.domain.is_empty() {
        return None;
    }
    RULES.iter().find(|(name, _)| *name == node.op).and_then(|(_, rule)| rule(node, operands))
}

fn dims_at(operands: &[Option<Operand>], at: usize) -> Option<Dims> {
    match operands.get(at)? {
        Some(Operand::Dims(dims)) => Some(dims.clone()),
        _ => None,
    }
}

fn first(operands: &[Option<Operand>]) -> Option<Dims> {
    dims_at(operands, 0)
}

fn ints_at(operands: &[Option<Operand>], at: usize) -> Option<Vec<i64>> {
    match operands.get(at)?.as_ref()? {
        Operand::Ints(ints) => Some(ints.clone()),
        Operand::Dims(dims) => {
            dims.dims.iter().map(|d| d.known().and_then(|v| i64::try_from(v).ok())).collect()
        }
    }
}

fn gather(_: &NodeDef, operands: &[Option<Operand>]) -> Option<Dims> {
    let from = first(operands)?;
    let at = ints_at(operands, 1)?;
    let scalar = matches!(operands.get(1)?, Some(Operand::Dims(d)) if d.scalar)
        || matches!(operands.get(1)?, Some(Operand::Ints(_)) if at.len() == 1);
    let pick = |&i: &i64| axis_of(i, from.dims.len()).ok().map(|i| from.dims[i].clone());
    Some(Dims { dims: at.iter().map(pick).collect::<Option<_>>()?, scalar })
}

fn concat(_: &NodeDef, operands: &[Option<Operand>]) -> Option<Dims> {
    let mut all = Vec::new();
    for at in 0..operands.len() {
        all.extend(dims_at(operands, at)?.dims);
    }
    Some(Dims::vector(all))
}

fn slice(node: &NodeDef, operands: &[Option<Operand>]) -> Option<Dims> {
    let from = first(operands)?.dims;
    let one = |name: &str, at: usize| match node.ints_opt(name).ok()? {
        Some(values) => values.first().copied(),
        None => ints_at(operands, at)?.first().copied(),
    };
    let (start, end) = (one("starts", 1)?, one("ends", 2)?);
    if operands.get(4).is_some_and(Option::is_some) && ints_at(operands, 4)? != [1] {
        return None;
    }
    let clamp = |v: i64| (if v < 0 { v + from.len() as i64 } else { v }).clamp(0, from.len() as i64) as usize;
    let (start, end) = (clamp(start), clamp(end));
    Some(Dims::vector(from.get(start..end.max(start))?.to_vec()))
}

fn pairwise(operands: &[Option<Operand>], f: impl Fn(&Dim, &Dim) -> Option<Dim>) -> Option<Dims> {
    let (a, b) = (dims_at(operands, 0)?, dims_at(operands, 1)?);
    let count = a.dims.len().max(b.dims.len());
    let at = |d: &Dims, i: usize| d.dims.get(if d.dims.len() == 1 { 0 } else { i }).cloned();
    let dims: Option<Vec<Dim>> = (0..count).map(|i| f(&at(&a, i)?, &at(&b, i)?)).collect();
    Some(Dims { dims: dims?, scalar: a.scalar && b.scalar })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn node(op: &str) -> NodeDef {
        NodeDef {
            name: op.into(),
            op: op.into(),
            domain: String::new(),
            opset: 17,
            inputs: Vec::new(),
            captures: Vec::new(),
            outputs: Vec::new(),
            attrs: BTreeMap::new(),
        }
    }

    fn dims(list: &[Dim]) -> Option<Operand> {
        Some(Operand::Dims(Dims::vector(list.to_vec())))
    }

    #[test]
    fn shapes_are_computed_over_symbols() {
        let (batch, seq) = (Dim::symbol("batch"), Dim::symbol("seq"));
        let shape = || dims(&[batch.clone(), seq.clone(), Dim::Known(384)]);
        let part =
            evaluate(&node("Slice"), &[shape(), Some(Operand::Ints(vec![0])), Some(Operand::Ints(vec![-1]))]);
        assert_eq!(part.unwrap().dims, [batch.clone(), seq.clone()]);
        let picked = evaluate(&node("Gather"), &[shape(), Some(Operand::Ints(vec![1]))]).unwrap();
        assert_eq!(picked, Dims { dims: vec![seq.clone()], scalar: true });
        let one = |dim: &Dim| dims(std::slice::from_ref(dim));
        let product = evaluate(&node("Mul"), &[one(&batch), one(&seq)]).unwrap();
        assert_eq!(product.dims, [&batch * &seq]);
        assert!(evaluate(&node("Relu"), &[shape()]).is_none());
    }
}
