//! The ops the CPU has kernels for: one file and one line each.

pub(super) mod attention;
pub(super) mod embedding;
pub(super) mod l2_normalize;
pub(super) mod layer_norm;
pub(super) mod linear;
pub(super) mod reshape;
pub(super) mod rms_norm;
pub(super) mod rope;
pub(super) mod softmax;

use super::lower::{LowerCx, ShapeCx};
use crate::backend::BackendError;
use crate::plan::StepSpec;
use rlx_graph::{Op, OpDef};
use rlx_kernels::schedule::Step;
use rlx_tensor::Shape;

/// How the CPU runs one op.
pub(super) trait CpuOp: Sync {
    /// The op's name in text forms.
    fn name(&self) -> &'static str;

    /// Whether legalisation may leave the op on these shapes.
    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let _ = (op, inputs, outputs);
        true
    }

    /// Whether the kernel takes this operand with rows that are not adjacent.
    fn accepts_strided(&self, op: &Op, operand: usize) -> bool {
        let _ = (op, operand);
        false
    }

    /// Whether the kernel may write the first result over this operand.
    fn accepts_in_place(&self, op: &Op, operand: usize) -> bool {
        let _ = (op, operand);
        false
    }

    /// Copies of weights the step will read: a key for each and its bytes.
    fn packed(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<(String, usize)> {
        let _ = (cx, step);
        Vec::new()
    }

    /// `(each worker's, shared)` scratch bytes at these sizes.
    fn scratch(
        &self,
        cx: &ShapeCx<'_>,
        step: &StepSpec,
        sizes: &[usize],
        workers: usize,
    ) -> Result<(usize, usize), BackendError> {
        let _ = (cx, step, sizes, workers);
        Ok((0, 0))
    }

    /// The step bound to its kernel; `None` where no kernel takes this form, so that the reference evaluation runs.
    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<Option<Box<dyn Step>>, BackendError>;
}

/// The list.
pub(super) const OPS: &[&dyn CpuOp] = &[
    &linear::CpuLinear,
    &attention::CpuAttention,
    &embedding::CpuEmbedding,
    &layer_norm::CpuLayerNorm,
    &rms_norm::CpuRmsNorm,
    &l2_normalize::CpuL2Normalize,
    &rope::CpuRope,
    &rope::CpuRopeAngles,
    &softmax::CpuSoftmax,
    &reshape::CpuReshape,
];

/// The entry of an op.
pub(super) fn find(name: &str) -> Option<&'static dyn CpuOp> {
    OPS.iter().copied().find(|op| op.name() == name)
}
