use std::fmt;

/// Most outer dimensions of a [`Layout`].
pub const MAX_OUTER: usize = 6;

/// How operands are walked together: up to [`MAX_OUTER`] outer dimensions, then `cols` elements that are contiguous or
/// one repeated element, per operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Outer extents; unused ones are 1 and come first.
    pub outer: [usize; MAX_OUTER],
    /// Elements of the innermost run.
    pub cols: usize,
    /// Per operand, elements between steps of each outer dimension.
    pub strides: Vec<[isize; MAX_OUTER]>,
    /// Per operand, 1 when the innermost run is contiguous, 0 when it is one element.
    pub inner: Vec<u8>,
}

/// Why operands cannot be walked together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// Operand `operand` of shape `shape` does not broadcast to `to`.
    Broadcast {
        /// Number of the operand.
        operand: usize,
        /// Its shape.
        shape: Vec<usize>,
        /// The common shape.
        to: Vec<usize>,
    },
    /// More than [`MAX_OUTER`] outer dimensions remain after merging.
    Rank {
        /// Dimensions that remain.
        outer: usize,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayoutError::Broadcast { operand, shape, to } => {
                write!(f, "operand {operand} of shape {shape:?} does not broadcast to {to:?}")
            }
            LayoutError::Rank { outer } => {
                write!(f, "{outer} outer dimensions remain after merging, at most {MAX_OUTER} are supported")
            }
        }
    }
}

impl std::error::Error for LayoutError {}

impl Layout {
    /// Walks contiguous operands broadcast to `shape` by NumPy's rules.
    ///
    /// # Errors
    /// An operand that does not broadcast, or too many dimensions that cannot be merged.
    pub fn broadcast(shape: &[usize], operands: &[&[usize]]) -> Result<Layout, LayoutError> {
        let mut all = Vec::new();
        for (operand, dims) in operands.iter().enumerate() {
            let error = || LayoutError::Broadcast { operand, shape: dims.to_vec(), to: shape.to_vec() };
            let missing = shape.len().checked_sub(dims.len()).ok_or_else(error)?;
            let mut strides = vec![0isize; shape.len()];
            let mut step = 1isize;
            for (d, size) in dims.iter().enumerate().rev() {
                let target = shape[missing + d];
                if *size != target && *size != 1 {
                    return Err(error());
                }
                strides[missing + d] = if *size == 1 { 0 } else { step };
                step *= *size as isize;
            }
            all.push(strides);
        }
        Layout::strided(shape, &all)
    }

    /// Walks operands with one stride in elements per dimension of `shape`, merging dimensions where all allow it.
    ///
    /// # Errors
    /// Too many dimensions that cannot be merged.
    pub fn strided(shape: &[usize], strides: &[Vec<isize>]) -> Result<Layout, LayoutError> {
        // Dimensions from the innermost outwards: extent and one stride per operand.
        let mut dims: Vec<(usize, Vec<isize>)> = Vec::new();
        for d in (0..shape.len()).rev() {
            if shape[d] == 1 {
                continue;
            }
            let steps: Vec<isize> = strides.iter().map(|s| s[d]).collect();
            match dims.last_mut() {
                Some((size, inner))
                    if steps.iter().zip(inner.iter()).all(|(o, i)| *o == i * *size as isize) =>
                {
                    *size *= shape[d];
                }
                _ => dims.push((shape[d], steps)),
            }
        }
        let plain = dims.first().is_some_and(|(_, steps)| steps.iter().all(|s| *s == 0 || *s == 1));
        let (cols, inner) = if plain {
            let (size, steps) = dims.remove(0);
            (size, steps.iter().map(|s| *s as u8).collect())
        } else {
            (1, vec![1; strides.len()])
        };
        if dims.len() > MAX_OUTER {
            return Err(LayoutError::Rank { outer: dims.len() });
        }
        let mut layout =
            Layout { outer: [1; MAX_OUTER], cols, strides: vec![[0; MAX_OUTER]; strides.len()], inner };
        for (from_inner, (size, steps)) in dims.iter().enumerate() {
            let d = MAX_OUTER - 1 - from_inner;
            layout.outer[d] = *size;
            for (operand, step) in steps.iter().enumerate() {
                layout.strides[operand][d] = *step;
            }
        }
        Ok(layout)
    }
}

/// Element offset of run `index` for one operand.
#[inline(always)]
pub(crate) fn offset_of(outer: &[usize; MAX_OUTER], strides: &[isize; MAX_OUTER], index: usize) -> isize {
    let (mut rest, mut offset) = (index, 0);
    for d in (0..MAX_OUTER).rev() {
        if outer[d] > 1 {
            offset += (rest % outer[d]) as isize * strides[d];
            rest /= outer[d];
        }
    }
    offset
}

/// Elements that one tile aims at.
const TILE_ELEMENTS: usize = 8192;

/// Number of tiles of `runs` runs of `cols` elements.
pub(crate) const fn tiles_of(runs: usize, cols: usize) -> usize {
    if cols == 0 || runs == 0 {
        0
    } else if cols >= TILE_ELEMENTS {
        runs * cols.div_ceil(TILE_ELEMENTS)
    } else {
        runs.div_ceil(TILE_ELEMENTS / cols)
    }
}

/// Runs and columns of one tile.
pub(crate) fn tile_of(
    runs: usize,
    cols: usize,
    tile: usize,
) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
    if cols >= TILE_ELEMENTS {
        let per_run = cols.div_ceil(TILE_ELEMENTS);
        let (run, first) = (tile / per_run, tile % per_run * TILE_ELEMENTS);
        (run..run + 1, first..cols.min(first + TILE_ELEMENTS))
    } else {
        let per_tile = TILE_ELEMENTS / cols;
        (tile * per_tile..runs.min((tile + 1) * per_tile), 0..cols)
    }
}
