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
    assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
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
            assert!(matches!(greedy.sample(&logits), Err(ModelError::Logits { token, .. }) if token == at));
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

/// Draws of `sampler` follow `expected`.
fn follows(sampler: &mut Sampler, logits: &[f32], expected: &[f64]) {
    let kept = expected.iter().filter(|p| **p > 0.0).count();
    let statistic = chi_square(sampler, logits, expected, 20_000);
    // Degrees of freedom 1 to 7: exceeded once in 10,000 seeds.
    let bound = [0.0, 15.2, 18.5, 21.2, 23.6, 25.8, 27.9, 29.9][kept.clamp(1, 8) - 1];
    assert!(statistic <= bound, "{statistic} of at most {bound}");
}

fn normalized(weights: &[f64]) -> Vec<f64> {
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

const BASE: [f64; 8] = [0.02, 0.30, 0.08, 0.25, 0.15, 0.05, 0.11, 0.04];

/// BASE without the tokens that `keep` refuses.
fn only(keep: impl Fn(usize) -> bool) -> Vec<f64> {
    normalized(&BASE.iter().enumerate().map(|(i, &p)| if keep(i) { p } else { 0.0 }).collect::<Vec<_>>())
}

fn entropy(p: &[f64]) -> f64 {
    p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum()
}

#[test]
fn dynamic_temperature_follows_the_entropy() {
    for (range, exponent) in [(0.4, 1.0), (0.9, 2.0)] {
        let share = entropy(&BASE) / (BASE.len() as f64).ln();
        let temperature = 1.0 - range + 2.0 * range * share.powf(exponent);
        let expected = normalized(&BASE.map(|p| p.powf(1.0 / temperature)));
        let mut sampler =
            sampler(|o| (o.dynamic_range, o.dynamic_exponent) = (range as f32, exponent as f32));
        follows(&mut sampler, &logits_of(&BASE), &expected);
    }
}

#[test]
fn top_n_sigma_keeps_what_is_near_the_highest_logit() {
    let logits: Vec<f64> = BASE.iter().map(|p| p.ln()).collect();
    let mean = logits.iter().sum::<f64>() / 8.0;
    let sigma = (logits.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / 8.0).sqrt();
    for n in [0.5, 1.0, 2.0] {
        let least = logits[1] - n * sigma;
        let mut sampler = sampler(|o| o.top_n_sigma = n as f32);
        follows(&mut sampler, &logits_of(&BASE), &only(|i| logits[i] >= least));
    }
}

#[test]
fn typical_keeps_the_nearest_surprises() {
    let expected_surprise = entropy(&BASE);
    let mut order: Vec<usize> = (0..8).collect();
    let far = |i: &usize| (-BASE[*i].ln() - expected_surprise).abs();
    order.sort_by(|a, b| far(a).total_cmp(&far(b)));
    for typical in [0.2, 0.5, 0.8] {
        let (mut kept, mut sum) = (Vec::new(), 0.0);
        for &i in &order {
            kept.push(i);
            sum += BASE[i];
            if sum > typical {
                break;
            }
        }
        let mut sampler = sampler(|o| o.typical_p = typical as f32);
        follows(&mut sampler, &logits_of(&BASE), &only(|i| kept.contains(&i)));
    }
}

#[test]
fn xtc_leaves_out_all_but_the_last_top_choice_as_often_as_asked() {
    // Above 0.1: tokens 1, 3, 4 and 6; 6 is the least likely of them.
    let without = only(|i| ![1, 3, 4].contains(&i));
    for probability in [0.0, 0.3, 1.0] {
        let mix: Vec<f64> =
            (0..8).map(|i| probability * without[i] + (1.0 - probability) * BASE[i]).collect();
        let mut sampler = sampler(|o| (o.xtc_probability, o.xtc_threshold) = (probability as f32, 0.1));
        follows(&mut sampler, &logits_of(&BASE), &mix);
    }
    // A single top choice stays.
    let mut sampler = sampler(|o| (o.xtc_probability, o.xtc_threshold) = (1.0, 0.28));
    follows(&mut sampler, &logits_of(&BASE), &BASE);
}

#[test]
fn temperature_before_or_after_the_filters() {
    // Top-p 0.5 of the flattened distribution keeps more than that of the plain one.
    let flat = normalized(&BASE.map(|p| p.sqrt()));
    let mut order: Vec<usize> = (0..8).collect();
    order.sort_by(|a, b| BASE[*b].total_cmp(&BASE[*a]));
    let nucleus = |p: &[f64]| {
        let mut sum = 0.0;
        let until = order.iter().position(|&i| {
            sum += p[i];
            sum >= 0.5
        });
        order[..=until.unwrap()].to_vec()
    };
    for last in [false, true] {
        let kept = nucleus(if last { &BASE } else { &flat });
        let expected = normalized(
            &flat
                .iter()
                .enumerate()
                .map(|(i, &p)| if kept.contains(&i) { p } else { 0.0 })
                .collect::<Vec<_>>(),
        );
        let mut sampler = sampler(|o| (o.temperature, o.top_p, o.temperature_last) = (2.0, 0.5, last));
        follows(&mut sampler, &logits_of(&BASE), &expected);
    }
}

#[test]
fn frequency_and_presence_penalties_subtract_from_logits() {
    let mut sampler = sampler(|o| (o.frequency_penalty, o.presence_penalty) = (0.5, 0.3));
    for token in [1, 1, 3] {
        sampler.observe(token);
    }
    let mut weights = BASE;
    weights[1] *= (-2.0f64 * 0.5 - 0.3).exp();
    weights[3] *= (-0.5f64 - 0.3).exp();
    follows(&mut sampler, &logits_of(&BASE), &normalized(&weights));
}

#[test]
fn penalties_look_no_further_back_than_their_window() {
    let mut sampler = sampler(|o| (o.presence_penalty, o.penalty_window) = (5.0, 2));
    for token in [1, 3, 4] {
        sampler.observe(token);
    }
    let mut weights = BASE;
    weights[3] *= (-5.0f64).exp();
    weights[4] *= (-5.0f64).exp();
    follows(&mut sampler, &logits_of(&BASE), &normalized(&weights));
}

/// The definition, by comparing every earlier place with the end.
fn dry_penalties(history: &[u32], allowed: usize, multiplier: f64, base: f64, breakers: &[u32]) -> Vec<f64> {
    let mut longest = [0usize; 8];
    for next in 1..history.len() {
        let mut length = 0;
        while length < next
            && history[next - 1 - length] == history[history.len() - 1 - length]
            && !breakers.contains(&history[next - 1 - length])
        {
            length += 1;
        }
        let token = history[next] as usize;
        longest[token] = longest[token].max(length);
    }
    let penalty = |&n: &usize| if n >= allowed { multiplier * base.powi((n - allowed) as i32) } else { 0.0 };
    longest.iter().map(penalty).collect()
}

#[test]
fn dry_penalises_what_would_lengthen_a_repetition() {
    let histories: [&[u32]; 5] = [
        &[1, 2, 3, 4, 1, 2, 3],
        &[1, 1, 1, 1],
        &[5, 6, 7, 5, 6, 0, 5, 6],
        &[1, 2, 3, 7, 4, 1, 2, 3, 7],
        &[3],
    ];
    for history in histories {
        for breakers in [vec![], vec![7], vec![2]] {
            let mut sampler = sampler(|o| {
                (o.dry_multiplier, o.dry_base, o.dry_allowed_length) = (0.8, 1.75, 2);
                o.dry_breakers.clone_from(&breakers);
            });
            history.iter().for_each(|&token| sampler.observe(token));
            let penalties = dry_penalties(history, 2, 0.8, 1.75, &breakers);
            let weights: Vec<f64> =
                BASE.iter().zip(penalties).map(|(p, penalty)| p * (-penalty).exp()).collect();
            follows(&mut sampler, &logits_of(&BASE), &normalized(&weights));
        }
    }
}

#[test]
fn logit_bias_adds_and_forbids() {
    let mut sampler = sampler(|o| o.logit_bias = vec![(0, 2.0), (1, f32::NEG_INFINITY), (99, 1.0)]);
    let mut weights = BASE;
    weights[0] *= 2.0f64.exp();
    weights[1] = 0.0;
    follows(&mut sampler, &logits_of(&BASE), &normalized(&weights));
    let options = SamplingOptions { logit_bias: vec![(2, -10.0)], ..SamplingOptions::greedy() };
    assert_eq!(Sampler::new(options).unwrap().sample(&[0.0, 1.0, 3.0]).unwrap(), 1);
}

#[test]
fn mirostat_2_cuts_at_its_bound_and_moves_it_by_the_error() {
    let logits = logits_of(&BASE);
    let (tau, eta) = (1.5f64, 0.2f64);
    let mut sampler = sampler(|o| o.mirostat = Mirostat::V2 { tau: tau as f32, eta: eta as f32 });
    let mut bound = 2.0 * f64::from(tau as f32);
    for _ in 0..200 {
        let kept = only(|i| i == 1 || -BASE[i].log2() <= bound);
        let token = sampler.sample(&logits).unwrap() as usize;
        assert!(kept[token] > 0.0, "token {token} at a bound of {bound}");
        bound -= f64::from(eta as f32) * (-kept[token].log2() - f64::from(tau as f32));
    }
}

#[test]
fn mirostat_keeps_the_mean_surprise_near_its_target() {
    // 1,000 tokens by Zipf's law, entropy about 7.5 bits.
    let weights: Vec<f64> = (1..=1000).map(|rank| 1.0 / f64::from(rank)).collect();
    let logits = logits_of(&weights);
    let base = normalized(&weights);
    for target in [2.0f32, 4.0] {
        for mirostat in [Mirostat::V1 { tau: target, eta: 0.1 }, Mirostat::V2 { tau: target, eta: 0.1 }] {
            let mut sampler = sampler(|o| o.mirostat = mirostat);
            let tokens: Vec<u32> = (0..3000).map(|_| sampler.sample(&logits).unwrap()).collect();
            // What is observed is the surprise after the cut; the uncut one is higher by the bits that the cut leaves out.
            let mean = tokens[500..].iter().map(|&t| -base[t as usize].log2()).sum::<f64>() / 2500.0;
            assert!(mean > f64::from(target) && mean < f64::from(target) + 2.0, "{mirostat:?}: {mean}");
        }
    }
}

#[test]
fn each_setting_out_of_range_is_named() {
    type Change = fn(&mut SamplingOptions);
    let cases: [(&str, Change); 13] = [
        ("dynamic_range", |o| o.dynamic_range = -1.0),
        ("dynamic_exponent", |o| o.dynamic_exponent = 0.0),
        ("top_n_sigma", |o| o.top_n_sigma = f32::NAN),
        ("typical_p", |o| o.typical_p = 0.0),
        ("xtc_probability", |o| o.xtc_probability = 1.1),
        ("xtc_threshold", |o| o.xtc_threshold = -0.1),
        ("frequency_penalty", |o| o.frequency_penalty = f32::INFINITY),
        ("presence_penalty", |o| o.presence_penalty = f32::NAN),
        ("dry_multiplier", |o| o.dry_multiplier = -1.0),
        ("dry_base", |o| o.dry_base = 0.5),
        ("dry_allowed_length", |o| o.dry_allowed_length = 0),
        ("mirostat_tau", |o| o.mirostat = Mirostat::V2 { tau: 0.0, eta: 0.1 }),
        ("logit_bias", |o| o.logit_bias = vec![(1, f32::NAN)]),
    ];
    for (name, change) in cases {
        let mut options = SamplingOptions::greedy();
        change(&mut options);
        let error = Sampler::new(options).unwrap_err();
        assert!(matches!(error, ModelError::Setting { setting, .. } if setting == name), "{error}");
    }
}

/// The largest of some logits in the order in which a device gives them, and their tokens.
fn largest_of(logits: &[f32], count: usize) -> (Vec<f32>, Vec<i32>) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (logits[a], logits[b]);
        b.is_nan().cmp(&a.is_nan()).then(b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal))
    });
    order.truncate(count);
    (order.iter().map(|&i| logits[i]).collect(), order.iter().map(|&i| i as i32).collect())
}

#[test]
fn the_largest_logits_choose_as_all_do() {
    let sampled = |change: &dyn Fn(&mut SamplingOptions)| {
        let mut options =
            SamplingOptions { temperature: 0.8, top_k: 7, seed: 3, ..SamplingOptions::greedy() };
        change(&mut options);
        options
    };
    let chains = [
        SamplingOptions::greedy(),
        sampled(&|_| {}),
        sampled(&|o| (o.top_p, o.min_p) = (0.9, 0.05)),
        sampled(&|o| (o.typical_p, o.temperature_last, o.dynamic_range) = (0.8, true, 0.5)),
        sampled(&|o| (o.xtc_probability, o.temperature) = (0.5, 1e-3)),
        sampled(&|o| o.top_k = 100),
    ];
    for options in chains {
        let count = options.decisive().unwrap();
        let (mut all, mut few) = (Sampler::new(options.clone()).unwrap(), Sampler::new(options).unwrap());
        let mut left_open = 0;
        for step in 0..300u64 {
            let mut logits: Vec<f32> = (0..50)
                .map(|i| match (uniform(step, i) * 24.0) as i32 - 12 {
                    -12 => f32::NEG_INFINITY,
                    // Zeros of both signs, and many equal ones.
                    0 if i % 2 == 0 => -0.0,
                    level => level as f32 * 0.25,
                })
                .collect();
            if step % 50 == 49 {
                logits[step as usize % 50] = 7.5;
            }
            let expected = all.sample(&logits).unwrap();
            let (values, tokens) = largest_of(&logits, count);
            let found = few.sample_largest(&values, &tokens).unwrap();
            left_open += usize::from(found.is_none());
            let token = found.unwrap_or_else(|| few.sample(&logits).unwrap());
            assert_eq!(token, expected, "step {step} of {count}");
        }
        assert!(left_open < 100, "{left_open} of {count}");
    }
}

#[test]
fn what_the_largest_logits_cannot_tell_is_left_open() {
    let options = SamplingOptions { temperature: 1.0, top_k: 1, ..SamplingOptions::greedy() };
    let mut sampler = Sampler::new(options.clone()).unwrap();
    for logits in [[f32::NAN, 1.0], [f32::INFINITY, 1.0], [0.0, -0.0]] {
        assert_eq!(sampler.sample_largest(&logits, &[4, 2]).unwrap(), None, "{logits:?}");
    }
    // Divided by this temperature, both are minus infinity.
    let cold = SamplingOptions { temperature: f32::MIN_POSITIVE, top_k: 2, ..options.clone() };
    let mut cold = Sampler::new(cold).unwrap();
    assert_eq!(cold.sample_largest(&[1e38, -1e38, -2e38], &[0, 1, 2]).unwrap(), Some(0));
    let none = [f32::NEG_INFINITY; 2];
    assert!(matches!(sampler.sample_largest(&none, &[0, 1]), Err(ModelError::Logits { .. })));
    let needs_all: [&dyn Fn(&mut SamplingOptions); 7] = [
        &|o| o.top_k = 0,
        &|o| o.logit_bias = vec![(1, 0.5)],
        &|o| o.repetition_penalty = 1.1,
        &|o| o.dry_multiplier = 0.8,
        &|o| o.top_n_sigma = 1.0,
        &|o| o.dynamic_range = 0.5,
        &|o| o.mirostat = Mirostat::V2 { tau: 5.0, eta: 0.1 },
    ];
    for change in needs_all {
        let mut options = options.clone();
        change(&mut options);
        assert_eq!(options.decisive(), None, "{options:?}");
    }
}
