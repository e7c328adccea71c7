//! What is computed twice is computed once.
//!
//! Needs: nothing. Does: merges nodes of one op, equal attributes and the same operands, and equal small constants. Leaves: nodes that
//! write, read a state or are impure alone.

use crate::attrs::AttrValue;
use crate::graph::Source;
use crate::ids::{NodeId, ValueId};
use crate::op::OpDef;
use crate::passes::{PassCx, PassError};
use crate::rewrite::driver::apply;
use crate::rewrite::{Draft, Patch};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

const LARGEST_CONST_BYTES: usize = 4096;

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    merge_constants(draft);
    let mut seen: HashMap<u64, Vec<NodeId>> = HashMap::new();
    for id in draft.schedule()? {
        let node = draft.node(id);
        let props = node.op().def().props();
        let reads_state = node.inputs().iter().any(|&v| matches!(draft.source(v), Source::State));
        if props.impure || !props.writes.is_empty() || reads_state {
            continue;
        }
        let same = seen.entry(hash(node.op().def(), node.inputs())).or_default();
        let first = same.iter().copied().find(|&other| {
            let other = draft.node(other);
            other.inputs() == node.inputs() && other.op() == node.op()
        });
        let Some(first) = first else {
            same.push(id);
            continue;
        };
        let mut patch = Patch::new();
        for (&old, &new) in node.outputs().iter().zip(draft.node(first).outputs()) {
            patch.replace(old, new);
        }
        apply(draft, "cse", id, &patch, cx.trace);
    }
    Ok(())
}

fn merge_constants(draft: &mut Draft) {
    let mut seen: HashMap<u64, Vec<ValueId>> = HashMap::new();
    let used: Vec<ValueId> = draft.nodes().flat_map(|(_, n)| n.inputs().iter().copied()).collect();
    for value in used {
        let Some(tensor) = draft.as_const(value).filter(|t| t.bytes().len() <= LARGEST_CONST_BYTES) else {
            continue;
        };
        let mut hasher = DefaultHasher::new();
        (tensor.dtype(), tensor.dims(), tensor.bytes()).hash(&mut hasher);
        let same = seen.entry(hasher.finish()).or_default();
        let first = same.iter().copied().find(|&v| draft.as_const(v).is_some_and(|t| t.bits_eq(tensor)));
        match first {
            Some(first) if first == value => {}
            Some(first) => draft.redirect(value, first),
            None => same.push(value),
        }
    }
}

fn hash(def: &dyn OpDef, inputs: &[ValueId]) -> u64 {
    let mut hasher = DefaultHasher::new();
    def.name().hash(&mut hasher);
    inputs.hash(&mut hasher);
    for (_, value) in def.attrs() {
        std::mem::discriminant(&value).hash(&mut hasher);
        match value {
            AttrValue::Bool(v) => v.hash(&mut hasher),
            AttrValue::Int(v) => v.hash(&mut hasher),
            AttrValue::Float(v) => (v + 0.0).to_bits().hash(&mut hasher),
            AttrValue::Str(v) => v.hash(&mut hasher),
            AttrValue::Dims(v) => v.hash(&mut hasher),
            AttrValue::Ints(v) => v.hash(&mut hasher),
            _ => {}
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn equal_nodes_become_one() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [2.0]
  const %2 : f32[] = [2.0]
  %3 : f32[rows, 4] = binary(@x, %1) {kind=mul}
  %4 : f32[rows, 4] = binary(@x, %2) {kind=mul}
  %5 : f32[rows, 4] = unary(%3) {kind=exp}
  %6 : f32[rows, 4] = unary(%4) {kind=exp}
  %7 : f32[rows, 4] = binary(%5, %6) {kind=sub}
  return "y": %7
}"#;
        insta::assert_snapshot!(after(&["cse"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          const %1 : f32[] = [2.0]
          %2 : f32[rows, 4] = binary(@x, %1) {kind=mul}
          %3 : f32[rows, 4] = unary(%2) {kind=exp}
          %4 : f32[rows, 4] = binary(%3, %3) {kind=sub}
          return "y": %4
        }
        "#);
    }

    #[test]
    fn order_of_operands_and_attributes_tell_nodes_apart() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  %1 : f32[rows, 4] = unary(@x) {kind=exp}
  %2 : f32[rows, 4] = unary(@x) {kind=log}
  %3 : f32[rows, 4] = binary(@x, %1) {kind=sub}
  %4 : f32[rows, 4] = binary(%1, @x) {kind=sub}
  %5 : f32[rows, 4] = binary(%3, %4) {kind=add}
  %6 : f32[rows, 4] = binary(%5, %2) {kind=add}
  return "y": %6
}"#;
        assert!(fired("cse", before).is_empty());
    }
}
