//! Texts that obey a grammar.

use rlx_models::grammar::Grammar;
use rlx_models::sampling::SamplingOptions;
use rlx_models::{Draft, Model, OpenOptions, TextOptions};
use serde_json::Value;
use std::path::Path;

const SCHEMA: &str = r#"{
    "type": "object",
    "properties": {
        "name": { "type": "string", "maxLength": 6 },
        "age": { "type": "integer", "minimum": 0, "maximum": 99 },
        "kind": { "enum": ["cat", "dog"] }
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": false
}"#;

fn demo() -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    Model::open_with(folder, &OpenOptions { threads: Some(2), ..OpenOptions::default() }).unwrap()
}

fn options(grammar: Grammar, seed: u64, draft: Draft) -> TextOptions {
    let sampling = SamplingOptions { temperature: 1.0, seed, ..SamplingOptions::greedy() };
    TextOptions { max_tokens: 200, sampling, draft, grammar: Some(grammar), ..TextOptions::default() }
}

fn text(model: &Model, options: &TextOptions) -> String {
    model.generate("Once upon a time", options).unwrap().map(|piece| piece.unwrap()).collect()
}

#[test]
fn every_text_under_a_schema_is_a_value_of_it() {
    let model = demo();
    for seed in 0..12 {
        let asked = options(Grammar::JsonSchema(SCHEMA.into()), seed, Draft::Off);
        let found = text(&model, &asked);
        let value: Value = serde_json::from_str(&found).unwrap_or_else(|error| panic!("{found:?}: {error}"));
        assert_eq!(value.as_object().unwrap().len(), 3, "{found}");
        assert!(value["name"].as_str().unwrap().chars().count() <= 6, "{found}");
        assert!(value["age"].as_u64().unwrap() <= 99, "{found}");
        assert!(["cat", "dog"].contains(&value["kind"].as_str().unwrap()), "{found}");
        let guessed = TextOptions { draft: Draft::Lookup { tokens: 3 }, ..asked };
        assert_eq!(text(&model, &guessed), found, "with guesses");
    }
}

#[test]
fn expressions_and_grammars_decide_every_byte() {
    let model = demo();
    let lark = Grammar::Lark("start: \"Rex \" (\"ran\" | \"sat\") \".\"".into());
    for seed in 0..6 {
        let found = text(&model, &options(Grammar::Regex("(yes|no), [a-z]{3}!".into()), seed, Draft::Off));
        let rest =
            found.strip_prefix("yes, ").or(found.strip_prefix("no, ")).unwrap_or_else(|| panic!("{found}"));
        assert!(rest.len() == 4 && rest.ends_with('!'), "{found}");
        let found = text(&model, &options(lark.clone(), seed, Draft::Off));
        assert!(["Rex ran.", "Rex sat."].contains(&found.as_str()), "{found}");
    }
}

#[test]
fn what_cannot_be_obeyed_is_an_error() {
    let model = demo();
    for grammar in [
        Grammar::JsonSchema("{".into()),
        Grammar::JsonSchema(r#"{"type": "nothing known"}"#.into()),
        Grammar::Lark("start: nowhere".into()),
        Grammar::Regex("(".into()),
    ] {
        let asked = options(grammar.clone(), 0, Draft::Off);
        let error = match model.generate("Once", &asked) {
            Err(error) => error.to_string(),
            Ok(mut text) => text.find_map(Result::err).expect("an error").to_string(),
        };
        assert!(error.contains("the grammar"), "{grammar:?}: {error}");
    }
}
