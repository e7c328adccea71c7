//! What products of codes with a matrix and over windows share.

use crate::backend::BackendError;
use crate::backend::cpu::lower::{LowerCx, PackedSpec, ShapeCx};
use crate::plan::{Place, StepSpec};
use rlx_kernels::conv::ConvLayer;
use rlx_kernels::integer_product::{CodeOrder, IntegerKernel, packed_bytes};
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::integer_product::{IntegerOperands, IntegerProductStep};
use rlx_tensor::{DType, Shape};

/// A product as its kernel takes it.
pub(super) struct Product {
    pub layer: ConvLayer,
    pub order: CodeOrder,
    /// Over windows of images, rather than rows.
    pub images: bool,
    /// Positions of operands.
    pub weight_zeros: Option<usize>,
    pub scale: Option<usize>,
    pub result_scale: Option<usize>,
    pub bias: Option<usize>,
    /// Zero point, smallest and largest code of the result.
    pub codes: [i64; 3],
}

/// Whether codes of these operands have kernels.
pub(super) fn are_codes(inputs: &[&Shape]) -> bool {
    inputs.iter().take(2).all(|shape| matches!(shape.dtype(), DType::U8 | DType::I8))
}

/// The product whose weights and their zero points are known before a run.
pub(super) fn known(cx: &ShapeCx<'_>, step: &StepSpec, product: Product) -> Option<Product> {
    let zeros = product.weight_zeros.is_none_or(|at| cx.is_known(&step.inputs[at]));
    (zeros && cx.is_known(&step.inputs[1])).then_some(product)
}

pub(super) fn packed(cx: &ShapeCx<'_>, step: &StepSpec, product: Option<Product>) -> Vec<PackedSpec> {
    let spec = product.and_then(|p| cx.codes_spec(&step.inputs[1], &p.layer, p.order));
    spec.into_iter().collect()
}

pub(super) fn own_bytes(cx: &ShapeCx<'_>, step: &StepSpec, product: Option<Product>) -> usize {
    let constant = product.filter(|_| cx.is_constant(&step.inputs[1]));
    constant.and_then(|p| packed_bytes(cx.isa, &p.layer)).unwrap_or(0)
}

pub(super) fn scratch(cx: &ShapeCx<'_>, product: Option<Product>) -> usize {
    let kernel = product.and_then(|p| IntegerKernel::select(cx.isa, p.layer));
    kernel.map_or(0, |kernel| kernel.scratch_bytes())
}

pub(super) fn lower(
    cx: &mut LowerCx<'_>,
    step: &StepSpec,
    product: Option<Product>,
) -> Result<Option<Box<dyn Step>>, BackendError> {
    let Some(product) = product else { return Ok(None) };
    let Some(kernel) = IntegerKernel::select(cx.isa(), product.layer) else { return Ok(None) };
    let zeros = product.weight_zeros.map(|at| &step.inputs[at]);
    let Some(weights) = cx.codes_matrix(&step.inputs[1], &kernel, product.order, zeros)? else {
        return Ok(None);
    };
    let operand = |at: Option<usize>| at.map(|at| cx.operand(&step.inputs[at]));
    let at = IntegerOperands {
        x: cx.operand(&step.inputs[0]),
        x_zero: cx.operand(&step.inputs[2]),
        scale: operand(product.scale),
        result_scale: operand(product.result_scale),
        bias: operand(product.bias),
        out: cx.operand(&step.outputs[0]),
    };
    let lowered = IntegerProductStep::new(kernel, weights, product.images, product.codes, at);
    Ok(lowered.map(|step| Box::new(step) as Box<dyn Step>))
}

/// Sizes of a place that are numbers.
pub(super) fn known_dims(cx: &ShapeCx<'_>, place: &Place) -> Option<Vec<usize>> {
    (0..place.dims.len()).map(|axis| cx.known(place, axis)).collect()
}
