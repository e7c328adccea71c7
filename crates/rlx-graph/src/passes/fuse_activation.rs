//! Chains of elementwise ops become activations (Hendrycks and Gimpel, 2016, for gelu; Elfwing et al., 2017, for silu).
//!
//! Needs: scalars on the right, so that `canonicalise` comes first. Does: the spellings that exporters write. Leaves: chains whose
//! inner values are used elsewhere.

use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::BinaryOp::{Add, Div, Max, Mul, Pow};
use crate::ops::unary::UnaryOp;
use crate::passes::words::{activation, binary, is_float, unary};
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::{bind, one_of, scalar};
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
