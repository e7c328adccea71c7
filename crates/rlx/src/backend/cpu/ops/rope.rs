//! Rotary position embedding: rotation and its table of angles.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::LowerCx;
use crate::plan::{Place, StepSpec};
use rlx_graph::Op;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::rope::{Rope, RopeStyle};
use rlx_graph::ops::rope_angles::RopeAngles;
use rlx_kernels::rope::Pairing;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::rope::{RopeAnglesStep, RopeStep};
use rlx_tensor::Shape;

/// `rope`.
pub(in super::super) struct CpuRope;

/// `rope_angles`.
pub(in super::super) struct CpuRopeAngles;

impl CpuOp for CpuRope {
    fn name(&self) -> &'static str {
        Rope::NAME
    }

    fn accepts_strided(&self, _op: &Op, operand: usize) -> bool {
        operand == 0
    }

    fn accepts_in_place(&self, _op: &Op, operand: usize, _result: &Shape) -> bool {
        operand == 0
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<Rope>() else { return Ok(None) };
        let pairing = match op.style {
            RopeStyle::Neox => Pairing::Halves,
            RopeStyle::GptJ => Pairing::Neighbours,
            _ => return Ok(None),
        };
        let (x, table) = (cx.operand(&step.inputs[0]), cx.operand(&step.inputs[1]));
        let y = cx.operand(&step.outputs[0]);
        let step = RopeStep::new(cx.isa(), op.heads, op.head_dim, op.rotary_dim, pairing, x, table, y);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}

impl CpuOp for CpuRopeAngles {
    fn name(&self) -> &'static str {
        RopeAngles::NAME
    }

    fn vectors<'s>(&self, step: &'s StepSpec) -> Vec<&'s Place> {
        vec![&step.inputs[1]]
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let Some(op) = step.op.downcast::<RopeAngles>() else { return Ok(None) };
        let Some(inv_freq) = cx.vector(&step.inputs[1])? else { return Ok(None) };
        let (positions, table) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        let step = RopeAnglesStep::new(cx.isa(), inv_freq, op.scale as f32, positions, table);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
