//! Which runs launch the same kernels on the same memory: a driver that can record launches makes them one call.

use super::driver::{Batch, Driver};
use std::collections::VecDeque;

/// What decides the launches of a batch: kernels, grids and buffers in order, and the arguments that a call is `told` by the host. What is
/// written to the buffers is no part of it.
pub(crate) fn signature<D: Driver>(
    batch: &Batch<'_, D>,
    kernel: impl Fn(&D::Kernel) -> u64,
    buffer: impl Fn(&D::Buffer) -> u64,
    told: impl Fn(&D::Kernel) -> usize,
) -> Vec<u64> {
    let mut signature = vec![buffer(batch.arena), buffer(batch.arguments)];
    for call in &batch.calls {
        let [x, y] = call.grid.map(|n| n as u64);
        signature.extend([kernel(call.kernel), call.arguments as u64, x, y, call.bound.len() as u64]);
        signature.extend(call.bound.iter().map(|b| buffer(b)));
        signature.extend(call.told(batch.table, told(call.kernel)).iter().map(|&word| u64::from(word)));
    }
    signature
}

/// What is to be done with a batch's launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// They have not come before: one by one.
    Launch,
    /// They come again: record them.
    Record,
    /// They are recorded.
    Replay,
}

/// Recordings that are kept: of a decode step, of a prompt's steps.
const KEPT: usize = 4;

/// The launches that came last, with what was recorded of them.
#[derive(Debug)]
pub(crate) struct Replays<G>(VecDeque<(Vec<u64>, Option<G>)>);

impl<G> Default for Replays<G> {
    fn default() -> Self {
        Replays(VecDeque::new())
    }
}

impl<G> Replays<G> {
    /// What is to be done with these launches, which count as the last that came.
    pub fn next(&mut self, signature: Vec<u64>) -> Step {
        let known = self.0.iter().position(|(known, _)| *known == signature);
        let entry = known.and_then(|at| self.0.remove(at));
        let step = match &entry {
            None => Step::Launch,
            Some((_, None)) => Step::Record,
            Some((_, Some(_))) => Step::Replay,
        };
        self.0.push_front(entry.unwrap_or((signature, None)));
        self.0.truncate(KEPT);
        step
    }

    /// Keeps what was recorded of the last launches.
    pub fn keep(&mut self, recorded: G) {
        if let Some((_, entry)) = self.0.front_mut() {
            *entry = Some(recorded);
        }
    }

    /// What was recorded of the last launches.
    pub fn last(&self) -> Option<&G> {
        self.0.front().and_then(|(_, recorded)| recorded.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_are_recorded_when_they_come_again_and_replayed_after_that() {
        let mut replays = Replays::default();
        assert_eq!(replays.next(vec![1]), Step::Launch);
        assert_eq!(replays.next(vec![2]), Step::Launch);
        assert_eq!(replays.next(vec![1]), Step::Record);
        replays.keep("first");
        assert_eq!((replays.next(vec![2]), replays.last()), (Step::Record, None));
        assert_eq!((replays.next(vec![1]), replays.last()), (Step::Replay, Some(&"first")));
    }

    #[test]
    fn what_came_long_ago_is_forgotten() {
        let mut replays = Replays::default();
        replays.next(vec![0]);
        replays.next(vec![0]);
        replays.keep(());
        (1..=KEPT as u64).for_each(|n| assert_eq!(replays.next(vec![n]), Step::Launch));
        assert_eq!(replays.next(vec![0]), Step::Launch);
    }
}
