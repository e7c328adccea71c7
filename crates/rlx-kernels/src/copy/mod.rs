//! Strided copies: transposes, slices, concatenation, broadcasts of any element size.

#[cfg(test)]
mod tests;
mod turn;

use turn::Turn;

use crate::elementwise::{MAX_OUTER, Placed, offset_of, tile_of, tiles_of};
use crate::isa::{Entry, Isa, Kernel, Row, Rows, Simd, select};

/// Arguments of a copy. Both operands are walked by one [`crate::elementwise::Layout`] (from
/// [`crate::elementwise::Layout::strided`] with the strides of source and target); they do not overlap.
#[derive(Clone, Copy, Debug)]
pub struct CopyArgs {
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element_bytes: usize,
    /// Source; only read.
    pub from: Placed,
    /// Target; `inner` is 1.
    pub to: Placed,
    /// Outer extents.
    pub outer: [usize; MAX_OUTER],
    /// Elements of the innermost run.
    pub cols: usize,
}

impl CopyArgs {
    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        match Turn::of(self) {
            Some(turn) => turn.blocks().iter().product(),
            None => tiles_of(self.outer.iter().product(), self.cols),
        }
    }
}

/// Instances of the copy.
pub static COPY: Rows<CopyArgs> = Row::all_of::<CopyAny>();

/// The copy for `isa`.
pub fn copy_entry(isa: Isa) -> Option<Entry<CopyArgs>> {
    select(&COPY, isa)
}

struct CopyAny;

impl Kernel for CopyAny {
    type Args = CopyArgs;
    const OP: &'static str = "copy";
    const DTYPES: &'static str = "any";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &CopyArgs, tile: usize) {
        // SAFETY: the caller guarantees the operands.
        unsafe {
            if let Some(turn) = Turn::of(args) {
                turn.run(s, tile);
                return;
            }
            match args.element_bytes {
                1 => copy::<u8>(args, tile),
                2 => copy::<u16>(args, tile),
                4 => copy::<u32>(args, tile),
                _ => copy::<u64>(args, tile),
            }
        }
    }
}

#[inline(never)]
unsafe fn copy<T: Copy>(args: &CopyArgs, tile: usize) {
    let (runs, cols) = tile_of(args.outer.iter().product(), args.cols, tile);
    let (from, to) = (args.from.at.cast::<T>(), args.to.at.cast::<T>());
    // SAFETY: the caller guarantees the operands; offsets stay inside them.
    unsafe {
        if args.cols == 1 {
            copy_elements(args, runs, from, to);
            return;
        }
        for run in runs {
            let from = from.offset(offset_of(&args.outer, &args.from.strides, run));
            let to = to.offset(offset_of(&args.outer, &args.to.strides, run));
            if args.from.inner == 1 {
                to.add(cols.start).copy_from_nonoverlapping(from.add(cols.start), cols.len());
            } else {
                let x = *from;
                for i in cols.clone() {
                    to.add(i).write(x);
                }
            }
        }
    }
}

/// Elements of a line that is short.
const SHORT_LINE: usize = 8;

/// One element per run: steps along the innermost outer dimension without recomputing offsets.
#[inline(always)]
unsafe fn copy_elements<T: Copy>(args: &CopyArgs, runs: std::ops::Range<usize>, from: *const T, to: *mut T) {
    let width = args.outer[MAX_OUTER - 1];
    let (from_step, to_step) = (args.from.strides[MAX_OUTER - 1], args.to.strides[MAX_OUTER - 1]);
    let (rows, row) = (args.outer[MAX_OUTER - 2], MAX_OUTER - 2);
    let mut run = runs.start;
    while run < runs.end {
        // Short lines, such as the channels of an image, are copied many at a time, column by column.
        let lines = ((runs.end - run) / width).min(rows - run / width % rows);
        if width < SHORT_LINE && run.is_multiple_of(width) && lines > 1 {
            // SAFETY: the caller guarantees the operands; `lines` lines remain in the dimension around.
            unsafe {
                let from = from.offset(offset_of(&args.outer, &args.from.strides, run));
                let to = to.offset(offset_of(&args.outer, &args.to.strides, run));
                for i in 0..width as isize {
                    let (from, to) = (from.offset(i * from_step), to.offset(i * to_step));
                    for line in 0..lines as isize {
                        let x = *from.offset(line * args.from.strides[row]);
                        to.offset(line * args.to.strides[row]).write(x);
                    }
                }
            }
            run += lines * width;
            continue;
        }
        let n = (width - run % width).min(runs.end - run);
        // SAFETY: the caller guarantees the operands; `n` elements remain in this dimension.
        unsafe {
            let from = from.offset(offset_of(&args.outer, &args.from.strides, run));
            let to = to.offset(offset_of(&args.outer, &args.to.strides, run));
            for i in 0..n as isize {
                to.offset(i * to_step).write(*from.offset(i * from_step));
            }
        }
        run += n;
    }
}
