//! Graphs with their ops in simpler ones.

use rlx_graph::{Graph, GraphError, Node, Source, ValueId};
use std::collections::BTreeMap;

/// The graph with every composite replaced by its decomposition, once or until none is left; `None` if there is none.
pub fn decomposed(graph: &Graph, all_the_way: bool) -> Result<Option<Graph>, GraphError> {
    let mut result = Graph::new(graph.name());
    let mut map: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for (id, value) in graph.values() {
        let name = value.name.as_deref();
        let new = match (&value.source, name) {
            (Source::Input, Some(name)) => result.input(name, value.shape.clone())?,
            (Source::Param, Some(name)) => result.param(name, value.shape.clone())?,
            (Source::State, Some(name)) => result.state(name, value.shape.clone())?,
            (Source::Const(tensor), _) => result.constant(tensor.clone()),
            _ => continue,
        };
        map.insert(id, new);
    }
    let mut changed = false;
    for (_, Node { op, inputs, outputs, .. }) in graph.nodes() {
        let inputs: Vec<ValueId> = inputs.iter().map(|v| map[v]).collect();
        let results = match op.def().decompose(&mut result, &inputs) {
            Some(results) => {
                changed = true;
                results?
            }
            None => result.add(op.clone(), &inputs)?,
        };
        map.extend(outputs.iter().copied().zip(results));
    }
    let outputs: Vec<(&str, ValueId)> = graph.outputs().iter().map(|(n, v)| (n.as_str(), map[v])).collect();
    result.set_outputs(&outputs)?;
    match (changed, all_the_way) {
        (false, _) => Ok(None),
        (true, false) => Ok(Some(result)),
        (true, true) => Ok(Some(decomposed(&result, true)?.unwrap_or(result))),
    }
}
