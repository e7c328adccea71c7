//! `rlx run`.

use super::onnx;
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output;
use rlx_onnx::{OnnxError, OnnxReport, Value, read_npy, write_npy};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

/// Run an ONNX model on named arrays
#[derive(Debug, clap::Args)]
pub struct Args {
    /// ONNX file, as it is or compiled to a `.rlx` file
    model: PathBuf,
    /// An input and the .npy file that holds it; once for each input
    #[arg(long = "input", value_name = "NAME=F.npy")]
    inputs: Vec<String>,
    /// Folder that gets one .npy file for each output
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Debug, Serialize)]
struct Written {
    name: String,
    value: String,
    file: String,
}

#[derive(Debug, Serialize)]
struct Nodes {
    template: Option<String>,
    regions: usize,
    compiled: BTreeMap<String, usize>,
    host: BTreeMap<String, usize>,
    folded: BTreeMap<String, usize>,
    steps: BTreeMap<String, usize>,
    reference: BTreeMap<String, usize>,
    /// Steps by the device that runs them.
    devices: BTreeMap<String, usize>,
    /// Regions that a device could not run: nodes, device, next device, reason.
    moved: Vec<[String; 4]>,
}

#[derive(Debug, Serialize)]
struct Report {
    outputs: Vec<Written>,
    import_ms: f64,
    run_ms: f64,
    nodes: Nodes,
}

impl Args {
    pub fn run(self, context: &Context) -> Result<()> {
        let place = self.model.display().to_string();
        let fail = |error: OnnxError| onnx::failure(&error, &place);
        let mut inputs: Vec<(&str, Value)> = Vec::new();
        for text in &self.inputs {
            let Some((name, file)) = text.split_once('=') else {
                let what = format!("`{text}` is not NAME=FILE");
                return Err(Failure::usage(what, "--input", "give each input as --input NAME=F.npy"));
            };
            inputs.push((name, read_npy(file.as_ref()).map_err(fail)?.into()));
        }
        let started = Instant::now();
        let (model, context) = onnx::open_fastest(&self.model, |model| model.sizes_of(&inputs), context)?;
        let import_ms = started.elapsed().as_secs_f64() * 1e3;
        let started = Instant::now();
        let outputs = model.run(&inputs).map_err(fail)?;
        let run_ms = started.elapsed().as_secs_f64() * 1e3;
        onnx::note_elsewhere(&model, &context)?;
        std::fs::create_dir_all(&self.out)
            .map_err(|e| Failure::new(e, self.out.display(), "choose a folder that may be written"))?;
        let mut written = Vec::new();
        for (name, value) in outputs {
            let file = self.out.join(format!("{}.npy", file_stem(&name)));
            write_npy(&file, &value).map_err(fail)?;
            written.push(Written { name, value: value.describe(), file: file.display().to_string() });
        }
        let report = Report { outputs: written, import_ms, run_ms, nodes: nodes(model.report()) };
        if context.shared.json {
            return output::print_json(&report);
        }
        output::print(&text(&report, context.shared.verbose > 0))
    }
}

/// A name as part of a path: what could lead elsewhere becomes an underscore.
fn file_stem(name: &str) -> String {
    let plain = |c: char| if c.is_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '_' };
    let stem: String = name.chars().map(plain).collect();
    if stem.chars().all(|c| c == '.') { "_".repeat(stem.len().max(1)) } else { stem }
}

fn nodes(report: OnnxReport) -> Nodes {
    let OnnxReport { template, regions, compiled, host, folded, steps, reference, devices, moved, .. } =
        report;
    let moved = moved.into_iter().map(|m| [m.nodes, m.from, m.to, m.reason]).collect();
    Nodes { template, regions, compiled, host, folded, steps, reference, devices, moved }
}

fn text(report: &Report, verbose: bool) -> String {
    let mut lines: Vec<String> =
        report.outputs.iter().map(|o| format!("{} {} -> {}", o.name, o.value, o.file)).collect();
    if verbose {
        let list = |ops: &BTreeMap<String, usize>| {
            ops.iter().map(|(op, count)| format!("{op} x{count}")).collect::<Vec<_>>().join(", ")
        };
        let nodes = &report.nodes;
        match nodes.template.as_deref() {
            Some("") => lines.push("one graph over the model's symbols, compiled once".to_owned()),
            Some(reason) => lines.push(format!("specialised for these extents: {reason}")),
            None => {}
        }
        lines.push(format!("regions compiled: {}", nodes.regions));
        for (what, ops) in [
            ("in regions", &nodes.compiled),
            ("between regions", &nodes.host),
            ("folded", &nodes.folded),
            ("steps of regions", &nodes.steps),
            ("steps by device", &nodes.devices),
            ("by reference evaluation", &nodes.reference),
        ] {
            lines.push(format!("{what}: {}", list(ops)));
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_never_leads_out_of_the_folder() {
        assert_eq!(file_stem("../../etc/x"), ".._.._etc_x");
        assert_eq!(file_stem(".."), "__");
        assert_eq!(file_stem("logits"), "logits");
    }
}
