//! Runs the ONNX backend tests of an installed `onnx` package and prints a table by operator.
//!
//! `onnx_suite DATA [--device cpu|reference|gpu|emulated] [--folder NAME].. [--filter TEXT] [--symbolic] [--plain] [--twins] [--rounding]
//! [--expect FILE [--listed]] [--write FILE] [-v]`
//!
//! `--folder` runs the cases of these folders of DATA in place of those of the package. `--symbolic` makes every input dim a name first,
//! `--plain` leaves out every pass but legalisation, `--twins` compares each `_expanded` test with the one it was expanded from,
//! `--listed` runs the cases that the expected list names and no other, `--rounding` allows what two orders of a few roundings of the
//! element type make, in place of the package's tolerance.
//!
//! Cases of ops that draw random numbers expect another generator's: their extents, element types and range are checked, and they are
//! counted apart.
//!
//! A refusal names what a device has no kernel for. Cases with nodes that the host evaluates between regions are counted beside the
//! others; a step of a region that ran elsewhere than on the device asked for is a failure.

use rlx::backend::BackendError;
use rlx::backend::reference::ReferenceBackend;
use rlx::{CompileOptions, Session, SessionError};
use rlx_graph::passes::PASSES;
use rlx_onnx::suite::{FileKind, difference, interface, read_value, symbolic_model};
use rlx_onnx::{DeclaredDim, ElementType, OnnxError, OnnxModel, Value};
use rlx_tensor::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Folders of the package's test data.
const FOLDERS: [&str; 4] = ["node", "simple", "pytorch-converted", "pytorch-operator"];
/// Folder of models without files of inputs: they are given what the package's own runner gives them. They hold up to 550 MB of
/// weights, so that a run against the list leaves them out.
const LIGHT: &str = "light";

/// Ops whose results are drawn, so that only their form can be expected.
const DRAWN: [&str; 1] = ["bernoulli"];

enum Outcome {
    Passed,
    /// Drawn numbers of the right form.
    Drawn,
    Refused(String),
    Failed(String),
}

struct Case {
    name: String,
    folder: PathBuf,
    op: String,
    outcome: Outcome,
    /// Nodes that the host evaluated, by op.
    host: BTreeMap<String, usize>,
    millis: u128,
}

struct Choices {
    data: PathBuf,
    folders: Vec<String>,
    device: String,
    filter: Option<String>,
    expect: Option<PathBuf>,
    listed: bool,
    write: Option<PathBuf>,
    symbolic: bool,
    plain: bool,
    twins: bool,
    rounding: bool,
    verbose: bool,
}

fn choices() -> Result<Choices, String> {
    let mut args = std::env::args().skip(1);
    let data = args.next().ok_or("give the folder backend/test/data of an onnx package")?;
    let mut choices = Choices {
        data: data.into(),
        folders: Vec::new(),
        device: "cpu".to_owned(),
        filter: None,
        expect: None,
        listed: false,
        write: None,
        symbolic: false,
        plain: false,
        twins: false,
        rounding: false,
        verbose: false,
    };
    while let Some(arg) = args.next() {
        let mut next = || args.next().ok_or(format!("{arg} takes a value"));
        match arg.as_str() {
            "--device" => choices.device = next()?,
            "--folder" => choices.folders.push(next()?),
            "--plain" => choices.plain = true,
            "--listed" => choices.listed = true,
            "--filter" => choices.filter = Some(next()?),
            "--expect" => choices.expect = Some(next()?.into()),
            "--write" => choices.write = Some(next()?.into()),
            "--symbolic" => choices.symbolic = true,
            "--rounding" => choices.rounding = true,
            "--twins" => choices.twins = true,
            "-v" => choices.verbose = true,
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(choices)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool, String> {
    let choices = choices()?;
    rlx_gpu::register().map_err(|e| e.to_string())?;
    let session = match choices.device.as_str() {
        "emulated" => Session::with_backend(rlx_gpu::emulated()),
        "reference" => Session::with_backend(Arc::new(ReferenceBackend::default())),
        device => {
            let id: rlx::devices::DeviceId = device.parse().map_err(|e| format!("{e}"))?;
            Session::new(id).map_err(|e| e.to_string())?
        }
    };
    let list = choices.expect.as_ref().filter(|_| choices.listed).map(std::fs::read_to_string).transpose();
    let list = list.map_err(|e| e.to_string())?;
    let listed: Option<BTreeSet<String>> = list.map(|text| text.lines().map(str::to_owned).collect());
    let mut cases = Vec::new();
    let mut results = BTreeMap::new();
    let all = FOLDERS.iter().map(|&folder| folder.to_owned());
    let folders = if choices.folders.is_empty() { all.collect() } else { choices.folders.clone() };
    for folder in folders {
        let root = choices.data.join(&folder);
        let Ok(entries) = std::fs::read_dir(&root) else {
            return Err(format!("{} is missing", root.display()));
        };
        let mut names: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
        names.sort();
        for path in names.into_iter().filter(|p| p.join("model.onnx").is_file()) {
            let name = format!("{folder}/{}", path.file_name().unwrap_or_default().to_string_lossy());
            let wanted = listed.as_ref().is_none_or(|names| names.contains(&name));
            if wanted && choices.filter.as_ref().is_none_or(|f| name.contains(f.as_str())) {
                cases.push(case(name, path, &session, &choices, &mut results));
            }
        }
    }
    cases.extend(light_cases(&choices, &session)?);
    if choices.twins {
        compare_twins(&results);
    }
    report(&cases, &choices)
}

fn light_cases(choices: &Choices, session: &Session) -> Result<Vec<Case>, String> {
    if !choices.folders.is_empty() || (choices.expect.is_some() && choices.filter.is_none()) {
        return Ok(Vec::new());
    }
    let root = choices.data.join(LIGHT);
    let entries = std::fs::read_dir(&root).map_err(|e| format!("{}: {e}", root.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "onnx"));
    files.sort();
    let mut cases = Vec::new();
    for file in files {
        let name = format!("{LIGHT}/{}", file.file_stem().unwrap_or_default().to_string_lossy());
        if choices.filter.as_ref().is_some_and(|f| !name.contains(f.as_str())) {
            continue;
        }
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| check_light(&file, session)));
        let outcome = outcome.unwrap_or_else(|_| Outcome::Failed("PANIC".to_owned()));
        let millis = started.elapsed().as_millis();
        let (folder, op, host) = (root.clone(), "(light)".to_owned(), BTreeMap::new());
        cases.push(Case { name, folder, op, outcome, host, millis });
    }
    Ok(cases)
}

fn check_light(file: &Path, session: &Session) -> Outcome {
    let run = || -> Result<Option<String>, OnnxError> {
        let model = OnnxModel::open_on(file, session)?;
        let mut inputs = Vec::new();
        for (declared, _) in model.program().inputs().filter(|(_, needed)| *needed) {
            let size = |d: &DeclaredDim| if let DeclaredDim::Known(size) = d { *size } else { 1 };
            let dims: Vec<usize> = declared.dims.iter().flatten().map(size).collect();
            let count: usize = dims.iter().product();
            let values: Vec<f32> = (0..count).map(|i| (i as f64 / count as f64) as f32).collect();
            let tensor = Tensor::from_slice(&dims, &values);
            let tensor = tensor.map_err(|e| OnnxError::Malformed { reason: e.to_string() })?;
            inputs.push((declared.name.clone(), Value::Tensor(tensor)));
        }
        let inputs: Vec<(&str, Value)> = inputs.iter().map(|(n, v)| (n.as_str(), v.clone())).collect();
        let results = model.run(&inputs)?;
        for (i, (name, found)) in results.iter().enumerate() {
            let stem = file.file_stem().unwrap_or_default().to_string_lossy();
            let expected = file.with_file_name(format!("{stem}_output_{i}.pb"));
            let expected = read_value(&expected, FileKind::Tensor)?;
            if let Some(reason) = difference(&expected, found, 1e-3, 1e-7) {
                return Ok(Some(format!("output {name:?}: {reason}")));
            }
        }
        Ok(None)
    };
    match run() {
        Ok(None) => Outcome::Passed,
        Ok(Some(reason)) => Outcome::Failed(reason),
        Err(e) => of_error(e),
    }
}

/// Results of each test by name.
type Results = BTreeMap<String, Vec<(String, Value)>>;

/// Relative difference that two orders of a few roundings make.
fn rounding(value: &Value) -> f64 {
    match value.element() {
        Some(ElementType::Plain(DType::F16)) => 4.0 / 1024.0,
        Some(ElementType::Plain(DType::BF16)) => 4.0 / 128.0,
        _ => 1e-4,
    }
}

fn compare_twins(results: &Results) {
    let (mut equal, mut different) = (0, 0);
    for (name, expanded) in results {
        let Some((whole, _)) = name.split_once("_expanded") else { continue };
        let Some(whole) = results.get(whole) else { continue };
        let pairs = whole.iter().zip(expanded);
        match pairs.map(|(a, b)| difference(&a.1, &b.1, rounding(&a.1), 1e-6)).find_map(|d| d) {
            None => equal += 1,
            Some(reason) => {
                different += 1;
                println!("TWIN {name}: {reason}");
            }
        }
    }
    println!("twins: {equal} equal, {different} different");
}

fn case(name: String, folder: PathBuf, session: &Session, choices: &Choices, results: &mut Results) -> Case {
    let started = Instant::now();
    let facts = interface(&folder.join("model.onnx")).unwrap_or_default();
    let op = match facts.ops.as_slice() {
        _ if name.contains("_expanded") => "(expanded)".to_owned(),
        [only] => only.clone(),
        [first, ..] if name.starts_with("node/") => first.clone(),
        _ => format!("({})", name.split('/').next().unwrap_or_default()),
    };
    let mut seen = Seen::default();
    let drawn = DRAWN.iter().any(|op| name.contains(op));
    let outcome = catch_unwind(AssertUnwindSafe(|| check(&folder, session, choices, drawn, &mut seen)));
    let outcome = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Outcome::Failed(format!("PANIC {}", text.unwrap_or_default()))
    });
    if choices.twins {
        results.insert(name.clone(), seen.first);
    }
    Case { name, folder, op, outcome, host: seen.host, millis: started.elapsed().as_millis() }
}

/// What a case showed besides its outcome.
#[derive(Default)]
struct Seen {
    /// The first results.
    first: Vec<(String, Value)>,
    host: BTreeMap<String, usize>,
}

/// What is said of an error: a refusal, or a failure.
fn of_error(error: OnnxError) -> Outcome {
    let refused = match &error {
        OnnxError::Unsupported { .. } => true,
        OnnxError::Region { source, .. } => match &**source {
            SessionError::Pass(_) => source.is_device_fault(),
            SessionError::Backend(error) => {
                matches!(error, BackendError::Unsupported { .. } | BackendError::OutOfMemory { .. })
            }
            _ => false,
        },
        _ => false,
    };
    if refused { Outcome::Refused(error.to_string()) } else { Outcome::Failed(error.to_string()) }
}

/// A step that ran where nobody asked for it.
fn elsewhere(model: &OnnxModel, session: &Session) -> Option<String> {
    let (report, name) = (model.report(), session.backend().name().to_owned());
    let other = report.devices.keys().find(|device| **device != name);
    let device = other.map(|other| format!("steps ran on {other}, not on {name}"));
    let by_reference = name != "cpu" && name != "reference" && !report.reference.is_empty();
    device.or_else(|| by_reference.then(|| format!("by reference evaluation: {:?}", report.reference)))
}

fn open(folder: &Path, session: &Session, choices: &Choices) -> Result<OnnxModel, OnnxError> {
    let file = folder.join("model.onnx");
    let model = match choices.symbolic {
        true => OnnxModel::from_bytes(&symbolic_model(&file)?, session),
        false => OnnxModel::open_on(file, session),
    };
    let mut options = CompileOptions::default();
    if choices.plain {
        let skip = PASSES.iter().map(|pass| pass.name).filter(|name| *name != "legalise");
        options.passes.skip = skip.map(str::to_owned).collect();
    }
    model.map(|model| model.with_options(options))
}

/// What is wrong with the form of zeros and ones that were drawn.
fn wrong_draw(expected: &Value, found: &Value) -> Option<String> {
    if expected.element() != found.element() || expected.dims() != found.dims() {
        return Some(format!("expected {}, found {}", expected.describe(), found.describe()));
    }
    let values = found.floats().unwrap_or_default();
    values.iter().find(|v| ![0.0, 1.0].contains(*v)).map(|v| format!("{v} was drawn"))
}

fn check(folder: &Path, session: &Session, choices: &Choices, drawn: bool, seen: &mut Seen) -> Outcome {
    let model = match open(folder, session, choices) {
        Ok(model) => model,
        Err(e) => return of_error(e),
    };
    let outcome = check_model(folder, &model, choices, drawn, seen);
    seen.host = model.report().host;
    match (outcome, elsewhere(&model, session)) {
        (Outcome::Passed, Some(reason)) => Outcome::Failed(reason),
        (outcome, _) => outcome,
    }
}

fn check_model(folder: &Path, model: &OnnxModel, choices: &Choices, drawn: bool, seen: &mut Seen) -> Outcome {
    let facts = match interface(&folder.join("model.onnx")) {
        Ok(facts) => facts,
        Err(e) => return of_error(e),
    };
    let needed: Vec<String> =
        model.program().inputs().filter(|(_, needed)| *needed).map(|(d, _)| d.name.clone()).collect();
    let mut set = 0;
    loop {
        let data = folder.join(format!("test_data_set_{set}"));
        if !data.is_dir() {
            break;
        }
        set += 1;
        let read = |prefix: &str, i: usize, kind: FileKind| {
            let path = data.join(format!("{prefix}_{i}.pb"));
            if path.is_file() { read_value(&path, kind).map(Some) } else { Ok(None) }
        };
        let mut inputs: Vec<(&str, Value)> = Vec::new();
        let given =
            facts.inputs.iter().filter(|(n, _)| needed.contains(n) || data.join("input_0.pb").is_file());
        for (i, (name, kind)) in given.enumerate() {
            match read("input", i, *kind) {
                Ok(Some(value)) => inputs.push((name, value)),
                Ok(None) => {}
                Err(e) => return of_error(e),
            }
        }
        let results = match model.run(&inputs) {
            Ok(results) => results,
            Err(e) => return of_error(e),
        };
        if seen.first.is_empty() {
            seen.first.clone_from(&results);
        }
        for (i, ((name, kind), (_, found))) in facts.outputs.iter().zip(&results).enumerate() {
            let expected = match read("output", i, *kind) {
                Ok(Some(value)) => value,
                Ok(None) => continue,
                Err(e) => return of_error(e),
            };
            let wrong = match drawn {
                true => wrong_draw(&expected, found),
                false if choices.rounding => difference(&expected, found, rounding(&expected), 1e-5),
                false => difference(&expected, found, 1e-3, 1e-7),
            };
            if let Some(reason) = wrong {
                return Outcome::Failed(format!("output {name:?}: {reason}"));
            }
        }
    }
    match set {
        0 => Outcome::Failed("there is no test data".to_owned()),
        _ if drawn => Outcome::Drawn,
        _ => Outcome::Passed,
    }
}

fn report(cases: &[Case], choices: &Choices) -> Result<bool, String> {
    let mut table: BTreeMap<&str, [usize; 5]> = BTreeMap::new();
    let mut totals: BTreeMap<&str, [usize; 5]> = BTreeMap::new();
    let mut host: BTreeMap<&str, usize> = BTreeMap::new();
    for case in cases {
        let column = match &case.outcome {
            Outcome::Passed => 0,
            Outcome::Drawn => 1,
            Outcome::Failed(reason) => {
                println!("FAILED {}: {}", case.name, reason.chars().take(300).collect::<String>());
                2
            }
            Outcome::Refused(reason) => {
                println!("REFUSED {}: {}", case.name, reason.chars().take(300).collect::<String>());
                3
            }
        };
        table.entry(&case.op).or_default()[column] += 1;
        totals.entry(case.name.split('/').next().unwrap_or_default()).or_default()[column] += 1;
        if column == 0 && !case.host.is_empty() {
            table.entry(&case.op).or_default()[4] += 1;
            totals.entry(case.name.split('/').next().unwrap_or_default()).or_default()[4] += 1;
        }
        case.host.iter().for_each(|(op, count)| *host.entry(op).or_default() += count);
        if choices.verbose {
            println!("{} ms {} ({})", case.millis, case.name, case.folder.display());
        }
    }
    println!("{:<40}{:>8}{:>8}{:>8}{:>8}{:>8}", "operator", "passed", "drawn", "failed", "refused", "host");
    for (name, [passed, drawn, failed, refused, host]) in table.iter().chain(&totals) {
        println!("{name:<40}{passed:>8}{drawn:>8}{failed:>8}{refused:>8}{host:>8}");
    }
    let host: Vec<String> = host.iter().map(|(op, count)| format!("{op} x{count}")).collect();
    println!("host: of the passed, those with nodes evaluated between regions; in all {}", host.join(", "));
    let held = |case: &&Case| matches!(case.outcome, Outcome::Passed | Outcome::Drawn);
    let passed: Vec<&str> = cases.iter().filter(held).map(|c| c.name.as_str()).collect();
    if let Some(path) = &choices.write {
        let text = passed.iter().map(|n| format!("{n}\n")).collect::<String>();
        std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let Some(path) = &choices.expect else { return Ok(true) };
    let expected = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let ran: Vec<&str> = cases.iter().map(|c| c.name.as_str()).collect();
    let lost: Vec<&str> = expected.lines().filter(|n| ran.contains(n) && !passed.contains(n)).collect();
    let absent = expected.lines().filter(|n| choices.filter.is_none() && !ran.contains(n)).count();
    for name in &lost {
        println!("LOST {name}: it passed before");
    }
    if absent > 0 {
        println!("LOST {absent} expected tests are not in the package");
    }
    Ok(lost.is_empty() && absent == 0)
}
