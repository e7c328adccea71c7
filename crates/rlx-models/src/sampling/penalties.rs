//! Penalties for what was said before.

use super::{Candidate, SamplingOptions};
use std::collections::BTreeMap;

/// The tokens so far.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    tokens: Vec<u32>,
    counts: BTreeMap<u32, u32>,
    /// Tokens before this are no longer counted.
    counted_from: usize,
    matches: Vec<usize>,
}

fn last(tokens: &[u32], window: usize) -> &[u32] {
    let from = if window == 0 { 0 } else { tokens.len().saturating_sub(window) };
    &tokens[from..]
}

impl History {
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        *self.counts.entry(token).or_insert(0) += 1;
    }

    fn forget_before(&mut self, window: usize) {
        let from = self.tokens.len() - last(&self.tokens, window).len();
        for token in &self.tokens[self.counted_from..from] {
            if let Some(count) = self.counts.get_mut(token) {
                *count -= 1;
            }
        }
        self.counted_from = from;
        self.counts.retain(|_, count| *count > 0);
    }

    /// Repetition, frequency and presence.
    pub(super) fn penalize(&mut self, candidates: &mut [Candidate], options: &SamplingOptions) {
        self.forget_before(options.penalty_window);
        let repetition = f64::from(options.repetition_penalty);
        let (frequency, presence) =
            (f64::from(options.frequency_penalty), f64::from(options.presence_penalty));
        for (token, count) in &self.counts {
            // In the order of ids, as made.
            let Ok(at) = candidates.binary_search_by_key(token, |candidate| candidate.token) else {
                continue;
            };
            let logit = &mut candidates[at].logit;
            if repetition != 1.0 {
                *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            }
            *logit -= f64::from(*count) * frequency + presence;
        }
    }

    /// DRY (p-e-w, 2024): a token that followed an earlier occurrence of the text's end is penalised by
    /// `multiplier * base^(length - allowed)`, where `length` is that of the longest such end.
    pub(super) fn dry(&mut self, candidates: &mut [Candidate], options: &SamplingOptions) {
        let tokens = last(&self.tokens, options.dry_window);
        let breaker = tokens.iter().rev().position(|token| options.dry_breakers.contains(token));
        let longest = breaker.unwrap_or(tokens.len());
        if longest < options.dry_allowed_length {
            return;
        }
        ends_in_common(tokens, &mut self.matches);
        let mut lengths: BTreeMap<u32, usize> = BTreeMap::new();
        for (back, &length) in self.matches.iter().enumerate().skip(1) {
            let follower = tokens[tokens.len() - back];
            let known = lengths.entry(follower).or_insert(0);
            *known = (*known).max(length.min(longest));
        }
        let (multiplier, base) = (f64::from(options.dry_multiplier), f64::from(options.dry_base));
        for (token, length) in lengths {
            let Some(over) = length.checked_sub(options.dry_allowed_length) else { continue };
            if let Ok(at) = candidates.binary_search_by_key(&token, |candidate| candidate.token) {
                // A power beyond f64 would leave no logit to compare.
                candidates[at].logit -= multiplier * libm::pow(base, over as f64).min(1e30);
            }
        }
    }
}

/// For each number of tokens taken off the end, how long an end the rest shares with the whole (Z-function of the reversed text).
fn ends_in_common(tokens: &[u32], lengths: &mut Vec<usize>) {
    let count = tokens.len();
    let reversed = |i: usize| tokens[count - 1 - i];
    lengths.clear();
    lengths.resize(count, 0);
    let (mut left, mut right) = (0, 0);
    for i in 1..count {
        let mut length = if i < right { lengths[i - left].min(right - i) } else { 0 };
        while i + length < count && reversed(length) == reversed(i + length) {
            length += 1;
        }
        lengths[i] = length;
        if i + length > right {
            (left, right) = (i, i + length);
        }
    }
}
