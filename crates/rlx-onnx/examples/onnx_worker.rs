//! Times a model beside another engine: `onnx_worker MODEL.onnx OUTPUT.npy NAME=F.npy ..`.
//!
//! Runs once, writes the first output, says `ready` with the milliseconds until the model was imported and until the first run had
//! ended, then answers each line of standard input, a number of runs, with their milliseconds.

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
        let mut times = Vec::new();
        for _ in 0..line?.trim().parse::<usize>()? {
            let started = Instant::now();
            model.run(&inputs)?;
            times.push(format!("{:.4}", started.elapsed().as_secs_f64() * 1e3));
        }
        println!("{}", times.join(" "));
    }
    Ok(())
}
