//! A tokenizer's vocabulary and merges as tables in a file: opened without building a map, read as texts need them.
//!
//! What the tables hold answers as the models of the `tokenizers` library do, which stays the judge: a table is written only if it
//! gives the library's ids for a sample of texts and of the vocabulary, and holds the same tokens. Normalizer, pre-tokenizer,
//! post-processor and decoder are the library's own.

use rlx::aot::wire::{WireError, WireReader, WireWriter};
use serde_json::Value;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    AddedToken, DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token,
    Tokenizer, TokenizerImpl,
};

/// The tokenizer of a table.
pub(super) type TableTokenizer =
    TokenizerImpl<TokenTable, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

const BPE: u8 = 1;
const WORD_PIECE: u8 = 2;
const NONE: u32 = u32::MAX;

/// How words are cut into tokens.
#[derive(Debug, Clone, PartialEq)]
enum Rules {
    Bpe { unknown: Option<String>, prefix: String, suffix: String, flags: [bool; 3] },
    WordPiece { unknown: String, prefix: String, most_chars: usize },
}

const FUSE_UNKNOWN: usize = 0;
const BYTE_FALLBACK: usize = 1;
const IGNORE_MERGES: usize = 2;

/// Tokens of a vocabulary that are cut by both before a table is used, at least; all of a smaller one.
const COMPARED_TOKENS: usize = 8192;

/// Bytes in memory or in a mapped file.
pub(super) type TableBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Vocabulary and merges over bytes of a file.
#[derive(Clone)]
pub(super) struct TokenTable {
    bytes: TableBytes,
    rules: Rules,
    tokens: usize,
    /// Start and entries of each table.
    spans: [(usize, usize); 4],
}

const SPANS: usize = 0;
const TEXT: usize = 1;
const IDS: usize = 2;
const MERGES: usize = 3;
const ENTRY_BYTES: [usize; 4] = [8, 1, 4, 16];

fn hash(bytes: &[u8]) -> u64 {
    // FNV-1a, then mixed so that the low bits depend on all.
    let hash =
        bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    (hash ^ (hash >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16
}

fn hash_pair(left: u32, right: u32) -> u64 {
    let joined = u64::from(left) << 32 | u64::from(right);
    (joined ^ (joined >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
}

/// Slots of an open table for this many entries: a power of two, at most half full.
fn slots(entries: usize) -> usize {
    (entries * 2).next_power_of_two().max(2)
}

/// The tables of a `tokenizer.json`, and what is left of it; `None` if its model is of another kind.
pub(super) fn write(json: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut rest: Value = serde_json::from_slice(json).ok()?;
    let empty = serde_json::json!({ "type": "WordLevel", "vocab": {}, "unk_token": "" });
    let model = std::mem::replace(rest.get_mut("model")?, empty);
    let vocab: Vec<(&str, u32)> = model
        .get("vocab")?
        .as_object()?
        .iter()
        .map(|(token, id)| Some((token.as_str(), u32::try_from(id.as_u64()?).ok().filter(|&id| id < NONE)?)))
        .collect::<Option<_>>()?;
    let ids: HashMap<&str, u32> = vocab.iter().copied().collect();
    let text = |field: &str| model.get(field).and_then(Value::as_str).map(str::to_owned);
    let flag = |field: &str| model.get(field).and_then(Value::as_bool).unwrap_or(false);
    let mut out = WireWriter::new();
    let mut merges = Vec::new();
    match model.get("type").and_then(Value::as_str)? {
        "BPE" if model.get("dropout").is_none_or(Value::is_null) => {
            let prefix = text("continuing_subword_prefix").unwrap_or_default();
            merges = bpe_merges(model.get("merges")?.as_array()?, &ids, prefix.len())?;
            out.u8(BPE)
                .u8(u8::from(text("unk_token").is_some()))
                .text(&text("unk_token").unwrap_or_default());
            out.text(&prefix).text(&text("end_of_word_suffix").unwrap_or_default());
            for field in ["fuse_unk", "byte_fallback", "ignore_merges"] {
                out.u8(u8::from(flag(field)));
            }
        }
        "WordPiece" => {
            out.u8(WORD_PIECE).text(&text("unk_token")?).text(&text("continuing_subword_prefix")?);
            out.u64(model.get("max_input_chars_per_word")?.as_u64()?);
        }
        _ => return None,
    }
    write_tables(&mut out, &vocab, &merges);
    Some((out.finish(), serde_json::to_vec(&rest).ok()?))
}

/// `left, right, rank, merged` of every merge; a pair given twice counts as its last.
fn bpe_merges(list: &[Value], ids: &HashMap<&str, u32>, prefix: usize) -> Option<Vec<[u32; 4]>> {
    let mut merges: HashMap<(u32, u32), [u32; 4]> = HashMap::with_capacity(list.len());
    for (rank, merge) in list.iter().enumerate() {
        let (left, right) = match merge {
            Value::String(text) => text.split_once(' ')?,
            Value::Array(pair) => (pair.first()?.as_str()?, pair.get(1)?.as_str()?),
            _ => return None,
        };
        let merged = ids.get(format!("{left}{}", right.get(prefix..)?).as_str())?;
        let pair = (*ids.get(left)?, *ids.get(right)?);
        merges.insert(pair, [pair.0, pair.1, u32::try_from(rank).ok()?, *merged]);
    }
    Some(merges.into_values().collect())
}

fn write_tables(out: &mut WireWriter, vocab: &[(&str, u32)], merges: &[[u32; 4]]) {
    let highest = vocab.iter().map(|(_, id)| *id as usize + 1).max().unwrap_or(0);
    let mut spans = vec![[NONE, NONE]; highest];
    let mut text = Vec::new();
    for (token, id) in vocab {
        spans[*id as usize] = [text.len() as u32, token.len() as u32];
        text.extend_from_slice(token.as_bytes());
    }
    let mut table = vec![NONE; slots(vocab.len())];
    for (token, id) in vocab {
        let mut at = hash(token.as_bytes()) as usize & (table.len() - 1);
        while table[at] != NONE {
            at = (at + 1) & (table.len() - 1);
        }
        table[at] = *id;
    }
    let mut pairs = vec![[NONE; 4]; slots(merges.len())];
    for merge in merges {
        let mut at = hash_pair(merge[0], merge[1]) as usize & (pairs.len() - 1);
        while pairs[at][0] != NONE {
            at = (at + 1) & (pairs.len() - 1);
        }
        pairs[at] = *merge;
    }
    out.u64(vocab.len() as u64);
    let words = |words: &mut dyn Iterator<Item = u32>| words.flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
    out.bytes(&words(&mut spans.iter().flatten().copied())).bytes(&text);
    out.bytes(&words(&mut table.iter().copied())).bytes(&words(&mut pairs.iter().flatten().copied()));
}

impl TokenTable {
    /// Reads the header of tables; entries are checked as they are read.
    pub(super) fn open(bytes: TableBytes) -> Result<TokenTable, WireError> {
        let all = (*bytes).as_ref();
        let mut from = WireReader::new(all);
        let rules = match from.u8()? {
            BPE => {
                let known = from.u8()? != 0;
                let unknown = from.text()?.to_owned();
                let (prefix, suffix) = (from.text()?.to_owned(), from.text()?.to_owned());
                let mut flags = [false; 3];
                for flag in &mut flags {
                    *flag = from.u8()? != 0;
                }
                Rules::Bpe { unknown: known.then_some(unknown), prefix, suffix, flags }
            }
            WORD_PIECE => Rules::WordPiece {
                unknown: from.text()?.to_owned(),
                prefix: from.text()?.to_owned(),
                most_chars: from.size()?,
            },
            _ => return Err(from.fault("an unknown kind of tokenizer")),
        };
        let tokens = from.size()?;
        let mut spans = [(0, 0); 4];
        for (span, entry) in spans.iter_mut().zip(ENTRY_BYTES) {
            let table = from.bytes()?;
            let start = table.as_ptr() as usize - all.as_ptr() as usize;
            if !table.len().is_multiple_of(entry) {
                return Err(from.fault("a table ends within an entry"));
            }
            *span = (start, table.len() / entry);
        }
        from.end()?;
        if [IDS, MERGES].iter().any(|&table| !spans[table].1.is_power_of_two()) {
            return Err(from.fault("a hash table's size is no power of two"));
        }
        Ok(TokenTable { bytes, rules, tokens, spans })
    }

    fn all(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// The highest id with its token.
    pub(super) fn highest(&self) -> Option<(u32, String)> {
        let last = self.spans[SPANS].1.checked_sub(1)? as u32;
        Some((last, self.token(last)?.to_owned()))
    }

    fn words<const N: usize>(&self, table: usize, index: usize) -> [u32; N] {
        let (start, entries) = self.spans[table];
        let mut words = [NONE; N];
        if index < entries {
            let at = start + index * N * 4;
            for (word, bytes) in words.iter_mut().zip(self.all()[at..at + N * 4].chunks_exact(4)) {
                *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        }
        words
    }

    fn token(&self, id: u32) -> Option<&str> {
        let [start, len] = self.words(SPANS, id as usize);
        let (text, text_len) = self.spans[TEXT];
        let end = (start as usize).checked_add(len as usize).filter(|&end| len != NONE && end <= text_len)?;
        std::str::from_utf8(&self.all()[text + start as usize..text + end]).ok()
    }

    fn id(&self, token: &str) -> Option<u32> {
        let slots = self.spans[IDS].1;
        let first = hash(token.as_bytes()) as usize;
        for probe in 0..slots {
            let [id] = self.words(IDS, (first + probe) & (slots - 1));
            if id == NONE {
                return None;
            }
            if self.token(id) == Some(token) {
                return Some(id);
            }
        }
        None
    }

    /// Rank and result of a merge.
    fn merge(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        let slots = self.spans[MERGES].1;
        let first = hash_pair(left, right) as usize;
        for probe in 0..slots {
            let [a, b, rank, merged] = self.words(MERGES, (first + probe) & (slots - 1));
            if a == NONE {
                return None;
            }
            if (a, b) == (left, right) {
                return Some((rank, merged));
            }
        }
        None
    }

    fn made(&self, id: u32, offsets: (usize, usize)) -> Token {
        Token::new(id, self.token(id).unwrap_or_default().to_owned(), offsets)
    }

    fn unknown(&self, token: &str) -> tokenizers::Result<u32> {
        self.id(token).ok_or_else(|| format!("the vocabulary lacks its unknown token {token:?}").into())
    }

    /// The pieces a word starts as: ids and lengths in bytes.
    fn pieces(&self, word: &str) -> tokenizers::Result<Vec<(u32, usize)>> {
        let Rules::Bpe { unknown, prefix, suffix, flags } = &self.rules else { return Ok(Vec::new()) };
        let mut pieces = Vec::with_capacity(word.len());
        let mut pending: Option<(u32, usize)> = None;
        let mut spelled = String::new();
        for (at, character) in word.char_indices() {
            let len = character.len_utf8();
            spelled.clear();
            spelled.push_str(if at > 0 { prefix } else { "" });
            spelled.push(character);
            spelled.push_str(if at + len == word.len() { suffix } else { "" });
            if let Some(id) = self.id(&spelled) {
                pieces.extend(pending.take());
                pieces.push((id, len));
                continue;
            }
            if flags[BYTE_FALLBACK] {
                let bytes = spelled.bytes().map(|byte| self.id(&format!("<0x{byte:02X}>")));
                if let Some(bytes) = bytes.collect::<Option<Vec<u32>>>() {
                    pieces.extend(bytes.into_iter().map(|id| (id, 1)));
                    continue;
                }
            }
            let Some(unknown) = unknown else { continue };
            pending = match pending {
                Some((id, before)) if flags[FUSE_UNKNOWN] => Some((id, before + len)),
                before => {
                    pieces.extend(before);
                    Some((self.unknown(unknown)?, len))
                }
            };
        }
        pieces.extend(pending);
        Ok(pieces)
    }

    /// Merges neighbours, the lowest rank first and of equal ranks the leftmost.
    fn merge_all(&self, pieces: &mut Vec<(u32, usize)>) {
        let count = pieces.len();
        let mut next: Vec<usize> = (1..=count).collect();
        let mut before: Vec<usize> = (0..count).map(|at| at.wrapping_sub(1)).collect();
        let mut queue = BinaryHeap::new();
        let offer = |queue: &mut BinaryHeap<_>, pieces: &[(u32, usize)], at: usize, right: usize| {
            if let Some((rank, merged)) = self.merge(pieces[at].0, pieces[right].0) {
                queue.push(Reverse((rank, at, merged)));
            }
        };
        for at in 1..count {
            offer(&mut queue, pieces, at - 1, at);
        }
        while let Some(Reverse((_, at, merged))) = queue.pop() {
            let right = next[at];
            if pieces[at].1 == 0 || right >= count {
                continue;
            }
            // An entry is stale if its pair is no longer there.
            if self.merge(pieces[at].0, pieces[right].0).is_none_or(|(_, now)| now != merged) {
                continue;
            }
            pieces[at] = (merged, pieces[at].1 + pieces[right].1);
            pieces[right].1 = 0;
            next[at] = next[right];
            if let Some(before) = before.get_mut(next[at]) {
                *before = at;
            }
            if before[at] < count {
                offer(&mut queue, pieces, before[at], at);
            }
            if next[at] < count {
                offer(&mut queue, pieces, at, next[at]);
            }
        }
        pieces.retain(|(_, len)| *len > 0);
    }

    fn word_piece(
        &self,
        word: &str,
        unknown: &str,
        prefix: &str,
        most: usize,
    ) -> tokenizers::Result<Vec<Token>> {
        let whole = |id: u32| vec![Token::new(id, unknown.to_owned(), (0, word.len()))];
        if word.chars().count() > most {
            return Ok(whole(self.unknown(unknown)?));
        }
        let mut tokens = Vec::new();
        let mut start = 0;
        let mut spelled = String::new();
        while start < word.len() {
            let ends = word[start..].char_indices().rev().map(|(at, c)| start + at + c.len_utf8());
            let longest = ends.into_iter().find_map(|end| {
                spelled.clear();
                spelled.push_str(if start > 0 { prefix } else { "" });
                spelled.push_str(&word[start..end]);
                Some((self.id(&spelled)?, end))
            });
            let Some((id, end)) = longest else { return Ok(whole(self.unknown(unknown)?)) };
            tokens.push(self.made(id, (start, end)));
            start = end;
        }
        Ok(tokens)
    }
}

impl Model for TokenTable {
    type Trainer = BpeTrainer;

    fn tokenize(&self, word: &str) -> tokenizers::Result<Vec<Token>> {
        match &self.rules {
            Rules::WordPiece { unknown, prefix, most_chars } => {
                self.word_piece(word, unknown, prefix, *most_chars)
            }
            Rules::Bpe { .. } if word.is_empty() => Ok(Vec::new()),
            Rules::Bpe { flags, .. } => {
                if let Some(id) = self.id(word).filter(|_| flags[IGNORE_MERGES]) {
                    return Ok(vec![self.made(id, (0, word.len()))]);
                }
                let mut pieces = self.pieces(word)?;
                self.merge_all(&mut pieces);
                let mut at = 0;
                let token = |(id, len): (u32, usize)| {
                    at += len;
                    self.made(id, (at - len, at))
                };
                Ok(pieces.into_iter().map(token).collect())
            }
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.token(id).map(str::to_owned)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        let ids = 0..self.spans[SPANS].1 as u32;
        ids.filter_map(|id| Some((self.token(id)?.to_owned(), id))).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.tokens
    }

    fn save(&self, _folder: &Path, _prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("tables are written by compiling the model".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

/// A tokenizer over tables, with the other parts as `rest` of the file says.
pub(super) fn assemble(table: TokenTable, rest: &[u8]) -> tokenizers::Result<TableTokenizer> {
    let mut rest: Value = serde_json::from_slice(rest)?;
    let added: Vec<AddedToken> = match rest.get_mut("added_tokens").map(Value::take) {
        None | Some(Value::Null) => Vec::new(),
        Some(list) => serde_json::from_value(list)?,
    };
    rest["added_tokens"] = Value::Array(Vec::new());
    let parts: Tokenizer = serde_json::from_value(rest)?;
    let mut tokenizer = TableTokenizer::new(table);
    tokenizer.with_normalizer(parts.get_normalizer().cloned())?;
    tokenizer.with_pre_tokenizer(parts.get_pre_tokenizer().cloned());
    tokenizer.with_post_processor(parts.get_post_processor().cloned());
    tokenizer.with_decoder(parts.get_decoder().cloned());
    tokenizer.add_tokens(added)?;
    Ok(tokenizer)
}

/// Whether tables give the library's ids: for each of these texts, and for every token of the vocabulary as a text.
pub(super) fn agree(library: &Tokenizer, table: &TableTokenizer, texts: &[&str]) -> bool {
    let same = |text: &str| {
        let ids = |encoding: tokenizers::Result<tokenizers::Encoding>| {
            encoding.map(|encoding| encoding.get_ids().to_vec()).map_err(|error| error.to_string())
        };
        match (ids(library.encode_fast(text, true)), ids(table.encode_fast(text, true))) {
            (Ok(a), Ok(b)) => a == b && library.decode(&a, true).ok() == table.decode(&b, true).ok(),
            (Err(_), Err(_)) => true,
            _ => false,
        }
    };
    let vocab = library.get_vocab(true);
    let every = (vocab.len() / COMPARED_TOKENS).max(1) as u32;
    let compared = vocab.iter().filter(|(_, id)| id.is_multiple_of(every)).map(|(token, _)| token.as_str());
    vocab == table.get_vocab(true) && texts.iter().copied().chain(compared).all(same)
}
