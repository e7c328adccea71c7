//! From logits to a token.
//!
//! Steps, in this order (that of transformers): repetition penalty, temperature, top-k, top-p, min-p, draw. All arithmetic is f64 with
//! `libm`'s exponential, and the draw comes from a counter-based generator, so that one seed gives one text on every machine whose
//! logits agree. Where values are equal the lowest token id is taken.

use crate::error::{ModelError, Result};
use std::collections::BTreeSet;

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most likely token always.
    pub temperature: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely tokens until their probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Positive logits of tokens that occurred (in the prompt, or since) are divided by this, others multiplied; 1 is off.
    pub repetition_penalty: f32,
    /// Seed of the random stream.
    pub seed: u64,
}

impl SamplingOptions {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// [`ModelError::Setting`] naming the first that is out of range.
    pub fn check(&self) -> Result<()> {
        let checks: [(&'static str, f32, bool, &'static str); 4] = [
            ("temperature", self.temperature, self.temperature >= 0.0, "a finite number of at least 0"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "a number above 0, up to 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0,
                "a finite number above 0",
            ),
        ];
        match checks.into_iter().find(|(_, value, ok, _)| !ok || !value.is_finite()) {
            None => Ok(()),
            Some((setting, value, _, expected)) => {
                Err(ModelError::Setting { setting, expected, found: value.to_string() })
            }
        }
    }
}

/// Chooses tokens one after another.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    draws: u64,
    seen: BTreeSet<u32>,
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    value: f64,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    ///
    /// # Errors
    /// As [`SamplingOptions::check`].
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.check()?;
        Ok(Self { options, draws: 0, seen: BTreeSet::new(), candidates: Vec::new() })
    }

    /// Notes a token of the prompt or the text, for the repetition penalty.
    pub fn observe(&mut self, token: u32) {
        if self.options.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
    }

    /// Chooses a token by the logits of all tokens.
    ///
    /// # Errors
    /// [`ModelError::Logits`] for a NaN, a plus infinity, or no token that is possible.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let top = largest(logits)?;
        let plain = self.options.temperature == 0.0 && self.options.repetition_penalty == 1.0;
        if plain {
            return first_of(logits, top);
        }
        self.candidates.clear();
        let finite = logits.iter().enumerate().filter(|(_, v)| v.is_finite());
        self.candidates.extend(finite.map(|(i, &v)| Candidate { token: i as u32, value: f64::from(v) }));
        self.penalize();
        let best = best_of(&self.candidates).ok_or(IMPOSSIBLE)?;
        if self.options.temperature == 0.0 {
            return Ok(best.token);
        }
        let temperature = f64::from(self.options.temperature);
        for candidate in &mut self.candidates {
            candidate.value = libm::exp((candidate.value - best.value) / temperature);
        }
        // Likeliest first; the order of sums and of the draw.
        let likelier = |a: &Candidate, b: &Candidate| b.value.total_cmp(&a.value).then(a.token.cmp(&b.token));
        let top_k = self.options.top_k;
        if top_k > 0 && top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(top_k, likelier);
            self.candidates.truncate(top_k);
        }
        self.candidates.sort_unstable_by(likelier);
        let kept = self.kept();
        Ok(self.draw(kept, best.token))
    }

    fn penalize(&mut self) {
        let penalty = f64::from(self.options.repetition_penalty);
        if penalty == 1.0 {
            return;
        }
        for candidate in &mut self.candidates {
            if self.seen.contains(&candidate.token) {
                let value = candidate.value;
                candidate.value = if value > 0.0 { value / penalty } else { value * penalty };
            }
        }
    }

    /// How many of the sorted candidates top-p and min-p keep; at least one.
    fn kept(&self) -> usize {
        let mut kept = self.candidates.len();
        if self.options.top_p < 1.0 {
            let total: f64 = self.candidates[..kept].iter().map(|c| c.value).sum();
            let wanted = f64::from(self.options.top_p) * total;
            let mut sum = 0.0;
            let enough = self.candidates[..kept].iter().position(|c| {
                sum += c.value;
                sum >= wanted
            });
            kept = enough.map_or(kept, |last| last + 1);
        }
        let least = f64::from(self.options.min_p) * self.candidates.first().map_or(0.0, |c| c.value);
        self.candidates[..kept].iter().take_while(|c| c.value >= least).count().max(1)
    }

    fn draw(&mut self, kept: usize, fallback: u32) -> u32 {
        let total: f64 = self.candidates[..kept].iter().map(|c| c.value).sum();
        let target = uniform(self.options.seed, self.draws) * total;
        self.draws += 1;
        let mut sum = 0.0;
        let chosen = self.candidates[..kept].iter().find(|c| {
            sum += c.value;
            target < sum
        });
        // Rounding can leave the target at the very end.
        chosen.or(self.candidates[..kept].last()).map_or(fallback, |c| c.token)
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
    candidates.iter().copied().reduce(|best, c| if c.value > best.value { c } else { best })
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
mod tests {
    use super::*;

    fn sampler(change: impl FnOnce(&mut SamplingOptions)) -> Sampler {
        let mut options = SamplingOptions { temperature: 1.0, ..SamplingOptions::greedy() };
        change(&mut options);
        Sampler::new(options).unwrap()
    }

    fn logits_of(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() as f32).collect()
    }

    /// Pearson's statistic of `draws` draws against the expected probabilities.
    fn chi_square(sampler: &mut Sampler, logits: &[f32], expected: &[f64], draws: usize) -> f64 {
        let mut counts = vec![0usize; expected.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits).unwrap() as usize] += 1;
        }
        counts.iter().zip(expected).fold(0.0, |sum, (&count, &p)| {
            if p == 0.0 {
                assert_eq!(count, 0);
                return sum;
            }
            let mean = p * draws as f64;
            sum + (count as f64 - mean).powi(2) / mean
        })
    }

    #[test]
    fn philox_gives_the_published_vectors() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let expected = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), expected);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut greedy = Sampler::new(SamplingOptions::greedy()).unwrap();
        assert_eq!(greedy.sample(&[0.5, 2.0, -1.0, 2.0]).unwrap(), 1);
        assert_eq!(greedy.sample(&[f32::NEG_INFINITY, -3.0]).unwrap(), 1);
        for n in [1usize, 63, 64, 65, 1000] {
            for at in [0, n / 2, n - 1] {
                let mut logits: Vec<f32> = (0..n).map(|i| -((i * 37 % 101) as f32) - 1.0).collect();
                logits[at..].fill(0.0);
                assert_eq!(greedy.sample(&logits).unwrap(), at as u32, "{n} logits");
                logits[at] = f32::NAN;
                assert!(
                    matches!(greedy.sample(&logits), Err(ModelError::Logits { token, .. }) if token == at)
                );
            }
        }
    }

    #[test]
    fn draws_follow_the_softmax() {
        let expected = [0.1, 0.2, 0.3, 0.15, 0.25];
        // 4 degrees of freedom: 23.5 is exceeded once in 10,000 seeds.
        for seed in 0..5 {
            let mut sampler = sampler(|o| o.seed = seed);
            let statistic = chi_square(&mut sampler, &logits_of(&expected), &expected, 20_000);
            assert!(statistic < 23.5, "seed {seed}: {statistic}");
        }
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        let base: [f64; 4] = [0.1, 0.2, 0.3, 0.4];
        for temperature in [0.5f64, 2.0] {
            let powers: Vec<f64> = base.iter().map(|p| p.powf(1.0 / temperature)).collect();
            let total: f64 = powers.iter().sum();
            let expected: Vec<f64> = powers.iter().map(|p| p / total).collect();
            let mut sampler = sampler(|o| o.temperature = temperature as f32);
            assert!(chi_square(&mut sampler, &logits_of(&base), &expected, 20_000) < 21.1);
        }
    }

    #[test]
    fn filters_keep_what_they_say_and_renormalise() {
        let base = [0.05, 0.35, 0.1, 0.3, 0.2];
        let over = |kept: [f64; 5]| kept.map(|p| p / kept.iter().sum::<f64>());
        type Change = fn(&mut SamplingOptions);
        let cases: [(Change, [f64; 5]); 4] = [
            (|o| o.top_k = 2, over([0.0, 0.35, 0.0, 0.3, 0.0])),
            (|o| o.top_p = 0.7, over([0.0, 0.35, 0.0, 0.3, 0.2])),
            (|o| o.min_p = 0.5, over([0.0, 0.35, 0.0, 0.3, 0.2])),
            // Top-p works on what top-k left: 0.35 / 0.65 is short of 0.6, so both stay.
            (|o| (o.top_k, o.top_p) = (2, 0.6), over([0.0, 0.35, 0.0, 0.3, 0.0])),
        ];
        for (change, expected) in cases {
            let mut sampler = sampler(change);
            assert!(chi_square(&mut sampler, &logits_of(&base), &expected, 20_000) < 21.1);
        }
    }

    #[test]
    fn the_strictest_filters_still_leave_a_token() {
        let mut sampler = sampler(|o| (o.top_k, o.top_p, o.min_p) = (1, 1e-6, 1.0));
        assert_eq!(sampler.sample(&[0.0, 3.0, 1.0]).unwrap(), 1);
    }

    #[test]
    fn repetition_penalty_divides_positive_and_multiplies_negative_logits() {
        let options = SamplingOptions { repetition_penalty: 2.0, ..SamplingOptions::greedy() };
        let mut sampler = Sampler::new(options).unwrap();
        assert_eq!(sampler.sample(&[3.0, 2.0, -1.0]).unwrap(), 0);
        sampler.observe(0);
        assert_eq!(sampler.sample(&[3.0, 2.0, -1.0]).unwrap(), 1);
        sampler.observe(2);
        assert_eq!(sampler.sample(&[-4.0, -1.9, -1.0]).unwrap(), 1);
    }

    #[test]
    fn one_seed_gives_one_stream_and_another_seed_another() {
        let logits = vec![0.0f32; 1000];
        let stream = |seed| {
            let mut sampler = sampler(|o| o.seed = seed);
            (0..32).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(stream(7), stream(7));
        assert_ne!(stream(7), stream(8));
    }

    #[test]
    fn broken_logits_and_settings_are_errors() {
        let mut greedy = Sampler::new(SamplingOptions::greedy()).unwrap();
        assert!(matches!(greedy.sample(&[0.0, f32::NAN]), Err(ModelError::Logits { token: 1, .. })));
        assert!(greedy.sample(&[f32::INFINITY, 0.0]).is_err());
        assert!(greedy.sample(&[f32::NEG_INFINITY; 3]).is_err());
        assert!(greedy.sample(&[]).is_err());
        type Change = fn(&mut SamplingOptions);
        let cases: [(&str, Change); 6] = [
            ("temperature", |o| o.temperature = -0.1),
            ("temperature", |o| o.temperature = f32::INFINITY),
            ("top_p", |o| o.top_p = 0.0),
            ("top_p", |o| o.top_p = f32::NAN),
            ("min_p", |o| o.min_p = 1.5),
            ("repetition_penalty", |o| o.repetition_penalty = 0.0),
        ];
        for (name, change) in cases {
            let mut options = SamplingOptions::greedy();
            change(&mut options);
            let error = Sampler::new(options).unwrap_err();
            assert!(matches!(error, ModelError::Setting { setting, .. } if setting == name), "{error}");
        }
    }
}
