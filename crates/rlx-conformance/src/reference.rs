//! The cases on the reference evaluation, as they stand and decomposed.

use crate::{Case, cases};
use rlx_graph::{Graph, Node, Op, Stage, ValueId, interpret, verify};
use std::collections::{BTreeMap, BTreeSet};

fn run(case: &Case, graph: &Graph, roundings: usize) {
    let inputs = case.named_inputs();
    let inputs: Vec<_> = inputs.iter().map(|(name, t)| (name.as_str(), t.clone())).collect();
    let mut states = case.named_states();
    let results = interpret(graph, &inputs, &|_| None, &mut states)
        .unwrap_or_else(|e| panic!("case {:?} of {}: {e}\n{graph}", case.name, case.op));
    case.compare(&results, &states, roundings).unwrap_or_else(|e| panic!("{e}\n{graph}"));
}

/// The graph with its only node replaced by its decomposition; `None` for a primitive.
fn decomposed(graph: &Graph, all_the_way: bool) -> Option<Graph> {
    let mut result = Graph::new(graph.name());
    let mut map: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for (id, value) in graph.values() {
        let name = value.name.as_deref();
        let new = match (&value.source, name) {
            (rlx_graph::Source::Input, Some(name)) => result.input(name, value.shape.clone()).unwrap(),
            (rlx_graph::Source::State, Some(name)) => result.state(name, value.shape.clone()).unwrap(),
            (rlx_graph::Source::Const(tensor), _) => result.constant(tensor.clone()),
            _ => continue,
        };
        map.insert(id, new);
    }
    let mut changed = false;
    for (_, Node { op, inputs, outputs, .. }) in graph.nodes() {
        let inputs: Vec<ValueId> = inputs.iter().map(|v| map[v]).collect();
        let op: &Op = op;
        let results = match op.def().decompose(&mut result, &inputs) {
            Some(results) => {
                changed = true;
                results.unwrap_or_else(|e| panic!("{e}"))
            }
            None => result.add(op.clone(), &inputs).unwrap(),
        };
        map.extend(outputs.iter().copied().zip(results));
    }
    let outputs: Vec<(&str, ValueId)> = graph.outputs().iter().map(|(n, v)| (n.as_str(), map[v])).collect();
    result.set_outputs(&outputs).unwrap();
    match (changed, all_the_way) {
        (false, _) => None,
        (true, false) => Some(result),
        (true, true) => Some(decomposed(&result, true).unwrap_or(result)),
    }
}

#[test]
fn references_give_the_expected_results() {
    for case in cases().unwrap() {
        run(&case, &case.graph().unwrap(), 1);
    }
}

#[test]
fn decompositions_give_the_expected_results() {
    let mut composites = BTreeSet::new();
    for case in cases().unwrap() {
        let graph = case.graph().unwrap();
        let composite = graph.nodes().all(|(_, n)| n.op.def().props().composite);
        let simpler = decomposed(&graph, false);
        assert_eq!(simpler.is_some(), composite, "{} says composite={composite}", case.op);
        if let Some(simpler) = simpler {
            composites.insert(case.op.clone());
            verify(&simpler, Stage::Mir).unwrap();
            run(&case, &simpler, 8);
            let primitive = decomposed(&graph, true).unwrap();
            assert!(primitive.nodes().all(|(_, n)| !n.op.def().props().composite));
            run(&case, &primitive, 8);
        }
    }
    assert!(composites.len() >= 14, "{composites:?}");
}

#[test]
fn every_op_has_a_case() {
    let with_case: BTreeSet<String> = cases().unwrap().into_iter().map(|c| c.op).collect();
    let missing: Vec<&&str> = Op::NAMES.iter().filter(|name| !with_case.contains(**name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_case_prints_and_parses_back() {
    for case in cases().unwrap() {
        let graph = case.graph().unwrap();
        verify(&graph, Stage::Mir).unwrap();
        for graph in [decomposed(&graph, true), Some(graph)].into_iter().flatten() {
            let text = graph.to_string();
            let again: Graph = text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"));
            assert_eq!(again.to_string(), text);
        }
    }
}

#[test]
fn a_wrong_result_is_noticed() {
    let case = cases().unwrap().into_iter().find(|c| c.op == "softmax").unwrap();
    let mut wrong = case.outputs[0].clone();
    wrong.as_mut_slice::<f32>().unwrap()[0] += 1e-5;
    let result = case.compare(&[("y0".to_owned(), wrong)], &BTreeMap::new(), 1);
    assert_eq!(result.unwrap_err().result, 0);
}
