//! Every op case.

use super::weights;
use crate::emulated;
use rlx::backend::Backend;
use rlx::{CompileOptions, CompiledGraph, Session, SessionError, TensorArg};
use rlx_conformance::{Case, cases, decomposed};
use rlx_graph::Graph;
use rlx_graph::passes::{PASSES, PassOptions};
use rlx_tensor::{DimBinding, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Roundings of an engine that rounds after each of an op's functions, as [`Case::compare`] counts them.
const ROUNDINGS: usize = 8;

/// The cases that devices refuse, each with the op that has no kernel.
const REFUSED: &str = include_str!("refused.txt");

fn compile(
    session: &Session,
    case: &Case,
    graph: &Graph,
    params: &[usize],
    plain: bool,
) -> Result<CompiledGraph, SessionError> {
    let skip = match plain {
        true => PASSES.iter().map(|p| p.name).filter(|n| n.starts_with("fuse_")).map(str::to_owned).collect(),
        false => Vec::new(),
    };
    let passes = PassOptions { skip, ..PassOptions::default() };
    let compiled = session.compile_with(graph, &CompileOptions { passes, ..CompileOptions::default() })?;
    for &i in params {
        compiled.set_param(&format!("x{i}"), &case.inputs[i])?;
    }
    Ok(compiled)
}

/// What a device refuses for its values is given back.
fn run(compiled: &CompiledGraph, case: &Case, params: &[usize]) -> Result<(), SessionError> {
    let named: Vec<(String, Tensor)> = case.named_inputs();
    let is_param = |name: &str| params.iter().any(|i| name == format!("x{i}"));
    let inputs: Vec<(&str, TensorArg<'_>)> = named
        .iter()
        .filter(|(name, _)| !is_param(name))
        .map(|(name, tensor)| (name.as_str(), TensorArg::from(tensor)))
        .collect();
    let context = |e: &dyn std::fmt::Display| {
        format!("{e}\n{:?} of {} on {}\n{}", case.name, case.op, compiled.backend().name(), compiled.graph())
    };
    // Twice: the second run must not see what the first left.
    for _ in 0..2 {
        let mut state = compiled.new_state(&DimBinding::new()).unwrap();
        for (index, &operand) in case.states.iter().enumerate() {
            state.buffer_mut(index).unwrap().copy_from_slice(case.inputs[operand].bytes());
        }
        let results = match compiled.run_with(&mut state, &inputs) {
            Err(error) if error.is_device_fault() => return Err(error),
            results => results.unwrap_or_else(|e| panic!("{}", context(&e))),
        };
        let states: BTreeMap<String, Tensor> = case
            .states
            .iter()
            .enumerate()
            .map(|(index, &operand)| {
                let shape = &case.inputs[operand];
                let bytes = state.buffer(index).unwrap();
                (format!("x{operand}"), Tensor::from_bytes(shape.dims(), shape.dtype(), bytes).unwrap())
            })
            .collect();
        case.compare(&results, &states, ROUNDINGS).unwrap_or_else(|e| panic!("{}", context(&e)));
    }
    Ok(())
}

/// Runs every case in each form; those refused must be the ones listed.
fn every_case_on(backend: &Arc<dyn Backend>) {
    cases_on(backend, &|_| true);
}

/// As [`every_case_on`], of some ops.
pub(super) fn cases_on(backend: &Arc<dyn Backend>, ops: &dyn Fn(&str) -> bool) {
    let session = || Session::with_backend(Arc::clone(backend));
    let (mut total, mut refused) = (0, Vec::new());
    for case in cases().unwrap().into_iter().filter(|case| ops(&case.op)) {
        total += 1;
        let params = weights(&case);
        let graph = case.graph_with_params(&params).unwrap();
        let compiled = compile(&session(), &case, &graph, &params, false);
        let compiled = match compiled.and_then(|c| run(&c, &case, &params).map(|()| c)) {
            Ok(compiled) => compiled,
            Err(error) => {
                let text = error.to_string();
                let op = text.split(" (").next().unwrap_or_default().to_owned();
                refused.push(format!("{} | {} | {op}", case.op, case.name));
                continue;
            }
        };
        assert!(compiled.report().unwrap().steps.iter().all(|step| step.native));
        if !params.is_empty() {
            let plain = case.graph().unwrap();
            run(&compile(&session(), &case, &plain, &[], false).unwrap(), &case, &[]).unwrap();
        }
        if let Some(primitive) = decomposed(&graph, true).unwrap()
            && let Ok(compiled) = compile(&session(), &case, &primitive, &params, true)
        {
            run(&compiled, &case, &params).unwrap();
        }
    }
    println!("{}: {} of {total} cases", backend.name(), total - refused.len());
    let own = |line: &&str| !line.starts_with('#') && line.split(" | ").next().is_some_and(ops);
    let listed: Vec<&str> = REFUSED.lines().filter(own).collect();
    assert_eq!(refused, listed, "{:#?}", refused);
}

#[test]
fn every_case_by_the_interpreter_of_kernels() {
    every_case_on(&emulated());
}

#[cfg(feature = "wgpu")]
#[test]
fn every_case_on_the_first_adapter() {
    let provider = crate::provider().unwrap();
    let found = provider.probe();
    let present = matches!(found, rlx::backend::DeviceProbe::Present(count) if count > 0);
    assert!(present, "{found:?}; Debian's mesa-vulkan-drivers have an adapter for every machine");
    let folder = tempfile::tempdir().unwrap();
    let mut config = rlx::config::Config::default();
    config.cache_dir = Some(folder.path().to_owned());
    let backend = provider.open(0, &config).unwrap();
    println!("{} {:?} {}", backend.name(), backend.capabilities(), backend.fingerprint());
    every_case_on(&backend);
}

/// A second process finds what the first had the driver make, where the driver gives it away; a file that was cut is made anew.
#[cfg(feature = "wgpu")]
#[test]
fn pipelines_are_kept_in_the_cache_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = rlx::config::Config::default();
    config.cache_dir = Some(folder.path().to_owned());
    let graph: Graph = "graph \"g\" {\n  input @x : f32[rows, 4]\n  %1 : f32[rows, 4] = softmax(@x) {axis=1}\n  return \"y\": %1\n}"
        .parse()
        .unwrap();
    let x = [1.0f32, 2.0, 3.0, 4.0];
    let run = || {
        let backend = crate::provider().unwrap().open(0, &config).unwrap();
        let compiled = Session::with_backend(backend).compile(&graph).unwrap();
        let outputs = compiled.run(&[("x", TensorArg::typed(&[1, 4], &x))]).unwrap();
        outputs[0].1.as_slice::<f32>().unwrap().to_vec()
    };
    let files = || {
        let listed = std::fs::read_dir(folder.path().join("kernels")).into_iter().flatten().flatten();
        listed.map(|file| file.path()).collect::<Vec<_>>()
    };
    let first = run();
    let Some(file) = files().pop() else {
        println!("the driver gives no pipelines away");
        return;
    };
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(run(), first);
    assert_eq!(run(), first);
    assert_eq!(files(), [file]);
}
