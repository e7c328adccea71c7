//! One spelling for what can be said in several ways.
//!
//! Needs: nothing. Does: neutral elements, inverse pairs, chains of views and casts, scalar operands to the right, transposed
//! operands into the product's attributes. Leaves: no op that returns its operand unchanged. The sign of a zero may change.

use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::cast::Cast;
use crate::ops::matmul::MatMul;
use crate::ops::reshape::Reshape;
use crate::ops::slice::Slice;
use crate::ops::transpose::Transpose;
use crate::ops::unary::{Unary, UnaryOp};
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::{bind, constant, op, scalar};
use crate::rewrite::words::{activation, binary, is_float, unary};
use crate::rewrite::{Draft, Match, Patch, Rule};
use rlx_tensor::{DType, Tensor};

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    cx.rewrite(draft, &rules())
}

/// The rules of this pass.
pub fn rules() -> Vec<Rule> {
    let mut rules = arithmetic();
    rules.extend(chains());
    rules.extend(views());
    rules
}

fn keep(name: &'static str) -> impl Fn(&Draft, &Match) -> Option<Patch> + Send + Sync {
    move |draft, m| {
        let (result, x) = (m.result(draft)?, m.value(name)?);
        draft.same_shape(result, x).then(|| Patch::redirect(result, x))
    }
}

fn arithmetic() -> Vec<Rule> {
    use BinaryOp::{Add, Div, Mul, Pow, Sub};
    vec![
        Rule::new(
            "scalar_right",
            "c + x = x + c",
            op::<Binary>().with([constant(), bind("x")]),
            |draft, m| {
                let node = m.node(draft);
                let &[a, b] = node.inputs() else { return None };
                let turn = node.op().def().props().commutative;
                let turn = turn && draft.as_const(a).is_some() && draft.as_const(b).is_none();
                turn.then(|| Patch::with_op(node.outputs()[0], node.op().clone(), &[b, a]))
            },
        ),
        Rule::new("add_zero", "x + 0 = x", binary(Add, bind("x"), scalar(0.0)), keep("x")),
        Rule::new("sub_zero", "x - 0 = x", binary(Sub, bind("x"), scalar(0.0)), keep("x")),
        Rule::new("mul_one", "x * 1 = x", binary(Mul, bind("x"), scalar(1.0)), keep("x")),
        Rule::new("div_one", "x / 1 = x", binary(Div, bind("x"), scalar(1.0)), keep("x")),
        Rule::new("pow_one", "x ^ 1 = x", binary(Pow, bind("x"), scalar(1.0)), keep("x")),
        Rule::new("square", "x ^ 2 = x * x", binary(Pow, bind("x"), scalar(2.0)), |draft, m| {
            let (x, result) = (m.value("x")?, m.result(draft)?);
            draft
                .same_shape(result, x)
                .then(|| Patch::with_op(result, Binary { kind: BinaryOp::Mul }, &[x, x]))
        }),
        Rule::new("root", "x ^ 0.5 = sqrt x", binary(Pow, bind("x"), scalar(0.5)), |draft, m| {
            let (x, result) = (m.value("x")?, m.result(draft)?);
            let same = draft.same_shape(result, x) && is_float(draft, x);
            same.then(|| Patch::with_op(result, Unary { kind: UnaryOp::Sqrt }, &[x]))
        }),
        Rule::new(
            "div_power_of_two",
            "x / 2^n = x * 2^-n, exactly",
            binary(Div, bind("x"), constant().named("c")),
            divide_by_power_of_two,
        ),
        Rule::new(
            "double_negation",
            "-(-x) = x",
            unary(UnaryOp::Neg, unary(UnaryOp::Neg, bind("x"))),
            keep("x"),
        ),
        Rule::new(
            "identity_activation",
            "identity(x) = x",
            activation(ActivationKind::Identity, bind("x")),
            keep("x"),
        ),
        Rule::new(
            "activation_of_identity",
            "f(identity(x)) = f(x)",
            op::<Activation>().with([activation(ActivationKind::Identity, bind("x"))]),
            |draft, m| Some(Patch::with_op(m.result(draft)?, m.node(draft).op().clone(), &[m.value("x")?])),
        ),
    ]
}

fn divide_by_power_of_two(draft: &Draft, m: &Match) -> Option<Patch> {
    let (x, c) = (m.value("x")?, m.value("c")?);
    let divisor = draft.as_scalar(c).filter(|_| draft.shape(c).dtype() == DType::F32)? as f32;
    let factor = 1.0 / divisor;
    let power_of_two = divisor.is_normal() && factor.is_normal() && divisor.to_bits().trailing_zeros() >= 23;
    if !power_of_two {
        return None;
    }
    let mut patch = Patch::new();
    let factor = patch.constant(Tensor::scalar(factor).reshaped(draft.as_const(c)?.dims()).ok()?);
    let product = patch.add(Binary { kind: BinaryOp::Mul }, &[x.into(), factor]);
    patch.replace(m.result(draft)?, product);
    Some(patch)
}

/// Ops of one kind behind each other, and ops that do nothing.
fn chains() -> Vec<Rule> {
    vec![
        Rule::new("same_cast", "x as its own dtype = x", op::<Cast>().with([bind("x")]), keep("x")),
        Rule::new(
            "cast_there_and_back",
            "x as a wider dtype and back = x",
            op::<Cast>().with([op::<Cast>().with([bind("x")]).named("wide")]),
            |draft, m| {
                let (x, wide, result) = (m.value("x")?, m.value("wide")?, m.result(draft)?);
                let dtype = |v| draft.shape(v).dtype();
                let lossless = dtype(result) == dtype(x) && holds(dtype(wide), dtype(x));
                lossless.then(|| Patch::redirect(result, x))
            },
        ),
        Rule::new("same_reshape", "x in its own dims = x", op::<Reshape>().with([bind("x")]), keep("x")),
        Rule::new(
            "reshape_of_reshape",
            "elements keep their order",
            op::<Reshape>().with([op::<Reshape>().with([bind("x")])]),
            |draft, m| Some(Patch::with_op(m.result(draft)?, m.node(draft).op().clone(), &[m.value("x")?])),
        ),
        Rule::new(
            "same_transpose",
            "x with its axes in order = x",
            op::<Transpose>()
                .attr(|t: &Transpose| t.perm.iter().enumerate().all(|(i, &axis)| i == axis))
                .with([bind("x")]),
            keep("x"),
        ),
        Rule::new(
            "transpose_of_ones",
            "axes of extent 1 move without their elements",
            op::<Transpose>().with([bind("x")]),
            |draft, m| {
                let (x, result) = (m.value("x")?, m.result(draft)?);
                let dims = draft.shape(x).dims();
                let perm = &m.node(draft).op().downcast::<Transpose>()?.perm;
                let ordered = perm.iter().filter(|&&axis| dims[axis] != 1).is_sorted();
                let dims = draft.shape(result).dims().to_vec();
                ordered.then(|| Patch::with_op(result, Reshape { dims }, &[x]))
            },
        ),
        Rule::new(
            "transpose_of_transpose",
            "axis i of the result is axis p[q[i]] of x",
            op::<Transpose>().with([op::<Transpose>().with([bind("x")]).named("first")]),
            |draft, m| {
                let (first, _) = draft.made_by::<Transpose>(m.value("first")?)?;
                let second = m.node(draft).op().downcast::<Transpose>()?;
                let perm = second.perm.iter().map(|&axis| first.perm[axis]).collect();
                Some(Patch::with_op(m.result(draft)?, Transpose { perm }, &[m.value("x")?]))
            },
        ),
        Rule::new(
            "reshape_of_columns",
            "columns of rows stay columns, however the rows are counted",
            op::<Reshape>()
                .with([op::<Slice>().attr(|s: &Slice| s.step == 1).with([bind("x")]).named("part")]),
            reshape_of_columns,
        ),
        Rule::new(
            "whole_slice",
            "all elements of x = x",
            op::<Slice>().attr(|s: &Slice| s.start == 0 && s.step == 1).with([bind("x")]),
            keep("x"),
        ),
    ]
}

/// Slices of the last axis are views where their rows are: the rows are counted anew first.
fn reshape_of_columns(draft: &Draft, m: &Match) -> Option<Patch> {
    let (slice, _) = draft.made_by::<Slice>(m.value("part")?)?;
    let (x, result) = (m.value("x")?, m.result(draft)?);
    let (from, to) = (draft.shape(x), draft.shape(result));
    let last_axis = slice.axis.is_none_or(|axis| axis + 1 == from.rank());
    if !last_axis || to.last() != Some(&slice.len) || from.rank() < 2 || to.rank() < 2 {
        return None;
    }
    let mut patch = Patch::new();
    let dims = [&to.dims()[..to.rank() - 1], from.dims().last_chunk::<1>()?].concat();
    let rows = patch.add(Reshape { dims }, &[x.into()]);
    let window = Slice::range(to.rank() - 1, to.rank(), slice.start.clone(), slice.len.clone());
    let part = patch.add(window, &[rows]);
    patch.replace(result, part);
    Some(patch)
}

/// True if every value of `inner` is one of `outer`.
fn holds(outer: DType, inner: DType) -> bool {
    use DType::{BF16, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32};
    outer == inner
        || match outer {
            F64 => matches!(inner, F32 | F16 | BF16 | I8 | I16 | I32 | U8 | U16 | U32),
            F32 => matches!(inner, F16 | BF16 | I8 | I16 | U8 | U16),
            I64 => matches!(inner, I8 | I16 | I32 | U8 | U16 | U32),
            I32 => matches!(inner, I8 | I16 | U8 | U16),
            _ => false,
        }
}

/// Transposed operands of a product.
fn views() -> Vec<Rule> {
    let swaps_last_two = |t: &Transpose| {
        let rank = t.perm.len();
        let (lead, last) = t.perm.split_at(rank.saturating_sub(2));
        lead.iter().enumerate().all(|(i, &axis)| i == axis) && last == [rank - 1, rank - 2]
    };
    let swapped = move || op::<Transpose>().attr(swaps_last_two).with([bind("x")]);
    vec![
        Rule::new(
            "transposed_left",
            "a^T b, with the transposition in the attribute",
            op::<MatMul>().with([swapped(), bind("b")]),
            |draft, m| {
                let product = m.node(draft).op().downcast::<MatMul>()?;
                let op = MatMul { transpose_a: !product.transpose_a, ..product.clone() };
                Some(Patch::with_op(m.result(draft)?, op, &[m.value("x")?, m.value("b")?]))
            },
        ),
        Rule::new(
            "transposed_right",
            "a b^T, with the transposition in the attribute",
            op::<MatMul>().with([bind("a"), swapped()]),
            |draft, m| {
                let product = m.node(draft).op().downcast::<MatMul>()?;
                let op = MatMul { transpose_b: !product.transpose_b, ..product.clone() };
                Some(Patch::with_op(m.result(draft)?, op, &[m.value("a")?, m.value("x")?]))
            },
        ),
    ]
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn neutral_elements_and_inverse_pairs_go() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [0.0]
  const %2 : f32[] = [1.0]
  const %3 : f32[] = [4.0]
  %4 : f32[rows, 4] = binary(%1, @x) {kind=add}
  %5 : f32[rows, 4] = binary(%2, %4) {kind=mul}
  %6 : f32[rows, 4] = binary(%5, %3) {kind=div}
  %7 : f32[rows, 4] = unary(%6) {kind=neg}
  %8 : f32[rows, 4] = unary(%7) {kind=neg}
  %9 : f32[rows, 4] = activation(%8) {kind=identity}
  return "y": %9
}"#;
        insta::assert_snapshot!(after(&["canonicalise"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          const %1 : f32[] = [0.25]
          %2 : f32[rows, 4] = binary(@x, %1) {kind=mul}
          return "y": %2
        }
        "#);
    }

    #[test]
    fn chains_of_views_and_casts_become_one() {
        let before = r#"graph "g" {
  input @x : f32[rows, 6, 4]
  %1 : f32[rows, 4, 6] = transpose(@x) {perm=[0, 2, 1]}
  %2 : f32[4, rows, 6] = transpose(%1) {perm=[1, 0, 2]}
  %3 : f32[4*rows, 6] = reshape(%2) {dims=dims[4*rows, 6]}
  %4 : f32[24*rows] = reshape(%3) {dims=dims[24*rows]}
  %5 : f32[24*rows] = slice(%4) {axis=0, start=dims[0], len=dims[24*rows], step=1}
  %6 : f32[24*rows] = cast(%5) {to=f32}
  %7 : f64[24*rows] = cast(%6) {to=f64}
  %8 : f32[24*rows] = cast(%7) {to=f32}
  return "y": %8
}"#;
        insta::assert_snapshot!(after(&["canonicalise"], before), @r#"
        graph "g" {
          input @x : f32[rows, 6, 4]
          %1 : f32[4, rows, 6] = transpose(@x) {perm=[2, 0, 1]}
          %2 : f32[24*rows] = reshape(%1) {dims=dims[24*rows]}
          return "y": %2
        }
        "#);
    }

    #[test]
    fn a_transposition_of_ones_is_a_reshape() {
        let before = r#"graph "g" {
  input @x : f32[rows, 1, 4]
  %1 : f32[1, rows, 4] = transpose(@x) {perm=[1, 0, 2]}
  %2 : f32[1, 4, rows] = transpose(@x) {perm=[1, 2, 0]}
  return "y": %1, "z": %2
}"#;
        insta::assert_snapshot!(after(&["canonicalise"], before), @r#"
        graph "g" {
          input @x : f32[rows, 1, 4]
          %1 : f32[1, rows, 4] = reshape(@x) {dims=dims[1, rows, 4]}
          %2 : f32[1, 4, rows] = transpose(@x) {perm=[1, 2, 0]}
          return "y": %1, "z": %2
        }
        "#);
    }

    #[test]
    fn columns_of_rows_counted_anew() {
        let before = r#"graph "g" {
  input @x : f32[batch, seq, 6]
  %1 : f32[batch, seq, 2] = slice(@x) {axis=none, start=dims[2], len=dims[2], step=1}
  %2 : f32[batch*seq, 2] = reshape(%1) {dims=dims[batch*seq, 2]}
  %3 : f32[2*batch*seq] = reshape(%1) {dims=dims[2*batch*seq]}
  return "y": %2, "z": %3
}"#;
        insta::assert_snapshot!(after(&["canonicalise", "dce"], before), @r#"
        graph "g" {
          input @x : f32[batch, seq, 6]
          %1 : f32[batch, seq, 2] = slice(@x) {axis=none, start=dims[2], len=dims[2], step=1}
          %2 : f32[batch*seq, 6] = reshape(@x) {dims=dims[batch*seq, 6]}
          %3 : f32[batch*seq, 2] = slice(%2) {axis=none, start=dims[2], len=dims[2], step=1}
          %4 : f32[2*batch*seq] = reshape(%1) {dims=dims[2*batch*seq]}
          return "y": %3, "z": %4
        }
        "#);
    }

    #[test]
    fn transposed_operands_become_attributes() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  input @z : f32[rows, 4]
  %2 : f32[4, rows] = transpose(@z) {perm=[1, 0]}
  %3 : f32[rows, rows] = matmul(@x, %2) {transpose_a=false, transpose_b=false}
  return "y": %3
}"#;
        insta::assert_snapshot!(after(&["canonicalise"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          input @z : f32[rows, 4]
          %2 : f32[rows, rows] = matmul(@x, @z) {transpose_a=false, transpose_b=true}
          return "y": %2
        }
        "#);
    }

    #[test]
    fn inexact_division_widening_addition_and_narrowing_casts_stay() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [3.0]
  const %2 : f32[1, 1, 1] = [0.0]
  %3 : f32[rows, 4] = binary(@x, %1) {kind=div}
  %4 : f32[1, rows, 4] = binary(%3, %2) {kind=add}
  %5 : f16[1, rows, 4] = cast(%4) {to=f16}
  %6 : f32[1, rows, 4] = cast(%5) {to=f32}
  %7 : f32[1, 4, rows] = transpose(%6) {perm=[0, 2, 1]}
  return "y": %7
}"#;
        assert!(fired("canonicalise", before).is_empty());
    }
}
