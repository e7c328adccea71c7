//! What is left of elementwise ops runs as chains, one pass over memory each.
//!
//! Needs: every fusion that takes elementwise ops as an epilogue has run. Does: grows a chain upwards from a node over all producers whose
//! results only the chain uses; numbers go into the program. A function of one value of codes is a chain through all codes on its way, for which
//! a table may stand. Leaves: operands that broadcast other than as a scalar or a row (or, among codes, along leading axes), integers, and
//! chains the target would have to take apart again.

use crate::ids::{NodeId, ValueId};
use crate::integer::{code_range, is_code};
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
use rlx_tensor::{DType, Dim, Shape};
use std::collections::{BTreeSet, HashMap};

/// Operands of a chain at most: each is a stream a kernel reads.
const MAX_OPERANDS: usize = 8;
/// Statements of a chain at most.
const MAX_STEPS: usize = 32;
/// Nodes of a function of codes at most.
const MAX_CODE_STEPS: usize = 128;

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    let order = draft.schedule()?;
    let mut at = vec![usize::MAX; draft.node_count()];
    order.iter().enumerate().for_each(|(i, id)| at[id.index()] = i);
    for &id in order.iter().rev() {
        if !draft.is_live(id) {
            continue;
        }
        let chains = [grow_among_codes(draft, id, &at), grow(draft, id, &at)];
        for chain in chains.into_iter().flatten() {
            let Some((op, operands)) = spell(draft, &chain) else { continue };
            let shapes: Vec<&Shape> = operands.iter().map(|&v| draft.shape(v)).collect();
            let result = draft.node(id).outputs()[0];
            if cx.target.runs(&op, &shapes, &[draft.shape(result)]) {
                let patch = Patch::with_op(result, op, &operands);
                apply(draft, "fuse_elementwise", id, &patch, cx.trace);
                break;
            }
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
        let dims = draft.shape(node.outputs()[0]).dims();
        let read = if is_code(whole.dtype()) { is_tail(dims, whole.dims()) } else { dims == whole.dims() };
        // Codes are read by the first statements and written by the last.
        return if ends { writes && dims == whole.dims() } else { reads && read };
    }
    let streams = |v: ValueId| {
        let dims = draft.shape(v).dims();
        let (rank, all) = (dims.len(), whole.rank());
        if is_code(whole.dtype()) && rank <= all && is_tail(dims, whole.dims()) {
            return true;
        }
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

/// Whether dims are the last of others, with any number of ones in front.
fn is_tail(dims: &[Dim], of: &[Dim]) -> bool {
    let own = dims.iter().position(|d| *d != 1).unwrap_or(dims.len());
    of.ends_with(&dims[own..])
}

/// The nodes of the longest chain that ends in `root`, runs through codes and is a function of one value of codes, in order.
fn grow_among_codes(draft: &Draft, root: NodeId, at: &[usize]) -> Option<Vec<NodeId>> {
    let position = |id: NodeId| at.get(id.index()).copied().unwrap_or(usize::MAX);
    let whole = draft.shape(*draft.node(root).outputs().first()?);
    let coded = |v: ValueId| is_code(draft.shape(v).dtype());
    if draft.node(root).op().downcast::<Cast>().is_none() || !is_code(whole.dtype()) {
        return None;
    }
    let member = |id: NodeId, chain: &BTreeSet<(usize, NodeId)>| {
        let node = draft.node(id);
        let [result] = node.outputs() else { return false };
        let users = draft.users(*result);
        let inside = draft.use_count(*result) == users.len()
            && users.iter().all(|&user| chain.contains(&(position(user), user)));
        let float = |v: &ValueId| draft.shape(*v).dtype() == DType::F32;
        let same = |v: &ValueId| draft.shape(*v).dims() == whole.dims() || draft.as_scalar(*v).is_some();
        let function = match node.op().downcast::<Cast>() {
            Some(cast) => {
                cast.to == DType::F32 && coded(node.inputs()[0])
                    || is_code(cast.to) && float(&node.inputs()[0])
            }
            None => functions(node.op()).is_some() && node.inputs().iter().chain([result]).all(float),
        };
        inside && function && draft.shape(*result).dims() == whole.dims() && node.inputs().iter().all(same)
    };
    let mut chain = BTreeSet::from([(position(root), root)]);
    let mut found = None;
    while chain.len() < MAX_CODE_STEPS {
        let inputs = chain.iter().flat_map(|&(_, id)| draft.node(id).inputs());
        let made = |v: &ValueId| draft.producer(*v).is_some_and(|p| chain.contains(&(position(p), p)));
        let open: BTreeSet<ValueId> =
            inputs.copied().filter(|v| !made(v) && draft.as_scalar(*v).is_none()).collect();
        if open.len() == 1 && open.iter().all(|&v| coded(v)) {
            found = Some(chain.clone());
        }
        let producers = open.iter().filter_map(|&v| draft.producer(v)).filter(|&p| position(p) != usize::MAX);
        let Some(next) = producers.filter(|&p| member(p, &chain)).max_by_key(|&p| position(p)) else { break };
        chain.insert((position(next), next));
    }
    let found: Vec<NodeId> = found?.into_iter().map(|(_, id)| id).collect();
    let through = found.iter().filter(|&&id| coded(draft.node(id).outputs()[0])).count() > 1;
    through.then_some(found)
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
    // Statements whose results are codes on the way.
    let mut codes: Vec<(usize, DType)> = Vec::new();
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
        if let ([Function::Code(dtype)], [Arg::Step(step)], true) =
            (functions.as_slice(), args.as_slice(), chain.last() != Some(&id))
        {
            codes.push((*step, *dtype));
            made.insert(node.outputs()[0], args[0]);
            continue;
        }
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
    let program = Program { steps };
    let whole = codes.is_empty() || leaves_codes(&program, &codes, draft.shape(*operands.first()?).dtype());
    (fits && whole).then(|| (FusedElementwise::new(&program), operands))
}

/// Whether the results of some statements are codes as they are, for each code of the only operand.
fn leaves_codes(program: &Program, codes: &[(usize, DType)], operand: DType) -> bool {
    let Some((low, high)) = code_range(operand) else { return false };
    let inside = |value: f64, dtype: DType| {
        let range = code_range(dtype).map(|(low, high)| low as f64..=high as f64);
        value.fract() == 0.0 && range.is_some_and(|range| range.contains(&value))
    };
    (low..=high).all(|code| {
        let results = program.results(&[code as f64], |v| f64::from(v as f32));
        codes.iter().all(|&(step, dtype)| inside(results[step], dtype))
    })
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

    /// A value of codes that becomes codes twice on its way, by functions of it alone.
    fn twice(scale: &str) -> String {
        format!(
            r#"graph "g" {{
  input @x : u8[rows, 4]
  const %1 : f32[] = [0.5]
  const %2 : f32[] = [{scale}]
  const %3 : f32[] = [9.0]
  const %4 : f32[] = [255.0]
  %5 : f32[rows, 4] = cast(@x) {{to=f32}}
  %6 : f32[rows, 4] = binary(%5, %1) {{kind=mul}}
  %7 : f32[rows, 4] = unary(%6) {{kind=erf}}
  %8 : f32[rows, 4] = binary(%7, %2) {{kind=div}}
  %9 : f32[rows, 4] = unary(%8) {{kind=round}}
  %10 : f32[rows, 4] = activation(%9) {{kind=relu}}
  %11 : f32[rows, 4] = binary(%10, %4) {{kind=min}}
  %12 : u8[rows, 4] = cast(%11) {{to=u8}}
  %13 : f32[rows, 4] = cast(%12) {{to=f32}}
  %14 : f32[rows, 4] = binary(%13, %6) {{kind=mul}}
  %15 : f32[rows, 4] = binary(%14, %3) {{kind=min}}
  %16 : u8[rows, 4] = cast(%15) {{to=u8}}
  return "y": %16
}}"#
        )
    }

    #[test]
    fn functions_of_one_value_of_codes_run_through_codes() {
        insta::assert_snapshot!(after(&["fuse_elementwise"], &twice("0.01")), @r#"
        graph "g" {
          input @x : u8[rows, 4]
          %1 : u8[rows, 4] = fused_elementwise(@x) {program="t0=mul i0 0.5; t1=erf t0; t2=div t1 0.009999999776482582; t3=round t2; t4=relu t3; t5=min t4 255.0; t6=mul t5 t0; t7=min t6 9.0; t8=u8 t7"}
          return "y": %1
        }
        "#);
        // Zero by zero is no code.
        let apart = after(&["fuse_elementwise"], &twice("0.0"));
        assert!(apart.matches("fused_elementwise").count() > 1, "{apart}");
    }

    #[test]
    fn codes_join_along_leading_axes() {
        let before = r#"graph "g" {
  input @x : u8[batch, 2, rows, 4]
  input @m : u8[1, rows, 4]
  const %2 : f32[] = [0.5]
  const %3 : f32[] = [255.0]
  %4 : f32[batch, 2, rows, 4] = cast(@x) {to=f32}
  %5 : f32[1, rows, 4] = cast(@m) {to=f32}
  %6 : f32[batch, 2, rows, 4] = binary(%4, %2) {kind=mul}
  %7 : f32[batch, 2, rows, 4] = binary(%6, %5) {kind=add}
  %8 : f32[batch, 2, rows, 4] = binary(%7, %3) {kind=min}
  %9 : u8[batch, 2, rows, 4] = cast(%8) {to=u8}
  return "y": %9
}"#;
        insta::assert_snapshot!(after(&["fuse_elementwise"], before), @r#"
        graph "g" {
          input @x : u8[batch, 2, rows, 4]
          input @m : u8[1, rows, 4]
          %2 : u8[batch, 2, rows, 4] = fused_elementwise(@x, @m) {program="t0=mul i0 0.5; t1=add t0 i1; t2=min t1 255.0; t3=u8 t2"}
          return "y": %2
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
