//! Einstein summation: operands are joined two at a time by matrix products.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Lowering;
use rlx_graph::ValueId;
use rlx_graph::ops::gather::Gather;
use rlx_graph::ops::matmul::MatMul;
use rlx_graph::ops::reduce::{Reduce, ReduceOp};
use rlx_graph::ops::transpose::Transpose;
use rlx_tensor::DType;
use std::collections::BTreeMap;

/// The rows of this family.
pub const ROWS: &[Row] = &[Row::lower("Einsum", einsum)];

/// A letter, or the position of a dim that an ellipsis stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Hidden(usize),
    Letter(char),
}

/// A value whose axes are labelled.
#[derive(Clone)]
struct Labelled {
    value: ValueId,
    labels: Vec<Label>,
}

/// The labels of a term for a value of some rank; nothing where the rank is not known.
fn labels(term: &str, rank: Option<usize>) -> Result<Vec<Label>, Refusal> {
    let named = term.chars().filter(|c| c.is_alphabetic()).count();
    let hidden = rank.unwrap_or(named).checked_sub(named);
    let Some(hidden) = hidden else { return invalid(format!("term {term:?} names more axes than {rank:?}")) };
    let mut found = Vec::new();
    let mut rest = term;
    while let Some(c) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("...") {
            found.extend((0..hidden).rev().map(Label::Hidden));
            rest = after;
            continue;
        }
        if !c.is_alphabetic() {
            return invalid(format!("term {term:?} holds {c:?}"));
        }
        found.push(Label::Letter(c));
        rest = &rest[c.len_utf8()..];
    }
    if rank.is_some_and(|r| r != found.len()) {
        return invalid(format!("term {term:?} does not fit rank {rank:?}"));
    }
    Ok(found)
}

fn einsum(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    let Some(equation) = l.node.text_opt("equation")? else { return invalid("there is no equation") };
    let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = match equation.split_once("->") {
        Some((left, right)) => (left.to_owned(), Some(right.to_owned())),
        None => (equation, None),
    };
    let terms: Vec<&str> = left.split(',').collect();
    if terms.len() != l.count() {
        return invalid(format!("{} terms for {} operands", terms.len(), l.count()));
    }
    let dtype = l.dtype(0)?;
    let work = if dtype.is_float() { dtype } else { DType::F64 };
    let mut operands = Vec::new();
    let mut uses: BTreeMap<Label, usize> = BTreeMap::new();
    for (i, term) in terms.iter().enumerate() {
        let found = labels(term, Some(l.rank(i)?))?;
        found.iter().for_each(|label| *uses.entry(*label).or_default() += 1);
        let value = l.value(i)?;
        let value = l.cast(value, work)?;
        operands.push(diagonal(l, Labelled { value, labels: found })?);
    }
    let hidden: Vec<Label> = uses.keys().rev().filter(|k| matches!(k, Label::Hidden(_))).copied().collect();
    let output: Vec<Label> = match right {
        None => {
            let single = uses.iter().filter(|(k, n)| **n == 1 && matches!(k, Label::Letter(_)));
            hidden.iter().copied().chain(single.map(|(k, _)| *k)).collect()
        }
        Some(right) => {
            let named = right.chars().filter(|c| c.is_alphabetic()).count();
            let dots = if right.contains("...") { hidden.len() } else { 0 };
            labels(&right, Some(named + dots))?
        }
    };
    if let Some(label) = output.iter().find(|label| !uses.contains_key(label)) {
        return invalid(format!("{label:?} is in no operand"));
    }
    let mut operands = operands.into_iter();
    let Some(mut joined) = operands.next() else { return invalid("there are no operands") };
    let rest: Vec<Labelled> = operands.collect();
    for (i, next) in rest.iter().enumerate() {
        let later: Vec<Label> = rest[i + 1..].iter().flat_map(|o| o.labels.clone()).collect();
        let wanted = |label: &Label| output.contains(label) || later.contains(label);
        joined = join(l, joined, next.clone(), &wanted)?;
    }
    joined = keep_only(l, joined, &|label| output.contains(label))?;
    let result = arranged(l, &joined, &output)?;
    Ok(vec![l.cast(result, dtype)?])
}

/// A repeated label becomes one: the diagonal of its axes.
fn diagonal(l: &mut Lowering<'_>, mut x: Labelled) -> Result<Labelled, Refusal> {
    loop {
        let twice = x.labels.iter().enumerate().find_map(|(i, label)| {
            x.labels[i + 1..].iter().position(|other| other == label).map(|j| (i, i + 1 + j))
        });
        let Some((i, j)) = twice else { return Ok(x) };
        let dims = l.dims_of(x.value)?;
        let mut perm: Vec<usize> = (0..dims.len()).filter(|a| *a != i && *a != j).collect();
        let outer: Vec<usize> = perm.iter().map(|&a| dims[a]).collect();
        perm.extend([i, j]);
        if dims[i] != dims[j] {
            return invalid(format!(
                "axes {i} and {j} have one label but extents {} and {}",
                dims[i], dims[j]
            ));
        }
        let n = dims[i];
        let value = l.add(Transpose { perm: perm.clone() }, &[x.value])?;
        let flat = l.reshape(value, &[&outer[..], &[n * n]].concat())?;
        let at: Vec<i64> = (0..n).map(|k| (k * n + k) as i64).collect();
        let at = l.int_vector(&at)?;
        let value = l.add(Gather { axis: outer.len() }, &[flat, at])?;
        let kept = perm[..outer.len()].iter().map(|&a| x.labels[a]).chain([x.labels[i]]).collect();
        x = Labelled { value, labels: kept };
    }
}

/// Axes that nothing wants any more are summed.
fn keep_only(
    l: &mut Lowering<'_>,
    x: Labelled,
    wanted: &dyn Fn(&Label) -> bool,
) -> Result<Labelled, Refusal> {
    let axes: Vec<usize> = (0..x.labels.len()).filter(|&a| !wanted(&x.labels[a])).collect();
    if axes.is_empty() {
        return Ok(x);
    }
    let value = l.add(Reduce { kind: ReduceOp::Sum, axes, keep_dims: false }, &[x.value])?;
    let labels = x.labels.into_iter().filter(|label| wanted(label)).collect();
    Ok(Labelled { value, labels })
}

/// A value with its axes in this order.
fn arranged(l: &mut Lowering<'_>, x: &Labelled, order: &[Label]) -> Result<ValueId, Refusal> {
    let perm: Option<Vec<usize>> =
        order.iter().map(|label| x.labels.iter().position(|own| own == label)).collect();
    match perm {
        Some(perm) if perm.len() == x.labels.len() => l.add(Transpose { perm }, &[x.value]),
        _ => invalid("the output names an axis twice"),
    }
}

fn join(
    l: &mut Lowering<'_>,
    a: Labelled,
    b: Labelled,
    wanted: &dyn Fn(&Label) -> bool,
) -> Result<Labelled, Refusal> {
    let a = keep_only(l, a, &|label| wanted(label) || b.labels.contains(label))?;
    let b = keep_only(l, b, &|label| wanted(label) || a.labels.contains(label))?;
    let (dims_a, dims_b) = (l.dims_of(a.value)?, l.dims_of(b.value)?);
    let extent = |labels: &[Label], dims: &[usize], label: &Label| {
        labels.iter().position(|own| own == label).map_or(1, |at| dims[at])
    };
    let size = |label: &Label| extent(&a.labels, &dims_a, label).max(extent(&b.labels, &dims_b, label));
    let shared: Vec<Label> = a.labels.iter().filter(|x| b.labels.contains(x)).copied().collect();
    let batch: Vec<Label> = shared.iter().filter(|x| wanted(x)).copied().collect();
    let summed: Vec<Label> = shared.iter().filter(|x| !wanted(x)).copied().collect();
    let own = |x: &Labelled| x.labels.iter().filter(|y| !shared.contains(y)).copied().collect::<Vec<_>>();
    let (free_a, free_b) = (own(&a), own(&b));
    let sizes = |labels: &[Label]| labels.iter().map(size).collect::<Vec<usize>>();
    let count = |labels: &[Label]| sizes(labels).iter().product::<usize>();
    let (batches, rows, inner, columns) = (count(&batch), count(&free_a), count(&summed), count(&free_b));
    let mut matrix = |x: &Labelled, order: Vec<Label>, dims: [usize; 3]| -> Result<ValueId, Refusal> {
        let value = arranged(l, x, &order)?;
        let wide = l.broadcast(value, &sizes(&order))?;
        l.reshape(wide, &dims)
    };
    let left = matrix(&a, [&batch[..], &free_a, &summed].concat(), [batches, rows, inner])?;
    let right = matrix(&b, [&batch[..], &summed, &free_b].concat(), [batches, inner, columns])?;
    let product = l.add(MatMul::plain(), &[left, right])?;
    let labels = [batch, free_a, free_b].concat();
    let value = l.reshape(product, &sizes(&labels))?;
    Ok(Labelled { value, labels })
}
