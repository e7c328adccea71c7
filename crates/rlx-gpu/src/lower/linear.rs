//! Matrix products and linear layers.

use super::blocks::is_blocks;
use super::elementwise::{activation, has_activation};
use super::library::{Plain, Ready, Shared};
use super::operands::Operands;
use super::product::{Finish, Product, Rows};
use super::quantise::{Codes, codes_of};
use super::{Amount, Band, Draft, GpuOp, LowerCx, Operand, Room};
use crate::ir::{BinaryFn, ViewId};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::linear::Linear;
use rlx_graph::ops::matmul::MatMul;
use rlx_tensor::{DType, Shape};

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
        // Bands of the axes that the sums do not go along.
        let bands = |o: &Operand, last: bool| cx.bands(o, o.dims.len() - if last { 1 } else { 2 });
        let (rows, columns) = (bands(&from[0], op.transpose_a), bands(&from[1], !op.transpose_b));
        let mut room = Room::default();
        let whole = [turned(&from[0], op.transpose_a), turned(&from[1], !op.transpose_b)];
        let ready = Ready::of(cx, &whole[0], Operands::Floats, &whole[1..], &mut room)?;
        cx.scratch.push(room.words());
        for (a, b) in rows.iter().flat_map(|a| columns.iter().map(move |b| (a, b))) {
            let (a, b) = (turned(a, op.transpose_a), turned(b, !op.transpose_b));
            let k = a.dims[a.dims.len() - 1].clone();
            let mut to = to.clone();
            for (axis, operand) in [(lead, &a), (lead + 1, &b)] {
                if let Some(Band { first, count, .. }) = operand.band {
                    to = to.shifted(&Amount::product([&Amount::Known(first), &to.strides[axis]]));
                    to.dims[axis] = Amount::Known(count);
                }
            }
            let with_lead = |o: &Operand, rows: &Amount| {
                let dims = [&to.dims[..lead], &[rows.clone(), k.clone()]].concat();
                o.broadcast(&dims)
            };
            let a = with_lead(&a, &to.dims[lead]);
            let b = [with_lead(&b, &to.dims[lead + 1])];
            let (a, dims) = (Rows::Stored(&a), &to.dims);
            let product = Product { a, codes: None, b: &b, dims, k: &k, operands: Operands::Floats };
            let prepare = |d: &mut Draft<'_>| -> Box<Finish<'static>> {
                let (write, dtype) = (d.write(&to), to.dtype);
                Box::new(move |d, at, mask, sums| {
                    let value = d.rounded(dtype, sums[0]);
                    d.b.store(write, at, value, Some(mask));
                })
            };
            let plain = Some(Plain { to: &to, bias: None, residual: None });
            Shared { product: &product, ready: ready.as_ref(), plain }.launch(cx, "matmul", &prepare)?;
        }
        Ok(())
    }
}

/// `linear`: a launch for each part, or one for gate and up.
pub(super) struct GpuLinear;

impl GpuOp for GpuLinear {
    fn name(&self) -> &'static str {
        Linear::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let Some(op) = op.as_any().downcast_ref::<Linear>() else { return false };
        let float = |s: &&Shape| matches!(s.dtype(), DType::F32 | DType::F16 | DType::BF16);
        let (weights, rest) = inputs.split_at((1 + op.parts).min(inputs.len()));
        // Blocks lie along k, and in k of a whole number of them.
        let blocks = |s: &&Shape| is_blocks(s.dtype()) && !op.transposed && s.known_dims().is_some();
        let weight = |s: &&Shape| float(s) || blocks(s);
        has_activation(op.activation) && weights.iter().all(weight) && rest.iter().all(float)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Linear>().ok_or_else(|| cx.mismatched())?.clone();
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        let mut room = Room::default();
        layer(cx, &op, &from, &to, None, &mut room)?;
        cx.scratch.push(room.words());
        Ok(())
    }
}

/// What is added to rows before the activation.
pub(super) struct Update {
    /// `[rows, columns of all parts]`
    pub values: Operand,
    /// `[rows]`: below 0 for a row that is left as it is.
    pub slots: Operand,
}

/// Launches of a linear layer; `room` is what its step has of scratch memory.
pub(super) fn layer(
    cx: &mut LowerCx<'_>,
    op: &Linear,
    from: &[Operand],
    to: &Operand,
    update: Option<&Update>,
    room: &mut Room,
) -> Result<(), BackendError> {
    let (x, to) = (from[0].rows(), to.rows());
    let turned = |o: &Operand| if op.transposed { o.axes(&[1, 0]) } else { o.clone() };
    // One quantising serves all parts.
    let codes = codes_of(cx, &x, &from[1..1 + op.parts], room)?;
    let whole: Vec<Operand> = from[1..1 + op.parts].iter().map(turned).collect();
    let ready = Ready::of(cx, &x, cx.choices.operands, &whole, room)?;
    let residual = op.residual.then(|| from[op.arity() - 1].rows());
    let columns_axis = usize::from(op.transposed);
    let mut start = Amount::Known(0);
    // Columns of the parts before this one.
    let mut before = Amount::Known(0);
    let each = if op.gated { 2 } else { 1 };
    for part in (0..op.parts).step_by(each) {
        let stored = &from[1 + part..1 + part + each];
        let matrices: Vec<Operand> = stored.iter().map(turned).collect();
        let biases: &[Operand] =
            if op.bias { &from[op.bias_at() + part..op.bias_at() + part + each] } else { &[] };
        let bands: Vec<Vec<Operand>> =
            stored.iter().map(|m| cx.bands(m, columns_axis).iter().map(turned).collect()).collect();
        let mut behind = Amount::Known(0);
        for at in 0..bands.iter().map(Vec::len).min().unwrap_or(0) {
            let bound: Vec<Operand> = bands.iter().map(|own| own[at].clone()).collect();
            let width = bound[0].dims[0].clone();
            let window = |o: &Operand, by: &Amount| Operand {
                dims: vec![o.dims[0].clone(), width.clone()],
                ..o.shifted(by)
            };
            let update = update.map(|Update { values, slots }| {
                let mut by = Amount::sum(&before, &behind);
                let mut windows = Vec::with_capacity(each);
                for matrix in &matrices {
                    windows.push(window(values, &by));
                    by = Amount::sum(&by, &matrix.dims[0]);
                }
                (windows, slots.clone())
            });
            let spec = Part {
                x: &x,
                ready: ready.as_ref(),
                codes: codes.as_ref().filter(|_| super::dot::takes(&matrices)),
                matrices: &bound,
                biases: &biases.iter().map(|bias| bias.shifted(&behind)).collect::<Vec<_>>(),
                residual: residual.as_ref().map(|o| window(o, &start)),
                update,
                to: window(&to, &start),
                activation: op.activation,
            };
            spec.launch(cx)?;
            (start, behind) = (Amount::sum(&start, &width), Amount::sum(&behind, &width));
        }
        before = matrices.iter().fold(before, |sum, matrix| Amount::sum(&sum, &matrix.dims[0]));
    }
    Ok(())
}

/// Some columns of a linear layer's result.
struct Part<'p> {
    x: &'p Operand,
    ready: Option<&'p Ready>,
    codes: Option<&'p Codes>,
    matrices: &'p [Operand],
    biases: &'p [Operand],
    residual: Option<Operand>,
    /// For each matrix what is added to its columns, and which rows it is added to.
    update: Option<(Vec<Operand>, Operand)>,
    to: Operand,
    activation: ActivationKind,
}

impl Part<'_> {
    fn launch(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let k = self.matrices[0].dims[1].clone();
        let x = Operand { dims: vec![self.to.dims[0].clone(), k.clone()], ..self.x.clone() };
        let columns = |o: &Operand| Operand { dims: vec![self.to.dims[1].clone(), k.clone()], ..o.clone() };
        let matrices: Vec<Operand> = self.matrices.iter().map(columns).collect();
        let (a, dims) = (Rows::Stored(&x), &self.to.dims);
        let operands = cx.choices.operands.of(&matrices);
        let product = Product { a, codes: self.codes, b: &matrices, dims, k: &k, operands };
        let vector = |o: &Operand| Operand { dims: vec![self.to.dims[1].clone()], ..o.clone() };
        let kind = self.activation;
        let prepare = |d: &mut Draft<'_>| -> Box<Finish<'static>> {
            let biases: Vec<ViewId> = self.biases.iter().map(|o| d.read(&vector(o))).collect();
            let residual = self.residual.as_ref().map(|o| d.read(o));
            let update = self.update.as_ref().map(|(values, slots)| {
                let values: Vec<ViewId> = values.iter().map(|o| d.read(o)).collect();
                (values, d.read(slots))
            });
            let write = d.write(&self.to);
            Box::new(move |d, at, mask, sums| {
                let mut values = sums.to_vec();
                for (value, &view) in values.iter_mut().zip(&biases) {
                    let bias = d.b.load(view, &at[1..], Some(mask));
                    *value = d.b.add(*value, bias);
                }
                if let Some((views, slots)) = &update {
                    let (slot, none) = (d.b.load(*slots, &at[..1], Some(mask)), d.b.int(0));
                    let own = d.b.binary(BinaryFn::LessEqual, none, slot);
                    for (value, &view) in values.iter_mut().zip(views) {
                        let more = d.b.load(view, at, Some(mask));
                        let sum = d.b.add(*value, more);
                        *value = d.b.select(own, sum, *value);
                    }
                }
                let mut y = activation(d, kind, values[0]);
                if let Some(&up) = values.get(1) {
                    y = d.b.mul(y, up);
                }
                if let Some(view) = residual {
                    let r = d.b.load(view, at, Some(mask));
                    y = d.b.add(r, y);
                }
                d.b.store(write, at, y, Some(mask));
            })
        };
        let bias = self.biases.first();
        let plain = kind == ActivationKind::Identity && self.update.is_none() && matrices.len() == 1;
        let plain = plain.then_some(Plain { to: &self.to, bias, residual: self.residual.as_ref() });
        let name = if matrices.len() == 2 { "linear_gated" } else { "linear" };
        Shared { product: &product, ready: self.ready, plain }.launch(cx, name, &prepare)
    }
}
