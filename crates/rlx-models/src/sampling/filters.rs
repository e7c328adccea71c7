//! Steps that leave tokens out, and the temperature. Candidates come in any order; each step that needs it sorts them, the
//! likeliest first, and so leaves them.

use super::{Candidate, SamplingOptions};
use std::cmp::Ordering;

fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

fn sort(candidates: &mut [Candidate]) {
    if !candidates.is_sorted_by(|a, b| likelier(a, b) != Ordering::Greater) {
        candidates.sort_unstable_by(likelier);
    }
}

/// Sorts and fills in the probabilities, which sum to one.
pub(super) fn normalize(candidates: &mut [Candidate]) {
    sort(candidates);
    let best = candidates.first().map_or(0.0, |candidate| candidate.logit);
    let mut total = 0.0;
    for candidate in &mut *candidates {
        candidate.probability = libm::exp(candidate.logit - best);
        total += candidate.probability;
    }
    for candidate in candidates {
        candidate.probability /= total;
    }
}

fn entropy(candidates: &[Candidate]) -> f64 {
    candidates.iter().filter(|c| c.probability > 0.0).map(|c| -c.probability * libm::log(c.probability)).sum()
}

/// Divides the logits by the temperature: the one given, or one between `temperature - range` and `temperature + range` by the
/// entropy's share of the highest possible one.
pub(super) fn temper(candidates: &mut [Candidate], options: &SamplingOptions) {
    let mut temperature = f64::from(options.temperature);
    let range = f64::from(options.dynamic_range);
    if range > 0.0 && candidates.len() > 1 {
        normalize(candidates);
        let share = entropy(candidates) / libm::log(candidates.len() as f64);
        let low = (temperature - range).max(0.0);
        let moved = libm::pow(share.clamp(0.0, 1.0), f64::from(options.dynamic_exponent));
        temperature = low + (temperature + range - low) * moved;
    }
    let best = candidates.iter().map(|c| c.logit).fold(f64::NEG_INFINITY, f64::max);
    for candidate in candidates {
        let below = candidate.logit - best;
        candidate.logit = if below == 0.0 { 0.0 } else { below / temperature };
    }
}

pub(super) fn top_n_sigma(candidates: &mut Vec<Candidate>, n: f64) {
    if n == 0.0 || candidates.is_empty() {
        return;
    }
    let count = candidates.len() as f64;
    let mean = candidates.iter().map(|c| c.logit).sum::<f64>() / count;
    let variance = candidates.iter().map(|c| (c.logit - mean) * (c.logit - mean)).sum::<f64>() / count;
    let best = candidates.iter().map(|c| c.logit).fold(f64::NEG_INFINITY, f64::max);
    let least = best - n * variance.sqrt();
    candidates.retain(|c| c.logit >= least);
}

pub(super) fn top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k > 0 && k < candidates.len() {
        candidates.select_nth_unstable_by(k, likelier);
        candidates.truncate(k);
    }
}

pub(super) fn typical(candidates: &mut Vec<Candidate>, wanted: f64) {
    if wanted >= 1.0 {
        return;
    }
    normalize(candidates);
    let expected = entropy(candidates);
    let distance = |c: &Candidate| (-libm::log(c.probability) - expected).abs();
    candidates.sort_by(|a, b| distance(a).total_cmp(&distance(b)));
    let mut sum = 0.0;
    let enough = candidates.iter().position(|c| {
        sum += c.probability;
        sum > wanted
    });
    candidates.truncate(enough.map_or(usize::MAX, |last| last + 1));
    sort(candidates);
}

pub(super) fn top_p(candidates: &mut Vec<Candidate>, wanted: f64) {
    if wanted >= 1.0 {
        return;
    }
    normalize(candidates);
    let mut sum = 0.0;
    let enough = candidates.iter().position(|c| {
        sum += c.probability;
        sum >= wanted
    });
    candidates.truncate(enough.map_or(usize::MAX, |last| last + 1));
}

pub(super) fn min_p(candidates: &mut Vec<Candidate>, share: f64) {
    if share <= 0.0 {
        return;
    }
    normalize(candidates);
    let least = share * candidates.first().map_or(0.0, |best| best.probability);
    let kept = candidates.iter().take_while(|c| c.probability >= least).count();
    candidates.truncate(kept.max(1));
}

/// Leaves out every token of at least this probability but the least likely of them.
pub(super) fn exclude_top_choices(candidates: &mut Vec<Candidate>, threshold: f64) {
    normalize(candidates);
    let top = candidates.iter().take_while(|c| c.probability >= threshold).count();
    candidates.drain(..top.saturating_sub(1));
}
