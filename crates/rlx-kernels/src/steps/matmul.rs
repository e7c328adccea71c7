//! The batched product of two values.

use super::walk::{MAX_RANK, extents};
use crate::isa::{Entry, Isa};
use crate::matmul::{MatMulArgs, matmul_entry};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;

/// `a x b` with broadcast leading dims; either operand may be given transposed.
#[derive(Debug)]
pub struct MatMulStep {
    isa: Isa,
    entry: Entry<MatMulArgs>,
    transposed: (bool, bool),
    a: Operand,
    b: Operand,
    out: Operand,
}

/// An operand's matrix (rows, columns as they enter the product, strides of both) and elements from one matrix to the next.
struct Matrix {
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    size: usize,
}

fn matrix(run: &Run<'_>, operand: &Operand, transposed: bool) -> Matrix {
    let (dims, rank) = extents(run, operand);
    let (rows, columns, stride) = (dims[rank - 2], dims[rank - 1], run.stride(operand));
    let size = rows * stride;
    match transposed {
        true => Matrix { rows: columns, columns: rows, row_stride: 1, column_stride: stride, size },
        false => Matrix { rows, columns, row_stride: stride, column_stride: 1, size },
    }
}

/// The matrix of an operand with leading dims `lead` that batch element `at` of the result with leading dims `shape` takes.
fn batch_of(at: usize, shape: &[usize], lead: &[usize]) -> usize {
    let (mut rest, mut step, mut index) = (at, 1, 0);
    for (d, &extent) in shape.iter().enumerate().rev() {
        let own = (d + lead.len()).checked_sub(shape.len()).map_or(1, |d| lead[d]);
        if own > 1 {
            index += rest % extent * step;
        }
        step *= own;
        rest /= extent;
    }
    index
}

impl MatMulStep {
    /// The step for an instruction set; `None` for a dtype other than F32, ranks below 2 or too many dims.
    pub fn new(isa: Isa, transposed: (bool, bool), a: Operand, b: Operand, out: Operand) -> Option<Self> {
        let plain = |o: &Operand| o.dtype == DType::F32 && (2..=MAX_RANK).contains(&o.dims.len());
        if !plain(&a) || !plain(&b) || !plain(&out) || out.stride.is_some() {
            return None;
        }
        Some(Self { isa, entry: matmul_entry(isa)?, transposed, a, b, out })
    }
}

impl Step for MatMulStep {
    fn name(&self) -> String {
        format!("matmul_f32_{}", self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.a, Access::Read);
        visit(&self.b, Access::Read);
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (a, b) = (matrix(run, &self.a, self.transposed.0), matrix(run, &self.b, self.transposed.1));
        let ((shape, rank), (a_dims, a_rank)) = (extents(run, &self.out), extents(run, &self.a));
        let (b_dims, b_rank) = extents(run, &self.b);
        let lead = &shape[..rank - 2];
        let (a_lead, b_lead) = (&a_dims[..a_rank - 2], &b_dims[..b_rank - 2]);
        let broadcasts = |own: &[usize]| {
            let mut pairs = own.iter().rev().zip(lead.iter().rev());
            own.len() <= lead.len() && pairs.all(|(own, extent)| *own == 1 || own == extent)
        };
        let fits = a.columns == b.rows
            && (shape[rank - 2], shape[rank - 1]) == (a.rows, b.columns)
            && broadcasts(a_lead)
            && broadcasts(b_lead);
        if !fits {
            return Err(StepError::Shape { step: self.name() });
        }
        let (m, n, k) = (a.rows, b.columns, a.columns);
        let args = MatMulArgs {
            a: run.pointer::<f32>(&self.a).cast_const(),
            a_row: a.row_stride,
            a_column: a.column_stride,
            b: run.pointer::<f32>(&self.b).cast_const(),
            b_row: b.row_stride,
            b_column: b.column_stride,
            out: run.pointer(&self.out),
            m,
            n,
            k,
        };
        let tiles = args.tiles();
        for tile in team.tiles(lead.iter().product::<usize>() * tiles) {
            let at = tile / tiles;
            let product = MatMulArgs {
                a: args.a.wrapping_add(batch_of(at, lead, a_lead) * a.size),
                b: args.b.wrapping_add(batch_of(at, lead, b_lead) * b.size),
                out: args.out.wrapping_add(at * m * n),
                ..args
            };
            // SAFETY: the launch checked bounds and that nothing overlaps the result; sizes were checked above; tiles are disjoint.
            unsafe { (self.entry)(&product, tile % tiles) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
