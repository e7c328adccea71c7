//! Picks a device for a graph by policy, and shows what the choice rests on.
//!
//! `cargo run --release -p rlx --example pick_device`

use rlx::TensorArg;
use rlx::devices::{Device, DevicePolicy, GraphDevices};
use rlx_graph::{Graph, GraphError, HirModule, ops::activation::ActivationKind};
use rlx_tensor::{DType, Dim};
use std::error::Error;
use std::num::NonZeroUsize;

/// Two layers with a symbolic number of rows.
fn layers() -> Result<Graph, GraphError> {
    let mut module = HirModule::new("layers");
    let mut hir = module.edit();
    let x = hir.input("x", &[Dim::symbol("rows"), Dim::Known(256)], DType::F32)?;
    let h = hir.linear(x, "up", (512, 256), None, DType::F32)?;
    let h = hir.activation(h, ActivationKind::Gelu)?;
    let y = hir.linear(h, "down", (256, 512), None, DType::F32)?;
    module.finish(&[("y", y)])
}

fn main() -> Result<(), Box<dyn Error>> {
    // A policy forbids and prefers; a preference never overrides a ban. The reference evaluation takes part because it is named.
    let policy = DevicePolicy::only([Device::Cpu, Device::Gpu, Device::Cuda, Device::Reference])
        .with_benchmark_pick(NonZeroUsize::new(3).ok_or("3 is not zero")?);
    let devices = GraphDevices::with_policy(layers()?, policy)?;
    for (name, count) in [("up", 512 * 256), ("down", 256 * 512)] {
        let values: Vec<f32> = (0..count).map(|i| (i % 13) as f32 * 0.01 - 0.06).collect();
        devices.set_param(name, values.as_slice())?;
    }

    println!("by the cost model, at {} rows:", rlx::devices::NOMINAL_EXTENT);
    for row in devices.report() {
        let mark = if row.recommended { "*" } else { " " };
        match (row.blocker, row.predicted_s) {
            (Some(blocker), _) => println!("{mark} {:9} {blocker}", row.device),
            (None, time) => println!("{mark} {:9} {:.3} ms", row.device, time.unwrap_or(0.0) * 1e3),
        }
    }

    let x = vec![0.5f32; 8 * 256];
    let inputs = [("x", TensorArg::typed(&[8, 256], &x))];
    let pick = devices.pick_with_inputs(None, &inputs)?;
    println!("\nby measured runs of 8 rows: {} (verified: {:?})", pick.device, pick.verified);
    for result in &pick.measured {
        match &result.outcome {
            Ok(times) => {
                println!("  {:9} {:?} a run, compiled in {:?}", result.device, times.median, times.compile)
            }
            Err(error) => println!("  {:9} {error}", result.device),
        }
    }

    let y = devices.run_resolved_with_inputs(None, &inputs)?.remove(0).1;
    println!("\ny[0, 0] = {}", y.as_slice::<f32>()?[0]);
    Ok(())
}

#[test]
fn it_runs() -> Result<(), Box<dyn Error>> {
    main()
}
