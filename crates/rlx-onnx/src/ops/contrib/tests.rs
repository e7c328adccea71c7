//! Cases with ONNX Runtime's results, written by `scripts/goldens/onnx_contrib.py`.

use crate::suite::{difference, interface, read_value};
use crate::{OnnxError, OnnxModel, Value};
use rlx::Session;
use rlx::backend::reference::ReferenceBackend;
use rlx::devices::Device;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Cases that are refused, each with what its message names.
const REFUSED: &[(&str, &str)] = &[];

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/contrib");
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    cases
}

fn results(case: &Path, session: &Session) -> Result<Vec<(String, Value)>, OnnxError> {
    let file = case.join("model.onnx");
    let (model, facts) = (OnnxModel::open_on(&file, session)?, interface(&file)?);
    let data = case.join("test_data_set_0");
    let mut inputs: Vec<(&str, Value)> = Vec::new();
    for (i, (name, kind)) in facts.inputs.iter().enumerate() {
        inputs.push((name, read_value(&data.join(format!("input_{i}.pb")), *kind)?));
    }
    model.run(&inputs)
}

fn wrong(case: &Path, session: &Session) -> Option<String> {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let refused = REFUSED.iter().find(|(refused, _)| *refused == name);
    let found = match (results(case, session), refused) {
        (Err(error @ OnnxError::Unsupported { .. }), Some((_, word))) if error.to_string().contains(word) => {
            return None;
        }
        (Ok(found), None) => found,
        (Ok(_), Some(_)) => return Some(format!("{name}: is no longer refused")),
        (Err(error), _) => return Some(format!("{name}: {error}")),
    };
    let facts = interface(&case.join("model.onnx")).unwrap();
    found.iter().zip(&facts.outputs).enumerate().find_map(|(i, ((_, value), (_, kind)))| {
        let file = case.join(format!("test_data_set_0/output_{i}.pb"));
        let expected = read_value(&file, *kind).unwrap();
        difference(&expected, value, 1e-4, 2e-5).map(|reason| format!("{name}, output {i}: {reason}"))
    })
}

fn check(session: &Session) {
    let cases = cases();
    assert!(cases.len() >= 40, "{} cases", cases.len());
    let wrong: Vec<String> = cases.iter().filter_map(|case| wrong(case, session)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_cpu_gives_what_onnx_runtime_gives() {
    check(&Session::new(Device::Cpu).unwrap());
}

#[test]
fn the_reference_evaluation_gives_what_onnx_runtime_gives() {
    check(&Session::with_backend(Arc::new(ReferenceBackend::default())));
}
