//! Joins without copies: values written straight into the columns of what they are joined into.

use super::places::BufferId;
use super::template::PlanTarget;
use rlx_graph::{Graph, NodeId, ValueId};
use std::collections::HashMap;

/// Which values are written into which joins.
#[derive(Default)]
pub(super) struct Joins {
    /// For each such value, the join and the value's first column in its result.
    parts: HashMap<ValueId, (NodeId, usize)>,
    /// Columns of each join's result.
    widths: HashMap<NodeId, usize>,
    /// Buffers of joins of which a part has been placed.
    buffers: HashMap<NodeId, BufferId>,
}

impl Joins {
    /// Joins along the last axis of which every operand, or the value that adjacent operands are the columns of, is made by a kernel
    /// that writes rows apart from each other, and read only by such as take them so.
    pub fn find(graph: &Graph, target: &dyn PlanTarget, strided_ok: &[bool]) -> Joins {
        let mut joins = Joins::default();
        for (id, node) in graph.nodes() {
            let Some(axis) = node.op.def().props().joins else { continue };
            let &[result] = node.outputs.as_slice() else { continue };
            let shape = graph.shape(result);
            let width = shape.last().and_then(|d| d.known());
            let Some(width) = width.filter(|_| axis + 1 == shape.rank() && !is_output(graph, result)) else {
                continue;
            };
            let Some(parts) = parts_of(graph, &node.inputs, strided_ok) else { continue };
            let fits = |at: usize| {
                let value = parts[at].0;
                !joins.parts.contains_key(&value)
                    && !parts[..at].iter().any(|(other, _)| *other == value)
                    && !is_output(graph, value)
                    && strided_ok[value.index()]
                    && graph.producer(value).is_some_and(|node| {
                        let node = graph.node(node);
                        node.outputs.as_slice() == [value] && target.writes_strided(&node.op)
                    })
            };
            if parts.len() > 1 && (0..parts.len()).all(fits) {
                joins.parts.extend(parts.into_iter().map(|(value, column)| (value, (id, column))));
                joins.widths.insert(id, width);
            }
        }
        joins
    }

    /// The join a value is written into, its first column there, and the columns of the whole.
    pub fn part(&self, value: ValueId) -> Option<(NodeId, usize, usize)> {
        let &(join, column) = self.parts.get(&value)?;
        Some((join, column, *self.widths.get(&join)?))
    }

    /// Notes the buffer of a join.
    pub fn start(&mut self, join: NodeId, buffer: BufferId) {
        self.buffers.insert(join, buffer);
    }

    /// The buffer of a join of which a part has been placed, and the columns of the whole.
    pub fn buffer(&self, join: NodeId) -> Option<(BufferId, usize)> {
        Some((*self.buffers.get(&join)?, *self.widths.get(&join)?))
    }
}

fn is_output(graph: &Graph, value: ValueId) -> bool {
    graph.outputs().iter().any(|(_, v)| *v == value)
}

/// The operands of a join with their first columns; operands that are all columns of one value in order are that value.
fn parts_of(graph: &Graph, operands: &[ValueId], strided_ok: &[bool]) -> Option<Vec<(ValueId, usize)>> {
    let width = |value: ValueId| graph.shape(value).last().and_then(|d| d.known());
    let cut = |value: ValueId| {
        let node = graph.node(graph.producer(value)?);
        let first = node.op.def().props().columns?;
        (strided_ok[value.index()] && !is_output(graph, value)).then_some((*node.inputs.first()?, first))
    };
    let (mut parts, mut column, mut at) = (Vec::new(), 0, 0);
    while at < operands.len() {
        let mut part = (operands[at], 1);
        if let Some((whole, 0)) = cut(operands[at]) {
            let (mut covered, mut count) = (0, 0);
            while let Some(&next) = operands.get(at + count).filter(|&&v| cut(v) == Some((whole, covered))) {
                covered += width(next)?;
                count += 1;
            }
            if Some(covered) == width(whole) {
                part = (whole, count);
            }
        }
        parts.push((part.0, column));
        column += width(part.0)?;
        at += part.1;
    }
    Some(parts)
}
