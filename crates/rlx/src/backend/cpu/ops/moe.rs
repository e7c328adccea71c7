//! Mixtures of gated experts over packed weights.

use super::CpuOp;
use super::linear::{activation, takes};
use crate::backend::cpu::lower::{LowerCx, MatrixSpec, PackedSpec, ShapeCx};
use crate::backend::{BackendError, ExpertLayer};
use crate::memory::experts::ExpertWeights;
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::moe::Moe;
use rlx_graph::{Op, OpDef};
use rlx_kernels::gemm::{LinearKernel, PackedLayout, PackedMatrix};
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::moe::{Expert, ExpertSource, MoeForm, MoeStep, moe_shared_scratch};
use rlx_tensor::Shape;
use std::sync::Arc;

/// `moe`.
pub(in super::super) struct CpuMoe;

/// The matrices of a step's experts: gate with up, then down.
fn matrices<'s>(op: &Moe, step: &'s StepSpec) -> Vec<[MatrixSpec<'s>; 2]> {
    let spec = |weights, gated| MatrixSpec { weights, transposed: false, gated };
    let expert = |e: usize| {
        let at = op.expert_at(e);
        let (gate_up, down) = (step.inputs.get(at..at + 2)?, step.inputs.get(at + 2..at + 3)?);
        Some([spec(gate_up, true), spec(down, false)])
    };
    (0..op.experts).filter_map(expert).collect()
}

/// The layouts of [`matrices`]; `None` if some have none.
fn layouts(cx: &ShapeCx<'_>, op: &Moe, step: &StepSpec) -> Option<Vec<[PackedLayout; 2]>> {
    let of =
        |[gate_up, down]: &[MatrixSpec<'_>; 2]| Some([cx.matrix_layout(gate_up)?, cx.matrix_layout(down)?]);
    matrices(op, step).iter().map(of).collect()
}

/// A kernel for weights, and the weights unless the pool holds them.
fn with_kernel(
    cx: &LowerCx<'_>,
    spec: &MatrixSpec<'_>,
    pooled: bool,
) -> Result<Option<(LinearKernel, Option<PackedMatrix>)>, BackendError> {
    let matrix = if pooled { None } else { cx.matrix(spec)? };
    let layout = match &matrix {
        Some(matrix) => Some(*matrix.layout()),
        None => cx.shapes().matrix_layout(spec),
    };
    let kernel = layout.and_then(|layout| LinearKernel::select(cx.isa(), &layout, cx.products()));
    Ok(kernel.filter(|_| pooled || matrix.is_some()).map(|kernel| (kernel, matrix)))
}

/// The layer's number, as the names of its weights say.
fn layer_id(name: &str) -> Option<usize> {
    let mut parts = name.split('.');
    parts.by_ref().find(|part| matches!(*part, "layers" | "h" | "blk"))?;
    parts.next()?.parse().ok()
}

/// The layer's experts in the backend's pool.
fn pooled_experts(
    cx: &LowerCx<'_>,
    op: &Moe,
    step: &StepSpec,
) -> Result<Option<Arc<dyn ExpertSource>>, BackendError> {
    let (Some(pool), Some(sizes)) = (cx.expert_pool(), expert_layer(&cx.shapes(), step)) else {
        return Ok(None);
    };
    let mut experts = Vec::with_capacity(op.experts);
    for [gate_up, down] in &matrices(op, step) {
        let [gate, up] = gate_up.weights else { return Ok(None) };
        let [down] = down.weights else { return Ok(None) };
        let weight = |place| cx.expert_weight(place);
        experts.push(ExpertWeights { gate_up: [weight(gate)?, weight(up)?], down: [weight(down)?] });
    }
    let first = cx.shapes().param(&step.inputs[op.expert_at(0)]).and_then(layer_id);
    let id = first.ok_or_else(|| cx.unsupported("the names of its weights do not say which layer it is"))?;
    let layer = pool.layer(id, sizes.expert_bytes, cx.isa(), cx.shapes().precision, experts);
    Ok(Some(layer.map_err(|e| cx.unsupported(e.to_string()))?))
}

/// Number and size of a step's experts, if it has any.
pub(in super::super) fn expert_layer(cx: &ShapeCx<'_>, step: &StepSpec) -> Option<ExpertLayer> {
    let op = step.op.downcast::<Moe>()?;
    let bytes = |[gate_up, down]: &[PackedLayout; 2]| (gate_up.bytes() + down.bytes()) as u64;
    let expert_bytes = layouts(cx, op, step)?.iter().map(bytes).max()?;
    Some(ExpertLayer { experts: op.experts, expert_bytes })
}

impl CpuOp for CpuMoe {
    fn name(&self) -> &'static str {
        Moe::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<Moe>() else { return false };
        let mut experts = inputs.get(2..).unwrap_or(&[]).chunks(3);
        activation(op.activation).is_some()
            && experts.all(|expert| {
                expert.len() == 3 && takes(&expert[..2], false, true) && takes(&expert[2..], false, false)
            })
    }

    fn accepts_strided(&self, _op: &Op, operand: usize) -> bool {
        operand < 2
    }

    fn packed(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<PackedSpec> {
        let Some(op) = step.op.downcast::<Moe>() else { return Vec::new() };
        if let (Some(slots), Some(sizes)) = (cx.expert_slots, expert_layer(cx, step)) {
            let layer = cx.param(&step.inputs[op.expert_at(0)]).unwrap_or_default();
            let slot = |slot| PackedSpec {
                params: vec![format!("{layer} slot {slot}")],
                gated: false,
                transposed: false,
                groups: 0,
                winograd: false,
                codes: None,
                bytes: sizes.expert_bytes as usize,
            };
            return (0..slots.min(op.experts)).map(slot).collect();
        }
        if layouts(cx, op, step).is_none() {
            return Vec::new();
        }
        matrices(op, step).iter().flatten().filter_map(|spec| cx.packed_spec(spec)).collect()
    }

    fn scratch(
        &self,
        cx: &ShapeCx<'_>,
        step: &StepSpec,
        sizes: &[usize],
        _workers: usize,
    ) -> Result<(usize, usize), BackendError> {
        let Some(op) = step.op.downcast::<Moe>() else { return Ok((0, 0)) };
        let Some(layouts) = layouts(cx, op, step) else { return Ok((0, 0)) };
        let kernels =
            layouts.iter().flatten().filter_map(|layout| LinearKernel::select(cx.isa, layout, cx.products()));
        let each = kernels.map(|k| k.scratch_len() * size_of::<f32>()).max().unwrap_or(0);
        let (rows, width) = (sizes[step.inputs[1].dims[0].index()], layouts.first().map_or(0, |l| l[0].k()));
        let inner = layouts.iter().map(|l| l[1].k()).max().unwrap_or(0);
        Ok((each, moe_shared_scratch(rows, op.top_k, op.experts, width, inner)))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Moe>() else { return Ok(None) };
        let Some(activation) = activation(op.activation) else { return Ok(None) };
        let source = pooled_experts(cx, op, step)?;
        let pooled = source.is_some();
        let mut experts = Vec::with_capacity(op.experts);
        for [gate_up, down] in &matrices(op, step) {
            let both = (with_kernel(cx, gate_up, pooled)?, with_kernel(cx, down, pooled)?);
            let (Some(gate_up), Some(down)) = both else { return Ok(None) };
            experts.push(Expert { gate_up, down });
        }
        let form = MoeForm { top_k: op.top_k, renormalize: op.renormalize, activation };
        let (x, logits) = (cx.operand(&step.inputs[0]), cx.operand(&step.inputs[1]));
        let step = MoeStep::new(cx.isa(), form, experts, source, x, logits, cx.operand(&step.outputs[0]));
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
