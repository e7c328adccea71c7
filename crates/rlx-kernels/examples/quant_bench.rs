//! Linear layers over quantised blocks against the machine's limits: fraction of the peak of vpdpbusd with many rows, of the read
//! rate with one. Arguments: a part of a dtype's name to run only that, and `isa=NAME`, `threads=N`, `m=ROWS`, `mib=N` (the
//! bytes of weights that are read in turn; more than the caches hold, as a model's are).

use std::time::Instant;

use rlx_kernels::gemm::{
    Activation, LinearKernel, LinearOperands, PackedMatrix, Precision, Products, Residual, WeightOrder,
    WeightPart, WeightType, pack_on,
};
use rlx_kernels::isa::Isa;
use rlx_kernels::limits::{DotKind, dot_ops, read_rate};
use rlx_kernels::pool::Pool;
use rlx_kernels::quant_dot::dtypes;
use rlx_tensor::DType;

/// Columns and inputs: down and gate of Qwen2.5-0.5B, down and attention of SmolLM2-135M.
const SHAPES: [(usize, usize); 4] = [(896, 4864), (4864, 896), (576, 1536), (1728, 576)];

fn packed(pool: &Pool, isa: Isa, dtype: DType, n: usize, k: usize) -> Option<PackedMatrix> {
    let dtype = WeightType::Blocks(dtype);
    // Small numbers wherever a scale may stand.
    let bytes = vec![0x11u8; dtype.source_bytes(n, k)?];
    let part = WeightPart { bytes: &bytes, dtype, n, k, order: WeightOrder::RowMajor };
    pack_on(pool, &[part], false, isa, Precision::F32).ok()
}

/// Median seconds a call, over calls of about half a second.
fn median(mut call: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut samples = Vec::new();
    while samples.len() < 9 || begin.elapsed().as_secs_f64() < 0.5 {
        let start = Instant::now();
        call();
        samples.push(start.elapsed().as_secs_f64());
    }
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

struct Options {
    isa: Isa,
    rows: Vec<usize>,
    weights_bytes: usize,
}

fn measure(pool: &Pool, options: &Options, dtype: DType, n: usize, k: usize) {
    let Some(first) = packed(pool, options.isa, dtype, n, k) else { return };
    let layout = *first.layout();
    let Some(kernel) = LinearKernel::select(options.isa, &layout, Products::F32) else { return };
    let copies = (options.weights_bytes / layout.bytes().max(1)).clamp(1, 400);
    let several: Vec<PackedMatrix> =
        (0..copies).filter_map(|_| packed(pool, options.isa, dtype, n, k)).collect();
    for &m in &options.rows {
        let x: Vec<f32> = (0..m * k).map(|i| (i % 17) as f32 * 0.01).collect();
        let mut out = vec![0.0f32; m * n];
        let mut call = |w: &PackedMatrix| {
            let operands = LinearOperands {
                m,
                x: &x,
                x_stride: k,
                bias: None,
                residual: Residual::None,
                out: &mut out,
                out_stride: n,
                activation: Activation::None,
            };
            kernel.run(pool, w, operands).expect("valid operands");
        };
        print!("{dtype:7} {n:5} x {k:5} m {m:4} t {} {:34}", pool.threads(), kernel.name(m));
        if m <= 8 {
            let total = several.iter().map(|w| w.bytes().len()).sum::<usize>() as f64;
            let limit = read_rate(pool, options.isa, total as usize).unwrap_or(f64::NAN);
            let time = median(|| several.iter().for_each(&mut call));
            print!("{:8.1} us {:6.1} GB/s", 1e6 * time / several.len() as f64, total / time / 1e9);
            println!("  {:5.1}% of read", 100.0 * total / time / limit);
        } else {
            let peak = dot_ops(pool, DotKind::Int8).unwrap_or(f64::NAN);
            let time = median(|| call(&first));
            let rate = 2.0 * (m * n * k) as f64 / time;
            println!("{:8.1} us {:6.0} GOP/s  {:5.1}% of peak", 1e6 * time, rate / 1e9, 100.0 * rate / peak);
        }
    }
}

fn main() {
    let mut options = Options { isa: Isa::detect(), rows: vec![1, 512], weights_bytes: 256 << 20 };
    let (mut threads, mut filter) = (2, String::new());
    for argument in std::env::args().skip(1) {
        if let Some(name) = argument.strip_prefix("isa=") {
            options.isa = name.parse().expect("the name of an instruction set");
        } else if let Some(count) = argument.strip_prefix("threads=") {
            threads = count.parse().expect("a number of threads");
        } else if let Some(rows) = argument.strip_prefix("m=") {
            options.rows = vec![rows.parse().expect("a number of rows")];
        } else if let Some(mib) = argument.strip_prefix("mib=") {
            options.weights_bytes = mib.parse::<usize>().expect("a number of MiB") << 20;
        } else {
            filter = argument;
        }
    }
    let pool = Pool::new(threads);
    let peak = dot_ops(&pool, DotKind::Int8).unwrap_or(f64::NAN);
    println!("{}, {threads} threads: {:.0} GOP/s of vpdpbusd", options.isa, peak / 1e9);
    for dtype in dtypes().filter(|dtype| dtype.name().contains(&filter)) {
        for (n, k) in SHAPES {
            measure(&pool, &options, dtype, n, k);
        }
    }
}
