//! The ops the CPU has kernels for: one file and one line each.

pub(super) mod activation;
pub(super) mod attention;
pub(super) mod binary;
pub(super) mod broadcast;
pub(super) mod cast;
pub(super) mod concat;
pub(super) mod conv;
pub(super) mod cumsum;
mod elementwise;
pub(super) mod embedding;
pub(super) mod fused_elementwise;
pub(super) mod gated;
pub(super) mod gather;
pub(super) mod integer_conv;
pub(super) mod integer_linear;
mod integer_product;
pub(super) mod iota;
pub(super) mod l2_normalize;
pub(super) mod layer_norm;
pub(super) mod linear;
pub(super) mod lora_linear;
pub(super) mod matmul;
pub(super) mod moe;
pub(super) mod pad;
pub(super) mod pool;
pub(super) mod pool_window;
pub(super) mod reduce;
pub(super) mod reshape;
pub(super) mod rms_norm;
pub(super) mod rope;
pub(super) mod select;
pub(super) mod slice;
pub(super) mod softmax;
pub(super) mod topk;
pub(super) mod transpose;
pub(super) mod unary;

use super::lower::{LowerCx, PackedSpec, ShapeCx};
use crate::backend::BackendError;
use crate::plan::{Place, StepSpec};
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

    /// Whether the kernel writes its result with rows that are not adjacent.
    fn writes_strided(&self, op: &Op) -> bool {
        let _ = op;
        false
    }

    /// Whether the kernel may write the first result, of this shape, over this operand, which has as many bytes.
    fn accepts_in_place(&self, op: &Op, operand: usize, result: &Shape) -> bool {
        let _ = (op, operand, result);
        false
    }

    /// Copies of weights the step will read: a key for each and its bytes.
    fn packed(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> Vec<PackedSpec> {
        let _ = (cx, step);
        Vec::new()
    }

    /// Bytes of what the step makes of constants for itself: packed matrices, joined biases.
    fn own_bytes(&self, cx: &ShapeCx<'_>, step: &StepSpec) -> usize {
        let _ = (cx, step);
        0
    }

    /// Operands that the step keeps as vectors of f32.
    fn vectors<'s>(&self, step: &'s StepSpec) -> Vec<&'s Place> {
        let _ = step;
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
    &lora_linear::CpuLoraLinear,
    &attention::CpuAttention,
    &embedding::CpuEmbedding,
    &layer_norm::CpuLayerNorm,
    &rms_norm::CpuRmsNorm,
    &l2_normalize::CpuL2Normalize,
    &rope::CpuRope,
    &rope::CpuRopeAngles,
    &softmax::CpuSoftmax,
    &reshape::CpuReshape,
    &activation::CpuActivation,
    &gated::CpuGated,
    &unary::CpuUnary,
    &binary::CpuBinary,
    &select::CpuSelect,
    &cast::CpuCast,
    &fused_elementwise::CpuFusedElementwise,
    &broadcast::CpuBroadcast,
    &slice::CpuSlice,
    &transpose::CpuTranspose,
    &concat::CpuConcat,
    &pad::CpuPad,
    &gather::CpuGather,
    &reduce::CpuReduce,
    &cumsum::CpuCumSum,
    &iota::CpuIota,
    &topk::CpuTopK,
    &pool::CpuPool,
    &conv::CpuConv,
    &pool_window::CpuPoolWindow,
    &moe::CpuMoe,
    &matmul::CpuMatMul,
    &integer_linear::CpuIntegerLinear,
    &integer_conv::CpuIntegerConv,
];

/// The entry of an op.
pub(super) fn find(name: &str) -> Option<&'static dyn CpuOp> {
    OPS.iter().copied().find(|op| op.name() == name)
}
