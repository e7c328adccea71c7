//! Wall time per step, and a trace that Chrome and Perfetto show.

use super::compiled::CompiledGraph;
use super::error::SessionError;
use super::report::StepReport;
use rlx_kernels::schedule::RunControl;
use serde_json::json;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Times of an executable's steps, summed over the runs that were given [`StepTimes::control`].
#[derive(Debug)]
pub struct StepTimes {
    steps: Vec<StepReport>,
    nanos: Vec<AtomicU64>,
}

impl StepTimes {
    /// Counters at zero, one a step.
    ///
    /// # Errors
    /// As [`CompiledGraph::report`].
    pub fn new(compiled: &CompiledGraph) -> Result<Self, SessionError> {
        let steps = compiled.report()?.steps;
        let nanos = steps.iter().map(|_| AtomicU64::new(0)).collect();
        Ok(Self { steps, nanos })
    }

    /// What makes a run add its times here.
    pub fn control(&self) -> RunControl<'_> {
        RunControl { times: Some(&self.nanos), ..RunControl::default() }
    }

    /// Every counter to zero.
    pub fn reset(&self) {
        self.nanos.iter().for_each(|n| n.store(0, Ordering::Relaxed));
    }

    /// Each step with its time.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = (&StepReport, Duration)> {
        let times = self.nanos.iter().map(|n| Duration::from_nanos(n.load(Ordering::Relaxed)));
        self.steps.iter().zip(times)
    }

    /// The times in the trace event format: complete events in microseconds, one after the other, for durations alone are measured.
    pub fn chrome_trace(&self) -> String {
        let mut start = 0.0;
        let mut events = Vec::with_capacity(self.steps.len());
        for (at, (step, time)) in self.steps().enumerate() {
            let micros = time.as_nanos() as f64 / 1e3;
            events.push(json!({
                "name": step.op, "cat": "step", "ph": "X", "ts": start, "dur": micros, "pid": 1, "tid": 1,
                "args": {
                    "step": at, "kernel": step.kernel, "location": step.location,
                    "flops": step.flops.to_string(), "bytes": step.bytes.to_string(),
                },
            }));
            start += micros;
        }
        json!({ "traceEvents": events, "displayTimeUnit": "ns" }).to_string()
    }
}
