//! Linear layers over packed weights whose rows may each have a low-rank update.

use super::CpuOp;
use super::linear::{activation, linear_step, matrix_of, own_bytes_of, packed_by, scratch_of, takes};
use crate::backend::BackendError;
use crate::backend::cpu::lower::{LowerCx, PackedSpec, ShapeCx};
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::lora_linear::LoraLinear;
use rlx_graph::{Op, OpDef};
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::lora::{LoraLinearStep, LoraPart, MAX_SLOTS, lora_shared_scratch};
use rlx_tensor::{DType, Shape};

/// `lora_linear`.
pub(in super::super) struct CpuLoraLinear;

/// Output columns of each part; `None` if they are not known.
fn widths(cx: &ShapeCx<'_>, op: &LoraLinear, step: &StepSpec) -> Option<Vec<usize>> {
    let axis = usize::from(op.transposed);
    step.inputs.get(1..=op.parts)?.iter().map(|weight| cx.known(weight, axis)).collect()
}

impl CpuOp for CpuLoraLinear {
    fn name(&self) -> &'static str {
        LoraLinear::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<LoraLinear>() else { return false };
        let dtype = inputs[op.adapter_at(0)].dtype();
        activation(op.activation).is_some()
            && op.slots <= MAX_SLOTS
            && matches!(dtype, DType::F32 | DType::BF16)
            && inputs[op.adapter_at(0)..].iter().all(|a| a.dtype() == dtype)
            && takes(&inputs[1..=op.parts], op.transposed, op.gated)
    }

    fn accepts_strided(&self, op: &Op, operand: usize) -> bool {
        op.downcast::<LoraLinear>()
            .is_some_and(|l| operand == 0 || (l.residual && operand + 1 == l.slots_at()))
    }

    fn accepts_in_place(&self, op: &Op, operand: usize, _result: &Shape) -> bool {
        op.downcast::<LoraLinear>().is_some_and(|l| l.residual && operand + 1 == l.slots_at())
    }

    fn packed(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<PackedSpec> {
        packed_by(cx, step)
    }

    fn own_bytes(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> usize {
        step.op.downcast::<LoraLinear>().map_or(0, |op| own_bytes_of(cx, &op.linear(), step))
    }

    fn scratch(
        &self,
        cx: &ShapeCx<'_>,
        step: &StepSpec,
        sizes: &[usize],
        _workers: usize,
    ) -> Result<(usize, usize), BackendError> {
        let Some(op) = step.op.downcast::<LoraLinear>() else { return Ok((0, 0)) };
        let layout = matrix_of(step).and_then(|spec| cx.matrix_layout(&spec));
        let (Some(layout), Some(_)) = (layout, widths(cx, op, step)) else { return Ok((0, 0)) };
        let size = |operand: usize| sizes[step.inputs[operand].dims[0].index()];
        let rank = (0..op.slots).map(|slot| size(op.adapter_at(slot))).max().unwrap_or(0);
        let shared = lora_shared_scratch(size(op.slots_at()), op.parts, rank, layout.n());
        let (each, quantized) = scratch_of(cx, step, sizes);
        Ok((each, shared.saturating_add(quantized)))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<LoraLinear>() else { return Ok(None) };
        let Some(widths) = widths(&cx.shapes(), op, step) else { return Ok(None) };
        let Some(linear) = linear_step(cx, &op.linear(), step)? else { return Ok(None) };
        let places = op.sites.iter().zip(&op.columns).zip(widths);
        let parts = places.map(|((&site, &column), n)| LoraPart { site, column, n }).collect();
        let (slots, scales) =
            (cx.operand(&step.inputs[op.slots_at()]), cx.operand(&step.inputs[op.slots_at() + 1]));
        let adapters = step.inputs[op.adapter_at(0)..].iter().map(|place| cx.operand(place)).collect();
        let step = LoraLinearStep::new(cx.isa(), linear, parts, slots, scales, adapters);
        Ok(step.map(|step| Box::new(step) as Box<dyn Step>))
    }
}
