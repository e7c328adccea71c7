//! Compiles a graph once and specialises it to many sizes.
//!
//! `cargo run --release -p rlx --example many_sizes`

use rlx::devices::Device;
use rlx::pipeline::{ModelCompilePipeline, ModelComponent, ModelVariant};
use rlx::{CompileOptions, State, TensorArg};
use rlx_graph::{Graph, GraphError, HirModule, ops::activation::ActivationKind};
use rlx_tensor::{DType, Dim};
use std::error::Error;
use std::time::Instant;

const WIDTH: usize = 128;

fn blocks() -> Result<Graph, GraphError> {
    let mut module = HirModule::new("blocks");
    let mut hir = module.edit();
    let mut x = hir.input("x", &[Dim::symbol("rows"), Dim::Known(WIDTH)], DType::F32)?;
    for layer in 0..12 {
        let h = hir.linear(x, &format!("{layer}.up"), (2 * WIDTH, WIDTH), None, DType::F32)?;
        let h = hir.activation(h, ActivationKind::Silu)?;
        let h = hir.linear(h, &format!("{layer}.down"), (WIDTH, 2 * WIDTH), None, DType::F32)?;
        x = hir.add(x, h)?;
    }
    module.finish(&[("y", x)])
}

fn main() -> Result<(), Box<dyn Error>> {
    let (graph, options) = (blocks()?, CompileOptions::default());
    let pipeline = ModelCompilePipeline::new(Device::Cpu)?.with_capacity(4)?;

    let started = Instant::now();
    let template = pipeline.ensure_template(&graph, &options)?;
    let compiled = pipeline.compiled(Some(template))?;
    println!("template {template}: {} steps in {:?}", compiled.template().steps().len(), started.elapsed());
    for param in compiled.params() {
        let count = param.shape.known_dims().unwrap_or_default().iter().product();
        let values: Vec<f32> = (0..count).map(|i: usize| (i % 11) as f32 * 0.004 - 0.02).collect();
        compiled.set_param(&param.name, values.as_slice())?;
    }

    for (batch, seq) in [(1, 1), (1, 16), (4, 16), (4, 64), (8, 128), (4, 64)] {
        let component = ModelComponent::new("blocks", ModelVariant::encoder(batch, seq));
        let (before, started) = (pipeline.specialisations(), Instant::now());
        let executable = pipeline.get_or_compile_component(&component, &graph, &options)?;
        let took = started.elapsed();
        let dims = [batch * seq, WIDTH];
        let x = vec![0.25f32; dims[0] * WIDTH];
        let inputs = [("x", TensorArg::typed(&dims, &x))];
        let y = executable.run(&mut State::default(), &inputs)?.remove(0).1;
        println!(
            "{batch} x {seq:3}: {} in {took:?}, arena {:7} bytes, y[0] = {:.4}",
            if pipeline.specialisations() > before { "specialised" } else { "found      " },
            executable.manifest().arena_bytes,
            y.as_slice::<f32>()?[0],
        );
    }
    println!(
        "{} kept, {} bytes; {} specialisations",
        pipeline.len(),
        pipeline.bytes(),
        pipeline.specialisations()
    );
    Ok(())
}

#[test]
fn it_runs() -> Result<(), Box<dyn Error>> {
    main()
}
