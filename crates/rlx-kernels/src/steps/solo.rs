//! Any computation as a step on one worker: for ops without a kernel of their own.

use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use std::any::Any;
use std::fmt;

/// What a solo step computes: operands' bytes (row-major, contiguous) to results' bytes.
pub type SoloFn = dyn Fn(&[SoloInput<'_>], &mut [SoloOutput<'_>]) -> Result<(), String> + Send + Sync;

/// One operand of a solo step.
pub struct SoloInput<'r> {
    /// Extents, outermost first.
    pub extents: Vec<usize>,
    /// Elements, row-major.
    pub bytes: std::borrow::Cow<'r, [u8]>,
}

/// One result of a solo step.
pub struct SoloOutput<'r> {
    /// Extents, outermost first.
    pub extents: Vec<usize>,
    /// Elements, row-major, to be written.
    pub bytes: &'r mut [u8],
}

/// Runs a function on worker 0, with copies of operands whose rows are not adjacent or that a result replaces. Allocates.
pub struct SoloStep {
    name: String,
    inputs: Vec<Operand>,
    outputs: Vec<Operand>,
    body: Box<SoloFn>,
}

impl SoloStep {
    /// A step that calls `body` with the inputs in order.
    pub fn new(
        name: impl Into<String>,
        inputs: Vec<Operand>,
        outputs: Vec<Operand>,
        body: Box<SoloFn>,
    ) -> Self {
        Self { name: name.into(), inputs, outputs, body }
    }

    fn input<'r>(&self, run: &'r Run<'_>, operand: &Operand) -> SoloInput<'r> {
        let extents = run.extents(operand).collect();
        let (rows, row_bytes) = (run.rows(operand), run.columns(operand) * operand.element_bytes());
        let at = run.pointer::<u8>(operand).cast_const();
        let stride = run.stride(operand) * operand.element_bytes();
        let written = self.outputs.iter().any(|out| out.region == operand.region);
        if operand.stride.is_none() && !written {
            // SAFETY: the launch checked the operand's bounds; no other worker runs a kernel during this step.
            let bytes = unsafe { std::slice::from_raw_parts(at, rows * row_bytes) };
            return SoloInput { extents, bytes: bytes.into() };
        }
        // A plan may put a result over an operand; the copy keeps what is read apart from what is written.
        let mut bytes = Vec::with_capacity(rows * row_bytes);
        for row in 0..rows {
            // SAFETY: as above, for one row.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(at.add(row * stride), row_bytes) });
        }
        SoloInput { extents, bytes: bytes.into() }
    }
}

impl fmt::Debug for SoloStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoloStep").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Step for SoloStep {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        self.inputs.iter().for_each(|operand| visit(operand, Access::Read));
        self.outputs.iter().for_each(|operand| visit(operand, Access::WriteInPlace));
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        if team.index() != 0 {
            return Ok(());
        }
        let inputs: Vec<SoloInput<'_>> = self.inputs.iter().map(|operand| self.input(run, operand)).collect();
        let mut apart: Vec<Vec<u8>> = Vec::with_capacity(self.outputs.len());
        for operand in &self.outputs {
            let bytes = if operand.stride.is_some() { run.len(operand) * operand.element_bytes() } else { 0 };
            apart.push(vec![0; bytes]);
        }
        let mut outputs: Vec<SoloOutput<'_>> = Vec::with_capacity(self.outputs.len());
        for (operand, apart) in self.outputs.iter().zip(&mut apart) {
            if operand.stride.is_some() {
                outputs.push(SoloOutput { extents: run.extents(operand).collect(), bytes: apart });
                continue;
            }
            let bytes = run.len(operand) * operand.element_bytes();
            // SAFETY: the launch checked bounds; a frame refuses written operands that overlap another operand of the step, but for
            // one in the same place, which `input` copied; results of one step are distinct regions.
            let bytes = unsafe { std::slice::from_raw_parts_mut(run.pointer::<u8>(operand), bytes) };
            outputs.push(SoloOutput { extents: run.extents(operand).collect(), bytes });
        }
        (self.body)(&inputs, &mut outputs)
            .map_err(|reason| StepError::Value { step: self.name.clone(), reason })?;
        for (operand, apart) in self.outputs.iter().zip(&apart) {
            let row_bytes = run.columns(operand) * operand.element_bytes();
            let (to, stride) = (run.pointer::<u8>(operand), run.stride(operand) * operand.element_bytes());
            for (row, values) in apart.chunks_exact(row_bytes.max(1)).enumerate() {
                // SAFETY: the launch checked the bounds of as many rows as there are values for.
                unsafe { to.add(row * stride).copy_from_nonoverlapping(values.as_ptr(), row_bytes) };
            }
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
