//! Tokenizers and chat templates of the golden checkpoints against those of transformers.

use crate::goldens::{Golden, folders, ids_of, name_of, open, open_folder};
use rlx_models::template::{ChatTemplate, Message};
use rlx_models::tokenizer::{TextTokenizer, stop_tokens};
use rlx_models::{Built, ModelError};

fn tokenizer_of(folder: &std::path::Path) -> TextTokenizer {
    let hf = open_folder(folder);
    match open(folder).0 {
        Built::Decoder(model) => TextTokenizer::for_decoder(&hf, &model.info).unwrap(),
        Built::Encoder(model) => TextTokenizer::for_encoder(&hf, &model.info).unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_tokenizer_gives_the_ids_and_texts_of_transformers() {
    for folder in folders() {
        let (name, golden, tokenizer) = (name_of(&folder), Golden::open(&folder), tokenizer_of(&folder));
        for case in golden.json["texts"].as_array().unwrap() {
            let (text, ids) = (case["text"].as_str().unwrap(), ids_of(&case["ids"]));
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{name}: {text:?}");
            if let Some(decoded) = case["decoded"].as_str() {
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), decoded, "{name}: {ids:?}");
            }
        }
    }
}

#[test]
fn streamed_text_is_the_whole_text_and_never_half_a_character() {
    let texts = ["Mia and her dog Rex.", " leading", "naïve café — 你好，世界 🙂👍🏽", "a\n\nb\tc", "e\u{301}"];
    for folder in folders() {
        let (name, tokenizer) = (name_of(&folder), tokenizer_of(&folder));
        for text in texts {
            let ids = tokenizer.encode(text, true).unwrap();
            let mut stream = tokenizer.stream(&[]);
            let mut pieces = String::new();
            for &id in &ids {
                let piece = stream.push(id).unwrap();
                assert!(!piece.contains(char::REPLACEMENT_CHARACTER), "{name}: {piece:?}");
                pieces.push_str(&piece);
            }
            pieces.push_str(&stream.finish().unwrap());
            assert_eq!(pieces, tokenizer.decode(&ids, true).unwrap(), "{name}");
        }
    }
}

#[test]
fn a_continuation_keeps_the_space_before_its_first_word() {
    let folder = folders().into_iter().find(|folder| name_of(folder) == "mistral").unwrap();
    let tokenizer = tokenizer_of(&folder);
    let whole = tokenizer.encode("Mia and Rex", true).unwrap();
    let cut = (1..whole.len()).find(|&cut| tokenizer.decode(&whole[..cut], true).unwrap() == "Mia").unwrap();
    let mut stream = tokenizer.stream(&whole[..cut]);
    let mut text = String::new();
    whole[cut..].iter().for_each(|&id| text.push_str(&stream.push(id).unwrap()));
    text.push_str(&stream.finish().unwrap());
    assert_eq!(text, " and Rex");
}

#[test]
fn half_a_character_at_the_end_is_marked() {
    let folder = folders().into_iter().find(|folder| name_of(folder) == "gpt2").unwrap();
    let tokenizer = tokenizer_of(&folder);
    let ids = tokenizer.encode("a🙂", false).unwrap();
    let mut stream = tokenizer.stream(&[]);
    let printed: String = ids[..ids.len() - 1].iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!((printed.as_str(), stream.finish().unwrap().as_str()), ("a", "\u{FFFD}"));
}

#[test]
fn every_chat_template_writes_what_transformers_writes() {
    let mut seen = 0;
    for folder in folders() {
        let (name, golden) = (name_of(&folder), Golden::open(&folder));
        let template = ChatTemplate::open(&open_folder(&folder));
        let Some(chat) = golden.json.get("chat") else {
            assert!(matches!(template, Err(ModelError::NoTemplate { .. })), "{name}");
            continue;
        };
        let field = |m: &serde_json::Value, key: &str| m[key].as_str().unwrap().to_owned();
        let messages: Vec<Message> = chat["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| Message { role: field(m, "role"), content: field(m, "content") })
            .collect();
        assert_eq!(
            template.unwrap().render(&messages, true).unwrap(),
            chat["rendered"].as_str().unwrap(),
            "{name}"
        );
        seen += 1;
    }
    assert!(seen >= 3, "only {seen} golden chats");
}

#[test]
fn end_tokens_come_from_both_configs() {
    let of = |name: &str| {
        let folder = folders().into_iter().find(|folder| name_of(folder) == name).unwrap();
        stop_tokens(&open_folder(&folder)).unwrap()
    };
    assert_eq!((of("llama"), of("llama-dynamic")), (vec![1, 2], vec![0]));
}
