//! Windows that move over images: a lane for each element of the result, over the elements of its window one after another.

use super::elementwise::{activation, has_activation, power};
use super::lines::MadeElement;
use super::operands::Operands;
use super::product::{Finish, Product, Rows};
use super::{Amount, Draft, GpuOp, LANES, LowerCx, Operand, computes, element};
use crate::ir::{BinaryFn, Element, UnaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::conv::Conv;
use rlx_graph::ops::conv_transpose::ConvTranspose;
use rlx_graph::ops::pool_window::{PoolWindow, WindowPool};
use rlx_tensor::Shape;
use std::rc::Rc;

/// Axes of an image with channels in front.
fn channels_first(operand: &Operand, last: bool) -> Operand {
    let rank = operand.dims.len();
    match last {
        true => operand.axes(&[0, rank - 1].into_iter().chain(1..rank - 1).collect::<Vec<_>>()),
        false => operand.clone(),
    }
}

/// How a window moves along the spatial axes.
struct Moves<'m> {
    strides: &'m [usize],
    dilations: &'m [usize],
    before: Vec<Amount>,
    /// Extents of the operand.
    extents: &'m [Amount],
}

impl Moves<'_> {
    /// The element that a position of the window sees through one of its elements, and whether there is one.
    fn element(
        &self,
        d: &mut Draft<'_>,
        position: &[Value],
        tap: &[Value],
        mask: Value,
    ) -> (Vec<Value>, Value) {
        let (mut at, mut inside) = (Vec::with_capacity(position.len()), mask);
        for (axis, (&p, &t)) in position.iter().zip(tap).enumerate() {
            let (stride, dilation) =
                (d.b.int(self.strides[axis] as i32), d.b.int(self.dilations[axis] as i32));
            let (before, extent) = (d.size(&self.before[axis]), d.size(&self.extents[axis]));
            let before = d.b.arg(before);
            let (start, offset) = (d.b.mul(p, stride), d.b.mul(t, dilation));
            let padded = d.b.add(start, offset);
            let i = d.b.sub(padded, before);
            let there = d.b.within(i, extent);
            inside = d.b.and(inside, there);
            at.push(i);
        }
        (at, inside)
    }
}

/// Sums over `taps` (extents of what is summed over), each a product.
fn total(
    d: &mut Draft<'_>,
    taps: &[Amount],
    first: Value,
    term: impl FnOnce(&mut Draft<'_>, &[Value], Value, Value) -> Value,
) -> Value {
    let count = d.size(&Amount::product(taps));
    let (zero, end) = (d.b.int(0), d.b.arg(count));
    let sums = d.repeat([zero, end], 1, &[first], |d, index, carried| {
        let (at, known) = d.coordinates(index, taps);
        vec![term(d, &at, known, carried[0])]
    });
    sums[0]
}

fn number(d: &mut Draft<'_>, view: ViewId, float: f64, int: i32) -> Value {
    match d.b.view_element(view) {
        Element::F32 => d.b.float(float),
        _ => d.b.int(int),
    }
}

/// `conv`.
pub(super) struct GpuConv;

impl GpuOp for GpuConv {
    fn name(&self) -> &'static str {
        Conv::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        let known = op.as_any().downcast_ref::<Conv>().is_some_and(|c| has_activation(c.activation));
        computes(inputs, outputs) && known
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Conv>().ok_or_else(|| cx.mismatched())?;
        let from = cx.inputs(step);
        let x = channels_first(&from[0], op.channels_last);
        let to = channels_first(&cx.operand(&step.outputs[0]), op.channels_last);
        let bands = if op.groups == 1 { cx.bands(&from[1], 0) } else { vec![from[1].clone()] };
        for band in bands {
            let first = Amount::Known(band.band.map_or(0, |band| band.first));
            let window = |o: &Operand| o.shifted(&Amount::product([&first, &o.strides[1]]));
            let (mut from, mut to) = (from.clone(), window(&to));
            if band.band.is_some() {
                to.dims[1] = band.dims[0].clone();
            }
            if op.bias {
                from[2] = Operand { dims: vec![to.dims[1].clone()], ..from[2].shifted(&first) };
            }
            if op.addend {
                let own = channels_first(&from[op.arity() - 1], op.channels_last);
                from[op.arity() - 1] =
                    from[op.arity() - 1].shifted(&Amount::product([&first, &own.strides[1]]));
            }
            from[1] = band;
            match Image::new(op, &from, &x, &to) {
                Some(image) => image.launch(cx)?,
                None => Self::plain(cx, op, &from, &x, &to)?,
            }
        }
        Ok(())
    }
}

impl GpuConv {
    /// A lane for each element of the result.
    fn plain(
        cx: &mut LowerCx<'_>,
        op: &Conv,
        from: &[Operand],
        x: &Operand,
        to: &Operand,
    ) -> Result<(), BackendError> {
        let w = &from[1];
        let mut d = cx.draft("conv");
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &to.dims);
        let (read, weight, write) = (d.read(x), d.read(w), d.write(to));
        let (outputs_each, each) = (d.size(&w.dims[0].ceil_div(op.groups)), d.size(&w.dims[1]));
        let (outputs_each, each) = (d.b.arg(outputs_each), d.b.arg(each));
        let group = d.b.div(at[1], outputs_each);
        let first = d.b.mul(group, each);
        let channels = d.size(&x.dims[1]);
        let outputs = d.size(&w.dims[0]);
        let before = op.before.iter().map(Amount::of_dim).collect();
        let (strides, dilations, extents) = (&op.strides, &op.dilations, &x.dims[2..]);
        let moves = Moves { strides, dilations, before, extents };
        let known_output = d.b.within(at[1], outputs);
        let inside_all = d.b.and(inside, known_output);
        let zero = number(&mut d, read, 0.0, 0);
        let mut y = total(&mut d, &w.dims[1..], zero, |d, tap, known, sum| {
            let mask = d.b.and(inside_all, known);
            let (place, there) = moves.element(d, &at[2..], &tap[1..], mask);
            let channel = d.b.add(first, tap[0]);
            let within = d.b.within(channel, channels);
            let there = d.b.and(there, within);
            let place: Vec<Value> = [at[0], channel].into_iter().chain(place).collect();
            let element = d.b.load(read, &place, Some(there));
            let own: Vec<Value> = [at[1]].iter().chain(tap).copied().collect();
            let factor = d.b.load(weight, &own, Some(mask));
            let product = d.b.mul(element, factor);
            d.b.add(sum, product)
        });
        if op.bias {
            let view = d.read(&from[2]);
            let bias = d.b.load(view, &[at[1]], Some(inside_all));
            y = d.b.add(y, bias);
        }
        if op.addend {
            let view = d.read(&Operand {
                dims: to.dims.clone(),
                ..channels_first(&from[op.arity() - 1], op.channels_last)
            });
            let addend = d.b.load(view, &at, Some(inside));
            y = d.b.add(y, addend);
        }
        let y = activation(&mut d, op.activation, y);
        let y = d.rounded(to.dtype, y);
        d.b.store(write, &at, y, Some(inside));
        cx.launch(d, Amount::product(&to.dims).ceil_div(LANES as usize))
    }
}

/// A convolution as a matrix product for each group: a row is a place of the result, a column an output channel, and k the group's
/// channels and the elements of the window.
struct Image<'i> {
    op: &'i Conv,
    from: &'i [Operand],
    x: &'i Operand,
    to: &'i Operand,
    /// Channels of a group, before and after.
    channels: [usize; 2],
}

impl<'i> Image<'i> {
    /// `None` where a group is too small to be worth it, or its sizes are not known.
    fn new(op: &'i Conv, from: &'i [Operand], x: &'i Operand, to: &'i Operand) -> Option<Self> {
        let (Amount::Known(outputs), Amount::Known(each)) = (&from[1].dims[0], &from[1].dims[1]) else {
            return None;
        };
        let taps = from[1].dims[2..].iter().try_fold(1, |product, d| match d {
            Amount::Known(d) => Some(product * d),
            _ => None,
        })?;
        let channels = [*each, outputs / op.groups];
        let whole = from[1].strides == super::contiguous(&from[1].dims);
        let floats = from.iter().chain([to]).all(|o| element(o.dtype) == Some(Element::F32));
        (whole && floats && channels[1] >= 8 && each * taps >= 16).then_some(Self {
            op,
            from,
            x,
            to,
            channels,
        })
    }

    fn launch(&self, cx: &mut LowerCx<'_>) -> Result<(), BackendError> {
        let (op, w) = (self.op, &self.from[1]);
        let taps: Vec<Amount> = w.dims[1..].to_vec();
        let k = Amount::product(&taps);
        let places: Vec<Amount> = self.to.dims[..1].iter().chain(&self.to.dims[2..]).cloned().collect();
        let rows = Amount::product(&places);
        let dims = [Amount::Known(op.groups), rows, Amount::Known(self.channels[1])];
        let matrix = Operand {
            dims: vec![dims[0].clone(), dims[2].clone(), k.clone()],
            strides: vec![Amount::product(&[dims[2].clone(), k.clone()]), k.clone(), Amount::Known(1)],
            ..w.clone()
        };
        let make = |d: &mut Draft<'_>| self.element(d, &places, &taps);
        let (a, operands) = (Rows::Made(&make), Operands::Floats);
        let product = Product { a, codes: None, b: &[matrix], dims: &dims, k: &k, operands };
        let prepare = |d: &mut Draft<'_>| self.finish(d, &places);
        product.launch(cx, "conv", &prepare)
    }

    /// What makes an element of a row: the image's element that a place sees through an element of its window.
    fn element(&self, d: &mut Draft<'_>, places: &[Amount], taps: &[Amount]) -> Rc<MadeElement<'static>> {
        let read = d.read(self.x);
        let (op, x) = (self.op.clone(), self.x.clone());
        let (places, taps, each) = (places.to_vec(), taps.to_vec(), self.channels[0] as i32);
        Rc::new(move |d, lead, [row, k], mask| {
            let before = op.before.iter().map(Amount::of_dim).collect();
            let moves =
                Moves { strides: &op.strides, dilations: &op.dilations, before, extents: &x.dims[2..] };
            let (at, there) = d.coordinates(row, &places);
            let (tap, known) = d.coordinates(k, &taps);
            let mask = d.b.and(mask, there);
            let mask = d.b.and(mask, known);
            let (place, inside) = moves.element(d, &at[1..], &tap[1..], mask);
            let each = d.b.int(each);
            let first = d.b.mul(lead[0], each);
            let channel = d.b.add(first, tap[0]);
            let (images, channels) = (d.size(&x.dims[0]), d.size(&x.dims[1]));
            let within = d.b.within(channel, channels);
            let image = d.b.within(at[0], images);
            let inside = d.b.and(inside, within);
            let inside = d.b.and(inside, image);
            let place: Vec<Value> = [at[0], channel].into_iter().chain(place).collect();
            d.b.load(read, &place, Some(inside))
        })
    }

    fn finish(&self, d: &mut Draft<'_>, places: &[Amount]) -> Box<Finish<'static>> {
        let (op, to) = (self.op, self.to.clone());
        let bias = op.bias.then(|| d.read(&self.from[2]));
        let addend = op.addend.then(|| {
            let own = channels_first(&self.from[op.arity() - 1], op.channels_last);
            d.read(&Operand { dims: to.dims.clone(), ..own })
        });
        let write = d.write(&to);
        let (places, each, kind) = (places.to_vec(), self.channels[1] as i32, op.activation);
        Box::new(move |d, at, mask, sums| {
            let each = d.b.int(each);
            let first = d.b.mul(at[0], each);
            let channel = d.b.add(first, at[2]);
            let (place, there) = d.coordinates(at[1], &places);
            let outputs = d.size(&to.dims[1]);
            let known = d.b.within(channel, outputs);
            let mask = d.b.and(mask, there);
            let mask = d.b.and(mask, known);
            let at: Vec<Value> = [place[0], channel].iter().chain(&place[1..]).copied().collect();
            let mut y = sums[0];
            if let Some(view) = bias {
                let bias = d.b.load(view, &[channel], Some(mask));
                y = d.b.add(y, bias);
            }
            if let Some(view) = addend {
                let addend = d.b.load(view, &at, Some(mask));
                y = d.b.add(y, addend);
            }
            let y = activation(d, kind, y);
            let y = d.rounded(to.dtype, y);
            d.b.store(write, &at, y, Some(mask));
        })
    }
}

/// `conv_transpose`: each element of the result gathers what would be added to it.
pub(super) struct GpuConvTranspose;

impl GpuOp for GpuConvTranspose {
    fn name(&self) -> &'static str {
        ConvTranspose::NAME
    }

    fn supports(&self, _op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        computes(inputs, outputs)
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<ConvTranspose>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        let (x, w) = (&from[0], &from[1]);
        let mut d = cx.draft("conv_transpose");
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &to.dims);
        let (read, weight, write) = (d.read(x), d.read(w), d.write(&to));
        let channels_each = x.dims[1].ceil_div(op.groups);
        let (channels, each, group_channels) =
            (d.size(&x.dims[1]), d.size(&w.dims[1]), d.size(&channels_each));
        let (outputs_each, per_group) = (d.b.arg(each), d.b.arg(group_channels));
        let group = d.b.div(at[1], outputs_each);
        let output = d.b.binary(BinaryFn::Rem, at[1], outputs_each);
        let first = d.b.mul(group, per_group);
        let taps: Vec<Amount> = [channels_each].into_iter().chain(w.dims[2..].iter().cloned()).collect();
        let zero = d.b.float(0.0);
        let mut y = total(&mut d, &taps, zero, |d, tap, known, sum| {
            let channel = d.b.add(first, tap[0]);
            let (within, own) = (d.b.within(channel, channels), d.b.within(output, each));
            let mask = d.b.and(inside, known);
            let mask = d.b.and(mask, within);
            let mask = d.b.and(mask, own);
            let (mut there, mut place) = (mask, vec![at[0], channel]);
            for axis in 0..x.dims.len() - 2 {
                let (stride, dilation) =
                    (d.b.int(op.strides[axis] as i32), d.b.int(op.dilations[axis] as i32));
                let before = d.b.int(op.before[axis] as i32);
                let offset = d.b.mul(tap[1 + axis], dilation);
                let shifted = d.b.add(at[2 + axis], before);
                let reach = d.b.sub(shifted, offset);
                let (rest, i) = (d.b.binary(BinaryFn::Rem, reach, stride), d.b.div(reach, stride));
                let nothing = d.b.int(0);
                let exact = d.b.binary(BinaryFn::Equal, rest, nothing);
                let extent = d.size(&x.dims[2 + axis]);
                let known = d.b.within(i, extent);
                there = d.b.and(there, exact);
                there = d.b.and(there, known);
                place.push(i);
            }
            let element = d.b.load(read, &place, Some(there));
            let own: Vec<Value> = [channel, output].iter().chain(&tap[1..]).copied().collect();
            let factor = d.b.load(weight, &own, Some(mask));
            let product = d.b.mul(element, factor);
            d.b.add(sum, product)
        });
        if op.bias {
            let view = d.read(&Operand { dims: vec![to.dims[1].clone()], ..from[2].clone() });
            let bias = d.b.load(view, &[at[1]], Some(inside));
            y = d.b.add(y, bias);
        }
        let y = d.rounded(to.dtype, y);
        d.b.store(write, &at, y, Some(inside));
        cx.launch(d, Amount::product(&to.dims).ceil_div(LANES as usize))
    }
}

/// `pool_window`.
pub(super) struct GpuPoolWindow;

impl GpuOp for GpuPoolWindow {
    fn name(&self) -> &'static str {
        PoolWindow::NAME
    }

    fn supports(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        use WindowPool::{Lp, Max, Mean};
        let Some(op) = op.as_any().downcast_ref::<PoolWindow>() else { return false };
        // The largest of integers is one of them, of whatever width.
        let held = inputs.iter().chain(&outputs[..1]).all(|s| element(s.dtype()).is_some());
        (held && op.kind == Max) || (computes(inputs, &outputs[..1]) && matches!(op.kind, Mean | Lp))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<PoolWindow>().ok_or_else(|| cx.mismatched())?;
        let x = channels_first(&cx.operand(&step.inputs[0]), op.channels_last);
        let to = channels_first(&cx.operand(&step.outputs[0]), op.channels_last);
        let mut d = cx.draft(format!("pool_window_{}", op.kind.name()));
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &to.dims);
        let (read, write) = (d.read(&x), d.write(&to));
        let before = op.before.iter().map(Amount::of_dim).collect();
        let (strides, dilations, extents) = (&op.strides, &op.dilations, &x.dims[2..]);
        let moves = Moves { strides, dilations, before, extents };
        let taps: Vec<Amount> = op.window.iter().map(|&d| Amount::Known(d)).collect();
        let lowest = number(&mut d, read, f64::NEG_INFINITY, i32::MIN);
        if op.indices {
            let numbers = channels_first(&cx.operand(&step.outputs[1]), op.channels_last);
            let write_numbers = d.write(&numbers);
            let largest = Largest { read, x: &x, column_major: op.column_major, lowest };
            let [value, index] = largest.find(&mut d, &moves, &taps, &at, inside);
            d.b.store(write, &at, value, Some(inside));
            d.b.store(write_numbers, &at, index, Some(inside));
            return cx.launch(d, Amount::product(&to.dims).ceil_div(LANES as usize));
        }
        let zero = number(&mut d, read, 0.0, 0);
        let first = if op.kind == WindowPool::Max { lowest } else { zero };
        let value = total(&mut d, &taps, first, |d, tap, known, so_far| {
            let mask = d.b.and(inside, known);
            let (place, there) = moves.element(d, &at[2..], tap, mask);
            let place: Vec<Value> = at[..2].iter().copied().chain(place).collect();
            let element = d.b.load(read, &place, Some(there));
            match op.kind {
                WindowPool::Max => {
                    let element = d.b.select(there, element, lowest);
                    d.b.binary(BinaryFn::Max, so_far, element)
                }
                WindowPool::Mean => d.b.add(so_far, element),
                _ => {
                    let (size, exponent) = (d.b.unary(UnaryFn::Abs, element), d.b.float(op.power));
                    let raised = power(d, size, exponent);
                    let raised = d.b.select(there, raised, zero);
                    d.b.add(so_far, raised)
                }
            }
        });
        let value = match op.kind {
            WindowPool::Max => value,
            WindowPool::Mean => {
                let count = self.count(&mut d, op, &moves, &at, inside);
                d.b.div(value, count)
            }
            _ => {
                let exponent = d.b.float(1.0 / op.power);
                power(&mut d, value, exponent)
            }
        };
        let value = d.rounded(to.dtype, value);
        d.b.store(write, &at, value, Some(inside));
        cx.launch(d, Amount::product(&to.dims).ceil_div(LANES as usize))
    }
}

impl GpuPoolWindow {
    /// How many elements of a window a mean is over.
    fn count(
        &self,
        d: &mut Draft<'_>,
        op: &PoolWindow,
        moves: &Moves<'_>,
        at: &[Value],
        inside: Value,
    ) -> Value {
        let taps: Vec<Amount> = op.window.iter().map(|&d| Amount::Known(d)).collect();
        let extents: Vec<Amount> = match op.count_added {
            true => (0..taps.len())
                .map(|axis| {
                    let padded = Amount::sum(&moves.before[axis], &moves.extents[axis]);
                    Amount::sum(&padded, &Amount::of_dim(&op.after[axis]))
                })
                .collect(),
            false => moves.extents.to_vec(),
        };
        let before = if op.count_added { vec![Amount::Known(0); taps.len()] } else { moves.before.clone() };
        let counted = Moves { before, extents: &extents, ..*moves };
        let (zero, one) = (d.b.float(0.0), d.b.float(1.0));
        total(d, &taps, zero, |d, tap, known, so_far| {
            let mask = d.b.and(inside, known);
            let (_, there) = counted.element(d, &at[2..], tap, mask);
            let added = d.b.select(there, one, zero);
            d.b.add(so_far, added)
        })
    }
}

/// The largest element of a window with its place.
struct Largest<'x> {
    read: ViewId,
    x: &'x Operand,
    column_major: bool,
    lowest: Value,
}

impl Largest<'_> {
    /// The element, and its number among all elements of the images with channels in front; the first of equal ones, -1 if there is none.
    fn find(
        &self,
        d: &mut Draft<'_>,
        moves: &Moves<'_>,
        taps: &[Amount],
        at: &[Value],
        inside: Value,
    ) -> [Value; 2] {
        let none = d.b.int(-1);
        let count = d.size(&Amount::product(taps));
        let (zero, end) = (d.b.int(0), d.b.arg(count));
        let best = d.repeat([zero, end], 1, &[self.lowest, none], |d, index, carried| {
            let (tap, known) = d.coordinates(index, taps);
            let mask = d.b.and(inside, known);
            let (place, there) = moves.element(d, &at[2..], &tap, mask);
            let number = self.number(d, at, &place);
            let coordinates: Vec<Value> = at[..2].iter().copied().chain(place).collect();
            let element = d.b.load(self.read, &coordinates, Some(there));
            let first = d.b.less(carried[1], zero);
            let larger = d.b.less(carried[0], element);
            let mut above = d.b.binary(BinaryFn::Or, first, larger);
            if d.b.ty(element).element == Element::F32 {
                let (nan, before) =
                    (d.b.unary(UnaryFn::IsNan, element), d.b.unary(UnaryFn::IsNan, carried[0]));
                let number = d.b.unary(UnaryFn::Not, before);
                let only = d.b.and(nan, number);
                above = d.b.binary(BinaryFn::Or, above, only);
            }
            let takes = d.b.and(there, above);
            vec![d.b.select(takes, element, carried[0]), d.b.select(takes, number, carried[1])]
        });
        [best[0], best[1]]
    }

    fn number(&self, d: &mut Draft<'_>, at: &[Value], place: &[Value]) -> Value {
        let dims = self.x.dims.clone();
        let mut steps: Vec<Amount> = super::contiguous(&dims[2..]);
        if self.column_major {
            steps = (0..dims.len() - 2).map(|axis| Amount::product(&dims[2..2 + axis])).collect();
        }
        let (plane, channel) = (Amount::product(&dims[2..]), Amount::product(&dims[1..]));
        let parts = at[..2].iter().chain(place).zip([channel, plane].into_iter().chain(steps));
        let mut number = d.b.int(0);
        for (&coordinate, step) in parts {
            let step = d.size(&step);
            let step = d.b.arg(step);
            let offset = d.b.mul(coordinate, step);
            number = d.b.add(number, offset);
        }
        number
    }
}
