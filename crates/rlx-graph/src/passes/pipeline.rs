//! THE list of passes. Every entry point compiles through [`compile_passes`].

use crate::graph::Graph;
use crate::passes::{
    Dispatch, PassCx, PassError, PassOptions, Target, attach_adapters, canonicalise, channels_last, cse, dce,
    fold_constants, fuse_activation, fuse_attention, fuse_conv, fuse_elementwise, fuse_gated, fuse_integer,
    fuse_linear, fuse_norm, fuse_norm_residual, fuse_shared_input, hoist_slices, legalise,
};
use crate::rewrite::{Draft, FusionReport};
use crate::verify::Stage;
use rlx_tensor::time::Instant;
use std::collections::BTreeMap;

/// A pass: its name, what it does in one line, and its body.
pub struct Pass {
    /// The name in reports and in [`PassOptions::skip`].
    pub name: &'static str,
    /// What it does.
    pub about: &'static str,
    run: fn(&mut Draft, &mut PassCx<'_>) -> Result<(), PassError>,
}

macro_rules! passes {
    ($($module:ident: $about:literal,)*) => {
        /// The passes in the order in which they run.
        pub const PASSES: &[Pass] =
            &[$(Pass { name: stringify!($module), about: $about, run: $module::run },)*];
    };
}

passes! {
    canonicalise: "one spelling for what can be said in several ways",
    fold_constants: "nodes of constants become constants",
    cse: "what is computed twice is computed once",
    dce: "what nothing needs goes",
    fuse_integer: "products of dequantised codes become products of codes",
    hoist_slices: "parts of one value are taken before it is turned",
    fuse_activation: "chains of elementwise ops become activations",
    fuse_norm: "chains of reductions become norms",
    fuse_attention: "softmax(q k^T) v becomes one op that stores no scores",
    fuse_gated: "act(a) * b becomes one op",
    fuse_linear: "products with weights take bias, activation and residual",
    fuse_conv: "convolutions take addend and activation",
    fuse_shared_input: "linear layers of one input become one",
    fuse_norm_residual: "norms take the sum before them",
    channels_last: "images keep their channels adjacent",
    canonicalise: "the same, after fusion",
    cse: "the same, after fusion",
    dce: "the same, after fusion",
    fuse_elementwise: "what is left of elementwise ops runs in chains",
    attach_adapters: "linear layers make room for low-rank updates",
    legalise: "the target's own ops only",
    cse: "the same, after decomposition",
    dce: "the same, after decomposition",
}

/// One pass's effect.
#[derive(Debug, Clone, PartialEq)]
pub struct PassStat {
    /// The pass.
    pub pass: &'static str,
    /// Nodes before it.
    pub nodes_before: usize,
    /// Nodes after it.
    pub nodes_after: usize,
    /// Number of rewrites it applied.
    pub fired: usize,
    /// Wall time, in microseconds, without verification.
    pub micros: u64,
}

/// What the passes did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PassReport {
    /// Each rewrite.
    pub trace: FusionReport,
    /// Each pass.
    pub passes: Vec<PassStat>,
    /// What runs natively and what was decomposed.
    pub dispatch: Dispatch,
}

/// Optimises a graph and makes it legal for a target.
pub fn compile_passes(
    graph: &Graph,
    target: &dyn Target,
    options: &PassOptions,
) -> Result<(Graph, PassReport), PassError> {
    if let Some(name) = options.skip.iter().find(|s| !PASSES.iter().any(|p| p.name == s.as_str())) {
        return Err(unknown(name));
    }
    let skipped = |pass: &&Pass| pass.name == "legalise" || !options.skip.iter().any(|s| s == pass.name);
    let passes = PASSES.iter().filter(skipped);
    match &options.adapters {
        Some(layout) => run_list(&layout.with_inputs(graph)?, passes, target, options),
        None => run_list(graph, passes, target, options),
    }
}

/// Runs one pass of the list by name.
pub fn run_pass(
    name: &str,
    graph: &Graph,
    target: &dyn Target,
    options: &PassOptions,
) -> Result<(Graph, PassReport), PassError> {
    let pass = PASSES.iter().find(|p| p.name == name).ok_or_else(|| unknown(name))?;
    run_list(graph, [pass].into_iter(), target, options)
}

fn unknown(name: &str) -> PassError {
    let mut known: Vec<&str> = PASSES.iter().map(|p| p.name).collect();
    known.sort_unstable();
    known.dedup();
    PassError::UnknownPass { name: name.to_owned(), known: known.join(", ") }
}

fn run_list<'p>(
    graph: &Graph,
    passes: impl Iterator<Item = &'p Pass>,
    target: &dyn Target,
    options: &PassOptions,
) -> Result<(Graph, PassReport), PassError> {
    let mut draft = Draft::new(graph);
    let mut report = PassReport::default();
    for pass in passes {
        let (nodes_before, fired_before) = (draft.len(), report.trace.fired.len());
        let start = Instant::now();
        let (trace, dispatch) = (&mut report.trace, &mut report.dispatch);
        (pass.run)(&mut draft, &mut PassCx { target, options, trace, dispatch })?;
        report.passes.push(PassStat {
            pass: pass.name,
            nodes_before,
            nodes_after: draft.len(),
            fired: report.trace.fired.len() - fired_before,
            micros: u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX),
        });
        if options.verify {
            verify(&draft, pass.name)?;
        }
    }
    let mut native = BTreeMap::new();
    draft.nodes().for_each(|(_, node)| *native.entry(node.op().def().name()).or_default() += 1);
    report.dispatch.native = native;
    Ok((draft.build()?, report))
}

fn verify(draft: &Draft, pass: &'static str) -> Result<(), PassError> {
    let broken = |reason: String| PassError::Verify { pass, reason };
    let graph = draft.build().map_err(|e| broken(e.to_string()))?;
    crate::verify::verify(&graph, Stage::Hir).map_err(|e| broken(e.to_string()))
}

#[cfg(test)]
mod tests;
