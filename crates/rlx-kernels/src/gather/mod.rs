//! Rows by index: embedding lookup with widening, row gather and scatter of any type.

#[cfg(test)]
mod tests;

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};

/// Storage of an embedding table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// Row numbers.
#[derive(Clone, Copy, Debug)]
pub enum Ids {
    /// 32-bit.
    I32(*const i32),
    /// 64-bit.
    I64(*const i64),
}

impl Ids {
    /// # Safety
    /// `i` is inside the array.
    #[inline(always)]
    unsafe fn at(self, i: usize) -> i64 {
        // SAFETY: the caller guarantees the read.
        unsafe {
            match self {
                Ids::I32(p) => i64::from(*p.add(i)),
                Ids::I64(p) => *p.add(i),
            }
        }
    }
}

/// Checks that `n` ids lie in `0..rows`: call it before the kernels here, which do not check.
///
/// # Errors
/// The place and value of the first id outside.
///
/// # Safety
/// `ids` is valid for `n` reads.
pub unsafe fn check_ids(ids: Ids, n: usize, rows: usize) -> Result<(), (usize, i64)> {
    for i in 0..n {
        // SAFETY: `i < n`.
        let id = unsafe { ids.at(i) };
        if id < 0 || id as u64 >= rows as u64 {
            return Err((i, id));
        }
    }
    Ok(())
}

/// Arguments of the embedding lookup: `out[i] = table[ids[i]] * scale`, widened to f32.
#[derive(Clone, Copy, Debug)]
pub struct EmbedArgs {
    /// Table rows of `cols` elements.
    pub table: *const u8,
    /// Their type.
    pub table_type: TableType,
    /// Elements between table rows.
    pub table_stride: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Row numbers, each checked by [`check_ids`].
    pub ids: Ids,
    /// Number of ids.
    pub rows: usize,
    /// Factor; 1 for none.
    pub scale: f32,
    /// Whether the result is added to what `out` holds.
    pub accumulate: bool,
    /// Output rows.
    pub out: *mut f32,
    /// Elements between output rows.
    pub out_stride: usize,
    /// Rows of one tile.
    pub rows_per_tile: usize,
}

impl EmbedArgs {
    /// Number of tiles.
    pub const fn tiles(&self) -> usize {
        self.rows.div_ceil(self.rows_per_tile)
    }
}

/// Arguments of gather (`to[i] = from[ids[i]]`) and scatter (`to[ids[i]] = from[i]`, where ids repeat the last row
/// wins: scatter is one tile).
#[derive(Clone, Copy, Debug)]
pub struct RowArgs {
    /// Source rows.
    pub from: *const u8,
    /// Bytes between source rows.
    pub from_stride: usize,
    /// Target rows.
    pub to: *mut u8,
    /// Bytes between target rows.
    pub to_stride: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Row numbers, each checked by [`check_ids`].
    pub ids: Ids,
    /// Number of ids.
    pub rows: usize,
    /// Rows of one tile of gather.
    pub rows_per_tile: usize,
}

impl RowArgs {
    /// Number of tiles of gather; scatter has one.
    pub const fn tiles(&self) -> usize {
        self.rows.div_ceil(self.rows_per_tile)
    }
}

/// Instances of the embedding lookup.
pub static EMBED: Rows<EmbedArgs> = Row::all_of::<EmbedF32>();
/// Instances of row gather.
pub static GATHER: Rows<RowArgs> = Row::all_of::<GatherRows>();
/// Instances of row scatter.
pub static SCATTER: Rows<RowArgs> = Row::all_of::<ScatterRows>();

/// The embedding lookup for `isa`.
pub fn embed_entry(isa: Isa) -> Option<Entry<EmbedArgs>> {
    select(&EMBED, isa)
}

/// Row gather for `isa`.
pub fn gather_entry(isa: Isa) -> Option<Entry<RowArgs>> {
    select(&GATHER, isa)
}

/// Row scatter for `isa`.
pub fn scatter_entry(isa: Isa) -> Option<Entry<RowArgs>> {
    select(&SCATTER, isa)
}

struct EmbedF32;

impl Kernel for EmbedF32 {
    type Args = EmbedArgs;
    const OP: &'static str = "embed";
    const DTYPES: &'static str = "any_f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &EmbedArgs, tile: usize) {
        let first = tile * args.rows_per_tile;
        let scale = s.splat(args.scale);
        for row in first..args.rows.min(first + args.rows_per_tile) {
            // SAFETY: the caller guarantees the table, checked ids and the output.
            unsafe {
                let at = args.ids.at(row) as usize * args.table_stride;
                let out = args.out.add(row * args.out_stride);
                for i in (0..args.cols).step_by(LANES) {
                    let left = (args.cols - i).min(LANES);
                    let x = match args.table_type {
                        TableType::F32 => s.load_part(args.table.cast::<f32>().add(at + i), left),
                        TableType::F16 => s.load_f16_part(args.table.cast::<u16>().add(at + i), left),
                        TableType::Bf16 => s.load_bf16_part(args.table.cast::<u16>().add(at + i), left),
                    };
                    let mut y = s.mul(x, scale);
                    if args.accumulate {
                        y = s.add(s.load_part(out.add(i), left), y);
                    }
                    s.store_part(out.add(i), left, y);
                }
            }
        }
    }
}

struct GatherRows;

impl Kernel for GatherRows {
    type Args = RowArgs;
    const OP: &'static str = "gather_rows";
    const DTYPES: &'static str = "any";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &RowArgs, tile: usize) {
        let first = tile * args.rows_per_tile;
        for row in first..args.rows.min(first + args.rows_per_tile) {
            // SAFETY: the caller guarantees the rows and checked ids.
            unsafe {
                let from = args.from.add(args.ids.at(row) as usize * args.from_stride);
                args.to.add(row * args.to_stride).copy_from_nonoverlapping(from, args.row_bytes);
            }
        }
    }
}

struct ScatterRows;

impl Kernel for ScatterRows {
    type Args = RowArgs;
    const OP: &'static str = "scatter_rows";
    const DTYPES: &'static str = "any";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &RowArgs, _tile: usize) {
        for row in 0..args.rows {
            // SAFETY: the caller guarantees the rows and checked ids.
            unsafe {
                let to = args.to.add(args.ids.at(row) as usize * args.to_stride);
                to.copy_from_nonoverlapping(args.from.add(row * args.from_stride), args.row_bytes);
            }
        }
    }
}
