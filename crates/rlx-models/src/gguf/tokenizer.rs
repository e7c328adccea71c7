//! Tokenizers from metadata: SentencePiece-like BPE (`llama`), byte-level BPE (`gpt2`), WordPiece (`bert`).

use super::config::wrong;
use crate::error::{ModelError, Result};
use crate::tokenizer::TextTokenizer;
use rlx::import::gguf::Metadata;
use std::collections::HashMap;
use tokenizers::decoders;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{
    BertNormalizer, NormalizerWrapper, Prepend, Replace, Sequence as NormalizerSequence,
};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, SplitDelimiterBehavior, Tokenizer};

/// Kind of the token that stands for what has none.
pub(super) const UNKNOWN: i32 = 2;
/// A token that is written by templates and never by users.
pub const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;

/// What stands for a space in SentencePiece vocabularies.
pub(super) const SPACE: char = '\u{2581}';

/// How a text is cut before byte-level BPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreTokenizer {
    /// `tokenizer.ggml.pre`.
    pub name: &'static str,
    /// Pieces; none for GPT-2's own expression.
    pub pattern: Option<&'static str>,
    /// Every digit is a piece of its own, before the rest.
    pub digits: bool,
    /// Text is composed (NFC) first.
    pub nfc: bool,
    /// A whole piece that is a token is taken as it is.
    pub ignore_merges: bool,
    /// A text starts with the beginning token unless the file says otherwise.
    pub add_bos: bool,
}

const fn pre(name: &'static str, pattern: Option<&'static str>) -> PreTokenizer {
    PreTokenizer { name, pattern, digits: false, nfc: false, ignore_merges: false, add_bos: false }
}

const fn digits(name: &'static str) -> PreTokenizer {
    PreTokenizer { digits: true, ..pre(name, None) }
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Every known way to cut, by its names in files.
pub const PRE_TOKENIZERS: &[PreTokenizer] = &[
    pre("gpt-2", None),
    pre("gpt2", None),
    pre("phi-2", None),
    pre("mpt", None),
    pre("olmo", None),
    pre("jina-v2-en", None),
    PreTokenizer { ignore_merges: true, add_bos: true, ..pre("llama-bpe", Some(LLAMA3)) },
    PreTokenizer { ignore_merges: true, add_bos: true, ..pre("llama3", Some(LLAMA3)) },
    PreTokenizer { ignore_merges: true, add_bos: true, ..pre("llama-v3", Some(LLAMA3)) },
    pre("dbrx", Some(LLAMA3)),
    pre("smaug-bpe", Some(LLAMA3)),
    PreTokenizer { nfc: true, ..pre("qwen2", Some(QWEN2)) },
    PreTokenizer { nfc: true, ..pre("deepseek-r1-qwen", Some(QWEN2)) },
    pre("stablelm2", Some(QWEN2)),
    digits("smollm"),
    digits("starcoder"),
    digits("refact"),
    digits("command-r"),
    PreTokenizer { ignore_merges: true, ..pre("tekken", Some(TEKKEN)) },
    pre("gpt-4o", Some(GPT4O)),
];

/// The tokenizer that the metadata describes.
pub(super) fn read(metadata: &Metadata, vocab: usize) -> Result<TextTokenizer> {
    let key = "tokenizer.ggml.model";
    let model = metadata.required(key, "the kind of tokenizer", Metadata::string)?;
    let tokens = metadata.required("tokenizer.ggml.tokens", "an array of strings", Metadata::strings)?;
    let tokenizer = match model {
        "llama" => sentencepiece(metadata, tokens),
        "gpt2" => byte_level(metadata, tokens),
        "bert" => word_piece(metadata, tokens),
        other => Err(wrong(metadata, key, "one of llama, gpt2, bert", format!("`{other}`"))),
    }?;
    TextTokenizer::of(metadata.path(), with_added(metadata, tokens, tokenizer, model == "bert")?, vocab)
}

fn broken(metadata: &Metadata, reason: impl ToString) -> ModelError {
    ModelError::Tokenizer { path: metadata.path().to_path_buf(), reason: reason.to_string() }
}

/// Ids by token; a token that is there twice is the first of its ids.
fn ids(tokens: impl Iterator<Item = String>) -> Vocab {
    let mut ids = Vocab::with_capacity(tokens.size_hint().0);
    for (id, token) in (0u32..).zip(tokens) {
        ids.entry(token).or_insert(id);
    }
    ids
}

fn special_id(metadata: &Metadata, key: &str) -> Result<Option<u32>> {
    let full = format!("tokenizer.ggml.{key}_token_id");
    Ok(metadata.u64(&full)?.and_then(|id| u32::try_from(id).ok()))
}

/// Merges that a vocabulary with scores stands for: every pair of tokens that makes a third, the best third first.
pub(super) fn merges_by_score(tokens: &[String], scores: &[f32]) -> Vec<(String, String)> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().rev().map(|(id, t)| (t.as_str(), id)).collect();
    let mut merges: Vec<(f32, usize, usize, usize, usize, &str, &str)> = Vec::new();
    for (token, score) in tokens.iter().zip(scores) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                let lengths = (left.chars().count(), right.chars().count());
                merges.push((*score, lengths.0, lengths.1, l, r, left, right));
            }
        }
    }
    merges.sort_by(|a, b| {
        let best = b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2));
        best.then(a.3.cmp(&b.3)).then(a.4.cmp(&b.4))
    });
    merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
}

fn sentencepiece(metadata: &Metadata, tokens: &[String]) -> Result<Tokenizer> {
    let scores = metadata.required("tokenizer.ggml.scores", "an array of f32", Metadata::f32s)?;
    let merges = match metadata.strings("tokenizer.ggml.merges")? {
        Some(merges) => pairs(metadata, merges)?,
        None => merges_by_score(tokens, scores),
    };
    let unknown = special_id(metadata, "unknown")?.and_then(|id| tokens.get(id as usize));
    let mut builder = BPE::builder()
        .vocab_and_merges(ids(tokens.iter().cloned()), merges)
        .fuse_unk(true)
        .byte_fallback(true);
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown.clone());
    }
    let mut tokenizer = Tokenizer::new(builder.build().map_err(|error| broken(metadata, error))?);
    let prefixed = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let space = SPACE.to_string();
    let replace = |from: &str, to: &str| Replace::new(from, to).map_err(|error| broken(metadata, error));
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if prefixed {
        steps.push(Prepend::new(space.clone()).into());
    }
    steps.push(replace(" ", &space)?.into());
    let set = tokenizer.with_normalizer(Some(NormalizerSequence::new(steps))).map(|_| ());
    set.map_err(|error| broken(metadata, error))?;
    let mut decode: Vec<DecoderWrapper> = vec![
        replace(&space, " ")?.into(),
        decoders::byte_fallback::ByteFallback::new().into(),
        decoders::fuse::Fuse::new().into(),
    ];
    if prefixed {
        decode.push(decoders::strip::Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(decoders::sequence::Sequence::new(decode)));
    with_ends(metadata, tokens, tokenizer, true)
}

fn pairs(metadata: &Metadata, merges: &[String]) -> Result<Vec<(String, String)>> {
    let pair = |merge: &String| {
        // The first half may itself be a space.
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        at.map(|at| (merge[..at].to_owned(), merge[at + 1..].to_owned()))
    };
    let split = merges.iter().map(|merge| {
        let expected = "two tokens with a space between";
        pair(merge).ok_or_else(|| wrong(metadata, "tokenizer.ggml.merges", expected, format!("`{merge}`")))
    });
    split.collect()
}

fn pre_tokenizer(metadata: &Metadata) -> Result<PreTokenizer> {
    let key = "tokenizer.ggml.pre";
    let expected = || {
        let names: Vec<&str> = PRE_TOKENIZERS.iter().map(|known| known.name).collect();
        format!("one of {}", names.join(", "))
    };
    let name = match metadata.string(key)? {
        Some(name) => name,
        // Files of GPT-2 are older than the key.
        None if metadata.string("general.architecture")? == Some("gpt2") => "gpt-2",
        None => return Err(wrong(metadata, key, &expected(), "nothing".to_owned())),
    };
    let known = PRE_TOKENIZERS.iter().find(|known| known.name == name);
    known.copied().ok_or_else(|| wrong(metadata, key, &expected(), format!("`{name}`")))
}

fn byte_level(metadata: &Metadata, tokens: &[String]) -> Result<Tokenizer> {
    let known = pre_tokenizer(metadata)?;
    let merges = metadata.required("tokenizer.ggml.merges", "an array of strings", Metadata::strings)?;
    let builder = BPE::builder()
        .vocab_and_merges(ids(tokens.iter().cloned()), pairs(metadata, merges)?)
        .ignore_merges(known.ignore_merges);
    let mut tokenizer = Tokenizer::new(builder.build().map_err(|error| broken(metadata, error))?);
    if known.nfc {
        let set = tokenizer.with_normalizer(Some(NFC)).map(|_| ());
        set.map_err(|error| broken(metadata, error))?;
    }
    let prefixed = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(false);
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    if known.digits {
        steps.push(Digits::new(true).into());
    }
    if let Some(pattern) = known.pattern {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        steps.push(split.map_err(|error| broken(metadata, error))?.into());
    }
    steps.push(ByteLevel::new(prefixed, true, known.pattern.is_none()).into());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    with_ends(metadata, tokens, tokenizer, known.add_bos)
}

/// What the token of a WordPiece vocabulary is called in files: a continuation without its mark, a word with one in front.
pub(super) fn phantom(token: &str) -> String {
    match token.strip_prefix("##") {
        _ if token.starts_with('[') && token.ends_with(']') => token.to_owned(),
        Some(rest) => rest.to_owned(),
        None => format!("{SPACE}{token}"),
    }
}

fn unphantom(token: &str) -> String {
    match token.strip_prefix(SPACE) {
        _ if token.starts_with('[') && token.ends_with(']') => token.to_owned(),
        Some(word) => word.to_owned(),
        None => format!("##{token}"),
    }
}

fn word_piece(metadata: &Metadata, tokens: &[String]) -> Result<Tokenizer> {
    let mut words: Vec<String> = tokens.iter().map(|token| unphantom(token)).collect();
    let needed = |key: &str| -> Result<(String, u32)> {
        let full = format!("tokenizer.ggml.{key}_token_id");
        let id = special_id(metadata, key)?;
        let token = id.and_then(|id| Some((tokens.get(id as usize)?.clone(), id)));
        token.ok_or_else(|| wrong(metadata, &full, "an id of the vocabulary", format!("{id:?}")))
    };
    let unknown = needed("unknown")?;
    let cls = needed("cls").or_else(|_| needed("bos"))?;
    let sep = needed("seperator").or_else(|_| needed("eos"))?;
    // Special tokens are written as they are, whatever their spelling.
    for (token, id) in [&unknown, &cls, &sep] {
        words[*id as usize].clone_from(token);
    }
    let model = WordPiece::builder().vocab(ids(words.into_iter())).unk_token(unknown.0);
    let mut tokenizer = Tokenizer::new(model.build().map_err(|error| broken(metadata, error))?);
    let set = tokenizer.with_normalizer(Some(BertNormalizer::default())).map(|_| ());
    set.map_err(|error| broken(metadata, error))?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_decoder(Some(decoders::wordpiece::WordPiece::default()));
    tokenizer.with_post_processor(Some(tokenizers::processors::bert::BertProcessing::new(sep, cls)));
    Ok(tokenizer)
}

/// Beginning and end of a text, as the file asks for them.
fn with_ends(
    metadata: &Metadata,
    tokens: &[String],
    mut tokenizer: Tokenizer,
    add_bos: bool,
) -> Result<Tokenizer> {
    let asked = |key: &str, default: bool| -> Result<bool> {
        Ok(metadata.bool(&format!("tokenizer.ggml.{key}"))?.unwrap_or(default))
    };
    let named = |key: &str| -> Result<Option<(String, u32)>> {
        let id = special_id(metadata, key)?;
        Ok(id.and_then(|id| Some((tokens.get(id as usize)?.clone(), id))))
    };
    let bos = if asked("add_bos_token", add_bos)? { named("bos")? } else { None };
    let eos = if asked("add_eos_token", false)? { named("eos")? } else { None };
    let mut template = vec!["$A".to_owned()];
    if let Some((token, _)) = &bos {
        template.insert(0, token.clone());
    }
    if let Some((token, _)) = &eos {
        template.push(token.clone());
    }
    if template.len() > 1 {
        let special: Vec<(String, u32)> = bos.into_iter().chain(eos).collect();
        let template = TemplateProcessing::builder()
            .try_single(template)
            .map_err(|error| broken(metadata, error))?
            .special_tokens(special)
            .build()
            .map_err(|error| broken(metadata, format!("{error:?}")))?;
        tokenizer.with_post_processor(Some(template));
    }
    Ok(tokenizer)
}

fn with_added(
    metadata: &Metadata,
    tokens: &[String],
    mut tokenizer: Tokenizer,
    word_piece: bool,
) -> Result<Tokenizer> {
    let kinds = metadata.i32s("tokenizer.ggml.token_type")?.unwrap_or_default();
    let mut special = Vec::new();
    let mut plain = Vec::new();
    for (token, kind) in tokens.iter().zip(&kinds) {
        let bracketed = token.starts_with('[') && token.ends_with(']');
        match *kind {
            CONTROL | UNKNOWN if !word_piece || bracketed => {
                special.push(AddedToken::from(token.clone(), true))
            }
            USER_DEFINED => plain.push(AddedToken::from(token.clone(), false).normalized(false)),
            _ => {}
        }
    }
    let added = tokenizer.add_special_tokens(special).and_then(|_| tokenizer.add_tokens(plain));
    added.map_err(|error| broken(metadata, error))?;
    Ok(tokenizer)
}
