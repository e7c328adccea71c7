//! Linear layers on packed weights: `out = residual + act(x . W^T + bias)`, from one row (GEMV) to many (GEMM).
//!
//! An output element is one f32 accumulator, updated by fused multiply-add in an order that the [`Precision`] fixes
//! (k = 0, 1, 2, ... in f32), so its bits depend neither on the number of rows, nor on tiles or threads, nor, denormals of
//! [`Products::Bf16Dot`] apart, on the instruction set.

pub(crate) mod activation;
mod block;
#[cfg(target_arch = "x86_64")]
mod dot;
pub(crate) mod epilogue;
mod grid;
mod pack;
mod precision;
mod rounded;
mod side_by_side;
mod table;
pub(crate) mod taps;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;

pub use activation::Activation;
use block::BlockArgs;
use epilogue::EpilogueArgs;
pub use grid::LinearGrid;
pub use pack::{
    PackError, PackJob, PackedLayout, PackedMatrix, PackedStorage, WeightOrder, WeightPart, WeightType, pack,
    pack_on, pack_on_releasing, panel_columns, size_of_packed,
};
pub use precision::{Precision, Products, UnknownPrecision};
use rounded::RoundArgs;
pub use side_by_side::{quantized_bytes, side_by_side};
pub use table::{BLOCKS, BlockRow};
use table::{Chosen, MAX_ACCUMULATORS};

use crate::isa::Isa;
use crate::pool::Pool;
use crate::quant_dot;

/// The kernels for one packed layout on one instruction set.
#[derive(Clone, Copy)]
pub struct LinearKernel {
    layout: PackedLayout,
    isa: Isa,
    products: Products,
    chosen: Chosen,
    /// The instances for blocks, which multiply in integers whatever the products.
    blocks: Option<quant_dot::Chosen>,
}

impl fmt::Debug for LinearKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinearKernel")
            .field("isa", &self.isa)
            .field("products", &self.products)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

/// The operands of a linear layer. Strides are in values, from one row to the next.
#[derive(Clone, Copy, Debug)]
pub struct LinearArgs {
    /// Rows.
    pub m: usize,
    /// `m` rows of `k` values.
    pub x: *const f32,
    /// Row stride of `x`.
    pub x_stride: usize,
    /// The packed matrix, `layout.bytes()` bytes.
    pub w: *const u8,
    /// `layout.n()` values in the order the weight's parts were stacked, or null.
    pub bias: *const f32,
    /// `m` rows of `layout.n()` values, in the order of the bias, to add before the activation, or null.
    pub addend: *const f32,
    /// Row stride of `addend`.
    pub addend_stride: usize,
    /// `m` rows of `layout.outputs()` values to add last, or null; may be `out` itself with the same stride.
    pub residual: *const f32,
    /// Row stride of `residual`.
    pub residual_stride: usize,
    /// `m` rows of `layout.outputs()` values, written.
    pub out: *mut f32,
    /// Row stride of `out`.
    pub out_stride: usize,
    /// What is applied before the residual is added; of a gated layer, to the gate.
    pub activation: Activation,
    /// The rows of `x` as [`side_by_side`] quantises them for this kernel, or null: then each worker quantises what it reads.
    pub quantized: *const u8,
}

impl LinearArgs {
    /// The same layer, of some of the rows.
    fn of_rows(&self, rows: &Range<usize>) -> LinearArgs {
        let from =
            |p: *const f32, stride: usize| if p.is_null() { p } else { p.wrapping_add(rows.start * stride) };
        LinearArgs {
            m: rows.len(),
            x: from(self.x, self.x_stride),
            addend: from(self.addend, self.addend_stride),
            residual: from(self.residual, self.residual_stride),
            out: self.out.wrapping_add(rows.start * self.out_stride),
            ..*self
        }
    }
}

/// Bytes of packed weights a tile covers at most where it has several chunks of rows, so that they stay in the second-level cache.
const TILE_WEIGHT_BYTES: usize = 1 << 20;

/// Row chunks per tile at most: what a worker does alone between two looks at the ticket.
const TILE_CHUNKS: usize = 8;

/// Row chunks up to which a tile takes all of them, so that one worker alone reads a weight.
const WHOLE_CHUNKS: usize = 4;

/// Units per worker aimed at, so that the last ones are short.
const UNITS_PER_WORKER: usize = 16;

/// The rows that lie rounded or quantised in a worker's scratch; none at first. It belongs to one `x` and one kernel.
#[derive(Debug, Default)]
pub struct RowsReady(Range<usize>);

impl LinearKernel {
    /// The kernels that read `layout` on `isa` and form products like this.
    ///
    /// `None` if this machine or build lacks the instructions, the layout is another instruction set's, or its element type is
    /// not bf16 and products are.
    pub fn select(isa: Isa, layout: &PackedLayout, products: Products) -> Option<LinearKernel> {
        if layout.panel_columns() != panel_columns(isa) {
            return None;
        }
        let chosen = table::choose(isa, layout.dtype(), products)?;
        let blocks = match layout.dtype() {
            WeightType::Blocks(dtype) => Some(quant_dot::choose(isa, dtype, layout.panel_columns())?),
            _ => None,
        };
        Some(LinearKernel { layout: *layout, isa, products, chosen, blocks })
    }

    /// The layout the kernels read.
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The name of the instance that does most of the work for `m` rows, as in [`BlockRow::name`].
    pub fn name(&self, m: usize) -> String {
        if let Some(blocks) = &self.blocks {
            return blocks.name(m);
        }
        let rows = m.div_ceil(m.div_ceil(self.chosen.max_rows).max(1)).max(1);
        let panels =
            self.chosen.several[rows - 1].map_or(1, |(_, panels)| panels).min(self.layout.panels().max(1));
        let panels =
            if self.chosen.several[rows - 1].is_some_and(|(_, step)| step == panels) { panels } else { 1 };
        let rows_of = BLOCKS.iter().copied().flatten();
        rows_of
            .filter(|row| row.serves(self.isa, self.layout.dtype(), self.products))
            .find(|row| row.rows == rows && row.panels == panels)
            .map_or_else(String::new, BlockRow::name)
    }

    /// The cut of `m` rows for `workers` workers. Constant time.
    pub fn grid(&self, m: usize, workers: usize) -> LinearGrid {
        let panels = self.layout.panels();
        if let Some(blocks) = &self.blocks {
            return blocks.cut(m, panels, workers);
        }
        let chunks = m.div_ceil(self.chosen.max_rows).max(1);
        let in_cache = |bytes: usize| (bytes / self.layout.panel_bytes().max(1)).max(1);
        if chunks <= WHOLE_CHUNKS {
            let most = if chunks == 1 { usize::MAX } else { in_cache(TILE_WEIGHT_BYTES / 2) };
            let step = self.chosen.several[m.div_ceil(chunks).max(1) - 1].map_or(1, |(_, step)| step);
            return LinearGrid::of_panels(m, chunks, panels, workers).with_steps(most, step);
        }
        let wanted = if workers <= 1 { 1 } else { (workers * UNITS_PER_WORKER).div_ceil(chunks) };
        let panel_blocks = panels.div_ceil(in_cache(TILE_WEIGHT_BYTES)).max(wanted);
        LinearGrid::of_chunks(m, chunks, panels, panel_blocks, workers).with_steps(TILE_CHUNKS, 1)
    }

    /// f32 values of scratch each worker needs: none for f32 products, whose instances read `x` in place; else some rows of it,
    /// rounded or quantised.
    pub fn scratch_len(&self) -> usize {
        match &self.blocks {
            Some(_) => quant_dot::CHUNK_ROWS * quant_dot::row_bytes(self.layout.k()) / size_of::<f32>(),
            None => self.rounded_stride() * self.chosen.max_rows,
        }
    }

    /// As [`LinearKernel::scratch_len`], where all layers run by [`side_by_side`].
    pub fn scratch_len_beside(&self) -> usize {
        match &self.blocks {
            Some(blocks) => blocks.direct_rows() * quant_dot::row_bytes(self.layout.k()) / size_of::<f32>(),
            None => self.scratch_len(),
        }
    }

    /// 32-bit words from one rounded row to the next.
    fn rounded_stride(&self) -> usize {
        match self.products {
            Products::F32 => 0,
            Products::Bf16Fma => self.layout.k(),
            Products::Bf16Dot => self.layout.k().div_ceil(2),
        }
    }

    /// Computes one tile of the output.
    ///
    /// # Safety
    /// The pointers of `args` are valid as [`LinearArgs`] says, for this kernel's layout; `scratch` is valid for
    /// [`LinearKernel::scratch_len`] values and this worker's alone; `out` overlaps no other operand except an
    /// identical `residual`; no other thread accesses this tile's outputs. `grid` is of [`LinearKernel::grid`] with
    /// `args.m` and `tile < grid.tiles()`; `ready` is of this scratch, this `x` and this kernel.
    pub unsafe fn run_tile(
        &self,
        args: &LinearArgs,
        grid: &LinearGrid,
        tile: usize,
        scratch: *mut f32,
        ready: &mut RowsReady,
    ) {
        for (chunks, panels) in grid.parts(tile) {
            for chunk in chunks {
                let rows = grid.rows_of(chunk);
                let fresh = std::mem::replace(&mut ready.0, rows.clone()) != rows;
                if let Some(blocks) = &self.blocks {
                    // SAFETY: as below.
                    unsafe { self.run_blocks(blocks, args, rows, panels.clone(), (scratch, fresh)) };
                    continue;
                }
                // SAFETY: the rows and panels are in the operands; passed on.
                unsafe {
                    let x = self.rows_to_read(args, &rows, (scratch, fresh));
                    self.run_chunk(args, rows, panels.clone(), x);
                }
            }
        }
    }

    /// The packed bytes that a worker reads first: of the tile that is always its own.
    pub fn first_bytes(&self, grid: &LinearGrid, worker: usize) -> Range<usize> {
        let panels = grid.first_panels(worker);
        panels.start * self.layout.panel_bytes()..panels.end * self.layout.panel_bytes()
    }

    /// Computes a chunk of rows of some panels of blocks.
    unsafe fn run_blocks(
        &self,
        blocks: &quant_dot::Chosen,
        args: &LinearArgs,
        rows: Range<usize>,
        which: Range<usize>,
        (scratch, fresh): (*mut f32, bool),
    ) {
        let (m, k) = (rows.len(), self.layout.k());
        let panels = quant_dot::Panels { w: args.w, k, which };
        // SAFETY: the caller guarantees the rows, the panels, the scratch and the outputs, which are finished as they come.
        unsafe {
            let quantized = if args.quantized.is_null() {
                if fresh {
                    let x = args.x.wrapping_add(rows.start * args.x_stride);
                    blocks.quantize((m, k), 0..m, (x, args.x_stride), scratch.cast());
                }
                scratch.cast::<u8>().cast_const()
            } else {
                args.quantized.wrapping_add(rows.start * quant_dot::row_bytes(k))
            };
            let targets = |panel| self.targets(args, &rows, panel);
            blocks.run_chunk(m, quantized, &panels, targets, |panel, acc, stride| {
                self.finish(args, &rows, panel, acc, stride);
            });
        }
    }

    /// What [`LinearKernel::finish`] writes of a panel, and what it adds from elsewhere.
    fn targets(
        &self,
        args: &LinearArgs,
        rows: &Range<usize>,
        panel: usize,
    ) -> [Option<quant_dot::Target>; 2] {
        let column = panel * self.layout.panel_outputs();
        let bytes = self.layout.panel_outputs() * size_of::<f32>();
        let target = |p: *const f32, stride: usize| quant_dot::Target {
            start: p.wrapping_add(rows.start * stride + column).cast(),
            stride: stride * size_of::<f32>(),
            bytes,
        };
        let apart = !args.residual.is_null() && args.residual != args.out.cast_const();
        let residual = apart.then(|| target(args.residual, args.residual_stride));
        [Some(target(args.out.cast_const(), args.out_stride)), residual]
    }

    /// Where the kernels read some rows of `x`, and the stride there: in place, or rounded in `scratch`.
    unsafe fn rows_to_read(
        &self,
        args: &LinearArgs,
        rows: &Range<usize>,
        (scratch, fresh): (*mut f32, bool),
    ) -> (*const f32, usize) {
        let x = args.x.wrapping_add(rows.start * args.x_stride);
        let Some(round) = self.chosen.round else { return (x, args.x_stride) };
        let (stride, rows, k) = (args.x_stride, rows.len(), self.layout.k());
        if fresh {
            // SAFETY: the caller guarantees the rows, and scratch for as many as an instance takes.
            unsafe { round(&RoundArgs { x, stride, rows, k, out: scratch }, 0) };
        }
        (scratch, self.rounded_stride())
    }

    /// Computes some rows (at most `max_rows`), to be read at `x` with a stride, of some panels.
    unsafe fn run_chunk(
        &self,
        args: &LinearArgs,
        rows: Range<usize>,
        panels: Range<usize>,
        (x, ldx): (*const f32, usize),
    ) {
        let layout = &self.layout;
        let mut acc = Accumulators([std::mem::MaybeUninit::uninit(); MAX_ACCUMULATORS]);
        let acc = acc.0.as_mut_ptr().cast::<f32>();
        let mut panel = panels.start;
        while panel < panels.end {
            let several = self.chosen.several[rows.len() - 1].filter(|(_, step)| panel + step <= panels.end);
            let (Some(entry), step) =
                several.map_or((self.chosen.one[rows.len() - 1], 1), |(e, n)| (Some(e), n))
            else {
                return;
            };
            let block = BlockArgs {
                x,
                ldx,
                w: args.w.wrapping_add(panel * layout.panel_bytes()),
                panel_bytes: layout.panel_bytes(),
                k: layout.k(),
                acc,
            };
            // SAFETY: the caller guarantees the rows and panels; the accumulators of any instance fit in `acc`.
            unsafe { entry(&block, 0) };
            for index in 0..step {
                let acc = acc.wrapping_add(index * layout.panel_columns());
                // SAFETY: the caller guarantees the outputs of these rows and panels; `acc` has just been written.
                unsafe { self.finish(args, &rows, panel + index, acc, step * layout.panel_columns()) };
            }
            panel += step;
        }
    }

    unsafe fn finish(
        &self,
        args: &LinearArgs,
        rows: &Range<usize>,
        panel: usize,
        acc: *const f32,
        acc_stride: usize,
    ) {
        let layout = &self.layout;
        let column = panel * layout.panel_outputs();
        let bias_at = |start: usize| {
            if args.bias.is_null() { args.bias } else { args.bias.wrapping_add(start + column) }
        };
        let addend_at = |start: usize| {
            let at = rows.start * args.addend_stride + start + column;
            if args.addend.is_null() { args.addend } else { args.addend.wrapping_add(at) }
        };
        let residual = if args.residual.is_null() {
            args.residual
        } else {
            args.residual.wrapping_add(rows.start * args.residual_stride + column)
        };
        let epilogue = EpilogueArgs {
            acc,
            acc_stride,
            rows: rows.len(),
            columns: layout.panel_outputs().min(layout.outputs() - column),
            up: if layout.gated() { layout.panel_outputs() } else { 0 },
            bias: bias_at(0),
            up_bias: if layout.gated() { bias_at(layout.outputs()) } else { std::ptr::null() },
            addend: addend_at(0),
            up_addend: if layout.gated() { addend_at(layout.outputs()) } else { std::ptr::null() },
            addend_stride: args.addend_stride,
            residual,
            residual_stride: args.residual_stride,
            out: args.out.wrapping_add(rows.start * args.out_stride + column),
            out_stride: args.out_stride,
            activation: args.activation,
        };
        // SAFETY: the caller guarantees bias, residual and outputs of these rows and this panel.
        unsafe { (self.chosen.epilogue)(&epilogue, 0) };
    }
}

#[repr(align(64))]
struct Accumulators([std::mem::MaybeUninit<f32>; MAX_ACCUMULATORS]);

/// Operands of a linear layer as slices, for [`LinearKernel::run`].
#[derive(Debug)]
pub struct LinearOperands<'a> {
    /// Rows.
    pub m: usize,
    /// `m` rows of `k` values, `x_stride` apart.
    pub x: &'a [f32],
    /// Row stride of `x`, at least `k`.
    pub x_stride: usize,
    /// `n` values in the order the weight's parts were stacked.
    pub bias: Option<&'a [f32]>,
    /// What is added last.
    pub residual: Residual<'a>,
    /// `m` rows of outputs, `out_stride` apart.
    pub out: &'a mut [f32],
    /// Row stride of `out`, at least the number of outputs.
    pub out_stride: usize,
    /// What is applied before the residual is added.
    pub activation: Activation,
}

/// What a linear layer adds to its result.
#[derive(Clone, Copy, Debug)]
pub enum Residual<'a> {
    /// Nothing.
    None,
    /// The previous contents of `out`.
    Out,
    /// `m` rows, `stride` values apart.
    Rows {
        /// The values.
        values: &'a [f32],
        /// Row stride, at least the number of outputs.
        stride: usize,
    },
}

/// Operands that do not fit the layer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinearError {
    /// The packed matrix is not of the layout the kernels were selected for.
    Layout,
    /// A slice or a stride is too small.
    Operand {
        /// Which operand.
        name: &'static str,
        /// Values it must have.
        expected: usize,
        /// Values it has.
        found: usize,
    },
}

impl fmt::Display for LinearError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LinearError::Layout => write!(f, "linear: the packed matrix has another layout than the kernels"),
            LinearError::Operand { name, expected, found } => {
                write!(f, "linear: {name}: expected at least {expected} values, found {found}")
            }
        }
    }
}

impl std::error::Error for LinearError {}

fn check(name: &'static str, expected: usize, found: usize) -> Result<(), LinearError> {
    if found < expected { Err(LinearError::Operand { name, expected, found }) } else { Ok(()) }
}

fn check_rows(
    names: [&'static str; 2],
    m: usize,
    columns: usize,
    stride: usize,
    len: usize,
) -> Result<(), LinearError> {
    check(names[0], columns, stride)?;
    let needed =
        if m == 0 { Some(0) } else { (m - 1).checked_mul(stride).and_then(|last| last.checked_add(columns)) };
    check(names[1], needed.unwrap_or(usize::MAX), len)
}

impl LinearOperands<'_> {
    fn check(&self, layout: &PackedLayout) -> Result<(), LinearError> {
        check_rows(["x stride", "x"], self.m, layout.k(), self.x_stride, self.x.len())?;
        check_rows(["out stride", "out"], self.m, layout.outputs(), self.out_stride, self.out.len())?;
        if let Some(bias) = self.bias {
            check("bias", layout.n(), bias.len())?;
        }
        if let Residual::Rows { values, stride } = self.residual {
            check_rows(["residual stride", "residual"], self.m, layout.outputs(), stride, values.len())?;
        }
        Ok(())
    }
}

struct SharedArgs(LinearArgs, *mut f32, *mut u8);

// SAFETY: workers write disjoint tiles of `out` and their own scratch, and only read the rest.
unsafe impl Sync for SharedArgs {}

impl SharedArgs {
    fn parts(&self) -> (&LinearArgs, *mut f32, *mut u8) {
        (&self.0, self.1, self.2)
    }
}

impl LinearKernel {
    /// Runs the layer on a pool, with every operand checked. Allocates scratch: for tests, benchmarks and loaders.
    pub fn run(
        &self,
        pool: &Pool,
        w: &PackedMatrix,
        operands: LinearOperands<'_>,
    ) -> Result<(), LinearError> {
        if w.layout() != &self.layout {
            return Err(LinearError::Layout);
        }
        operands.check(&self.layout)?;
        let each = self.scratch_len_beside();
        let mut scratch = vec![0.0f32; each * pool.threads()];
        let mut quantized =
            vec![0.0f32; quantized_bytes(std::iter::once(self), operands.m) / size_of::<f32>()];
        let out = operands.out.as_mut_ptr();
        let (residual, residual_stride) = match operands.residual {
            Residual::None => (std::ptr::null(), 0),
            Residual::Out => (out.cast_const(), operands.out_stride),
            Residual::Rows { values, stride } => (values.as_ptr(), stride),
        };
        let args = LinearArgs {
            m: operands.m,
            x: operands.x.as_ptr(),
            x_stride: operands.x_stride,
            w: w.bytes().as_ptr(),
            bias: operands.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            addend: std::ptr::null(),
            addend_stride: 0,
            residual,
            residual_stride,
            out,
            out_stride: operands.out_stride,
            activation: operands.activation,
            quantized: std::ptr::null(),
        };
        let shared = SharedArgs(args, scratch.as_mut_ptr(), quantized.as_mut_ptr().cast());
        pool.run(|team| {
            let (args, scratch, quantized) = shared.parts();
            let own = scratch.wrapping_add(team.index() * each);
            // SAFETY: all operands were checked against the layout; `out` is borrowed exclusively, and the residual is
            // either `out` itself or a shared borrow, which cannot overlap it; the scratch has a part per worker and as many
            // quantised rows as asked.
            unsafe { side_by_side(team, 1, |_| (self, *args), own, quantized) };
            team.barrier();
        });
        Ok(())
    }
}
