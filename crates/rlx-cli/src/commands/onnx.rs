//! `rlx compile`, `rlx plan`, `rlx explain` and `rlx bench` of ONNX files: what becomes of the model for inputs of given extents.

use super::bench::measure::{UNTIMED_RUNS, shares_of, timed};
use super::compile::Made;
use super::sizes::Sizes;
use crate::context::Context;
use crate::engine::{choose, devices_of};
use crate::failure::{ANOTHER_DEVICE, Failure, Result};
use crate::output::{self, Stage, StepShare};
use rlx::aot::AotCacheError;
use rlx::backend::cpu::Precision;
use rlx::backend::reference::ReferenceBackend;
use rlx::config::ByteSize;
use rlx::devices::{Device, DeviceCandidate, DeviceId};
use rlx::memory::{MemoryEstimate, MemoryProbe, MemoryView, SystemProbe};
use rlx::{Session, SessionError, backend::BackendRegistry};
use rlx_onnx::{Moved, OnnxError, OnnxModel, OnnxReport, Prepared, Value};
use rlx_tensor::{DType, Tensor};
use serde::Serialize;
use serde_json::Map;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// A model on the device that is asked for; of a chain, later devices get what earlier ones cannot run.
pub fn open(file: &Path, context: &Context) -> Result<OnnxModel> {
    let fail = |error: OnnxError| failure(&error, &file.display().to_string());
    let device = context.device()?;
    let model = OnnxModel::open_on(file, &session(device, context)?).map_err(fail)?;
    let later = context.later_devices(device).into_iter();
    let rest: Vec<Session> = later.map(|device| session(device, context)).collect::<Result<_>>()?;
    Ok(model.or_on(&rest))
}

/// As [`open`]; where a device is to be chosen, on the one that the cost model expects to be fastest at these sizes of its open dims, by its
/// first region. With the context in which it was opened.
pub fn open_fastest(
    file: &Path,
    sizes: impl FnOnce(&OnnxModel) -> Vec<(String, usize)>,
    context: &Context,
) -> Result<(OnnxModel, Context)> {
    if !context.has_choice() {
        return Ok((open(file, context)?, context.clone()));
    }
    let on_host = context.without_device();
    let host = open(file, &on_host)?;
    let prepared = host.prepare(&sizes(&host));
    // What a run would refuse, it refuses with its own words.
    let Some((prepared, region)) = prepared.as_ref().ok().and_then(|p| Some((p, p.region()?))) else {
        return Ok((host, on_host));
    };
    let weights = region.graph().weights();
    let devices = devices_of(region.source(), weights, prepared.binding(), context);
    match choose(&devices, context).map_err(|error| failure(&error.into(), &file.display().to_string()))? {
        DeviceId::CPU => Ok((host, on_host)),
        device => {
            let chain = [device].into_iter().chain(context.later_devices(device)).collect();
            let chosen = context.on_chain(chain);
            Ok((open(file, &chosen)?, chosen))
        }
    }
}

/// Says what did not run on the device that was asked for first.
pub fn note_elsewhere(model: &OnnxModel, context: &Context) -> Result<()> {
    let report = model.report();
    for Moved { nodes, from, to, reason, .. } in &report.moved {
        context.note(format!("{nodes}: on {to}, for {from} cannot run it: {reason}"));
    }
    let device = context.device()?;
    if !report.host.is_empty() && !matches!(device.kind, Device::Cpu | Device::Reference) {
        context.note(format!("evaluated on the host, not on {device}: {}", counted(&report.host)));
    }
    Ok(())
}

fn counted(ops: &BTreeMap<String, usize>) -> String {
    ops.iter().map(|(op, count)| format!("{op} x{count}")).collect::<Vec<_>>().join(", ")
}

fn session(device: DeviceId, context: &Context) -> Result<Session> {
    if device.kind == Device::Reference {
        if context.config.precision == Some(Precision::Bf16) {
            let what = "the reference evaluation rounds no operands to bf16";
            return Err(Failure::usage(what, "--precision", "leave it out, or use another device"));
        }
        return Ok(Session::with_backend(Arc::new(ReferenceBackend::default())));
    }
    let opened = Session::open(device, BackendRegistry::global(), &context.config);
    opened.map_err(|e| Failure::new(e, device, "`rlx devices` lists every device and what blocks it"))
}

/// An error of a model as a user can act on it.
pub fn failure(error: &OnnxError, place: &str) -> Failure {
    let advice = match error {
        OnnxError::Compiled(error) => return compiled_failure(error, place),
        OnnxError::Region { source, .. } if let SessionError::Aot(error) = &**source => {
            return compiled_failure(error, place);
        }
        OnnxError::Region { source, .. } if source.is_device_fault() => ANOTHER_DEVICE,
        OnnxError::NotOneGraph { .. } => {
            "give the ONNX file itself to `rlx run`, `rlx plan`, `rlx explain` or `rlx bench`"
        }
        OnnxError::Io { .. } | OnnxError::Map(_) => "check that the file exists and may be read",
        OnnxError::Malformed { .. } | OnnxError::Graph { .. } => {
            "export the model again: the file is damaged"
        }
        OnnxError::Tensor { .. } => "check the tensor that is named, or export the model again",
        OnnxError::Input { .. } => {
            "give every input of the model once, as --input NAME=F.npy, and the size of every open dim, as --dim NAME=N"
        }
        OnnxError::Unsupported { .. } => "export the model without this node, or with another opset",
        OnnxError::Node { .. } => "check the node that is named and the shapes of the inputs",
        _ => "run again with -v; report it with the model's name if it still fails",
    };
    Failure::new(error, place, advice)
}

fn compiled_failure(error: &AotCacheError, place: &str) -> Failure {
    let advice = match error {
        AotCacheError::Io { .. } => "check the folder, its rights and the space on the disk",
        AotCacheError::Unstorable { .. } => "use --device cpu, or the ONNX file itself",
        AotCacheError::Mismatch { what: "the kind", .. } => {
            "give it to the verbs of the model that it was compiled from"
        }
        _ => "compile the model again, here: `rlx compile MODEL.onnx -o FILE.rlx`",
    };
    Failure::new(error, place, advice)
}

/// `rlx compile`.
pub fn compile(file: &Path, sizes: &Sizes, output: &Path, context: &Context) -> Result<Made> {
    let fail = |error: OnnxError| failure(&error, &file.display().to_string());
    let started = Instant::now();
    let model = open(file, context)?;
    let load_ms = started.elapsed().as_secs_f64() * 1e3;
    let started = Instant::now();
    model.write_compiled(&sizes.dims, output, context.threads()).map_err(fail)?;
    let write_ms = started.elapsed().as_secs_f64() * 1e3;
    Ok(Made { isa: context.isa()?.to_string(), load_ms, write_ms })
}

/// A model with what extents alone decide of it.
struct Opened {
    place: String,
    model: OnnxModel,
    prepared: Prepared,
    inputs: BTreeMap<String, Vec<usize>>,
    import_ms: f64,
    compile_ms: f64,
}

impl Opened {
    fn new(file: &Path, sizes: &Sizes, context: &Context) -> Result<Opened> {
        Self::by(file, sizes, || Ok((open(file, context)?, context.clone())))
    }

    /// On the device that is expected to be fastest, where one is to be chosen.
    fn fastest(file: &Path, sizes: &Sizes, context: &Context) -> Result<Opened> {
        Self::by(file, sizes, || open_fastest(file, |_| sizes.dims.clone(), context))
    }

    fn by(file: &Path, sizes: &Sizes, open: impl FnOnce() -> Result<(OnnxModel, Context)>) -> Result<Opened> {
        let place = file.display().to_string();
        let fail = |error: OnnxError| failure(&error, &place);
        let started = Instant::now();
        let (model, context) = open()?;
        let import_ms = started.elapsed().as_secs_f64() * 1e3;
        let started = Instant::now();
        let inputs = model.extents(&sizes.dims).map_err(fail)?.into_iter().collect();
        let prepared = model.prepare(&sizes.dims).map_err(fail)?;
        let compile_ms = started.elapsed().as_secs_f64() * 1e3;
        note_elsewhere(&model, &context)?;
        Ok(Opened { place, model, prepared, inputs, import_ms, compile_ms })
    }

    fn session_failure(&self, error: SessionError) -> Failure {
        failure(&error.into(), &self.place)
    }

    /// What the figures leave out, in a line each.
    fn left_out(&self) -> String {
        let mut text = String::new();
        let list = |names: &[String]| {
            let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
            names.iter().for_each(|name| *counts.entry(name).or_default() += 1);
            counts.iter().map(|(op, count)| format!("{op} x{count}")).collect::<Vec<_>>().join(", ")
        };
        let Prepared { host, later, .. } = &self.prepared;
        if !host.is_empty() {
            let _ = writeln!(text, "evaluated one by one after it: {}", list(host));
        }
        if !later.is_empty() {
            let _ = writeln!(text, "compiled when a run knows their extents: {}", list(later));
        }
        text
    }
}

/// `rlx devices`: what each device would make of the first region, in which most models are whole.
pub fn devices(file: &Path, sizes: &Sizes, context: &Context) -> Result<Vec<DeviceCandidate>> {
    let opened = Opened::new(file, sizes, &context.without_device())?;
    let prepared = &opened.prepared;
    let Some(region) = prepared.region() else {
        let what = "no node of the model is compiled before a run, so no device can be asked about it";
        return Err(Failure::new(what, &opened.place, "`rlx run -v` tells what runs where"));
    };
    let left_out = opened.left_out();
    if !left_out.is_empty() {
        context.note(format!(
            "asked about the first of its regions, {}\n{}",
            region.nodes(),
            left_out.trim_end()
        ));
    }
    let weights = region.graph().weights();
    Ok(devices_of(region.source(), weights, prepared.binding(), context).report())
}

#[derive(Debug, Serialize)]
struct PlanReport {
    model: String,
    inputs: BTreeMap<String, Vec<usize>>,
    peak_bytes: u64,
    parts: Map<String, serde_json::Value>,
    mapped_bytes: u64,
    budget_bytes: Option<u64>,
    fits: Option<bool>,
    bytes_read: u64,
    /// Nodes after the region that was planned.
    not_planned: usize,
}

/// `rlx plan`.
pub fn plan(file: &Path, sizes: &Sizes, budget: Option<ByteSize>, context: &Context) -> Result<()> {
    let opened = Opened::new(file, sizes, context)?;
    let estimate = &opened.prepared.estimate;
    let view = MemoryView::new(&SystemProbe, &context.config);
    let budget_bytes = budget.map(|size| size.0).or_else(|| view.soft_budget_bytes());
    if context.shared.json {
        let parts = estimate.parts().map(|(part, bytes)| (part.name().to_owned(), bytes.into()));
        return output::print_json(&PlanReport {
            peak_bytes: estimate.peak_bytes(),
            parts: parts.into_iter().collect(),
            mapped_bytes: estimate.mapped_bytes,
            budget_bytes,
            fits: budget_bytes.map(|budget| estimate.fits_in(budget).is_ok()),
            bytes_read: opened.model.bytes_read(),
            not_planned: opened.prepared.host.len() + opened.prepared.later.len(),
            model: opened.place,
            inputs: opened.inputs,
        });
    }
    let mut text = plan_table(&opened.inputs, estimate);
    text.push_str(&opened.left_out());
    text.push_str(&match budget_bytes.map(|budget| (budget, estimate.fits_in(budget))) {
        None => {
            "whether it fits is unknown: this system does not tell its memory; give --budget\n".to_owned()
        }
        Some((budget, Ok(()))) => format!("fits in {}\n", ByteSize(budget)),
        Some((_, Err(deficit))) => format!("does not fit: {deficit}\n"),
    });
    output::print(&text)
}

fn plan_table(inputs: &BTreeMap<String, Vec<usize>>, estimate: &MemoryEstimate) -> String {
    let mib = |bytes: u64| format!("{:.2}", bytes as f64 / (1u64 << 20) as f64);
    let given: Vec<String> = inputs.iter().map(|(name, dims)| format!("{name}{dims:?}")).collect();
    let mut rows = vec![vec![given.join(" "), "MiB".to_owned()]];
    rows.extend(estimate.parts().map(|(part, bytes)| vec![part.name().to_owned(), mib(bytes)]));
    rows.push(vec!["of these in mapped files".to_owned(), mib(estimate.mapped_bytes)]);
    rows.push(vec!["peak without mapped files".to_owned(), mib(estimate.peak_bytes())]);
    output::table(&rows)
}

/// `rlx explain`.
pub fn explain(
    file: &Path,
    sizes: &Sizes,
    stage: Option<Stage>,
    svg: Option<&PathBuf>,
    context: &Context,
) -> Result<()> {
    let opened = Opened::new(file, sizes, context)?;
    let (Some(region), Some(lir)) = (opened.prepared.region(), opened.prepared.lir()) else {
        return output::print(&format!("no node is compiled before a run\n{}", opened.left_out()));
    };
    let compiled = region.graph();
    if let Some(file) = svg {
        let advice = "choose a file in a folder that may be written";
        std::fs::write(file, lir.svg()).map_err(|error| Failure::new(error, file.display(), advice))?;
        context.note(format!("memory plan: {}", file.display()));
    }
    if let Some(stage) = stage {
        let text = match stage {
            Stage::Hir => region.source().to_string(),
            Stage::Mir => compiled.graph().to_string(),
            Stage::Lir => lir.to_string(),
        };
        return output::print_stage(opened.place, stage, text, context);
    }
    let report = compiled.report().map_err(|error| opened.session_failure(error))?;
    if context.shared.json {
        return output::print_report(opened.place, &report, lir);
    }
    let mut text = output::summary_text(&report, lir)?;
    text.push_str(&opened.left_out());
    let (import, compile) = (opened.import_ms, opened.compile_ms);
    let _ = writeln!(text, "imported in {import:.1} ms; compiled and planned in {compile:.1} ms");
    output::print(&text)
}

#[derive(Debug, Serialize)]
struct BenchReport {
    model: String,
    inputs: BTreeMap<String, Vec<usize>>,
    threads: usize,
    isa: &'static str,
    /// Steps by the device that runs them.
    devices: BTreeMap<String, usize>,
    import_ms: f64,
    compile_ms: f64,
    /// The first run, which packs the weights.
    first_run_ms: f64,
    median_ms: f64,
    p10_ms: f64,
    n: usize,
    peak_rss_bytes: Option<u64>,
    /// Nodes evaluated between regions, with the microseconds they take in a run.
    host_micros: BTreeMap<String, f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    steps: Vec<StepShare>,
}

/// `rlx bench`: runs on inputs that are made up.
pub fn bench(file: &Path, sizes: &Sizes, steps: bool, context: &Context) -> Result<()> {
    let opened = Opened::fastest(file, sizes, context)?;
    let fail = |error: OnnxError| failure(&error, &opened.place);
    let mut inputs = Vec::new();
    for declared in opened.model.required_inputs() {
        let dims = &opened.inputs[&declared.name];
        inputs.push((declared.name.as_str(), made_up(declared, dims).map_err(fail)?));
    }
    let run = || opened.model.run(&inputs).map(drop).map_err(fail);
    let started = Instant::now();
    run()?;
    let first_run_ms = started.elapsed().as_secs_f64() * 1e3;
    let before = opened.model.report().host_micros;
    let times = timed(run)?;
    let OnnxReport { host_micros: after, devices, .. } = opened.model.report();
    let runs = (times.len() + UNTIMED_RUNS) as f64;
    let spent = |(op, micros): (&String, &u64)| {
        (op.clone(), (micros - before.get(op).copied().unwrap_or(0)) as f64 / runs)
    };
    let host_micros = after.iter().map(spent).collect();
    let mut shares = Vec::new();
    if steps {
        opened.model.time_steps().map_err(fail)?;
        let regions = opened.model.regions();
        let counters = || regions.iter().filter_map(|region| region.times());
        shares = shares_of(counters, run)?;
    }
    let report = BenchReport {
        model: opened.place.clone(),
        inputs: opened.inputs.clone(),
        threads: context.threads(),
        isa: context.isa()?.name(),
        devices,
        import_ms: opened.import_ms,
        compile_ms: opened.compile_ms,
        first_run_ms,
        median_ms: times[times.len() / 2],
        p10_ms: times[times.len() / 10],
        n: times.len(),
        peak_rss_bytes: SystemProbe.peak_rss_bytes(),
        host_micros,
        steps: shares,
    };
    if context.shared.json {
        return output::print_json(&report);
    }
    output::print(&bench_text(&report))
}

fn bench_text(report: &BenchReport) -> String {
    let given: Vec<String> = report.inputs.iter().map(|(name, dims)| format!("{name}{dims:?}")).collect();
    let mut text = format!(
        "{}\nmedian {:.3} ms, p10 {:.3} ms of {} runs; imported in {:.1} ms, compiled in {:.1}, first run {:.1}\n",
        given.join(" "),
        report.median_ms,
        report.p10_ms,
        report.n,
        report.import_ms,
        report.compile_ms,
        report.first_run_ms
    );
    for (op, micros) in &report.host_micros {
        let _ = writeln!(text, "evaluated between regions: {op}, {micros:.1} µs a run");
    }
    if !report.steps.is_empty() {
        text.push_str(&output::steps_table(&report.steps));
    }
    let on: Vec<&str> = report.devices.keys().map(String::as_str).collect();
    let _ = writeln!(text, "on {}; {} threads, {}", on.join(" and "), report.threads, report.isa);
    text
}

/// Numbers between -1 and 1 for floats, ones for all else.
fn made_up(declared: &rlx_onnx::Declared, dims: &[usize]) -> std::result::Result<Value, OnnxError> {
    let fail = |reason: String| OnnxError::Input { name: declared.name.clone(), reason };
    let Some(rlx_onnx::ElementType::Plain(dtype)) = declared.element else {
        return Err(fail("only tensors of numbers can be made up".to_owned()));
    };
    let count: usize = dims.iter().product();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut number = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let tensor = match dtype {
        DType::F32 => Tensor::from_slice(dims, &(0..count).map(&mut number).collect::<Vec<f32>>()),
        _ => return declared.ones(dims),
    };
    tensor.map(Value::Tensor).map_err(|e| fail(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::context_with_metal;
    use rlx::config::Config;

    #[test]
    fn the_fastest_device_is_taken_where_none_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../rlx-onnx/data/contrib/gelu/model.onnx");
        let taken = |change: fn(&mut Config)| {
            let context = context_with_metal(folder.path(), change);
            let (_, on) = open_fastest(file.as_ref(), |_| Vec::new(), &context).unwrap();
            on.device().unwrap().to_string()
        };
        assert_eq!(taken(|config| config.deny_devices = Some(vec![Device::Metal, Device::Rocm])), "cpu");
        assert_eq!(taken(|config| config.devices = Some(vec![Device::Metal])), "metal");
        assert_eq!(
            taken(|config| config.device = Some(DeviceId { kind: Device::Metal, index: 1 })),
            "metal:1"
        );
    }
}
