//! Convolutions of images whose channels are adjacent.

use super::{CpuOp, linear};
use crate::backend::BackendError;
use crate::backend::cpu::lower::{LowerCx, PackedSpec, ShapeCx};
use crate::plan::{Place, StepSpec};
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::conv::Conv;
use rlx_graph::{Op, OpDef};
use rlx_kernels::conv::{ConvKernel, ConvLayer, Images, conv_layout, depthwise_order};
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::conv::{ConvStep, Surroundings};
use rlx_tensor::{DType, Dim, Shape};
use std::sync::Arc;

/// `conv`.
pub(in super::super) struct CpuConv;

/// Numbers of one axis or two, as those of two: an image of one axis is a line.
pub(super) fn pair(values: &[usize], line: usize) -> Option<[usize; 2]> {
    match *values {
        [x] => Some([line, x]),
        [y, x] => Some([y, x]),
        _ => None,
    }
}

/// Sizes that are numbers.
pub(super) fn numbers(dims: &[Dim]) -> Option<Vec<usize>> {
    dims.iter().map(Dim::known).collect()
}

/// The layer that an op with these weight dims is; `None` where no kernel takes it.
fn layer_of(op: &Conv, weight: &[usize]) -> Option<ConvLayer> {
    let (outputs, channels) = (*weight.first()?, *weight.get(1)?);
    let all_positive = weight.iter().all(|&d| d > 0);
    (op.channels_last && all_positive).then_some(ConvLayer {
        window: pair(&weight[2..], 1)?,
        strides: pair(&op.strides, 1)?,
        dilations: pair(&op.dilations, 1)?,
        before: pair(&numbers(&op.before)?, 0)?,
        after: pair(&numbers(&op.after)?, 0)?,
        groups: op.groups,
        channels,
        outputs: outputs / op.groups,
    })
}

fn layer_in(cx: &ShapeCx<'_>, step: &StepSpec) -> Option<ConvLayer> {
    let op = step.op.downcast::<Conv>()?;
    let weight = &step.inputs[1];
    let dims: Option<Vec<usize>> = (0..weight.dims.len()).map(|axis| cx.known(weight, axis)).collect();
    let f32_only = step.inputs.iter().chain(&step.outputs).all(|place| place.dtype == DType::F32);
    layer_of(op, &dims.filter(|_| f32_only)?)
}

impl CpuOp for CpuConv {
    fn name(&self) -> &'static str {
        Conv::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<Conv>() else { return false };
        let layer = inputs[1].known_dims().and_then(|dims| layer_of(op, &dims));
        let native = layer.is_some() && inputs[0].dtype() == DType::F32;
        op.is_plain() || (native && linear::activation(op.activation).is_some())
    }

    fn accepts_strided(&self, op: &Op, operand: usize) -> bool {
        op.downcast::<Conv>().is_some_and(|c| operand == 0 || (c.addend && operand == c.arity() - 1))
    }

    fn writes_strided(&self, op: &Op) -> bool {
        op.downcast::<Conv>().is_some_and(|c| c.channels_last)
    }

    fn accepts_in_place(&self, op: &Op, operand: usize, _result: &Shape) -> bool {
        op.downcast::<Conv>().is_some_and(|c| c.addend && operand == c.arity() - 1)
    }

    fn packed(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<PackedSpec> {
        let layer = layer_in(cx, step).filter(|layer| !layer.is_depthwise());
        layer.and_then(|layer| cx.conv_spec(&step.inputs[1], &layer)).into_iter().collect()
    }

    fn own_bytes(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> usize {
        let weight = &step.inputs[1];
        match layer_in(cx, step) {
            Some(layer) if layer.is_depthwise() => cx.vector_bytes(weight),
            Some(layer) if cx.is_constant(weight) => conv_layout(&layer, cx.isa).map_or(0, |l| l.bytes()),
            _ => 0,
        }
    }

    fn vectors<'s>(&self, step: &'s StepSpec) -> Vec<&'s Place> {
        let bias = step.op.downcast::<Conv>().is_some_and(|op| op.bias && op.channels_last);
        if bias { vec![&step.inputs[2]] } else { Vec::new() }
    }

    fn scratch(
        &self,
        cx: &ShapeCx<'_>,
        step: &StepSpec,
        sizes: &[usize],
        _workers: usize,
    ) -> Result<(usize, usize), BackendError> {
        let layer = layer_in(cx, step).filter(|layer| !layer.is_depthwise());
        let kernel = layer.and_then(|layer| ConvKernel::select(cx.isa, layer));
        let extents = |dims: &[rlx_tensor::SizeId]| {
            let sizes: Vec<usize> = dims[1..dims.len() - 1].iter().map(|d| sizes[d.index()]).collect();
            pair(&sizes, 1)
        };
        let (x, out) = (&step.inputs[0].dims, &step.outputs[0].dims);
        let images = extents(x).zip(extents(out)).map(|(extents, positions)| Images {
            batch: sizes[x[0].index()],
            extents,
            positions,
        });
        let bytes =
            |kernel: ConvKernel, images| (kernel.scratch_bytes(&images), kernel.picked_bytes(&images));
        Ok(kernel.zip(images).map_or((0, 0), |(kernel, images)| bytes(kernel, images)))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Conv>() else { return Ok(None) };
        let layer = layer_in(&cx.shapes(), step);
        let (Some(layer), Some(activation)) = (layer, linear::activation(op.activation)) else {
            return Ok(None);
        };
        let bias = match op.bias {
            true => match cx.vector(&step.inputs[2])? {
                Some(bias) => Some(bias),
                None => return Ok(None),
            },
            false => None,
        };
        let around = Surroundings {
            bias,
            activation,
            x: cx.operand(&step.inputs[0]),
            addend: op.addend.then(|| cx.operand(&step.inputs[op.arity() - 1])),
            out: cx.operand(&step.outputs[0]),
        };
        let found = if layer.is_depthwise() {
            let weights = cx.numbers(&step.inputs[1])?.and_then(|w| depthwise_order(&layer, &w));
            cx.holds(weights.as_ref().map_or(0, |w| size_of_val(&w[..])));
            weights.and_then(|w| ConvStep::depthwise(cx.isa(), layer, Arc::from(w), around))
        } else {
            let kernel = ConvKernel::select(cx.isa(), layer);
            let weights = cx.conv_matrix(&step.inputs[1], &layer)?;
            kernel.zip(weights).and_then(|(kernel, weights)| ConvStep::packed(kernel, weights, around))
        };
        Ok(found.map(|step| Box::new(step) as Box<dyn Step>))
    }
}
