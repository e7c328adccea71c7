//! Rotary positions: a lane an element.

use super::{Amount, GpuOp, LANES, LowerCx, Operand};
use crate::ir::{BinaryFn, UnaryFn};
use rlx::backend::BackendError;
use rlx::plan::StepSpec;
use rlx_graph::OpDef;
use rlx_graph::op::OpAttrs;
use rlx_graph::ops::rope::{Rope, RopeStyle};
use rlx_graph::ops::rope_angles::RopeAngles;
use rlx_tensor::Shape;

/// `rope`.
pub(super) struct GpuRope;

impl GpuOp for GpuRope {
    fn name(&self) -> &'static str {
        Rope::NAME
    }

    fn supports(&self, op: &dyn OpDef, _inputs: &[&Shape], _outputs: &[&Shape]) -> bool {
        let style = op.as_any().downcast_ref::<Rope>().map(|r| r.style);
        style.is_some_and(|s| matches!(s, RopeStyle::Neox | RopeStyle::GptJ))
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<Rope>().ok_or_else(|| cx.mismatched())?;
        let from = cx.inputs(step);
        let heads = |o: &Operand| o.split_last(op.heads, Amount::Known(op.head_dim));
        let (x, to) = (heads(&from[0]), heads(&cx.operand(&step.outputs[0])));
        let rows = x.dims[0].clone();
        let angles = Operand { dims: vec![rows, Amount::Known(op.rotary_dim)], ..from[1].clone() };
        let mut d = cx.draft("rope");
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &x.dims);
        let (read, turn, write) = (d.read(&x), d.read(&angles), d.write(&to));
        let (dim, rotary) = (d.size(&Amount::Known(op.head_dim)), d.size(&Amount::Known(op.rotary_dim)));
        let b = &mut d.b;
        let i = at[2];
        let (half, one, two, zero) = (b.int(op.rotary_dim as i32 / 2), b.int(1), b.int(2), b.int(0));
        let (first, pair, distance) = match op.style {
            RopeStyle::Neox => (b.less(i, half), b.binary(BinaryFn::Rem, i, half), half),
            _ => {
                let odd = b.binary(BinaryFn::Rem, i, two);
                (b.binary(BinaryFn::Equal, odd, zero), b.div(i, two), one)
            }
        };
        let (after, before) = (b.add(i, distance), b.sub(i, distance));
        let partner = b.select(first, after, before);
        let (turned, there) = (b.within(i, rotary), b.within(partner, dim));
        let mask = b.and(inside, turned);
        let with_partner = b.and(mask, there);
        let own = b.load(read, &at, Some(inside));
        let other = b.load(read, &[at[0], at[1], partner], Some(with_partner));
        let sine_at = b.add(pair, half);
        let (cosine_there, sine_there) = (b.within(pair, rotary), b.within(sine_at, rotary));
        let (cosine_mask, sine_mask) = (b.and(mask, cosine_there), b.and(mask, sine_there));
        let cosine = b.load(turn, &[at[0], pair], Some(cosine_mask));
        let sine = b.load(turn, &[at[0], sine_at], Some(sine_mask));
        let (along, across) = (b.mul(own, cosine), b.mul(other, sine));
        let (less, more) = (b.sub(along, across), b.add(along, across));
        let rotated = b.select(first, less, more);
        let y = b.select(mask, rotated, own);
        b.store(write, &at, y, Some(inside));
        cx.launch(d, Amount::product(&x.dims).ceil_div(LANES as usize))
    }
}

/// `rope_angles`.
pub(super) struct GpuRopeAngles;

impl GpuOp for GpuRopeAngles {
    fn name(&self) -> &'static str {
        RopeAngles::NAME
    }

    fn lower(&self, cx: &mut LowerCx<'_>, step: &StepSpec) -> Result<(), BackendError> {
        let op = step.op.downcast::<RopeAngles>().ok_or_else(|| cx.mismatched())?;
        let (from, to) = (cx.inputs(step), cx.operand(&step.outputs[0]));
        let half = from[1].dims[0].clone();
        let dims = vec![to.dims[0].clone(), half.clone()];
        let sines = Operand { dims: dims.clone(), ..to.shifted(&half) };
        let cosines = Operand { dims: dims.clone(), ..to };
        let mut d = cx.draft("rope_angles");
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, &dims);
        let (positions, frequencies) = (d.read(&from[0]), d.read(&from[1]));
        let writes = [d.write(&cosines), d.write(&sines)];
        let b = &mut d.b;
        let position = b.load(positions, &at[..1], Some(inside));
        let position = b.unary(UnaryFn::ToFloat, position);
        let frequency = b.load(frequencies, &at[1..], Some(inside));
        let (angle, scale) = (b.mul(position, frequency), b.float(op.scale));
        for (view, function) in writes.into_iter().zip([UnaryFn::Cos, UnaryFn::Sin]) {
            let turned = b.unary(function, angle);
            let y = b.mul(turned, scale);
            b.store(view, &at, y, Some(inside));
        }
        cx.launch(d, Amount::product(&dims).ceil_div(LANES as usize))
    }
}
