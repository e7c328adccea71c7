//! What adapters cost: a decode step of 8 texts with 0, 1, 4 and 8 random adapters of rank 8 on all linear layers, against the plain
//! model.
//!
//! ```text
//! cargo run --release -p rlx-models --example adapter_cost -- MODEL [ROUNDS] [bf16]
//! ```

use rlx_models::generate::{DecoderRuntime, SequenceStep, StepInputs};
use rlx_models::kv::{BlockPool, BlockTable};
use rlx_models::runtime::DecoderRunner;
use rlx_models::{Built, Model, OpenOptions};
use rlx_tensor::DType;
use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

const RANK: usize = 8;
const TEXTS: usize = 8;
const PAST: usize = 64;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    run(std::env::args().skip(1))
}

fn run(mut args: impl Iterator<Item = String>) -> Result<(), Box<dyn Error + Send + Sync>> {
    let folder = args.next().unwrap_or_else(|| "models/demo".to_owned());
    let rounds: usize = args.next().map_or(Ok(9), |rounds| rounds.parse())?;
    let dtype = if args.next().as_deref() == Some("bf16") { DType::BF16 } else { DType::F32 };
    let options = OpenOptions { adapter_dtype: Some(dtype), ..OpenOptions::default() };
    let model = Model::open_with(&folder, &options)?;
    let Built::Decoder(decoder) = model.built() else { return Err("not a decoder".into()) };
    let scratch = std::env::temp_dir().join(format!("adapter-cost-{}", std::process::id()));
    let mut runner = DecoderRunner::with_batch(decoder, Arc::clone(model.compiled()), 256, TEXTS, TEXTS)?;
    runner = runner.with_adapters(model.adapted_graph()?);
    for slot in 0..TEXTS {
        write_adapter(&model, &scratch, slot as u64)?;
        let adapter = model.add_adapter(&format!("adapter {slot}"), &scratch)?;
        runner.set_adapter(slot, Some(adapter))?;
    }
    std::fs::remove_dir_all(&scratch)?;
    let mut pool = BlockPool::of(&runner.limits());
    let mut tables: Vec<BlockTable> = (0..TEXTS).map(|_| BlockTable::new()).collect();
    for table in &mut tables {
        pool.reserve(table, PAST + 1)?;
        pool.advance(table, 0, PAST + 1)?;
    }
    let forms = [None, Some(0), Some(1), Some(4), Some(8)];
    let mut times = vec![Vec::new(); forms.len()];
    let mut logits = vec![0.0; TEXTS * decoder.info.vocab];
    for round in 0..=rounds {
        for (form, times) in forms.iter().zip(&mut times) {
            let mut inputs = StepInputs::default();
            inputs.clear(tables[0].blocks().len());
            for (text, table) in tables.iter().enumerate() {
                let token = [1 + text as u32];
                let step =
                    SequenceStep { tokens: &token, past: PAST, length: PAST + 1, table, wants_logits: true };
                let slot = form.filter(|&adapters| adapters > 0).map(|adapters| text * adapters / TEXTS);
                inputs.push_adapted(&decoder.info, step, slot);
            }
            let started = Instant::now();
            runner.step(&inputs, &mut logits)?;
            // The first round touches the weights.
            if round > 0 {
                times.push(started.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    // Each round against its own two plain steps: what slows the machine for a while slows a whole round.
    let plain: Vec<f64> = times[0].iter().zip(&times[1]).map(|(base, none)| (base + none) / 2.0).collect();
    let against =
        |times: &Vec<f64>| median(&mut times.iter().zip(&plain).map(|(ms, plain)| ms / plain).collect());
    let ratios: Vec<f64> = times.iter().map(against).collect();
    let medians: Vec<f64> = times.iter_mut().map(median).collect();
    println!("{folder}, {TEXTS} texts, rank {RANK}, factors {dtype}, {rounds} rounds");
    for ((form, ms), ratio) in forms.iter().zip(&medians).zip(&ratios) {
        let name = form.map_or("base".to_owned(), |adapters| format!("{adapters} adapters"));
        println!("{name:>12} {ms:8.2} ms {:+6.1}%", (ratio - 1.0) * 100.0);
    }
    Ok(())
}

/// A random adapter of every layer but the head, in PEFT layout.
fn write_adapter(model: &Model, folder: &Path, seed: u64) -> Result<(), Box<dyn Error + Send + Sync>> {
    let layout = model.adapted_graph()?.layout;
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 0.02
    };
    let (mut header, mut data) = (String::from("{"), Vec::new());
    for (weight, site) in layout.sites() {
        let Some(module) = weight.strip_suffix(".weight").filter(|name| name.contains("layers.")) else {
            continue;
        };
        for (side, rows, columns) in [("A", RANK, site.k), ("B", site.n, RANK)] {
            let begin = data.len();
            (0..rows * columns).for_each(|_| data.extend(random().to_le_bytes()));
            let comma = if begin == 0 { "" } else { "," };
            header += &format!(
                "{comma}\"base_model.model.{module}.lora_{side}.weight\":{{\"dtype\":\"F32\",\"shape\":[{rows},{columns}],\
                 \"data_offsets\":[{begin},{}]}}",
                data.len()
            );
        }
    }
    header.push('}');
    std::fs::create_dir_all(folder)?;
    std::fs::write(
        folder.join("adapter_config.json"),
        format!("{{\"peft_type\":\"LORA\",\"r\":{RANK},\"lora_alpha\":16}}"),
    )?;
    // A new file each time: the one before may be mapped still.
    let path = folder.join("adapter_model.safetensors");
    drop(std::fs::remove_file(&path));
    let mut file = std::fs::File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    file.write_all(&data)?;
    Ok(())
}

#[test]
fn it_runs() -> Result<(), Box<dyn Error + Send + Sync>> {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo");
    run([demo, "1", "bf16"].map(str::to_owned).into_iter())
}
