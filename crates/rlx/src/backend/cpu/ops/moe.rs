//! Mixtures of gated experts over packed weights.

use super::CpuOp;
use super::linear::activation;
use crate::backend::BackendError;
use crate::backend::cpu::lower::{LowerCx, MatrixSpec, PackedSpec, ShapeCx};
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::moe::Moe;
use rlx_graph::{Op, OpDef};
use rlx_kernels::gemm::{LinearKernel, PackedLayout, PackedMatrix};
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::moe::{Expert, MoeForm, MoeStep, moe_shared_scratch};
use rlx_tensor::Shape;

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

fn with_kernel(
    cx: &LowerCx<'_>,
    spec: &MatrixSpec<'_>,
) -> Result<Option<(LinearKernel, PackedMatrix)>, BackendError> {
    let Some(matrix) = cx.matrix(spec)? else { return Ok(None) };
    Ok(LinearKernel::select(cx.isa(), matrix.layout(), cx.products()).map(|kernel| (kernel, matrix)))
}

impl CpuOp for CpuMoe {
    fn name(&self) -> &'static str {
        Moe::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<Moe>() else { return false };
        activation(op.activation).is_some() && inputs.iter().skip(2).all(|s| s.known_dims().is_some())
    }

    fn accepts_strided(&self, _op: &Op, operand: usize) -> bool {
        operand < 2
    }

    fn packed(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<PackedSpec> {
        let Some(op) = step.op.downcast::<Moe>() else { return Vec::new() };
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
        let mut experts = Vec::with_capacity(op.experts);
        for [gate_up, down] in &matrices(op, step) {
            let (Some(gate_up), Some(down)) = (with_kernel(cx, gate_up)?, with_kernel(cx, down)?) else {
                return Ok(None);
            };
            experts.push(Expert { gate_up, down });
        }
        let form = MoeForm { top_k: op.top_k, renormalize: op.renormalize, activation };
        let (x, logits) = (cx.operand(&step.inputs[0]), cx.operand(&step.inputs[1]));
        let step = MoeStep::new(cx.isa(), form, experts, x, logits, cx.operand(&step.outputs[0]));
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
