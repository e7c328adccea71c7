//! Embedding lookups: from the packed output head where the table is tied to it, else from the table as it is.

use super::CpuOp;
use crate::backend::BackendError;
use crate::backend::cpu::lower::{LowerCx, MatrixSpec, PackedSpec, ShapeCx};
use crate::plan::StepSpec;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::embedding::Embedding;
use rlx_kernels::schedule::Step;
use rlx_kernels::steps::embedding::PackedEmbeddingStep;
use rlx_kernels::steps::gather::TableEmbeddingStep;
use rlx_tensor::DTypeClass;

/// `embedding`.
pub(in super::super) struct CpuEmbedding;

impl CpuOp for CpuEmbedding {
    fn name(&self) -> &'static str {
        Embedding::NAME
    }

    fn packed(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<PackedSpec> {
        let table = &step.inputs[1];
        let tied = cx.param(table).is_some_and(|name| cx.packed_alone().contains(name));
        let spec = MatrixSpec { weights: std::slice::from_ref(table), transposed: false, gated: false };
        if tied || table.dtype.class() == DTypeClass::Quant {
            cx.packed_spec(&spec).into_iter().collect()
        } else {
            Vec::new()
        }
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError> {
        let table = &step.inputs[1];
        let tied = cx.shapes().param(table).is_some_and(|name| cx.is_packed_alone(name));
        let (ids, out) = (cx.operand(&step.inputs[0]), cx.operand(&step.outputs[0]));
        if tied || table.dtype.class() == DTypeClass::Quant {
            let spec = MatrixSpec { weights: std::slice::from_ref(table), transposed: false, gated: false };
            if let Some(table) = cx.matrix(&spec)? {
                return Ok(Some(Box::new(PackedEmbeddingStep { table, ids, out })));
            }
        }
        let step = TableEmbeddingStep::new(cx.isa(), ids, cx.operand(table), out);
        Ok(step.map(|s| Box::new(s) as Box<dyn Step>))
    }
}
