use super::{Stage, VerifyError, verify, verify_for};
use crate::graph::{Graph, Source};
use crate::ids::{NodeId, ValueId};

const TEXT: &str = r#"graph "g" {
  input @x : f32[rows, 4]
  input @y : f32[batch, 4]
  state @unused : f32[4]
  const %3 : f32[] = [2.0]
  %4 : f32[batch, 4] = binary(@x, @y) {kind=add}
  %5 : f32[batch, 4] = binary(%4, %3) {kind=mul}
  return "out": %5
}
"#;

fn graph() -> Graph {
    TEXT.parse().unwrap()
}

fn node(i: usize) -> NodeId {
    NodeId::from_index(i)
}

fn value(i: usize) -> ValueId {
    ValueId::from_index(i)
}

fn fault(break_it: impl Fn(&mut Graph)) -> VerifyError {
    let mut graph = graph();
    break_it(&mut graph);
    verify(&graph, Stage::Hir).unwrap_err()
}

#[test]
fn a_sound_graph_passes_both_stages() {
    verify(&graph(), Stage::Hir).unwrap();
    verify(&graph(), Stage::Mir).unwrap();
    let refused =
        verify_for(&graph(), &|op| op.def().attrs()[0].1 != crate::attrs::AttrValue::Str("mul".into()));
    assert_eq!(refused, Err(VerifyError::Unsupported { op: "binary".into(), node: node(1) }));
}

#[test]
fn each_broken_link_is_named() {
    assert!(matches!(fault(|g| g.node_mut(node(0)).inputs[0] = value(99)), VerifyError::UnknownValue { .. }));
    assert!(matches!(fault(|g| g.swap_nodes(node(0), node(1))), VerifyError::Order { .. }));
    assert!(matches!(fault(|g| g.node_mut(node(1)).outputs[0] = value(0)), VerifyError::Producer { .. }));
    assert!(matches!(fault(|g| g.node_mut(node(1)).outputs.push(value(0))), VerifyError::Result { .. }));
    let orphan = |g: &mut Graph| g.value_mut(value(5)).source = Source::Node { node: node(9), index: 0 };
    assert!(matches!(fault(orphan), VerifyError::Producer { .. }));
}

#[test]
fn each_broken_meaning_is_named() {
    let wrong = |g: &mut Graph| g.value_mut(value(5)).shape = "f16[rows, 4]".parse_shape();
    assert!(matches!(fault(wrong), VerifyError::Shape { index: 0, .. }));
    assert!(matches!(fault(|g| g.node_mut(node(0)).inputs.truncate(1)), VerifyError::Infer { .. }));
    assert!(matches!(fault(|g| g.checks_mut().clear()), VerifyError::MissingCheck { .. }));
    let constant = |g: &mut Graph| g.value_mut(value(3)).shape = "f32[1]".parse_shape();
    assert!(matches!(fault(constant), VerifyError::Constant { .. }));
}

#[test]
fn each_broken_name_is_named() {
    assert!(matches!(fault(|g| g.value_mut(value(0)).name = None), VerifyError::Name { .. }));
    assert!(matches!(fault(|g| g.value_mut(value(0)).name = Some("y".into())), VerifyError::Name { .. }));
    assert!(matches!(fault(|g| g.outputs_mut()[0].1 = value(77)), VerifyError::Output { .. }));
    assert!(matches!(fault(|g| g.outputs_mut().push(("out".into(), value(4)))), VerifyError::Output { .. }));
}

#[test]
fn states_are_written_only_as_states() {
    let text = r#"graph "g" {
  input @q : f32[n, 2]
  input @starts : i32[b + 1]
  input @past : i32[b]
  input @table : i32[b, 1]
  state @k : f32[2, 1, 2, 64]
  state @v : f32[2, 1, 64, 2]
  %6 : f32[n, 2] = attention(@q, @q, @q, @starts, @past, @table, @k, @v) {heads=1, kv_heads=1, head_dim=2, scale=1.0, causal=true, window=none, softcap=none, mask=false, cache=true}
}
"#;
    let mut graph: Graph = text.parse().unwrap();
    verify(&graph, Stage::Mir).unwrap();
    graph.value_mut(value(4)).source = Source::Input;
    assert!(matches!(verify(&graph, Stage::Hir), Err(VerifyError::NotAState { operand: 6, .. })));
}

#[test]
fn the_template_has_no_free_sizes_and_computes_something() {
    let free =
        "graph \"g\" {\n  %0 : i32[n] = iota() {dims=dims[n], axis=0, dtype=i32}\n  return \"y\": %0\n}\n";
    let free: Graph = free.parse().unwrap();
    verify(&free, Stage::Hir).unwrap();
    assert!(matches!(verify(&free, Stage::Mir), Err(VerifyError::FreeSymbol { .. })));
    assert_eq!(verify(&Graph::new("empty"), Stage::Mir), Err(VerifyError::NothingComputed));
}

trait ParseShape {
    fn parse_shape(self) -> rlx_tensor::Shape;
}

impl ParseShape for &str {
    fn parse_shape(self) -> rlx_tensor::Shape {
        let text = format!("graph \"s\" {{\n  input @x : {self}\n}}\n");
        let graph: Graph = text.parse().unwrap();
        graph.shape(value(0)).clone()
    }
}
