use super::{BLOCK, CHUNK, CacheDtype};
use crate::isa::half::{f32_to_bf16, f32_to_f16};
use crate::isa::{Kernel, Simd};
use rlx_tensor::quant::{CACHE_GROUP, Q8Head, encode_cache_group};

/// Arguments of the cache append: row `i` of sequence `b` is stored at position `past[b] + i`, rounded to the cache's
/// type. Tile `r` is row `r`.
#[derive(Clone, Copy, Debug)]
pub struct AppendArgs {
    /// Key rows of `kv_heads * head_dim`.
    pub k: *const f32,
    /// Elements between key rows.
    pub k_stride: usize,
    /// Value rows of `kv_heads * value_dim`.
    pub v: *const f32,
    /// Elements between value rows.
    pub v_stride: usize,
    /// `batch + 1` ascending row numbers, the first one 0.
    pub seq_starts: *const i32,
    /// Sequences.
    pub batch: usize,
    /// Per sequence, positions before this run's first row; null for none.
    pub past: *const i32,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a key head.
    pub head_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// `[block][kv_head][head_dim][BLOCK]`.
    pub k_cache: *mut u8,
    /// `[block][kv_head][BLOCK][value_dim]`.
    pub v_cache: *mut u8,
    /// Element type of the cache.
    pub dtype: CacheDtype,
    /// Block numbers, `[batch][table_width]`.
    pub block_table: *const i32,
    /// Blocks per sequence in the table.
    pub table_width: usize,
    /// Key and value heads that are stored.
    pub stored_heads: (usize, usize),
    /// The chunk of positions that is stored; none for all.
    pub stored_chunk: Option<usize>,
}

impl AppendArgs {
    /// Tiles of the append: one per row.
    ///
    /// # Safety
    /// `seq_starts` is valid for `batch + 1` reads.
    pub unsafe fn tiles(&self) -> usize {
        // SAFETY: the caller guarantees the read.
        unsafe { *self.seq_starts.add(self.batch) as usize }
    }
}

trait Stored: Copy {
    fn store(x: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn store(x: f32) -> f32 {
        x
    }
}

#[derive(Clone, Copy)]
struct F16(#[expect(dead_code, reason = "written to the cache as bits")] u16);

impl Stored for F16 {
    #[inline(always)]
    fn store(x: f32) -> F16 {
        F16(f32_to_f16(x))
    }
}

#[derive(Clone, Copy)]
struct Bf16(#[expect(dead_code, reason = "written to the cache as bits")] u16);

impl Stored for Bf16 {
    #[inline(always)]
    fn store(x: f32) -> Bf16 {
        Bf16(f32_to_bf16(x))
    }
}

pub(super) struct AppendF32;

impl Kernel for AppendF32 {
    type Args = AppendArgs;
    const OP: &'static str = "kv_append";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &AppendArgs, tile: usize) {
        // SAFETY: the caller guarantees the rows, the table and the blocks it names.
        unsafe {
            let mut b = 0;
            while *args.seq_starts.add(b + 1) as usize <= tile {
                b += 1;
            }
            let past = if args.past.is_null() { 0 } else { *args.past.add(b) as usize };
            let position = past + tile - *args.seq_starts.add(b) as usize;
            if args.stored_chunk.is_some_and(|chunk| position / CHUNK != chunk) {
                return;
            }
            let block = *args.block_table.add(b * args.table_width + position / BLOCK) as usize;
            match args.dtype {
                CacheDtype::F32 => append_row::<f32>(args, tile, block, position % BLOCK),
                CacheDtype::F16 => append_row::<F16>(args, tile, block, position % BLOCK),
                CacheDtype::Bf16 => append_row::<Bf16>(args, tile, block, position % BLOCK),
                CacheDtype::Q8 => append_q8(args, tile, block, position % BLOCK),
            }
        }
    }
}

#[inline(never)]
unsafe fn append_row<T: Stored>(args: &AppendArgs, row: usize, block: usize, slot: usize) {
    // SAFETY: the caller guarantees the row and the block.
    unsafe {
        let k = args.k.add(row * args.k_stride);
        let k_cache = args.k_cache.cast::<T>().add(block * args.kv_heads * args.head_dim * BLOCK + slot);
        let (first, end) = args.stored_heads;
        for i in first * args.head_dim..end * args.head_dim {
            k_cache.add(i * BLOCK).write(T::store(*k.add(i)));
        }
        let v = args.v.add(row * args.v_stride);
        let v_cache = args.v_cache.cast::<T>().add(block * args.kv_heads * BLOCK * args.value_dim);
        for head in first..end {
            let target = v_cache.add((head * BLOCK + slot) * args.value_dim);
            for i in 0..args.value_dim {
                target.add(i).write(T::store(*v.add(head * args.value_dim + i)));
            }
        }
    }
}

#[inline(never)]
unsafe fn append_q8(args: &AppendArgs, row: usize, block: usize, slot: usize) {
    let (first, end) = args.stored_heads;
    // SAFETY: the caller guarantees the row and the block.
    unsafe {
        let (k, v) = (args.k.add(row * args.k_stride), args.v.add(row * args.v_stride));
        for head in first..end {
            let of_block = block * args.kv_heads + head;
            for (from, to, dim, keys) in
                [(k, args.k_cache, args.head_dim, true), (v, args.v_cache, args.value_dim, false)]
            {
                let layout = Q8Head { dim, positions: BLOCK, keys };
                let to = to.add(of_block * layout.bytes());
                for i in (0..dim).step_by(CACHE_GROUP) {
                    let values = from.add(head * dim + i).cast::<[f32; CACHE_GROUP]>();
                    let (scale, integers) = encode_cache_group(&*values);
                    to.add(layout.scale_at(slot, i)).cast::<u16>().write(scale);
                    for (n, integer) in integers.into_iter().enumerate() {
                        to.add(layout.integer_at(slot, i + n)).cast::<i8>().write(integer);
                    }
                }
            }
        }
    }
}
