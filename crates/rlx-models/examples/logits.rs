//! For comparisons with other programs: `logits MODEL OUT ID,ID,..` writes the logits of every position as little-endian f32,
//! `logits MODEL` reads a JSON array of texts and prints their token ids as JSON.

use rlx_models::generate::{DecoderRuntime as _, SequenceStep, StepInputs};
use rlx_models::kv::{BlockPool, BlockTable};
use rlx_models::{Built, Model};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    run(&std::env::args().skip(1).collect::<Vec<_>>())
}

fn run(arguments: &[String]) -> Result<(), Box<dyn Error + Send + Sync>> {
    match arguments {
        [model] => print_ids(&Model::open(model)?),
        [model, out, ids] => {
            let ids: Vec<u32> = ids.split(',').map(str::parse).collect::<Result<_, _>>()?;
            let logits = all_logits(&Model::open(model)?, &ids)?;
            let bytes: Vec<u8> = logits.iter().flat_map(|value| value.to_le_bytes()).collect();
            Ok(std::fs::write(out, bytes)?)
        }
        _ => Err("usage: logits MODEL [OUT ID,ID,..]".into()),
    }
}

fn print_ids(model: &Model) -> Result<(), Box<dyn Error + Send + Sync>> {
    let texts: Vec<String> = serde_json::from_reader(std::io::stdin())?;
    let mut ids = Vec::new();
    for text in &texts {
        ids.push(model.tokenizer().encode(text, true)?);
    }
    println!("{}", serde_json::to_string(&ids)?);
    Ok(())
}

fn all_logits(model: &Model, ids: &[u32]) -> Result<Vec<f32>, Box<dyn Error + Send + Sync>> {
    let Built::Decoder(decoder) = model.built() else { return Err("not a decoder".into()) };
    let mut runner = model.decoder_runner(ids.len())?;
    let (mut pool, mut table) = (BlockPool::of(&runner.limits()), BlockTable::new());
    pool.reserve(&mut table, ids.len())?;
    let (mut inputs, mut all) = (StepInputs::default(), Vec::new());
    for (past, token) in ids.iter().enumerate() {
        pool.advance(&mut table, past, past + 1)?;
        inputs.clear(table.blocks().len());
        let tokens = std::slice::from_ref(token);
        let step = SequenceStep { tokens, past, length: ids.len(), table: &table, wants_logits: true };
        inputs.push(&decoder.info, step);
        let mut logits = vec![f32::NAN; decoder.info.vocab];
        runner.step(&inputs, &mut logits)?;
        all.extend(logits);
    }
    Ok(all)
}

#[test]
fn it_runs() -> Result<(), Box<dyn Error + Send + Sync>> {
    let out = std::env::temp_dir().join(format!("rlx-logits-{}", std::process::id()));
    let name = out.to_string_lossy().into_owned();
    run(&[concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo").to_owned(), name, "1,2,3".to_owned()])?;
    let bytes = std::fs::metadata(&out)?.len();
    std::fs::remove_file(out)?;
    assert!(bytes > 0 && bytes.is_multiple_of(12), "three rows of logits: {bytes} bytes");
    Ok(())
}
