//! Rows by index: embedding lookups in a table as it is stored, and gathers along any axis.

use super::embedding::check_indices;
use crate::gather::{EmbedArgs, Ids, RowArgs, TableType, embed_entry, gather_entry};
use crate::isa::{Entry, Isa};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;

/// Elements one tile covers, about.
const TILE_ELEMENTS: usize = 8192;

fn ids_of(run: &Run<'_>, operand: &Operand) -> Ids {
    match operand.dtype {
        DType::I64 => Ids::I64(run.pointer::<i64>(operand).cast_const()),
        _ => Ids::I32(run.pointer::<i32>(operand).cast_const()),
    }
}

fn are_ids(operand: &Operand) -> bool {
    matches!(operand.dtype, DType::I32 | DType::I64) && operand.stride.is_none()
}

/// Rows of a table of floats, widened to f32.
#[derive(Debug)]
pub struct TableEmbeddingStep {
    isa: Isa,
    entry: Entry<EmbedArgs>,
    table_type: TableType,
    ids: Operand,
    table: Operand,
    out: Operand,
}

impl TableEmbeddingStep {
    /// The step for an instruction set; `None` for a table that is not `[rows, columns]` of f32, f16 or bf16.
    pub fn new(isa: Isa, ids: Operand, table: Operand, out: Operand) -> Option<Self> {
        let table_type = match table.dtype {
            DType::F32 => TableType::F32,
            DType::F16 => TableType::F16,
            DType::BF16 => TableType::Bf16,
            _ => return None,
        };
        if !are_ids(&ids) || table.dims.len() != 2 || out.dtype != DType::F32 {
            return None;
        }
        Some(Self { isa, entry: embed_entry(isa)?, table_type, ids, table, out })
    }
}

impl Step for TableEmbeddingStep {
    fn name(&self) -> String {
        format!("embedding_{}_f32_{}", self.table.dtype, self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.ids, Access::Read);
        visit(&self.table, Access::Read);
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (rows, cols) = (run.len(&self.ids), run.columns(&self.table));
        if run.rows(&self.out) != rows || run.columns(&self.out) != cols {
            return Err(StepError::Shape { step: self.name() });
        }
        check_indices(run, &self.ids, "embedding", "token id", run.rows(&self.table))?;
        let args = EmbedArgs {
            table: run.pointer::<u8>(&self.table).cast_const(),
            table_type: self.table_type,
            table_stride: run.stride(&self.table),
            cols,
            ids: ids_of(run, &self.ids),
            rows,
            scale: 1.0,
            accumulate: false,
            out: run.pointer(&self.out),
            out_stride: run.stride(&self.out),
            rows_per_tile: (TILE_ELEMENTS / cols.max(1)).max(1),
        };
        for tile in team.tiles(args.tiles()) {
            // SAFETY: the launch checked bounds and that nothing overlaps the result; ids and sizes were checked above; tiles are
            // disjoint rows.
            unsafe { (self.entry)(&args, tile) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Elements from one part of an operand to the next: runs of adjacent elements, slices, and all slices of one index of the axes before.
struct Pitch {
    run: usize,
    slice: usize,
    outer: usize,
}

/// Slices picked by index along one axis: the dims of the indices stand in place of that axis.
#[derive(Debug)]
pub struct GatherStep {
    isa: Isa,
    entry: Entry<RowArgs>,
    axis: usize,
    x: Operand,
    ids: Operand,
    out: Operand,
}

impl GatherStep {
    /// The step for an instruction set; `None` for dtypes that differ, an axis that does not exist, or columns picked by more than
    /// a list into rows that are not adjacent.
    pub fn new(isa: Isa, axis: usize, x: Operand, ids: Operand, out: Operand) -> Option<Self> {
        let listed = axis + 1 < x.dims.len() || out.stride.is_none() || ids.dims.len() == 1;
        if !listed
            || x.dtype != out.dtype
            || !are_ids(&ids)
            || axis >= x.dims.len()
            || x.dtype.element_bytes().is_none()
        {
            return None;
        }
        Some(Self { isa, entry: gather_entry(isa)?, axis, x, ids, out })
    }
}

impl Step for GatherStep {
    fn name(&self) -> String {
        format!("gather_{}_{}", self.x.dtype, self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        visit(&self.ids, Access::Read);
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let outer: usize = run.extents(&self.x).take(self.axis).product();
        let extent = run.extents(&self.x).nth(self.axis).unwrap_or(0);
        let inner: usize = run.extents(&self.x).skip(self.axis + 1).product();
        let ids = run.len(&self.ids);
        if run.len(&self.out) != outer * ids * inner {
            return Err(StepError::Shape { step: self.name() });
        }
        check_indices(run, &self.ids, "gather", "index", extent)?;
        // A slice is one run of elements, or, where rows are apart, a run for each of its rows.
        let whole = self.x.stride.is_none() && self.out.stride.is_none();
        let (runs, length) = match whole || self.axis + 1 == self.x.dims.len() {
            true => (1, inner),
            false => (inner / run.columns(&self.x).max(1), run.columns(&self.x)),
        };
        let [from, to] = [(&self.x, extent), (&self.out, ids)].map(|(operand, slices)| match whole {
            true => Pitch { run: inner, slice: inner, outer: slices * inner },
            false if self.axis + 1 == self.x.dims.len() => {
                let row = if operand.stride.is_some() { run.stride(operand) } else { slices };
                Pitch { run: 1, slice: 1, outer: row }
            }
            false => {
                let row = run.stride(operand);
                Pitch { run: row, slice: runs * row, outer: slices * runs * row }
            }
        });
        let bytes = self.x.element_bytes();
        let args = RowArgs {
            from: run.pointer::<u8>(&self.x).cast_const(),
            from_stride: from.slice * bytes,
            to: run.pointer(&self.out),
            to_stride: to.slice * bytes,
            row_bytes: length * bytes,
            ids: ids_of(run, &self.ids),
            rows: ids,
            rows_per_tile: (TILE_ELEMENTS / length.max(1)).max(1),
        };
        let tiles = args.tiles();
        for tile in team.tiles(outer * runs * tiles) {
            let (at, part) = (tile / tiles / runs, tile / tiles % runs);
            let slice = RowArgs {
                from: args.from.wrapping_add((at * from.outer + part * from.run) * bytes),
                to: args.to.wrapping_add((at * to.outer + part * to.run) * bytes),
                ..args
            };
            // SAFETY: the launch checked bounds and that nothing overlaps the result; indices and sizes were checked above; tiles
            // are disjoint rows.
            unsafe { (self.entry)(&slice, tile % tiles) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
