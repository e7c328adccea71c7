//! What became of a graph: kernels, work, fusions, checks.

use rlx_graph::passes::{Decomposed, PassReport};
use rlx_graph::rewrite::Tally;
use rlx_tensor::{Dim, DimBinding, DimError};
use std::fmt;

/// What became of a graph.
#[derive(Debug, Clone)]
pub struct CompileReport {
    /// The graph's name.
    pub name: String,
    /// The device.
    pub backend: String,
    /// Fusions, pass by pass, and what was decomposed.
    pub passes: PassReport,
    /// Rewrites by name, with how often each was made.
    pub fusions: Vec<Tally>,
    /// Ops the device does not run, and what came in their place.
    pub decomposed: Vec<Decomposed>,
    /// Equalities of sizes that every run checks, each with the node that relies on it.
    pub checks: Vec<String>,
    /// Each step with its kernel.
    pub steps: Vec<StepReport>,
    /// Weights of the registry that the graph has no param for.
    pub unused_weights: Vec<String>,
    /// Wall time of passes and planning, in microseconds.
    pub compile_micros: u64,
}

/// One step of the executable.
#[derive(Debug, Clone)]
pub struct StepReport {
    /// The op.
    pub op: String,
    /// The kernel, as its family's table spells it.
    pub kernel: String,
    /// False if it runs by the reference evaluation for want of a kernel.
    pub native: bool,
    /// Where the graph's author wrote it.
    pub location: String,
    /// Floating-point operations (a fused multiply-add counts two).
    pub flops: Dim,
    /// Bytes read and written, each operand once.
    pub bytes: Dim,
}

/// The work of one step at given sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepWork {
    /// Floating-point operations.
    pub flops: usize,
    /// Bytes read and written.
    pub bytes: usize,
}

impl CompileReport {
    /// Each step's work at these sizes.
    pub fn work(&self, binding: &DimBinding) -> Result<Vec<StepWork>, DimError> {
        let of =
            |s: &StepReport| Ok(StepWork { flops: s.flops.eval(binding)?, bytes: s.bytes.eval(binding)? });
        self.steps.iter().map(of).collect()
    }

    /// The report at these sizes as a table, for people.
    pub fn table(&self, binding: &DimBinding) -> Result<ReportTable<'_>, DimError> {
        Ok(ReportTable { report: self, work: self.work(binding)? })
    }
}

/// A report that prints as text: a line a step, then totals, fusions, decompositions and checks.
#[derive(Debug)]
pub struct ReportTable<'r> {
    report: &'r CompileReport,
    work: Vec<StepWork>,
}

impl fmt::Display for ReportTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = self.report;
        let widest =
            |column: fn(&StepReport) -> usize| report.steps.iter().map(column).max().unwrap_or(0).max(6);
        let (ops, kernels) = (widest(|s| s.op.chars().count()), widest(|s| s.kernel.chars().count()));
        writeln!(f, "{} on {}", report.name, report.backend)?;
        writeln!(
            f,
            "step  {:ops$}  {:kernels$}  {:>12}  {:>12}  written at",
            "op", "kernel", "MFLOP", "KiB"
        )?;
        for (at, (step, work)) in report.steps.iter().zip(&self.work).enumerate() {
            let (mflop, kib) = (work.flops as f64 / 1e6, work.bytes as f64 / 1024.0);
            writeln!(
                f,
                "{at:>4}  {:ops$}  {:kernels$}  {mflop:>12.3}  {kib:>12.1}  {}{}",
                step.op,
                step.kernel,
                step.location,
                if step.native { "" } else { " (no kernel)" },
            )?;
        }
        let flops: f64 = self.work.iter().map(|w| w.flops as f64).sum();
        let bytes: f64 = self.work.iter().map(|w| w.bytes as f64).sum();
        let steps = report.steps.len();
        writeln!(f, "{steps} steps, {:.3} MFLOP, {:.1} MiB", flops / 1e6, bytes / (1 << 20) as f64)?;
        for fusion in &report.fusions {
            writeln!(f, "rewrite {} x {}", fusion.rule, fusion.times)?;
        }
        for node in &report.decomposed {
            writeln!(f, "decomposed {} into {} at {}", node.op, node.into.join(", "), node.location)?;
        }
        report.checks.iter().try_for_each(|check| writeln!(f, "checked in every run: {check}"))?;
        report.unused_weights.iter().try_for_each(|name| writeln!(f, "weight {name} is not used"))
    }
}
