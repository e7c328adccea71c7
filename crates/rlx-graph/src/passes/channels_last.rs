//! Images are kept with their channels adjacent.
//!
//! Needs: every fusion that looks for a convolution's surroundings has run. Does: convolutions and pooling that the target runs so
//! take channels last; elementwise ops, joins, slices, picks, ends and reductions of their results follow. Leaves: transposes where such
//! values come from or go to other ops.

use crate::ids::{NodeId, ValueId};
use crate::op::OpDef;
use crate::ops::Op;
use crate::ops::concat::Concat;
use crate::ops::conv::Conv;
use crate::ops::gather::Gather;
use crate::ops::integer_conv::IntegerConv;
use crate::ops::pad::Pad;
use crate::ops::pool_window::PoolWindow;
use crate::ops::reduce::Reduce;
use crate::ops::reshape::Reshape;
use crate::ops::slice::Slice;
use crate::ops::transpose::Transpose;
use crate::passes::{PassCx, PassError, Target};
use crate::rewrite::driver::apply;

use crate::rewrite::{Draft, Operand, Patch};
use crate::window::Layout;
use rlx_tensor::{Dim, Shape};

const LAST: Layout = Layout { channels_last: true };

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    let first = draft.node_count();
    for id in draft.schedule()? {
        if !draft.is_live(id) {
            continue;
        }
        let patch = Turn { draft, first, id, patch: Patch::new() }.patch(cx.target);
        if let Some(patch) = patch {
            apply(draft, "channels_last", id, &patch, cx.trace);
        }
    }
    Ok(())
}

/// Where an axis of an image stands when channels are last.
fn moved(axis: usize, rank: usize) -> usize {
    match axis {
        0 => 0,
        1 => rank - 1,
        _ => axis - 1,
    }
}

/// Dims, or anything there is one of for each axis, when channels are last.
fn moved_all<T: Clone>(front: &[T]) -> Vec<T> {
    LAST.permutation(front.len(), false).iter().map(|&axis| front[axis].clone()).collect()
}

/// One node about to be turned.
struct Turn<'d> {
    draft: &'d Draft,
    /// The first node that this pass added.
    first: usize,
    id: NodeId,
    patch: Patch,
}

impl Turn<'_> {
    fn patch(self, target: &dyn Target) -> Option<Patch> {
        let node = self.draft.node(self.id);
        let &[result, ..] = node.outputs() else { return None };
        let rank = self.draft.shape(result).rank();
        let op = node.op();
        if let Some(transpose) = op.downcast::<Transpose>() {
            let back = transpose.perm == LAST.permutation(rank, false);
            let turned = self.turned(node.inputs()[0]).filter(|_| back && rank > 2)?;
            return Some(Patch::redirect(result, turned));
        }
        if let Some(conv) = op.downcast::<Conv>() {
            return self.conv(conv, target);
        }
        if let Some(conv) = op.downcast::<IntegerConv>() {
            return self.integer_conv(conv, target);
        }
        if let Some(pool) = op.downcast::<PoolWindow>() {
            let op = PoolWindow { channels_last: true, ..pool.clone() };
            let runs = self.runs(target, &op, &[node.inputs()[0]]) && !pool.indices && !pool.channels_last;
            return if runs { self.each_turned(op.into()) } else { None };
        }
        if !node.inputs().iter().any(|&v| self.turned(v).is_some()) || node.outputs().len() != 1 {
            return None;
        }
        if let Some(reduce) = op.downcast::<Reduce>() {
            return self.reduce(reduce);
        }
        if let Some(reshape) = op.downcast::<Reshape>() {
            return self.reshape(reshape);
        }
        if let Some(concat) = op.downcast::<Concat>() {
            let most = node.inputs().iter().filter(|&&v| self.turned(v).is_some()).count();
            let op = Concat { axis: moved(concat.axis, rank) };
            return if most * 2 >= node.inputs().len() { self.each_turned(op.into()) } else { None };
        }
        if let Some(slice) = op.downcast::<Slice>() {
            let axis = moved(slice.axis.unwrap_or(rank - 1), rank);
            let axis = (axis + 1 != rank).then_some(axis);
            return self.each_turned(Slice { axis, ..slice.clone() }.into());
        }
        if let Some(gather) = op.downcast::<Gather>() {
            return self.gather(gather, rank);
        }
        if let Some(pad) = op.downcast::<Pad>() {
            let (before, after) = (moved_all(&pad.before), moved_all(&pad.after));
            return self.each_turned(Pad { before, after, ..pad.clone() }.into());
        }
        if op.def().props().elementwise { self.elementwise() } else { None }
    }

    /// The value with channels last that an image was turned from.
    fn turned(&self, value: ValueId) -> Option<ValueId> {
        let producer = self.draft.producer(value).filter(|id| id.index() >= self.first)?;
        let node = self.draft.node(producer);
        let transpose = node.op().downcast::<Transpose>()?;
        (transpose.perm == LAST.permutation(self.draft.shape(value).rank(), true)).then(|| node.inputs()[0])
    }

    /// A value with channels last: the one there is, or a transposed one.
    fn last(&mut self, value: ValueId) -> Operand {
        match self.turned(value) {
            Some(turned) => turned.into(),
            None => {
                let perm = LAST.permutation(self.draft.shape(value).rank(), false);
                self.patch.add(Transpose { perm }, &[value.into()])
            }
        }
    }

    /// The node's result is that of a new node, turned back.
    fn finish(mut self, op: Op, inputs: &[Operand]) -> Option<Patch> {
        let result = self.draft.node(self.id).outputs()[0];
        let perm = LAST.permutation(self.draft.shape(result).rank(), true);
        let turned = self.patch.add(op, inputs);
        let back = self.patch.add(Transpose { perm }, &[turned]);
        self.patch.replace(result, back);
        Some(self.patch)
    }

    /// The node as another op over its operands with channels last.
    fn each_turned(mut self, op: Op) -> Option<Patch> {
        let inputs = self.draft.node(self.id).inputs().to_vec();
        let inputs: Vec<Operand> = inputs.into_iter().map(|v| self.last(v)).collect();
        self.finish(op, &inputs)
    }

    fn runs(&self, target: &dyn Target, op: &dyn OpDef, images: &[ValueId]) -> bool {
        let node = self.draft.node(self.id);
        let shape = |v: &ValueId, image: bool| {
            let shape = self.draft.shape(*v);
            if image { Shape::from_dims(moved_all(shape.dims()), shape.dtype()) } else { shape.clone() }
        };
        let inputs: Vec<Shape> = node.inputs().iter().map(|v| shape(v, images.contains(v))).collect();
        let result = shape(&node.outputs()[0], true);
        target.runs(op, &inputs.iter().collect::<Vec<_>>(), &[&result])
    }

    fn conv(mut self, conv: &Conv, target: &dyn Target) -> Option<Patch> {
        let inputs = self.draft.node(self.id).inputs().to_vec();
        let addend = conv.addend.then(|| inputs[conv.arity() - 1]);
        let images: Vec<ValueId> = [inputs[0]].into_iter().chain(addend).collect();
        let op = Conv { channels_last: true, ..conv.clone() };
        if conv.channels_last || !self.draft.is_weight(inputs[1]) || !self.runs(target, &op, &images) {
            return None;
        }
        let mut operands: Vec<Operand> = inputs.iter().map(|&v| v.into()).collect();
        operands[0] = self.last(inputs[0]);
        if let Some(addend) = addend {
            operands[conv.arity() - 1] = self.last(addend);
        }
        self.finish(op.into(), &operands)
    }

    fn integer_conv(mut self, conv: &IntegerConv, target: &dyn Target) -> Option<Patch> {
        let inputs = self.draft.node(self.id).inputs().to_vec();
        let op = IntegerConv { channels_last: true, ..conv.clone() };
        if conv.channels_last || !self.draft.is_weight(inputs[1]) || !self.runs(target, &op, &inputs[..1]) {
            return None;
        }
        let mut operands: Vec<Operand> = inputs.iter().map(|&v| v.into()).collect();
        operands[0] = self.last(inputs[0]);
        self.finish(op.into(), &operands)
    }

    /// Lines, columns or channels picked by a list.
    fn gather(mut self, gather: &Gather, rank: usize) -> Option<Patch> {
        let &[x, indices] = self.draft.node(self.id).inputs() else { return None };
        if self.draft.shape(indices).rank() != 1 || self.turned(x).is_none() {
            return None;
        }
        let inputs = [self.last(x), indices.into()];
        self.finish(Gather { axis: moved(gather.axis, rank) }.into(), &inputs)
    }

    fn reduce(mut self, reduce: &Reduce) -> Option<Patch> {
        let node = self.draft.node(self.id);
        let (x, result) = (node.inputs()[0], node.outputs()[0]);
        let rank = self.draft.shape(x).rank();
        let mut axes: Vec<usize> = reduce.axes.iter().map(|&axis| moved(axis, rank)).collect();
        axes.sort_unstable();
        let op = Reduce { axes, ..reduce.clone() };
        if reduce.keep_dims {
            return self.each_turned(op.into());
        }
        let kept = (0..rank).filter(|axis| !reduce.axes.contains(axis)).map(|axis| moved(axis, rank));
        if !kept.is_sorted() {
            return None;
        }
        let x = self.last(x);
        let y = self.patch.add(op, &[x]);
        self.patch.replace(result, y);
        Some(self.patch)
    }

    /// Pixels of one image in a row, or a single pixel in any form.
    fn reshape(mut self, reshape: &Reshape) -> Option<Patch> {
        let node = self.draft.node(self.id);
        let (x, result) = (node.inputs()[0], node.outputs()[0]);
        let dims = self.draft.shape(x).dims();
        if dims[2..].iter().all(|d| *d == 1) {
            let x = self.last(x);
            let y = self.patch.add(reshape.clone(), &[x]);
            self.patch.replace(result, y);
            return Some(self.patch);
        }
        let pixels = dims[2..].iter().fold(Dim::Known(1), |product, d| &product * d);
        if reshape.dims != [dims[0].clone(), dims[1].clone(), pixels.clone()] {
            return None;
        }
        let op = Reshape { dims: vec![dims[0].clone(), pixels, dims[1].clone()] };
        self.each_turned(op.into())
    }

    fn elementwise(mut self) -> Option<Patch> {
        let node = self.draft.node(self.id);
        let rank = self.draft.shape(node.outputs()[0]).rank();
        // An image of fewer axes has its channels elsewhere once it is broadcast.
        let image = |v: &ValueId| self.draft.shape(*v).rank() == rank && self.turned(*v).is_some();
        if rank < 3 || !node.inputs().iter().any(image) {
            return None;
        }
        let mut inputs = Vec::with_capacity(node.inputs().len());
        for &value in node.inputs() {
            let dims = self.draft.shape(value).dims();
            inputs.push(if dims.iter().all(|d| *d == 1) && dims.len() < 2 {
                value.into()
            } else {
                let mut front = vec![Dim::Known(1); rank - dims.len()];
                front.extend_from_slice(dims);
                let others = front.iter().enumerate().filter(|(axis, d)| *axis != 1 && **d != 1).count();
                match () {
                    () if dims.len() == rank && self.turned(value).is_some() => self.last(value),
                    () if others == 0 => self.patch.add(Reshape { dims: moved_all(&front) }, &[value.into()]),
                    () if dims.len() == rank => self.last(value),
                    () => {
                        let whole = self.patch.add(Reshape { dims: front }, &[value.into()]);
                        self.patch.add(Transpose { perm: LAST.permutation(rank, false) }, &[whole])
                    }
                }
            });
        }
        let op = self.draft.node(self.id).op().clone();
        self.finish(op, &inputs)
    }
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn a_block_of_an_image_classifier() {
        let before = r#"graph "g" {
  input @x : f32[batch, 2, 5]
  param @w : f32[4, 2, 3]
  param @s : f32[4, 1]
  %3 : f32[batch, 4, 5] = conv(@x, @w) {strides=[1], dilations=[1], before=dims[1], after=dims[1], groups=1, bias=false, addend=false, activation=relu, channels_last=false}
  %4 : f32[batch, 4, 5] = binary(%3, @s) {kind=mul}
  %5 : f32[batch, 8, 5] = concat(%3, %4) {axis=1}
  %6 : f32[batch, 8] = reduce(%5) {kind=mean, axes=[2], keep_dims=false}
  return "y": %6
}"#;
        insta::assert_snapshot!(after(&["channels_last", "dce"], before), @r#"
        graph "g" {
          input @x : f32[batch, 2, 5]
          param @w : f32[4, 2, 3]
          param @s : f32[4, 1]
          %3 : f32[batch, 5, 2] = transpose(@x) {perm=[0, 2, 1]}
          %4 : f32[batch, 5, 4] = conv(%3, @w) {strides=[1], dilations=[1], before=dims[1], after=dims[1], groups=1, bias=false, addend=false, activation=relu, channels_last=true}
          %5 : f32[1, 1, 4] = reshape(@s) {dims=dims[1, 1, 4]}
          %6 : f32[batch, 5, 4] = binary(%4, %5) {kind=mul}
          %7 : f32[batch, 5, 8] = concat(%4, %6) {axis=2}
          %8 : f32[batch, 8] = reduce(%7) {kind=mean, axes=[1], keep_dims=false}
          return "y": %8
        }
        "#);
    }

    #[test]
    fn patches_become_rows() {
        let before = r#"graph "g" {
  input @x : f32[1, 3, 4, 6]
  param @w : f32[5, 3, 2, 2]
  %2 : f32[1, 5, 2, 3] = conv(@x, @w) {strides=[2, 2], dilations=[1, 1], before=dims[0, 0], after=dims[0, 0], groups=1, bias=false, addend=false, activation=identity, channels_last=false}
  %3 : f32[1, 5, 6] = reshape(%2) {dims=dims[1, 5, 6]}
  %4 : f32[1, 6, 5] = transpose(%3) {perm=[0, 2, 1]}
  return "y": %4
}"#;
        insta::assert_snapshot!(after(&["channels_last", "dce"], before), @r#"
        graph "g" {
          input @x : f32[1, 3, 4, 6]
          param @w : f32[5, 3, 2, 2]
          %2 : f32[1, 4, 6, 3] = transpose(@x) {perm=[0, 2, 3, 1]}
          %3 : f32[1, 2, 3, 5] = conv(%2, @w) {strides=[2, 2], dilations=[1, 1], before=dims[0, 0], after=dims[0, 0], groups=1, bias=false, addend=false, activation=identity, channels_last=true}
          %4 : f32[1, 6, 5] = reshape(%3) {dims=dims[1, 6, 5]}
          return "y": %4
        }
        "#);
    }

    #[test]
    fn an_image_of_a_line_broadcast_over_images_stays() {
        let before = r#"graph "g" {
  input @x : f32[2, 2, 5]
  input @y : f32[2, 2, 1, 3]
  param @w : f32[2, 2, 3]
  %3 : f32[2, 2, 3] = conv(@x, @w) {strides=[1], dilations=[1], before=dims[0], after=dims[0], groups=1, bias=false, addend=false, activation=identity, channels_last=false}
  %4 : f32[2, 2, 2, 3] = binary(@y, %3) {kind=add}
  return "y": %4
}"#;
        insta::assert_snapshot!(after(&["channels_last", "dce"], before), @r#"
        graph "g" {
          input @x : f32[2, 2, 5]
          input @y : f32[2, 2, 1, 3]
          param @w : f32[2, 2, 3]
          %3 : f32[2, 5, 2] = transpose(@x) {perm=[0, 2, 1]}
          %4 : f32[2, 3, 2] = conv(%3, @w) {strides=[1], dilations=[1], before=dims[0], after=dims[0], groups=1, bias=false, addend=false, activation=identity, channels_last=true}
          %5 : f32[2, 2, 3] = transpose(%4) {perm=[0, 2, 1]}
          %6 : f32[2, 2, 2, 3] = binary(@y, %5) {kind=add}
          return "y": %6
        }
        "#);
    }

    #[test]
    fn what_follows_no_image_stays() {
        let before = r#"graph "g" {
  input @x : f32[1, 3, 4, 6]
  %1 : f32[1, 6, 3, 4] = transpose(@x) {perm=[0, 3, 1, 2]}
  %2 : f32[1, 6, 3, 4] = unary(%1) {kind=exp}
  return "y": %2
}"#;
        assert!(fired("channels_last", before).is_empty());
    }
}
