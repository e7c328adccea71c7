//! `generation_config.json`.

use super::super::ImportError;
use super::config::{ConfigReader, OneOrMany};

/// How the model's authors want text to be generated.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct GenerationConfig {
    /// Put before every prompt.
    pub bos_token_id: Option<u32>,
    /// Any of these ends the text.
    pub eos_token_ids: Vec<u32>,
    /// Fills short sequences of a batch.
    pub pad_token_id: Option<u32>,
    /// Sample, or take the most likely token.
    pub do_sample: bool,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Keep this many most likely tokens; 0 = all.
    pub top_k: Option<usize>,
    /// Keep the most likely tokens up to this probability.
    pub top_p: Option<f32>,
    /// Keep tokens of at least this part of the best one's probability.
    pub min_p: Option<f32>,
    /// Divides (or multiplies, when negative) logits of tokens that occurred; 1 = off.
    pub repetition_penalty: Option<f32>,
    /// Longest text, prompt included.
    pub max_length: Option<usize>,
    /// Longest continuation.
    pub max_new_tokens: Option<usize>,
}

/// Of no influence on which tokens come out.
const IRRELEVANT: &[&str] = &[
    "_from_model_config",
    "transformers_version",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "chat_format",
    "max_window_size",
    "max_matching_ngram_size",
    "trust_remote_code",
    "disable_compile",
    "compile_config",
    "max_context_size",
];

impl GenerationConfig {
    /// Reads every field that changes the result; a setting that is not supported is an error, unless it has the value
    /// that switches it off.
    ///
    /// # Errors
    /// [`ImportError::Field`], [`ImportError::UnreadFields`].
    pub fn read(cfg: &ConfigReader) -> Result<Self, ImportError> {
        cfg.ignore(IRRELEVANT);
        for off in ["num_beams", "num_beam_groups", "num_return_sequences"] {
            cfg.must_be(off, 1u32)?;
        }
        for off in ["no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"] {
            cfg.must_be(off, 0u32)?;
        }
        for off in ["typical_p", "encoder_repetition_penalty", "length_penalty"] {
            cfg.must_be(off, 1.0f64)?;
        }
        for off in ["epsilon_cutoff", "eta_cutoff", "diversity_penalty"] {
            cfg.must_be(off, 0.0f64)?;
        }
        for off in ["early_stopping", "renormalize_logits", "remove_invalid_values", "low_memory"] {
            cfg.must_be(off, false)?;
        }
        let config = GenerationConfig {
            // A list means the first: later ones are for other languages.
            bos_token_id: cfg
                .optional::<OneOrMany<u32>>("bos_token_id")?
                .and_then(|ids| ids.0.first().copied()),
            eos_token_ids: cfg
                .optional::<OneOrMany<u32>>("eos_token_id")?
                .map(|ids| ids.0)
                .unwrap_or_default(),
            pad_token_id: cfg
                .optional::<OneOrMany<i64>>("pad_token_id")?
                .and_then(|ids| ids.0.first().and_then(|&id| u32::try_from(id).ok())),
            do_sample: cfg.or("do_sample", false)?,
            temperature: cfg.optional_in("temperature", 0.0..=f32::MAX)?,
            top_k: cfg.optional("top_k")?,
            top_p: cfg.optional_in("top_p", 0.0..=1.0)?,
            min_p: cfg.optional_in("min_p", 0.0..=1.0)?,
            repetition_penalty: cfg.optional_in("repetition_penalty", f32::MIN_POSITIVE..=f32::MAX)?,
            max_length: cfg.optional("max_length")?,
            max_new_tokens: cfg.optional("max_new_tokens")?,
        };
        cfg.finish()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<GenerationConfig, ImportError> {
        GenerationConfig::read(&ConfigReader::from_bytes("generation_config.json", text.as_bytes()).unwrap())
    }

    #[test]
    fn both_spellings_of_the_end_token_are_read() {
        let one = read(r#"{"eos_token_id": 2, "transformers_version": "4"}"#).unwrap();
        assert_eq!((one.eos_token_ids, one.do_sample), (vec![2], false));
        let many =
            read(r#"{"eos_token_id": [2, 7], "do_sample": true, "temperature": 0.6, "top_k": 20}"#).unwrap();
        assert_eq!((many.eos_token_ids, many.temperature, many.top_k), (vec![2, 7], Some(0.6), Some(20)));
    }

    #[test]
    fn settings_that_change_the_text_and_are_not_supported_are_named() {
        assert!(read(r#"{"num_beams": 1, "length_penalty": 1.0}"#).is_ok());
        assert!(read(r#"{"num_beams": 4}"#).unwrap_err().to_string().contains("`num_beams`"));
        assert!(
            read(r#"{"suppress_tokens": [1]}"#).unwrap_err().to_string().contains("`suppress_tokens` = [1]")
        );
        assert!(read(r#"{"top_p": 1.5}"#).unwrap_err().to_string().contains("`top_p`"));
        assert!(read(r#"{"eos_token_id": -1}"#).is_err());
    }
}
