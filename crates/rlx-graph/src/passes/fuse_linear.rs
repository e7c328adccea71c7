//! Products with weights become linear layers and take what surrounds them.
//!
//! Needs: activations by name, transposed operands in the product's attributes. Does: `residual + act(x W + b)`, one part at a time.
//! Leaves: products of which something else uses an inner value, and terms that broadcast in another way.

use crate::ids::ValueId;
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::BinaryOp;
use crate::ops::linear::Linear;
use crate::ops::matmul::MatMul;
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::{bind, op};
use crate::rewrite::words::{binary, is_f32, is_row_of, narrow};
use crate::rewrite::{Draft, Match, Patch, Pattern, Rule};

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    cx.rewrite(draft, &rules())
}

/// A linear layer that only one value uses, bound to `linear`.
pub(crate) fn only_linear(test: impl Fn(&Linear) -> bool + Send + Sync + 'static) -> Pattern {
    op::<Linear>().attr(test).single_use().named("linear")
}

/// The rules of this pass.
pub fn rules() -> Vec<Rule> {
    let open = |l: &Linear| l.activation == ActivationKind::Identity && !l.gated && !l.residual;
    vec![
        Rule::new(
            "linear",
            "x W with a weight W",
            op::<MatMul>()
                .attr(|m: &MatMul| !m.transpose_a)
                .with([bind("x"), bind("w").such_that(|draft, w| draft.is_weight(w))]),
            from_product,
        ),
        Rule::new(
            "linear_bias",
            "(x W) + b, a number per column",
            binary(
                BinaryOp::Add,
                only_linear(move |l| open(l) && !l.bias && l.parts == 1),
                bind("b").such_that(|draft, b| draft.is_weight(b)),
            ),
            |draft, m| {
                let (linear, b) = (m.value("linear")?, m.value("b")?);
                let fits = is_row_of(draft, b, linear) && is_f32(draft, b);
                let extended = extended(draft, m, narrow(draft, b), |l| Linear { bias: true, ..l });
                extended.filter(|_| fits)
            },
        ),
        Rule::new(
            "linear_activation",
            "act(x W + b)",
            op::<Activation>().with([only_linear(open)]),
            |draft, m| {
                let kind = m.node(draft).op().downcast::<Activation>()?.kind;
                let (linear, node) = draft.made_by::<Linear>(m.value("linear")?)?;
                let op = Linear { activation: kind, ..linear.clone() };
                Some(Patch::with_op(m.result(draft)?, op, node.inputs()))
            },
        ),
        Rule::new(
            "linear_residual",
            "r + act(x W + b), same rows",
            binary(BinaryOp::Add, only_linear(|l| !l.residual), bind("r")),
            |draft, m| {
                let (linear, r) = (m.value("linear")?, m.value("r")?);
                let fits = draft.same_shape(linear, r);
                extended(draft, m, r, |l| Linear { residual: true, ..l }).filter(|_| fits)
            },
        ),
    ]
}

fn from_product(draft: &Draft, m: &Match) -> Option<Patch> {
    let (x, w) = (m.value("x")?, m.value("w")?);
    let product = m.node(draft).op().downcast::<MatMul>()?;
    let fits = is_f32(draft, x) && draft.shape(w).rank() == 2;
    let op = Linear { transposed: !product.transpose_b, ..Linear::plain() };
    let result = m.result(draft)?;
    fits.then(|| Patch::with_op(result, op, &[x, narrow(draft, w)]))
}

/// The linear layer of a match with one more operand at the end.
fn extended(draft: &Draft, m: &Match, operand: ValueId, change: impl Fn(Linear) -> Linear) -> Option<Patch> {
    let (linear, node) = draft.made_by::<Linear>(m.value("linear")?)?;
    let inputs = [node.inputs(), &[operand]].concat();
    Some(Patch::with_op(m.result(draft)?, change(linear.clone()), &inputs))
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn a_product_takes_bias_activation_and_residual() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  param @w : f16[4, 4]
  param @b : f32[4]
  %3 : f32[4, 4] = cast(@w) {to=f32}
  %4 : f32[rows, 4] = matmul(@x, %3) {transpose_a=false, transpose_b=true}
  %5 : f32[rows, 4] = binary(%4, @b) {kind=add}
  %6 : f32[rows, 4] = activation(%5) {kind=gelu}
  %7 : f32[rows, 4] = binary(@x, %6) {kind=add}
  return "y": %7
}"#;
        insta::assert_snapshot!(after(&["fuse_linear"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          param @w : f16[4, 4]
          param @b : f32[4]
          %3 : f32[rows, 4] = linear(@x, @w, @b, @x) {parts=1, transposed=false, bias=true, activation=gelu, gated=false, residual=true}
          return "y": %3
        }
        "#);
    }

    #[test]
    fn a_product_of_two_run_time_values_is_no_layer() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  input @w : f32[4, 4]
  %2 : f32[rows, 4] = matmul(@x, @w) {transpose_a=false, transpose_b=true}
  return "y": %2
}"#;
        assert!(fired("fuse_linear", before).is_empty());
    }

    #[test]
    fn a_product_used_elsewhere_keeps_its_sum_apart() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  param @w : f32[4, 4]
  param @b : f32[4]
  %3 : f32[rows, 4] = linear(@x, @w) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %4 : f32[rows, 4] = binary(%3, @b) {kind=add}
  return "y": %4, "z": %3
}"#;
        assert!(fired("fuse_linear", before).is_empty());
    }

    #[test]
    fn a_broadcast_row_is_no_residual() {
        let before = r#"graph "g" {
  input @x : f32[4, 4]
  param @w : f32[4, 4]
  param @r : f32[1, 4]
  %3 : f32[4, 4] = linear(@x, @w) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %4 : f32[4, 4] = binary(%3, @r) {kind=add}
  return "y": %4
}"#;
        assert!(fired("fuse_linear", before).is_empty());
    }
}
