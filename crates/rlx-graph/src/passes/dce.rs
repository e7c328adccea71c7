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
