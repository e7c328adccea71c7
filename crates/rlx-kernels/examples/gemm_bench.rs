//! Linear layers against the machine's limits: fraction of the multiply-add peak with many rows, of the read rate with
//! few. Arguments: a part of the work's name to run only that, and `isa=NAME`, `threads=N`.

use std::time::Instant;

use rlx_kernels::gemm::{
    Activation, LinearKernel, LinearOperands, PackedMatrix, Precision, Products, Residual, WeightOrder,
    WeightPart, WeightType, pack_on,
};
use rlx_kernels::isa::Isa;
use rlx_kernels::limits::{Reader, fma_flops, fma_rate};
use rlx_kernels::pool::Pool;

struct Work {
    family: &'static str,
    n: usize,
    k: usize,
    gated: bool,
    dtype: WeightType,
    precision: Precision,
    activation: Activation,
    rows: &'static [usize],
}

const fn work(family: &'static str, n: usize, k: usize, rows: &'static [usize]) -> Work {
    let (dtype, precision, activation) = (WeightType::F32, Precision::F32, Activation::None);
    Work { family, n, k, gated: false, dtype, precision, activation, rows }
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
        work("micro", 32, 384, &[14, 7]),
        work("micro", 32, 256, &[14]),
        work("micro", 64, 384, &[14, 28]),
        work("micro", 384, 384, &[14]),
        work("micro", 1152, 384, &[14]),
        Work { precision: Precision::Bf16, ..work("bf16-minilm", 1152, 384, MINILM) },
        Work { precision: Precision::Bf16, ..work("bf16-minilm", 384, 384, MINILM) },
        Work {
            precision: Precision::Bf16,
            activation: Activation::Gelu,
            ..work("bf16-minilm", 1536, 384, MINILM)
        },
        Work { precision: Precision::Bf16, ..work("bf16-minilm", 384, 1536, MINILM) },
        Work { precision: Precision::Bf16, ..work("bf16-qwen", 896, 896, QWEN) },
        Work {
            precision: Precision::Bf16,
            gated: true,
            activation: Activation::Silu,
            ..work("bf16-qwen", 9728, 896, QWEN)
        },
        Work { precision: Precision::Bf16, ..work("bf16-qwen", 896, 4864, QWEN) },
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
    let _ = pack_on(pool, &parts, work.gated, isa, work.precision);
    let start = Instant::now();
    let matrix = pack_on(pool, &parts, work.gated, isa, work.precision).expect("valid parts");
    if bytes.len() > 64 << 20 {
        let rate = bytes.len() as f64 / start.elapsed().as_secs_f64() / 1e9;
        println!("packed {} MiB at {rate:.1} GB/s", bytes.len() >> 20);
    }
    matrix
}

/// Times of calls and of the yardstick beside them, one after the other, so that both meet the same machine.
struct Times {
    median_s: f64,
    /// The rate over the yardstick's.
    fraction: f64,
}

/// `limit` runs the yardstick once and gives its rate, in units of which one call does `units`.
///
/// Only the calls count beside which the yardstick reached almost its best: when something else had a part of the machine, neither
/// the call nor the yardstick says anything.
fn time(units: f64, mut limit: impl FnMut() -> f64, mut call: impl FnMut()) -> Times {
    let start = Instant::now();
    call();
    let once = start.elapsed().as_secs_f64();
    let calls = ((2e-4 / once) as usize).clamp(1, 10_000);
    let mut samples: Vec<(f64, f64, f64)> = Vec::new();
    let begin = Instant::now();
    let mut before = limit();
    while samples.len() < 25 || begin.elapsed().as_secs_f64() < 0.6 {
        let start = Instant::now();
        for _ in 0..calls {
            call();
        }
        let each = start.elapsed().as_secs_f64() / calls as f64;
        let after = limit();
        samples.push((before.min(after), (before + after) / 2.0, each));
        before = after;
    }
    samples.sort_by(|a, b| b.0.total_cmp(&a.0));
    let quiet = samples.iter().take_while(|sample| sample.0 >= 0.95 * samples[0].0).count().max(3);
    let median = |of: fn(&(f64, f64, f64)) -> f64| {
        let mut values: Vec<f64> = samples[..quiet].iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Times { median_s: median(|s| s.2), fraction: units / median(|s| s.1 * s.2) }
}

fn measure(pool: &Pool, isa: Isa, work: &Work, products: Option<Products>) {
    let w = packed(pool, isa, work);
    let layout = *w.layout();
    let products = products.unwrap_or_else(|| Products::choose(work.precision, isa));
    let Some(kernel) = LinearKernel::select(isa, &layout, products) else { return };
    for &m in work.rows {
        let x: Vec<f32> = (0..m * work.k).map(|i| (i % 17) as f32 * 0.01).collect();
        let mut out = vec![0.0f32; m * layout.outputs()];
        let bias = vec![0.1f32; work.n];
        let mut call = || {
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
        };
        let flops = 2.0 * (m * work.n * work.k) as f64;
        let times = time(flops, || fma_rate(pool, isa, 1).unwrap_or(f64::NAN), &mut call);
        let name = kernel.name(m);
        print!("{:10} {:6} x {:5} m {m:4} t {} {name:26}", work.family, work.n, work.k, pool.threads());
        print!("{:9.1} us {:7.1} GF/s", times.median_s * 1e6, flops / times.median_s / 1e9);
        print!("  {:5.1}% of peak", 100.0 * times.fraction);
        if m <= 16 {
            let rate = layout.bytes() as f64;
            let reader = Reader::new(isa, layout.bytes());
            let limit = || reader.as_ref().map_or(f64::NAN, |reader| reader.rate(pool, 1));
            let times = time(rate, limit, &mut call);
            print!("  {:6.1} GB/s", rate / times.median_s / 1e9);
            print!("  {:5.1}% of read", 100.0 * times.fraction);
        }
        println!();
    }
}

fn main() {
    let mut products = None;
    let (mut isa, mut threads, mut filter) = (Isa::detect(), vec![1, 2], String::new());
    for argument in std::env::args().skip(1) {
        if let Some(name) = argument.strip_prefix("isa=") {
            isa = name.parse().expect("the name of an instruction set");
        } else if let Some(name) = argument.strip_prefix("products=") {
            let named = |products: &Products| format!("{products:?}").eq_ignore_ascii_case(name);
            products = Some(Products::ALL.into_iter().find(named).expect("f32, bf16fma or bf16dot"));
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
            measure(&pool, isa, work, products);
        }
    }
}
