//! Softmax of rows.

use crate::isa::{Entry, Isa};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use crate::softmax::{SoftmaxArgs, softmax_entry};
use std::any::Any;

/// `y = softmax(x)` over the last dim.
#[derive(Debug)]
pub struct SoftmaxStep {
    isa: Isa,
    entry: Entry<SoftmaxArgs>,
    x: Operand,
    y: Operand,
}

impl SoftmaxStep {
    /// The step for an instruction set; `None` if it is not available.
    pub fn new(isa: Isa, x: Operand, y: Operand) -> Option<Self> {
        Some(Self { isa, entry: softmax_entry(isa)?, x, y })
    }
}

/// Elements one tile covers, about.
const TILE_ELEMENTS: usize = 4096;

impl Step for SoftmaxStep {
    fn name(&self) -> String {
        format!("softmax_f32_{}", self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        visit(&self.y, Access::WriteInPlace);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (rows, cols) = (run.rows(&self.x), run.columns(&self.x));
        if run.rows(&self.y) != rows || run.columns(&self.y) != cols {
            return Err(StepError::Shape { step: self.name() });
        }
        let args = SoftmaxArgs {
            x: run.pointer(&self.x),
            x_stride: run.stride(&self.x),
            y: run.pointer(&self.y),
            y_stride: run.stride(&self.y),
            rows,
            cols,
            scale: 1.0,
            rows_per_tile: (TILE_ELEMENTS / cols.max(1)).max(1),
        };
        for tile in team.tiles(args.tiles()) {
            // SAFETY: sizes were checked above and regions by the launch; `y` is `x` itself or apart from it; tiles are disjoint rows.
            unsafe { (self.entry)(&args, tile) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
