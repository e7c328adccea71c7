//! Two adapters swapped under load: texts keep the adapter they started with, new ones get the new one.
//!
//! ```text
//! cargo run --release -p rlx-models --example hot_swap [MODEL [ADAPTER [OTHER]]]
//! ```

use rlx_models::batch::{Batch, BatchEvent, BatchOptions, BatchRequest};
use rlx_models::sampling::SamplingOptions;
use rlx_models::{Model, RequestId};
use std::collections::BTreeMap;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    run(std::env::args().skip(1))
}

fn run(mut args: impl Iterator<Item = String>) -> Result<(), Box<dyn Error>> {
    let model = Model::open(args.next().unwrap_or_else(|| "models/demo".to_owned()))?;
    let folder = args.next().unwrap_or_else(|| "models/demo-lora".to_owned());
    let other = args.next().unwrap_or_else(|| folder.clone());
    model.add_adapter("one", &folder)?;
    model.add_adapter("two", &other)?;

    let mut batch =
        Batch::new(&model, BatchOptions { sequences: 4, context: 256, ..BatchOptions::default() })?;
    let prompt = model.tokenizer().encode("Once upon a time, Mia and her dog Rex", true)?;
    let request = |adapter: Option<&str>| BatchRequest {
        prompt: prompt.clone(),
        max_tokens: 24,
        sampling: SamplingOptions::greedy(),
        adapter: adapter.map(str::to_owned),
    };
    let mut texts: BTreeMap<RequestId, (String, Vec<u32>)> = BTreeMap::new();
    for adapter in [Some("one"), None, Some("two"), Some("one"), Some("two"), None] {
        let generation = adapter.map(|name| model.adapter(name)).transpose()?.map(|a| a.generation());
        let id = batch.submit(request(adapter))?;
        texts.insert(id, (format!("{adapter:?}, generation {generation:?}"), Vec::new()));
    }
    for step in 0.. {
        if batch.is_idle() {
            break;
        }
        if step == 8 {
            // The texts that run and wait go on with the generation they were given.
            model.replace_adapter("one", &folder)?;
            model.remove_adapter("two")?;
            let generation = model.adapter("one")?.generation();
            let id = batch.submit(request(Some("one")))?;
            texts.insert(
                id,
                (format!("Some(\"one\"), generation Some({generation}), after the swap"), Vec::new()),
            );
        }
        for event in batch.step()? {
            if let BatchEvent::Token(id, token) = event
                && let Some((_, tokens)) = texts.get_mut(&id)
            {
                tokens.push(token);
            }
        }
    }
    for (what, tokens) in texts.values() {
        let mut text = model.tokenizer().stream(&prompt);
        let pieces = tokens.iter().map(|&token| text.push(token)).collect::<Result<String, _>>()?;
        println!("{what}:{pieces}");
    }
    Ok(())
}

#[test]
fn it_runs() -> Result<(), Box<dyn Error>> {
    let models = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models");
    run([format!("{models}/demo"), format!("{models}/demo-lora")].into_iter())
}
