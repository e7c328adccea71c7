//! Whether devices compute right, and how fast: the op cases, then bandwidth, products and whole models on random weights.
//!
//! ```text
//! cargo run --release -p rlx-gpu --features wgpu,cuda --example gpu_bench -- [--dry] [--device NAME] [--json]
//! ```
//!
//! `cargo xtask gpu-bench` runs it and puts PyTorch's times beside; the program alone needs neither a compiler nor a network.

mod graphs;

use graphs::{Sizes, WIDTH};
use rlx::backend::cpu::Precision;
use rlx::backend::{Backend, BackendError, BackendProvider, DeviceProbe};
use rlx::config::{Config, Switch};
use rlx::devices::Device;
use rlx::{CompiledGraph, Session, SessionError, State, TensorArg};
use rlx_graph::Graph;
use rlx_tensor::{DType, DimBinding, Tensor};
use std::collections::BTreeMap;
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Types of packed weights that are timed.
const PACKED: [DType; 2] = [DType::Q8_0, DType::Q4_K];

/// How large the work is.
struct Scale {
    /// Rows of [`WIDTH`] elements.
    rows: usize,
    vectors: (usize, usize),
    product: usize,
    encoder: Sizes,
    encoder_batches: &'static [(usize, usize)],
    decoders: &'static [(&'static str, Sizes)],
    prompt: usize,
    budget: Duration,
}

const MINILM: Sizes =
    Sizes { layers: 6, width: 384, heads: 12, kv_heads: 12, head_dim: 32, inner: 1536, vocab: 30_522 };
const HALF: Sizes =
    Sizes { layers: 24, width: 896, heads: 14, kv_heads: 2, head_dim: 64, inner: 4864, vocab: 151_936 };
const SEVEN: Sizes =
    Sizes { layers: 28, width: 3584, heads: 28, kv_heads: 4, head_dim: 128, inner: 18_944, vocab: 152_064 };
const TINY: Sizes =
    Sizes { layers: 2, width: 64, heads: 4, kv_heads: 2, head_dim: 16, inner: 96, vocab: 300 };

const WHOLE: Scale = Scale {
    rows: 1 << 15,
    vectors: (4096, 16),
    product: 8192,
    encoder: MINILM,
    encoder_batches: &[(32, 128), (256, 128)],
    decoders: &[("Qwen2.5-0.5B shape", HALF), ("7B shape", SEVEN)],
    prompt: 512,
    budget: Duration::from_millis(700),
};
const DRY: Scale = Scale {
    rows: 8,
    vectors: (64, 3),
    product: 64,
    encoder: Sizes { kv_heads: 4, ..TINY },
    encoder_batches: &[(2, 8)],
    decoders: &[("tiny decoder", TINY)],
    prompt: 9,
    budget: Duration::ZERO,
};

/// A line of the table.
struct Row {
    work: String,
    milliseconds: f64,
    rate: f64,
    unit: &'static str,
}

/// How a device multiplies, in words of rows, and the device.
type Way = (&'static str, Arc<dyn Backend>);

/// What rows are told by whose products are left to cuBLASLt.
const BLAS: &str = ", cuBLASLt";

/// A device with what was measured on it.
struct Bench<'s> {
    /// With products in f32.
    backend: Arc<dyn Backend>,
    /// With products in bf16, each with what its rows are told by.
    others: Vec<Way>,
    /// With products in f32 that are left to cuBLASLt.
    by_blas: Option<Way>,
    scale: &'s Scale,
    rows: Vec<Row>,
    refused: Vec<String>,
}

/// Words of noise: floats, or pairs of bfloat16, from 2^-6 to 2^-5 of either sign; of blocks, whose scales may stand anywhere, pairs of
/// binary16 of 2^-14.
fn noise(bytes: usize, dtype: DType) -> Vec<u8> {
    let (keep, exponent) = match dtype {
        DType::BF16 => (0x807f_807f, 0x3c80_3c80),
        dtype if dtype.block().0 > 1 => (0x83ff_83ff, 0x0400_0400),
        _ => (0x807f_ffff, 0x3c80_0000u32),
    };
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut words = Vec::with_capacity(bytes.next_multiple_of(4));
    while words.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words.extend_from_slice(&((state >> 16) as u32 & keep | exponent).to_le_bytes());
    }
    words.truncate(bytes);
    words
}

impl<'s> Bench<'s> {
    /// The device in each precision.
    fn open(provider: &dyn BackendProvider, index: u32, config: &Config, scale: &'s Scale) -> Outcome<Self> {
        let open = |precision: Precision, blas: bool| -> Outcome<Arc<dyn Backend>> {
            let mut config = config.clone();
            config.precision = Some(precision);
            config.cuda_blas = Some(Switch(blas));
            let backend = provider.open(index, &config)?;
            println!("{}: {}", backend.name(), backend.capabilities().join(", "));
            Ok(backend)
        };
        let (backend, mut others) = (open(Precision::F32, false)?, vec![("", open(Precision::Bf16, false)?)]);
        let mut by_blas = None;
        if provider.kind() == Device::Cuda {
            // What its rows would be told by is the library; without one they would be others.
            let has = |way: &Way| way.1.capabilities().iter().any(|text| text.contains("by cuBLASLt"));
            let open =
                |precision| -> Outcome<Option<Way>> { Ok(Some((BLAS, open(precision, true)?)).filter(has)) };
            by_blas = open(Precision::F32)?;
            others.extend(open(Precision::Bf16)?);
        }
        Ok(Bench { backend, others, by_blas, scale, rows: Vec::new(), refused: Vec::new() })
    }

    /// The device under each way of multiplying weights of bf16.
    fn ways(&self) -> Vec<Way> {
        let wide = (", f32 operands", Arc::clone(&self.backend));
        std::iter::once(wide).chain(self.others.iter().cloned()).collect()
    }

    /// The device under each way of multiplying weights of f32 in f32.
    fn wide_ways(&self) -> Vec<Way> {
        std::iter::once(("", Arc::clone(&self.backend))).chain(self.by_blas.clone()).collect()
    }

    fn compile(&self, graph: &Graph) -> Outcome<CompiledGraph> {
        Self::compile_on(&self.backend, graph)
    }

    fn compile_on(backend: &Arc<dyn Backend>, graph: &Graph) -> Outcome<CompiledGraph> {
        let compiled = Session::with_backend(Arc::clone(backend)).compile(graph)?;
        for param in compiled.params() {
            let dtype = param.shape.dtype();
            let elements: usize = param.shape.dims().iter().map(|dim| dim.known().unwrap_or(1)).product();
            let bytes = noise(dtype.bytes_for(elements).unwrap_or(4 * elements), dtype);
            compiled.set_param_typed(&param.name, &bytes, dtype)?;
        }
        Ok(compiled)
    }

    /// The median time of a run in seconds, after two that are not timed.
    fn seconds(
        &self,
        compiled: &CompiledGraph,
        state: &mut State,
        inputs: &[(&str, TensorArg<'_>)],
    ) -> Outcome<f64> {
        for _ in 0..2 {
            compiled.run_with(state, inputs)?;
        }
        let (begun, mut times) = (Instant::now(), Vec::new());
        while times.len() < 3 || (begun.elapsed() < self.scale.budget && times.len() < 200) {
            let started = Instant::now();
            compiled.run_with(state, inputs)?;
            times.push(started.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    fn alone(&self, graph: &Graph) -> Outcome<f64> {
        self.seconds(&self.compile(graph)?, &mut State::default(), &[])
    }

    fn row(&mut self, work: impl Into<String>, seconds: f64, amount: f64, unit: &'static str) {
        let row = Row { work: work.into(), milliseconds: seconds * 1e3, rate: amount / seconds, unit };
        println!("{:44} {:10.3} ms {:12.1} {}", row.work, row.milliseconds, row.rate, row.unit);
        self.rows.push(row);
    }

    /// Op cases in their plain form, without states: how many agree with what is expected.
    fn cases(&mut self) -> Outcome<()> {
        let (mut agree, mut wrong) = (0usize, Vec::new());
        let cases = rlx_conformance::cases()?;
        let cases: Vec<_> = cases.into_iter().filter(|case| case.states.is_empty()).collect();
        for case in &cases {
            let session = Session::with_backend(Arc::clone(&self.backend));
            let compiled = match session.compile(&case.graph()?) {
                Ok(compiled) => compiled,
                Err(error) => {
                    self.refused.push(format!("{}, {}: {error}", case.op, case.name));
                    continue;
                }
            };
            let inputs = case.named_inputs();
            let given: Vec<(&str, TensorArg<'_>)> =
                inputs.iter().map(|(name, tensor)| (name.as_str(), tensor.into())).collect();
            match compiled.run(&given) {
                Ok(results) => match case.compare(&results, &BTreeMap::<String, Tensor>::new(), 8) {
                    Ok(()) => agree += 1,
                    Err(difference) => wrong.push(difference.to_string()),
                },
                Err(error @ SessionError::Backend(BackendError::Unsupported { .. })) => {
                    self.refused.push(format!("{}, {}: {error}", case.op, case.name));
                }
                Err(error) => wrong.push(format!("{}, {}: {error}", case.op, case.name)),
            }
        }
        println!("op cases: {agree} of {} agree, {} refused", cases.len(), self.refused.len());
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(format!("{} op cases are wrong: {}", wrong.len(), wrong.join("; ")).into()),
        }
    }

    fn bandwidth(&mut self) -> Outcome<()> {
        let count = self.scale.rows;
        let sums = self.alone(&graphs::sums(count)?)?;
        let bytes = (count * WIDTH * 8) as f64 / 1e9;
        let work: [(&str, Graph); 3] = [
            ("copy", graphs::copy(count)?),
            ("fused elementwise", graphs::elementwise(count)?),
            ("rms norm", graphs::norm(count)?),
        ];
        for (name, graph) in work {
            let seconds = (self.alone(&graph)? - sums).max(1e-9);
            self.row(name, seconds, bytes, "GB/s");
        }
        Ok(())
    }

    fn products(&mut self) -> Outcome<()> {
        let (width, layers) = self.scale.vectors;
        for (way, backend) in self.ways() {
            self.products_of(&backend, DType::BF16, (width, layers), self.scale.product, way)?;
        }
        let backend = Arc::clone(&self.backend);
        for dtype in PACKED {
            let whole = |n: usize| n.next_multiple_of(dtype.block().0);
            self.products_of(&backend, dtype, (whole(width), layers), whole(self.scale.product), "")?;
        }
        for (way, backend) in self.wide_ways() {
            self.square(&backend, DType::F32, self.scale.product, way)?;
        }
        Ok(())
    }

    /// One row by layers after another, and a square of rows by one, with weights of a type.
    fn products_of(
        &mut self,
        backend: &Arc<dyn Backend>,
        dtype: DType,
        (width, layers): (usize, usize),
        n: usize,
        way: &str,
    ) -> Outcome<()> {
        let compiled = Self::compile_on(backend, &graphs::vectors(width, layers, dtype)?)?;
        let x = vec![0.01f32; width];
        let dims = [1, width];
        let inputs = [("x", TensorArg::typed(&dims, &x))];
        let seconds = self.seconds(&compiled, &mut State::default(), &inputs)?;
        let bytes = layers * dtype.bytes_for(width * width).unwrap_or_default();
        self.row(format!("decode GEMV {dtype}{way}"), seconds, bytes as f64 / 1e9, "GB/s");
        self.square(backend, dtype, n, way)
    }

    /// A square product; of one by cuBLASLt also without what goes before it, as the second of two costs.
    fn square(&mut self, backend: &Arc<dyn Backend>, dtype: DType, n: usize, way: &str) -> Outcome<()> {
        let operations = 2.0 * (n as f64).powi(3) / 1e12;
        let time =
            |graph: &Graph| self.seconds(&Self::compile_on(backend, graph)?, &mut State::default(), &[]);
        let seconds = time(&graphs::product(n, dtype)?)?;
        let second = match way {
            BLAS => Some(time(&graphs::products(n, 2, dtype)?)? - time(&graphs::products(n, 1, dtype)?)?),
            _ => None,
        };
        self.row(format!("GEMM {dtype} {n}^3{way}"), seconds, operations, "TFLOP/s");
        if let Some(seconds) = second {
            self.row(format!("GEMM {dtype} {n}^3{way}, a second"), seconds.max(1e-9), operations, "TFLOP/s");
        }
        Ok(())
    }

    fn encoders(&mut self) -> Outcome<()> {
        for (way, backend) in self.wide_ways() {
            let compiled = Self::compile_on(&backend, &graphs::encoder(self.scale.encoder)?)?;
            self.encoder(&compiled, way)?;
        }
        Ok(())
    }

    fn encoder(&mut self, compiled: &CompiledGraph, way: &str) -> Outcome<()> {
        for &(batch, tokens) in self.scale.encoder_batches {
            let ids: Vec<i32> =
                (0..batch * tokens).map(|i| (i * 31 % self.scale.encoder.vocab) as i32).collect();
            let starts: Vec<i32> = (0..=batch).map(|b| (b * tokens) as i32).collect();
            let (rows, ends) = ([ids.len()], [starts.len()]);
            let inputs =
                [("ids", TensorArg::typed(&rows, &ids)), ("starts", TensorArg::typed(&ends, &starts))];
            let seconds = self.seconds(compiled, &mut State::default(), &inputs)?;
            self.row(format!("MiniLM {batch}x{tokens}{way}"), seconds, (batch * tokens) as f64, "tokens/s");
        }
        Ok(())
    }

    fn decoders(&mut self) -> Outcome<()> {
        let models = self
            .scale
            .decoders
            .iter()
            .flat_map(|&model| self.ways().into_iter().map(move |way| (model, way)));
        for ((name, sizes), (way, backend)) in models.collect::<Vec<_>>() {
            let compiled = Self::compile_on(&backend, &graphs::decoder(sizes)?)?;
            let prompt = self.scale.prompt;
            let blocks = (prompt + 1).div_ceil(64);
            let mut state = compiled.new_state(&DimBinding::new().with("blocks", blocks))?;
            let (table, blocks_of): (Vec<i32>, _) = ((0..blocks as i32).collect(), [1, blocks]);
            for (work, past, count) in [("prefill", 0, prompt), ("decode", prompt, 1)] {
                let ids: Vec<i32> = (0..count).map(|i| (i * 31 % sizes.vocab) as i32).collect();
                let positions: Vec<i32> = (past..past + count).map(|p| p as i32).collect();
                let (rows, starts, at, last) =
                    ([count], [0, count as i32], [past as i32], [count as i32 - 1]);
                let inputs = [
                    ("ids", TensorArg::typed(&rows, &ids)),
                    ("positions", TensorArg::typed(&rows, &positions)),
                    ("starts", TensorArg::typed(&[2], &starts)),
                    ("past", TensorArg::typed(&[1], &at)),
                    ("last", TensorArg::typed(&[1], &last)),
                    ("block_table", TensorArg::typed(&blocks_of, &table)),
                ];
                let seconds = self.seconds(&compiled, &mut state, &inputs)?;
                self.row(format!("{name}, {work} {prompt}{way}"), seconds, count as f64, "tokens/s");
            }
        }
        Ok(())
    }

    /// Everything; work that the device refuses is named and left out, wrong results are an error.
    fn run(&mut self) -> Outcome<()> {
        self.cases()?;
        for work in [Self::bandwidth, Self::products, Self::encoders, Self::decoders] {
            if let Err(error) = work(self) {
                println!("left out: {error}");
                self.refused.push(error.to_string());
            }
        }
        Ok(())
    }

    fn json(&self, device: &str) -> serde_json::Value {
        let row = |row: &Row| serde_json::json!({"work": row.work, "ms": row.milliseconds, "rate": row.rate, "unit": row.unit});
        serde_json::json!({
            "device": device,
            "name": self.backend.name(),
            "capabilities": self.backend.capabilities(),
            "others": self.others.iter().chain(&self.by_blas).map(|(_, other)| other.capabilities()).collect::<Vec<_>>(),
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "left_out": self.refused,
        })
    }
}

/// The devices of this build and machine, and for kinds without any why.
fn devices(wanted: Option<&str>) -> Vec<(String, Arc<dyn BackendProvider>, u32)> {
    let mut found = Vec::new();
    for provider in [rlx_gpu::provider(), rlx_gpu::cuda_provider()].into_iter().flatten() {
        let kind = provider.kind().name();
        match provider.probe() {
            DeviceProbe::Present(count) => {
                let own = (0..count).map(|index| (format!("{kind}:{index}"), Arc::clone(&provider), index));
                found.extend(own.filter(|(name, ..)| wanted.is_none_or(|w| w == name || w == kind)));
            }
            DeviceProbe::Absent(reason) => println!("{kind}: {reason}"),
        }
    }
    found
}

fn run(args: &[String]) -> Outcome<()> {
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let wanted = args.iter().position(|arg| arg == "--device").and_then(|at| args.get(at + 1));
    let scale = if has("--dry") { &DRY } else { &WHOLE };
    let mut reports = Vec::new();
    for (name, provider, index) in devices(wanted.map(String::as_str)) {
        println!("\n{name}");
        let mut bench = Bench::open(&*provider, index, &Config::default(), scale)?;
        bench.run()?;
        reports.push(bench.json(&name));
    }
    if reports.is_empty() {
        return Err("no device to measure".into());
    }
    if has("--json") {
        println!("{}", serde_json::Value::Array(reports));
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On Mesa's driver, which computes on the processor, in CI; a build without devices has nothing to measure.
    #[test]
    fn the_dry_run_measures_every_row_of_the_table() {
        let found = devices(Some("gpu:0")).into_iter().next();
        if found.is_none() && cfg!(not(feature = "wgpu")) {
            println!("skipped: this build has no devices (`--features wgpu`)");
            return;
        }
        let (_, provider, index) = found.expect("Vulkan shows an adapter; Mesa's software driver is enough");
        let mut config = Config::default();
        config.cache_bytes = Some(rlx::config::ByteSize(0));
        let mut bench = Bench::open(&*provider, index, &config, &DRY).unwrap();
        bench.run().unwrap();
        let works: Vec<&str> = bench.rows.iter().map(|row| row.work.as_str()).collect();
        let expected = [
            "copy",
            "fused elementwise",
            "rms norm",
            "decode GEMV bf16, f32 operands",
            "GEMM bf16 64^3, f32 operands",
            "decode GEMV bf16",
            "GEMM bf16 64^3",
            "decode GEMV Q8_0",
            "GEMM Q8_0 64^3",
            "decode GEMV Q4_K",
            "GEMM Q4_K 256^3",
            "GEMM f32 64^3",
            "MiniLM 2x8",
            "tiny decoder, prefill 9, f32 operands",
            "tiny decoder, decode 9, f32 operands",
            "tiny decoder, prefill 9",
            "tiny decoder, decode 9",
        ];
        assert_eq!(works, expected, "{:?}", bench.refused);
        assert!(bench.rows.iter().all(|row| row.milliseconds > 0.0 && row.rate.is_finite()));
    }

    /// Rows of products that are left to a library, by the interpreter that stands for it.
    #[test]
    fn a_device_with_a_library_has_rows_of_its_own() {
        let (backend, by_library) = (rlx_gpu::emulated(), rlx_gpu::emulated_by_library);
        let (others, by_blas) =
            (vec![(BLAS, by_library(Precision::Bf16))], Some((BLAS, by_library(Precision::F32))));
        let scale = Scale { encoder_batches: &[(1, 3)], ..DRY };
        let mut bench =
            Bench { backend, others, by_blas, scale: &scale, rows: Vec::new(), refused: Vec::new() };
        for (way, backend) in bench.ways() {
            bench.square(&backend, DType::BF16, 16, way).unwrap();
        }
        for (way, backend) in bench.wide_ways() {
            bench.square(&backend, DType::F32, 16, way).unwrap();
        }
        bench.encoders().unwrap();
        let works: Vec<&str> = bench.rows.iter().map(|row| row.work.as_str()).collect();
        let expected = [
            "GEMM bf16 16^3, f32 operands",
            "GEMM bf16 16^3, cuBLASLt",
            "GEMM bf16 16^3, cuBLASLt, a second",
            "GEMM f32 16^3",
            "GEMM f32 16^3, cuBLASLt",
            "GEMM f32 16^3, cuBLASLt, a second",
            "MiniLM 1x3",
            "MiniLM 1x3, cuBLASLt",
        ];
        assert_eq!(works, expected);
    }
}
