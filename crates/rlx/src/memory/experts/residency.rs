//! Which experts of a layer are in memory: decisions alone, the same for a pool that runs and for a trace that is replayed.

use std::fmt;
use std::str::FromStr;

/// Which expert leaves when another has to come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ExpertPolicy {
    /// The least recently used.
    Lru,
    /// The least often used; counts halve every 64 visits.
    Lfu,
    /// As [`ExpertPolicy::Lfu`], but the expert that came in last leaves first unless it was used clearly more often: a rare expert
    /// passes through one slot and does not push out a common one.
    #[default]
    Hysteresis,
}

impl ExpertPolicy {
    /// All policies.
    pub const ALL: [ExpertPolicy; 3] = [ExpertPolicy::Lru, ExpertPolicy::Lfu, ExpertPolicy::Hysteresis];

    /// The name in settings and reports.
    pub const fn name(self) -> &'static str {
        match self {
            ExpertPolicy::Lru => "lru",
            ExpertPolicy::Lfu => "lfu",
            ExpertPolicy::Hysteresis => "hysteresis",
        }
    }
}

impl fmt::Display for ExpertPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ExpertPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|policy| policy.name() == text);
        found.ok_or_else(|| format!("{text:?} is no policy; policies are lru, lfu, hysteresis"))
    }
}

/// Visits after which counts of use halve.
const HALVE_EVERY: u64 = 64;
/// By how much an expert on probation has to be used more often to stay.
const MARGIN: u32 = 2;

/// Experts that run together, each in a slot, and which of them have to be loaded before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wave {
    /// `(expert, slot)` of every expert that runs.
    pub members: Vec<(usize, usize)>,
    /// Those of the members that are not in their slot yet, in the order to load them.
    pub loads: Vec<(usize, usize)>,
}

/// The slots of one layer.
#[derive(Debug, Clone)]
pub struct Residency {
    policy: ExpertPolicy,
    slots: Vec<Option<usize>>,
    last_use: Vec<u64>,
    uses: Vec<u32>,
    visit: u64,
    probation: Option<usize>,
}

impl Residency {
    /// Empty slots for a layer of `experts`.
    pub fn new(policy: ExpertPolicy, experts: usize, slots: usize) -> Self {
        let slots = vec![None; slots.clamp(1, experts.max(1))];
        Self { policy, slots, last_use: vec![0; experts], uses: vec![0; experts], visit: 0, probation: None }
    }

    /// The slot of an expert that is in memory.
    pub fn slot_of(&self, expert: usize) -> Option<usize> {
        self.slots.iter().position(|held| *held == Some(expert))
    }

    /// Forgets what is in memory: its content is lost.
    pub fn clear(&mut self) {
        self.slots.fill(None);
        self.probation = None;
    }

    /// The waves in which these experts run, ascending and without repetition; numbers of experts that are not there are left out.
    /// Experts in memory run first.
    pub fn plan(&mut self, needed: &[usize]) -> Vec<Wave> {
        self.visit += 1;
        if self.visit.is_multiple_of(HALVE_EVERY) {
            self.uses.iter_mut().for_each(|uses| *uses /= 2);
        }
        let needed = needed.iter().copied().filter(|&expert| expert < self.uses.len());
        let (held, missing): (Vec<usize>, Vec<usize>) = needed.partition(|&e| self.slot_of(e).is_some());
        for &expert in held.iter().chain(&missing) {
            self.last_use[expert] = self.visit;
            self.uses[expert] = self.uses[expert].saturating_add(1);
        }
        let mut waves = vec![Wave::default()];
        for expert in held {
            let slot = self.slot_of(expert);
            waves[0].members.extend(slot.map(|slot| (expert, slot)));
        }
        for expert in missing {
            let last = waves.len() - 1;
            if waves[last].members.len() == self.slots.len() {
                waves.push(Wave::default());
            }
            let Some(wave) = waves.last_mut() else { continue };
            let slot = self.victim(&wave.members);
            self.slots[slot] = Some(expert);
            self.probation = Some(expert);
            wave.members.push((expert, slot));
            wave.loads.push((expert, slot));
        }
        waves.retain(|wave| !wave.members.is_empty());
        waves
    }

    /// Makes room for an expert that may be needed soon; `None` if it is in memory.
    pub fn prefetch(&mut self, expert: usize) -> Option<usize> {
        if expert >= self.uses.len() || self.slot_of(expert).is_some() {
            return None;
        }
        let slot = self.victim(&[]);
        self.slots[slot] = Some(expert);
        Some(slot)
    }

    /// The slot whose expert leaves: an empty one, else by policy; those of `busy` stay.
    fn victim(&self, busy: &[(usize, usize)]) -> usize {
        let free = |slot: &usize| busy.iter().all(|(_, used)| used != slot);
        let key = |&slot: &usize| {
            let Some(expert) = self.slots[slot] else { return (0, 0, 0, 0) };
            let (last, uses) = (self.last_use[expert], self.uses[expert]);
            match self.policy {
                ExpertPolicy::Lru => (1, last, 0, expert),
                ExpertPolicy::Lfu | ExpertPolicy::Hysteresis => (1, u64::from(uses), last, expert),
            }
        };
        let least = (0..self.slots.len()).filter(free).min_by_key(key).unwrap_or(0);
        let trial = self.probation.filter(|_| self.policy == ExpertPolicy::Hysteresis);
        if let (Some(trial), Some(held)) = (trial, self.slots[least])
            && let Some(slot) = self.slot_of(trial).filter(free)
            && self.uses[trial] <= self.uses[held].saturating_add(MARGIN)
        {
            return slot;
        }
        least
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn experts(waves: &[Wave]) -> Vec<Vec<usize>> {
        waves.iter().map(|wave| wave.members.iter().map(|(expert, _)| *expert).collect()).collect()
    }

    #[test]
    fn every_needed_expert_runs_once_in_waves_of_at_most_the_slots() {
        for policy in ExpertPolicy::ALL {
            for slots in 1..=6 {
                let mut residency = Residency::new(policy, 6, slots);
                let mut held = vec![None; slots];
                for visit in 0..200usize {
                    let needed: Vec<usize> =
                        (0..6).filter(|e| (visit * 7 + e * 5) % 4 < 2 || visit % 9 == 0).collect();
                    let waves = residency.plan(&needed);
                    let mut ran: Vec<usize> = experts(&waves).concat();
                    ran.sort_unstable();
                    assert_eq!(ran, needed, "{policy} {slots}");
                    for wave in &waves {
                        assert!(wave.members.len() <= slots);
                        wave.loads.iter().for_each(|&(expert, slot)| held[slot] = Some(expert));
                        let right = wave.members.iter().all(|&(expert, slot)| held[slot] == Some(expert));
                        assert!(right, "{policy} {slots}: a slot does not hold what runs from it");
                    }
                }
            }
        }
    }

    #[test]
    fn the_least_recently_used_leaves_first() {
        let mut residency = Residency::new(ExpertPolicy::Lru, 4, 2);
        residency.plan(&[0, 1]);
        residency.plan(&[0]);
        residency.plan(&[2]);
        assert_eq!((residency.slot_of(0).is_some(), residency.slot_of(1)), (true, None));
    }

    #[test]
    fn a_rare_expert_passes_through_without_pushing_out_common_ones() {
        let mut residency = Residency::new(ExpertPolicy::Hysteresis, 8, 3);
        for _ in 0..10 {
            residency.plan(&[0, 1]);
        }
        for rare in [2, 3, 4, 5, 6, 7] {
            assert_eq!(residency.plan(&[rare])[0].loads.len(), 1);
            assert!(residency.slot_of(0).is_some() && residency.slot_of(1).is_some(), "{rare}");
        }
    }

    #[test]
    fn the_same_visits_give_the_same_decisions() {
        let run = || {
            let mut residency = Residency::new(ExpertPolicy::Hysteresis, 16, 5);
            (0..300usize).map(|i| residency.plan(&[i * i % 16, i * 3 % 16])).collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
    }

    #[test]
    fn experts_that_are_not_there_are_left_out() {
        let mut residency = Residency::new(ExpertPolicy::Lru, 2, 9);
        assert_eq!(experts(&residency.plan(&[1, 7])), [[1]]);
        assert_eq!(
            (residency.prefetch(7), residency.prefetch(1), residency.prefetch(0)),
            (None, None, Some(1))
        );
    }
}
