//! Where a step's tensor stands and how large it is.

use rlx_tensor::DType;

/// A tensor that a step reads or writes. Sizes are positions in the run's table of sizes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Operand {
    /// The region it stands in.
    pub region: usize,
    /// Elements from the region's start.
    pub offset: usize,
    /// Extents, outermost first.
    pub dims: Box<[usize]>,
    /// Elements from one row (last dim) to the next where rows are not adjacent: a slice of columns.
    pub stride: Option<usize>,
    /// Element type; one byte at least.
    pub dtype: DType,
}

/// What a step does with an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads it.
    Read,
    /// Writes it; no other operand of the step may overlap it.
    Write,
    /// Writes it; an operand that is the very same range may be read (element by element, in place).
    WriteInPlace,
    /// Reads and writes it: a state.
    Update,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct RawRegion {
    pub pointer: *mut u8,
    pub len: usize,
    pub writable: bool,
}

impl RawRegion {
    pub const EMPTY: RawRegion = RawRegion { pointer: std::ptr::null_mut(), len: 0, writable: false };
}

impl Operand {
    pub(crate) fn element_bytes(&self) -> usize {
        self.dtype.element_bytes().unwrap_or(1)
    }

    pub(super) fn offset_bytes(&self) -> usize {
        self.offset * self.element_bytes()
    }

    pub(super) fn elements(&self, sizes: &[usize]) -> usize {
        self.dims.iter().map(|&d| sizes[d]).product()
    }

    pub(super) fn columns(&self, sizes: &[usize]) -> usize {
        self.dims.last().map_or(1, |&d| sizes[d])
    }

    pub(crate) fn rows(&self, sizes: &[usize]) -> usize {
        let lead = self.dims.len().saturating_sub(1);
        self.dims[..lead].iter().map(|&d| sizes[d]).product()
    }

    pub(super) fn row_stride(&self, sizes: &[usize]) -> usize {
        self.stride.unwrap_or_else(|| self.columns(sizes))
    }

    /// Bytes from the region's start to the operand's end; `None` on overflow.
    pub(super) fn end_bytes(&self, sizes: &[usize]) -> Option<usize> {
        let mut rows = 1usize;
        for &d in &self.dims[..self.dims.len().saturating_sub(1)] {
            rows = rows.checked_mul(sizes[d])?;
        }
        let columns = self.columns(sizes);
        if rows == 0 || columns == 0 {
            return Some(0);
        }
        let last = (rows - 1).checked_mul(self.row_stride(sizes))?;
        let end = self.offset.checked_add(last)?.checked_add(columns)?;
        end.checked_mul(self.element_bytes())
    }
}
