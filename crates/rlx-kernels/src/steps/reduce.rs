//! Reductions, running sums, counters, the largest elements of rows, pooling of sequences.

use super::elementwise::integer_type_of;
use crate::elementwise::IntegerType;
use crate::isa::{Entry, Isa};
use crate::pool::Team;
use crate::pooling::{PoolArgs, Pooling, pool_entry};
use crate::rank::{TopKArgs, top_k_entry};
use crate::reduce::{
    CumsumArgs, IntegerReduceArgs, NumberType, ReduceArgs, ReduceOp, cumsum_entry, reduce_entry,
    reduce_integer_entry,
};
use crate::schedule::{Access, Operand, Run, Step, StepError};
use rlx_tensor::DType;
use std::any::Any;
use std::ops::Range;

/// Elements one tile covers, about.
const TILE_ELEMENTS: usize = 8192;

#[derive(Debug)]
enum ReduceKernel {
    Float(Entry<ReduceArgs>),
    Integer(Entry<IntegerReduceArgs>, IntegerType),
}

/// Neighbouring axes combined into one element each.
#[derive(Debug)]
pub struct ReduceStep {
    isa: Isa,
    kernel: ReduceKernel,
    op: ReduceOp,
    axes: Range<usize>,
    x: Operand,
    out: Operand,
}

impl ReduceStep {
    /// The step for an instruction set; `None` for a dtype without kernel, rows that are not adjacent, or axes out of range.
    pub fn new(isa: Isa, op: ReduceOp, axes: Range<usize>, x: Operand, out: Operand) -> Option<Self> {
        let kernel = match x.dtype {
            DType::F32 => ReduceKernel::Float(reduce_entry(isa)?),
            dtype => ReduceKernel::Integer(reduce_integer_entry(isa)?, integer_type_of(dtype)?),
        };
        let plain = x.stride.is_none() && out.stride.is_none() && x.dtype == out.dtype;
        if !plain || axes.end > x.dims.len() || axes.start > axes.end {
            return None;
        }
        Some(Self { isa, kernel, op, axes, x, out })
    }
}

impl Step for ReduceStep {
    fn name(&self) -> String {
        format!("reduce_{:?}_{}_{}", self.op, self.x.dtype, self.isa).to_lowercase()
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let outer: usize = run.extents(&self.x).take(self.axes.start).product();
        let axis: usize = run.extents(&self.x).skip(self.axes.start).take(self.axes.len()).product();
        let inner: usize = run.extents(&self.x).skip(self.axes.end).product();
        if run.len(&self.out) != outer * inner {
            return Err(StepError::Shape { step: self.name() });
        }
        let (outer_stride, axis_stride) = (axis * inner, inner);
        match &self.kernel {
            ReduceKernel::Float(entry) => {
                let args = ReduceArgs {
                    op: self.op,
                    x: run.pointer::<f32>(&self.x).cast_const(),
                    outer_stride,
                    axis_stride,
                    outer,
                    axis,
                    inner,
                    out: run.pointer(&self.out),
                    outer_per_tile: (TILE_ELEMENTS / outer_stride.max(1)).max(1),
                };
                for tile in team.tiles(args.tiles()) {
                    // SAFETY: the launch checked bounds and overlap; sizes were checked above; tiles are disjoint outer steps.
                    unsafe { entry(&args, tile) };
                }
            }
            ReduceKernel::Integer(entry, dtype) => {
                let args = IntegerReduceArgs {
                    op: self.op,
                    dtype: *dtype,
                    x: run.pointer::<u8>(&self.x).cast_const(),
                    outer_stride,
                    axis_stride,
                    outer,
                    axis,
                    inner,
                    out: run.pointer(&self.out),
                };
                for tile in team.tiles(outer) {
                    // SAFETY: as above; tile `o` is outer step `o`.
                    unsafe { entry(&args, tile) };
                }
            }
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn number_type_of(dtype: DType) -> Option<NumberType> {
    match dtype {
        DType::F32 => Some(NumberType::F32),
        DType::I32 => Some(NumberType::I32),
        DType::I64 => Some(NumberType::I64),
        _ => None,
    }
}

/// Running sums along rows.
#[derive(Debug)]
pub struct CumsumStep {
    isa: Isa,
    entry: Entry<CumsumArgs>,
    dtype: NumberType,
    exclusive: bool,
    reverse: bool,
    x: Operand,
    y: Operand,
}

impl CumsumStep {
    /// The step for an instruction set; `None` for a dtype without kernel.
    pub fn new(isa: Isa, exclusive: bool, reverse: bool, x: Operand, y: Operand) -> Option<Self> {
        let dtype = number_type_of(x.dtype).filter(|_| x.dtype == y.dtype)?;
        Some(Self { isa, entry: cumsum_entry(isa)?, dtype, exclusive, reverse, x, y })
    }
}

impl Step for CumsumStep {
    fn name(&self) -> String {
        format!("cumsum_{}_{}", self.x.dtype, self.isa)
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
        let args = CumsumArgs {
            dtype: self.dtype,
            x: run.pointer::<u8>(&self.x).cast_const(),
            x_stride: run.stride(&self.x),
            y: run.pointer(&self.y),
            y_stride: run.stride(&self.y),
            cols,
            exclusive: self.exclusive,
            reverse: self.reverse,
        };
        for row in team.tiles(rows) {
            // SAFETY: the launch checked bounds, and that `y` is `x` itself or apart from it; sizes were checked above; each row is
            // written by the worker that claimed it.
            unsafe { (self.entry)(&args, row) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Each element is its index along one axis.
#[derive(Debug)]
pub struct IotaStep {
    dtype: NumberType,
    axis: usize,
    out: Operand,
}

impl IotaStep {
    /// `None` for a dtype other than F32, I32 and I64, rows that are not adjacent, or an axis out of range.
    pub fn new(axis: usize, out: Operand) -> Option<Self> {
        let dtype = number_type_of(out.dtype)?;
        (out.stride.is_none() && axis < out.dims.len()).then_some(Self { dtype, axis, out })
    }
}

impl Step for IotaStep {
    fn name(&self) -> String {
        format!("iota_{}", self.out.dtype)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let outer: usize = run.extents(&self.out).take(self.axis).product();
        let axis = run.extents(&self.out).nth(self.axis).unwrap_or(0);
        let inner: usize = run.extents(&self.out).skip(self.axis + 1).product();
        for o in team.tiles(outer) {
            for a in 0..axis {
                let from = (o * axis + a) * inner;
                for at in from..from + inner {
                    // SAFETY: `at` is below the number of elements, whose bounds and alignment the launch checked; each outer step
                    // is written by the worker that claimed it.
                    unsafe {
                        match self.dtype {
                            NumberType::F32 => run.pointer::<f32>(&self.out).add(at).write(a as f32),
                            NumberType::I32 => run.pointer::<i32>(&self.out).add(at).write(a as i32),
                            NumberType::I64 => run.pointer::<i64>(&self.out).add(at).write(a as i64),
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The largest elements of each row, descending, and their indices.
#[derive(Debug)]
pub struct TopKStep {
    isa: Isa,
    entry: Entry<TopKArgs>,
    k: usize,
    x: Operand,
    values: Operand,
    indices: Operand,
}

impl TopKStep {
    /// The step for an instruction set; `None` for a dtype other than F32 or `k` of 0.
    pub fn new(isa: Isa, k: usize, x: Operand, values: Operand, indices: Operand) -> Option<Self> {
        let dtypes = (x.dtype, values.dtype, indices.dtype) == (DType::F32, DType::F32, DType::I32);
        let plain = values.stride.is_none() && indices.stride.is_none();
        if !dtypes || !plain || k == 0 {
            return None;
        }
        Some(Self { isa, entry: top_k_entry(isa)?, k, x, values, indices })
    }
}

impl Step for TopKStep {
    fn name(&self) -> String {
        format!("top_k_f32_{}", self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        visit(&self.values, Access::Write);
        visit(&self.indices, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (rows, cols) = (run.rows(&self.x), run.columns(&self.x));
        let fits = |o: &Operand| run.rows(o) == rows && run.columns(o) == self.k;
        if self.k > cols || !fits(&self.values) || !fits(&self.indices) {
            return Err(StepError::Shape { step: self.name() });
        }
        let args = TopKArgs {
            x: run.pointer::<f32>(&self.x).cast_const(),
            x_stride: run.stride(&self.x),
            cols,
            k: self.k,
            values: run.pointer(&self.values),
            indices: run.pointer(&self.indices),
        };
        for row in team.tiles(rows) {
            // SAFETY: the launch checked bounds and overlap; sizes were checked above; each row is written by the worker that
            // claimed it.
            unsafe { (self.entry)(&args, row) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// One row for each sequence of rows.
#[derive(Debug)]
pub struct PoolStep {
    isa: Isa,
    entry: Entry<PoolArgs>,
    pooling: Pooling,
    x: Operand,
    seq_starts: Operand,
    out: Operand,
}

impl PoolStep {
    /// The step for an instruction set; `None` for dtypes other than F32 rows and I32 starts.
    pub fn new(isa: Isa, pooling: Pooling, x: Operand, seq_starts: Operand, out: Operand) -> Option<Self> {
        let dtypes = (x.dtype, seq_starts.dtype, out.dtype) == (DType::F32, DType::I32, DType::F32);
        if !dtypes || seq_starts.stride.is_some() {
            return None;
        }
        Some(Self { isa, entry: pool_entry(isa)?, pooling, x, seq_starts, out })
    }
}

impl Step for PoolStep {
    fn name(&self) -> String {
        format!("pool_{:?}_f32_{}", self.pooling, self.isa).to_lowercase()
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.x, Access::Read);
        visit(&self.seq_starts, Access::Read);
        visit(&self.out, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (rows, cols) = (run.rows(&self.x), run.columns(&self.x));
        let batch = run.len(&self.seq_starts).saturating_sub(1);
        if run.rows(&self.out) != batch || run.columns(&self.out) != cols {
            return Err(StepError::Shape { step: self.name() });
        }
        // SAFETY: starts are I32 (checked in `new`), and not written during the step.
        let starts: &[i32] = unsafe { run.slice(&self.seq_starts) };
        let ascending = starts.windows(2).all(|w| w[0] <= w[1]);
        let ends =
            starts.first() == Some(&0) && starts.last().and_then(|&e| usize::try_from(e).ok()) == Some(rows);
        if !ascending || !ends {
            let reason = format!("seq_starts must ascend from 0 to {rows}, found {starts:?}");
            return Err(StepError::Sequences { step: "pool".to_owned(), reason });
        }
        let args = PoolArgs {
            pooling: self.pooling,
            x: run.pointer::<f32>(&self.x).cast_const(),
            x_stride: run.stride(&self.x),
            seq_starts: starts.as_ptr(),
            batch,
            cols,
            out: run.pointer(&self.out),
            out_stride: run.stride(&self.out),
        };
        for sequence in team.tiles(batch) {
            // SAFETY: the launch checked bounds and overlap; sizes and starts were checked above; each row of the result is written
            // by the worker that claimed its sequence.
            unsafe { (self.entry)(&args, sequence) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
