//! Compares the order in which the cost model puts graphs and devices with the order that measuring gives.
//!
//! `cargo run --release -p rlx --example rank_devices`

use rlx::backend::Backend;
use rlx::backend::cpu::CpuBackend;
use rlx::backend::reference::ReferenceBackend;
use rlx::devices::{calibrate, predict};
use rlx::session::RunContext;
use rlx::{CompiledGraph, Session, State, TensorArg};
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::{Graph, GraphError, HirModule};
use rlx_kernels::isa::Isa;
use rlx_tensor::{DType, Dim, DimBinding};
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

/// Layers of a width, with weights of a dtype.
fn layers(width: usize, depth: usize, dtype: DType) -> Result<Graph, GraphError> {
    let mut module = HirModule::new(format!("{depth} layers of {width} {dtype}"));
    let mut hir = module.edit();
    let mut x = hir.input("x", &[Dim::symbol("rows"), Dim::Known(width)], DType::F32)?;
    for layer in 0..depth {
        let h = hir.layer_norm(x, &format!("{layer}.norm"), None, width, 1e-5, DType::F32)?;
        let h = hir.linear(h, &format!("{layer}.up"), (2 * width, width), None, dtype)?;
        let h = hir.activation(h, ActivationKind::Gelu)?;
        let h = hir.linear(h, &format!("{layer}.down"), (width, 2 * width), None, dtype)?;
        x = hir.add(x, h)?;
    }
    module.finish(&[("y", x)])
}

fn shared(backend: impl Backend + 'static) -> Arc<dyn Backend> {
    Arc::new(backend)
}

fn fill(compiled: &CompiledGraph) -> Result<(), Box<dyn Error>> {
    for param in compiled.params() {
        let dims = param.shape.known_dims().unwrap_or_default();
        let values: Vec<f64> =
            (0..dims.iter().product()).map(|i: usize| (i % 9) as f64 * 0.01 - 0.04).collect();
        compiled.set_param(&param.name, &rlx_graph::eval::from_f64(&dims, param.shape.dtype(), &values)?)?;
    }
    Ok(())
}

/// The median of some runs, in seconds.
fn measure(context: &mut RunContext, rows: usize, width: usize) -> Result<f64, Box<dyn Error>> {
    let x = vec![0.1f32; rows * width];
    let dims = [rows, width];
    let inputs = [("x", TensorArg::typed(&dims, &x))];
    let mut times = Vec::new();
    let begun = Instant::now();
    while times.len() < 3 || (times.len() < 15 && begun.elapsed().as_millis() < 150) {
        let started = Instant::now();
        context.run(&mut State::default(), &inputs)?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn main() -> Result<(), Box<dyn Error>> {
    let backends: Vec<(String, Arc<dyn Backend>)> = vec![
        ("scalar, 1 thread".into(), shared(CpuBackend::new(Isa::Scalar, 1))),
        (format!("{}, 1 thread", Isa::detect()), shared(CpuBackend::new(Isa::detect(), 1))),
        (format!("{}, 2 threads", Isa::detect()), shared(CpuBackend::new(Isa::detect(), 2))),
        ("reference".into(), shared(ReferenceBackend::default())),
    ];
    let mut pairs = Vec::new();
    for (name, backend) in &backends {
        let started = Instant::now();
        let rates = calibrate(backend)?;
        println!("{name}: calibrated in {:?}: {rates:?}", started.elapsed());
        for (width, depth, dtype, rows) in [
            (64, 2, DType::F32, 1),
            (256, 2, DType::F32, 1),
            (256, 2, DType::F32, 32),
            (512, 3, DType::F32, 1),
            (512, 3, DType::BF16, 1),
            (384, 4, DType::F32, 64),
        ] {
            if name == "reference" && rows * width * width * depth > 10_000_000 {
                continue;
            }
            let compiled =
                Session::with_backend(Arc::clone(backend)).compile(&layers(width, depth, dtype)?)?;
            fill(&compiled)?;
            let sizes = DimBinding::new().with("rows", rows);
            let predicted = predict(compiled.template(), &sizes, &rates)?.seconds();
            let measured = measure(&mut compiled.context(&compiled.specialize(&sizes)?)?, rows, width)?;
            println!(
                "  {:24} {rows:3} rows: predicted {:9.1} us, measured {:9.1} us",
                compiled.template().name(),
                predicted * 1e6,
                measured * 1e6
            );
            pairs.push((predicted, measured));
        }
    }
    let (mut agree, mut clear) = (0, 0);
    for (i, a) in pairs.iter().enumerate() {
        for b in &pairs[i + 1..] {
            // Pairs that measuring itself puts within a quarter of each other have no order to agree with.
            if (a.1 / b.1).ln().abs() > 0.25f64.ln_1p() {
                clear += 1;
                agree += usize::from((a.0 < b.0) == (a.1 < b.1));
            }
        }
    }
    println!("the order of {agree} of {clear} pairs agrees");
    Ok(())
}

#[test]
fn it_runs() -> Result<(), Box<dyn Error>> {
    main()
}
