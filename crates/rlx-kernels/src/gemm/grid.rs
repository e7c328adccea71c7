//! How the output of a linear layer is cut into tiles.

use std::ops::Range;

/// The output of `m` rows as a line of units, cut into tiles that get smaller towards the end, so that workers finish together
/// though they claim few.
///
/// A unit is some panels of all rows, where rows are few, else some panels of one chunk of rows; chunks run fastest, so that a
/// tile's panels stay in the second-level cache. The cut depends on the number of workers; what an element is does not depend on
/// the cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearGrid {
    m: usize,
    chunks: usize,
    panels: usize,
    panel_blocks: usize,
    whole: bool,
    /// Units of a tile at most, and what a tile's are a multiple of while they are that many.
    most: usize,
    step: usize,
    workers: usize,
    tiles: usize,
}

impl LinearGrid {
    /// Units that hold every row and one panel.
    pub(crate) fn of_panels(m: usize, chunks: usize, panels: usize, workers: usize) -> LinearGrid {
        let (panel_blocks, workers) = (panels, workers.max(1));
        let grid = LinearGrid {
            m,
            chunks,
            panels,
            panel_blocks,
            whole: true,
            most: usize::MAX,
            step: 1,
            workers,
            tiles: 0,
        };
        grid.counted()
    }

    /// Units that hold one chunk of rows and one of `panel_blocks` blocks of panels.
    pub(crate) fn of_chunks(
        m: usize,
        chunks: usize,
        panels: usize,
        panel_blocks: usize,
        workers: usize,
    ) -> LinearGrid {
        let whole = LinearGrid::of_panels(m, chunks, panels, workers);
        LinearGrid { whole: false, panel_blocks: panel_blocks.clamp(1, panels.max(1)), ..whole }.counted()
    }

    /// At most so many units in a tile, and a multiple of `step` where it has more.
    pub(crate) fn with_steps(self, most: usize, step: usize) -> LinearGrid {
        LinearGrid { most: most.max(1), step: step.max(1), ..self }.counted()
    }

    fn counted(mut self) -> LinearGrid {
        let (units, mut start) = (self.units(), 0);
        self.tiles = 0;
        while units - start > 0 {
            let size = self.size(units - start);
            let round = if size == 1 { units - start } else { self.workers };
            start += round * size;
            self.tiles += round;
        }
        self
    }

    fn units(&self) -> usize {
        if self.m == 0 || self.panels == 0 {
            0
        } else if self.whole {
            self.panel_blocks
        } else {
            self.panel_blocks * self.chunks
        }
    }

    /// Units of each of the next tiles, one a worker, while `left` are left: half of them, or one each.
    fn size(&self, left: usize) -> usize {
        let size = (left / (2 * self.workers)).clamp(1, self.most);
        if size > self.step { size - size % self.step } else { size }
    }

    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        self.tiles
    }

    fn units_of(&self, mut tile: usize) -> Range<usize> {
        let (units, mut start) = (self.units(), 0);
        loop {
            let size = self.size(units - start);
            if tile < self.workers || size == 1 {
                let from = start + tile * size;
                return from..from + size;
            }
            start += self.workers * size;
            tile -= self.workers;
        }
    }

    fn block(&self, block: usize) -> usize {
        block * self.panels / self.panel_blocks
    }

    /// The chunks and panels of a tile.
    pub(crate) fn parts(&self, tile: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
        let units = self.units_of(tile);
        let mut at = units.start;
        std::iter::from_fn(move || {
            if at >= units.end {
                return None;
            }
            if self.whole {
                let panels = self.block(at)..self.block(units.end);
                at = units.end;
                return Some((0..self.chunks, panels));
            }
            let (block, chunk) = (at / self.chunks, at % self.chunks);
            let end = self.chunks.min(chunk + units.end - at);
            at += end - chunk;
            Some((chunk..end, self.block(block)..self.block(block + 1)))
        })
    }

    /// The rows of every chunk.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        (0..self.chunks).map(|chunk| self.rows_of(chunk))
    }

    /// The rows of a chunk.
    pub(crate) fn rows_of(&self, chunk: usize) -> Range<usize> {
        chunk * self.m / self.chunks..(chunk + 1) * self.m / self.chunks
    }

    /// The first panels of a tile.
    pub(crate) fn first_panels(&self, tile: usize) -> Range<usize> {
        if tile < self.tiles { self.parts(tile).next().map_or(0..0, |(_, panels)| panels) } else { 0..0 }
    }
}
