//! What nothing needs goes.
//!
//! Needs: nothing. Does: drops nodes whose results are unused, and params that no node uses (they need not be loaded). Leaves: nodes that
//! write a state or are impure, and every input and state of the interface.

use crate::graph::Source;
use crate::ids::{NodeId, ValueId};
use crate::passes::{PassCx, PassError};
use crate::rewrite::{Draft, Fired};

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    let ids: Vec<NodeId> = draft.nodes().map(|(id, _)| id).collect();
    for id in ids.into_iter().rev() {
        if draft.is_live(id) && draft.is_dead(id) {
            let mut dropped = Vec::new();
            draft.drop_node(id, &mut dropped);
            let removed = dropped.iter().map(|&d| draft.node(d).op().def().name()).collect();
            let location = draft.node(id).location();
            cx.trace.fired.push(Fired { rule: "dce", location, label: None, removed, added: Vec::new() });
        }
    }
    let unused = |v: &ValueId| matches!(draft.source(*v), Source::Param) && draft.use_count(*v) == 0;
    let params: Vec<ValueId> = draft.interface().filter(unused).collect();
    params.into_iter().for_each(|v| draft.drop_param(v));
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    #[test]
    fn unused_nodes_and_params_go_and_inputs_stay() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  input @unused : f32[rows]
  param @w : f32[4]
  param @gone : f32[4]
  %4 : f32[rows, 4] = binary(@x, @w) {kind=mul}
  %5 : f32[rows, 4] = binary(%4, @gone) {kind=add}
  %6 : f32[rows, 4] = unary(%5) {kind=exp}
  return "y": %4
}"#;
        insta::assert_snapshot!(after(&["dce"], before), @r#"
        graph "g" {
          input @x : f32[rows, 4]
          input @unused : f32[rows]
          param @w : f32[4]
          %3 : f32[rows, 4] = binary(@x, @w) {kind=mul}
          return "y": %3
        }
        "#);
    }

    #[test]
    fn what_an_output_needs_stays() {
        let before = r#"graph "g" {
  input @x : f32[rows, 4]
  %1 : f32[rows, 4] = unary(@x) {kind=exp}
  %2 : f32[rows, 4] = unary(%1) {kind=log}
  return "y": %1, "z": %2
}"#;
        assert!(fired("dce", before).is_empty());
    }
}
