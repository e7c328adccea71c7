//! Matrix products: each lane sums a small block of the result in registers.

use super::elementwise::{activation, has_activation};
use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand};
use crate::ir::{Value, ViewId};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::linear::Linear;
use rlx_graph::ops::matmul::MatMul;
use rlx_tensor::{DType, Shape};

/// Lanes along the rows of a program's block; as many along its columns.
const SIDE: i32 = 8;
const _: () = assert!(SIDE * SIDE == LANES as i32);
/// Rows and columns that a lane sums.
const EACH: i32 = 4;
const BLOCK: usize = (SIDE * EACH) as usize;

/// Operands of `a [lead, m, k] x b [lead, n, k]`, with the extents of the result `[lead, m, n]`.
struct Product<'p> {
    a: &'p Operand,
    /// One matrix, or gate and up.
    b: &'p [Operand],
    dims: &'p [Amount],
    k: &'p Amount,
}

/// The place of a lane's results.
struct Block {
    lead: Vec<Value>,
    rows: Vec<(Value, Value)>,
    columns: Vec<(Value, Value)>,
}

impl Product<'_> {
    /// Extents of the programs: lead, then blocks of rows, then of columns.
    fn grid(&self) -> Vec<Amount> {
        let lead = self.dims.len() - 2;
        let blocks = self.dims[lead..].iter().map(|d| d.ceil_div(BLOCK));
        self.dims[..lead].iter().cloned().chain(blocks).collect()
    }

    fn block(&self, d: &mut Draft<'_>) -> Block {
        let lead = self.dims.len() - 2;
        let program = d.b.program();
        let (mut at, inside) = d.coordinates(program, &self.grid());
        let (lane, side, size) = (d.b.lane(), d.b.int(SIDE), d.b.int(BLOCK as i32));
        let (down, across) = (d.b.div(lane, side), d.b.binary(crate::ir::BinaryFn::Rem, lane, side));
        let spread = |d: &mut Draft<'_>, tile: Value, own: Value, extent: &Amount| {
            let first = d.b.mul(tile, size);
            let first = d.b.add(first, own);
            let extent = d.size(extent);
            let one = |i: i32, d: &mut Draft<'_>| {
                let offset = d.b.int(i * SIDE);
                let at = d.b.add(first, offset);
                let there = d.b.within(at, extent);
                (at, d.b.and(inside, there))
            };
            (0..EACH).map(|i| one(i, d)).collect::<Vec<_>>()
        };
        let rows = spread(d, at[lead], down, &self.dims[lead]);
        let columns = spread(d, at[lead + 1], across, &self.dims[lead + 1]);
        at.truncate(lead);
        Block { lead: at, rows, columns }
    }

    /// The sums of a block, rows by columns, for each matrix.
    fn sums(&self, d: &mut Draft<'_>, block: &Block) -> Vec<Vec<Value>> {
        let a = d.read(self.a);
        let b: Vec<ViewId> = self.b.iter().map(|o| d.read(o)).collect();
        let k = d.size(self.k);
        let (zero, first, end) = (d.b.float(0.0), d.b.int(0), d.b.arg(k));
        let each = (EACH * EACH) as usize;
        let firsts = vec![zero; each * b.len()];
        let load = |d: &mut Draft<'_>, view: ViewId, at: &(Value, Value), p: Value| {
            let coordinates: Vec<Value> = block.lead.iter().copied().chain([at.0, p]).collect();
            d.b.load(view, &coordinates, Some(at.1))
        };
        let sums = d.repeat([first, end], 1, &firsts, |d, p, carried| {
            let left: Vec<Value> = block.rows.iter().map(|row| load(d, a, row, p)).collect();
            let mut next = Vec::with_capacity(carried.len());
            for (matrix, sums) in b.iter().zip(carried.chunks(each)) {
                let right: Vec<Value> = block.columns.iter().map(|c| load(d, *matrix, c, p)).collect();
                for (at, &sum) in sums.iter().enumerate() {
                    let (i, j) = (at / EACH as usize, at % EACH as usize);
                    let product = d.b.mul(left[i], right[j]);
                    next.push(d.b.add(sum, product));
                }
            }
            next
        });
        sums.chunks(each).map(<[Value]>::to_vec).collect()
    }
}

/// `matmul`.
pub(super) struct GpuMatMul;

impl GpuOp for GpuMatMul {
    fn name(&self) -> &'static str {
        MatMul::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<MatMul>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        let lead = to.dims.len() - 2;
        let turned = |o: &Operand, swap: bool| {
            let rank = o.dims.len();
            let mut order: Vec<usize> = (0..rank).collect();
            if swap {
                order.swap(rank - 2, rank - 1);
            }
            o.axes(&order)
        };
        let (a, b) = (turned(&from[0], op.transpose_a), turned(&from[1], !op.transpose_b));
        let k = a.dims[a.dims.len() - 1].clone();
        let with_lead = |o: &Operand, rows: &Amount| {
            let dims = [&to.dims[..lead], &[rows.clone(), k.clone()]].concat();
            o.broadcast(&dims)
        };
        let a = with_lead(&a, &to.dims[lead]);
        let b = [with_lead(&b, &to.dims[lead + 1])];
        let product = Product { a: &a, b: &b, dims: &to.dims, k: &k };
        let mut d = cx.draft("matmul");
        let block = product.block(&mut d);
        let sums = product.sums(&mut d, &block);
        let write = d.write(&to);
        for (at, &sum) in sums[0].iter().enumerate() {
            let (row, column) = (block.rows[at / EACH as usize], block.columns[at % EACH as usize]);
            let coordinates: Vec<Value> = block.lead.iter().copied().chain([row.0, column.0]).collect();
            let mask = d.b.and(row.1, column.1);
            let value = d.rounded(to.dtype, sum);
            d.b.store(write, &coordinates, value, Some(mask));
        }
        cx.launch(d, Amount::product(&product.grid()))
    }
}

/// `linear`: a launch for each part, or one for gate and up.
pub(super) struct GpuLinear;

impl GpuOp for GpuLinear {
    fn name(&self) -> &'static str {
        Linear::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let known = op.as_any().downcast_ref::<Linear>().is_some_and(|l| has_activation(l.activation));
        let float = |s: &&Shape| matches!(s.dtype(), DType::F32 | DType::F16 | DType::BF16);
        known && inputs.iter().all(float)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Linear>().ok_or_else(|| cx.mismatched())?.clone();
        let from = cx.inputs(step);
        let (x, to) = (from[0].rows(), cx.operand(&step.outputs[0]).rows());
        let residual = op.residual.then(|| from[op.arity() - 1].rows());
        let mut start = Amount::Known(0);
        let each = if op.gated { 2 } else { 1 };
        for part in (0..op.parts).step_by(each) {
            let matrices: Vec<Operand> = (part..part + each)
                .map(|p| if op.transposed { from[1 + p].axes(&[1, 0]) } else { from[1 + p].clone() })
                .collect();
            let width = matrices[0].dims[0].clone();
            let window =
                |o: &Operand| Operand { dims: vec![o.dims[0].clone(), width.clone()], ..o.shifted(&start) };
            let spec = Part {
                x: &x,
                matrices: &matrices,
                biases: if op.bias { &from[op.bias_at() + part..op.bias_at() + part + each] } else { &[] },
                residual: residual.as_ref().map(window),
                to: window(&to),
                activation: op.activation,
            };
            spec.launch(cx)?;
            start = Amount::sum(&start, &width);
        }
        Ok(())
    }
}

/// Some columns of a linear layer's result.
struct Part<'p> {
    x: &'p Operand,
    matrices: &'p [Operand],
    biases: &'p [Operand],
    residual: Option<Operand>,
    to: Operand,
    activation: ActivationKind,
}

impl Part<'_> {
    fn launch(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let k = self.matrices[0].dims[1].clone();
        let x = Operand { dims: vec![self.to.dims[0].clone(), k.clone()], ..self.x.clone() };
        let columns = |o: &Operand| Operand { dims: vec![self.to.dims[1].clone(), k.clone()], ..o.clone() };
        let matrices: Vec<Operand> = self.matrices.iter().map(columns).collect();
        let product = Product { a: &x, b: &matrices, dims: &self.to.dims, k: &k };
        let mut d = cx.draft(if matrices.len() == 2 { "linear_gated" } else { "linear" });
        let block = product.block(&mut d);
        let sums = product.sums(&mut d, &block);
        let vector = |o: &Operand| Operand { dims: vec![self.to.dims[1].clone()], ..o.clone() };
        let biases: Vec<ViewId> = self.biases.iter().map(|o| d.read(&vector(o))).collect();
        let residual = self.residual.as_ref().map(|o| d.read(o));
        let write = d.write(&self.to);
        let offsets: Vec<Vec<Value>> = block
            .columns
            .iter()
            .map(|c| biases.iter().map(|&view| d.b.load(view, &[c.0], Some(c.1))).collect())
            .collect();
        for at in 0..(EACH * EACH) as usize {
            let (i, j) = (at / EACH as usize, at % EACH as usize);
            let (row, column) = (block.rows[i], block.columns[j]);
            let mut values: Vec<Value> = sums.iter().map(|s| s[at]).collect();
            for (value, &bias) in values.iter_mut().zip(&offsets[j]) {
                *value = d.b.add(*value, bias);
            }
            let mut y = activation(&mut d, self.activation, values[0]);
            if let Some(&up) = values.get(1) {
                y = d.b.mul(y, up);
            }
            let mask = d.b.and(row.1, column.1);
            if let Some(view) = residual {
                let r = d.b.load(view, &[row.0, column.0], Some(mask));
                y = d.b.add(r, y);
            }
            d.b.store(write, &[row.0, column.0], y, Some(mask));
        }
        cx.launch(d, Amount::product(&product.grid()))
    }
}
