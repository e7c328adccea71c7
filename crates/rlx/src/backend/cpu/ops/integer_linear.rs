//! Products of codes with a packed matrix of codes.

use super::CpuOp;
use super::integer_product::{self, Product};
use crate::backend::BackendError;
use crate::backend::cpu::lower::{LowerCx, PackedSpec, ShapeCx};
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::integer_linear::IntegerLinear;
use rlx_graph::{Op, OpDef};
use rlx_kernels::integer_product::{CodeOrder, MAX_INPUTS, matrix_layer};
use rlx_kernels::schedule::Step;
use rlx_tensor::Shape;

/// `integer_linear`.
pub(in super::super) struct CpuIntegerLinear;

fn product_of(op: &IntegerLinear, weight: &[usize]) -> Option<Product> {
    let &[first, second] = weight else { return None };
    let (n, k) = if op.transposed { (second, first) } else { (first, second) };
    ((1..=MAX_INPUTS).contains(&k) && n > 0).then(|| Product {
        layer: matrix_layer(n, k),
        order: CodeOrder::matrix(n, k, op.transposed),
        images: false,
        weight_zeros: op.weight_zeros_at(),
        scale: op.scale_at(),
        result_scale: op.result_scale_at(),
        bias: op.bias_at(),
        codes: [op.zero, op.low, op.high],
    })
}

fn product_in(cx: &ShapeCx<'_>, step: &StepSpec) -> Option<Product> {
    let op = step.op.downcast::<IntegerLinear>()?;
    let product = product_of(op, &integer_product::known_dims(cx, &step.inputs[1])?)?;
    integer_product::known(cx, step, product)
}

impl CpuOp for CpuIntegerLinear {
    fn name(&self) -> &'static str {
        IntegerLinear::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<IntegerLinear>() else { return false };
        let product = inputs[1].known_dims().and_then(|dims| product_of(op, &dims));
        product.is_some() && integer_product::are_codes(inputs)
    }

    fn accepts_strided(&self, _op: &Op, operand: usize) -> bool {
        operand == 0
    }

    fn writes_strided(&self, _op: &Op) -> bool {
        true
    }

    fn packed(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<PackedSpec> {
        integer_product::packed(cx, step, product_in(cx, step))
    }

    fn own_bytes(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> usize {
        integer_product::own_bytes(cx, step, product_in(cx, step))
    }

    fn scratch(
        &self,
        cx: &ShapeCx<'_>,
        step: &StepSpec,
        _sizes: &[usize],
        _workers: usize,
    ) -> Result<(usize, usize), BackendError> {
        Ok((integer_product::scratch(cx, product_in(cx, step)), 0))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let product = product_in(&cx.shapes(), step);
        integer_product::lower(cx, step, product)
    }
}
