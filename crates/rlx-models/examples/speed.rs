//! Times an encoder at the benchmark's shapes, and a generation.
use rlx_models::embed::{EncoderInputs, EncoderRuntime};
use rlx_models::{Built, Model, OpenOptions, TextOptions};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("give a model folder")?;
    let threads = std::env::args().nth(2).and_then(|t| t.parse().ok());
    let model = Model::open_with(&path, &OpenOptions { threads, ..OpenOptions::default() })?;
    let Built::Encoder(encoder) = model.built() else {
        let mut text = model.generate("Once upon a time, Mia and her dog Rex", &TextOptions::default())?;
        for piece in text.by_ref() {
            print!("{}", piece?);
        }
        println!();
        println!(
            "prefill {:.1} ms, {} tokens in {:.1} ms",
            text.prefill_ms(),
            text.token_ids().len(),
            text.decode_ms()
        );
        return Ok(());
    };
    for (batch, seq) in [(1, 16), (1, 128), (32, 128)] {
        let mut runner = model.encoder_runner(batch * seq)?;
        let mut inputs = EncoderInputs::default();
        inputs.clear();
        for b in 0..batch {
            let ids: Vec<u32> = (0..seq).map(|i| ((b * seq + i) * 131 % 30000) as u32).collect();
            inputs.push(&encoder.info, &ids);
        }
        let mut out = vec![0.0; batch * encoder.info.embedding_dim];
        let mut times = Vec::new();
        for _ in 0..if batch > 1 { 12 } else { 60 } {
            let started = Instant::now();
            runner.run(&inputs, &mut out).map_err(|e| e as Box<dyn std::error::Error>)?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        println!(
            "{batch}x{seq}: median {:.2} ms, best {:.2} ms, sum {}",
            times[times.len() / 2],
            times[0],
            runner.hidden(batch * seq).iter().sum::<f32>()
        );
    }
    Ok(())
}
