//! Copies whose source and target each have adjacent elements, along two different dimensions: transposes in blocks.

use super::CopyArgs;
use crate::elementwise::{MAX_OUTER, offset_of};
use crate::isa::{LANES, Simd};

/// Elements a tile aims at.
const TILE_ELEMENTS: usize = 16_384;

/// Most columns of a tile.
const TILE_COLUMNS: usize = 256;

/// Most rows of a tile.
const TILE_ROWS: usize = 4096;

/// A copy as blocks: rows along the dimension in which the source's elements are adjacent, columns along the target's.
pub(super) struct Turn {
    from: *const f32,
    to: *mut f32,
    /// Extents of the other dimensions.
    outer: [usize; MAX_OUTER],
    from_strides: [isize; MAX_OUTER],
    to_strides: [isize; MAX_OUTER],
    rows: usize,
    columns: usize,
    /// Elements from one column to the next in the source.
    from_step: isize,
    /// Elements from one row to the next in the target.
    to_step: isize,
}

impl Turn {
    /// `None` if the copy is none of elements of four bytes in two such dimensions.
    pub(super) fn of(args: &CopyArgs) -> Option<Turn> {
        const LAST: usize = MAX_OUTER - 1;
        let (from, to) = (&args.from.strides, &args.to.strides);
        if args.element_bytes != 4 || args.cols != 1 || to[LAST] != 1 || args.outer[LAST] == 1 {
            return None;
        }
        let row = (0..LAST).rev().find(|&d| from[d] == 1 && args.outer[d] > 1)?;
        let mut outer = args.outer;
        (outer[row], outer[LAST]) = (1, 1);
        Some(Turn {
            from: args.from.at.cast(),
            to: args.to.at.cast(),
            outer,
            from_strides: *from,
            to_strides: *to,
            rows: args.outer[row],
            columns: args.outer[LAST],
            from_step: from[LAST],
            to_step: to[row],
        })
    }

    /// Rows and columns of a tile.
    fn tile(&self) -> [usize; 2] {
        let columns = self.columns.clamp(1, TILE_COLUMNS);
        [(TILE_ELEMENTS / columns).next_multiple_of(LANES).min(TILE_ROWS), columns]
    }

    /// Tiles along the other dimensions, the rows and the columns.
    pub(super) fn blocks(&self) -> [usize; 3] {
        let [rows, columns] = self.tile();
        [self.outer.iter().product(), self.rows.div_ceil(rows), self.columns.div_ceil(columns)]
    }

    /// Copies a tile.
    ///
    /// # Safety
    /// The operands are those of a copy; `tile` is below the product of the blocks.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd>(&self, s: S, tile: usize) {
        let [_, row_blocks, column_blocks] = self.blocks();
        let [tile_rows, tile_columns] = self.tile();
        let (index, block) = (tile / (row_blocks * column_blocks), tile % (row_blocks * column_blocks));
        let (top, left) = (block / column_blocks * tile_rows, block % column_blocks * tile_columns);
        let (rows, columns) = (tile_rows.min(self.rows - top), tile_columns.min(self.columns - left));
        let from =
            offset_of(&self.outer, &self.from_strides, index) + top as isize + left as isize * self.from_step;
        let to =
            offset_of(&self.outer, &self.to_strides, index) + left as isize + top as isize * self.to_step;
        // SAFETY: the caller guarantees the elements.
        unsafe {
            let pointers = (self.from.offset(from), self.to.offset(to));
            let (from_steps, to_steps) = ([1, self.from_step], [self.to_step, 1]);
            match columns {
                1 => narrow::<1>(pointers, rows, from_steps, to_steps),
                2 => narrow::<2>(pointers, rows, from_steps, to_steps),
                3 => narrow::<3>(pointers, rows, from_steps, to_steps),
                4 => narrow::<4>(pointers, rows, from_steps, to_steps),
                _ => self.blocks_of(s, pointers, [rows, columns]),
            }
        }
    }

    /// Copies rows and columns, 16 by 16 at a time.
    #[inline(always)]
    unsafe fn blocks_of<S: Simd>(
        &self,
        s: S,
        (from, to): (*const f32, *mut f32),
        [rows, columns]: [usize; 2],
    ) {
        for row in (0..rows).step_by(LANES) {
            let lanes = LANES.min(rows - row);
            for column in (0..columns).step_by(LANES) {
                let width = LANES.min(columns - column);
                let mut block = [s.zero(); LANES];
                // SAFETY: the caller guarantees the elements.
                unsafe {
                    let from = from.offset(row as isize + column as isize * self.from_step);
                    for (at, value) in block.iter_mut().enumerate().take(width) {
                        *value = s.load_to(from.offset(at as isize * self.from_step), lanes);
                    }
                    let block = s.transpose(block);
                    let to = to.offset(row as isize * self.to_step + column as isize);
                    for (at, value) in block.iter().enumerate().take(lanes) {
                        s.store_to(to.offset(at as isize * self.to_step), width, *value);
                    }
                }
            }
        }
    }
}

/// Copies rows of `COLUMNS` elements; steps are from row to row and from column to column.
#[inline(always)]
unsafe fn narrow<const COLUMNS: usize>(
    (from, to): (*const f32, *mut f32),
    rows: usize,
    from_steps: [isize; 2],
    to_steps: [isize; 2],
) {
    let at =
        |steps: [isize; 2], row: usize, column: usize| row as isize * steps[0] + column as isize * steps[1];
    for row in 0..rows {
        for column in 0..COLUMNS {
            // SAFETY: the caller guarantees the elements.
            unsafe { to.offset(at(to_steps, row, column)).write(*from.offset(at(from_steps, row, column))) };
        }
    }
}
