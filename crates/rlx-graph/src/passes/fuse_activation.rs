//! Chains of elementwise ops become activations (Hendrycks and Gimpel, 2016, for gelu; Elfwing et al., 2017, for silu).
//!
//! Needs: scalars on the right, so that `canonicalise` comes first. Does: the spellings that exporters write. Leaves: chains whose
//! inner values are used elsewhere.

use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::BinaryOp::{Add, Div, Max, Mul, Pow};
use crate::ops::unary::UnaryOp;
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::{bind, one_of, scalar};
use crate::rewrite::words::{activation, binary, is_float, unary};
use crate::rewrite::{Draft, Patch, Pattern, Rule};
use std::f64::consts::{FRAC_1_SQRT_2, SQRT_2};

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044715;

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    cx.rewrite(draft, &rules())
}

/// The rules of this pass.
pub fn rules() -> Vec<Rule> {
    let x = || bind("x");
    let sigmoid = |of: Pattern| activation(ActivationKind::Sigmoid, of).single_use();
    vec![
        becomes("tanh", "the same function", ActivationKind::Tanh, unary(UnaryOp::Tanh, x())),
        becomes("sigmoid", "the same function", ActivationKind::Sigmoid, unary(UnaryOp::Sigmoid, x())),
        becomes("relu", "max(x, 0)", ActivationKind::Relu, binary(Max, x(), scalar(0.0))),
        becomes("silu", "x * sigmoid(x)", ActivationKind::Silu, binary(Mul, x(), sigmoid(x()))),
        becomes(
            "quick_gelu",
            "x * sigmoid(1.702 x)",
            ActivationKind::QuickGelu,
            binary(Mul, x(), sigmoid(binary(Mul, x(), scalar(1.702)).single_use())),
        ),
        becomes("gelu", "x / 2 * (1 + erf(x / sqrt 2))", ActivationKind::Gelu, half_x_one_plus(erf)),
        becomes(
            "gelu_tanh",
            "x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))",
            ActivationKind::GeluTanh,
            half_x_one_plus(tanh),
        ),
    ]
}

fn becomes(name: &'static str, maths: &'static str, kind: ActivationKind, pattern: Pattern) -> Rule {
    Rule::new(name, maths, pattern, move |draft, m| {
        let (x, result) = (m.value("x")?, m.result(draft)?);
        let fits = is_float(draft, x) && draft.same_shape(x, result);
        fits.then(|| Patch::with_op(result, Activation { kind }, &[x]))
    })
}

/// `0.5 * x * (1 + inner)` in each way of placing the brackets.
fn half_x_one_plus(inner: fn() -> Pattern) -> Pattern {
    let sum = || binary(Add, inner(), scalar(1.0)).single_use();
    let half = |p: Pattern| binary(Mul, p, scalar(0.5));
    one_of([
        half(binary(Mul, bind("x"), sum()).single_use()),
        binary(Mul, half(bind("x")).single_use(), sum()),
        binary(Mul, bind("x"), half(sum()).single_use()),
    ])
}

fn erf() -> Pattern {
    let scaled = one_of([
        binary(Mul, bind("x"), scalar(FRAC_1_SQRT_2)).single_use(),
        binary(Div, bind("x"), scalar(SQRT_2)).single_use(),
    ]);
    unary(UnaryOp::Erf, scaled).single_use()
}

fn tanh() -> Pattern {
    let x = || bind("x");
    let square = || binary(Mul, x(), x());
    let cube = one_of([binary(Mul, square(), x()).single_use(), binary(Pow, x(), scalar(3.0)).single_use()]);
    let bent = one_of([
        binary(Mul, cube, scalar(CUBIC)).single_use(),
        binary(Mul, binary(Mul, square(), scalar(CUBIC)).single_use(), x()).single_use(),
        binary(Mul, binary(Mul, x(), scalar(CUBIC)).single_use(), square()).single_use(),
    ]);
    let sum = binary(Mul, binary(Add, x(), bent).single_use(), scalar(SQRT_2_OVER_PI)).single_use();
    let bend = one_of([
        binary(Mul, binary(Mul, x(), scalar(CUBIC)).single_use(), x()).single_use(),
        binary(Mul, square().single_use(), scalar(CUBIC)).single_use(),
    ]);
    let product = binary(
        Mul,
        binary(Mul, x(), scalar(SQRT_2_OVER_PI)).single_use(),
        binary(Add, bend, scalar(1.0)).single_use(),
    );
    activation(ActivationKind::Tanh, one_of([sum, product.single_use()])).single_use()
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn gelu_as_exported() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [0.70710677]
  const %2 : f32[] = [1.0]
  const %3 : f32[] = [0.5]
  %4 : f32[rows, 4] = binary(@x, %1) {kind=mul}
  %5 : f32[rows, 4] = unary(%4) {kind=erf}
  %6 : f32[rows, 4] = binary(%5, %2) {kind=add}
  %7 : f32[rows, 4] = binary(@x, %6) {kind=mul}
  %8 : f32[rows, 4] = binary(%7, %3) {kind=mul}
  return "y": %8
}"#;
        insta::assert_snapshot!(after(&["fuse_activation"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          %1 : f32[rows, 4] = activation(@x) {kind=gelu}
          return "y": %1
        }
        "#);
    }

    #[test]
    fn gelu_with_the_half_on_x() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [0.70710677]
  const %2 : f32[] = [1.0]
  const %3 : f32[] = [0.5]
  %4 : f32[rows, 4] = binary(@x, %1) {kind=mul}
  %5 : f32[rows, 4] = unary(%4) {kind=erf}
  %6 : f32[rows, 4] = binary(%5, %2) {kind=add}
  %7 : f32[rows, 4] = binary(@x, %3) {kind=mul}
  %8 : f32[rows, 4] = binary(%6, %7) {kind=mul}
  return "y": %8
}"#;
        assert_eq!(fired("fuse_activation", before), ["gelu"]);
    }

    #[test]
    fn gelu_with_the_half_on_the_sum() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [0.70710677]
  const %2 : f32[] = [1.0]
  const %3 : f32[] = [0.5]
  %4 : f32[rows, 4] = binary(@x, %1) {kind=mul}
  %5 : f32[rows, 4] = unary(%4) {kind=erf}
  %6 : f32[rows, 4] = binary(%5, %2) {kind=add}
  %7 : f32[rows, 4] = binary(%6, %3) {kind=mul}
  %8 : f32[rows, 4] = binary(@x, %7) {kind=mul}
  return "y": %8
}"#;
        assert_eq!(fired("fuse_activation", before), ["gelu"]);
    }

    #[test]
    fn gelu_by_tanh_of_a_power() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [0.044715]
  const %2 : f32[] = [0.7978846]
  const %3 : f32[] = [1.0]
  const %4 : f32[] = [0.5]
  const %5 : f32[] = [3.0]
  %6 : f32[rows, 4] = binary(@x, %5) {kind=pow}
  %7 : f32[rows, 4] = binary(%6, %1) {kind=mul}
  %8 : f32[rows, 4] = binary(@x, %7) {kind=add}
  %9 : f32[rows, 4] = binary(%8, %2) {kind=mul}
  %10 : f32[rows, 4] = unary(%9) {kind=tanh}
  %11 : f32[rows, 4] = binary(%10, %3) {kind=add}
  %12 : f32[rows, 4] = binary(@x, %4) {kind=mul}
  %13 : f32[rows, 4] = binary(%12, %11) {kind=mul}
  return "y": %13
}"#;
        assert_eq!(fired("fuse_activation", before), ["tanh", "gelu_tanh"]);
    }

    #[test]
    fn gelu_by_tanh_of_a_product() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [0.044715]
  const %2 : f32[] = [0.7978846]
  const %3 : f32[] = [1.0]
  const %4 : f32[] = [0.5]
  %6 : f32[rows, 4] = binary(@x, %1) {kind=mul}
  %7 : f32[rows, 4] = binary(%6, @x) {kind=mul}
  %8 : f32[rows, 4] = binary(%7, %3) {kind=add}
  %9 : f32[rows, 4] = binary(@x, %2) {kind=mul}
  %10 : f32[rows, 4] = binary(%9, %8) {kind=mul}
  %11 : f32[rows, 4] = unary(%10) {kind=tanh}
  %12 : f32[rows, 4] = binary(%11, %3) {kind=add}
  %13 : f32[rows, 4] = binary(@x, %4) {kind=mul}
  %14 : f32[rows, 4] = binary(%13, %12) {kind=mul}
  return "y": %14
}"#;
        assert_eq!(fired("fuse_activation", before), ["tanh", "gelu_tanh"]);
    }

    #[test]
    fn silu_then_quick_gelu_then_relu() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [1.702]
  const %2 : f32[] = [0.0]
  %3 : f32[rows, 4] = unary(@x) {kind=sigmoid}
  %4 : f32[rows, 4] = binary(%3, @x) {kind=mul}
  %5 : f32[rows, 4] = binary(%4, %1) {kind=mul}
  %6 : f32[rows, 4] = unary(%5) {kind=sigmoid}
  %7 : f32[rows, 4] = binary(%4, %6) {kind=mul}
  %8 : f32[rows, 4] = binary(%7, %2) {kind=max}
  return "y": %8
}"#;
        insta::assert_snapshot!(after(&["fuse_activation"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          %1 : f32[rows, 4] = activation(@x) {kind=silu}
          %2 : f32[rows, 4] = activation(%1) {kind=quick_gelu}
          %3 : f32[rows, 4] = activation(%2) {kind=relu}
          return "y": %3
        }
        "#);
    }

    #[test]
    fn another_factor_is_no_gelu() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  const %1 : f32[] = [0.7]
  const %2 : f32[] = [1.0]
  const %3 : f32[] = [0.5]
  %4 : f32[rows, 4] = binary(@x, %1) {kind=mul}
  %5 : f32[rows, 4] = unary(%4) {kind=erf}
  %6 : f32[rows, 4] = binary(%5, %2) {kind=add}
  %7 : f32[rows, 4] = binary(@x, %6) {kind=mul}
  %8 : f32[rows, 4] = binary(%7, %3) {kind=mul}
  return "y": %8
}"#;
        assert!(fired("fuse_activation", before).is_empty());
    }

    #[test]
    fn a_gate_used_elsewhere_stays() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  %1 : f32[rows, 4] = activation(@x) {kind=sigmoid}
  %2 : f32[rows, 4] = binary(@x, %1) {kind=mul}
  return "y": %2, "gate": %1
}"#;
        assert!(fired("fuse_activation", before).is_empty());
    }
}
