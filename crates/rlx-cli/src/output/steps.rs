//! Where the time of a run goes.

use super::table;
use serde::Serialize;

/// The steps of one op by one kernel.
#[derive(Debug, Serialize)]
pub struct StepShare {
    pub op: String,
    pub kernel: String,
    pub steps: usize,
    pub micros: f64,
    pub share: f64,
}

/// Where the time goes.
pub fn steps_table(steps: &[StepShare]) -> String {
    let mut lines = vec![["op", "kernel", "steps", "µs", "share"].map(str::to_owned).to_vec()];
    for step in steps {
        let (count, micros) = (step.steps.to_string(), format!("{:.1}", step.micros));
        let share = format!("{:.1}%", step.share * 100.0);
        lines.push(vec![step.op.clone(), step.kernel.clone(), count, micros, share]);
    }
    table(&lines)
}
