//! Sampling beyond temperature, top-k, top-p and min-p.

use crate::failure::{Failure, Result};
use rlx_models::sampling::{Mirostat, SamplingOptions};

/// Sampling options of rarer use.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Further sampling")]
pub struct Further {
    /// Let the temperature move by up to this with the entropy [default: 0]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    dynatemp_range: Option<f32>,
    /// How fast it moves [default: 1]
    #[arg(long, value_name = "E", allow_negative_numbers = true)]
    dynatemp_exponent: Option<f32>,
    /// Apply the temperature after the filters, as llama.cpp does, instead of before them
    #[arg(long)]
    temperature_last: bool,
    /// Sample from logits at most this many standard deviations below the highest [default: 0, all]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    top_n_sigma: Option<f32>,
    /// Sample from the tokens of typical surprise that sum to this probability [default: 1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    typical: Option<f32>,
    /// How often the top choices but the last are left out [default: 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    xtc_probability: Option<f32>,
    /// Probability of a top choice [default: 0.1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    xtc_threshold: Option<f32>,
    /// Subtract this from a logit for each time its token occurred [default: 0]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Subtract this from a logit if its token occurred [default: 0]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// How many of the last tokens the penalties look at [default: 0, all]
    #[arg(long, value_name = "N")]
    repeat_last_n: Option<usize>,
    /// Penalty of making a repeated sequence longer [default: 0]
    #[arg(long, value_name = "M", allow_negative_numbers = true)]
    dry_multiplier: Option<f32>,
    /// Its growth for each token of the sequence [default: 1.75]
    #[arg(long, value_name = "B", allow_negative_numbers = true)]
    dry_base: Option<f32>,
    /// Length of a sequence from which it is penalised [default: 2]
    #[arg(long, value_name = "N")]
    dry_allowed_length: Option<usize>,
    /// How many of the last tokens are searched for it [default: 0, all]
    #[arg(long, value_name = "N")]
    dry_penalty_last_n: Option<usize>,
    /// Keep the surprise of the text near a target: 1 or 2, the versions of Mirostat [default: 0, off]
    #[arg(long, value_name = "V")]
    mirostat: Option<u8>,
    /// That target in bits [default: 5]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    mirostat_tau: Option<f32>,
    /// How fast an error is corrected [default: 0.1]
    #[arg(long, value_name = "E", allow_negative_numbers = true)]
    mirostat_eta: Option<f32>,
    /// Add to the logit of a token id, as 15043+1.5 or 15043-inf; may be repeated
    #[arg(long, value_name = "ID+BIAS", allow_hyphen_values = true)]
    logit_bias: Vec<String>,
}

impl Further {
    /// True if an option asks for sampling, rather than the likeliest token.
    pub fn samples(&self) -> bool {
        self.dynatemp_range.is_some()
            || self.top_n_sigma.is_some()
            || self.typical.is_some()
            || self.xtc_probability.is_some()
            || self.mirostat.is_some_and(|version| version > 0)
    }

    /// Lays these options over others.
    pub fn apply(&self, options: SamplingOptions) -> Result<SamplingOptions> {
        let (tau, eta) = (self.mirostat_tau.unwrap_or(5.0), self.mirostat_eta.unwrap_or(0.1));
        let mirostat = match self.mirostat {
            None | Some(0) => Mirostat::Off,
            Some(1) => Mirostat::V1 { tau, eta },
            Some(2) => Mirostat::V2 { tau, eta },
            Some(other) => {
                return Err(Failure::usage(format!("no version {other}"), "--mirostat", "choose 0, 1 or 2"));
            }
        };
        let bias = self.logit_bias.iter().map(|text| parse_bias(text)).collect::<Result<Vec<_>>>()?;
        Ok(SamplingOptions {
            dynamic_range: self.dynatemp_range.unwrap_or(options.dynamic_range),
            dynamic_exponent: self.dynatemp_exponent.unwrap_or(options.dynamic_exponent),
            temperature_last: self.temperature_last,
            top_n_sigma: self.top_n_sigma.unwrap_or(options.top_n_sigma),
            typical_p: self.typical.unwrap_or(options.typical_p),
            xtc_probability: self.xtc_probability.unwrap_or(options.xtc_probability),
            xtc_threshold: self.xtc_threshold.unwrap_or(options.xtc_threshold),
            frequency_penalty: self.frequency_penalty.unwrap_or(options.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(options.presence_penalty),
            penalty_window: self.repeat_last_n.unwrap_or(options.penalty_window),
            dry_multiplier: self.dry_multiplier.unwrap_or(options.dry_multiplier),
            dry_base: self.dry_base.unwrap_or(options.dry_base),
            dry_allowed_length: self.dry_allowed_length.unwrap_or(options.dry_allowed_length),
            dry_window: self.dry_penalty_last_n.unwrap_or(options.dry_window),
            mirostat,
            logit_bias: bias,
            ..options
        })
    }
}

fn parse_bias(text: &str) -> Result<(u32, f32)> {
    let at = text.find(['+', '-']).unwrap_or(text.len());
    let (token, bias) = text.split_at(at);
    match (token.parse(), bias.parse()) {
        (Ok(token), Ok(bias)) => Ok((token, bias)),
        _ => {
            let advice = "write a token id and a signed number, as 15043+1.5 or 15043-inf";
            Err(Failure::usage(format!("`{text}` is no bias"), "--logit-bias", advice))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_is_an_id_and_a_signed_number() {
        assert_eq!(parse_bias("7+1.5").unwrap(), (7, 1.5));
        assert_eq!(parse_bias("7-0.5").unwrap(), (7, -0.5));
        assert_eq!(parse_bias("7-inf").unwrap(), (7, f32::NEG_INFINITY));
        for wrong in ["", "7", "x+1", "+1", "7+x"] {
            assert!(parse_bias(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn options_lie_over_the_defaults() {
        let further = Further { mirostat: Some(2), typical: Some(0.9), ..Further::default() };
        let options = further.apply(SamplingOptions::greedy()).unwrap();
        assert_eq!(options.mirostat, Mirostat::V2 { tau: 5.0, eta: 0.1 });
        assert_eq!((options.typical_p, options.dry_base), (0.9, 1.75));
        assert!(Further { mirostat: Some(3), ..Further::default() }.apply(options).is_err());
    }
}
