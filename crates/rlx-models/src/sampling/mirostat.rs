//! Mirostat (Basu et al., 2021): keeps the surprise of the text near a target by feedback.

use super::{Candidate, filters};

/// Whether, and how, the surprise of the text is kept near a target.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Mirostat {
    /// Not at all.
    #[default]
    Off,
    /// As published: the exponent of Zipf's law is estimated from the likeliest tokens, and gives how many are kept.
    V1 {
        /// Wanted surprise in bits.
        tau: f32,
        /// Share of an error that is corrected at each token.
        eta: f32,
    },
    /// Tokens of a higher surprise than a bound are left out.
    V2 {
        /// Wanted surprise in bits.
        tau: f32,
        /// Share of an error that is corrected at each token.
        eta: f32,
    },
}

impl Mirostat {
    /// Target and rate.
    pub(super) fn settings(self) -> (f32, f32) {
        match self {
            Mirostat::Off => (1.0, 1.0),
            Mirostat::V1 { tau, eta } | Mirostat::V2 { tau, eta } => (tau, eta),
        }
    }
}

/// Tokens from which the exponent is estimated.
const ESTIMATED_FROM: usize = 100;

/// The state of the feedback.
#[derive(Debug, Clone)]
pub(super) struct Feedback {
    mirostat: Mirostat,
    /// Highest surprise that is allowed, in bits.
    bound: f64,
}

impl Feedback {
    pub(super) fn new(mirostat: Mirostat) -> Self {
        Feedback { mirostat, bound: 2.0 * f64::from(mirostat.settings().0) }
    }

    /// Leaves out what is too surprising; sorted and normalised after it.
    pub(super) fn truncate(&self, candidates: &mut Vec<Candidate>) {
        filters::normalize(candidates);
        let kept = match self.mirostat {
            Mirostat::Off => candidates.len(),
            Mirostat::V1 { .. } => self.kept_by_zipf(candidates),
            Mirostat::V2 { .. } => {
                candidates.iter().take_while(|c| -libm::log2(c.probability) <= self.bound).count()
            }
        };
        candidates.truncate(kept.max(1));
        filters::normalize(candidates);
    }

    fn kept_by_zipf(&self, candidates: &[Candidate]) -> usize {
        let (mut both, mut squares) = (0.0, 0.0);
        for (i, pair) in candidates.windows(2).take(ESTIMATED_FROM - 1).enumerate() {
            let step = libm::log((i + 2) as f64 / (i + 1) as f64);
            let fall = libm::log(pair[0].probability / pair[1].probability);
            if fall.is_finite() {
                both += step * fall;
                squares += step * step;
            }
        }
        if squares == 0.0 {
            return candidates.len();
        }
        let exponent = both / squares;
        let excess = exponent - 1.0;
        let count = candidates.len() as f64;
        let kept =
            libm::pow(excess * libm::exp2(self.bound) / (1.0 - libm::pow(count, -excess)), 1.0 / exponent);
        if kept.is_finite() { kept.round().clamp(1.0, count) as usize } else { candidates.len() }
    }

    /// Corrects the bound by the surprise of the token that was drawn.
    pub(super) fn learn(&mut self, probability: f64) {
        let (tau, eta) = self.mirostat.settings();
        let error = -libm::log2(probability) - f64::from(tau);
        self.bound -= f64::from(eta) * error;
    }
}
