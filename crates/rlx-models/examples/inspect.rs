//! Prints a model folder's optimised graph, steps and plan.
use rlx::backend::{Backend, cpu::CpuBackend};
use rlx::import::hf::{HfCacheDirs, HfFolder};
use rlx_models::{BuildOptions, build_folder};
use rlx_tensor::DimBinding;
use std::sync::Arc;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("give a model folder")?;
    let folder = HfFolder::open(&path, &HfCacheDirs::default())?;
    let weights = folder.weights()?;
    let built = build_folder(&folder, &weights, &BuildOptions::default())?;
    let backend: Arc<dyn Backend> = Arc::new(CpuBackend::new(rlx_kernels::isa::Isa::detect(), 2));
    let started = Instant::now();
    let compiled = rlx_models::runtime::compile(built.graph(), &weights, &backend)?;
    println!("compile {:?}", started.elapsed());
    println!("{}", compiled.graph());
    let report = compiled.report()?;
    for pass in &report.passes.passes {
        println!(
            "{:22} {:4} -> {:4} nodes, {:3} rewrites, {} us",
            pass.pass, pass.nodes_before, pass.nodes_after, pass.fired, pass.micros
        );
    }
    println!("compile {} us", report.compile_micros);
    for step in &report.steps {
        println!("{:20} {}", step.op, step.kernel);
    }
    let mut binding = DimBinding::new();
    for symbol in compiled.template().sizes().symbols() {
        binding = binding.with(symbol.name(), if symbol.name() == "rows" { 1024 } else { 32 });
    }
    for _ in 0..3 {
        let started = Instant::now();
        let lir = compiled.specialize(&binding)?;
        println!(
            "specialise {:?}: arena {} bytes, bound {}",
            started.elapsed(),
            lir.arena_bytes(),
            lir.live_bytes_bound()
        );
    }
    Ok(())
}
