//! `cargo xtask gpu-bench`: devices held to the op cases and timed, with PyTorch beside, as one table and one JSON file.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::Config;
use crate::process;

const TABLE: &str = "target/gpu-bench.json";
const FEATURES: &str = "wgpu,cuda";

/// What the arguments ask for.
#[derive(Default)]
struct Args {
    /// Small sizes: whether everything runs, not how fast.
    dry: bool,
    /// A program that was built before.
    program: Option<PathBuf>,
    device: Option<String>,
}

fn parse(args: &[String]) -> Result<Args, String> {
    let (mut parsed, mut rest) = (Args::default(), args.iter());
    while let Some(arg) = rest.next() {
        let mut value = || rest.next().cloned().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--dry" => parsed.dry = true,
            "--program" => parsed.program = Some(value()?.into()),
            "--device" => parsed.device = Some(value()?),
            other => return Err(format!("gpu-bench takes no argument `{other}`")),
        }
    }
    Ok(parsed)
}

pub fn run(config: &Config, args: &[String]) -> Result<(), String> {
    let args = parse(args)?;
    let program = match args.program {
        Some(program) => program,
        None => build(&config.root)?,
    };
    let mut command = process::command(&program.to_string_lossy(), &["--json"], &config.root);
    command.args(args.dry.then_some("--dry"));
    if let Some(device) = &args.device {
        command.args(["--device", device]);
    }
    let output = process::capture(&mut command)?;
    let last = output.lines().last().unwrap_or_default();
    let devices: Value = serde_json::from_str(last).map_err(|e| format!("no report at the end: {e}"))?;
    print!("{}", output.trim_end_matches(last));
    let torch = if args.dry { Vec::new() } else { torch_rows(&config.root) };
    println!("\n{}", table(&devices, &torch));
    let path = config.root.join(TABLE);
    let report = serde_json::json!({"devices": devices, "torch": torch, "dry": args.dry});
    std::fs::write(&path, report.to_string()).map_err(|e| format!("cannot write {TABLE}: {e}"))?;
    println!("written to {TABLE}");
    Ok(())
}

fn build(root: &Path) -> Result<PathBuf, String> {
    let args =
        ["build", "--release", "--locked", "-p", "rlx-gpu", "--example", "gpu_bench", "--features", FEATURES];
    process::run(&mut process::command("cargo", &args, root))?;
    Ok(root.join("target/release/examples/gpu_bench"))
}

/// PyTorch's rows; none where it, or a card that it sees, is not there.
fn torch_rows(root: &Path) -> Vec<Value> {
    let there = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)";
    if process::capture(&mut process::command("python3", &["-c", there], root)).is_err() {
        println!("PyTorch with CUDA is not here: its columns stay empty");
        return Vec::new();
    }
    match process::capture(&mut process::command("python3", &["scripts/gpu/torch_rows.py"], root)) {
        Ok(output) => output.lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
        Err(error) => {
            println!("PyTorch's rows failed: {error}");
            Vec::new()
        }
    }
}

/// A row for each work, a column for each device and each way of PyTorch.
fn table(devices: &Value, torch: &[Value]) -> String {
    let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut works: Vec<String> = Vec::new();
    for row in devices.iter().flat_map(|device| device["rows"].as_array()).flatten() {
        if !works.contains(&text(&row["work"])) {
            works.push(text(&row["work"]));
        }
    }
    let mut columns: Vec<String> = devices.iter().map(|device| text(&device["device"])).collect();
    for row in torch {
        if !columns.contains(&text(&row["column"])) {
            columns.push(text(&row["column"]));
        }
    }
    let cell = |work: &str, column: &str| -> Option<String> {
        let device = devices.iter().find(|device| device["device"] == column);
        let row = match device {
            Some(device) => device["rows"].as_array()?.iter().find(|row| row["work"] == work)?,
            None => torch.iter().find(|row| row["work"] == work && row["column"] == column)?,
        };
        let ms = format!("{:.3} ms", row["ms"].as_f64()?);
        match (row["rate"].as_f64(), row["unit"].as_str()) {
            (Some(rate), Some(unit)) => Some(format!("{ms}, {rate:.0} {unit}")),
            _ => Some(ms),
        }
    };
    let mut lines =
        vec![format!("| work | {} |", columns.join(" | ")), "|---".repeat(columns.len() + 1) + "|"];
    for work in &works {
        let cells = columns.iter().map(|column| cell(work, column).unwrap_or_else(|| "-".to_owned()));
        lines.push(format!("| {work} | {} |", cells.collect::<Vec<_>>().join(" | ")));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_and_pytorch_stand_side_by_side() {
        let devices = serde_json::json!([
            {"device": "gpu:0", "rows": [{"work": "copy", "ms": 1.5, "rate": 300.4, "unit": "GB/s"}]},
            {"device": "cuda:0", "rows": [{"work": "copy", "ms": 1.0, "rate": 450.0, "unit": "GB/s"}, {"work": "norm", "ms": 2.0}]},
        ]);
        let torch = [serde_json::json!({"work": "copy", "column": "torch eager", "ms": 0.9})];
        let expected = "| work | gpu:0 | cuda:0 | torch eager |\n|---|---|---|---|\n\
            | copy | 1.500 ms, 300 GB/s | 1.000 ms, 450 GB/s | 0.900 ms |\n| norm | - | 2.000 ms | - |";
        assert_eq!(table(&devices, &torch), expected);
    }

    #[test]
    fn an_unknown_argument_is_an_error() {
        let args = |list: &[&str]| list.iter().map(|&a| a.to_owned()).collect::<Vec<_>>();
        assert!(parse(&args(&["--dry", "--device", "gpu:0"])).is_ok_and(|a| a.dry && a.device.is_some()));
        assert!(parse(&args(&["--fast"])).is_err() && parse(&args(&["--device"])).is_err());
    }
}
