//! Times a model beside another engine: `onnx_worker MODEL.onnx OUTPUT.npy NAME=F.npy ..`.
//!
//! Runs once, writes the first output, says `ready` with the milliseconds until the model was imported and until the first run had
//! ended, then answers each line of standard input, a number of runs, with their milliseconds. A line `steps N` is answered by a line for each
//! step: mean microseconds of N runs, GFLOP/s where its sizes are known, the op, its kernel and the node.

use rlx::Session;
use rlx_onnx::{OnnxModel, Value, read_npy, write_npy};
use std::io::BufRead;
use std::time::Instant;

const USAGE: &str = "usage: onnx_worker MODEL.onnx OUTPUT.npy NAME=F.npy ..";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, output, given @ ..] = args.as_slice() else { return Err(USAGE.into()) };
    let mut inputs = Vec::new();
    for text in given {
        let (name, file) = text.split_once('=').ok_or(USAGE)?;
        inputs.push((name, Value::from(read_npy(file.as_ref())?)));
    }
    let started = Instant::now();
    let millis = || started.elapsed().as_secs_f64() * 1e3;
    let model = OnnxModel::open_on(model, &Session::new(rlx::devices::Device::Cpu)?)?;
    let imported = millis();
    let results = model.run(&inputs)?;
    println!("ready {imported:.2} {:.2}", millis());
    write_npy(output.as_ref(), &results[0].1)?;
    println!("written");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if let Some(runs) = line.strip_prefix("steps ") {
            time_steps(&model, &inputs, runs.trim().parse()?)?;
            continue;
        }
        let mut times = Vec::new();
        for _ in 0..line.trim().parse::<usize>()? {
            let started = Instant::now();
            model.run(&inputs)?;
            times.push(format!("{:.4}", started.elapsed().as_secs_f64() * 1e3));
        }
        println!("{}", times.join(" "));
    }
    Ok(())
}

fn time_steps(
    model: &OnnxModel,
    inputs: &[(&str, Value)],
    runs: u32,
) -> Result<(), Box<dyn std::error::Error>> {
    model.time_steps()?;
    for _ in 0..runs {
        model.run(inputs)?;
    }
    for region in model.regions() {
        for (step, time) in region.times().into_iter().flat_map(|times| times.steps()) {
            let micros = time.as_secs_f64() * 1e6 / f64::from(runs.max(1));
            let rate = step.flops.known().map_or(0.0, |flops| flops as f64 / micros / 1e3);
            println!("{micros:9.1} {rate:8.0} {} {} {}", step.op, step.kernel, step.location);
        }
    }
    Ok(())
}
