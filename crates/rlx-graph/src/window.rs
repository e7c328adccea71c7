//! Windows that move over the spatial axes of a value: how many positions they take, and which elements each sees.

use crate::op::{EvalError, InferCx, InferError};
use rlx_tensor::Dim;

/// A window along one axis, over an operand with elements added at both ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Axis<'a> {
    /// Elements of the window.
    pub size: &'a Dim,
    /// Elements from one position to the next.
    pub stride: usize,
    /// Elements from one element of the window to the next.
    pub dilation: usize,
    /// Elements added in front.
    pub before: &'a Dim,
    /// Elements added behind.
    pub after: &'a Dim,
    /// A last position that reaches past the end counts, if it starts before the elements behind.
    pub ceil: bool,
}

impl Axis<'_> {
    /// Elements from the window's first to behind its last.
    fn span(&self) -> Dim {
        &(self.size - &Dim::Known(1)) * &Dim::Known(self.dilation) + 1
    }

    /// Number of positions over an operand of this extent.
    pub fn positions(&self, extent: &Dim) -> Result<Dim, InferError> {
        let padded = &(extent + self.before) + self.after;
        let span = self.span();
        if let (Some(padded), Some(span)) = (padded.known(), span.known())
            && padded < span
        {
            let (left, right) = (Dim::Known(span), Dim::Known(padded));
            return Err(InferError::Dims { what: "a window and the extent it moves over", left, right });
        }
        let room = &padded - &span;
        if !self.ceil {
            return Ok(room.floor_div(self.stride) + 1);
        }
        let started = (extent + self.before).ceil_div(self.stride);
        Ok((room.ceil_div(self.stride) + 1).minimum(started))
    }
}

/// Checks that a list of an op has one entry for each spatial axis.
pub(crate) fn per_axis(name: &'static str, found: usize, axes: usize) -> Result<(), InferError> {
    if found == axes {
        return Ok(());
    }
    Err(InferError::Attribute { name, reason: format!("has {found} entries for {axes} spatial axes") })
}

/// Checks strides or dilations.
pub(crate) fn all_positive(name: &'static str, values: &[usize], axes: usize) -> Result<(), InferError> {
    per_axis(name, values.len(), axes)?;
    values.iter().try_for_each(|&v| InferError::positive(name, v))
}

/// The axes of a value of images: batch and channels stay, the rest are spatial.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// Channels are the last axis rather than the second.
    pub channels_last: bool,
}

impl Layout {
    /// The axis of the channels.
    pub fn channels(self, rank: usize) -> usize {
        if self.channels_last { rank - 1 } else { 1 }
    }

    /// The dims between or behind batch and channels.
    pub fn spatial<T>(self, dims: &[T]) -> &[T] {
        if self.channels_last { &dims[1..dims.len() - 1] } else { &dims[2..] }
    }

    /// Dims of a value.
    pub fn dims<T: Clone>(self, batch: &T, channels: &T, spatial: &[T]) -> Vec<T> {
        let mut dims = vec![batch.clone()];
        if !self.channels_last {
            dims.push(channels.clone());
        }
        dims.extend_from_slice(spatial);
        if self.channels_last {
            dims.push(channels.clone());
        }
        dims
    }

    /// The permutation that brings a value of this layout to channels in front (`true`) or back.
    pub fn permutation(self, rank: usize, to_front: bool) -> Vec<usize> {
        if !self.channels_last {
            return (0..rank).collect();
        }
        match to_front {
            true => [0, rank - 1].into_iter().chain(1..rank - 1).collect(),
            false => [0].into_iter().chain(2..rank).chain([1]).collect(),
        }
    }
}

/// Moves values between layouts; `dims` are those of `values`.
pub(crate) fn permuted<T: Copy>(values: &[T], dims: &[usize], perm: &[usize]) -> Vec<T> {
    let own = crate::eval::strides(dims);
    let target: Vec<usize> = perm.iter().map(|&axis| dims[axis]).collect();
    let mut counter = vec![0usize; target.len()];
    let mut result = Vec::with_capacity(values.len());
    for _ in 0..values.len() {
        result.push(values[counter.iter().zip(perm).map(|(c, &axis)| c * own[axis]).sum::<usize>()]);
        advance(&mut counter, &target);
    }
    result
}

/// The next index in row-major order.
pub(crate) fn advance(counter: &mut [usize], dims: &[usize]) {
    for axis in (0..dims.len()).rev() {
        counter[axis] += 1;
        if counter[axis] < dims[axis] {
            return;
        }
        counter[axis] = 0;
    }
}

/// Known sizes of windows over all spatial axes.
#[derive(Debug, Clone)]
pub(crate) struct Windows {
    /// Extents of the operand.
    pub extents: Vec<usize>,
    /// Positions of the window.
    pub positions: Vec<usize>,
    /// Elements of the window.
    pub sizes: Vec<usize>,
    /// Elements from one position to the next.
    pub strides: Vec<usize>,
    /// Elements from one element of the window to the next.
    pub dilations: Vec<usize>,
    /// Elements in front of each axis.
    pub before: Vec<usize>,
    /// Elements behind each axis.
    pub after: Vec<usize>,
}

impl Windows {
    /// Number of positions.
    pub fn count(&self) -> usize {
        self.positions.iter().product()
    }

    /// Number of elements of the window.
    pub fn taps(&self) -> usize {
        self.sizes.iter().product()
    }

    /// Visits, for each element of the window in order, the positions at which it is inside the operand, with the element it is
    /// there: `(tap, position, element)`.
    pub fn visit(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let axes = self.extents.len();
        let own = crate::eval::strides(&self.extents);
        let mut tap_at = vec![0usize; axes];
        for tap in 0..self.taps() {
            let mut at = vec![0usize; axes];
            for position in 0..self.count() {
                let mut element = Some(0);
                for axis in 0..axes {
                    let padded = at[axis] * self.strides[axis] + tap_at[axis] * self.dilations[axis];
                    let inside = padded.checked_sub(self.before[axis]).filter(|&i| i < self.extents[axis]);
                    element = element.zip(inside).map(|(e, i)| e + i * own[axis]);
                }
                if let Some(element) = element {
                    visit(tap, position, element);
                }
                advance(&mut at, &self.positions);
            }
            advance(&mut tap_at, &self.sizes);
        }
    }

    /// For each position, how many elements of its window are inside the operand with what was added at its ends.
    pub fn padded_counts(&self) -> Vec<usize> {
        let mut at = vec![0usize; self.extents.len()];
        let mut counts = Vec::with_capacity(self.count());
        for _ in 0..self.count() {
            let inside = |axis: usize| {
                let end = self.extents[axis] + self.before[axis] + self.after[axis];
                let start = at[axis] * self.strides[axis];
                (0..self.sizes[axis]).filter(|i| start + i * self.dilations[axis] < end).count()
            };
            counts.push((0..at.len()).map(inside).product());
            advance(&mut at, &self.positions);
        }
        counts
    }
}

/// Positions over an operand whose dims are known.
pub(crate) fn known_positions(cx: &[(Axis<'_>, usize)]) -> Result<Vec<usize>, EvalError> {
    let positions = cx.iter().map(|(axis, extent)| {
        let count = axis.positions(&Dim::Known(*extent)).map_err(|e| e.to_string())?;
        count.known().ok_or_else(|| format!("{count} is no number of positions"))
    });
    let positions: Result<Vec<usize>, String> = positions.collect();
    positions.map_err(|reason| EvalError::Value { operand: 0, reason })
}

/// Checks an operand of images: batch, channels and at least one spatial axis.
pub(crate) fn images(inputs: &[&rlx_tensor::Shape], operand: usize) -> Result<usize, InferError> {
    match inputs[operand].rank() {
        rank if rank >= 3 => Ok(rank - 2),
        found => Err(InferError::Rank { operand, expected: "at least 3".into(), found }),
    }
}

/// Requires the channels of an operand to be a multiple of the groups, as far as they are known.
pub(crate) fn divides(
    cx: &mut InferCx,
    what: &'static str,
    groups: usize,
    channels: &Dim,
) -> Result<Dim, InferError> {
    InferError::positive("groups", groups)?;
    let each = channels.floor_div(groups);
    cx.require_equal(what, &(&each * &Dim::Known(groups)), channels)?;
    Ok(each)
}
