//! Text to token ids and back, as `tokenizer.json` says.

use crate::arch::{DecoderInfo, EncoderInfo};
use crate::error::{ModelError, Result};
use rlx::import::hf::{ConfigReader, HfFolder, OneOrMany};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use tokenizers::{TruncationDirection, TruncationParams};

/// Largest `tokenizer.json` that is read, in bytes.
pub const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// A tokenizer that fits a model's vocabulary.
pub struct TextTokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    vocab: usize,
    lower_case: bool,
    max_tokens: Option<usize>,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, vocab, lower_case, max_tokens, .. } = self;
        write!(
            f,
            "TextTokenizer({}, {vocab} ids, lower case {lower_case}, cut at {max_tokens:?})",
            path.display()
        )
    }
}

impl TextTokenizer {
    /// Opens `tokenizer.json` for a model of `vocab` entries. Truncation and padding that the file may ask for are switched off:
    /// a prompt is never cut silently, and batches are ragged.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] for a file that is missing, too large or broken; [`ModelError::Vocabulary`] if an id of its
    /// vocabulary has no embedding (an *added* token without one is refused when a text contains it).
    pub fn open(path: &Path, vocab: usize) -> Result<Self> {
        Self::from_bytes(path, &read_bounded(path)?, vocab)
    }

    /// As [`TextTokenizer::open`], from the file's content; `path` stands for it in messages.
    ///
    /// # Errors
    /// As [`TextTokenizer::open`].
    pub fn from_bytes(path: &Path, bytes: &[u8], vocab: usize) -> Result<Self> {
        let broken = |reason: String| ModelError::Tokenizer { path: path.to_path_buf(), reason };
        // The tokenizers library panics on some files that parse and make no sense.
        let parsed = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(bytes)));
        let parsed = parsed.map_err(|_| broken("its parts contradict each other".into()))?;
        Self::of(path, parsed.map_err(|error| broken(error.to_string()))?, vocab)
    }

    /// As [`TextTokenizer::open`], from its parts; `path` names what they come from in messages.
    ///
    /// # Errors
    /// [`ModelError::Vocabulary`].
    pub fn of(path: &Path, mut inner: tokenizers::Tokenizer, vocab: usize) -> Result<Self> {
        let broken = |reason: String| ModelError::Tokenizer { path: path.to_path_buf(), reason };
        let highest = inner.get_vocab(false).into_iter().max_by_key(|(_, id)| *id);
        if let Some((token, id)) = highest.filter(|(_, id)| *id as usize >= vocab) {
            return Err(ModelError::Vocabulary { path: path.to_path_buf(), token, id, vocab });
        }
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| broken(error.to_string()))?;
        Ok(Self { inner, path: path.to_path_buf(), vocab, lower_case: false, max_tokens: None })
    }

    /// The tokenizer of a decoder's folder.
    ///
    /// # Errors
    /// As [`TextTokenizer::open`], and for a folder without `tokenizer.json`.
    pub fn for_decoder(folder: &HfFolder, info: &DecoderInfo) -> Result<Self> {
        Self::open(&folder.tokenizer()?, info.vocab)
    }

    /// The tokenizer of an encoder's folder. Texts are cut at `max_seq_length` of sentence-transformers, else at `model_max_length` of
    /// `tokenizer_config.json`, and never past the model's positions.
    ///
    /// # Errors
    /// As [`TextTokenizer::open`] and [`TextTokenizer::for_sentences`], and for broken config files.
    pub fn for_encoder(folder: &HfFolder, info: &EncoderInfo) -> Result<Self> {
        let sentence = folder.sentence_transformer()?;
        let asked = sentence.as_ref().and_then(|s| s.max_seq_length);
        let written = match folder.tokenizer_config()? {
            // Written as 1e30 where there is no limit.
            Some(config) => {
                config.optional::<f64>("model_max_length")?.map(|length| length.max(0.0) as usize)
            }
            None => None,
        };
        let max_tokens = asked.or(written).unwrap_or(usize::MAX).min(info.max_tokens);
        let lower_case = sentence.is_some_and(|s| s.do_lower_case);
        Self::open(&folder.tokenizer()?, info.vocab)?.for_sentences(max_tokens, lower_case)
    }

    /// The same tokenizer for sentences: cut to `max_tokens`, special tokens included and kept; lower-cased first if asked.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if `max_tokens` has no room beside the special tokens.
    pub fn for_sentences(mut self, max_tokens: usize, lower_case: bool) -> Result<Self> {
        let special = self.encode("", true)?.len();
        if max_tokens <= special {
            let reason =
                format!("a length of {max_tokens} tokens has no room for text beside {special} special ones");
            return Err(ModelError::Tokenizer { path: self.path, reason });
        }
        let params = TruncationParams {
            max_length: max_tokens,
            direction: TruncationDirection::Right,
            ..TruncationParams::default()
        };
        let set = self.inner.with_truncation(Some(params)).map(|_| ()).map_err(|error| error.to_string());
        set.map_err(|reason| self.broken(reason))?;
        (self.lower_case, self.max_tokens) = (lower_case, Some(max_tokens));
        Ok(self)
    }

    fn broken(&self, reason: String) -> ModelError {
        ModelError::Tokenizer { path: self.path.clone(), reason }
    }

    /// Ids of a text; `special` adds what the model puts around every text (not wanted after a chat template, which writes its own).
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`], [`ModelError::TokenId`].
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let lower = if self.lower_case { text.to_lowercase() } else { String::new() };
        let text = if self.lower_case { lower.as_str() } else { text };
        let encoding =
            self.inner.encode_fast(text, special).map_err(|error| self.broken(error.to_string()))?;
        let ids = encoding.get_ids().to_vec();
        match ids.iter().find(|&&id| id as usize >= self.vocab) {
            Some(&id) => Err(ModelError::TokenId { id, vocab: self.vocab }),
            None => Ok(ids),
        }
    }

    /// The text of ids; `skip_special` leaves special tokens out.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|error| self.broken(error.to_string()))
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The length at which sentences are cut.
    pub fn max_tokens(&self) -> Option<usize> {
        self.max_tokens
    }

    /// Text piece by piece for tokens that follow `context` (the last tokens of the prompt, or nothing).
    pub fn stream(&self, context: &[u32]) -> Detokenizer<'_> {
        let tail = context.len().saturating_sub(CONTEXT_TOKENS);
        let ids = context[tail..].to_vec();
        Detokenizer { tokenizer: self, printed: ids.len(), ids }
    }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let broken = |reason: String| ModelError::Tokenizer { path: path.to_path_buf(), reason };
    let metadata = std::fs::metadata(path).map_err(|error| broken(error.to_string()))?;
    if metadata.len() > MAX_TOKENIZER_BYTES {
        return Err(broken(format!("{} bytes, expected at most {MAX_TOKENIZER_BYTES}", metadata.len())));
    }
    std::fs::read(path).map_err(|error| broken(error.to_string()))
}

/// Tokens before the first new one that can change how it is written: a word's leading space, a character in several tokens.
const CONTEXT_TOKENS: usize = 8;

/// Turns tokens into text as they come. A piece is given out only when its characters are complete; what was given out never
/// changes.
#[derive(Debug)]
pub struct Detokenizer<'a> {
    tokenizer: &'a TextTokenizer,
    ids: Vec<u32>,
    /// `ids[..printed]` stand for text already given out.
    printed: usize,
}

impl Detokenizer<'_> {
    /// The text that this token completes; empty if it is still in the middle of a character.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let piece = self.new_text()?;
        if piece.is_empty() || piece.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.printed);
        self.printed = self.ids.len();
        Ok(piece)
    }

    /// What is left when no token follows; incomplete characters become U+FFFD.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn finish(mut self) -> Result<String> {
        self.new_text()
    }

    fn new_text(&mut self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.printed], true)?;
        let mut all = self.tokenizer.decode(&self.ids, true)?;
        // A decoder that joins tokens may end the old text differently; what was printed stays.
        let shared = before.char_indices().zip(all.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
        let at = shared.unwrap_or(before.len().min(all.len()));
        Ok(all.split_off(at))
    }
}

/// The tokens that end a text: `eos_token_id` of the config and of the generation config, each an id or a list; ascending.
///
/// # Errors
/// [`ModelError::Import`] for a broken file.
pub fn stop_tokens(folder: &HfFolder) -> Result<Vec<u32>> {
    let config: ConfigReader = folder.config()?;
    let mut ids = config.optional::<OneOrMany<u32>>("eos_token_id")?.map(|ids| ids.0).unwrap_or_default();
    if let Some(generation) = folder.generation_config()? {
        ids.extend(generation.eos_token_ids);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}
