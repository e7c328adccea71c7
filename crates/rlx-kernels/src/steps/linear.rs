//! A linear layer over a packed matrix.

use crate::gemm::{Activation, LinearArgs, LinearKernel, PackedMatrix, quantized_bytes, side_by_side};
use crate::isa::fetch_lines;
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use std::any::Any;
use std::ptr::null;
use std::sync::Arc;

/// `out = residual + act(x W^T + bias)`; a gated matrix gives `act(gate) * up`. Several matrices stand side by side in the
/// result: weights that cannot be packed together, such as blocks of different types.
#[derive(Debug)]
pub struct LinearStep {
    pieces: Vec<(LinearKernel, PackedMatrix)>,
    bias: Option<Arc<[f32]>>,
    activation: Activation,
    x: Operand,
    residual: Option<Operand>,
    out: Operand,
}

/// Bytes of weights that a waiting worker asks for between two looks at what it waits for.
const READ_AHEAD_BYTES: usize = 2048;

/// A linear step whose parts do not fit each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("linear step: {reason}")]
pub struct LinearStepError {
    reason: String,
}

impl LinearStep {
    /// Checks the bias against the matrices. Widths of `x`, `residual` and `out` are checked at each run.
    pub fn new(
        pieces: Vec<(LinearKernel, PackedMatrix)>,
        bias: Option<Arc<[f32]>>,
        activation: Activation,
        x: Operand,
        residual: Option<Operand>,
        out: Operand,
    ) -> Result<Self, LinearStepError> {
        let fail = |reason: String| Err(LinearStepError { reason });
        if pieces.iter().any(|(kernel, weights)| kernel.layout() != weights.layout()) {
            return fail("the kernel is for another layout".to_owned());
        }
        let Some((_, first)) = pieces.first() else { return fail("there is no matrix".to_owned()) };
        if pieces.iter().any(|(_, weights)| weights.layout().k() != first.layout().k()) {
            return fail("the matrices have different inputs".to_owned());
        }
        let n: usize = pieces.iter().map(|(_, weights)| weights.layout().n()).sum();
        if let Some(bias) = &bias
            && bias.len() != n
        {
            return fail(format!("bias has {} values, the weight {n}", bias.len()));
        }
        if pieces.len() > 1 && pieces.iter().any(|(_, weights)| weights.layout().gated()) {
            return fail("a gated matrix stands alone".to_owned());
        }
        Ok(Self { pieces, bias, activation, x, residual, out })
    }

    /// The packed matrices with their kernels, in the order of their columns.
    pub fn pieces(&self) -> &[(LinearKernel, PackedMatrix)] {
        &self.pieces
    }

    /// Inputs of every matrix.
    pub(super) fn inputs(&self) -> usize {
        self.pieces[0].1.layout().k()
    }

    /// Columns of all matrices, gate and up counted separately.
    pub(super) fn columns(&self) -> usize {
        self.pieces.iter().map(|(_, weights)| weights.layout().n()).sum()
    }

    fn outputs(&self) -> usize {
        self.pieces.iter().map(|(_, weights)| weights.layout().outputs()).sum()
    }

    /// Runs every piece.
    ///
    /// # Safety
    /// `args` are operands valid for all pieces side by side, but for `w`; `scratch` is this worker's and `quantized` the team's, both
    /// as long as asked.
    pub(super) unsafe fn run_pieces(
        &self,
        team: &Team<'_>,
        args: &LinearArgs,
        scratch: *mut f32,
        quantized: *mut u8,
    ) {
        let piece = |at: usize| {
            let (kernel, weights) = &self.pieces[at];
            let column: usize = self.pieces[..at].iter().map(|(_, before)| before.layout().outputs()).sum();
            let from = |p: *const f32| if p.is_null() { p } else { p.wrapping_add(column) };
            let args = LinearArgs {
                w: weights.bytes().as_ptr(),
                bias: from(args.bias),
                addend: from(args.addend),
                residual: from(args.residual),
                out: args.out.wrapping_add(column),
                ..*args
            };
            (kernel, args)
        };
        // SAFETY: the caller guarantees the operands, of which these are the piece's columns, and the scratch.
        unsafe { side_by_side(team, self.pieces.len(), piece, scratch, quantized) };
    }

    /// Bytes of quantised rows that workers share for so many rows.
    pub(super) fn quantized_bytes(&self, rows: usize) -> usize {
        quantized_bytes(self.pieces.iter().map(|(kernel, _)| kernel), rows)
    }

    /// The layer's arguments for a run; an error if rows or widths of the operands do not fit.
    pub(super) fn args(&self, run: &Run<'_>) -> Result<LinearArgs, StepError> {
        let m = run.rows(&self.x);
        let (inputs, outputs) = (self.inputs(), self.outputs());
        let same_rows = m == run.rows(&self.out) && self.residual.as_ref().is_none_or(|r| run.rows(r) == m);
        let widths = run.columns(&self.x) == inputs
            && run.columns(&self.out) == outputs
            && self.residual.as_ref().is_none_or(|r| run.columns(r) == outputs);
        if !same_rows || !widths {
            return Err(StepError::Shape { step: self.name() });
        }
        Ok(LinearArgs {
            m,
            x: run.pointer::<f32>(&self.x),
            x_stride: run.stride(&self.x),
            w: null(),
            bias: self.bias.as_ref().map_or(null(), |b| b.as_ptr()),
            addend: null(),
            addend_stride: 0,
            residual: self.residual.as_ref().map_or(null(), |r| run.pointer::<f32>(r).cast_const()),
            residual_stride: self.residual.as_ref().map_or(0, |r| run.stride(r)),
            out: run.pointer::<f32>(&self.out),
            out_stride: run.stride(&self.out),
            activation: self.activation,
            quantized: null(),
        })
    }
}

impl Step for LinearStep {
    fn name(&self) -> String {
        self.pieces.iter().map(|(kernel, _)| kernel.name(64)).collect::<Vec<_>>().join(" ")
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        if let Some(residual) = &self.residual {
            visit(residual, Access::Read);
        }
        visit(&self.out, Access::WriteInPlace);
    }

    fn worker_scratch(&self, _sizes: &[usize]) -> usize {
        self.pieces.iter().map(|(kernel, _)| kernel.scratch_len_beside()).max().unwrap_or(0)
            * size_of::<f32>()
    }

    fn shared_scratch(&self, sizes: &[usize], _workers: usize) -> usize {
        self.quantized_bytes(self.x.rows(sizes))
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let args = self.args(run)?;
        // SAFETY: the launch checked that every operand lies in its region; `args` checked widths and rows; the weights have
        // their kernels' layouts and the bias its length (checked in `new`); both kinds of scratch are as long as asked.
        unsafe { self.run_pieces(team, &args, run.worker_scratch(team), run.shared_scratch()) };
        Ok(())
    }

    fn reads_ahead(&self) -> bool {
        true
    }

    fn read_ahead(&self, run: &Run<'_>, team: &Team<'_>, part: usize) -> bool {
        let (kernel, weights) = &self.pieces[0];
        let grid = kernel.grid_beside(run.rows(&self.x), team.count());
        let first = kernel.first_bytes(&grid, team.index());
        let rest = weights.bytes().get(first).and_then(|bytes| bytes.get(part * READ_AHEAD_BYTES..));
        let Some(rest) = rest else { return false };
        fetch_lines(&rest[..rest.len().min(READ_AHEAD_BYTES)]);
        rest.len() > READ_AHEAD_BYTES
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
