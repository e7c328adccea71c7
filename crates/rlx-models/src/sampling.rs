//! From logits to a token.
//!
//! Steps, in this order; each is off by its default and works on what the one before left, its probabilities made to sum to one:
//!
//! 1. logit bias;
//! 2. repetition penalty, then frequency and presence penalties;
//! 3. DRY (don't repeat yourself: a penalty for continuing a repeated sequence);
//! 4. temperature 0 ends here with the likeliest token;
//! 5. temperature, plain or dynamic (that of transformers; with [`SamplingOptions::temperature_last`] it is step 12, as in llama.cpp);
//! 6. top-n-sigma;
//! 7. top-k;
//! 8. typical;
//! 9. top-p;
//! 10. min-p;
//! 11. XTC (exclude top choices);
//! 13. draw. Mirostat, if on, stands for steps 6 to 11 and 13, after the temperature.
//!
//! All arithmetic is f64 with `libm`'s functions, and the draws come from a counter-based generator, so that one seed gives one text
//! on every machine whose logits agree. Where values are equal the lowest token id is taken.

mod filters;
mod mirostat;
mod penalties;

use crate::error::{ModelError, Result};
use mirostat::Feedback;
use penalties::History;

pub use mirostat::Mirostat;

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most likely token always.
    pub temperature: f32,
    /// The temperature moves by up to this, down where one token is clear and up where many are possible; 0 is off.
    pub dynamic_range: f32,
    /// How fast it moves: the share of the highest entropy is raised to this power.
    pub dynamic_exponent: f32,
    /// The temperature comes after the filters instead of before them.
    pub temperature_last: bool,
    /// Keep tokens whose logit is at most this many standard deviations below the highest; 0 keeps all.
    pub top_n_sigma: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the tokens whose surprise is nearest to the expected one until they sum to this; 1 keeps all.
    pub typical_p: f32,
    /// Keep the most likely tokens until their probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// How often all but the least likely of the tokens above the threshold are left out; 0 is never.
    pub xtc_probability: f32,
    /// Probability from which a token is a top choice.
    pub xtc_threshold: f32,
    /// Positive logits of tokens that occurred (in the prompt, or since) are divided by this, others multiplied; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit for each time it occurred; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from a token's logit if it occurred; 0 is off.
    pub presence_penalty: f32,
    /// How many of the last tokens the three penalties look at; 0 is all.
    pub penalty_window: usize,
    /// Penalty of a token that would make a repeated sequence longer, at the allowed length; 0 is off.
    pub dry_multiplier: f32,
    /// Factor of that penalty for each further token of the sequence.
    pub dry_base: f32,
    /// Longest sequence that may be repeated without penalty, plus one.
    pub dry_allowed_length: usize,
    /// How many of the last tokens are searched for the sequence; 0 is all.
    pub dry_window: usize,
    /// Tokens that no sequence goes beyond.
    pub dry_breakers: Vec<u32>,
    /// Keeps the surprise of the text near a target.
    pub mirostat: Mirostat,
    /// Added to the logits of these tokens; minus infinity forbids one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random stream.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self::greedy()
    }
}

impl SamplingOptions {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            dynamic_range: 0.0,
            dynamic_exponent: 1.0,
            temperature_last: false,
            top_n_sigma: 0.0,
            top_k: 0,
            typical_p: 1.0,
            top_p: 1.0,
            min_p: 0.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_window: 0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_window: 0,
            dry_breakers: Vec::new(),
            mirostat: Mirostat::Off,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// [`ModelError::Setting`] naming the first that is out of range.
    pub fn check(&self) -> Result<()> {
        let any = |_: f32| true;
        let not_negative = |value: f32| value >= 0.0;
        let above_zero = |value: f32| value > 0.0;
        let share = |value: f32| (0.0..=1.0).contains(&value);
        let part = |value: f32| value > 0.0 && value <= 1.0;
        type Range<'a> = (&'static str, f32, &'a dyn Fn(f32) -> bool, &'static str);
        let (tau, eta) = self.mirostat.settings();
        let checks: [Range<'_>; 17] = [
            ("temperature", self.temperature, &not_negative, "a finite number of at least 0"),
            ("dynamic_range", self.dynamic_range, &not_negative, "a finite number of at least 0"),
            ("dynamic_exponent", self.dynamic_exponent, &above_zero, "a finite number above 0"),
            ("top_n_sigma", self.top_n_sigma, &not_negative, "a finite number of at least 0"),
            ("typical_p", self.typical_p, &part, "a number above 0, up to 1"),
            ("top_p", self.top_p, &part, "a number above 0, up to 1"),
            ("min_p", self.min_p, &share, "a number from 0 to 1"),
            ("xtc_probability", self.xtc_probability, &share, "a number from 0 to 1"),
            ("xtc_threshold", self.xtc_threshold, &share, "a number from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, &above_zero, "a finite number above 0"),
            ("frequency_penalty", self.frequency_penalty, &any, "a finite number"),
            ("presence_penalty", self.presence_penalty, &any, "a finite number"),
            ("dry_multiplier", self.dry_multiplier, &not_negative, "a finite number of at least 0"),
            ("dry_base", self.dry_base, &|base| base >= 1.0, "a finite number of at least 1"),
            ("mirostat_tau", tau, &above_zero, "a finite number above 0"),
            ("mirostat_eta", eta, &above_zero, "a finite number above 0"),
            ("dry_allowed_length", self.dry_allowed_length as f32, &above_zero, "at least 1"),
        ];
        let wrong = checks.into_iter().find(|(_, value, ok, _)| !value.is_finite() || !ok(*value));
        if let Some((setting, value, _, expected)) = wrong {
            return Err(ModelError::Setting { setting, expected, found: value.to_string() });
        }
        match self.logit_bias.iter().find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY) {
            None => Ok(()),
            Some((token, bias)) => {
                let found = format!("{bias} for token {token}");
                Err(ModelError::Setting { setting: "logit_bias", expected: "numbers below infinity", found })
            }
        }
    }

    /// Nothing stands between the logits and the likeliest token.
    fn is_plain(&self) -> bool {
        self.temperature == 0.0 && !self.looks_back() && self.logit_bias.is_empty()
    }

    /// How many of the largest logits are enough to choose as by all of them; `None` where others may count, as with penalties. One
    /// more than top-k keeps shows whether the temperature makes the last of them equal to the next.
    pub fn decisive(&self) -> Option<usize> {
        let sampled = self.temperature > 0.0 && self.mirostat == Mirostat::Off;
        let whole = self.looks_back() || !self.logit_bias.is_empty() || self.top_n_sigma > 0.0;
        let dynamic = self.dynamic_range > 0.0 && !self.temperature_last;
        match self.is_plain() {
            true => Some(1),
            false => (sampled && !whole && !dynamic && self.top_k > 0).then_some(self.top_k + 1),
        }
    }

    fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    fn looks_back(&self) -> bool {
        self.penalizes() || self.dry_multiplier > 0.0
    }
}

/// Chooses tokens one after another.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    draws: u64,
    history: History,
    feedback: Feedback,
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    token: u32,
    logit: f64,
    /// Its share of what is left, where a step asked for it.
    probability: f64,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    ///
    /// # Errors
    /// As [`SamplingOptions::check`].
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.check()?;
        let feedback = Feedback::new(options.mirostat);
        Ok(Self { options, draws: 0, history: History::default(), feedback, candidates: Vec::new() })
    }

    /// As [`SamplingOptions::decisive`].
    pub(crate) fn decisive(&self) -> Option<usize> {
        self.options.decisive()
    }

    /// Notes a token of the prompt or the text, for the penalties.
    pub fn observe(&mut self, token: u32) {
        if self.options.looks_back() {
            self.history.push(token);
        }
    }

    /// Chooses a token by the logits of all tokens.
    ///
    /// # Errors
    /// [`ModelError::Logits`] for a NaN, a plus infinity, or no token that is possible.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let top = largest(logits)?;
        if self.options.is_plain() {
            return first_of(logits, top);
        }
        let finite = logits.iter().enumerate().filter(|(_, v)| v.is_finite());
        let candidate =
            |(i, &v): (usize, &f32)| Candidate { token: i as u32, logit: f64::from(v), probability: 0.0 };
        self.candidates.clear();
        self.candidates.extend(finite.map(candidate));
        self.adjust();
        let best = best_of(&self.candidates).ok_or(IMPOSSIBLE)?;
        if self.options.temperature == 0.0 {
            return Ok(best.token);
        }
        if !self.options.temperature_last || self.options.mirostat != Mirostat::Off {
            filters::temper(&mut self.candidates, &self.options);
        }
        if self.options.mirostat != Mirostat::Off {
            return Ok(self.draw_by_surprise());
        }
        Ok(self.draw_filtered())
    }

    /// As [`Sampler::sample`], by the largest logits and their tokens: [`SamplingOptions::decisive`] of them or more, in descending order,
    /// the lower of equal ones' tokens first. `None`, and nothing is drawn, where only all logits decide: one of them is no number, or
    /// the temperature makes unequal ones equal, or there are zeros of both signs.
    ///
    /// # Errors
    /// [`ModelError::Logits`] where no token is possible.
    pub fn sample_largest(&mut self, logits: &[f32], tokens: &[i32]) -> Result<Option<u32>> {
        let candidate = |(&v, &token): (&f32, &i32)| Candidate {
            token: token as u32,
            logit: f64::from(v),
            probability: 0.0,
        };
        if logits.first().is_none_or(|top| top.is_nan() || *top == f32::INFINITY) {
            return Ok(None);
        }
        let finite = logits.iter().zip(tokens).filter(|(v, _)| v.is_finite());
        self.candidates.clear();
        self.candidates.extend(finite.map(candidate));
        let best = *self.candidates.first().ok_or(IMPOSSIBLE)?;
        if self.options.temperature == 0.0 {
            return Ok(Some(best.token));
        }
        if !self.options.temperature_last {
            filters::temper(&mut self.candidates, &self.options);
        }
        let kept = self.options.top_k;
        if let Some([last, next]) = self.candidates.get(kept - 1..kept + 1)
            && last.logit == next.logit
            && (logits[kept - 1] != logits[kept] || logits[kept] == 0.0)
        {
            return Ok(None);
        }
        self.candidates.truncate(kept);
        Ok(Some(self.draw_filtered()))
    }

    fn draw_filtered(&mut self) -> u32 {
        self.filter();
        if self.options.temperature_last {
            filters::temper(&mut self.candidates, &self.options);
        }
        filters::normalize(&mut self.candidates);
        self.draw()
    }

    /// Bias and penalties.
    fn adjust(&mut self) {
        for (token, bias) in &self.options.logit_bias {
            // In the order of ids, as made.
            if let Ok(at) = self.candidates.binary_search_by_key(token, |candidate| candidate.token) {
                self.candidates[at].logit += f64::from(*bias);
            }
        }
        self.candidates.retain(|candidate| candidate.logit > f64::NEG_INFINITY);
        if self.options.penalizes() {
            self.history.penalize(&mut self.candidates, &self.options);
        }
        if self.options.dry_multiplier > 0.0 {
            self.history.dry(&mut self.candidates, &self.options);
        }
    }

    fn filter(&mut self) {
        let (options, candidates) = (&self.options, &mut self.candidates);
        filters::top_n_sigma(candidates, f64::from(options.top_n_sigma));
        filters::top_k(candidates, options.top_k);
        filters::typical(candidates, f64::from(options.typical_p));
        filters::top_p(candidates, f64::from(options.top_p));
        filters::min_p(candidates, f64::from(options.min_p));
        if options.xtc_probability > 0.0 {
            let chance = uniform(options.seed, self.draws);
            self.draws += 1;
            if chance < f64::from(options.xtc_probability) {
                filters::exclude_top_choices(candidates, f64::from(options.xtc_threshold));
            }
        }
    }

    fn draw_by_surprise(&mut self) -> u32 {
        self.feedback.truncate(&mut self.candidates);
        let token = self.draw();
        let chosen = self.candidates.iter().find(|candidate| candidate.token == token);
        self.feedback.learn(chosen.map_or(1.0, |candidate| candidate.probability));
        token
    }

    /// One of the candidates, sorted and normalised.
    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| c.probability).sum();
        let target = uniform(self.options.seed, self.draws) * total;
        self.draws += 1;
        let mut sum = 0.0;
        let chosen = self.candidates.iter().find(|c| {
            sum += c.probability;
            target < sum
        });
        // Rounding can leave the target at the very end.
        chosen.or(self.candidates.last()).map_or(0, |c| c.token)
    }
}

const IMPOSSIBLE: ModelError = ModelError::Logits { token: 0, found: f32::NEG_INFINITY };

/// Logits looked at together, in as many lanes as the compiler likes.
const TOGETHER: usize = 64;

/// The largest logit; an error names the first that is NaN or plus infinity.
fn largest(logits: &[f32]) -> Result<f32> {
    let mut top = [f32::NEG_INFINITY; TOGETHER];
    let mut sound = [true; TOGETHER];
    let (chunks, rest) = logits.as_chunks::<TOGETHER>();
    for chunk in chunks {
        for ((&value, top), sound) in chunk.iter().zip(&mut top).zip(&mut sound) {
            *top = if value > *top { value } else { *top };
            *sound &= value < f32::INFINITY;
        }
    }
    let all_sound = !sound.contains(&false) && rest.iter().all(|&value| value < f32::INFINITY);
    if !all_sound && let Some(token) = logits.iter().position(|v| v.is_nan() || *v == f32::INFINITY) {
        return Err(ModelError::Logits { token, found: logits[token] });
    }
    Ok(top.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max))
}

/// The first token with the largest logit.
fn first_of(logits: &[f32], top: f32) -> Result<u32> {
    let holds = |chunk: &[f32]| chunk.iter().fold(false, |found, &value| found | (value == top));
    let chunk = logits.chunks(TOGETHER).position(holds).filter(|_| top.is_finite()).ok_or(IMPOSSIBLE)?;
    let first = chunk * TOGETHER;
    let within = logits[first..].iter().position(|&value| value == top).unwrap_or(0);
    Ok((first + within) as u32)
}

fn best_of(candidates: &[Candidate]) -> Option<Candidate> {
    candidates.iter().copied().reduce(|best, c| if c.logit > best.logit { c } else { best })
}

/// Number `index` of the stream of `seed`, uniform in `[0, 1)`, a multiple of 2^-53.
pub fn uniform(seed: u64, index: u64) -> f64 {
    let words = philox([index as u32, (index >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = u64::from(words[1]) << 32 | u64::from(words[0]);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let first = u64::from(counter[0]) * 0xD251_1F53;
        let second = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests;
