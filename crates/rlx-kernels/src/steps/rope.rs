//! Rotary position embedding.

use crate::isa::{Entry, Isa};
use crate::pool::Team;
use crate::rope::{AngleArgs, Pairing, RopeArgs, angles_entry, rope_entry};
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;
use std::sync::Arc;

/// Cosines and sines of each row's position.
#[derive(Debug)]
pub struct RopeAnglesStep {
    isa: Isa,
    entry: Entry<AngleArgs>,
    inv_freq: Arc<[f32]>,
    factor: f32,
    positions: Operand,
    table: Operand,
}

impl RopeAnglesStep {
    /// The step for an instruction set; `None` if it is not available or positions are not I32.
    pub fn new(
        isa: Isa,
        inv_freq: Arc<[f32]>,
        factor: f32,
        positions: Operand,
        table: Operand,
    ) -> Option<Self> {
        if positions.dtype != DType::I32 || table.stride.is_some() {
            return None;
        }
        Some(Self { isa, entry: angles_entry(isa)?, inv_freq, factor, positions, table })
    }
}

impl Step for RopeAnglesStep {
    fn name(&self) -> String {
        format!("rope_angles_f32_{}", self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.positions, Access::Read);
        visit(&self.table, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (rows, half) = (run.len(&self.positions), self.inv_freq.len());
        if run.rows(&self.table) != rows || run.columns(&self.table) != 2 * half {
            return Err(StepError::Shape { step: self.name() });
        }
        let args = AngleArgs {
            positions: run.pointer(&self.positions),
            inv_freq: self.inv_freq.as_ptr(),
            half,
            factor: self.factor,
            table: run.pointer(&self.table),
        };
        for row in team.tiles(rows) {
            // SAFETY: sizes were checked above and regions by the launch; each row is written by the worker that claimed it.
            unsafe { (self.entry)(&args, row) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Rotates the heads of each row by the row's angles.
#[derive(Debug)]
pub struct RopeStep {
    isa: Isa,
    entry: Entry<RopeArgs>,
    heads: usize,
    head_dim: usize,
    rotary_dim: usize,
    pairing: Pairing,
    x: Operand,
    table: Operand,
    y: Operand,
}

impl RopeStep {
    /// The step for an instruction set; `None` if it is not available or the rotated dim does not fit the head.
    pub fn new(
        isa: Isa,
        heads: usize,
        head_dim: usize,
        rotary_dim: usize,
        pairing: Pairing,
        x: Operand,
        table: Operand,
        y: Operand,
    ) -> Option<Self> {
        if !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim || table.stride.is_some() {
            return None;
        }
        Some(Self { isa, entry: rope_entry(isa)?, heads, head_dim, rotary_dim, pairing, x, table, y })
    }
}

/// Elements one tile covers, about.
const TILE_ELEMENTS: usize = 4096;

impl Step for RopeStep {
    fn name(&self) -> String {
        format!("rope_f32_{}", self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        visit(&self.table, Access::Read);
        visit(&self.y, Access::WriteInPlace);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (rows, width) = (run.rows(&self.x), self.heads * self.head_dim);
        let sizes = run.rows(&self.y) == rows
            && run.rows(&self.table) == rows
            && run.columns(&self.x) == width
            && run.columns(&self.y) == width
            && run.columns(&self.table) == self.rotary_dim;
        if !sizes {
            return Err(StepError::Shape { step: self.name() });
        }
        let args = RopeArgs {
            x: run.pointer(&self.x),
            x_stride: run.stride(&self.x),
            y: run.pointer(&self.y),
            y_stride: run.stride(&self.y),
            table: run.pointer(&self.table),
            rows,
            heads: self.heads,
            head_dim: self.head_dim,
            rotary_dim: self.rotary_dim,
            pairing: self.pairing,
            rows_per_tile: (TILE_ELEMENTS / width.max(1)).max(1),
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
