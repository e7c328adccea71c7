//! The backend held to the op cases, by the interpreter of kernels and, with the feature `wgpu`, on the first adapter there is.

mod bands;
mod conformance;
mod dots;
mod faults;
mod flash;
mod functions;
mod grouped;
mod images;
mod kernels;
mod library;
mod products;
mod segments;
mod tiles;
mod topk;
#[cfg(feature = "translate")]
mod translate;
mod tune;
mod units;
mod whole;

use crate::device::buffer_dtypes;
use crate::ir::Kernel;
use crate::lower::{LowerCx, find};
use rlx::plan::{PlanTarget, Template};
use rlx_conformance::Case;
use rlx_graph::passes::{PassOptions, Target, compile_passes};
use rlx_graph::{Graph, Op, OpDef};
use rlx_tensor::Shape;
use std::sync::Arc;

/// The operands that are weights wherever the op is used.
fn weights(case: &Case) -> Vec<usize> {
    let count = case.inputs.len();
    let residual = usize::from(case.attrs.contains("residual=true"));
    match case.op.as_str() {
        "linear" | "layer_norm" | "rms_norm" => (1..count - residual).collect(),
        "moe" => (2..count).collect(),
        "embedding" | "rope_angles" => vec![1],
        _ => Vec::new(),
    }
}

/// What the device runs, as the backend says.
struct Runs;

impl Target for Runs {
    fn name(&self) -> &str {
        "gpu"
    }

    fn runs(&self, op: &dyn OpDef, inputs: &[&Shape], outputs: &[&Shape]) -> bool {
        find(op.name()).is_some_and(|entry| entry.supports(op, inputs, outputs))
    }
}

impl PlanTarget for Runs {
    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn accepts_in_place(&self, _op: &Op, _operand: Option<usize>, _result: &Shape) -> bool {
        false
    }
}

/// The kernels of a graph; `None` if a device does not run it.
fn kernels_of(graph: &Graph) -> Option<Vec<Arc<Kernel>>> {
    let (legal, _) = compile_passes(graph, &Runs, &PassOptions::default()).ok()?;
    let template = Template::build(&legal, &Runs).unwrap();
    let mut cx = LowerCx::new(&template);
    for (at, step) in template.steps().iter().enumerate() {
        cx.lower(at, step).unwrap_or_else(|e| panic!("{e}\n{legal}"));
    }
    buffer_dtypes(&template).unwrap();
    Some(cx.kernels())
}

/// Every kernel that some op case needs, and those of products too large for a case, each once, by hash.
fn zoo() -> Vec<Arc<Kernel>> {
    let mut kernels = std::collections::BTreeMap::new();
    for case in rlx_conformance::cases().unwrap() {
        for params in [weights(&case), Vec::new()] {
            let own = kernels_of(&case.graph_with_params(&params).unwrap()).unwrap_or_default();
            kernels.extend(own.into_iter().map(|k| (k.hash(), k)));
        }
    }
    for layer in products::LAYERS {
        kernels.extend(kernels_of(&layer.graph()).unwrap().into_iter().map(|k| (k.hash(), k)));
    }
    for graph in grouped::graphs() {
        kernels.extend(kernels_of(&graph).unwrap().into_iter().map(|k| (k.hash(), k)));
    }
    kernels.extend(tune::kernels().into_iter().map(|k| (k.hash(), k)));
    kernels.extend(images::kernels().into_iter().map(|k| (k.hash(), k)));
    for heads in flash::HEADS {
        kernels.extend(kernels_of(&heads.graph()).unwrap().into_iter().map(|k| (k.hash(), k)));
    }
    kernels.into_values().collect()
}
