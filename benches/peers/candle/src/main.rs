//! candle on the CPU as a worker of `../worker.py`'s protocol: `rlx-candle-peer FOLDER f32|bf16 THREADS`. BERT, Llama and
//! Qwen 2. THREADS is only repeated in the answers: `RAYON_NUM_THREADS` sets them.

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{bert, llama, qwen2};
use serde_json::{Value, json};
use std::io::BufRead;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

enum Model {
    Bert(bert::BertModel),
    Llama(Box<llama::Llama>, llama::Config),
    Qwen(Box<qwen2::ModelForCausalLM>),
}

/// A cache behind some tokens. Its copies share the tensors.
enum Cache {
    Llama(llama::Cache),
    Qwen(Box<qwen2::ModelForCausalLM>),
}

struct Peer {
    model: Model,
    dtype: DType,
    vocab: usize,
    threads: usize,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, folder, precision, threads] = args.as_slice() else {
        return Err("rlx-candle-peer FOLDER f32|bf16 THREADS".into());
    };
    let dtype = if precision == "bf16" { DType::BF16 } else { DType::F32 };
    let peer = Peer::open(folder, dtype, threads.parse()?)?;
    for line in std::io::stdin().lock().lines() {
        let answer =
            peer.answer(&line?).unwrap_or_else(|error| json!({"name": "candle", "error": error.to_string()}));
        println!("{answer}");
    }
    Ok(())
}

impl Peer {
    fn open(folder: &str, dtype: DType, threads: usize) -> Result<Peer> {
        let text = std::fs::read_to_string(format!("{folder}/config.json"))?;
        let config: Value = serde_json::from_str(&text)?;
        let file = format!("{folder}/model.safetensors");
        // SAFETY: nothing writes to the file while it is mapped.
        let weights = unsafe { VarBuilder::from_mmaped_safetensors(&[file], dtype, &Device::Cpu)? };
        let model = match config["model_type"].as_str() {
            Some("bert") => Model::Bert(bert::BertModel::load(weights, &serde_json::from_str(&text)?)?),
            Some("llama") => {
                let config = serde_json::from_str::<llama::LlamaConfig>(&text)?.into_config(false);
                Model::Llama(Box::new(llama::Llama::load(weights, &config)?), config)
            }
            Some("qwen2") => {
                Model::Qwen(Box::new(qwen2::ModelForCausalLM::new(&serde_json::from_str(&text)?, weights)?))
            }
            other => return Err(format!("model_type {other:?}: expected bert, llama or qwen2").into()),
        };
        let vocab = config["vocab_size"].as_u64().ok_or("vocab_size is missing")? as usize;
        Ok(Peer { model, dtype, vocab, threads })
    }

    fn answer(&self, line: &str) -> Result<Value> {
        let request: Value = serde_json::from_str(line)?;
        let number = |name: &str| request[name].as_u64().map_or(1, |number| number as usize);
        let n = number("n");
        let mut answer = match request["work"].as_str().unwrap_or("embed") {
            "embed" => self.embed(number("batch"), number("seq"), n)?,
            "prefill" => self.prefill(number("seq"), n)?,
            "decode" => self.decode(number("ctx"), number("steps"), n)?,
            other => return Err(format!("candle does not {other}").into()),
        };
        answer["name"] = json!("candle");
        answer["version"] = json!("0.11.1");
        answer["threads"] = json!(self.threads);
        answer["rss_mb"] = json!(peak_rss_mb());
        Ok(answer)
    }

    fn token(&self, index: usize) -> u32 {
        ((index * 131) % self.vocab.min(30_000)) as u32
    }

    fn ids(&self, batch: usize, seq: usize) -> Result<Tensor> {
        let ids: Vec<u32> = (0..batch * seq).map(|index| self.token(index)).collect();
        Ok(Tensor::from_vec(ids, (batch, seq), &Device::Cpu)?)
    }

    fn embed(&self, batch: usize, seq: usize, n: usize) -> Result<Value> {
        let Model::Bert(model) = &self.model else { return Err("the model does not embed".into()) };
        let ids = self.ids(batch, seq)?;
        let (types, mask) = (ids.zeros_like()?, ids.ones_like()?);
        let (mut ms, mut hidden) = (Vec::new(), None);
        for _ in 0..n {
            let started = Instant::now();
            hidden = Some(model.forward(&ids, &types, Some(&mask))?);
            ms.push(started.elapsed().as_secs_f64() * 1e3);
        }
        report(ms, &hidden.ok_or("n is 0")?)
    }

    fn empty(&self) -> Result<Cache> {
        Ok(match &self.model {
            Model::Llama(_, config) => {
                Cache::Llama(llama::Cache::new(true, self.dtype, config, &Device::Cpu)?)
            }
            Model::Qwen(model) => {
                let mut model = model.clone();
                model.clear_kv_cache();
                Cache::Qwen(model)
            }
            Model::Bert(_) => return Err("the model does not decode".into()),
        })
    }

    /// Logits of the last token.
    fn run(&self, cache: &mut Cache, ids: &Tensor, past: usize) -> Result<Tensor> {
        Ok(match (&self.model, cache) {
            (Model::Llama(model, _), Cache::Llama(cache)) => model.forward(ids, past, cache)?,
            (_, Cache::Qwen(model)) => model.forward(ids, past)?,
            _ => return Err("the cache is of another model".into()),
        })
    }

    fn prefill(&self, seq: usize, n: usize) -> Result<Value> {
        let ids = self.ids(1, seq)?;
        let (mut ms, mut logits) = (Vec::new(), None);
        for _ in 0..n {
            let mut cache = self.empty()?;
            let started = Instant::now();
            logits = Some(self.run(&mut cache, &ids, 0)?);
            ms.push(started.elapsed().as_secs_f64() * 1e3);
        }
        report(ms, &logits.ok_or("n is 0")?)
    }

    fn decode(&self, ctx: usize, steps: usize, n: usize) -> Result<Value> {
        let mut filled = self.empty()?;
        self.run(&mut filled, &self.ids(1, ctx)?, 0)?;
        let (mut ms, mut first, mut chosen) = (Vec::new(), None, Vec::new());
        for _ in 0..n {
            let mut cache = match &filled {
                Cache::Llama(cache) => Cache::Llama(cache.clone()),
                Cache::Qwen(model) => Cache::Qwen(model.clone()),
            };
            let (mut token, mut spent) = (self.token(ctx), 0.0);
            chosen.clear();
            for step in 0..steps {
                let started = Instant::now();
                let ids = Tensor::new(&[[token]], &Device::Cpu)?;
                let logits = self.run(&mut cache, &ids, ctx + step)?;
                spent += started.elapsed().as_secs_f64();
                let logits = logits.flatten_all()?;
                token = logits.argmax(0)?.to_scalar::<u32>()?;
                chosen.push(token);
                first.get_or_insert(logits);
            }
            ms.push(spent * 1e3 / steps as f64);
        }
        let mut answer = report(ms, &first.ok_or("n or steps is 0")?)?;
        answer["token_ids"] = json!(chosen);
        Ok(answer)
    }
}

fn report(ms: Vec<f64>, output: &Tensor) -> Result<Value> {
    let flat = output.flatten_all()?.to_dtype(DType::F32)?;
    let first = flat.i(..8)?.to_vec1::<f32>()?;
    let mean_abs = flat.abs()?.mean_all()?.to_scalar::<f32>()?;
    Ok(json!({"ms": ms, "first": first, "mean_abs": mean_abs}))
}

fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kb| kb / 1024.0)
}
