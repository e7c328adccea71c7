//! Metadata of the tokenizer: the way back of `gguf/tokenizer.rs`.

use super::super::tokenizer::{CONTROL, PRE_TOKENIZERS, SPACE, USER_DEFINED, phantom};
use super::keys::no_place;
use crate::error::{ModelError, Result};
use crate::tokenizer::{TextTokenizer, stop_tokens};
use rlx::import::gguf::{Array, Metadata, Value};
use rlx::import::hf::HfFolder;
use serde_json::Value as Json;
use std::collections::HashMap;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
}

pub(super) fn add(folder: &HfFolder, vocab: usize, metadata: &mut Metadata) -> Result<()> {
    let path = folder.root().join("tokenizer.json");
    let bytes = match folder.content("tokenizer.json") {
        Some(bytes) => bytes.to_vec(),
        None => std::fs::read(folder.tokenizer()?)
            .map_err(|source| rlx::import::ImportError::Io { path: path.clone(), source })?,
    };
    let broken = |reason: String| ModelError::Tokenizer { path: path.clone(), reason };
    let json: Json = serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
    let tokenizer = TextTokenizer::from_bytes(&path, &bytes, vocab)?;
    let model = &json["model"];
    let byte_fallback = model["byte_fallback"].as_bool().unwrap_or(false);
    let mut tokens = tokens(&json, vocab);
    match model["type"].as_str().unwrap_or("BPE") {
        "BPE" if byte_fallback => sentencepiece(&json, &mut tokens, metadata),
        "BPE" => byte_level(folder, &json, metadata)?,
        "WordPiece" => word_piece(folder, &json, &mut tokens, metadata)?,
        other => return Err(no_place(folder, "tokenizer.json: model.type", format!("`{other}`"))),
    }
    let mut put = |key: &str, value: Value| metadata.insert(&format!("tokenizer.ggml.{key}"), value);
    put("tokens", Value::Array(Array::String(tokens.texts)));
    put("token_type", Value::Array(Array::I32(tokens.kinds)));
    let ends = tokenizer.encode("", true)?;
    let named = special_ids(folder, &tokenizer)?;
    let id = |name: &str| named.iter().find(|(known, _)| *known == name).map(|(_, id)| *id);
    for (name, id) in &named {
        put(&format!("{name}_token_id"), Value::U32(*id));
    }
    // The model's own answer, whatever the files call it.
    put("add_bos_token", Value::Bool(id("bos").is_some() && ends.first().copied() == id("bos")));
    put(
        "add_eos_token",
        Value::Bool(id("eos").is_some() && ends.len() > 1 && ends.last().copied() == id("eos")),
    );
    if let Some(template) = chat_template(folder)? {
        metadata.insert("tokenizer.chat_template", Value::String(template));
    }
    Ok(())
}

fn tokens(json: &Json, vocab: usize) -> Tokens {
    let mut texts: Vec<String> = (0..vocab).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; vocab];
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        if let Some(at) = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|&id| id < vocab) {
            (texts[at], kinds[at]) = (token.clone(), NORMAL);
        }
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let (id, content) = (added["id"].as_u64().unwrap_or(u64::MAX), added["content"].as_str());
        let at = usize::try_from(id).ok().filter(|&id| id < vocab);
        if let (Some(at), Some(content)) = (at, content) {
            let special = added["special"].as_bool().unwrap_or(false);
            (texts[at], kinds[at]) = (content.to_owned(), if special { CONTROL } else { USER_DEFINED });
        }
    }
    Tokens { texts, kinds }
}

fn merges(json: &Json) -> Vec<String> {
    let merges = json["model"]["merges"].as_array().into_iter().flatten();
    merges
        .filter_map(|merge| match merge {
            Json::String(text) => Some(text.clone()),
            Json::Array(pair) => Some(format!("{} {}", pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
            _ => None,
        })
        .collect()
}

fn contains(value: &Json, kind: &str) -> bool {
    match value {
        Json::Object(fields) => {
            fields.get("type").and_then(Json::as_str) == Some(kind)
                || fields.values().any(|v| contains(v, kind))
        }
        Json::Array(items) => items.iter().any(|item| contains(item, kind)),
        _ => false,
    }
}

fn sentencepiece(json: &Json, tokens: &mut Tokens, metadata: &mut Metadata) {
    let merges = merges(json);
    let mut scores = vec![0.0f32; tokens.texts.len()];
    let ids: HashMap<&str, usize> = tokens.texts.iter().enumerate().map(|(id, t)| (t.as_str(), id)).collect();
    for (rank, merge) in merges.iter().enumerate() {
        if let Some(&id) = ids.get(merge.replacen(' ', "", 1).as_str()).filter(|&&id| scores[id] == 0.0) {
            scores[id] = -(rank as f32) - 1.0;
        }
    }
    drop(ids);
    let unknown = json["model"]["unk_token"].as_str().unwrap_or("<unk>");
    for (text, kind) in tokens.texts.iter().zip(&mut tokens.kinds) {
        if text == unknown {
            *kind = UNKNOWN;
        } else if text.len() == 6 && text.starts_with("<0x") && text.ends_with('>') {
            *kind = BYTE;
        }
    }
    let prefixed = contains(&json["normalizer"], "Prepend") || contains(&json["pre_tokenizer"], "Metaspace");
    for (key, value) in [
        ("model", Value::String("llama".to_owned())),
        ("pre", Value::String("default".to_owned())),
        ("scores", Value::Array(Array::F32(scores))),
        ("merges", Value::Array(Array::String(merges))),
        ("add_space_prefix", Value::Bool(prefixed)),
    ] {
        metadata.insert(&format!("tokenizer.ggml.{key}"), value);
    }
}

fn pattern(value: &Json) -> Option<&str> {
    match value {
        Json::Object(fields) => {
            let own = fields.get("pattern").and_then(|pattern| pattern["Regex"].as_str());
            own.or_else(|| fields.values().find_map(pattern))
        }
        Json::Array(items) => items.iter().find_map(pattern),
        _ => None,
    }
}

fn byte_level(folder: &HfFolder, json: &Json, metadata: &mut Metadata) -> Result<()> {
    let cut = &json["pre_tokenizer"];
    let (found, digits) = (pattern(cut), contains(cut, "Digits"));
    let nfc = contains(&json["normalizer"], "NFC");
    let ends_in_bytes = contains(cut, "ByteLevel");
    let known = PRE_TOKENIZERS
        .iter()
        .find(|known| known.pattern == found && known.digits == digits && known.nfc == nfc && ends_in_bytes);
    let Some(known) = known else {
        return Err(no_place(folder, "tokenizer.json: pre_tokenizer", cut.to_string()));
    };
    let prefixed = json["pre_tokenizer"]["add_prefix_space"].as_bool().unwrap_or(false);
    for (key, value) in [
        ("model", Value::String("gpt2".to_owned())),
        ("pre", Value::String(known.name.to_owned())),
        ("merges", Value::Array(Array::String(merges(json)))),
        ("add_space_prefix", Value::Bool(prefixed)),
    ] {
        metadata.insert(&format!("tokenizer.ggml.{key}"), value);
    }
    Ok(())
}

fn word_piece(folder: &HfFolder, json: &Json, tokens: &mut Tokens, metadata: &mut Metadata) -> Result<()> {
    let normalizer = &json["normalizer"];
    if normalizer["lowercase"] != Json::Bool(true) {
        // Readers of the format always lower-case such vocabularies.
        return Err(no_place(
            folder,
            "tokenizer.json: normalizer.lowercase",
            "a cased vocabulary".to_owned(),
        ));
    }
    for text in &mut tokens.texts {
        debug_assert!(!text.starts_with(SPACE));
        *text = phantom(text);
    }
    metadata.insert("tokenizer.ggml.model", Value::String("bert".to_owned()));
    metadata.insert("tokenizer.ggml.pre", Value::String("jina-v2-en".to_owned()));
    metadata.insert("tokenizer.ggml.token_type_count", Value::U32(2));
    Ok(())
}

/// (name in keys, id) of the special tokens that the folder names.
fn special_ids(folder: &HfFolder, tokenizer: &TextTokenizer) -> Result<Vec<(&'static str, u32)>> {
    let config = folder.tokenizer_config()?;
    let mut ids = Vec::new();
    for (field, name) in [
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("sep_token", "seperator"),
        ("pad_token", "padding"),
        ("cls_token", "cls"),
        ("mask_token", "mask"),
    ] {
        let text = match &config {
            Some(config) => match config.optional::<rlx::import::json::Json>(field)? {
                Some(rlx::import::json::Json::String(text)) => Some(text),
                Some(object) => match object.field("content") {
                    Some(rlx::import::json::Json::String(text)) => Some(text.clone()),
                    _ => None,
                },
                None => None,
            },
            None => None,
        };
        if let Some(id) = text.and_then(|text| tokenizer.token_id(&text)) {
            ids.push((name, id));
        }
    }
    if !ids.iter().any(|(name, _)| *name == "eos")
        && let Some(id) = stop_tokens(folder)?.first()
    {
        ids.push(("eos", *id));
    }
    Ok(ids)
}

fn chat_template(folder: &HfFolder) -> Result<Option<String>> {
    let path = folder.root().join("chat_template.jinja");
    if path.is_file() {
        let read = std::fs::read_to_string(&path);
        return Ok(Some(read.map_err(|source| rlx::import::ImportError::Io { path, source })?));
    }
    let Some(config) = folder.tokenizer_config()? else { return Ok(None) };
    Ok(match config.optional::<rlx::import::json::Json>("chat_template")? {
        Some(rlx::import::json::Json::String(text)) => Some(text),
        _ => None,
    })
}
