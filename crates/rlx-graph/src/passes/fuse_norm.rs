//! Norms written out as reductions become norms.
//!
//! Needs: `canonicalise` (squares as products, scalars on the right) and `cse` (one deviation, not two). Does: layer norm and
//! root-mean-square norm over the last axis of F32. Leaves: norms over other axes, norms without a weight.

use crate::graph::Source;
use crate::ids::ValueId;
use crate::ops::binary::BinaryOp::{Add, Div, Mul, Sub};
use crate::ops::layer_norm::LayerNorm;
use crate::ops::reduce::{Reduce, ReduceOp};
use crate::ops::rms_norm::RmsNorm;
use crate::ops::unary::UnaryOp::{Reciprocal, Rsqrt, Sqrt};
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::{bind, constant, one_of, op, scalar};
use crate::rewrite::words::{binary, is_f32, is_row_of, narrow, unary};
use crate::rewrite::{Draft, Match, Patch, Pattern, Rule};

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    cx.rewrite(draft, &rules())
}

/// The rules of this pass.
pub fn rules() -> Vec<Rule> {
    let squares = || binary(Mul, bind("x"), bind("x"));
    let centred = || binary(Sub, bind("x"), mean(bind("x"))).named("centred");
    let deviation = || binary(Mul, centred(), centred());
    let rms = || over_root(|| bind("x"), squares);
    vec![
        Rule::new(
            "layer_norm",
            "(x - mean x) / sqrt(mean((x - mean x)^2) + eps) * w",
            binary(Mul, over_root(centred, deviation), bind("w")),
            |draft, m| {
                let (x, w) = fitting(draft, m)?;
                let eps = draft.as_scalar(m.value("eps")?)?;
                let op = LayerNorm { eps, bias: false, residual: false };
                Some(Patch::with_op(m.result(draft)?, op, &[x, w]))
            },
        ),
        Rule::new(
            "rms_norm_unit_offset",
            "x / sqrt(mean(x^2) + eps) * (w + 1)",
            binary(Mul, rms(), binary(Add, bind("w"), scalar(1.0))),
            |draft, m| rms_norm(draft, m, true),
        ),
        Rule::new("rms_norm", "x / sqrt(mean(x^2) + eps) * w", binary(Mul, rms(), bind("w")), |draft, m| {
            rms_norm(draft, m, false)
        }),
        Rule::new(
            "layer_norm_bias",
            "norm(x) * w + b",
            binary(
                Add,
                op::<LayerNorm>().attr(|n: &LayerNorm| !n.bias && !n.residual).single_use().named("norm"),
                bind("b"),
            ),
            |draft, m| {
                let (norm, b) = (m.value("norm")?, m.value("b")?);
                let (op, node) = draft.made_by::<LayerNorm>(norm)?;
                let inputs = [node.inputs(), &[narrow(draft, b)]].concat();
                let op = LayerNorm { bias: true, ..op.clone() };
                let result = m.result(draft)?;
                is_row_of(draft, b, norm).then(|| Patch::with_op(result, op, &inputs))
            },
        ),
    ]
}

/// The mean over the last axis, kept with extent 1.
fn mean(of: Pattern) -> Pattern {
    op::<Reduce>().attr(|r: &Reduce| r.kind == ReduceOp::Mean && r.keep_dims).with([of]).such_that(
        |draft, value| {
            let reduced = draft.made_by::<Reduce>(value);
            reduced.is_some_and(|(r, node)| r.axes.as_slice() == [draft.shape(node.inputs()[0]).rank() - 1])
        },
    )
}

/// `numerator / sqrt(mean(squares) + eps)`, by division or by multiplication with the inverse root.
fn over_root(numerator: impl Fn() -> Pattern, squares: impl Fn() -> Pattern) -> Pattern {
    let shifted = || binary(Add, mean(squares()), constant().named("eps"));
    let inverse = one_of([unary(Rsqrt, shifted()), unary(Reciprocal, unary(Sqrt, shifted()))]);
    let divided = binary(Div, numerator(), unary(Sqrt, shifted()));
    let over_one = binary(Mul, numerator(), binary(Div, scalar(1.0), unary(Sqrt, shifted())));
    one_of([binary(Mul, numerator(), inverse).single_use(), divided.single_use(), over_one.single_use()])
}

/// The normalised value and the weight of a match, if the norm ops take them.
fn fitting(draft: &Draft, m: &Match) -> Option<(ValueId, ValueId)> {
    let (x, w) = (m.value("x")?, m.value("w")?);
    let state = matches!(draft.source(w), Source::State);
    (is_f32(draft, x) && is_row_of(draft, w, x) && !state).then(|| (x, narrow(draft, w)))
}

fn rms_norm(draft: &Draft, m: &Match, unit_offset: bool) -> Option<Patch> {
    let (x, w) = fitting(draft, m)?;
    let eps = draft.as_scalar(m.value("eps")?)?;
    let op = RmsNorm { eps, unit_offset, groups: 1, residual: false };
    Some(Patch::with_op(m.result(draft)?, op, &[x, w]))
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn layer_norm_as_exported() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  param @w : f32[4]
  param @b : f32[4]
  const %3 : f32[] = [0.01]
  const %4 : f32[] = [0.5]
  const %5 : f32[] = [2.0]
  %6 : f32[rows, 1] = reduce(@x) {kind=mean, axes=[1], keep_dims=true}
  %7 : f32[rows, 4] = binary(@x, %6) {kind=sub}
  %8 : f32[rows, 4] = binary(%7, %5) {kind=pow}
  %9 : f32[rows, 1] = reduce(%8) {kind=mean, axes=[1], keep_dims=true}
  %10 : f32[rows, 1] = binary(%9, %3) {kind=add}
  %11 : f32[rows, 1] = unary(%10) {kind=sqrt}
  %12 : f32[rows, 4] = binary(%7, %11) {kind=div}
  %13 : f32[rows, 4] = binary(%12, @w) {kind=mul}
  %14 : f32[rows, 4] = binary(%13, @b) {kind=add}
  return "y": %14
}"#;
        insta::assert_snapshot!(after(&["canonicalise", "fuse_norm"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          param @w : f32[4]
          param @b : f32[4]
          %3 : f32[rows, 4] = layer_norm(@x, @w, @b) {eps=0.009999999776482582, bias=true, residual=false}
          return "y": %3
        }
        "#);
    }

    #[test]
    fn rms_norm_with_unit_offset() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  param @w : f16[4]
  const %2 : f32[] = [0.01]
  const %3 : f32[] = [1.0]
  %4 : f32[rows, 4] = binary(@x, @x) {kind=mul}
  %5 : f32[rows, 1] = reduce(%4) {kind=mean, axes=[1], keep_dims=true}
  %6 : f32[rows, 1] = binary(%5, %2) {kind=add}
  %7 : f32[rows, 1] = unary(%6) {kind=rsqrt}
  %8 : f32[rows, 4] = binary(@x, %7) {kind=mul}
  %9 : f32[4] = cast(@w) {to=f32}
  %10 : f32[4] = binary(%9, %3) {kind=add}
  %11 : f32[rows, 4] = binary(%10, %8) {kind=mul}
  return "y": %11
}"#;
        insta::assert_snapshot!(after(&["fuse_norm"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          param @w : f16[4]
          %2 : f32[rows, 4] = rms_norm(@x, @w) {eps=0.009999999776482582, unit_offset=true, groups=1, residual=false}
          return "y": %2
        }
        "#);
    }

    #[test]
    fn another_axis_is_no_norm() {
        let before = r#"graph "g" {
  input @x : f32[rows, 3, 4]
  param @w : f32[4]
  const %2 : f32[] = [0.01]
  %3 : f32[rows, 3, 4] = binary(@x, @x) {kind=mul}
  %4 : f32[rows, 1, 4] = reduce(%3) {kind=mean, axes=[1], keep_dims=true}
  %5 : f32[rows, 1, 4] = binary(%4, %2) {kind=add}
  %6 : f32[rows, 1, 4] = unary(%5) {kind=rsqrt}
  %7 : f32[rows, 3, 4] = binary(@x, %6) {kind=mul}
  %8 : f32[rows, 3, 4] = binary(%7, @w) {kind=mul}
  return "y": %8
}"#;
        assert!(fired("fuse_norm", before).is_empty());
    }
}
