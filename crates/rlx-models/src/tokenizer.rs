//! Text to token ids and back, as `tokenizer.json` says.

mod prebuilt;
mod spelling;

use crate::arch::{DecoderInfo, EncoderInfo};
use crate::error::{ModelError, Result};
use rlx::import::hf::{ConfigReader, HfFolder, OneOrMany};
use rlx_tensor::storage::mapped::MappedRange;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::{Tokenizer, TruncationDirection, TruncationParams};

/// Largest `tokenizer.json` that is read, in bytes.
pub const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// A tokenizer that fits a model's vocabulary.
pub struct TextTokenizer {
    inner: Inner,
    path: PathBuf,
    vocab: usize,
    lower_case: bool,
    max_tokens: Option<usize>,
    /// What a tokenizer of tables was opened from.
    tables: Option<(MappedRange, Vec<u8>)>,
}

/// The library's tokenizer, or one whose model is a table in a file.
enum Inner {
    Library(Box<Tokenizer>),
    Table(Box<prebuilt::TableTokenizer>),
}

struct Mapped(MappedRange);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// Calls the same method on either.
macro_rules! either {
    ($inner:expr, $tokenizer:ident => $call:expr) => {
        match $inner {
            Inner::Library($tokenizer) => $call,
            Inner::Table($tokenizer) => $call,
        }
    };
}

/// A tokenizer as an artefact holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTokenizer {
    /// Tables of vocabulary and merges; empty if the model has none that are read in place.
    pub tables: Vec<u8>,
    /// The rest of `tokenizer.json`, or all of it where there are no tables.
    pub rest: Vec<u8>,
}

impl StoredTokenizer {
    /// The stored form of a `tokenizer.json`. Tables are used only if they give the library's ids for samples and the tokens of the
    /// vocabulary, of a large one 8,192 or more.
    ///
    /// # Errors
    /// As [`TextTokenizer::from_bytes`].
    pub fn new(path: &Path, json: &[u8], vocab: usize) -> Result<Self> {
        TextTokenizer::from_bytes(path, json, vocab)?.stored_from(json)
    }
}

impl TextTokenizer {
    /// The stored form of this tokenizer, which `json` says.
    fn stored_from(&self, json: &[u8]) -> Result<StoredTokenizer> {
        let whole = StoredTokenizer { tables: Vec::new(), rest: json.to_vec() };
        let (Some((tables, rest)), Inner::Library(judge)) = (prebuilt::write(json), &self.inner) else {
            return Ok(whole);
        };
        let broken = |error: &dyn std::fmt::Display| self.broken(error.to_string());
        let sample = String::from_utf8_lossy(&json[..json.len().min(1 << 16)]);
        let texts: Vec<&str> = sample.split_inclusive('\n').chain(SAMPLES.iter().copied()).collect();
        let table = prebuilt::TokenTable::open(Arc::new(tables.clone()));
        let table = table.map_err(|error| broken(&error))?;
        let agrees =
            prebuilt::assemble(table, &rest).is_ok_and(|table| prebuilt::agree(judge, &table, &texts));
        Ok(if agrees { StoredTokenizer { tables, rest } } else { whole })
    }
}

/// Texts that tables must cut as the library does: scripts, spaces, digits, joined characters, controls.
const SAMPLES: &[&str] = &[
    "",
    " ",
    "Hello, World! It's 1234567 o'clock\t\r\n\n  in  the   morning.",
    "naïve café Ångström ﬁnancial ½ ² № ™",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم",
    "你好，世界。こんにちは世界。안녕하세요 세계. नमस्ते दुनिया สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 🇩🇪 e\u{301} \u{200d}\u{fe0f}\u{0}\u{1b}\u{85}\u{a0}\u{3000}",
    "fn main() { println!(\"{:>8.3}\", 1e-9); } // 0x7F <s> </s> <unk> [CLS] [MASK] <|endoftext|> ▁▁ ##ing Ġ",
];

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
        let parsed = catch_unwind(AssertUnwindSafe(|| Tokenizer::from_bytes(bytes)));
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
        let (inner, path) = (Inner::Library(Box::new(inner)), path.to_path_buf());
        Ok(Self { inner, path, vocab, lower_case: false, max_tokens: None, tables: None })
    }

    /// A tokenizer as [`StoredTokenizer`] holds it; nothing is built in proportion to the vocabulary where there are tables.
    ///
    /// # Errors
    /// As [`TextTokenizer::from_bytes`].
    pub fn from_stored(path: &Path, tables: MappedRange, rest: &[u8], vocab: usize) -> Result<Self> {
        if tables.is_empty() {
            return Self::from_bytes(path, rest, vocab);
        }
        let broken = |reason: String| ModelError::Tokenizer { path: path.to_path_buf(), reason };
        let kept = Some((tables.clone(), rest.to_vec()));
        let table = prebuilt::TokenTable::open(Arc::new(Mapped(tables)))
            .map_err(|error| broken(error.to_string()))?;
        if let Some((id, token)) = table.highest().filter(|(id, _)| *id as usize >= vocab) {
            return Err(ModelError::Vocabulary { path: path.to_path_buf(), token, id, vocab });
        }
        let assembled = catch_unwind(AssertUnwindSafe(|| prebuilt::assemble(table, rest)));
        let assembled = assembled.map_err(|_| broken("its parts contradict each other".into()))?;
        let inner = Inner::Table(Box::new(assembled.map_err(|error| broken(error.to_string()))?));
        let path = path.to_path_buf();
        Ok(Self { inner, path, vocab, lower_case: false, max_tokens: None, tables: kept })
    }

    /// The tokenizer as a `tokenizer.json`; `None` of one that is read in place from tables.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the library cannot write it.
    pub fn to_json(&self) -> Result<Option<Vec<u8>>> {
        match &self.inner {
            Inner::Library(library) => {
                let json = library.to_string(false).map_err(|error| self.broken(error.to_string()))?;
                Ok(Some(json.into_bytes()))
            }
            Inner::Table(_) => Ok(None),
        }
    }

    /// The tokenizer as an artefact holds it.
    ///
    /// # Errors
    /// As [`TextTokenizer::to_json`] and [`StoredTokenizer::new`].
    pub fn stored(&self) -> Result<StoredTokenizer> {
        match (&self.tables, self.to_json()?) {
            // What cuts texts is no part of the stored form.
            (_, Some(json)) if self.max_tokens.is_none() => self.stored_from(&json),
            (_, Some(json)) => StoredTokenizer::new(&self.path, &json, self.vocab),
            (Some((tables, rest)), None) => {
                Ok(StoredTokenizer { tables: tables.bytes().to_vec(), rest: rest.clone() })
            }
            (None, None) => Err(self.broken("its tables are not there any more".to_owned())),
        }
    }

    /// Whether sentences are lower-cased first.
    pub fn lower_case(&self) -> bool {
        self.lower_case
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
        let set = either!(&mut self.inner, t => t.with_truncation(Some(params)).map(|_| ()));
        let set = set.map_err(|error| error.to_string());
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
        let encoding = either!(&self.inner, t => t.encode_fast(text, special))
            .map_err(|error| self.broken(error.to_string()))?;
        let ids = encoding.get_ids().to_vec();
        match ids.iter().find(|&&id| id as usize >= self.vocab) {
            Some(&id) => Err(ModelError::TokenId { id, vocab: self.vocab }),
            None => Ok(ids),
        }
    }

    /// Ids of each text, in order, on up to `threads` threads.
    ///
    /// # Errors
    /// As [`TextTokenizer::encode`], of the first text that fails.
    pub fn encode_all(
        &self,
        texts: &[impl AsRef<str>],
        special: bool,
        threads: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        let encode =
            |part: &[&str]| part.iter().map(|text| self.encode(text, special)).collect::<Result<Vec<_>>>();
        let bytes: usize = texts.iter().map(|text| text.len()).sum();
        if threads < 2 || bytes < LEAST_SHARED_BYTES {
            return encode(&texts);
        }
        let shares = split_by_bytes(&texts, bytes.div_ceil(threads));
        let parts = std::thread::scope(|scope| {
            let encode = &encode;
            let workers: Vec<_> = shares.iter().map(|part| scope.spawn(move || encode(part))).collect();
            let joined = workers.into_iter().map(|worker| worker.join());
            joined.map(|part| part.unwrap_or_else(|panic| resume_unwind(panic))).collect::<Result<Vec<_>>>()
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    /// The text of ids; `skip_special` leaves special tokens out.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        either!(&self.inner, t => t.decode(ids, skip_special)).map_err(|error| self.broken(error.to_string()))
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        either!(&self.inner, t => t.token_to_id(token))
    }

    /// A token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        either!(&self.inner, t => t.id_to_token(id))
    }

    /// The bytes that each of `vocab` ids stands for within a text; empty for one that stands for none, such as a control token. `None` if
    /// that is not known: of tokens that are neither byte-level nor SentencePiece pieces.
    pub fn token_bytes(&self, vocab: usize) -> Option<Vec<Vec<u8>>> {
        let spelling = either!(&self.inner, t => t.get_decoder().and_then(spelling::of))?;
        let added = either!(&self.inner, t => t.get_added_tokens_decoder());
        let bytes = |id: u32| match added.get(&id) {
            Some(token) if token.special => Vec::new(),
            Some(token) => token.content.clone().into_bytes(),
            None => self.token(id).map_or_else(Vec::new, |piece| spelling.bytes(&piece)),
        };
        Some((0..u32::try_from(vocab).ok()?).map(bytes).collect())
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

/// Bytes of text below which starting threads costs more than it saves.
const LEAST_SHARED_BYTES: usize = 4096;

/// Texts in runs of about `share` bytes each.
fn split_by_bytes<'t, 'a>(texts: &'t [&'a str], share: usize) -> Vec<&'t [&'a str]> {
    let (mut parts, mut rest) = (Vec::new(), texts);
    while !rest.is_empty() {
        let mut bytes = 0;
        let within = rest.iter().take_while(|text| {
            let room = bytes < share;
            bytes += text.len();
            room
        });
        let (part, after) = rest.split_at(within.count());
        parts.push(part);
        rest = after;
    }
    parts
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
