//! A linear layer over a packed matrix.

use crate::gemm::{Activation, LinearArgs, LinearKernel, PackedMatrix, linear};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use std::any::Any;
use std::ptr::null;
use std::sync::Arc;

/// `out = residual + act(x W^T + bias)`; a gated matrix gives `act(gate) * up`.
#[derive(Debug)]
pub struct LinearStep {
    kernel: LinearKernel,
    weights: PackedMatrix,
    bias: Option<Arc<[f32]>>,
    activation: Activation,
    x: Operand,
    residual: Option<Operand>,
    out: Operand,
}

/// A linear step whose parts do not fit each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("linear step: {reason}")]
pub struct LinearStepError {
    reason: String,
}

impl LinearStep {
    /// Checks the bias against the matrix. Widths of `x`, `residual` and `out` are checked at each run.
    pub fn new(
        kernel: LinearKernel,
        weights: PackedMatrix,
        bias: Option<Arc<[f32]>>,
        activation: Activation,
        x: Operand,
        residual: Option<Operand>,
        out: Operand,
    ) -> Result<Self, LinearStepError> {
        let fail = |reason: String| Err(LinearStepError { reason });
        if kernel.layout() != weights.layout() {
            return fail("the kernel is for another layout".to_owned());
        }
        if let Some(bias) = &bias
            && bias.len() != weights.layout().n()
        {
            return fail(format!("bias has {} values, the weight {}", bias.len(), weights.layout().n()));
        }
        Ok(Self { kernel, weights, bias, activation, x, residual, out })
    }

    /// The packed weights.
    pub fn weights(&self) -> &PackedMatrix {
        &self.weights
    }

    pub(super) fn kernel(&self) -> &LinearKernel {
        &self.kernel
    }

    /// The layer's arguments for a run; an error if rows or widths of the operands do not fit.
    pub(super) fn args(&self, run: &Run<'_>) -> Result<LinearArgs, StepError> {
        let m = run.rows(&self.x);
        let layout = self.weights.layout();
        let same_rows = m == run.rows(&self.out) && self.residual.as_ref().is_none_or(|r| run.rows(r) == m);
        let widths = run.columns(&self.x) == layout.k()
            && run.columns(&self.out) == layout.outputs()
            && self.residual.as_ref().is_none_or(|r| run.columns(r) == layout.outputs());
        if !same_rows || !widths {
            return Err(StepError::Shape { step: self.name() });
        }
        Ok(LinearArgs {
            m,
            x: run.pointer::<f32>(&self.x),
            x_stride: run.stride(&self.x),
            w: self.weights.bytes().as_ptr(),
            bias: self.bias.as_ref().map_or(null(), |b| b.as_ptr()),
            addend: null(),
            addend_stride: 0,
            residual: self.residual.as_ref().map_or(null(), |r| run.pointer::<f32>(r).cast_const()),
            residual_stride: self.residual.as_ref().map_or(0, |r| run.stride(r)),
            out: run.pointer::<f32>(&self.out),
            out_stride: run.stride(&self.out),
            activation: self.activation,
        })
    }
}

impl Step for LinearStep {
    fn name(&self) -> String {
        self.kernel.name(64)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        if let Some(residual) = &self.residual {
            visit(residual, Access::Read);
        }
        visit(&self.out, Access::WriteInPlace);
    }

    fn worker_scratch(&self, _sizes: &[usize]) -> usize {
        self.kernel.scratch_len() * size_of::<f32>()
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let args = self.args(run)?;
        // SAFETY: the launch checked that every operand lies in its region; `args` checked widths and rows; the weights have
        // the kernel's layout and the bias its length (checked in `new`); the scratch is this worker's and as long as asked.
        unsafe { linear(team, &self.kernel, &args, run.worker_scratch(team)) };
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
