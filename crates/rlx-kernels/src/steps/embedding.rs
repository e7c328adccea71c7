//! Rows of a table by index, from a packed matrix.

use crate::gemm::PackedMatrix;
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;

/// Rows of a packed matrix (a table that is also the output head), widened to f32. Ids are I32 or I64.
#[derive(Debug)]
pub struct PackedEmbeddingStep {
    /// The table.
    pub table: PackedMatrix,
    /// Row numbers.
    pub ids: Operand,
    /// One row for each id.
    pub out: Operand,
}

/// Reads an index operand; I32 and I64 only.
pub(crate) fn index_at(run: &Run<'_>, operand: &Operand, at: usize) -> i64 {
    // SAFETY: `at` is below the operand's length, whose bounds the launch checked; regions are aligned for their dtype.
    unsafe {
        match operand.dtype {
            DType::I64 => *run.pointer::<i64>(operand).add(at),
            _ => i64::from(*run.pointer::<i32>(operand).add(at)),
        }
    }
}

/// Checks that every index of an operand is below `limit`.
pub(crate) fn check_indices(
    run: &Run<'_>,
    operand: &Operand,
    step: &str,
    what: &'static str,
    limit: usize,
) -> Result<(), StepError> {
    for position in 0..run.len(operand) {
        let index = index_at(run, operand, position);
        if usize::try_from(index).map_or(true, |i| i >= limit) {
            return Err(StepError::Index { step: step.to_owned(), what, index, position, limit });
        }
    }
    Ok(())
}

impl Step for PackedEmbeddingStep {
    fn name(&self) -> String {
        "embedding_packed".to_owned()
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.ids, Access::Read);
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let layout = self.table.layout();
        let rows = run.len(&self.ids);
        if run.rows(&self.out) != rows || run.columns(&self.out) != layout.k() {
            return Err(StepError::Shape { step: self.name() });
        }
        check_indices(run, &self.ids, "embedding", "token id", layout.n())?;
        let out = run.pointer::<f32>(&self.out);
        for row in team.tiles(rows) {
            let id = index_at(run, &self.ids, row) as usize;
            // SAFETY: the launch checked the output's bounds; each row is written by the worker that claimed it.
            let row =
                unsafe { std::slice::from_raw_parts_mut(out.add(row * run.stride(&self.out)), layout.k()) };
            self.table.gather_row(id, row);
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
