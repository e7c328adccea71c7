//! How a step walks operands together: broadcast to one shape, dims merged where all allow it, nothing allocated.

use crate::elementwise::{MAX_OUTER, Placed};
use crate::schedule::{Operand, Run};

/// Dims an operand may have in steps that walk.
pub const MAX_RANK: usize = MAX_OUTER;

/// Elements between steps of each dim of the common shape.
pub(super) type Steps = [isize; MAX_RANK];

/// The walk of up to `N` operands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Walk<const N: usize> {
    /// Outer extents; unused ones are 1 and come first.
    pub outer: [usize; MAX_OUTER],
    /// Elements of the innermost run.
    pub cols: usize,
    /// Per operand, elements between steps of each outer dim.
    pub strides: [Steps; N],
    /// Per operand, 1 where the innermost run is contiguous, 0 where it is one element.
    pub inner: [u8; N],
}

/// The extents of an operand in a fixed array, and how many they are.
pub(super) fn extents(run: &Run<'_>, operand: &Operand) -> ([usize; MAX_RANK], usize) {
    let mut dims = [1; MAX_RANK];
    let mut rank = 0;
    for (dim, extent) in dims.iter_mut().zip(run.extents(operand)) {
        *dim = extent;
        rank += 1;
    }
    (dims, rank)
}

/// Elements between steps of each of an operand's own dims.
pub(super) fn own_steps(run: &Run<'_>, operand: &Operand) -> Steps {
    let (dims, rank) = extents(run, operand);
    let mut steps = [0; MAX_RANK];
    let mut step = 1;
    for d in (0..rank).rev() {
        steps[d] = step as isize;
        step = if d + 1 == rank { run.stride(operand) } else { step * dims[d] };
    }
    steps
}

/// Steps of an operand in a shape it broadcasts to; `None` if it does not.
pub(super) fn broadcast_steps(run: &Run<'_>, operand: &Operand, shape: &[usize]) -> Option<Steps> {
    let (dims, rank) = extents(run, operand);
    let own = own_steps(run, operand);
    let missing = shape.len().checked_sub(rank)?;
    let mut steps = [0; MAX_RANK];
    for d in 0..rank {
        match dims[d] {
            1 => {}
            extent if extent == shape[missing + d] => steps[missing + d] = own[d],
            _ => return None,
        }
    }
    Some(steps)
}

impl<const N: usize> Walk<N> {
    /// The walk of the first `count` operands over `shape`, of at most [`MAX_RANK`] dims.
    pub fn new(shape: &[usize], count: usize, steps: &[Steps; N]) -> Self {
        let mut sizes = [1; MAX_RANK];
        let mut merged = [[0; MAX_RANK]; N];
        let mut rank = 0;
        for d in (0..shape.len()).rev() {
            if shape[d] == 1 {
                continue;
            }
            let joins = |o: usize| rank > 0 && steps[o][d] == merged[o][rank - 1] * sizes[rank - 1] as isize;
            if rank > 0 && (0..count).all(joins) {
                sizes[rank - 1] *= shape[d];
                continue;
            }
            sizes[rank] = shape[d];
            (0..count).for_each(|o| merged[o][rank] = steps[o][d]);
            rank += 1;
        }
        let plain = rank > 0 && (0..count).all(|o| merged[o][0] == 0 || merged[o][0] == 1);
        let mut walk = Self { outer: [1; MAX_OUTER], cols: 1, strides: [[0; MAX_RANK]; N], inner: [1; N] };
        if plain {
            walk.cols = sizes[0];
            (0..count).for_each(|o| walk.inner[o] = merged[o][0] as u8);
        }
        for (at, d) in (usize::from(plain)..rank).zip((0..MAX_OUTER).rev()) {
            walk.outer[d] = sizes[at];
            (0..count).for_each(|o| walk.strides[o][d] = merged[o][at]);
        }
        walk
    }

    /// Operand `o`, which starts at `at`.
    pub fn placed(&self, o: usize, at: *mut u8) -> Placed {
        Placed { at, strides: self.strides[o], inner: self.inner[o] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elementwise::Layout;

    #[test]
    fn walks_as_the_allocating_layout_does() {
        let shapes: [&[usize]; 6] = [&[], &[1], &[7], &[3, 4], &[2, 3, 4], &[2, 1, 3, 5]];
        for shape in shapes {
            for mask in 0..1 << shape.len() {
                let (mut full, mut part) = ([0; MAX_RANK], [0; MAX_RANK]);
                let mut step = 1;
                for d in (0..shape.len()).rev() {
                    full[d] = step;
                    part[d] = if mask >> d & 1 == 1 { step } else { 0 };
                    step *= shape[d] as isize;
                }
                let walk = Walk::<2>::new(shape, 2, &[part, full]);
                let rank = shape.len();
                let layout = Layout::strided(shape, &[part[..rank].to_vec(), full[..rank].to_vec()]).unwrap();
                assert_eq!((walk.outer, walk.cols), (layout.outer, layout.cols), "{shape:?} {mask}");
                assert_eq!(walk.strides.to_vec(), layout.strides);
                assert_eq!(walk.inner.to_vec(), layout.inner);
            }
        }
    }
}
