//! Elements copied through other strides: slices, transposes, broadcasts, joins and pads.

use super::walk::{MAX_RANK, Steps, Walk, broadcast_steps, extents, own_steps};
use crate::copy::{CopyArgs, copy_entry};
use crate::isa::{Entry, Isa};
use crate::pool::Team;
use crate::schedule::{Access, Operand, Run, Step, StepError};
use std::any::Any;

/// Which element of the source an element of the result is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum View {
    /// `start + i * step` along one axis.
    Slice {
        /// The axis.
        axis: usize,
        /// First element.
        start: usize,
        /// Distance between elements, at least 1.
        step: usize,
    },
    /// Axis i of the result is axis `perm[i]` of the source.
    Transpose {
        /// A permutation of the axes.
        perm: Vec<usize>,
    },
    /// Missing leading axes and axes of extent 1 are repeated.
    Broadcast,
}

impl View {
    fn name(&self) -> &'static str {
        match self {
            View::Slice { .. } => "slice",
            View::Transpose { .. } => "transpose",
            View::Broadcast => "broadcast",
        }
    }

    /// The source's offset and steps in the result's shape; `None` where the sizes do not fit.
    fn steps(&self, run: &Run<'_>, from: &Operand, shape: &[usize]) -> Option<(usize, Steps)> {
        let (dims, rank) = extents(run, from);
        let own = own_steps(run, from);
        let mut steps = own;
        let same = |d: usize| dims[d] == shape[d];
        match self {
            View::Broadcast => return broadcast_steps(run, from, shape).map(|steps| (0, steps)),
            View::Slice { axis, start, step } => {
                let reach = shape[*axis]
                    .checked_sub(1)
                    .map_or(Some(0), |n| n.checked_mul(*step)?.checked_add(*start)?.checked_add(1))?;
                let fits = shape.len() == rank && (0..rank).all(|d| d == *axis || same(d));
                if !fits || reach > dims[*axis] {
                    return None;
                }
                steps[*axis] *= isize::try_from(*step).ok()?;
                let offset = if shape[*axis] == 0 { 0 } else { start * own[*axis] as usize };
                return Some((offset, steps));
            }
            View::Transpose { perm } => {
                for (d, &axis) in perm.iter().enumerate() {
                    if shape[d] != dims[axis] {
                        return None;
                    }
                    steps[d] = own[axis];
                }
            }
        }
        Some((0, steps))
    }
}

/// A copy through a [`View`].
#[derive(Debug)]
pub struct ViewStep {
    isa: Isa,
    entry: Entry<CopyArgs>,
    view: View,
    from: Operand,
    to: Operand,
}

fn copyable(from: &Operand, to: &Operand) -> bool {
    from.dtype == to.dtype
        && matches!(to.dtype.element_bytes(), Some(1 | 2 | 4 | 8))
        && to.stride.is_none()
        && from.dims.len() <= MAX_RANK
        && to.dims.len() <= MAX_RANK
}

impl ViewStep {
    /// The step for an instruction set; `None` if dtypes differ, the view does not fit the rank or there are too many dims.
    pub fn new(isa: Isa, view: View, from: Operand, to: Operand) -> Option<Self> {
        let rank = from.dims.len();
        let fits = match &view {
            View::Slice { axis, .. } => *axis < rank && to.dims.len() == rank,
            View::Transpose { perm } => {
                perm.len() == rank && to.dims.len() == rank && (0..rank).all(|axis| perm.contains(&axis))
            }
            View::Broadcast => true,
        };
        if !fits || !copyable(&from, &to) {
            return None;
        }
        Some(Self { isa, entry: copy_entry(isa)?, view, from, to })
    }
}

impl Step for ViewStep {
    fn name(&self) -> String {
        format!("{}_{}_{}", self.view.name(), self.to.dtype, self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.from, Access::Read);
        visit(&self.to, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (shape, rank) = extents(run, &self.to);
        let shape = &shape[..rank];
        let found = self.view.steps(run, &self.from, shape);
        let (offset, steps) = found.ok_or_else(|| StepError::Shape { step: self.name() })?;
        let walk = Walk::<2>::new(shape, 2, &[steps, own_steps(run, &self.to)]);
        let args = CopyArgs {
            element_bytes: self.to.element_bytes(),
            from: walk
                .placed(0, run.pointer::<u8>(&self.from).wrapping_add(offset * self.to.element_bytes())),
            to: walk.placed(1, run.pointer(&self.to)),
            outer: walk.outer,
            cols: walk.cols,
        };
        for tile in team.tiles(args.tiles()) {
            // SAFETY: the launch checked that both operands lie in their regions and do not overlap; the view was checked to stay
            // inside the source; tiles are disjoint.
            unsafe { (self.entry)(&args, tile) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Values joined along one axis.
#[derive(Debug)]
pub struct ConcatStep {
    isa: Isa,
    entry: Entry<CopyArgs>,
    axis: usize,
    inputs: Vec<Operand>,
    to: Operand,
}

impl ConcatStep {
    /// The step for an instruction set; `None` if dtypes or ranks differ or there are too many dims.
    pub fn new(isa: Isa, axis: usize, inputs: Vec<Operand>, to: Operand) -> Option<Self> {
        let rank = to.dims.len();
        let fits = inputs.iter().all(|i| copyable(i, &to) && i.dims.len() == rank) && axis < rank;
        if !fits || inputs.is_empty() {
            return None;
        }
        Some(Self { isa, entry: copy_entry(isa)?, axis, inputs, to })
    }

    /// The copy of one operand to where it starts along the axis.
    fn part(&self, run: &Run<'_>, operand: &Operand, start: usize) -> CopyArgs {
        let (shape, rank) = extents(run, operand);
        let target = own_steps(run, &self.to);
        let walk = Walk::<2>::new(&shape[..rank], 2, &[own_steps(run, operand), target]);
        let offset = start * target[self.axis] as usize * self.to.element_bytes();
        CopyArgs {
            element_bytes: self.to.element_bytes(),
            from: walk.placed(0, run.pointer(operand)),
            to: walk.placed(1, run.pointer::<u8>(&self.to).wrapping_add(offset)),
            outer: walk.outer,
            cols: walk.cols,
        }
    }

    fn extent(&self, run: &Run<'_>, operand: &Operand) -> usize {
        extents(run, operand).0[self.axis]
    }
}

impl Step for ConcatStep {
    fn name(&self) -> String {
        format!("concat_{}_{}", self.to.dtype, self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        self.inputs.iter().for_each(|operand| visit(operand, Access::Read));
        visit(&self.to, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let (shape, rank) = extents(run, &self.to);
        let (mut joined, mut total) = (0usize, 0usize);
        for operand in &self.inputs {
            let (dims, _) = extents(run, operand);
            if (0..rank).any(|d| d != self.axis && dims[d] != shape[d]) {
                return Err(StepError::Shape { step: self.name() });
            }
            total += self.part(run, operand, 0).tiles();
            joined = joined.saturating_add(dims[self.axis]);
        }
        if joined != shape[self.axis] {
            return Err(StepError::Shape { step: self.name() });
        }
        let (mut at, mut start, mut base) = (0, 0, 0);
        let mut part = self.part(run, &self.inputs[0], 0);
        for tile in team.tiles(total) {
            while tile - base >= part.tiles() {
                base += part.tiles();
                start += self.extent(run, &self.inputs[at]);
                at += 1;
                part = self.part(run, &self.inputs[at], start);
            }
            // SAFETY: the launch checked that operands lie in their regions and do not overlap the result; extents were checked
            // above, so each part stays inside the result and apart from the others; tiles are disjoint.
            unsafe { (self.entry)(&part, tile - base) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A value surrounded by a constant.
#[derive(Debug)]
pub struct PadStep {
    isa: Isa,
    entry: Entry<CopyArgs>,
    before: Vec<usize>,
    fill: [u8; 8],
    from: Operand,
    to: Operand,
}

impl PadStep {
    /// The step for an instruction set; `fill` starts with the bytes of one element. `None` if dtypes or ranks differ or there
    /// are too many dims.
    pub fn new(isa: Isa, before: Vec<usize>, fill: [u8; 8], from: Operand, to: Operand) -> Option<Self> {
        if !copyable(&from, &to) || from.dims.len() != to.dims.len() || before.len() != to.dims.len() {
            return None;
        }
        Some(Self { isa, entry: copy_entry(isa)?, before, fill, from, to })
    }
}

/// The element a pad repeats, aligned for every element size.
#[repr(align(8))]
struct Fill([u8; 8]);

impl Step for PadStep {
    fn name(&self) -> String {
        format!("pad_{}_{}", self.to.dtype, self.isa)
    }

    fn operands(&self, visit: &mut dyn FnMut(&Operand, Access)) {
        visit(&self.from, Access::Read);
        visit(&self.to, Access::Write);
    }

    fn run(&self, run: &Run<'_>, team: &Team<'_>) -> Result<(), StepError> {
        let ((shape, rank), (dims, _)) = (extents(run, &self.to), extents(run, &self.from));
        let target = own_steps(run, &self.to);
        let inside = |d: usize| self.before[d].checked_add(dims[d]).is_some_and(|end| end <= shape[d]);
        if !(0..rank).all(inside) {
            return Err(StepError::Shape { step: self.name() });
        }
        let mut fill = Fill(self.fill);
        let walk = Walk::<2>::new(&shape[..rank], 2, &[[0; MAX_RANK], target]);
        let args = CopyArgs {
            element_bytes: self.to.element_bytes(),
            from: walk.placed(0, fill.0.as_mut_ptr()),
            to: walk.placed(1, run.pointer(&self.to)),
            outer: walk.outer,
            cols: walk.cols,
        };
        for tile in team.tiles(args.tiles()) {
            // SAFETY: the launch checked the result's bounds; the source is one element that is repeated; tiles are disjoint.
            unsafe { (self.entry)(&args, tile) };
        }
        team.barrier();
        let offset: usize = (0..rank).map(|d| self.before[d] * target[d] as usize).sum();
        let walk = Walk::<2>::new(&dims[..rank], 2, &[own_steps(run, &self.from), target]);
        let args = CopyArgs {
            element_bytes: self.to.element_bytes(),
            from: walk.placed(0, run.pointer(&self.from)),
            to: walk.placed(1, run.pointer::<u8>(&self.to).wrapping_add(offset * self.to.element_bytes())),
            outer: walk.outer,
            cols: walk.cols,
        };
        for tile in team.tiles(args.tiles()) {
            // SAFETY: as above; the source with what comes before it was checked to lie inside the result.
            unsafe { (self.entry)(&args, tile) };
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
