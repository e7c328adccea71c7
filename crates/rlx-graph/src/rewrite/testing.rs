//! What golden tests of passes share: text in, text out, and the same numbers before and after.

use crate::graph::{Graph, Value};
use crate::interpret::interpret;
use crate::passes::{OpSet, PassOptions, PassReport, run_pass};
use rlx_tensor::{DType, DimBinding, Tensor};
use std::collections::BTreeMap;

/// The graph after some passes, as text. Both graphs are evaluated on the same data and must agree.
pub(crate) fn after(passes: &[&str], text: &str) -> String {
    let before: Graph = text.parse().unwrap();
    let (graph, report) = run(passes, &before);
    assert!(report.trace.refused.is_empty(), "{:?}", report.trace.refused);
    assert_same_numbers(&before, &graph);
    graph.to_string()
}

/// The rules that fire when a pass runs.
pub(crate) fn fired(pass: &str, text: &str) -> Vec<&'static str> {
    let before: Graph = text.parse().unwrap();
    let (graph, report) = run(&[pass], &before);
    assert_same_numbers(&before, &graph);
    report.trace.fired.iter().map(|f| f.rule).collect()
}

fn run(passes: &[&str], before: &Graph) -> (Graph, PassReport) {
    let (mut graph, mut report) = (before.clone(), PassReport::default());
    for pass in passes {
        let (next, more) =
            run_pass(pass, &graph, &OpSet::every_op("reference"), &PassOptions::default()).unwrap();
        graph = next;
        report.trace.fired.extend(more.trace.fired);
        report.trace.refused.extend(more.trace.refused);
    }
    (graph, report)
}

/// Evaluates two graphs of one interface on the same numbers. The tolerance follows from F32's rounding unit, the number of
/// roundings on a path and the largest magnitude.
pub(crate) fn assert_same_numbers(before: &Graph, after: &Graph) {
    let (expected, found) = (evaluate(before), evaluate(after));
    assert_eq!(expected.len(), found.len());
    let longest = before.values().filter_map(|(_, v)| v.shape.last()?.known()).max().unwrap_or(1);
    let roundings = (4 * before.nodes().len() + longest) as f64;
    for ((name, a), (other, b)) in expected.iter().zip(&found) {
        assert_eq!((name, a.dims(), a.dtype()), (other, b.dims(), b.dtype()));
        let (a, b) = (crate::eval::to_f64(a).unwrap(), crate::eval::to_f64(b).unwrap());
        let magnitude = a.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
        let tolerance = roundings * f64::from(f32::EPSILON) * magnitude;
        for (i, (x, y)) in a.iter().zip(&b).enumerate() {
            let close = x == y || (x - y).abs() <= tolerance || (x.is_nan() && y.is_nan());
            assert!(close, "{name}[{i}]: {x} before, {y} after\n{before}\n{after}");
        }
    }
}

/// Outputs and states of a run on data that depends on names and positions only.
pub(crate) fn evaluate(graph: &Graph) -> Vec<(String, Tensor)> {
    let mut binding = DimBinding::new();
    for symbol in graph.symbols() {
        let value = if symbol.name() == "batch" { 2 } else { 3 };
        binding.bind(&symbol, value).unwrap();
    }
    let data = |value: &Value| {
        let name = value.name.clone().unwrap();
        let tensor = numbers(&name, &value.shape.eval(&binding).unwrap(), value.shape.dtype());
        (name, tensor)
    };
    let inputs: Vec<(String, Tensor)> = graph.inputs().map(|(_, v)| data(v)).collect();
    let params: BTreeMap<String, Tensor> = graph.params().map(|(_, v)| data(v)).collect();
    let mut states: BTreeMap<String, Tensor> = graph.states().map(|(_, v)| data(v)).collect();
    let inputs: Vec<(&str, Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t.clone())).collect();
    let mut results = interpret(graph, &inputs, &|name| params.get(name).cloned(), &mut states).unwrap();
    results.extend(states);
    results
}

fn numbers(name: &str, dims: &[usize], dtype: DType) -> Tensor {
    let mut seed = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    let count: usize = dims.iter().product();
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 40) as f64 / f64::from(1u32 << 23) - 1.0
    };
    let mut number = || match dtype {
        DType::I8 => next() * 128.0,
        DType::U8 => next().abs() * 256.0,
        dtype if dtype.is_float() => next(),
        _ => next().abs() * 2.0,
    };
    let values: Vec<f64> = (0..count).map(|_| number()).collect();
    crate::eval::from_f64(dims, dtype, &values).unwrap()
}
