//! Embedding lookups: from the packed output head where the table is tied to it, else from the table as it is.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::{LowerCx, MatrixSpec};
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::embedding::Embedding;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::embedding::PackedEmbeddingStep;

/// `embedding`.
pub(in super::super) struct CpuEmbedding;

impl CpuOp for CpuEmbedding {
    fn name(&self) -> &'static str {
        Embedding::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let table = &step.inputs[1];
        let tied = cx.shapes().param(table).is_some_and(|name| cx.is_packed_alone(name));
        if !tied {
            return Ok(None);
        }
        let spec = MatrixSpec { weights: std::slice::from_ref(table), transposed: false, gated: false };
        let Some(table) = cx.matrix(&spec)? else { return Ok(None) };
        let (ids, out) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        Ok(Some(Box::new(PackedEmbeddingStep { table, ids, out })))
    }
}
