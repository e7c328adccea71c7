//! Cases with ONNX Runtime's results, written by `scripts/goldens/onnx_contrib.py` and `onnx_weights.py`.

use crate::suite::{FileKind, difference, interface, read_value};
use crate::{OnnxError, OnnxModel, OnnxReport, Value};
use rlx::Session;
use rlx::backend::reference::ReferenceBackend;
use rlx::devices::Device;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Cases that are refused, each with what its message names.
const REFUSED: &[(&str, &str)] = &[];

/// Ops that `com.microsoft` adds.
const CONTRIB: &str = "data/contrib";
/// Ops whose weights are known before a run: nothing of them is left to the host.
pub(crate) const WEIGHTS: &str = "data/weights";

/// Steps without a kernel yet: signed codes of eight bits to floats and back.
const SLOW: [&str; 1] = ["cast"];

pub(crate) fn cases(folder: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    cases
}

/// What a case's model is given.
pub(crate) fn inputs(case: &Path) -> Result<Vec<(String, Value)>, OnnxError> {
    let named = interface(&case.join("model.onnx"))?.inputs.into_iter().enumerate();
    let value = |(i, (name, kind)): (usize, (String, FileKind))| {
        Ok((name, read_value(&case.join(format!("test_data_set_0/input_{i}.pb")), kind)?))
    };
    named.map(value).collect()
}

fn results(case: &Path, session: &Session) -> Result<(Vec<(String, Value)>, OnnxReport), OnnxError> {
    let model = OnnxModel::open_on(case.join("model.onnx"), session)?;
    let inputs = inputs(case)?;
    let inputs: Vec<(&str, Value)> =
        inputs.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    let results = model.run(&inputs)?;
    Ok((results, model.report()))
}

fn wrong(case: &Path, session: &Session, compiled: bool) -> Option<String> {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let refused = REFUSED.iter().find(|(refused, _)| *refused == name);
    let (found, report) = match (results(case, session), refused) {
        (Err(error @ OnnxError::Unsupported { .. }), Some((_, word))) if error.to_string().contains(word) => {
            return None;
        }
        (Ok(found), None) => found,
        (Ok(_), Some(_)) => return Some(format!("{name}: is no longer refused")),
        (Err(error), _) => return Some(format!("{name}: {error}")),
    };
    let slow: Vec<&String> = report.reference.keys().filter(|op| !SLOW.contains(&op.as_str())).collect();
    if compiled && !(report.host.is_empty() && slow.is_empty()) {
        return Some(format!("{name}: host {:?}, reference {slow:?}", report.host));
    }
    let facts = interface(&case.join("model.onnx")).unwrap();
    found.iter().zip(&facts.outputs).enumerate().find_map(|(i, ((_, value), (_, kind)))| {
        let file = case.join(format!("test_data_set_0/output_{i}.pb"));
        let expected = read_value(&file, *kind).unwrap();
        difference(&expected, value, 1e-4, 2e-5).map(|reason| format!("{name}, output {i}: {reason}"))
    })
}

fn check(folder: &str, least: usize, session: &Session, compiled: bool) {
    let cases = cases(folder);
    assert!(cases.len() >= least, "{} cases", cases.len());
    let wrong: Vec<String> = cases.iter().filter_map(|case| wrong(case, session, compiled)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_cpu_gives_what_onnx_runtime_gives() {
    check(CONTRIB, 40, &Session::new(Device::Cpu).unwrap(), false);
}

#[test]
fn the_cpu_runs_known_weights_by_kernels_with_onnx_runtimes_results() {
    check(WEIGHTS, 75, &Session::new(Device::Cpu).unwrap(), true);
}

#[test]
fn the_reference_evaluation_gives_what_onnx_runtime_gives() {
    let session = Session::with_backend(Arc::new(ReferenceBackend::default()));
    check(CONTRIB, 40, &session, false);
    check(WEIGHTS, 75, &session, false);
}
