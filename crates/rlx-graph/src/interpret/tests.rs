use super::{InterpretError, interpret};
use crate::graph::Graph;
use rlx_tensor::{DType, Tensor};
use std::collections::BTreeMap;

const TEXT: &str = r#"graph "g" {
  input @tokens : f32[rows, 2]
  input @starts : i32[batch + 1]
  param @scale : f32[2]
  %3 : f32[rows, 2] = binary(@tokens, @scale) {kind=mul}
  %4 : f32[batch, 2] = pool(%3, @starts) {kind=mean}
  return "pooled": %4, "scaled": %3
}
"#;

fn tensor(dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_slice(dims, values).unwrap()
}

fn starts(values: &[i32]) -> Tensor {
    Tensor::from_slice(&[values.len()], values).unwrap()
}

fn params(name: &str) -> Option<Tensor> {
    (name == "scale").then(|| tensor(&[2], &[1.0, 10.0]))
}

fn run(inputs: &[(&str, Tensor)]) -> Result<Vec<(String, Tensor)>, InterpretError> {
    let graph: Graph = TEXT.parse().unwrap();
    interpret(&graph, inputs, &params, &mut BTreeMap::new())
}

#[test]
fn sizes_are_solved_from_what_is_given() {
    let tokens = tensor(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let results = run(&[("tokens", tokens), ("starts", starts(&[0, 1, 3]))]).unwrap();
    assert_eq!(results[0].0, "pooled");
    assert_eq!(results[0].1.as_slice::<f32>().unwrap(), &[1.0, 20.0, 4.0, 50.0]);
    assert_eq!(results[1].1.dims(), &[3, 2]);
}

#[test]
fn wrong_inputs_are_errors_that_name_them() {
    let (tokens, seqs) = (tensor(&[1, 2], &[1.0, 2.0]), starts(&[0, 1]));
    let unknown = run(&[("tokns", tokens.clone())]).unwrap_err();
    assert_eq!(unknown, InterpretError::Unknown { name: "tokns".into(), nearest: Some("tokens".into()) });
    assert!(unknown.to_string().contains("nearest name is \"tokens\""));
    let twice = run(&[("tokens", tokens.clone()), ("tokens", tokens.clone())]);
    assert!(matches!(twice, Err(InterpretError::Twice { .. })));
    assert!(matches!(run(&[("tokens", tokens.clone())]), Err(InterpretError::Missing { kind: "input", .. })));
    let floats = run(&[("tokens", tokens.clone()), ("starts", tensor(&[2], &[0.0, 1.0]))]);
    assert!(matches!(floats, Err(InterpretError::DType { expected: DType::I32, .. })));
    let flat = run(&[("tokens", tensor(&[2], &[1.0, 2.0])), ("starts", seqs.clone())]);
    assert!(matches!(flat, Err(InterpretError::Rank { expected: 2, found: 1, .. })));
    let wide = run(&[("tokens", tensor(&[1, 3], &[1.0, 2.0, 3.0])), ("starts", seqs)]);
    assert!(matches!(wide, Err(InterpretError::Extent { axis: 1, expected: 2, found: 3, .. })));
    let none = run(&[("tokens", tokens.clone()), ("starts", starts(&[]))]);
    assert!(matches!(none, Err(InterpretError::Unsolved { .. })));
    let beyond = run(&[("tokens", tokens), ("starts", starts(&[0, 7]))]);
    assert!(matches!(beyond, Err(InterpretError::Eval { .. })));
}

#[test]
fn dims_that_must_agree_are_checked() {
    let text = r#"graph "g" {
  input @a : f32[m]
  input @b : f32[n]
  %2 : f32[n] = binary(@a, @b) {kind=add}
  return "y": %2
}
"#;
    let graph: Graph = text.parse().unwrap();
    let run = |n: usize| {
        let b = tensor(&[n], &vec![1.0; n]);
        interpret(&graph, &[("a", tensor(&[3], &[1.0; 3])), ("b", b)], &|_| None, &mut BTreeMap::new())
    };
    assert_eq!(run(3).unwrap()[0].1.as_slice::<f32>().unwrap(), &[2.0; 3]);
    assert!(matches!(run(2), Err(InterpretError::Check { left_value: 3, right_value: 2, .. })));
}

#[test]
fn a_failed_run_leaves_states_alone() {
    let text = r#"graph "g" {
  input @x : f32[rows, 2]
  input @starts : i32[b + 1]
  input @past : i32[b]
  input @table : i32[b, 1]
  input @ids : i32[rows]
  state @k : f32[1, 1, 2, 64]
  state @v : f32[1, 1, 64, 2]
  %7 : f32[rows, 2] = attention(@x, @x, @x, @starts, @past, @table, @k, @v) {heads=1, kv_heads=1, head_dim=2, scale=1.0, causal=true, window=none, softcap=none, mask=false, cache=true}
  %8 : f32[rows, 2] = gather(%7, @ids) {axis=0}
  return "y": %8
}
"#;
    let graph: Graph = text.parse().unwrap();
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32).unwrap();
    let fresh: BTreeMap<String, Tensor> =
        [("k".to_owned(), zeros(&[1, 1, 2, 64])), ("v".to_owned(), zeros(&[1, 1, 64, 2]))].into();
    let mut states = fresh.clone();
    let mut run = |past: i32, id: i32| {
        let table = Tensor::from_slice(&[1, 1], &[0i32]).unwrap();
        let inputs = [
            ("x", tensor(&[1, 2], &[1.0, 2.0])),
            ("starts", starts(&[0, 1])),
            ("past", starts(&[past])),
            ("table", table),
            ("ids", starts(&[id])),
        ];
        let result = interpret(&graph, &inputs, &|_| None, &mut states);
        (result, states["v"].as_slice::<f32>().unwrap()[..4].to_vec())
    };
    let (failed, after) = run(0, 5);
    assert!(failed.is_err());
    assert_eq!(after, [0.0; 4]);
    let (first, after) = run(0, 0);
    assert_eq!(first.unwrap()[0].1.as_slice::<f32>().unwrap(), &[1.0, 2.0]);
    assert_eq!(after, [1.0, 2.0, 0.0, 0.0]);
    assert_eq!(run(1, 0).1, [1.0, 2.0, 1.0, 2.0]);
    assert!(run(64, 0).0.is_err());
}
