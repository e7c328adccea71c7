//! What experts a run needed, as text, and what each policy would have moved for it.

use super::residency::{ExpertPolicy, Residency};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Experts needed, visit by visit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpertTrace {
    /// Experts of a layer.
    pub experts: usize,
    /// Bytes of an expert in memory.
    pub expert_bytes: u64,
    /// Layer and experts of each visit.
    pub visits: Vec<(usize, Vec<usize>)>,
}

/// A trace that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expert trace, line {line}: {reason}")]
pub struct TraceError {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

impl ExpertTrace {
    /// As text: a line with the sizes, then a line for each visit, layer first.
    pub fn to_text(&self) -> String {
        let mut text = format!("experts {} bytes {}\n", self.experts, self.expert_bytes);
        for (layer, experts) in &self.visits {
            // Writing to a string cannot fail.
            let _ = write!(text, "{layer}:");
            for expert in experts {
                let _ = write!(text, " {expert}");
            }
            text.push('\n');
        }
        text
    }

    /// Back from text.
    ///
    /// # Errors
    /// [`TraceError`] for a line that does not parse, or an expert that is not there.
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        let mut lines = text.lines().enumerate();
        let wrong = |line: usize, reason: &str| TraceError { line: line + 1, reason: reason.to_owned() };
        let head = lines.next().map_or("", |(_, line)| line);
        let fields: Vec<&str> = head.split(' ').collect();
        let ["experts", experts, "bytes", bytes] = fields[..] else {
            return Err(wrong(0, "expected `experts N bytes N`"));
        };
        let (Ok(experts), Ok(expert_bytes)) = (experts.parse(), bytes.parse()) else {
            return Err(wrong(0, "expected two numbers"));
        };
        let mut visits = Vec::new();
        for (at, line) in lines {
            let (layer, rest) = line.split_once(':').ok_or_else(|| wrong(at, "expected `layer: experts`"))?;
            let layer = layer.parse().map_err(|_| wrong(at, "the layer is no number"))?;
            let needed: Result<Vec<usize>, _> = rest.split_whitespace().map(str::parse).collect();
            let needed = needed.map_err(|_| wrong(at, "an expert is no number"))?;
            if needed.iter().any(|&expert| expert >= experts) {
                return Err(wrong(at, &format!("an expert is outside 0..{experts}")));
            }
            visits.push((layer, needed));
        }
        Ok(Self { experts, expert_bytes, visits })
    }
}

/// What a replay moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReplayStats {
    /// Experts needed that were in memory.
    pub hits: u64,
    /// Experts needed that had to be loaded.
    pub misses: u64,
    /// Bytes loaded, on demand and ahead.
    pub bytes_moved: u64,
    /// Visits that waited for a load.
    pub stalls: u64,
}

/// Replays a trace with `slots` experts per layer in memory. With `prefetch`, one expert is loaded ahead of every visit: the one
/// that followed most often on the first expert of the layer's visit before.
pub fn replay(trace: &ExpertTrace, policy: ExpertPolicy, slots: usize, prefetch: bool) -> ReplayStats {
    let mut layers: BTreeMap<usize, Layer> = BTreeMap::new();
    let mut stats = ReplayStats::default();
    for (layer, needed) in &trace.visits {
        let layer = layers.entry(*layer).or_insert_with(|| Layer {
            residency: Residency::new(policy, trace.experts, slots),
            followed: vec![vec![0; trace.experts]; trace.experts],
            before: None,
        });
        if prefetch && layer.predicted().is_some_and(|expert| layer.residency.prefetch(expert).is_some()) {
            stats.bytes_moved += trace.expert_bytes;
        }
        let loads: usize = layer.residency.plan(needed).iter().map(|wave| wave.loads.len()).sum();
        stats.misses += loads as u64;
        stats.hits += (needed.len() - loads) as u64;
        stats.bytes_moved += loads as u64 * trace.expert_bytes;
        stats.stalls += u64::from(loads > 0);
        if let Some(before) = layer.before {
            needed.iter().for_each(|&expert| layer.followed[before][expert] += 1);
        }
        layer.before = needed.first().copied();
    }
    stats
}

struct Layer {
    residency: Residency,
    followed: Vec<Vec<u32>>,
    before: Option<usize>,
}

impl Layer {
    fn predicted(&self) -> Option<usize> {
        let followed = &self.followed[self.before?];
        let most = followed.iter().max().copied().filter(|&count| count > 0)?;
        followed.iter().position(|&count| count == most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> ExpertTrace {
        let visits = (0..400usize).map(|i| (i % 2, vec![i / 2 % 3, 3 + i * i % 5])).collect();
        ExpertTrace { experts: 8, expert_bytes: 10, visits }
    }

    #[test]
    fn text_and_back_is_the_same_trace() {
        assert_eq!(ExpertTrace::parse(&trace().to_text()).unwrap(), trace());
    }

    #[test]
    fn broken_traces_are_refused_with_their_line() {
        for (text, line, word) in [
            ("", 1, "experts N"),
            ("experts x bytes 1", 1, "numbers"),
            ("experts 4 bytes 1\n0 1", 2, "layer"),
            ("experts 4 bytes 1\n0: 1\nx: 1", 3, "layer"),
            ("experts 4 bytes 1\n0: y", 2, "expert"),
            ("experts 4 bytes 1\n0: 4", 2, "outside 0..4"),
        ] {
            let error = ExpertTrace::parse(text).unwrap_err();
            assert!(error.line == line && error.reason.contains(word), "{text:?}: {error}");
        }
    }

    #[test]
    fn every_slot_saves_bytes_and_all_slots_load_each_expert_once() {
        for policy in ExpertPolicy::ALL {
            let moved: Vec<u64> =
                (1..=8).map(|slots| replay(&trace(), policy, slots, false).bytes_moved).collect();
            assert!(
                moved.windows(2).all(|pair| pair[1] <= pair[0]) || policy != ExpertPolicy::Lru,
                "{moved:?}"
            );
            let all = replay(&trace(), policy, 8, false);
            let used: std::collections::BTreeSet<(usize, usize)> = trace()
                .visits
                .iter()
                .flat_map(|(layer, experts)| experts.iter().map(|e| (*layer, *e)))
                .collect();
            assert_eq!(all.misses, used.len() as u64, "{policy}");
            assert_eq!(all.hits + all.misses, 800);
            assert_eq!(all.bytes_moved, all.misses * 10);
        }
        let ahead = replay(&trace(), ExpertPolicy::Lru, 3, true);
        assert!(ahead.bytes_moved >= ahead.misses * 10);
    }
}
