//! Builds a graph and runs it on every device that there is.
//!
//! `cargo run --release -p rlx --example every_device`

use rlx::TensorArg;
use rlx::devices::{Device, DeviceId, DevicePolicy, GraphDevices};
use rlx_graph::{Graph, GraphError, HirModule, ops::binary::BinaryOp, ops::reduce::ReduceOp};
use rlx_tensor::{DType, Dim};
use std::error::Error;

/// `softmax(x w)`, and each row's largest element.
fn graph() -> Result<Graph, GraphError> {
    let mut module = HirModule::new("classes");
    let mut hir = module.edit();
    let x = hir.input("x", &[Dim::symbol("rows"), Dim::Known(4)], DType::F32)?;
    let scores = hir.linear(x, "w", (3, 4), None, DType::F32)?;
    let scores = hir.scalar(BinaryOp::Mul, scores, 2.0)?;
    let classes = hir.op(rlx_graph::ops::softmax::Softmax { axis: 1 }, &[scores])?;
    let best = hir.reduce(ReduceOp::Max, classes, &[1], false)?;
    module.finish(&[("classes", classes), ("best", best)])
}

fn main() -> Result<(), Box<dyn Error>> {
    // All kinds of hardware, and the reference evaluation, which a policy has to name.
    let kinds = Device::ALL.into_iter().chain([Device::Reference]);
    let devices = GraphDevices::with_policy(graph()?, DevicePolicy::only(kinds))?;
    devices.set_param("w", &[1.0f32, 0.0, 0.0, 0.5, 0.0, 1.0, 0.0, 0.5, 0.0, 0.0, 1.0, 0.5][..])?;

    let x = [1.0f32, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0];
    let inputs = [("x", TensorArg::typed(&[2, 4], &x))];
    for device in devices.devices() {
        let results = devices.run(device, &inputs)?;
        println!("{device:9} best = {:?}", results[1].1.as_slice::<f32>()?);
        for step in devices.compile(device)?.report()?.steps {
            println!("          {} by {}", step.op, step.kernel);
        }
    }

    // The first of a chain that works; what cannot be used is passed over, and told about if nothing is left.
    let chain: Vec<DeviceId> = vec![Device::Cuda.into(), Device::Gpu.into(), Device::Cpu.into()];
    let (device, _) = devices.run_try(&chain, &inputs)?;
    println!(
        "the first device of {} that ran it: {device}",
        chain.iter().map(|d| d.to_string()).collect::<Vec<_>>().join(", ")
    );
    match devices.run_try(&chain[..1], &inputs) {
        Ok((device, _)) => println!("{device} ran it as well"),
        Err(error) => println!("{error}"),
    }
    Ok(())
}

#[test]
fn it_runs() -> Result<(), Box<dyn Error>> {
    main()
}
