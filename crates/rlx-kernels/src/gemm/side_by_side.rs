//! Linear layers of the same rows, by a whole team.
//!
//! Rows for blocks are quantised once, by all workers together, where they are more than the kernels read packed strips for:
//! then a tile may be few panels of all rows, and its weights are read from memory once.

use std::ops::Range;

use super::{LinearArgs, LinearGrid, LinearKernel, RowsReady};
use crate::pool::Team;
use crate::quant_dot;

/// Rows that are quantised at once at most, which bounds the memory for them.
const ROWS_AT_ONCE: usize = 512;

/// The parts of `m` rows that are multiplied one after the other.
fn part(m: usize, index: usize) -> Range<usize> {
    let parts = m.div_ceil(ROWS_AT_ONCE).max(1);
    index * m / parts..(index + 1) * m / parts
}

impl LinearKernel {
    /// The kernels for blocks, if `m` rows are quantised before tiles are handed out.
    fn quantizes(&self, m: usize) -> Option<&quant_dot::Chosen> {
        self.blocks.as_ref().filter(|blocks| m > blocks.direct_rows())
    }

    /// The cut that [`side_by_side`] uses for the first of `m` rows.
    pub fn grid_beside(&self, m: usize, workers: usize) -> LinearGrid {
        self.grid_of_part(part(m, 0).len(), workers)
    }

    fn grid_of_part(&self, m: usize, workers: usize) -> LinearGrid {
        match self.quantizes(m) {
            Some(blocks) => blocks.cut_quantized(m, self.layout.k(), self.layout.panels(), workers),
            None => self.grid(m, workers),
        }
    }
}

/// Layers of one kind of quantised rows: its first layer, and how many kinds came before it.
fn kind<'k>(layers: &impl Fn(usize) -> &'k LinearKernel, m: usize, at: usize) -> Option<(usize, usize)> {
    let form = |at: usize| layers(at).quantizes(m).map(quant_dot::Chosen::form);
    let wanted = form(at)?;
    let first = (0..at).find(|&before| form(before) == Some(wanted)).unwrap_or(at);
    let is_first = |&at: &usize| form(at).is_some_and(|own| (0..at).all(|before| form(before) != Some(own)));
    Some((first, (0..first).filter(is_first).count()))
}

/// Bytes of quantised rows that workers share for [`side_by_side`] of `m` rows.
pub fn quantized_bytes<'k>(layers: impl Iterator<Item = &'k LinearKernel> + Clone, m: usize) -> usize {
    let parts = m.div_ceil(ROWS_AT_ONCE);
    let most = (0..parts).map(|index| part(m, index).len()).max().unwrap_or(0);
    let form = |layer: &LinearKernel| layer.quantizes(most).map(quant_dot::Chosen::form);
    let bytes = layers.clone().enumerate().map(|(at, layer)| match form(layer) {
        Some(own) if layers.clone().take(at).all(|before| form(before) != Some(own)) => {
            most.saturating_mul(quant_dot::row_bytes(layer.layout.k()))
        }
        _ => 0,
    });
    bytes.fold(0, usize::saturating_add)
}

/// Runs layers over the same rows with all workers of a team, who pass the same arguments; tiles of all layers are claimed from
/// one ticket. The outputs are complete after the next [`Team::barrier`], which the caller passes.
///
/// # Safety
/// As for [`LinearKernel::run_tile`] over all tiles of every layer, whose `m`, `x` and k are equal; `scratch` is this worker's, of
/// [`LinearKernel::scratch_len_beside`] values; `quantized` is the team's, of [`quantized_bytes`] bytes, aligned to 64.
pub unsafe fn side_by_side<'k>(
    team: &Team<'_>,
    layers: usize,
    layer: impl Fn(usize) -> (&'k LinearKernel, LinearArgs),
    scratch: *mut f32,
    quantized: *mut u8,
) {
    let m = layer(0).1.m;
    let parts = m.div_ceil(ROWS_AT_ONCE).max(1);
    for index in 0..parts {
        let rows = part(m, index);
        let kernel = |at: usize| layer(at).0;
        let place = |at: usize| {
            let (_, before) = kind(&kernel, rows.len(), at)?;
            Some(quantized.wrapping_add(before * rows.len() * quant_dot::row_bytes(kernel(at).layout.k())))
        };
        let of_rows = |at: usize| {
            let (kernel, args) = layer(at);
            let quantized = place(at).map_or(std::ptr::null(), <*mut u8>::cast_const);
            (kernel, LinearArgs { quantized, ..args.of_rows(&rows) })
        };
        if index > 0 {
            team.barrier();
        }
        if (0..layers).any(|at| place(at).is_some()) {
            let first = |at: usize| kind(&kernel, rows.len(), at).is_some_and(|(first, _)| first == at);
            // SAFETY: the caller guarantees the rows and room for them; a piece is claimed by one worker.
            unsafe { quantize(team, (0..layers).filter(|&at| first(at)).map(of_rows)) };
            team.barrier();
        }
        // SAFETY: passed on to the caller; each tile is claimed by one worker.
        unsafe { run_tiles(team, layers, of_rows, scratch) };
    }
}

/// Quantises the rows of layers to where their arguments say.
unsafe fn quantize<'k>(
    team: &Team<'_>,
    layers: impl Iterator<Item = (&'k LinearKernel, LinearArgs)> + Clone,
) {
    let tiles_of = |kernel: &LinearKernel, args: &LinearArgs| -> (LinearGrid, usize) {
        let grid = kernel.grid_of_part(args.m, team.count());
        let tiles = grid.chunks().map(|rows| quant_dot::Chosen::quantize_tiles(rows.len())).sum();
        (grid, tiles)
    };
    let total = layers.clone().map(|(kernel, args)| tiles_of(kernel, &args).1).sum();
    for mut tile in team.tiles(total) {
        for (kernel, args) in layers.clone() {
            let (grid, tiles) = tiles_of(kernel, &args);
            let Some(blocks) = &kernel.blocks else { continue };
            if tile >= tiles {
                tile -= tiles;
                continue;
            }
            let k = kernel.layout.k();
            for rows in grid.chunks() {
                let tiles = quant_dot::Chosen::quantize_tiles(rows.len());
                if tile < tiles {
                    let x = (args.x.wrapping_add(rows.start * args.x_stride), args.x_stride);
                    let out = args.quantized.wrapping_add(rows.start * quant_dot::row_bytes(k)).cast_mut();
                    // SAFETY: passed on to the caller.
                    unsafe { blocks.quantize_tile((rows.len(), k), tile, x, out) };
                    break;
                }
                tile -= tiles;
            }
            break;
        }
    }
}

unsafe fn run_tiles<'k>(
    team: &Team<'_>,
    layers: usize,
    layer: impl Fn(usize) -> (&'k LinearKernel, LinearArgs),
    scratch: *mut f32,
) {
    let cut = |(kernel, args): &(&'k LinearKernel, LinearArgs)| kernel.grid_of_part(args.m, team.count());
    let total = (0..layers).map(|at| cut(&layer(at)).tiles()).sum();
    let (mut at, mut base, mut ready) = (0, 0, RowsReady::default());
    let mut current = layer(0);
    let mut grid = cut(&current);
    for tile in team.tiles(total) {
        while tile - base >= grid.tiles() {
            base += grid.tiles();
            at += 1;
            (current, ready) = (layer(at), RowsReady::default());
            grid = cut(&current);
        }
        // SAFETY: passed on to the caller.
        unsafe { current.0.run_tile(&current.1, &grid, tile - base, scratch, &mut ready) };
    }
}
