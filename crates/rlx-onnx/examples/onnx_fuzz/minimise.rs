//! A smaller model with the same difference.

use crate::engines::{Difference, Engines};
use crate::graph::Model;
use rlx_onnx::Value;

/// Takes away outputs and nodes as long as the same way still differs.
pub fn minimise(engines: &mut Engines, model: &Model, difference: &Difference) -> Model {
    let mut smallest = model.clone();
    let still = |engines: &mut Engines, candidate: &Model| {
        let found = engines.differ(candidate);
        matches!(found, Ok(Some(found)) if found.way == difference.way)
    };
    let outputs = smallest.outputs.clone();
    for id in outputs {
        let mut candidate = smallest.clone();
        candidate.outputs = vec![id];
        candidate.prune();
        if still(engines, &candidate) {
            smallest = candidate;
            break;
        }
    }
    loop {
        let before = smallest.nodes.len();
        // A value within as the only output: what comes after it goes.
        for id in smallest.nodes.iter().flat_map(|n| n.outputs.clone()).collect::<Vec<_>>() {
            let mut candidate = smallest.clone();
            candidate.outputs = vec![id];
            candidate.prune();
            if candidate.nodes.len() < smallest.nodes.len() && still(engines, &candidate) {
                smallest = candidate;
                break;
            }
        }
        // A value as an input: what comes before it goes.
        let Ok(values) = engines.values(&smallest) else { return smallest };
        for (id, value) in values.into_iter().rev() {
            let Value::Tensor(tensor) = value else { continue };
            let made = smallest.nodes.iter().position(|node| node.outputs.contains(&id));
            let Some(at) = made.filter(|_| !smallest.outputs.contains(&id)) else { continue };
            let mut candidate = smallest.clone();
            let node = candidate.nodes.remove(at);
            let others = |model: &Model, id| {
                model.outputs.contains(&id) || model.nodes.iter().any(|n| n.reads().contains(&id))
            };
            if node.outputs.iter().any(|&other| other != id && others(&candidate, other)) {
                continue;
            }
            candidate.inputs.push((id, tensor));
            candidate.prune();
            if candidate.nodes.len() < smallest.nodes.len() && still(engines, &candidate) {
                smallest = candidate;
            }
        }
        if smallest.nodes.len() == before {
            return smallest;
        }
    }
}
