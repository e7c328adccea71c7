//! Convolutions take what surrounds them: `act(x * w + b + addend)`.
//!
//! Needs: activations by name. Does: one part at a time. Leaves: convolutions of which something else uses an inner value, and
//! activations that the target does not run with a convolution.

use crate::ids::ValueId;
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::BinaryOp;
use crate::ops::conv::Conv;
use crate::passes::{PassCx, PassError};
use crate::rewrite::pat::{bind, op, scalar};
use crate::rewrite::words::binary;
use crate::rewrite::{Draft, Match, Patch, Pattern, Rule};
use rlx_tensor::DType;

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    cx.rewrite(draft, &rules())
}

/// A convolution that only one value uses, bound to `conv`.
fn only_conv(test: impl Fn(&Conv) -> bool + Send + Sync + 'static) -> Pattern {
    op::<Conv>().attr(test).single_use().named("conv")
}

fn is_open(conv: &Conv) -> bool {
    conv.activation == ActivationKind::Identity
}

/// The rules of this pass.
pub fn rules() -> Vec<Rule> {
    vec![
        Rule::new(
            "conv_addend",
            "(x * w + b) + r, same dims",
            binary(BinaryOp::Add, only_conv(|c| is_open(c) && !c.addend), bind("r")),
            |draft, m| {
                let (conv, r) = (m.value("conv")?, m.value("r")?);
                let fits = draft.same_shape(conv, r) && !draft.is_weight(r);
                extended(draft, m, Some(r), |c| Conv { addend: true, ..c }).filter(|_| fits)
            },
        ),
        Rule::new(
            "conv_activation",
            "act(x * w + b)",
            op::<Activation>().with([only_conv(is_open)]),
            |draft, m| {
                let activation = m.node(draft).op().downcast::<Activation>()?.kind;
                extended(draft, m, None, |c| Conv { activation, ..c })
            },
        ),
        Rule::new(
            "conv_relu6",
            "min(max(x * w + b, 0), 6)",
            binary(BinaryOp::Min, only_conv(|c| c.activation == ActivationKind::Relu), scalar(6.0)),
            |draft, m| {
                let same = draft.same_shape(m.value("conv")?, m.result(draft)?);
                let activation = ActivationKind::Relu6;
                extended(draft, m, None, |c| Conv { activation, ..c }).filter(|_| same)
            },
        ),
    ]
}

/// The convolution of a match, changed, with one more operand at the end if there is one.
fn extended(
    draft: &Draft,
    m: &Match,
    operand: Option<ValueId>,
    change: impl Fn(Conv) -> Conv,
) -> Option<Patch> {
    let (conv, node) = draft.made_by::<Conv>(m.value("conv")?)?;
    let mut inputs = node.inputs().to_vec();
    inputs.extend(operand);
    let float = draft.shape(inputs[0]).dtype() == DType::F32;
    float.then(|| Patch::with_op(m.result(draft).unwrap_or(inputs[0]), change(conv.clone()), &inputs))
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    const ATTRS: &str = "strides=[1], dilations=[1], before=dims[1], after=dims[1], groups=1";

    #[test]
    fn a_convolution_takes_addend_and_activation() {
        let before = format!(
            r#"graph "g" {{
  input @x : f32[batch, 2, 5]
  param @w : f32[2, 2, 3]
  param @b : f32[2]
  %3 : f32[batch, 2, 5] = conv(@x, @w, @b) {{{ATTRS}, bias=true, addend=false, activation=identity, channels_last=false}}
  %4 : f32[batch, 2, 5] = binary(@x, %3) {{kind=add}}
  %5 : f32[batch, 2, 5] = activation(%4) {{kind=relu}}
  return "y": %5
}}"#
        );
        insta::assert_snapshot!(after(&["fuse_conv"], &before), @r#"
        graph "g" {
          input @x : f32[batch, 2, 5]
          param @w : f32[2, 2, 3]
          param @b : f32[2]
          %3 : f32[batch, 2, 5] = conv(@x, @w, @b, @x) {strides=[1], dilations=[1], before=dims[1], after=dims[1], groups=1, bias=true, addend=true, activation=relu, channels_last=false}
          return "y": %3
        }
        "#);
    }

    #[test]
    fn the_larger_of_zero_and_the_smaller_of_six() {
        let before = format!(
            r#"graph "g" {{
  input @x : f32[1, 2, 5]
  param @w : f32[2, 2, 3]
  const %1 : f32[] = [6.0]
  %2 : f32[1, 2, 5] = conv(@x, @w) {{{ATTRS}, bias=false, addend=false, activation=identity, channels_last=false}}
  %3 : f32[1, 2, 5] = activation(%2) {{kind=relu}}
  %4 : f32[1, 2, 5] = binary(%3, %1) {{kind=min}}
  return "y": %4
}}"#
        );
        assert_eq!(fired("fuse_conv", &before), ["conv_activation", "conv_relu6"]);
    }

    #[test]
    fn a_convolution_used_elsewhere_stays() {
        let before = format!(
            r#"graph "g" {{
  input @x : f32[1, 2, 5]
  param @w : f32[2, 2, 3]
  %2 : f32[1, 2, 5] = conv(@x, @w) {{{ATTRS}, bias=false, addend=false, activation=identity, channels_last=false}}
  %3 : f32[1, 2, 5] = activation(%2) {{kind=relu}}
  return "y": %2, "z": %3
}}"#
        );
        assert!(fired("fuse_conv", &before).is_empty());
    }
}
