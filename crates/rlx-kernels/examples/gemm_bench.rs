//! Linear layers against the machine's limits: fraction of the multiply-add peak with many rows, of the read rate with
//! few. Arguments: a part of the work's name to run only that, and `isa=NAME`, `threads=N`.

use std::time::Instant;

use rlx_kernels::gemm::{
    Activation, LinearKernel, LinearOperands, PackedMatrix, Residual, WeightOrder, WeightPart, WeightType,
    pack_on,
};
use rlx_kernels::isa::Isa;
use rlx_kernels::limits::{fma_flops, read_rate};
use rlx_kernels::pool::Pool;

struct Work {
    family: &'static str,
    n: usize,
    k: usize,
    gated: bool,
    dtype: WeightType,
    activation: Activation,
    rows: &'static [usize],
}

const fn work(family: &'static str, n: usize, k: usize, rows: &'static [usize]) -> Work {
    Work { family, n, k, gated: false, dtype: WeightType::F32, activation: Activation::None, rows }
}

const MINILM: &[usize] = &[4096, 512, 128, 16, 1];
const SMOL: &[usize] = &[512, 16, 4, 2, 1];
const QWEN: &[usize] = &[128, 1];

fn works() -> Vec<Work> {
    vec![
        work("minilm", 1152, 384, MINILM),
        work("minilm", 384, 384, MINILM),
        Work { activation: Activation::Gelu, ..work("minilm", 1536, 384, MINILM) },
        work("minilm", 384, 1536, MINILM),
        work("smol", 1728, 576, SMOL),
        work("smol", 576, 576, SMOL),
        Work { gated: true, activation: Activation::Silu, ..work("smol", 3072, 576, SMOL) },
        work("smol", 576, 1536, SMOL),
        work("smol", 49_152, 576, SMOL),
        Work { dtype: WeightType::Bf16, ..work("smol-bf16", 49_152, 576, SMOL) },
        Work { dtype: WeightType::F16, ..work("smol-f16", 49_152, 576, SMOL) },
        Work { gated: true, activation: Activation::Silu, ..work("qwen", 9728, 896, QWEN) },
        work("qwen", 896, 4864, QWEN),
        work("qwen", 151_936, 896, &[1]),
        Work { dtype: WeightType::Bf16, ..work("qwen-bf16", 151_936, 896, &[1]) },
        work("depth", 1152, 96, &[504, 14]),
        work("depth", 1152, 192, &[504, 14]),
        work("depth", 1152, 288, &[504]),
        work("depth", 1152, 384, &[504]),
        work("depth", 1152, 528, &[504]),
        work("depth", 1152, 784, &[504, 14]),
        work("depth", 1152, 1552, &[504]),
        work("paged", 1024, 1024, &[512, 128, 1]),
        work("paged", 1024, 4096, &[512, 128, 1]),
    ]
}

fn packed(pool: &Pool, isa: Isa, work: &Work) -> PackedMatrix {
    let bytes: Vec<u8> = (0..work.n * work.k * work.dtype.bytes())
        .map(|i| if i % work.dtype.bytes() == work.dtype.bytes() - 1 { 0x3c } else { (i % 251) as u8 })
        .collect();
    let n = if work.gated { work.n / 2 } else { work.n };
    let parts: Vec<WeightPart<'_>> = bytes
        .chunks_exact(n * work.k * work.dtype.bytes())
        .map(|bytes| WeightPart { bytes, dtype: work.dtype, n, k: work.k, order: WeightOrder::RowMajor })
        .collect();
    // The first packing also pays for the pages of its result.
    let _ = pack_on(pool, &parts, work.gated, isa);
    let start = Instant::now();
    let matrix = pack_on(pool, &parts, work.gated, isa).expect("valid parts");
    if bytes.len() > 64 << 20 {
        let rate = bytes.len() as f64 / start.elapsed().as_secs_f64() / 1e9;
        println!("packed {} MiB at {rate:.1} GB/s", bytes.len() >> 20);
    }
    matrix
}

/// Seconds per call, fastest and median of many short samples: on a busy machine some of them run undisturbed.
fn time(mut call: impl FnMut()) -> (f64, f64) {
    let start = Instant::now();
    call();
    let once = start.elapsed().as_secs_f64();
    let calls = ((2e-4 / once) as usize).clamp(1, 10_000);
    let mut samples = Vec::new();
    let begin = Instant::now();
    while samples.len() < 15 || begin.elapsed().as_secs_f64() < 0.3 {
        let start = Instant::now();
        for _ in 0..calls {
            call();
        }
        samples.push(start.elapsed().as_secs_f64() / calls as f64);
    }
    samples.sort_by(f64::total_cmp);
    (samples[0], samples[samples.len() / 2])
}

fn measure(pool: &Pool, isa: Isa, work: &Work) {
    let w = packed(pool, isa, work);
    let layout = *w.layout();
    let Some(kernel) = LinearKernel::select(isa, &layout) else { return };
    let peak = fma_flops(pool, isa).unwrap_or(f64::NAN);
    for &m in work.rows {
        let x: Vec<f32> = (0..m * work.k).map(|i| (i % 17) as f32 * 0.01).collect();
        let mut out = vec![0.0f32; m * layout.outputs()];
        let bias = vec![0.1f32; work.n];
        let (best, median) = time(|| {
            let operands = LinearOperands {
                m,
                x: &x,
                x_stride: work.k,
                bias: Some(&bias),
                residual: Residual::None,
                out: &mut out,
                out_stride: layout.outputs(),
                activation: work.activation,
            };
            kernel.run(pool, &w, operands).expect("valid operands");
        });
        let flops = 2.0 * (m * work.n * work.k) as f64;
        let name = kernel.name(m);
        print!("{:10} {:6} x {:5} m {m:4} t {} {name:26}", work.family, work.n, work.k, pool.threads());
        print!(
            "{:9.1} us {:7.1} GF/s  best {:5.1}%",
            median * 1e6,
            flops / median / 1e9,
            100.0 * flops / best / peak
        );
        print!("  median {:5.1}% of peak", 100.0 * flops / median / peak);
        if m <= 4 {
            let limit = read_rate(pool, isa, layout.bytes()).unwrap_or(f64::NAN);
            let rate = layout.bytes() as f64;
            print!("  {:6.1} GB/s", rate / median / 1e9);
            print!("  best {:5.1}%", 100.0 * rate / best / limit);
            print!("  median {:5.1}% of read", 100.0 * rate / median / limit);
        }
        println!();
    }
}

fn main() {
    let (mut isa, mut threads, mut filter) = (Isa::detect(), vec![1, 2], String::new());
    for argument in std::env::args().skip(1) {
        if let Some(name) = argument.strip_prefix("isa=") {
            isa = name.parse().expect("the name of an instruction set");
        } else if let Some(count) = argument.strip_prefix("threads=") {
            threads = vec![count.parse().expect("a number of threads")];
        } else {
            filter = argument;
        }
    }
    for threads in threads {
        let pool = Pool::new(threads);
        let peak = fma_flops(&pool, isa).unwrap_or(f64::NAN);
        println!("{isa}, {threads} threads: {:.1} GFLOP/s multiply-add peak", peak / 1e9);
        for work in works().iter().filter(|work| work.family.contains(&filter)) {
            measure(&pool, isa, work);
        }
    }
}
