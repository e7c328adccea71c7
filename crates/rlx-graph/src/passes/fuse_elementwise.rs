//! What is left of elementwise ops runs as chains, one pass over memory each.
//!
//! Needs: every fusion that takes elementwise ops as an epilogue has run. Does: grows a chain upwards from a node over all producers whose
//! results only the chain uses; numbers go into the program. Leaves: operands that broadcast other than as a scalar or a row,
//! integers, and chains the target would have to take apart again.

use crate::ids::{NodeId, ValueId};
use crate::integer::is_code;
use crate::ops::Op;
use crate::ops::activation::Activation;
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::cast::Cast;
use crate::ops::fused_elementwise::{Arg, Function, FusedElementwise, Program, Step};
use crate::ops::gated::Gated;
use crate::ops::select::Select;
use crate::ops::unary::Unary;
use crate::passes::{PassCx, PassError};
use crate::rewrite::driver::apply;
use crate::rewrite::{Draft, Patch};
use rlx_tensor::{DType, Shape};
use std::collections::{BTreeSet, HashMap};

/// Operands of a chain at most: each is a stream a kernel reads.
const MAX_OPERANDS: usize = 8;
/// Statements of a chain at most.
const MAX_STEPS: usize = 32;

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    let order = draft.schedule()?;
    let mut at = vec![usize::MAX; draft.node_count()];
    order.iter().enumerate().for_each(|(i, id)| at[id.index()] = i);
    for &id in order.iter().rev() {
        if !draft.is_live(id) {
            continue;
        }
        let Some(chain) = grow(draft, id, &at) else { continue };
        let Some((op, operands)) = spell(draft, &chain) else { continue };
        let shapes: Vec<&Shape> = operands.iter().map(|&v| draft.shape(v)).collect();
        let result = draft.node(id).outputs()[0];
        if cx.target.runs(&op, &shapes, &[draft.shape(result)]) {
            let patch = Patch::with_op(result, op, &operands);
            apply(draft, "fuse_elementwise", id, &patch, cx.trace);
        }
    }
    Ok(())
}

/// The functions of a node as statements over its operands, if it may stand in a chain; none where it is its operand.
fn functions(op: &Op) -> Option<Vec<Function>> {
    if let Some(op) = op.downcast::<Unary>() {
        return Some(vec![Function::Unary(op.kind)]);
    }
    if let Some(op) = op.downcast::<Binary>() {
        return Some(vec![Function::Binary(op.kind)]);
    }
    if let Some(op) = op.downcast::<Activation>() {
        return Some(vec![Function::Activation(op.kind)]);
    }
    if let Some(op) = op.downcast::<Cast>() {
        // From codes to numbers is how the operand is read.
        return match op.to {
            DType::F32 => Some(Vec::new()),
            to => is_code(to).then(|| vec![Function::Code(to)]),
        };
    }
    if let Some(op) = op.downcast::<Gated>() {
        return Some(vec![Function::Activation(op.activation), Function::Binary(BinaryOp::Mul)]);
    }
    op.downcast::<Select>().map(|_| vec![Function::Select])
}

/// True if a node may stand in a chain whose result has these dims, at its end or before.
fn joins(draft: &Draft, id: NodeId, whole: &Shape, ends: bool) -> bool {
    let node = draft.node(id);
    let cast = node.op().downcast::<Cast>().is_some();
    let plain = |v: ValueId| {
        let dtype = draft.shape(v).dtype();
        dtype.is_float() || dtype == DType::Bool
    };
    if cast {
        let (from, to) = (draft.shape(node.inputs()[0]).dtype(), draft.shape(node.outputs()[0]).dtype());
        let (reads, writes) = (is_code(from) && to == DType::F32, from == DType::F32 && is_code(to));
        // Codes are read by the first statements and written by the last.
        return draft.shape(node.outputs()[0]).dims() == whole.dims() && if ends { writes } else { reads };
    }
    let streams = |v: ValueId| {
        let dims = draft.shape(v).dims();
        let (rank, all) = (dims.len(), whole.rank());
        let row = rank <= all
            && dims.iter().rev().skip(1).all(|d| *d == 1)
            && dims.last().is_none_or(|d| *d == 1 || Some(d) == whole.last());
        dims == whole.dims() || row
    };
    functions(node.op()).is_some()
        && draft.shape(node.outputs()[0]).dims() == whole.dims()
        && node.outputs().iter().chain(node.inputs()).all(|&v| plain(v))
        && node.inputs().iter().all(|&v| streams(v))
}

/// The nodes of the chain that ends in `root`, in order; at least two.
fn grow(draft: &Draft, root: NodeId, at: &[usize]) -> Option<Vec<NodeId>> {
    let position = |id: NodeId| at.get(id.index()).copied().unwrap_or(usize::MAX);
    let whole = draft.shape(*draft.node(root).outputs().first()?);
    if !joins(draft, root, whole, true) {
        return None;
    }
    let mut chain = BTreeSet::from([(position(root), root)]);
    let mut candidates: BTreeSet<(usize, NodeId)> = producers(draft, root, &position);
    while let Some((key, id)) = candidates.pop_last() {
        let result = draft.node(id).outputs()[0];
        let users = draft.users(result);
        let inside = draft.use_count(result) == users.len()
            && users.iter().all(|&user| chain.contains(&(position(user), user)));
        if inside && chain.len() < MAX_STEPS && joins(draft, id, whole, false) {
            chain.insert((key, id));
            candidates.extend(producers(draft, id, &position));
        }
    }
    (chain.len() > 1).then(|| chain.into_iter().map(|(_, id)| id).collect())
}

fn producers(draft: &Draft, id: NodeId, position: &impl Fn(NodeId) -> usize) -> BTreeSet<(usize, NodeId)> {
    let made = draft.node(id).inputs().iter().filter_map(|&v| draft.producer(v));
    made.map(|p| (position(p), p)).filter(|&(key, _)| key != usize::MAX).collect()
}

/// The op that runs a chain, and its operands; `None` if it needs too many.
fn spell(draft: &Draft, chain: &[NodeId]) -> Option<(FusedElementwise, Vec<ValueId>)> {
    let mut operands: Vec<ValueId> = Vec::new();
    let mut steps: Vec<Step> = Vec::new();
    let mut made: HashMap<ValueId, Arg> = HashMap::new();
    for &id in chain {
        let node = draft.node(id);
        let mut args = Vec::with_capacity(node.inputs().len());
        for &value in node.inputs() {
            let float = draft.shape(value).dtype().is_float();
            args.push(match (made.get(&value), draft.as_scalar(value).filter(|_| float)) {
                (Some(&arg), _) => arg,
                (None, Some(number)) => Arg::Number(number),
                (None, None) => {
                    operands.push(value);
                    let arg = Arg::Operand(operands.len() - 1);
                    made.insert(value, arg);
                    arg
                }
            });
        }
        let functions = functions(node.op())?;
        if functions.is_empty() {
            made.insert(node.outputs()[0], args[0]);
            continue;
        }
        for function in functions {
            let (taken, rest) = args.split_at(function.arity());
            steps.push(Step { function, args: taken.to_vec() });
            args = [&[Arg::Step(steps.len() - 1)], rest].concat();
        }
        made.insert(node.outputs()[0], Arg::Step(steps.len() - 1));
    }
    let fits = operands.len() <= MAX_OPERANDS && !operands.is_empty();
    fits.then(|| (FusedElementwise::new(&Program { steps }), operands))
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn a_chain_becomes_a_program() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  input @z : f32[rows, 4]
  param @w : f32[4]
  const %3 : f32[] = [0.5]
  %4 : f32[rows, 4] = binary(@x, @w) {kind=mul}
  %5 : f32[rows, 4] = unary(%4) {kind=exp}
  %6 : f32[rows, 4] = binary(%5, %3) {kind=add}
  %7 : f32[rows, 4] = gated(%6, @z) {activation=silu}
  %8 : bool[rows, 4] = binary(%7, @x) {kind=greater}
  %9 : f32[rows, 4] = select(%8, %7, @z) {}
  return "y": %9
}"#;
        insta::assert_snapshot!(after(&["fuse_elementwise"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          input @z : f32[rows, 4]
          param @w : f32[4]
          %3 : f32[rows, 4] = fused_elementwise(@x, @w, @z) {program="t0=mul i0 i1; t1=exp t0; t2=add t1 0.5; t3=silu t2; t4=mul t3 i2; t5=greater t4 i0; t6=select t5 t4 i2"}
          return "y": %3
        }
        "#);
    }

    #[test]
    fn inner_values_used_elsewhere_and_columns_end_a_chain() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  input @z : f32[rows, 1]
  %2 : f32[rows, 4] = unary(@x) {kind=exp}
  %3 : f32[rows, 4] = unary(%2) {kind=log}
  %4 : f32[rows, 4] = binary(%3, @z) {kind=mul}
  return "y": %4, "z": %2
}"#;
        assert!(fired("fuse_elementwise", before).is_empty());
    }
}
