//! The cases on the reference evaluation, as they stand and decomposed.

use crate::{Case, cases, decomposed};
use rlx_graph::{Graph, Op, Stage, interpret, verify};
use std::collections::{BTreeMap, BTreeSet};

fn run(case: &Case, graph: &Graph, roundings: usize) {
    let inputs = case.named_inputs();
    let inputs: Vec<_> = inputs.iter().map(|(name, t)| (name.as_str(), t.clone())).collect();
    let mut states = case.named_states();
    let results = interpret(graph, &inputs, &|_| None, &mut states)
        .unwrap_or_else(|e| panic!("case {:?} of {}: {e}\n{graph}", case.name, case.op));
    case.compare(&results, &states, roundings).unwrap_or_else(|e| panic!("{e}\n{graph}"));
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
        let simpler = decomposed(&graph, false).unwrap();
        assert_eq!(simpler.is_some(), composite, "{} says composite={composite}", case.op);
        if let Some(simpler) = simpler {
            composites.insert(case.op.clone());
            verify(&simpler, Stage::Mir).unwrap();
            run(&case, &simpler, 8);
            let primitive = decomposed(&graph, true).unwrap().unwrap();
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
        for graph in [decomposed(&graph, true).unwrap(), Some(graph)].into_iter().flatten() {
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
