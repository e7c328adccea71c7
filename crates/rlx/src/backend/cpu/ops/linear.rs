//! Linear layers over packed weights.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::{LowerCx, MatrixSpec, PackedSpec, ShapeCx, weight_type};
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::linear::Linear;
use rlx_graph::ops::lora_linear::LoraLinear;
use rlx_graph::{Op, OpDef};
use rlx_kernels::gemm::{Activation, LinearKernel, PackedMatrix, quantized_bytes};
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::linear::LinearStep;
use rlx_tensor::{Dim, Shape};
use std::sync::Arc;

/// `linear`.
pub(in super::super) struct CpuLinear;

/// The kernels' name of an activation; `None` if the epilogue does not have it.
pub(in super::super) fn activation(kind: ActivationKind) -> Option<Activation> {
    Some(match kind {
        ActivationKind::Identity => Activation::None,
        ActivationKind::Relu => Activation::Relu,
        ActivationKind::Gelu => Activation::Gelu,
        ActivationKind::GeluTanh => Activation::GeluTanh,
        ActivationKind::QuickGelu => Activation::QuickGelu,
        ActivationKind::Silu => Activation::Silu,
        ActivationKind::Tanh => Activation::Tanh,
        ActivationKind::Sigmoid => Activation::Sigmoid,
        ActivationKind::Relu6 => Activation::Relu6,
        _ => return None,
    })
}

/// The weights of a linear step.
pub(in super::super) fn matrix_of(step: &StepSpec) -> Option<MatrixSpec<'_>> {
    let adapted = || step.op.downcast::<LoraLinear>().map(LoraLinear::linear);
    let op = step.op.downcast::<Linear>().cloned().or_else(adapted)?;
    let weights = step.inputs.get(1..=op.parts)?;
    Some(MatrixSpec { weights, transposed: op.transposed, gated: op.gated })
}

/// Whether weights can be packed: of known size; floats, or rows of whole blocks of a type that has kernels; gate and up alike
/// if one of them is in blocks.
pub(in super::super) fn takes(weights: &[&Shape], transposed: bool, gated: bool) -> bool {
    let fits = |weight: &&Shape| {
        let (inputs, _) = weight.dtype().block();
        let whole = weight.last().and_then(Dim::known).is_some_and(|k| k.is_multiple_of(inputs));
        let blocks = whole && !transposed && weight_type(weight.dtype()).is_some();
        weight.known_dims().is_some() && (weight.dtype().is_float() || blocks)
    };
    let floats = weights.iter().all(|weight| weight.dtype().is_float());
    let alike = weights.windows(2).all(|pair| pair[0].dtype() == pair[1].dtype());
    weights.iter().all(fits) && (!gated || floats || alike)
}

/// A step's matrices with their kernels; `None` if some cannot be packed.
fn pieces_of(
    cx: &LowerCx<'_>,
    spec: &MatrixSpec<'_>,
) -> Result<Option<Vec<(LinearKernel, PackedMatrix)>>, BackendError> {
    let mut pieces = Vec::new();
    for piece in spec.pieces() {
        let Some(matrix) = cx.matrix(&piece)? else { return Ok(None) };
        let kernel = LinearKernel::select(cx.isa(), matrix.layout(), cx.products());
        let kernel = kernel.ok_or_else(|| cx.unsupported(format!("no kernel for {:?}", matrix.layout())))?;
        pieces.push((kernel, matrix));
    }
    Ok(Some(pieces))
}

/// Copies of weights that a linear step reads.
pub(super) fn packed_by(cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<PackedSpec> {
    let pieces = matrix_of(step).map_or(Vec::new(), |spec| spec.pieces());
    pieces.iter().filter_map(|piece| cx.packed_spec(piece)).collect()
}

/// Bytes of the packed constants and the joined bias that a linear step holds.
pub(super) fn own_bytes_of(cx: &ShapeCx<'_>, op: &Linear, step: &StepSpec) -> usize {
    let pieces = matrix_of(step).map_or(Vec::new(), |spec| spec.pieces());
    let packed = pieces.iter().filter_map(|piece| cx.constant_layout(piece)).map(|layout| layout.bytes());
    let biases = if op.bias { &step.inputs[op.bias_at()..op.bias_at() + op.parts] } else { &[] };
    packed.chain(biases.iter().map(|place| cx.vector_bytes(place))).sum()
}

/// Bytes of scratch that each worker of a linear step needs, and that they share.
pub(super) fn scratch_of(cx: &ShapeCx<'_>, step: &StepSpec, sizes: &[usize]) -> (usize, usize) {
    let pieces = matrix_of(step).map_or(Vec::new(), |spec| spec.pieces());
    let layouts = pieces.iter().filter_map(|p| cx.matrix_layout(p).or_else(|| cx.constant_layout(p)));
    let kernels: Vec<_> =
        layouts.filter_map(|layout| LinearKernel::select(cx.isa, &layout, cx.products())).collect();
    let x = &step.inputs[0].dims;
    let rows = x[..x.len().saturating_sub(1)].iter().map(|dim| sizes[dim.index()]).product();
    let each = kernels.iter().map(|k| k.scratch_len_beside() * size_of::<f32>()).max().unwrap_or(0);
    (each, quantized_bytes(kernels.iter(), rows))
}

/// The step of a linear layer over a step's first operands; `None` where the kernels have no such layer.
pub(super) fn linear_step(
    cx: &mut LowerCx<'_>,
    op: &Linear,
    step: &StepSpec,
) -> Result<Option<LinearStep>, BackendError> {
    let Some(spec) = matrix_of(step) else { return Ok(None) };
    let Some(act) = activation(op.activation) else { return Ok(None) };
    let Some(pieces) = pieces_of(cx, &spec)? else { return Ok(None) };
    let bias = match op.bias {
        true => {
            let mut joined = Vec::new();
            for place in &step.inputs[op.bias_at()..op.bias_at() + op.parts] {
                let Some(values) = cx.numbers(place)? else { return Ok(None) };
                joined.extend_from_slice(&values);
            }
            cx.holds(size_of_val(&joined[..]));
            Some(Arc::from(joined))
        }
        false => None,
    };
    let residual = op.residual.then(|| cx.operand(&step.inputs[op.arity() - 1]));
    let (x, out) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
    let step = LinearStep::new(pieces, bias, act, x, residual, out);
    Ok(Some(step.map_err(|e| cx.unsupported(e.to_string()))?))
}

impl CpuOp for CpuLinear {
    fn name(&self) -> &'static str {
        Linear::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<Linear>() else { return false };
        let Some(weights) = inputs.get(1..=op.parts) else { return false };
        activation(op.activation).is_some() && takes(weights, op.transposed, op.gated)
    }

    fn accepts_strided(&self, op: &Op, operand: usize) -> bool {
        op.downcast::<Linear>().is_some_and(|l| operand == 0 || (l.residual && operand == l.arity() - 1))
    }

    fn accepts_in_place(&self, op: &Op, operand: usize, _result: &Shape) -> bool {
        op.downcast::<Linear>().is_some_and(|l| l.residual && operand == l.arity() - 1)
    }

    fn packed(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<PackedSpec> {
        packed_by(cx, step)
    }

    fn own_bytes(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> usize {
        step.op.downcast::<Linear>().map_or(0, |op| own_bytes_of(cx, op, step))
    }

    fn scratch(
        &self,
        cx: &ShapeCx<'_>,
        step: &StepSpec,
        sizes: &[usize],
        _workers: usize,
    ) -> Result<(usize, usize), BackendError> {
        Ok(scratch_of(cx, step, sizes))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Linear>() else { return Ok(None) };
        Ok(linear_step(cx, op, step)?.map(|step| Box::new(step) as Box<dyn Step>))
    }
}
