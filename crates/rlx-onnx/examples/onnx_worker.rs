//! Times a model beside another engine: `onnx_worker MODEL.onnx INPUT.npy OUTPUT.npy`.
//!
//! Runs once, writes the first output, then answers each line of standard input, a number of runs, with their milliseconds.

use rlx::Session;
use rlx_onnx::{OnnxModel, Value, read_npy, write_npy};
use std::io::BufRead;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, input, output] = args.as_slice() else {
        return Err("usage: onnx_worker MODEL.onnx INPUT.npy OUTPUT.npy".into());
    };
    let started = Instant::now();
    let model = OnnxModel::open_on(model, &Session::new(rlx::devices::Device::Cpu)?)?;
    let name = model.program().inputs().next().map(|(d, _)| d.name.clone()).unwrap_or_default();
    let value = Value::from(read_npy(input.as_ref())?);
    let results = model.run(&[(name.as_str(), value.clone())])?;
    write_npy(output.as_ref(), &results[0].1)?;
    eprintln!("first run after {:.0} ms", started.elapsed().as_secs_f64() * 1e3);
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let mut millis = Vec::new();
        for _ in 0..line?.trim().parse::<usize>()? {
            let started = Instant::now();
            model.run(&[(name.as_str(), value.clone())])?;
            millis.push(format!("{:.4}", started.elapsed().as_secs_f64() * 1e3));
        }
        println!("{}", millis.join(" "));
    }
    Ok(())
}
