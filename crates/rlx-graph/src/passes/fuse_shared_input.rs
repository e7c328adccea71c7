//! Linear layers of one input become one: the input is read once and the work is one larger product.
//!
//! Needs: linear layers. Does: gate and up of a gated layer, then all plain layers of one value (queries, keys and values) with slices of
//! the last axis behind them. Leaves: layers with a residual, and layers that differ in activation, bias, layout or dtype.

use crate::ids::{NodeId, ValueId};
use crate::ops::activation::ActivationKind;
use crate::ops::binary::BinaryOp;
use crate::ops::gated::Gated;
use crate::ops::linear::Linear;
use crate::ops::slice::Slice;
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::op;
use crate::rewrite::words::binary;
use crate::rewrite::{Draft, DraftNode, Match, Operand, Patch, Pattern, Rule};
use rlx_tensor::Dim;

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    cx.rewrite(draft, &gated_rules())?;
    cx.rewrite(draft, &rules())
}

fn single(l: &Linear) -> bool {
    l.parts == 1 && !l.gated && !l.residual
}

fn plain(l: &Linear) -> bool {
    single(l) && l.activation == ActivationKind::Identity
}

/// The rules that join a gate with its value.
pub fn gated_rules() -> Vec<Rule> {
    let layer =
        |name, test: fn(&Linear) -> bool| -> Pattern { op::<Linear>().attr(test).single_use().named(name) };
    vec![
        Rule::new(
            "linear_gated",
            "act(x G + g) * (x U + u)",
            op::<Gated>().with([layer("gate", plain), layer("up", plain)]),
            |draft, m| gated(draft, m, m.node(draft).op().downcast::<Gated>()?.activation),
        ),
        Rule::new(
            "linear_times_linear",
            "act(x G + g) * (x U + u)",
            binary(BinaryOp::Mul, layer("gate", single), layer("up", plain)),
            |draft, m| gated(draft, m, draft.made_by::<Linear>(m.value("gate")?)?.0.activation),
        ),
    ]
}

fn gated(draft: &Draft, m: &Match, activation: ActivationKind) -> Option<Patch> {
    let (gate, gate_node) = draft.made_by::<Linear>(m.value("gate")?)?;
    let (up, up_node) = draft.made_by::<Linear>(m.value("up")?)?;
    let alike = gate.bias == up.bias && gate.transposed == up.transposed;
    let shared = gate_node.inputs()[0] == up_node.inputs()[0];
    let same = draft.same_shape(m.value("gate")?, m.value("up")?);
    let weights = same_weight_dtypes(draft, &[gate_node, up_node]);
    if !(alike && shared && same && weights) {
        return None;
    }
    let op = Linear { parts: 2, gated: true, activation, ..gate.clone() };
    Some(Patch::with_op(m.result(draft)?, op, &joined(gate, &[gate_node, up_node])))
}

fn same_weight_dtypes(draft: &Draft, layers: &[&DraftNode]) -> bool {
    let dtype = |node: &DraftNode| draft.shape(node.inputs()[1]).dtype();
    layers.iter().all(|node| dtype(node) == dtype(layers[0]))
}

/// Operands of several one-part layers as those of one: input, weights, biases.
fn joined(like: &Linear, layers: &[&DraftNode]) -> Vec<ValueId> {
    let mut inputs = vec![layers[0].inputs()[0]];
    inputs.extend(layers.iter().map(|n| n.inputs()[1]));
    if like.bias {
        inputs.extend(layers.iter().map(|n| n.inputs()[2]));
    }
    inputs
}

/// The rule that joins all plain layers of one input.
pub fn rules() -> Vec<Rule> {
    vec![Rule::new(
        "shared_input",
        "x [A | B | C] = [x A | x B | x C]",
        op::<Linear>().attr(single),
        |draft, m| {
            let first = draft.node(m.root());
            let like = first.op().downcast::<Linear>()?;
            let siblings = siblings(draft, m.root(), like);
            if siblings.len() < 2 || siblings.first() != Some(&m.root()) {
                return None;
            }
            let layers: Vec<&DraftNode> = siblings.iter().map(|&id| draft.node(id)).collect();
            let mut patch = Patch::new();
            let op = Linear { parts: layers.len(), ..like.clone() };
            let inputs: Vec<Operand> = joined(like, &layers).into_iter().map(Operand::from).collect();
            let whole = patch.add(op, &inputs);
            let mut start = Dim::Known(0);
            for layer in &layers {
                let shape = draft.shape(layer.outputs()[0]);
                let len = shape.last()?.clone();
                let rank = shape.rank();
                let slice = Slice::range(rank - 1, rank, start.clone(), len.clone());
                start = &start + &len;
                let part = patch.add(slice, &[whole]);
                patch.replace(layer.outputs()[0], part);
            }
            Some(patch)
        },
    )]
}

/// The layers of the same input that are like this one, in order; their widths are known and their weights do not depend on the run.
fn siblings(draft: &Draft, id: NodeId, like: &Linear) -> Vec<NodeId> {
    let node = draft.node(id);
    let dtype = draft.shape(node.inputs()[1]).dtype();
    let fits = |other: &NodeId| {
        let other = draft.node(*other);
        other.op().downcast::<Linear>() == Some(like)
            && other.inputs()[0] == node.inputs()[0]
            && other.inputs()[1..].iter().all(|&w| draft.is_weight(w))
            && draft.shape(other.inputs()[1]).dtype() == dtype
            && draft.shape(other.outputs()[0]).last().is_some_and(|n| n.known().is_some())
    };
    let mut found: Vec<NodeId> = draft.users(node.inputs()[0]).iter().copied().filter(fits).collect();
    found.sort_by_key(|&id| (draft.order(id), id));
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn queries_keys_and_values() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  param @q : f32[6, 4]
  param @k : f32[2, 4]
  param @v : f32[2, 4]
  %4 : f32[rows, 6] = linear(@x, @q) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %5 : f32[rows, 2] = linear(@x, @k) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %6 : f32[rows, 2] = linear(@x, @v) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  return "q": %4, "k": %5, "v": %6
}"#;
        insta::assert_snapshot!(after(&["fuse_shared_input"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          param @q : f32[6, 4]
          param @k : f32[2, 4]
          param @v : f32[2, 4]
          %4 : f32[rows, 10] = linear(@x, @q, @k, @v) {parts=3, transposed=false, bias=false, activation=identity, gated=false, residual=false}
          %5 : f32[rows, 6] = slice(%4) {axis=none, start=dims[0], len=dims[6], step=1}
          %6 : f32[rows, 2] = slice(%4) {axis=none, start=dims[6], len=dims[2], step=1}
          %7 : f32[rows, 2] = slice(%4) {axis=none, start=dims[8], len=dims[2], step=1}
          return "q": %5, "k": %6, "v": %7
        }
        "#);
    }

    #[test]
    fn gate_and_up() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  param @g : f32[6, 4]
  param @u : f32[6, 4]
  %3 : f32[rows, 6] = linear(@x, @g) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %4 : f32[rows, 6] = linear(@x, @u) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %5 : f32[rows, 6] = gated(%3, %4) {activation=silu}
  return "y": %5
}"#;
        insta::assert_snapshot!(after(&["fuse_shared_input"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          param @g : f32[6, 4]
          param @u : f32[6, 4]
          %3 : f32[rows, 6] = linear(@x, @g, @u) {parts=2, transposed=false, bias=false, activation=silu, gated=true, residual=false}
          return "y": %3
        }
        "#);
    }

    #[test]
    fn other_inputs_and_dtypes_stay_apart() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  input @z : f32[rows, 4]
  param @a : f32[6, 4]
  param @b : f32[6, 4]
  param @c : f16[6, 4]
  %5 : f32[rows, 6] = linear(@x, @a) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %6 : f32[rows, 6] = linear(@z, @b) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %7 : f32[rows, 6] = linear(@x, @c) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  return "a": %5, "b": %6, "c": %7
}"#;
        assert!(fired("fuse_shared_input", before).is_empty());
    }
}
