//! Rows copied as they are.

use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use std::any::Any;

/// Copies a tensor's rows, adjacent or not, to a contiguous tensor with the same elements.
#[derive(Debug)]
pub struct CopyStep {
    /// Source.
    pub from: Operand,
    /// Destination, contiguous.
    pub to: Operand,
}

/// Bytes one tile copies at most (unless a row is longer).
const TILE_BYTES: usize = 64 * 1024;

impl Step for CopyStep {
    fn name(&self) -> String {
        "copy_rows".to_owned()
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.from, Access::Read);
        visit(&self.to, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (rows, columns) = (run.rows(&self.from), run.columns(&self.from));
        if run.len(&self.from) != run.len(&self.to) || self.from.element_bytes() != self.to.element_bytes() {
            return Err(StepError::Shape { step: self.name() });
        }
        let bytes = columns * self.from.element_bytes();
        let stride = run.stride(&self.from) * self.from.element_bytes();
        let per_tile = (TILE_BYTES / bytes.max(1)).max(1);
        let (from, to) = (run.pointer::<u8>(&self.from).cast_const(), run.pointer::<u8>(&self.to));
        for tile in team.tiles(rows.div_ceil(per_tile)) {
            for row in tile * per_tile..((tile + 1) * per_tile).min(rows) {
                // SAFETY: the launch checked both operands' bounds and that they do not overlap; each row is copied by the worker
                // that claimed its tile.
                unsafe { std::ptr::copy_nonoverlapping(from.add(row * stride), to.add(row * bytes), bytes) };
            }
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
