//! Times attention, layer norm and GELU on one thread: `cargo run --release -p rlx-kernels --example vec_bench`.
#![expect(unsafe_code, reason = "kernels are called through raw pointers")]

use std::time::Instant;

use rlx_kernels::attention::{
    AppendArgs, AttentionArgs, BLOCK, CacheDtype, Keys, append_entry, attention_entry, merge_entry,
};
use rlx_kernels::elementwise::{Layout, MapArgs, Placed, Program, Unary, map_entry};
use rlx_kernels::isa::Isa;
use rlx_kernels::norm::{NormArgs, layer_norm_entry};

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// Median and least seconds of `runs` calls.
fn time(runs: usize, mut f: impl FnMut()) -> (f64, f64) {
    f();
    let mut seconds: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    (seconds[runs / 2], seconds[0])
}

struct Shape {
    batch: usize,
    rows: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    causal: bool,
}

fn arguments(
    shape: &Shape,
    q: &[f32],
    out: &mut [f32],
    keys: Keys,
    starts: &[i32],
    past: &[i32],
) -> AttentionArgs {
    AttentionArgs {
        q: q.as_ptr(),
        q_stride: shape.heads * shape.head_dim,
        out: out.as_mut_ptr(),
        out_stride: shape.heads * shape.head_dim,
        keys,
        seq_starts: starts.as_ptr(),
        batch: shape.batch,
        past: if past.is_empty() { std::ptr::null() } else { past.as_ptr() },
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        value_dim: shape.head_dim,
        scale: 1.0 / (shape.head_dim as f32).sqrt(),
        softcap: 0.0,
        left: usize::MAX,
        right: if shape.causal { 0 } else { usize::MAX },
        mask: std::ptr::null(),
        mask_strides: [0; 3],
        partials: std::ptr::null_mut(),
        chunks: 0,
        scratch: std::ptr::null_mut(),
    }
}

fn prefill(isa: Isa, shape: &Shape) {
    let total = shape.batch * shape.rows;
    let (q_width, k_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let (q, k, v) = (noise(total * q_width, 1), noise(total * k_width, 2), noise(total * k_width, 3));
    let mut out = vec![0.0; total * q_width];
    let starts: Vec<i32> = (0..=shape.batch).map(|b| (b * shape.rows) as i32).collect();
    let keys = Keys::Rows { k: k.as_ptr(), k_stride: k_width, v: v.as_ptr(), v_stride: k_width };
    let mut args = arguments(shape, &q, &mut out, keys, &starts, &[]);
    let mut scratch = vec![0.0; args.scratch_floats()];
    args.scratch = scratch.as_mut_ptr();
    let run = attention_entry(isa).expect("every build has a scalar row");
    let runs = if shape.batch == 1 { 101 } else { 9 };
    let (median, least) = time(runs, || {
        // SAFETY: the vectors above hold what the arguments say.
        unsafe {
            for tile in 0..args.tiles() {
                run(&args, tile);
            }
        }
    });
    let pairs = if shape.causal { shape.rows * (shape.rows + 1) / 2 } else { shape.rows * shape.rows };
    let flops = (4 * shape.batch * shape.heads * pairs * shape.head_dim) as f64;
    println!(
        "{isa} attention {}x{} heads {}/{} x {} {}: {:.1} GFLOP/s median, {:.1} best, {:.3} ms",
        shape.batch,
        shape.rows,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        if shape.causal { "causal" } else { "full" },
        flops / median / 1e9,
        flops / least / 1e9,
        median * 1e3
    );
}

fn decode(isa: Isa, context: usize, dtype: CacheDtype) {
    let shape = Shape { batch: 1, rows: 1, heads: 9, kv_heads: 3, head_dim: 64, causal: true };
    let k_width = shape.kv_heads * shape.head_dim;
    let blocks = context.div_ceil(BLOCK);
    let mut caches = [(); 2].map(|()| vec![0u8; blocks * BLOCK * dtype.bytes(k_width)]);
    let table: Vec<i32> = (0..blocks as i32).collect();
    let (k, v) = (noise(context * k_width, 2), noise(context * k_width, 3));
    let [k_cache, v_cache] = &mut caches;
    let starts = [0, context as i32];
    let append = AppendArgs {
        k: k.as_ptr(),
        k_stride: k_width,
        v: v.as_ptr(),
        v_stride: k_width,
        seq_starts: starts.as_ptr(),
        batch: 1,
        past: std::ptr::null(),
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        value_dim: shape.head_dim,
        k_cache: k_cache.as_mut_ptr(),
        v_cache: v_cache.as_mut_ptr(),
        dtype,
        block_table: table.as_ptr(),
        table_width: blocks,
        stored_heads: (0, shape.kv_heads),
        stored_chunk: None,
    };
    let run = append_entry(isa).expect("every build has a scalar row");
    for row in 0..context {
        // SAFETY: the vectors above hold what the arguments say.
        unsafe { run(&append, row) };
    }
    let keys = Keys::Cache {
        k: k_cache.as_ptr(),
        v: v_cache.as_ptr(),
        dtype,
        block_table: table.as_ptr(),
        table_width: blocks,
    };
    let q = noise(shape.heads * shape.head_dim, 1);
    let mut out = vec![0.0; q.len()];
    let (starts, past) = ([0, 1], [context as i32 - 1]);
    let mut args = arguments(&shape, &q, &mut out, keys, &starts, &past);
    args.chunks = context.div_ceil(512);
    let mut partials = vec![0.0; args.partial_floats(1)];
    let mut scratch = vec![0.0; args.scratch_floats()];
    args.partials = partials.as_mut_ptr();
    args.scratch = scratch.as_mut_ptr();
    let attend = attention_entry(isa).expect("every build has a scalar row");
    let merge = merge_entry(isa).expect("every build has a scalar row");
    let (median, least) = time(41, || {
        // SAFETY: the vectors above hold what the arguments say.
        unsafe {
            for tile in 0..args.tiles() {
                attend(&args, tile);
            }
            merge(&args, 0);
        }
    });
    let bytes = (2 * context * dtype.bytes(k_width)) as f64;
    println!(
        "{isa} decode context {context} heads 9/3 x 64 {dtype:?}: {:.1} us median, {:.1} best, {:.1} GB/s of cache",
        median * 1e6,
        least * 1e6,
        bytes / median / 1e9
    );
}

fn rows(isa: Isa) {
    let (n, cols) = (4096, 384);
    let (x, weight, bias) = (noise(n * cols, 1), noise(cols, 2), noise(cols, 3));
    let residual = noise(n * cols, 4);
    let (mut y, mut sum) = (vec![0.0f32; n * cols], vec![0.0f32; n * cols]);
    let args = NormArgs {
        x: x.as_ptr(),
        x_stride: cols,
        residual: residual.as_ptr(),
        residual_stride: cols,
        sum: sum.as_mut_ptr(),
        sum_stride: cols,
        y: y.as_mut_ptr(),
        y_stride: cols,
        weight: weight.as_ptr(),
        weight_offset: 0.0,
        bias: bias.as_ptr(),
        rows: n,
        groups: 1,
        group_stride: cols,
        cols,
        eps: 1e-12,
        rows_per_tile: 64,
    };
    let run = layer_norm_entry(isa).expect("every build has a scalar row");
    let (median, least) = time(9, || {
        for tile in 0..args.tiles() {
            // SAFETY: the vectors above hold what the arguments say.
            unsafe { run(&args, tile) };
        }
    });
    let elements = (n * cols) as f64;
    println!(
        "{isa} layer_norm + residual {n}x{cols}: {:.3} ns/element, {:.3} best",
        median * 1e9 / elements,
        least * 1e9 / elements
    );
    for op in [Unary::GeluErf, Unary::GeluTanh, Unary::Silu, Unary::Exp] {
        let program = Program::unary(op);
        let size = 4096;
        let layout = Layout::broadcast(&[size], &[&[size], &[size]]).expect("equal shapes");
        let places = [x.as_ptr().cast_mut(), y.as_mut_ptr()].map(|p| Placed {
            at: p.cast(),
            strides: layout.strides[0],
            inner: layout.inner[0],
        });
        let args = MapArgs {
            program: &program,
            inputs: &places[0],
            outputs: &places[1],
            outer: layout.outer,
            cols: layout.cols,
        };
        let run = map_entry(isa).expect("every build has a scalar row");
        let (median, least) = time(201, || {
            for tile in 0..args.tiles() {
                // SAFETY: both vectors hold more than `size` elements.
                unsafe { run(&args, tile) };
            }
        });
        println!(
            "{isa} {}: {:.3} ns/element, {:.3} best",
            op.name(),
            median * 1e9 / size as f64,
            least * 1e9 / size as f64
        );
    }
}

fn main() {
    for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Scalar) {
        let minilm = Shape { batch: 32, rows: 128, heads: 12, kv_heads: 12, head_dim: 32, causal: false };
        prefill(isa, &minilm);
        prefill(isa, &Shape { batch: 1, ..minilm });
        prefill(isa, &Shape { batch: 1, rows: 512, heads: 9, kv_heads: 3, head_dim: 64, causal: true });
        for context in [128, 4096] {
            for dtype in [CacheDtype::F32, CacheDtype::F16, CacheDtype::Bf16, CacheDtype::Q8] {
                decode(isa, context, dtype);
            }
        }
        rows(isa);
    }
}
